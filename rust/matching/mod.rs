//! Greedy matching to a direction: the pairs whose sum points most nearly where a target does.
//!
//! Each step picks the pair z with the largest cos(S + z, u), S being the sum of those picked and u the target: what a
//! pair is worth is what it adds to those that are there *(ours)*. With σ = ⟨S, u⟩ and N = ‖S‖² that cosine is
//! (σ + ⟨z, u⟩) / √(N + 2⟨S, z⟩ + ‖z‖²), of which a pick changes ⟨S, z⟩ alone; but that for every row.
//!
//! S is σu and a rest R that the picks keep short, as each cancels some of it: R turns with every pick, so that no bound on
//! ⟨R, z⟩ lasts, but it needs few digits. A step multiplies R with copies of the rows in 8 bits, whose error is bounded by
//! the Cauchy–Schwarz inequality, and forms the sum in float64 for those pairs alone that may be the best. So the picks are
//! those of the plain algorithm in float64, but where cosines differ by rounding alone.
//!
//! For B picks from P pairs of n rows of dimension d it takes O(n d + P d + B (n d + P)) time, of which B n d is in bytes
//! that are read and not in float64 arithmetic; and n d + 40 n + 41 P bytes, of which the first term may be limited.
//! Where processes share the points, each does so with the rows of its own pairs; the best of each and its vector are what they
//! tell each other at each step.

mod measure;
mod rows;

use crate::error::{Error, Result};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::{Depths, Limits};
use measure::{Pairs, State};

/// The pairs picked, in order.
#[derive(Clone, Debug, Default)]
pub struct Matching {
    pub picks: Vec<usize>,
    /// The cosine of the sum and the target after each pick; 0 where the sum is zero.
    pub cosines: Vec<f64>,
}

/// Picks at most `budget` pairs, fewer only if the limits leave fewer. Ties go to the lower pair. A pair that would make
/// the sum zero, which has no direction, comes after all others. Copies of rows take `cache_bytes` at most; rows beyond
/// are multiplied as they are.
///
/// ```
/// use bpo::coreset::CACHE_BYTES;
/// use bpo::matching::matching;
/// use bpo::matrix::{Rows, Values};
/// use bpo::points::Points;
/// use bpo::progress::Progress;
/// use bpo::prompts::Limits;
///
/// let rows = Rows::new(Values::F32(&[1.0, 0.0, 0.9, 0.3, 0.0, 1.0]), 3, 2)?;
/// let pairs = Points::from_pairs(rows, &[[0, 0], [1, 1], [2, 2]], &[[1.0, 0.0]; 3], &Progress::default())?;
/// let found = matching(&pairs, &[1.0, 1.0], 2, Limits::default(), CACHE_BYTES, &Progress::default())?;
/// assert_eq!(found.picks, [1, 2]); // the one that is nearest, and the one that takes the sum nearest
/// assert!(found.cosines[0] < 0.9 && found.cosines[1] > 0.97);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, the target is zero or not finite, a row is not finite, the memory cannot be had, or the
/// computation was cancelled.
pub fn matching(
    points: &Points<2>,
    target: &[f32],
    budget: usize,
    limits: Limits,
    cache_bytes: usize,
    progress: &Progress,
) -> Result<Matching> {
    let target = unit(target, points.dim())?;
    limits.check(points.count())?;
    let budget = budget.min(points.count());
    progress.start(budget);
    let mut depths = Depths::new(limits, progress)?;
    let mut pairs = Pairs::new(points, &target, limits, cache_bytes, progress)?;
    let mut sum = vec![0.0; points.dim()];
    let mut pair = sum.clone();
    let mut matching = Matching::default();
    while matching.picks.len() < budget {
        let full = |pair: usize| depths.as_ref().is_some_and(|depths| depths.full(pair));
        let Some(pick) = pairs.best(&sum, full, &mut pair, progress)? else { break };
        sum.iter_mut().zip(&pair).for_each(|(sum, value)| *sum += value);
        if let Some(depths) = &mut depths {
            depths.count(pick);
        }
        matching.picks.push(pick);
        matching.cosines.push(State::new(&sum, &target).cosine().unwrap_or(0.0));
        progress.advance(1)?;
    }
    progress.finish();
    Ok(matching)
}

/// The target at unit length.
fn unit(target: &[f32], dim: usize) -> Result<Vec<f64>> {
    if target.len() != dim {
        return Err(Error::shape("target", format!("({dim},)"), format!("({},)", target.len())));
    }
    if let Some(index) = target.iter().position(|value| !value.is_finite()) {
        return Err(Error::NotFinite { array: "target", index, value: f64::from(target[index]) });
    }
    let values = || target.iter().map(|&value| f64::from(value));
    let norm = values().map(|value| value * value).sum::<f64>().sqrt();
    if norm == 0.0 {
        return Err(Error::ZeroVector { array: "target" });
    }
    Ok(values().map(|value| value / norm).collect())
}
