//! Binding of the coresets.

use pyo3::prelude::*;

use super::convert::{PairArrays, RowsArray, Vector, indices};
use super::limits::{LimitArguments, Picks, pick};
use crate::coreset::CACHE_BYTES;

/// Picks, per cluster, the pairs whose weighted sum comes closest to the cluster's mean.
///
/// The choice of TAGCOS (arXiv 2407.15235): orthogonal matching pursuit with non-negative weights over the pairs
/// z_p = a_p * rows[w_p] + b_p * rows[l_p]. Each step picks the pair with the largest inner product with the residual (ties:
/// the lower pair) and fits the weights of all picks of the cluster anew by non-negative least squares. Once no inner
/// product is positive, which is when the residual has vanished, the rest of the quota goes to the pairs with the largest
/// inner product with the mean, with weight 0. Quotas are in proportion to the clusters' sizes, by the method of the
/// largest remainder (ties: the lower cluster); what max_depth keeps a cluster from using is shared among all in the same
/// way.
///
/// For a cluster of n pairs and a quota q, of which s have a weight, it takes O(n d + q (n d + s d + s^2)) time, the
/// product n d in bytes and not in numbers, and n d + 8 q (d + s) bytes, of which cache_bytes bounds the first term.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, whose scales then are in the
///         coefficients; memory maps are fine.
///     pairs: (P, 2) int64: the two rows of each pair.
///     coefficients: (P, 2) float32: a and b of each pair, such that z_p has unit length.
///     clusters: (P,) int32: the cluster of each pair, not negative.
///     budget: Pairs to pick.
///     eligible: (P,) bool: the pairs that may be picked, which alone make up the means; all if None.
///     prompts: (P,) int64: the prompt of each pair, any numbers; needed with max_depth alone.
///     max_depth: Pairs of one prompt at most; no limit if None. With it the clusters take turns, in ascending order.
///     cache_bytes: Bytes of pairs in 8 bits that are kept from step to step; pairs beyond are made anew in each step, which
///         takes about ten times as long. Does not change any bit of the result.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (picked, budget) at most ten times a second, and at the end.
///
/// Returns:
///     The picks, (B,) int64, cluster after cluster in the order of their choice, and their weights, (B,) float64; B is the
///     budget, or less if the limits leave less.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row of a pair, or a coefficient, is not finite, or a pair is too long for float32.
///     OutOfRangeError: If a pair refers to a row that is not there, or a cluster is negative.
///     ValueError: If an array has another shape or layout, or max_depth is 0.
///     MemoryError: If cache_bytes cannot be had.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(signature = (
    rows, pairs, coefficients, clusters, budget, *, eligible = None, prompts = None, max_depth = None,
    cache_bytes = CACHE_BYTES, threads = None, progress = None
),
    text_signature = "(rows, pairs, coefficients, clusters, budget, *, eligible=None, prompts=None, max_depth=None, \
                      cache_bytes=1073741824, threads=None, progress=None)"
)]
pub fn coreset<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    pairs: &Bound<'_, PyAny>,
    coefficients: &Bound<'_, PyAny>,
    clusters: &Bound<'_, PyAny>,
    budget: usize,
    eligible: Option<&Bound<'_, PyAny>>,
    prompts: Option<&Bound<'_, PyAny>>,
    max_depth: Option<usize>,
    cache_bytes: usize,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Picks<'py>> {
    let pairs = PairArrays::new(RowsArray::of_pairs(rows, None)?, pairs, coefficients)?;
    let clusters = Vector::<i32>::new("clusters", clusters)?;
    let clusters = clusters.slice();
    let limits = LimitArguments { eligible, prompts, min_depth: 0, max_depth };
    pick(py, &pairs, &limits, threads, progress.as_ref(), None, |points, limits, progress| {
        let clusters = indices(clusters, progress)?;
        let coreset = crate::coreset::coreset(points, &clusters, budget, limits, cache_bytes, progress)?;
        Ok((coreset.picks, coreset.weights))
    })
}
