//! Binding of the gradient store.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use numpy::prelude::*;
use numpy::{PyArray1, PyUntypedArray};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use super::convert::{Matrix, Vector};
use super::run::run;
use crate::error::{Error, Result};
use crate::store::format::{Manifest, RECORD_BYTES};
use crate::store::{self};

/// The one writer of a store; a context manager that flushes and closes.
#[pyclass(frozen, module = "bpo._core")]
pub struct StoreWriter {
    path: PathBuf,
    dim: usize,
    /// None once closed.
    writer: Mutex<Option<store::StoreWriter>>,
}

impl StoreWriter {
    fn new(writer: store::StoreWriter) -> Self {
        Self { path: writer.directory().to_path_buf(), dim: writer.dim(), writer: Mutex::new(Some(writer)) }
    }

    /// Runs `work` on the open writer, detached from the interpreter.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut store::StoreWriter) -> Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| {
            let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
            match writer.as_mut() {
                Some(writer) => work(writer).map_err(PyErr::from),
                None => Err(PyValueError::new_err(format!("the store {} is closed", self.path.display()))),
            }
        })
    }
}

#[pymethods]
impl StoreWriter {
    /// Makes a new store.
    ///
    /// Args:
    ///     path: Directory of the store; made if it is not there.
    ///     dim: Length of a sketch.
    ///     fingerprint_json: A JSON object that says what the rows are computed from.
    ///
    /// Raises:
    ///     StoreError: If there is a store already or another process is writing to it.
    ///     ValueError: If an argument is out of its range.
    ///     OSError: If a file cannot be written.
    #[staticmethod]
    fn create(py: Python<'_>, path: PathBuf, dim: usize, fingerprint_json: &str) -> PyResult<Self> {
        let manifest = Manifest::new(dim, fingerprint_json)?;
        Ok(Self::new(py.detach(|| store::StoreWriter::create(&path, manifest))?))
    }

    /// Opens a store to add rows after its last complete one; an incomplete one is cut off.
    ///
    /// Args:
    ///     path: Directory of the store.
    ///
    /// Raises:
    ///     StoreError: If the directory is not a store of this version or another process is writing to it.
    ///     OSError: If a file cannot be read or written.
    #[staticmethod]
    fn append_to(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::new(py.detach(|| store::StoreWriter::append_to(&path))?))
    }

    /// Directory of the store.
    #[getter]
    fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// Length of a sketch.
    #[getter]
    fn dim(&self) -> usize {
        self.dim
    }

    /// Appends rows. If that fails, the store keeps the rows that it had.
    ///
    /// Args:
    ///     sketches: (n, dim) C-contiguous float32.
    ///     records: (n,) C-contiguous array whose items have the 64 bytes of a record: prompt_id (16 bytes), response_id
    ///         (16 bytes), score (float64), logp, ref_logp (float32), length, flags (uint32), log_weight (float32),
    ///         crc32 (uint32), all little-endian. The crc32 is filled in.
    ///
    /// Raises:
    ///     TypeError: If an array has another dtype.
    ///     ValueError: If an array has another shape or layout, or the writer is closed.
    ///     OSError: If a file cannot be written.
    fn append(&self, py: Python<'_>, sketches: &Bound<'_, PyAny>, records: &Bound<'_, PyAny>) -> PyResult<()> {
        let sketches = Matrix::<f32>::new("sketches", sketches)?;
        if sketches.shape()[1] != self.dim {
            let found = format!("{:?}", sketches.shape());
            return Err(Error::shape("sketches", format!("(n, {})", self.dim), found).into());
        }
        let sketches = sketches.slice();
        let records = record_bytes(records)?;
        let records = records.slice();
        self.with(py, |writer| writer.append(sketches, records))
    }

    /// Waits until everything is on disk.
    ///
    /// Raises:
    ///     OSError: If the operating system could not write.
    ///     ValueError: If the writer is closed.
    fn flush(&self, py: Python<'_>) -> PyResult<()> {
        self.with(py, store::StoreWriter::flush)
    }

    /// Flushes and releases the lock. Closing again does nothing.
    ///
    /// Raises:
    ///     OSError: If the operating system could not write.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| match self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(mut writer) => Ok(writer.flush()?),
            None => Ok(()),
        })
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |writer| Ok(writer.count() as usize))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        _exception_type: &Bound<'_, PyAny>,
        _exception: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        self.close(py)
    }
}

/// The bytes of a structured array with items of 64 bytes.
fn record_bytes<'py>(records: &Bound<'py, PyAny>) -> PyResult<Vector<'py, u8>> {
    let Ok(array) = records.cast::<PyUntypedArray>() else {
        let found = records.get_type().name()?;
        return Err(PyTypeError::new_err(format!("`records` must be a NumPy array, but is {found}")));
    };
    if array.ndim() != 1 || array.dtype().itemsize() != RECORD_BYTES {
        return Err(PyTypeError::new_err(format!(
            "`records` must be a 1-d array with items of {RECORD_BYTES} bytes, but has {} dimension(s) and dtype {}",
            array.ndim(),
            array.dtype()
        )));
    }
    if !array.is_c_contiguous() {
        let message = "`records` must be C-contiguous; copy it with np.ascontiguousarray(records)";
        return Err(PyValueError::new_err(message));
    }
    Vector::new("records", &records.call_method1("view", ("uint8",))?)
}

/// The rows that were complete when the store was opened. Any number of readers may be at work beside one writer.
///
/// Args:
///     path: Directory of the store.
///
/// Raises:
///     StoreError: If the directory is not a store of this version.
///     OSError: If a file cannot be read.
#[pyclass(frozen, module = "bpo._core")]
pub struct StoreReader(store::StoreReader);

#[pymethods]
impl StoreReader {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self(py.detach(|| store::StoreReader::open(&path))?))
    }

    /// Directory of the store.
    #[getter]
    fn path(&self) -> PathBuf {
        self.0.paths().directory.clone()
    }

    /// File of the sketches: row-major little-endian float32 without a header, of which the first len(self) rows count.
    #[getter]
    fn rows_path(&self) -> PathBuf {
        self.0.paths().rows.clone()
    }

    /// Length of a sketch.
    #[getter]
    fn dim(&self) -> usize {
        self.0.manifest().dim
    }

    /// The JSON object that the store was made with.
    #[getter]
    fn fingerprint_json(&self) -> String {
        serde_json::Value::from(self.0.manifest().fingerprint.clone()).to_string()
    }

    fn __len__(&self) -> usize {
        self.0.count() as usize
    }

    /// Reads the records.
    ///
    /// Returns:
    ///     (64 * len(self),) uint8.
    ///
    /// Raises:
    ///     OSError: If the file cannot be read.
    fn records<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u8>>> {
        Ok(py.detach(|| self.0.records())?.into_pyarray(py))
    }

    /// Checks the CRC of every row.
    ///
    /// Args:
    ///     progress: Called with (done, total) at most ten times a second, and at the end.
    ///
    /// Returns:
    ///     (m,) int64: the indices of the damaged rows, ascending.
    ///
    /// Raises:
    ///     OSError: If a file cannot be read.
    #[pyo3(signature = (progress = None))]
    fn verify<'py>(&self, py: Python<'py>, progress: Option<Py<PyAny>>) -> PyResult<Bound<'py, PyArray1<i64>>> {
        Ok(run(py, Some(1), progress.as_ref(), |progress| self.0.verify(progress))?.into_pyarray(py))
    }
}
