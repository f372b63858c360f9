//! Per cluster, the pairs whose weighted sum comes closest to the cluster's mean.
//!
//! The choice of TAGCOS (arXiv 2407.15235): orthogonal matching pursuit with non-negative weights. Each step picks the
//! pair with the largest inner product with the residual, then fits the weights of all picked pairs anew by non-negative
//! least squares (Lawson and Hanson, "Solving least squares problems", 1974, chapter 23). The mean of a cluster is a sum
//! of its pairs, so the residual reaches zero after at most about d picks; what is left of the quota then goes to the
//! pairs with the largest inner product with the mean, without weight. Quotas are in proportion to the clusters' sizes,
//! by the method of the largest remainder.
//!
//! A step has to look at every pair of the cluster. It looks at copies rounded to bytes, whose error is bounded by the
//! Cauchy–Schwarz inequality, and computes the exact inner product for those alone that may be the largest.
//!
//! For clusters of n pairs with quotas q, of which s have a weight, it takes O(n d + q (n d / 4 + s d + s²)) time for each
//! in units of float32 arithmetic, and n d + 8 q (d + s) bytes for each that is worked on, one for each thread at most. Of
//! the n d bytes no more are taken than are allowed; pairs without a copy are multiplied as they are, step by step.

mod least_squares;
mod pursuit;
mod quotas;
mod search;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::{PICKS, reserved};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::{Depths, Limits};
use pursuit::{Pursuit, Work};

/// Bytes of rounded copies above which the threads share a cluster; below it each takes one of its own. Sharing from 4 MiB
/// on ran as fast on two threads (50 clusters of 10 MB); this bounds the memory of many.
const SHARED_BYTES: usize = 1 << 28;

/// Bytes of rounded copies at most, unless told otherwise.
pub const CACHE_BYTES: usize = 1 << 30;

/// The pairs chosen, cluster after cluster in the order of their choice.
#[derive(Clone, Debug, Default)]
pub struct Coreset {
    pub picks: Vec<usize>,
    /// Not negative; within a cluster the pairs times their weights add up to about the cluster's mean.
    pub weights: Vec<f64>,
}

/// Chooses `budget` pairs, fewer only if the limits leave fewer. Clusters share what the limits keep a cluster from using.
///
/// ```
/// use bpo::coreset::{CACHE_BYTES, coreset};
/// use bpo::matrix::{Rows, Values};
/// use bpo::points::Points;
/// use bpo::progress::Progress;
/// use bpo::prompts::Limits;
///
/// let rows = Rows::new(Values::F32(&[1.0, 0.0, 0.0, 1.0, 0.6, 0.8]), 3, 2)?;
/// let pairs = Points::from_pairs(rows, &[[0, 0], [1, 1], [2, 2]], &[[1.0, 0.0]; 3], &Progress::default())?;
/// let found = coreset(&pairs, &[0, 0, 0], 1, Limits::default(), CACHE_BYTES, &Progress::default())?;
/// assert_eq!(found.picks, [2]); // it alone is near the mean of the three
/// assert!((found.weights[0] - 0.8).abs() < 1e-6);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, a cluster is negative, a row is not finite, the memory cannot be had, or the computation was
/// cancelled.
pub fn coreset(
    points: &Points<2>,
    clusters: &[i32],
    budget: usize,
    limits: Limits,
    cache_bytes: usize,
    progress: &Progress,
) -> Result<Coreset> {
    check(points, clusters, limits)?;
    let members = quotas::members(clusters, limits, progress)?;
    let budget = budget.min(members.iter().map(Vec::len).sum());
    progress.start(budget);
    if budget == 0 {
        return Ok(Coreset::default());
    }
    let quotas = quotas::quotas(&members, budget, progress)?;
    let pursuits = match Depths::new(limits, progress)? {
        Some(cap) => pursue_in_turn(points, &members, &quotas, cap, cache_bytes, progress)?,
        None => pursue_side_by_side(points, &members, &quotas, cache_bytes, progress)?,
    };
    progress.finish();
    let mut coreset = Coreset { picks: reserved(budget, PICKS)?, weights: reserved(budget, PICKS)? };
    for mut pursuit in pursuits {
        coreset.picks.append(&mut pursuit.picks);
        coreset.weights.append(&mut pursuit.weights);
        coreset.weights.resize(coreset.picks.len(), 0.0);
    }
    Ok(coreset)
}

/// Pursues one cluster after the other: which prompts are full depends on those before.
fn pursue_in_turn(
    points: &Points<2>,
    members: &[Vec<usize>],
    quotas: &[usize],
    mut cap: Depths,
    cache_bytes: usize,
    progress: &Progress,
) -> Result<Vec<Pursuit>> {
    let work = Work { copy_bytes: cache_bytes, parallel: true };
    let pursue =
        |(members, &quota): (&Vec<usize>, &usize)| Pursuit::run(points, members, quota, Some(&mut cap), work, progress);
    let mut pursuits = members.iter().zip(quotas).map(pursue).collect::<Result<Vec<_>>>()?;
    quotas::share_rest(points, members, quotas.iter().sum(), &mut pursuits, &mut cap, progress)?;
    Ok(pursuits)
}

/// Pursues the small clusters at the same time, then the large ones each with all threads.
fn pursue_side_by_side(
    points: &Points<2>,
    members: &[Vec<usize>],
    quotas: &[usize],
    cache_bytes: usize,
    progress: &Progress,
) -> Result<Vec<Pursuit>> {
    let run = |index: usize, parallel| {
        let work = Work { copy_bytes: cache_bytes, parallel };
        Pursuit::run(points, &members[index], quotas[index], None, work, progress)
    };
    let most = SHARED_BYTES.min(cache_bytes / rayon::current_num_threads());
    let alone = |index: &usize| members[*index].len().saturating_mul(points.dim()) <= most;
    let mut pursuits: Vec<Option<Pursuit>> = (0..members.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|index| alone(&index).then(|| run(index, false)).transpose())
        .collect::<Result<_>>()?;
    for (index, pursuit) in pursuits.iter_mut().enumerate().filter(|(_, pursuit)| pursuit.is_none()) {
        *pursuit = Some(run(index, true)?);
    }
    Ok(pursuits.into_iter().flatten().collect())
}

fn check(points: &Points<2>, clusters: &[i32], limits: Limits) -> Result<()> {
    if points.dim() == 0 {
        return Err(Error::shape("rows", "(n, d) with d >= 1", "(n, 0)"));
    }
    if clusters.len() != points.count() {
        let expected = format!("({},), one for each pair", points.count());
        return Err(Error::shape("clusters", expected, format!("({},)", clusters.len())));
    }
    if let Some(index) = clusters.iter().position(|&cluster| cluster < 0) {
        let label = i64::from(clusters[index]);
        return Err(Error::ClusterOutOfRange { array: "clusters", index, label, clusters: i32::MAX as usize });
    }
    limits.check(points.count())
}
