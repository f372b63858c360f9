//! Binding of the matching to a direction.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::convert::{PairArrays, RowsArray, Vector, indices};
use super::limits::{LimitArguments, Picks, pick};
use crate::coreset::CACHE_BYTES;
use crate::matching::Sharing;

/// Picks pairs one by one so that the sum of those picked points most nearly where a target does.
///
/// Each step picks the pair with the largest cos(S + z_p, target), where S is the sum of those picked before and
/// z_p = a_p * rows[w_p] + b_p * rows[l_p]: what a pair is worth is what it adds to those that are there (ours). Ties: the
/// lower pair. A pair that would make the sum zero, which has no direction, comes after all others. It picks the budget
/// even where the cosine falls: the cosines tell. Once 128 pairs are picked, a step picks several with the same S, those with the
/// largest cosines: a 64th as many as were picked before, 256 at most.
///
/// A step compares all pairs by copies of the rows in 8 bits, with a proven bound on the error, and forms the sum in float64
/// for those that may be the best: so the picks are those of the plain greedy algorithm in float64, unless cosines differ by
/// no more than rounding, about 1e-13. For T steps it takes O(P d + T (n d + P)) time, the product n d in bytes and not in
/// numbers, and n d + 40 n + 41 P bytes, of which cache_bytes bounds the first term; with clusters 13 P bytes more. Very many
/// pairs that are alike take longer.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, whose scales then are in the
///         coefficients; memory maps are fine.
///     pairs: (P, 2) int64: the two rows of each pair.
///     coefficients: (P, 2) float32: a and b of each pair; such that z_p has unit length, if all pairs are to weigh alike.
///     target: (d,) float32: the direction, of any length but zero.
///     budget: Pairs to pick.
///     eligible: (P,) bool: the pairs that may be picked; all if None.
///     prompts: (P,) int64: the prompt of each pair, any numbers; needed with min_depth and max_depth alone.
///     min_depth: Pairs that each prompt gets before any other pair is picked, 0 or 1.
///     max_depth: Pairs of one prompt at most; no limit if None.
///     clusters: (P,) int32: the cluster of each pair. The budget, less what prompts got first, is then shared among them in
///         proportion to the pairs that each may still give, times its weight, by the method of the largest remainder (ties: the
///         lower cluster); what a cluster cannot use is shared again. Each step picks the best pair of all clusters that have some
///         of their share left.
///     cluster_weights: (k,) float64, finite and not negative; all equal if None. Where only clusters of weight zero are left,
///         weights no longer count.
///     cache_bytes: Bytes of rows in 8 bits that are kept from step to step; rows beyond are multiplied as they are in each
///         step, which takes several times as long. Does not change any bit of the result.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (picked, budget) at most ten times a second, and at the end.
///     processes: Who shares the pairs, such as a bpo.world.shares.Shares; all of them make this call, with the same arguments
///         but for rows that are of pairs of others alone, which are not read. Does not change any bit of the result.
///
/// Returns:
///     The picks in order, (B,) int64, and the cosine of the sum and the target after each, (B,) float64, 0 where the sum is
///     zero; B is the budget, or less if the limits leave less.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row of a pair, a coefficient or the target is not finite.
///     OutOfRangeError: If a pair refers to a row that is not there, a cluster has no weight, or it or its weight is negative.
///     NoDirectionError: If the target is zero.
///     ValueError: If an array has another shape or layout, min_depth is neither 0 nor 1, max_depth is 0, or the budget is below
///         the number of prompts that get a pair each.
///     MemoryError: If cache_bytes cannot be had.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(signature = (
    rows, pairs, coefficients, target, budget, *, eligible = None, prompts = None, min_depth = 0,
    max_depth = None, clusters = None, cluster_weights = None, cache_bytes = CACHE_BYTES, threads = None, progress = None,
    processes = None
),
    text_signature = "(rows, pairs, coefficients, target, budget, *, eligible=None, prompts=None, min_depth=0, \
                      max_depth=None, clusters=None, cluster_weights=None, cache_bytes=1073741824, threads=None, \
                      progress=None, processes=None)"
)]
pub fn matching<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    pairs: &Bound<'_, PyAny>,
    coefficients: &Bound<'_, PyAny>,
    target: &Bound<'_, PyAny>,
    budget: usize,
    eligible: Option<&Bound<'_, PyAny>>,
    prompts: Option<&Bound<'_, PyAny>>,
    min_depth: usize,
    max_depth: Option<usize>,
    clusters: Option<&Bound<'_, PyAny>>,
    cluster_weights: Option<&Bound<'_, PyAny>>,
    cache_bytes: usize,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
    processes: Option<&Bound<'_, PyAny>>,
) -> PyResult<Picks<'py>> {
    let pairs = PairArrays::new(RowsArray::of_pairs(rows, None)?, pairs, coefficients)?;
    let target = Vector::<f32>::new("target", target)?;
    let target = target.slice();
    let clusters = clusters.map(|clusters| Vector::<i32>::new("clusters", clusters)).transpose()?;
    let clusters = clusters.as_ref().map(Vector::slice);
    let weights = cluster_weights.map(|weights| Vector::<f64>::new("cluster_weights", weights)).transpose()?;
    let weights = weights.as_ref().map(Vector::slice);
    if weights.is_some() && clusters.is_none() {
        return Err(PyTypeError::new_err("`cluster_weights` needs `clusters`, the cluster of each pair"));
    }
    let limits = LimitArguments { eligible, prompts, max_depth, min_depth };
    pick(py, &pairs, &limits, threads, progress.as_ref(), processes, |points, limits, progress| {
        let clusters = clusters.map(|clusters| indices(clusters, progress)).transpose()?;
        let sharing =
            Sharing { every_prompt: min_depth == 1, clusters: clusters.as_deref().map(|names| (names, weights)) };
        let found = crate::matching::matching(points, target, budget, limits, sharing, cache_bytes, progress)?;
        Ok((found.picks, found.cosines))
    })
}
