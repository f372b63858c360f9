//! From a budget to the pairs of each prompt.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::order::{descending, sort};
use crate::progress::Progress;
use crate::prompts::Prompts;
use crate::shares::largest_remainder;

/// Bits of a pair's index in a sorting key, beside 31 of the cluster and 64 of the usefulness.
const PAIR_BITS: u32 = 33;

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
/// 1. If `every_prompt`, each prompt gets its most useful pair, so none is lost.
/// 2. The rest of the budget is shared among the clusters in proportion to their pairs not yet kept, times the weight
///    of the cluster, by the method of the largest remainder (ties: the lower cluster).
/// 3. A cluster keeps its most useful pairs first (ties: the lower pair), leaving out prompts that have `max_depth`.
/// 4. What a cluster could not use is shared among the others in the same way. If only clusters of weight zero are
///    left, weights no longer count.
///
/// So the number of pairs kept is exactly min(budget, the pairs that `max_depth` allows).
///
/// O(P log P) time for P pairs, of which only the sorting is more than O(P), and 16 bytes a pair twice.
///
/// # Errors
/// If lengths differ, a usefulness is NaN, a cluster is negative or without weight, a weight is negative or not finite,
/// the budget is below the number of prompts that each get a pair, or the computation was cancelled.
pub fn allocate_depth(
    candidates: Candidates,
    budget: usize,
    every_prompt: bool,
    max_depth: Option<usize>,
    cluster_weights: Option<&[f64]>,
    progress: &Progress,
) -> Result<Vec<bool>> {
    check(candidates, max_depth, cluster_weights)?;
    let Prompts { numbers: prompts, sizes } = Prompts::number(candidates.prompts, progress)?;
    if every_prompt && budget < sizes.len() {
        return Err(Error::BudgetBelowPrompts { budget, prompts: sizes.len() });
    }
    let cap = max_depth.unwrap_or(usize::MAX);
    let target = budget.min(sizes.iter().map(|&size| size.min(cap)).sum());

    let mut kept = vec![false; prompts.len()];
    let mut depths = vec![0; sizes.len()];
    if every_prompt {
        for pair in best_of_each_prompt(candidates, &prompts, sizes.len()) {
            kept[pair] = true;
        }
        depths.fill(1);
    }
    let mut left = target - depths.iter().sum::<usize>();
    let mut queues = queues(candidates, &kept, cluster_weights, progress)?;
    while left > 0 {
        // A queue that gives less than its quota is empty from then on, so each round ends the work or a queue.
        let quotas = largest_remainder(&masses(&queues), left);
        for (queue, quota) in queues.iter_mut().zip(quotas) {
            progress.check()?;
            left -= queue.take(quota, |pair| {
                let depth = &mut depths[prompts[pair] as usize];
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

fn best_of_each_prompt(candidates: Candidates, prompts: &[u32], count: usize) -> Vec<usize> {
    let mut best: Vec<Option<usize>> = vec![None; count];
    for (pair, &prompt) in prompts.iter().enumerate() {
        let prompt = prompt as usize;
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

fn queues(
    candidates: Candidates,
    kept: &[bool],
    cluster_weights: Option<&[f64]>,
    progress: &Progress,
) -> Result<Vec<Queue>> {
    let Candidates { clusters, usefulness, .. } = candidates;
    // Cluster, usefulness and pair side by side in one number, so that comparing looks nothing up.
    let key = |pair: usize| {
        (clusters[pair] as u128) << (64 + PAIR_BITS)
            | u128::from(descending(usefulness[pair])) << PAIR_BITS
            | pair as u128
    };
    let keys = (0..kept.len()).into_par_iter().filter(|&pair| !kept[pair]).map(key).collect();
    let cluster_of = |key: u128| (key >> (64 + PAIR_BITS)) as usize;
    Ok(sort(keys, progress)?
        .chunk_by(|&left, &right| cluster_of(left) == cluster_of(right))
        .map(|keys| {
            let weight = cluster_weights.map_or(1.0, |weights| weights[cluster_of(keys[0])]);
            let pairs = keys.iter().map(|key| (key & ((1 << PAIR_BITS) - 1)) as usize).collect();
            Queue { weight, pairs, next: 0, taken: 0 }
        })
        .collect())
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
