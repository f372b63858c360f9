//! From a budget to the pairs of each prompt.

use crate::error::{Error, Result};
use crate::memory::{self, PIECE, RESULTS, build, chosen, each, filled};
use crate::order::{descending, sort};
use crate::progress::Progress;
use crate::prompts::Prompts;
use crate::shares::{check_clusters, largest_remainder, weighted};

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
/// ```
/// use bpo::depth::{Candidates, allocate_depth};
/// use bpo::progress::Progress;
///
/// let candidates =
///     Candidates { prompts: &[0, 0, 0, 1], clusters: &[0, 0, 1, 0], usefulness: &[0.9, 0.8, 0.7, 0.1] };
/// let kept = allocate_depth(candidates, 2, true, None, None, &Progress::default())?;
/// assert_eq!(kept, [true, false, false, true]);
/// // Not each prompt, but each cluster in proportion to its pairs.
/// let kept = allocate_depth(candidates, 3, false, None, None, &Progress::default())?;
/// assert_eq!(kept, [true, true, true, false]);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If lengths differ, a usefulness is NaN, a cluster is negative or without weight, a weight is negative or not finite,
/// the budget is below the number of prompts that each get a pair, the memory cannot be had, or the computation was
/// cancelled.
pub fn allocate_depth(
    candidates: Candidates,
    budget: usize,
    every_prompt: bool,
    max_depth: Option<usize>,
    cluster_weights: Option<&[f64]>,
    progress: &Progress,
) -> Result<Vec<bool>> {
    check(candidates, max_depth, cluster_weights, progress)?;
    let Prompts { numbers: prompts, sizes } = Prompts::number(candidates.prompts, progress)?;
    if every_prompt && budget < sizes.len() {
        return Err(Error::BudgetBelowPrompts { budget, prompts: sizes.len() });
    }
    let cap = max_depth.unwrap_or(usize::MAX);
    let target = budget.min(sizes.iter().map(|&size| size.min(cap)).sum());

    let mut kept = build(prompts.len(), RESULTS, progress, |_| false)?;
    let mut depths = filled(sizes.len(), usize::from(every_prompt), RESULTS)?;
    if every_prompt {
        let best = best_of_each_prompt(candidates, &prompts, sizes.len(), progress)?;
        each(best.len(), progress, |prompt| kept[best[prompt]] = true)?;
    }
    let mut left = target - depths.iter().sum::<usize>();
    let keys = sort(keys(candidates, &kept, progress)?, progress)?;
    let mut queues = queues(&keys, cluster_weights, progress)?;
    while left > 0 {
        // A queue that gives less than its quota is empty from then on, so each round ends the work or a queue.
        let quotas = largest_remainder(&masses(&queues, progress)?, left, progress)?;
        for (queue, quota) in queues.iter_mut().zip(quotas) {
            left -= queue.take(quota, progress, |pair| {
                let depth = &mut depths[prompts[pair] as usize];
                let eligible = *depth < cap;
                if eligible {
                    *depth += 1;
                    kept[pair] = true;
                }
                eligible
            })?;
        }
    }
    Ok(kept)
}

fn check(
    candidates: Candidates,
    max_depth: Option<usize>,
    cluster_weights: Option<&[f64]>,
    progress: &Progress,
) -> Result<()> {
    let Candidates { prompts, clusters, usefulness } = candidates;
    let expected = format!("({},), as `prompts` has", prompts.len());
    if clusters.len() != prompts.len() {
        return Err(Error::shape("clusters", expected, format!("({},)", clusters.len())));
    }
    if usefulness.len() != prompts.len() {
        return Err(Error::shape("usefulness", expected, format!("({},)", usefulness.len())));
    }
    if let Some(index) = memory::first(usefulness.len(), progress, |pair| usefulness[pair].is_nan())? {
        return Err(Error::NotFinite { array: "usefulness", index, value: usefulness[index] });
    }
    if max_depth == Some(0) {
        return Err(Error::argument("max_depth", "at least 1", 0));
    }
    check_clusters(clusters, cluster_weights, progress)
}

/// Every prompt has a pair.
fn best_of_each_prompt(
    candidates: Candidates,
    prompts: &[u32],
    count: usize,
    progress: &Progress,
) -> Result<Vec<usize>> {
    let mut bests = filled(count, usize::MAX, RESULTS)?;
    each(prompts.len(), progress, |pair| {
        let best = &mut bests[prompts[pair] as usize];
        if *best == usize::MAX || candidates.usefulness[pair] > candidates.usefulness[*best] {
            *best = pair;
        }
    })?;
    Ok(bests)
}

/// The pairs of one cluster that the first step left, the most useful first.
struct Queue<'k> {
    weight: f64,
    keys: &'k [u128],
    next: usize,
    taken: usize,
}

impl Queue<'_> {
    /// Offers pairs in order until `quota` were accepted or none is left; returns how many were accepted.
    fn take(&mut self, quota: usize, progress: &Progress, mut accept: impl FnMut(usize) -> bool) -> Result<usize> {
        let mut accepted = 0;
        while accepted < quota && self.next < self.keys.len() {
            if self.next.is_multiple_of(PIECE) {
                progress.check()?;
            }
            accepted += usize::from(accept((self.keys[self.next] & ((1 << PAIR_BITS) - 1)) as usize));
            self.next += 1;
        }
        self.taken += accepted;
        progress.check()?;
        Ok(accepted)
    }

    /// Pairs not kept, zero once all were offered.
    fn size(&self) -> usize {
        if self.next == self.keys.len() { 0 } else { self.keys.len() - self.taken }
    }
}

/// A number for each pair that is not kept: its cluster, usefulness and index side by side, so that comparing looks
/// nothing up.
fn keys(candidates: Candidates, kept: &[bool], progress: &Progress) -> Result<Vec<u128>> {
    let Candidates { clusters, usefulness, .. } = candidates;
    chosen(kept.len(), RESULTS, progress, |pair| {
        let cluster = (clusters[pair] as u128) << (64 + PAIR_BITS);
        let key = cluster | u128::from(descending(usefulness[pair])) << PAIR_BITS | pair as u128;
        (!kept[pair]).then_some(key)
    })
}

/// The queues of sorted keys.
fn queues<'k>(mut keys: &'k [u128], cluster_weights: Option<&[f64]>, progress: &Progress) -> Result<Vec<Queue<'k>>> {
    let cluster_of = |key: u128| (key >> (64 + PAIR_BITS)) as usize;
    let mut queues = Vec::new();
    while let Some(&key) = keys.first() {
        progress.check()?; // there may be as many clusters as pairs
        let cluster = cluster_of(key);
        let (own, rest) = keys.split_at(keys.partition_point(|&key| cluster_of(key) == cluster));
        let weight = cluster_weights.map_or(1.0, |weights| weights[cluster]);
        memory::grow(&mut queues, 1, RESULTS)?;
        queues.push(Queue { weight, keys: own, next: 0, taken: 0 });
        keys = rest;
    }
    Ok(queues)
}

/// What the clusters' shares are in proportion to.
fn masses(queues: &[Queue], progress: &Progress) -> Result<Vec<f64>> {
    let sizes = build(queues.len(), RESULTS, progress, |queue| queues[queue].size() as f64)?;
    weighted(sizes, |queue| queues[queue].weight, progress)
}
