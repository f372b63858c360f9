//! Binding of the D-optimal design.

use pyo3::prelude::*;

use super::convert::{PairArrays, RowsArray};
use super::limits::{LimitArguments, Picks, pick};

/// Picks pairs by the greedy growth of log det A, with A = regularization * I + sum of v v^T over the picks.
///
/// v_p = a_p * rows[w_p] + b_p * rows[l_p]; with a = -b = beta * sqrt(mu * (1 - mu)), mu the probability that the model
/// gives the preference, this is the choice of ADPO (arXiv 2503.01076) and ActiveDPO (arXiv 2505.19241). Each step picks the
/// pair with the largest gain log(1 + v^T A^-1 v) (ties: the lower pair). Gains only fall, so old ones are upper bounds
/// (Minoux, 1978) and few are computed anew; the picks are those of the plain greedy algorithm in float64.
///
/// For E gains computed and B picks it takes O(E d^2 + B d^2 + P (d + log P)) time, E from a few times B, where lengths
/// differ, to many times P, where all pairs are alike in length and differ in direction; and 8 d^2 bytes, half
/// a GiB for d = 8192.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, whose scales then are in the
///         coefficients; d <= 8192; memory maps are fine.
///     pairs: (P, 2) int64: the two rows of each pair.
///     coefficients: (P, 2) float32: a and b of each pair.
///     budget: Pairs to pick.
///     regularization: What A is a multiple of the identity by at first; above 0.
///     eligible: (P,) bool: the pairs that may be picked; all if None.
///     prompts: (P,) int64: the prompt of each pair, any numbers; needed with max_depth alone.
///     max_depth: Pairs of one prompt at most; no limit if None.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (picked, budget) at most ten times a second, and at the end.
///
/// Returns:
///     The picks in order, (B,) int64, and their gains, (B,) float64; B is the budget, or less if the limits leave less.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row of a pair, or a coefficient, is not finite, or a pair is too long for float32.
///     OutOfRangeError: If a pair refers to a row that is not there.
///     NotDefiniteError: If A is not positive definite to float64 precision: regularization is too small for these pairs.
///     ValueError: If an array has another shape or layout, or an argument is out of its range.
///     MemoryError: If two triangles of d^2 / 2 float64 numbers cannot be had.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(signature = (
    rows, pairs, coefficients, budget, *, regularization = 1.0, eligible = None, prompts = None, max_depth = None,
    threads = None, progress = None
))]
pub fn d_optimal<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    pairs: &Bound<'_, PyAny>,
    coefficients: &Bound<'_, PyAny>,
    budget: usize,
    regularization: f64,
    eligible: Option<&Bound<'_, PyAny>>,
    prompts: Option<&Bound<'_, PyAny>>,
    max_depth: Option<usize>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Picks<'py>> {
    let pairs = PairArrays::new(RowsArray::of_pairs(rows, None)?, pairs, coefficients)?;
    let limits = LimitArguments { eligible, prompts, min_depth: 0, max_depth };
    pick(py, &pairs, &limits, threads, progress.as_ref(), None, |points, limits, progress| {
        let design = crate::d_optimal::d_optimal(points, budget, regularization, limits, progress)?;
        Ok((design.picks, design.gains))
    })
}
