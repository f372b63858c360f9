//! Binding of the scores.

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::convert::{Matrix, PairArrays, RowsArray, Vector, indices};
use super::pickle::{self, entry};
use super::processes::run_shared;
use crate::error::Error;
use crate::exchange::Processes;
use crate::memory::first;
use crate::progress::Progress;
use crate::usefulness;

/// Lengths of pairs: the informativeness ||a_p * rows[w_p] + b_p * rows[l_p]||.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, whose scales then are in the
///         coefficients; memory maps are fine.
///     pairs: (P, 2) int64: the two rows of each pair.
///     coefficients: (P, 2) float32: a and b of each pair.
///     finite: Whether every length has to be finite; if not, that of a pair with a row that is not finite is NaN or
///         infinite.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///     processes: Who shares the pairs, such as a bpo.world.shares.Shares; all of them make this call, with the same arguments
///         but for rows that are of pairs of others alone, which are not read. Does not change any bit of the result.
///
/// Returns:
///     (P,) float32.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a coefficient is not finite or, where that matters, a row or a length.
///     OutOfRangeError: If a pair refers to a row that is not there.
///     ValueError: If an array has another shape or layout.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(signature = (rows, pairs, coefficients, *, finite = true, threads = None, progress = None, processes = None))]
pub fn pair_norms<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    pairs: &Bound<'_, PyAny>,
    coefficients: &Bound<'_, PyAny>,
    finite: bool,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
    processes: Option<&Bound<'_, PyAny>>,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let arrays = PairArrays::new(RowsArray::of_pairs(rows, None)?, pairs, coefficients)?;
    let pairs = arrays.pairs()?;
    let norms = |processes: Processes, progress: &Progress| {
        let points = pairs.points(progress)?.shared(processes);
        let norms = usefulness::pair_norms(&points, progress)?;
        let count = if finite { norms.len() } else { 0 };
        match first(count, progress, |pair| !norms[pair].is_finite())? {
            Some(pair) => Err(points.not_finite(pair)),
            None => Ok(norms),
        }
    };
    Ok(run_shared(py, threads, progress.as_ref(), processes, norms)?.into_pyarray(py))
}

/// Scores of pairs against their centroids and the optimization direction. Made by hand from its attributes, which are also
/// what a pickle of it holds.
#[pyclass(frozen, get_all, module = "bpo._core")]
pub struct PairScores {
    /// (P,) float32: <z, c / ||c||>; 0 where the centroid is zero.
    centrality: Py<PyArray1<f32>>,
    /// (P,) float32: ||z - c||.
    distance: Py<PyArray1<f32>>,
    /// (P,) float32: <z, direction>.
    alignment: Py<PyArray1<f32>>,
    /// (d,) float32 of unit length; zeros if the pairs cancel out.
    direction: Py<PyArray1<f32>>,
}

#[pymethods]
impl PairScores {
    #[new]
    #[pyo3(signature = (*, centrality, distance, alignment, direction))]
    fn of(
        centrality: Py<PyArray1<f32>>,
        distance: Py<PyArray1<f32>>,
        alignment: Py<PyArray1<f32>>,
        direction: Py<PyArray1<f32>>,
    ) -> Self {
        Self { centrality, distance, alignment, direction }
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let entries = [
            entry(py, "centrality", &self.centrality)?,
            entry(py, "distance", &self.distance)?,
            entry(py, "alignment", &self.alignment)?,
            entry(py, "direction", &self.direction)?,
        ];
        pickle::fields(py, entries)
    }
}

/// Scores pairs z_p = a_p * rows[w_p] + b_p * rows[l_p] against the centroids of their clusters.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, whose scales then are in the
///         coefficients; memory maps are fine.
///     pairs: (P, 2) int64: the two rows of each pair.
///     coefficients: (P, 2) float32: a and b of each pair, such that z_p has unit length.
///     centroids: (k, d) float32.
///     labels: (P,) int32: the cluster of each pair.
///     direction: (d,) float32, normalised before use; the mean of the pairs if None.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///     processes: Who shares the pairs, such as a bpo.world.shares.Shares; all of them make this call, with the same arguments
///         but for rows that are of pairs of others alone, which are not read. Does not change any bit of the result.
///
/// Returns:
///     Centrality, distance and alignment of each pair, and the direction.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row of a pair, a coefficient, a centroid or the direction is not finite, or a pair is too long
///         for float32.
///     OutOfRangeError: If a pair refers to a row that is not there, or a label has no centroid.
///     ValueError: If an array has another shape or layout.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(signature = (rows, pairs, coefficients, centroids, labels, *, direction = None, threads = None, progress = None, processes = None))]
pub fn score_pairs(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    pairs: &Bound<'_, PyAny>,
    coefficients: &Bound<'_, PyAny>,
    centroids: &Bound<'_, PyAny>,
    labels: &Bound<'_, PyAny>,
    direction: Option<&Bound<'_, PyAny>>,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
    processes: Option<&Bound<'_, PyAny>>,
) -> PyResult<PairScores> {
    let arrays = PairArrays::new(RowsArray::of_pairs(rows, None)?, pairs, coefficients)?;
    let pairs = arrays.pairs()?;
    let centroids = Matrix::<f32>::new("centroids", centroids)?;
    if centroids.shape()[1] != pairs.rows.dim() {
        let found = format!("{:?}", centroids.shape());
        return Err(Error::shape("centroids", format!("(k, {})", pairs.rows.dim()), found).into());
    }
    let centroids = centroids.slice();
    let labels = Vector::<i32>::new("labels", labels)?;
    let labels = labels.slice();
    let direction = direction.map(|direction| Vector::<f32>::new("direction", direction)).transpose()?;
    let direction = direction.as_ref().map(|direction| direction.slice());
    let score = |processes: Processes, progress: &Progress| {
        let labels = indices(labels, progress)?;
        let points = pairs.points(progress)?.shared(processes);
        usefulness::score_pairs(&points, centroids, &labels, direction, progress)
    };
    let scores = run_shared(py, threads, progress.as_ref(), processes, score)?;
    Ok(PairScores {
        centrality: scores.centrality.into_pyarray(py).unbind(),
        distance: scores.distance.into_pyarray(py).unbind(),
        alignment: scores.alignment.into_pyarray(py).unbind(),
        direction: scores.direction.into_pyarray(py).unbind(),
    })
}
