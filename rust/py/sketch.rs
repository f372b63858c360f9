//! Binding of the sketches.

use numpy::PyArray2;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::convert::{RowsArray, output, zeros};
use super::pickle::{self, entry};
use super::run::run;
use crate::sketch::{self, Kind};

/// A random linear map that keeps inner products: E<Rx, Ry> = <x, y>.
///
/// Every entry is addressed by (seed, coordinate), so any slice of the coordinates can be sketched alone and added up.
/// Slices fed in ascending order give the same bits as the whole, for any number of threads or rows. It holds nothing but
/// its arguments, which are also what a pickle of it holds.
///
/// Args:
///     dim: Length of a sketch. The error of a cosine is about 1 / sqrt(dim).
///     seed: Seed of the map.
///     kind: "sparse" for rotated blocks, which run at about the speed of memory; "rademacher" or "normal" for a dense
///         map with independent entries.
///     nnz: Non-zero entries for each coordinate of a sparse map; must divide dim, 256 at most.
///
/// Raises:
///     ValueError: If an argument is out of its range.
#[pyclass(frozen, module = "bpo._core")]
pub struct Sketcher(sketch::Sketcher);

#[pymethods]
impl Sketcher {
    #[new]
    #[pyo3(signature = (dim, *, seed = 0, kind = "sparse", nnz = 1))]
    fn new(dim: usize, seed: u64, kind: &str, nnz: usize) -> PyResult<Self> {
        let kind = match kind {
            "sparse" => Kind::Sparse,
            "rademacher" => Kind::Rademacher,
            "normal" => Kind::Normal,
            _ => {
                let message = format!("`kind` must be \"sparse\", \"rademacher\" or \"normal\", but is {kind:?}");
                return Err(PyValueError::new_err(message));
            }
        };
        Ok(Self(sketch::Sketcher::new(dim, seed, kind, nnz)?))
    }

    /// Length of a sketch.
    #[getter]
    fn dim(&self) -> usize {
        self.0.dim()
    }

    /// Seed of the map.
    #[getter]
    fn seed(&self) -> u64 {
        self.0.seed()
    }

    /// "sparse", "rademacher" or "normal".
    #[getter]
    fn kind(&self) -> &'static str {
        match self.0.kind() {
            Kind::Sparse => "sparse",
            Kind::Rademacher => "rademacher",
            Kind::Normal => "normal",
        }
    }

    /// Non-zero entries for each coordinate.
    #[getter]
    fn nnz(&self) -> usize {
        self.0.nnz()
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let (dim, seed, kind, nnz) = (self.dim(), self.seed(), self.kind(), self.nnz());
        let entries =
            [entry(py, "dim", dim)?, entry(py, "seed", seed)?, entry(py, "kind", kind)?, entry(py, "nnz", nnz)?];
        pickle::fields(py, entries)
    }

    fn __repr__(&self) -> String {
        format!("Sketcher({}, seed={}, kind=\"{}\", nnz={})", self.dim(), self.seed(), self.kind(), self.nnz())
    }

    /// Sketches rows of gradients.
    ///
    /// Args:
    ///     gradients: (n, p) C-contiguous float32, float16 or uint16 (the bits of bfloat16).
    ///     offset: Coordinate of the first column, where the rows are a slice of a longer vector.
    ///     out: (n, dim) float32 to add the sketches to; a new array of zeros if None.
    ///     threads: Threads to use; all cores if None. Does not change any bit of the result.
    ///
    /// Returns:
    ///     (n, dim) float32: out, where it was given.
    ///
    /// Raises:
    ///     TypeError: If an array has another dtype.
    ///     ValueError: If an array has another shape or layout, or an argument is out of its range.
    #[pyo3(signature = (gradients, offset = 0, out = None, *, threads = None))]
    fn sketch<'py>(
        &self,
        py: Python<'py>,
        gradients: &Bound<'py, PyAny>,
        offset: u64,
        out: Option<&Bound<'py, PyAny>>,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let gradients = RowsArray::new("gradients", gradients)?;
        let gradients = gradients.rows()?;
        let shape = [gradients.count(), self.dim()];
        let out = match out {
            Some(out) => out.clone(),
            None => zeros(py, shape)?,
        };
        let (array, mut out) = output("out", &out, shape)?;
        let sums = out.as_slice_mut()?;
        run(py, threads, None, |progress| self.0.sketch(gradients, offset, sums, progress))?;
        Ok(array)
    }
}
