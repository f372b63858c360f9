//! Shares of a total among clusters, by the method of the largest remainder.

use crate::error::{Error, Result};
use crate::memory::{RESULTS, build, chosen, each, first};
use crate::order::{descending, sort};
use crate::progress::Progress;

/// Splits `total` in proportion to `masses`, of which one at least is positive: the whole parts first, then one more to
/// those with the largest fractions (ties: the lower index).
///
/// ```
/// use bpo::progress::Progress;
/// use bpo::shares::largest_remainder;
///
/// // 2.4, 0.8 and 0.8 of four.
/// assert_eq!(largest_remainder(&[3.0, 1.0, 1.0], 4, &Progress::default())?, [2, 1, 1]);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn largest_remainder(masses: &[f64], total: usize, progress: &Progress) -> Result<Vec<usize>> {
    let mut sum = 0.0;
    each(masses.len(), progress, |index| sum += masses[index])?;
    let share = |index: usize| total as f64 * masses[index] / sum;
    let mut quotas = build(masses.len(), RESULTS, progress, |index| share(index).floor() as usize)?;
    let fraction = |index: usize| (masses[index] > 0.0).then(|| (descending(share(index).fract()), index));
    let order = sort(chosen(masses.len(), RESULTS, progress, fraction)?, progress)?;
    let mut given = 0;
    each(masses.len(), progress, |index| given += quotas[index])?;
    each(total.saturating_sub(given), progress, |turn| quotas[order[turn % order.len()].1] += 1)?;
    Ok(quotas)
}

/// Sizes times weights, which are what shares are in proportion to; if only clusters of weight zero are left, weights no longer
/// count.
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn weighted(sizes: Vec<f64>, weight: impl Fn(usize) -> f64 + Sync, progress: &Progress) -> Result<Vec<f64>> {
    let masses = build(sizes.len(), RESULTS, progress, |index| sizes[index] * weight(index))?;
    Ok(if first(masses.len(), progress, |index| masses[index] > 0.0)?.is_some() { masses } else { sizes })
}

/// # Errors
/// If a cluster is negative or without weight, a weight is negative or not finite, or the computation was cancelled.
pub fn check_clusters(clusters: &[i32], weights: Option<&[f64]>, progress: &Progress) -> Result<()> {
    let limit = weights.map_or(i32::MAX as usize, <[f64]>::len);
    let known = |cluster: i32| usize::try_from(cluster).is_ok_and(|cluster| cluster < limit);
    if let Some(index) = first(clusters.len(), progress, |pair| !known(clusters[pair]))? {
        let label = i64::from(clusters[index]);
        return Err(Error::ClusterOutOfRange { array: "clusters", index, label, clusters: limit });
    }
    let weights = weights.unwrap_or_default();
    match weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0)) {
        Some(index) => Err(Error::Weight { array: "cluster_weights", index, value: weights[index] }),
        None => Ok(()),
    }
}
