//! Binding of k-means.

use numpy::prelude::*;
use numpy::{PyArray1, PyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::convert::{Matrix, PairArrays, RowsArray, Vector, check_scales, matrix};
use super::pickle::{self, entry};
use super::processes::run_shared;
use super::run::run;
use crate::error::Error;
use crate::kmeans::{CACHE_BYTES, Clustering, Init, Metric, Params, assign as nearest, fit, fit_rows};
use crate::memory::{CENTROIDS, copied};
use crate::points::Points;
use crate::progress::Progress;

/// What k-means found; labels, distances and the last inertia belong to the centroids. Made by hand from its attributes,
/// which are also what a pickle of it holds.
#[pyclass(frozen, get_all, module = "bpo._core")]
pub struct KMeansResult {
    /// (k, d) float32; of unit length with metric="cosine".
    centroids: Py<PyArray2<f32>>,
    /// (n,) int32: the cluster of each point.
    labels: Py<PyArray1<i32>>,
    /// (n,) float32: Euclidean distance to the own centroid; 1 - cosine with metric="cosine".
    distances: Py<PyArray1<f32>>,
    /// (n_iter + 1,) float64: entry i is the inertia with the centroids after i updates, the sum of squared distances
    /// (of 1 - cosine with metric="cosine").
    inertia: Py<PyArray1<f64>>,
    /// How often the centroids were updated.
    n_iter: usize,
    /// Whether labels or centroids settled before max_iter.
    converged: bool,
}

#[pymethods]
impl KMeansResult {
    #[new]
    #[pyo3(signature = (*, centroids, labels, distances, inertia, n_iter, converged))]
    fn of(
        centroids: Py<PyArray2<f32>>,
        labels: Py<PyArray1<i32>>,
        distances: Py<PyArray1<f32>>,
        inertia: Py<PyArray1<f64>>,
        n_iter: usize,
        converged: bool,
    ) -> Self {
        Self { centroids, labels, distances, inertia, n_iter, converged }
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let entries = [
            entry(py, "centroids", &self.centroids)?,
            entry(py, "labels", &self.labels)?,
            entry(py, "distances", &self.distances)?,
            entry(py, "inertia", &self.inertia)?,
            entry(py, "n_iter", self.n_iter)?,
            entry(py, "converged", self.converged)?,
        ];
        pickle::fields(py, entries)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let shape = self.centroids.bind(py).shape().to_vec();
        let (n_iter, converged) = (self.n_iter, if self.converged { "True" } else { "False" });
        format!("KMeansResult(k={}, d={}, n_iter={n_iter}, converged={converged})", shape[0], shape[1])
    }
}

impl KMeansResult {
    fn new(py: Python<'_>, clustering: Clustering, dim: usize) -> PyResult<Self> {
        Ok(Self {
            centroids: matrix(py, clustering.centroids, dim)?,
            labels: clustering.labels.into_pyarray(py).unbind(),
            distances: clustering.distances.into_pyarray(py).unbind(),
            inertia: clustering.inertia.into_pyarray(py).unbind(),
            n_iter: clustering.iterations,
            converged: clustering.converged,
        })
    }
}

fn metric(name: &str) -> PyResult<Metric> {
    match name {
        "euclidean" => Ok(Metric::Euclidean),
        "cosine" => Ok(Metric::Cosine),
        _ => {
            let message = format!("`metric` must be \"euclidean\" or \"cosine\", but is {name:?}");
            Err(PyValueError::new_err(message))
        }
    }
}

/// The argument `init`: "k-means++", or an array of k centroids.
#[derive(FromPyObject)]
pub enum InitArgument<'py> {
    Name(String),
    Array(Bound<'py, PyAny>),
}

impl InitArgument<'_> {
    fn convert(&self, clusters: usize, dim: usize) -> PyResult<Init> {
        match self {
            Self::Name(name) if name == "k-means++" => Ok(Init::PlusPlus),
            Self::Name(name) => {
                let message = format!("`init` must be \"k-means++\" or a (k, d) float32 array, but is {name:?}");
                Err(PyValueError::new_err(message))
            }
            Self::Array(array) => {
                let centroids = Matrix::<f32>::new("init", array)?;
                if centroids.shape() != [clusters, dim] {
                    let found = format!("{:?}", centroids.shape());
                    return Err(Error::shape("init", format!("[{clusters}, {dim}]"), found).into());
                }
                Ok(Init::Centroids(copied(centroids.slice(), CENTROIDS)?))
            }
        }
    }
}

/// Lloyd's k-means over rows.
///
/// Exact: a label is the centroid with the lowest squared distance, added up from the differences, so data far from the
/// origin lose no digits; products in 8 bits only rule out centroids that provably cannot be it. An empty cluster takes
/// the point that adds most to the inertia. Stops as scikit-learn does: when no label changes, or when the squared shift
/// of the centroids is at most tol times the mean variance of a coordinate.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8; memory maps are fine, and of
///         one that is open for reading only a part stays resident.
///     k: Number of clusters, at most n.
///     sample_weight: (n,) float32, how much each row counts, not negative; 1 if None.
///     scales: (n,) float32, with int8 rows: row i stands for scales[i] * rows[i].
///     init: "k-means++" (k-means‖, then greedy k-means++ with 2 + ln k trials for each centroid), or the first
///         centroids, (k, d) float32.
///     metric: "euclidean", or "cosine" for spherical k-means.
///     max_iter: Updates of the centroids at most.
///     tol: See above.
///     seed: Seed of "k-means++" and of the order of mini-batches.
///     batch_size: Rows of the first of nested mini-batches (Newling and Fleuret, NIPS 2016): the batch grows to twice
///         its size whenever the centroids move by less than their standard error, in the end to all rows. All rows at
///         once if None.
///     cache_bytes: Bytes of rows in 8 bits that are kept from pass to pass, if that suffices for all of them; 0 keeps
///         none, which costs about a tenth of a pass. Does not change any bit of the result.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///
/// Returns:
///     Centroids, labels, distances and inertia.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row, scale, weight or first centroid is not finite.
///     OutOfRangeError: If a weight is negative.
///     NoDirectionError: If a row or a first centroid has no direction (metric="cosine").
///     ValueError: If an array has another shape or layout, or an argument is out of its range.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(
    signature = (
        rows, k, *, sample_weight = None, scales = None, init = InitArgument::Name("k-means++".to_owned()),
        metric = "euclidean", max_iter = 100, tol = 1e-4, seed = 0, batch_size = None, cache_bytes = CACHE_BYTES,
        threads = None, progress = None
    ),
    text_signature = "(rows, k, *, sample_weight=None, scales=None, init='k-means++', metric='euclidean', \
                      max_iter=100, tol=0.0001, seed=0, batch_size=None, cache_bytes=1073741824, \
                      threads=None, progress=None)"
)]
pub fn kmeans(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    k: usize,
    sample_weight: Option<&Bound<'_, PyAny>>,
    scales: Option<&Bound<'_, PyAny>>,
    init: InitArgument<'_>,
    metric: &str,
    max_iter: usize,
    tol: f64,
    seed: u64,
    batch_size: Option<usize>,
    cache_bytes: usize,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<KMeansResult> {
    let rows = RowsArray::with_scales("rows", rows, scales)?;
    let rows = rows.points()?;
    let weights = sample_weight.map(|weights| Vector::<f32>::new("sample_weight", weights)).transpose()?;
    let params = Params {
        clusters: k,
        init: init.convert(k, rows.dim())?,
        metric: self::metric(metric)?,
        max_iterations: max_iter,
        batch_size,
        tolerance: tol,
        seed,
        cache_bytes,
    };
    let weights = weights.as_ref().map(Vector::slice);
    let cluster = |progress: &Progress| {
        check_scales(rows, progress)?;
        fit_rows(rows, weights, &params, progress)
    };
    let clustering = run(py, threads, progress.as_ref(), cluster)?;
    KMeansResult::new(py, clustering, rows.dim())
}

/// Labels and distances.
type Assignment = (Py<PyArray1<i32>>, Py<PyArray1<f32>>);

/// The nearest of given centroids for each row.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8; memory maps are fine.
///     centroids: (k, d) float32.
///     scales: (n,) float32, with int8 rows: row i stands for scales[i] * rows[i].
///     metric: "euclidean" or "cosine".
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///
/// Returns:
///     labels, (n,) int32, ties go to the lower one, and distances, (n,) float32: Euclidean, or 1 - cosine.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row, scale or centroid is not finite.
///     NoDirectionError: If a row or a centroid has no direction (metric="cosine").
///     ValueError: If an array has another shape or layout.
#[pyfunction]
#[pyo3(signature = (rows, centroids, *, scales = None, metric = "euclidean", threads = None, progress = None))]
pub fn assign(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    centroids: &Bound<'_, PyAny>,
    scales: Option<&Bound<'_, PyAny>>,
    metric: &str,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Assignment> {
    let rows = RowsArray::with_scales("rows", rows, scales)?;
    let rows = rows.points()?;
    let centroids = Matrix::<f32>::new("centroids", centroids)?;
    if centroids.shape()[0] == 0 || centroids.shape()[1] != rows.dim() {
        let found = format!("{:?}", centroids.shape());
        return Err(Error::shape("centroids", format!("(k, {}) with k of at least 1", rows.dim()), found).into());
    }
    let metric = self::metric(metric)?;
    let centroids = centroids.slice();
    let assign = |progress: &Progress| {
        check_scales(rows, progress)?;
        nearest(Points::from_rows(rows, progress)?, centroids, metric, progress)
    };
    let (labels, distances) = run(py, threads, progress.as_ref(), assign)?;
    Ok((labels.into_pyarray(py).unbind(), distances.into_pyarray(py).unbind()))
}

/// K-means over pairs z_p = a_p * rows[w_p] + b_p * rows[l_p], which are never materialised.
///
/// The pairs of one prompt should be adjacent: then a tile reads each of the prompt's rows once.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8; memory maps are fine.
///     pairs: (P, 2) int64: the two rows of each pair.
///     coefficients: (P, 2) float32: a and b of each pair.
///     k: Number of clusters, at most P.
///     scales: (n,) float32, with int8 rows: row i stands for scales[i] * rows[i]; None if the coefficients say so.
///     init: "k-means++" (k-means‖, then greedy k-means++ with 2 + ln k trials for each centroid), or the first
///         centroids, (k, d) float32.
///     metric: "euclidean", or "cosine" for spherical k-means.
///     max_iter: Updates of the centroids at most.
///     tol: Stop once the squared shift of the centroids is at most tol times the mean variance of a coordinate.
///     seed: Seed of "k-means++".
///     cache_bytes: Bytes of rows in 8 bits that are kept from pass to pass, if that suffices for all of them; 0 keeps
///         none, which costs about a tenth of a pass. Does not change any bit of the result.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///     processes: Who shares the pairs, such as a bpo.world.shares.Shares; all of them make this call, with the same arguments
///         but for rows that are of pairs of others alone, which are not read. Does not change any bit of the result.
///
/// Returns:
///     Centroids, and labels, distances and inertia of the pairs.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     NotFiniteError: If a row of a pair, a scale, coefficient or first centroid is not finite, or a pair is too long for
///         float32.
///     OutOfRangeError: If a pair refers to a row that is not there.
///     NoDirectionError: If a pair or a first centroid has no direction (metric="cosine").
///     ValueError: If an array has another shape or layout, or an argument is out of its range.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "keywords in Python")]
#[pyo3(
    signature = (
        rows, pairs, coefficients, k, *, scales = None, init = InitArgument::Name("k-means++".to_owned()),
        metric = "euclidean", max_iter = 100, tol = 1e-4, seed = 0, cache_bytes = CACHE_BYTES,
        threads = None, progress = None, processes = None
    ),
    text_signature = "(rows, pairs, coefficients, k, *, scales=None, init='k-means++', metric='euclidean', \
                      max_iter=100, tol=0.0001, seed=0, cache_bytes=1073741824, threads=None, progress=None, \
                      processes=None)"
)]
pub fn pair_kmeans(
    py: Python<'_>,
    rows: &Bound<'_, PyAny>,
    pairs: &Bound<'_, PyAny>,
    coefficients: &Bound<'_, PyAny>,
    k: usize,
    scales: Option<&Bound<'_, PyAny>>,
    init: InitArgument<'_>,
    metric: &str,
    max_iter: usize,
    tol: f64,
    seed: u64,
    cache_bytes: usize,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
    processes: Option<&Bound<'_, PyAny>>,
) -> PyResult<KMeansResult> {
    let arrays = PairArrays::new(RowsArray::of_pairs(rows, scales)?, pairs, coefficients)?;
    let pairs = arrays.pairs()?;
    let params = Params {
        clusters: k,
        init: init.convert(k, pairs.rows.dim())?,
        metric: self::metric(metric)?,
        max_iterations: max_iter,
        batch_size: None,
        tolerance: tol,
        seed,
        cache_bytes,
    };
    let clustering = run_shared(py, threads, progress.as_ref(), processes, |processes, progress| {
        fit(pairs.points(progress)?.shared(processes), &params, progress)
    })?;
    KMeansResult::new(py, clustering, pairs.rows.dim())
}
