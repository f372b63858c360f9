//! Binding of the gradient store.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::convert::{Mask, Matrix, Vector, bools, numbers, unmasked};
use super::pickle::{self, entry};
use super::run::{run, run_alone};
use crate::error::{Error, Result};
use crate::progress::Progress;
use crate::store::format::{Manifest, RECORD_BYTES};
use crate::store::{self, Tolerance};

/// Between two tries to take a lock that another thread holds.
const WAIT: Duration = Duration::from_millis(1);

/// The one writer of a store; a context manager that commits and closes.
#[pyclass(frozen, module = "bpo._core")]
pub struct StoreWriter {
    path: PathBuf,
    dim: usize,
    dtype: &'static str,
    /// None once closed.
    writer: Mutex<Option<store::StoreWriter>>,
    /// What the writer said when it was last used: asking needs no lock, which may be held while the disk is waited for.
    count: AtomicU64,
    committed: AtomicU64,
    closed: AtomicBool,
}

impl StoreWriter {
    fn new(writer: store::StoreWriter) -> Self {
        let manifest = writer.manifest();
        Self {
            path: writer.directory().to_path_buf(),
            dim: manifest.dim,
            dtype: manifest.encoding.name(),
            count: AtomicU64::new(writer.count()),
            committed: AtomicU64::new(writer.count()),
            closed: AtomicBool::new(false),
            writer: Mutex::new(Some(writer)),
        }
    }

    /// Waits for the writer. Never called while the interpreter is held.
    fn lock(&self, progress: &Progress) -> Result<MutexGuard<'_, Option<store::StoreWriter>>> {
        loop {
            match self.writer.try_lock() {
                Ok(writer) => return Ok(writer),
                Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => progress.check()?,
            }
            std::thread::sleep(WAIT);
        }
    }

    /// Runs `work` on the open writer.
    fn with<T>(&self, progress: &Progress, work: impl FnOnce(&mut store::StoreWriter) -> Result<T>) -> Result<T> {
        let mut writer = self.lock(progress)?;
        let writer = writer.as_mut().ok_or_else(|| self.is_closed())?;
        let result = work(writer);
        self.count.store(writer.count(), Ordering::Relaxed);
        self.committed.store(writer.appender().committed(), Ordering::Relaxed);
        result
    }

    /// Commits, and releases the lock whether that worked or not, unless it was interrupted.
    fn finish(&self, progress: &Progress) -> Result<()> {
        let mut guard = self.lock(progress)?;
        let Some(writer) = guard.as_mut() else { return Ok(()) };
        let result = writer.appender().close(progress);
        if !matches!(result, Err(Error::Cancelled)) {
            *guard = None;
            self.closed.store(true, Ordering::Relaxed);
        }
        result
    }

    /// What a count says, of an open writer.
    fn counted(&self, count: &AtomicU64) -> Result<u64> {
        if self.closed.load(Ordering::Relaxed) { Err(self.is_closed()) } else { Ok(count.load(Ordering::Relaxed)) }
    }

    fn is_closed(&self) -> Error {
        Error::StoreClosed { path: self.path.clone() }
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
    ///     dtype: How the numbers are kept: "float32", "float16", "bfloat16" or "int8".
    ///
    /// Raises:
    ///     StoreError: If there is a store already; StoreLockedError if another process is writing to it.
    ///     ValueError: If an argument is out of its range.
    ///     OSError: If a file cannot be written.
    #[staticmethod]
    #[pyo3(signature = (path, dim, fingerprint_json, *, dtype = "float32"))]
    fn create(py: Python<'_>, path: PathBuf, dim: usize, fingerprint_json: &str, dtype: &str) -> PyResult<Self> {
        let manifest = Manifest::new(dim, dtype, fingerprint_json)?;
        Ok(Self::new(py.detach(|| store::StoreWriter::create(&path, manifest))?))
    }

    /// Opens a store to add rows after its last committed one; what lies behind is cut off.
    ///
    /// Args:
    ///     path: Directory of the store.
    ///
    /// Raises:
    ///     StoreError: If the directory is not a store of this version (StoreVersionError), is damaged
    ///         (StoreDamagedError) or another process is writing to it (StoreLockedError).
    ///     OSError: If a file cannot be read or written.
    #[staticmethod]
    fn append_to(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self::new(run_alone(py, None, |progress| store::StoreWriter::append_to(&path, progress))?))
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

    /// How the numbers are kept.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype
    }

    /// Rows that are on disk and that no crash takes away.
    ///
    /// Raises:
    ///     ValueError: If the writer is closed.
    #[getter]
    fn committed(&self) -> PyResult<u64> {
        Ok(self.counted(&self.committed)?)
    }

    /// Appends rows, which count once they are committed. If it fails, the store is as it was before, but for a disk that
    /// fails to write: that is as for commit.
    ///
    /// Args:
    ///     sketches: (n, dim) C-contiguous float32.
    ///     records: (n,) C-contiguous array whose items have the 72 bytes of a record: prompt_id (16 bytes), response_id
    ///         (16 bytes), score (float64), logp, ref_logp (float32), length, flags (uint32), log_weight, scale (float32),
    ///         row_crc32, crc32 (uint32), all little-endian. The last three are filled in.
    ///
    /// Raises:
    ///     TypeError: If an array has another dtype.
    ///     NotFiniteError: If a value of a sketch is not finite.
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
        run_alone(py, None, |progress| {
            self.with(progress, |writer| writer.appender().append(sketches, records, progress))
        })
    }

    /// Appends rows of another store and commits them: the same bytes where both have the same dtype.
    ///
    /// Args:
    ///     reader: The other store.
    ///     wanted: (len(reader),) bool: which of its rows; those that are set aside are left out.
    ///     progress: Called with (done, total) at most ten times a second, and at the end.
    ///
    /// Raises:
    ///     StoreDamagedError: If a row is not as it was written.
    ///     ValueError: If the shapes do not fit, or the writer is closed.
    ///     OSError: If a file cannot be read or written.
    #[pyo3(signature = (reader, wanted, *, progress = None))]
    fn copy_from(
        &self,
        py: Python<'_>,
        reader: &StoreReader,
        wanted: &Bound<'_, PyAny>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let wanted = Mask::new("wanted", wanted)?;
        let wanted = wanted.bytes();
        run_alone(py, progress.as_ref(), |progress| {
            let wanted = bools(wanted, progress)?;
            self.with(progress, |writer| writer.copy_from(&reader.reader, &wanted, progress))
        })
    }

    /// Waits until everything appended is on disk, and counts it. Interrupted before, it leaves what was appended for the
    /// next commit; the wait for the disk itself cannot be interrupted.
    ///
    /// Raises:
    ///     OSError: If the operating system could not write; the rows committed before are kept, and the store has to be
    ///         opened anew to go on.
    ///     ValueError: If the writer is closed.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        run_alone(py, None, |progress| self.with(progress, |writer| writer.appender().commit(progress)))
    }

    /// Commits and releases the lock. Closing again does nothing; a writer that was interrupted before is still open.
    ///
    /// Raises:
    ///     OSError: If the operating system could not write.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        run_alone(py, None, |progress| self.finish(progress))
    }

    /// Rows, those included that are not committed yet.
    fn __len__(&self) -> PyResult<usize> {
        Ok(self.counted(&self.count)? as usize)
    }

    fn __reduce__(&self) -> PyResult<()> {
        Err(PyTypeError::new_err(format!(
            "the StoreWriter of {} cannot be pickled or copied, since a store has one writer; open a StoreReader of the \
             path instead",
            self.path.display()
        )))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    fn __exit__(
        &self,
        py: Python<'_>,
        exception_type: &Bound<'_, PyAny>,
        _exception: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let closed = self.close(py);
        // The first error is the one to look at; a full disk, for one, would fail here again.
        if exception_type.is_none() { closed } else { Ok(()) }
    }
}

/// The bytes of a structured array whose items have [`RECORD_BYTES`].
fn record_bytes<'py>(records: &Bound<'py, PyAny>) -> PyResult<Vector<'py, u8>> {
    let array = unmasked("records", records)?;
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

/// The rows that were committed when the store was opened. Any number of readers may be at work beside one writer.
///
/// A pickle or a copy holds the absolute path and `skip_damaged`: it opens the store anew, with the rows that were added
/// meanwhile, and raises what opening raises.
///
/// Args:
///     path: Directory of the store.
///     skip_damaged: Whether to open a store of which some rows are damaged or lost; they then read as set aside.
///
/// Raises:
///     StoreError: If the directory is not a store of this version (StoreVersionError) or damaged (StoreDamagedError).
///     OSError: If a file cannot be read.
#[pyclass(frozen, module = "bpo._core")]
pub struct StoreReader {
    reader: store::StoreReader,
    /// Whether it was opened so.
    #[pyo3(get)]
    skip_damaged: bool,
}

#[pymethods]
impl StoreReader {
    #[new]
    #[pyo3(signature = (path, *, skip_damaged = false))]
    fn new(py: Python<'_>, path: PathBuf, skip_damaged: bool) -> PyResult<Self> {
        let tolerance = if skip_damaged { Tolerance::SoundRows } else { Tolerance::None };
        let reader = run_alone(py, None, |progress| store::StoreReader::open(&path, tolerance, progress))?;
        Ok(Self { reader, skip_damaged })
    }

    /// Directory of the store.
    #[getter]
    fn path(&self) -> PathBuf {
        self.reader.paths().directory.clone()
    }

    /// File of the sketches: row-major, little-endian, without a header, of which the first len(self) rows count.
    #[getter]
    fn rows_path(&self) -> PathBuf {
        self.reader.rows_path()
    }

    /// Length of a sketch.
    #[getter]
    fn dim(&self) -> usize {
        self.reader.manifest().dim
    }

    /// How the numbers are kept.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.reader.manifest().encoding.name()
    }

    /// The JSON object that the store was made with.
    #[getter]
    fn fingerprint_json(&self) -> String {
        serde_json::Value::from(self.reader.manifest().fingerprint.clone()).to_string()
    }

    /// Bytes behind the last committed row: of a writer at work, or of one that died.
    #[getter]
    fn tail_bytes(&self) -> u64 {
        self.reader.tail()
    }

    /// Whether the last writer closed the store, rather than being at work or having died.
    #[getter]
    fn closed(&self) -> bool {
        self.reader.is_closed()
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        // As text, whatever class of path it was.
        let path = std::path::absolute(self.path())?.into_os_string();
        pickle::fields(py, [entry(py, "path", path)?, entry(py, "skip_damaged", self.skip_damaged)?])
    }

    fn __len__(&self) -> usize {
        self.reader.count() as usize
    }

    /// Reads the records and checks them once more.
    ///
    /// Returns:
    ///     (72 * len(self),) uint8.
    ///
    /// Raises:
    ///     StoreDamagedError: If the file was damaged since the store was opened.
    ///     OSError: If the file cannot be read.
    fn records<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<u8>>> {
        Ok(run_alone(py, None, |progress| self.reader.records(progress))?.into_pyarray(py))
    }

    /// Reads rows and checks the CRCs of each and of its record.
    ///
    /// Args:
    ///     wanted: (len(self),) bool: which rows; None for all.
    ///     threads: Threads to use; all cores if None.
    ///     progress: Called with (done, total) at most ten times a second, and at the end.
    ///
    /// Returns:
    ///     (m,) int64: the indices of the damaged rows, ascending.
    ///
    /// Raises:
    ///     ValueError: If wanted has another shape.
    ///     OSError: If a file cannot be read.
    #[pyo3(signature = (wanted = None, *, threads = None, progress = None))]
    fn verify<'py>(
        &self,
        py: Python<'py>,
        wanted: Option<&Bound<'_, PyAny>>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let wanted = wanted.map(|wanted| Mask::new("wanted", wanted)).transpose()?;
        let wanted = wanted.as_ref().map(Mask::bytes);
        let damaged = run(py, threads, progress.as_ref(), |progress| {
            let wanted = wanted.map(|wanted| bools(wanted, progress)).transpose()?;
            numbers(&self.reader.verify(wanted.as_deref(), progress)?, progress)
        })?;
        Ok(damaged.into_pyarray(py))
    }

    /// Checks that rows are as they were written; see verify.
    ///
    /// Args:
    ///     wanted: (len(self),) bool: which rows.
    ///     threads: Threads to use; all cores if None.
    ///     progress: Called with (done, total) at most ten times a second, and at the end.
    ///
    /// Raises:
    ///     StoreDamagedError: If one is not.
    ///     ValueError: If wanted has another shape.
    ///     OSError: If a file cannot be read.
    #[pyo3(signature = (wanted, *, threads = None, progress = None))]
    fn check(
        &self,
        py: Python<'_>,
        wanted: &Bound<'_, PyAny>,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let wanted = Mask::new("wanted", wanted)?;
        let wanted = wanted.bytes();
        run(py, threads, progress.as_ref(), |progress| self.reader.check(&bools(wanted, progress)?, progress))
    }
}

/// What repair_store did. Made by hand from its attributes, which are also what a pickle of it holds.
#[pyclass(frozen, get_all, module = "bpo._core")]
pub struct StoreRepair {
    /// Names of the files that were written anew.
    mended: Vec<String>,
    /// (m,) int64: damaged rows that are set aside now, ascending.
    set_aside: Py<PyArray1<i64>>,
    /// Rows at the end that a file cut short had lost.
    lost: u64,
    /// Bytes cut off behind the last committed row.
    cut_bytes: u64,
    /// Rows of the store, those that are set aside included.
    count: u64,
}

#[pymethods]
impl StoreRepair {
    #[new]
    #[pyo3(signature = (*, mended, set_aside, lost, cut_bytes, count))]
    fn of(mended: Vec<String>, set_aside: Py<PyArray1<i64>>, lost: u64, cut_bytes: u64, count: u64) -> Self {
        Self { mended, set_aside, lost, cut_bytes, count }
    }

    fn __getnewargs_ex__<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
        let entries = [
            entry(py, "mended", &self.mended)?,
            entry(py, "set_aside", &self.set_aside)?,
            entry(py, "lost", self.lost)?,
            entry(py, "cut_bytes", self.cut_bytes)?,
            entry(py, "count", self.count)?,
        ];
        pickle::fields(py, entries)
    }
}

/// Mends a store as far as it can be. Sound rows stay where they are; damaged ones are set aside, so that the next run
/// computes them anew.
///
/// Args:
///     path: Directory of the store.
///     threads: Threads to use; all cores if None.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///
/// Raises:
///     StoreError: If nothing says any more what the rows are, or another process is writing to the store.
///     OSError: If a file cannot be read or written; nothing is given up then.
#[pyfunction]
#[pyo3(signature = (path, *, threads = None, progress = None))]
pub fn repair_store(
    py: Python<'_>,
    path: PathBuf,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<StoreRepair> {
    let (done, set_aside) = run(py, threads, progress.as_ref(), |progress| {
        let done = store::repair(&path, progress)?;
        // Not cancelled any more, as all is done.
        let set_aside = numbers(&done.set_aside, &Progress::default())?;
        Ok((done, set_aside))
    })?;
    Ok(StoreRepair {
        mended: done.mended,
        set_aside: set_aside.into_pyarray(py).unbind(),
        lost: done.lost,
        cut_bytes: done.cut,
        count: done.count,
    })
}
