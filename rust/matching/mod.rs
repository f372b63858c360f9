//! Greedy matching to a direction: the pairs whose sum points most nearly where a target does.
//!
//! Each step picks the pair z with the largest cos(S + z, u), S being the sum of those picked and u the target: what a
//! pair is worth is what it adds to those that are there *(ours)*. With σ = ⟨S, u⟩ and N = ‖S‖² that cosine is
//! (σ + ⟨z, u⟩) / √(N + 2⟨S, z⟩ + ‖z‖²), of which a pick changes ⟨S, z⟩ alone; but that for every row.
//!
//! Where much was picked, the next few are picked at once, those whose cosines with the same S are largest: as many as a 64th of
//! what was picked, at most 256, and one at a time up to 128. They change S by a 64th at most, and a budget of millions takes
//! thousands of steps.
//!
//! A budget may be [shared](Sharing) among prompts and clusters: each step then picks the best pair of those whose share is not
//! used up.
//!
//! S is σu and a rest R that the picks keep short, as each cancels some of it: R turns with every pick, so that no bound on
//! ⟨R, z⟩ lasts, but it needs few digits. A step multiplies R with copies of the rows in 8 bits, whose error is bounded by
//! the Cauchy–Schwarz inequality, and forms the sum in float64 for those pairs alone that may be the best. So the picks are
//! those of the plain algorithm in float64, but where cosines differ by rounding alone.
//!
//! For T steps over P pairs of n rows of dimension d it takes O(n d + P d + T (n d + P)) time, of which T n d is in bytes
//! that are read and not in float64 arithmetic; and n d + 40 n + 41 P bytes, of which the first term may be limited.
//! Where processes share the points, each does so with the rows of its own pairs; which are the best of each, and the vectors of the
//! best of all, are what they tell each other at each step.

mod allowance;
mod measure;
mod rows;

use crate::error::{Error, Result};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::Limits;
use allowance::Allowance;
use measure::{Pairs, State};

/// The pairs picked, in order.
#[derive(Clone, Debug, Default)]
pub struct Matching {
    pub picks: Vec<usize>,
    /// The cosine of the sum and the target after each pick; 0 where the sum is zero.
    pub cosines: Vec<f64>,
}

/// Of the pairs that were picked, one in so many comes at once: S changes little by them, and steps become few.
const AT_ONCE: usize = 64;

/// Pairs picked at once, at most: each process tells the others as many vectors.
const MOST: usize = 256;

/// What a budget is shared among; nothing, unless given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sharing<'a> {
    /// Whether each prompt of [`Limits::depth`] gets a pair before any gets its second.
    pub every_prompt: bool,
    /// The cluster of each pair, not negative, and what clusters weigh, all alike if nothing is said: each gets its share of the
    /// rest, in proportion to the pairs that it may still give times its weight, by the method of the largest remainder. What
    /// a cluster cannot use is shared again. Where only clusters of weight zero are left, weights no longer count.
    pub clusters: Option<(&'a [i32], Option<&'a [f64]>)>,
}

/// Picks at most `budget` pairs, fewer only if the limits leave fewer. Ties go to the lower pair. A pair that would make
/// the sum zero, which has no direction, comes after all others. Copies of rows take `cache_bytes` at most; rows beyond
/// are multiplied as they are.
///
/// ```
/// use bpo::coreset::CACHE_BYTES;
/// use bpo::matching::{Sharing, matching};
/// use bpo::matrix::{Rows, Values};
/// use bpo::points::Points;
/// use bpo::progress::Progress;
/// use bpo::prompts::Limits;
///
/// let rows = Rows::new(Values::F32(&[1.0, 0.0, 0.9, 0.3, 0.0, 1.0]), 3, 2)?;
/// let pairs = Points::from_pairs(rows, &[[0, 0], [1, 1], [2, 2]], &[[1.0, 0.0]; 3], &Progress::default())?;
/// let choose = |sharing| matching(&pairs, &[1.0, 1.0], 2, Limits::default(), sharing, CACHE_BYTES, &Progress::default());
/// let found = choose(Sharing::default())?;
/// assert_eq!(found.picks, [1, 2]); // the one that is nearest, and the one that takes the sum nearest
/// assert!(found.cosines[0] < 0.9 && found.cosines[1] > 0.97);
/// let found = choose(Sharing { clusters: Some((&[0, 1, 1], None)), ..Sharing::default() })?;
/// assert_eq!(found.picks, [1, 0]); // one of each cluster
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, the target is zero or not finite, a row is not finite, a cluster is negative or without weight, a weight
/// is negative or not finite, every prompt is to get a pair and none is known or the budget is below their number, the memory
/// cannot be had, or the computation was cancelled.
pub fn matching(
    points: &Points<2>,
    target: &[f32],
    budget: usize,
    limits: Limits,
    sharing: Sharing,
    cache_bytes: usize,
    progress: &Progress,
) -> Result<Matching> {
    let target = unit(target, points.dim())?;
    let mut allowance = Allowance::new(points.count(), budget, limits, sharing, progress)?;
    let budget = budget.min(points.count());
    progress.start(budget);
    let mut pairs = Pairs::new(points, &target, limits, cache_bytes, progress)?;
    let mut sum = vec![0.0; points.dim()];
    let mut matching = Matching::default();
    while matching.picks.len() < budget {
        let left = budget - matching.picks.len();
        let most = (matching.picks.len() / AT_ONCE).clamp(1, MOST).min(left);
        let best = pairs.best(&sum, most, |pair| allowance.shuts_out(pair), progress)?;
        if best.is_empty() && !allowance.share(left, progress)? {
            break;
        }
        let before = matching.picks.len();
        for (pick, vector) in best {
            // Those before it may have filled its prompt or its cluster.
            if allowance.shuts_out(pick) {
                continue;
            }
            allowance.count(pick);
            pairs.close(pick);
            sum.iter_mut().zip(&vector).for_each(|(sum, value)| *sum += value);
            matching.picks.push(pick);
            matching.cosines.push(State::new(&sum, &target).cosine().unwrap_or(0.0));
        }
        progress.advance(matching.picks.len() - before)?;
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
