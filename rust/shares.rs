//! Shares of a total, by the method of the largest remainder.

use crate::error::Result;
use crate::memory::{RESULTS, build, chosen, each};
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
