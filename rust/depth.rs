//! From a budget to the pairs of each prompt.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::error::{Error, Result};

/// What is to be shared out.
#[derive(Clone, Copy, Debug)]
pub struct Candidates<'a> {
    /// The prompt of each pair; any numbers.
    pub prompts: &'a [i64],
    /// The cluster of each pair, not negative.
    pub clusters: &'a [i32],
    /// The larger, the sooner a pair is kept.
    pub usefulness: &'a [f64],
}

/// Which pairs to keep.
///
/// 1. Each prompt gets its most useful pair, so no prompt is lost.
/// 2. The rest of the budget is shared among the clusters in proportion to their pairs not yet kept, times the weight
///    of the cluster, by the method of the largest remainder (ties: the lower cluster).
/// 3. A cluster keeps its most useful pairs first (ties: the lower pair), leaving out prompts that have `max_depth`.
/// 4. What a cluster could not use is shared among the others in the same way. If only clusters of weight zero are
///    left, weights no longer count.
///
/// So the number of pairs kept is exactly min(budget, the pairs that `max_depth` allows).
///
/// # Errors
/// If lengths differ, a usefulness is NaN, a cluster is negative or without weight, a weight is negative or not finite,
/// or the budget is below the number of prompts.
pub fn allocate_depth(
    candidates: Candidates,
    budget: usize,
    max_depth: Option<usize>,
    cluster_weights: Option<&[f64]>,
) -> Result<Vec<bool>> {
    check(candidates, max_depth, cluster_weights)?;
    let (prompts, sizes) = number_prompts(candidates.prompts);
    if budget < sizes.len() {
        return Err(Error::BudgetBelowPrompts { budget, prompts: sizes.len() });
    }
    let cap = max_depth.unwrap_or(usize::MAX);
    let target = budget.min(sizes.iter().map(|&size| size.min(cap)).sum());

    let mut kept = vec![false; prompts.len()];
    for pair in best_of_each_prompt(candidates, &prompts, sizes.len()) {
        kept[pair] = true;
    }
    let mut depths = vec![1; sizes.len()];
    let mut left = target - sizes.len();
    let mut queues = queues(candidates, &kept, cluster_weights);
    while left > 0 {
        // A queue that gives less than its quota is empty from then on, so each round ends the work or a queue.
        let quotas = largest_remainder(&masses(&queues), left);
        for (queue, quota) in queues.iter_mut().zip(quotas) {
            left -= queue.take(quota, |pair| {
                let depth = &mut depths[prompts[pair]];
                let eligible = *depth < cap;
                if eligible {
                    *depth += 1;
                    kept[pair] = true;
                }
                eligible
            });
        }
    }
    Ok(kept)
}

fn check(candidates: Candidates, max_depth: Option<usize>, cluster_weights: Option<&[f64]>) -> Result<()> {
    let Candidates { prompts, clusters, usefulness } = candidates;
    let expected = format!("({},), as `prompts` has", prompts.len());
    if clusters.len() != prompts.len() {
        return Err(Error::shape("clusters", expected, format!("({},)", clusters.len())));
    }
    if usefulness.len() != prompts.len() {
        return Err(Error::shape("usefulness", expected, format!("({},)", usefulness.len())));
    }
    if let Some(index) = usefulness.iter().position(|value| value.is_nan()) {
        return Err(Error::NotFinite { array: "usefulness", index, value: usefulness[index] });
    }
    if max_depth == Some(0) {
        return Err(Error::argument("max_depth", "at least 1", 0));
    }
    let limit = cluster_weights.map_or(i32::MAX as usize, <[f64]>::len);
    let known = |cluster: i32| usize::try_from(cluster).is_ok_and(|cluster| cluster < limit);
    if let Some(index) = clusters.iter().position(|&cluster| !known(cluster)) {
        let label = i64::from(clusters[index]);
        return Err(Error::ClusterOutOfRange { array: "clusters", index, label, clusters: limit });
    }
    let weights = cluster_weights.unwrap_or_default();
    match weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0)) {
        Some(index) => {
            let value = format!("{} for cluster {index}", weights[index]);
            Err(Error::argument("cluster_weights", "finite and not negative", value))
        }
        None => Ok(()),
    }
}

/// Numbers the prompts in the order of their first pair; returns each pair's number and each prompt's pairs.
fn number_prompts(prompts: &[i64]) -> (Vec<usize>, Vec<usize>) {
    let mut numbers = HashMap::new();
    let mut sizes = Vec::new();
    let numbered = prompts.iter().map(|prompt| {
        let number = *numbers.entry(prompt).or_insert_with(|| {
            sizes.push(0);
            sizes.len() - 1
        });
        sizes[number] += 1;
        number
    });
    (numbered.collect(), sizes)
}

fn best_of_each_prompt(candidates: Candidates, prompts: &[usize], count: usize) -> Vec<usize> {
    let mut best: Vec<Option<usize>> = vec![None; count];
    for (pair, &prompt) in prompts.iter().enumerate() {
        let better = best[prompt].is_none_or(|best| candidates.usefulness[pair] > candidates.usefulness[best]);
        if better {
            best[prompt] = Some(pair);
        }
    }
    best.into_iter().flatten().collect()
}

/// The pairs of one cluster that the first step left, the most useful first.
struct Queue {
    weight: f64,
    pairs: Vec<usize>,
    next: usize,
    taken: usize,
}

impl Queue {
    /// Offers pairs in order until `quota` were accepted or none is left; returns how many were accepted.
    fn take(&mut self, quota: usize, mut accept: impl FnMut(usize) -> bool) -> usize {
        let mut accepted = 0;
        while accepted < quota && self.next < self.pairs.len() {
            accepted += usize::from(accept(self.pairs[self.next]));
            self.next += 1;
        }
        self.taken += accepted;
        accepted
    }

    /// Pairs not kept, zero once all were offered.
    fn size(&self) -> usize {
        if self.next == self.pairs.len() { 0 } else { self.pairs.len() - self.taken }
    }
}

fn queues(candidates: Candidates, kept: &[bool], cluster_weights: Option<&[f64]>) -> Vec<Queue> {
    let Candidates { clusters, usefulness, .. } = candidates;
    let mut pairs: Vec<usize> = (0..kept.len()).filter(|&pair| !kept[pair]).collect();
    // Stable, so the lower pair comes first among equals; no usefulness is NaN.
    pairs.sort_by(|&left, &right| {
        let more_useful = usefulness[right].partial_cmp(&usefulness[left]).unwrap_or(Ordering::Equal);
        clusters[left].cmp(&clusters[right]).then(more_useful)
    });
    pairs
        .chunk_by(|&left, &right| clusters[left] == clusters[right])
        .map(|pairs| {
            let weight = cluster_weights.map_or(1.0, |weights| weights[clusters[pairs[0]] as usize]);
            Queue { weight, pairs: pairs.to_vec(), next: 0, taken: 0 }
        })
        .collect()
}

/// What the clusters' shares are in proportion to.
fn masses(queues: &[Queue]) -> Vec<f64> {
    let weighted: Vec<f64> = queues.iter().map(|queue| queue.size() as f64 * queue.weight).collect();
    if weighted.iter().any(|&mass| mass > 0.0) {
        weighted
    } else {
        queues.iter().map(|queue| queue.size() as f64).collect()
    }
}

/// Splits `total` in proportion to `masses`, of which one at least is positive: the whole parts first, then one more to
/// those with the largest fractions.
fn largest_remainder(masses: &[f64], total: usize) -> Vec<usize> {
    let sum: f64 = masses.iter().sum();
    let shares: Vec<f64> = masses.iter().map(|mass| total as f64 * mass / sum).collect();
    let mut quotas: Vec<usize> = shares.iter().map(|share| share.floor() as usize).collect();
    let mut order: Vec<usize> = (0..masses.len()).filter(|&index| masses[index] > 0.0).collect();
    order.sort_by(|&left, &right| shares[right].fract().total_cmp(&shares[left].fract()));
    let rest = total.saturating_sub(quotas.iter().sum());
    for index in order.into_iter().cycle().take(rest) {
        quotas[index] += 1;
    }
    quotas
}
