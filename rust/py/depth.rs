//! Binding of the depth allocation.

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::prelude::*;

use super::convert::{Vector, indices};
use super::run::run;
use crate::depth::{self, Candidates};
use crate::error::Error;
use crate::progress::Progress;

/// Chooses which pairs to keep within a budget.
///
/// 1. Unless min_depth is 0, each prompt gets its most useful pair, so none is lost.
/// 2. The rest of the budget is shared among the clusters in proportion to their pairs not yet kept, times the cluster's
///    weight, by the method of the largest remainder (ties: the lower cluster).
/// 3. A cluster keeps its most useful pairs first (ties: the lower pair), leaving out prompts that have max_depth.
/// 4. What a cluster could not use is shared among the others in the same way.
///
/// Args:
///     prompts: (P,) int64: the prompt of each pair; any numbers.
///     clusters: (P,) int32: the cluster of each pair.
///     usefulness: (P,) float64: the larger, the sooner a pair is kept.
///     budget: Pairs to keep; with min_depth=1 at least the number of prompts.
///     min_depth: Pairs that each prompt gets first, 0 or 1.
///     max_depth: Pairs of one prompt at most; no limit if None.
///     cluster_weights: (k,) float64, finite and not negative; all equal if None.
///     threads: Threads to use; all cores if None. Does not change the result.
///     progress: Called with (done, total) at the end.
///
/// It takes O(P log P) time.
///
/// Returns:
///     (P,) bool, of which exactly min(budget, the pairs that max_depth allows) are True.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a usefulness is NaN, or a weight not finite.
///     OutOfRangeError: If a cluster has no weight, or it or its weight is negative.
///     ValueError: If an array has another shape or layout, min_depth is neither 0 nor 1, max_depth is 0, or the budget is
///         below the number of prompts that get a pair each.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(signature = (
    prompts, clusters, usefulness, budget, *,
    min_depth = 1, max_depth = None, cluster_weights = None, threads = None, progress = None
))]
pub fn allocate_depth<'py>(
    py: Python<'py>,
    prompts: &Bound<'_, PyAny>,
    clusters: &Bound<'_, PyAny>,
    usefulness: &Bound<'_, PyAny>,
    budget: usize,
    min_depth: usize,
    max_depth: Option<usize>,
    cluster_weights: Option<&Bound<'_, PyAny>>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyArray1<bool>>> {
    let prompts = Vector::<i64>::new("prompts", prompts)?;
    let clusters = Vector::<i32>::new("clusters", clusters)?;
    let usefulness = Vector::<f64>::new("usefulness", usefulness)?;
    let weights = cluster_weights.map(|weights| Vector::<f64>::new("cluster_weights", weights)).transpose()?;
    let weights = weights.as_ref().map(|weights| weights.slice());
    if min_depth > 1 {
        return Err(Error::argument("min_depth", "0 or 1", min_depth).into());
    }
    let (prompts, clusters, usefulness) = (prompts.slice(), clusters.slice(), usefulness.slice());
    let allocate = |progress: &Progress| {
        let (prompts, clusters) = (indices(prompts, progress)?, indices(clusters, progress)?);
        let candidates = Candidates { prompts: &prompts, clusters: &clusters, usefulness };
        depth::allocate_depth(candidates, budget, min_depth == 1, max_depth, weights, progress)
    };
    let kept = run(py, threads, progress.as_ref(), allocate)?;
    Ok(kept.into_pyarray(py))
}
