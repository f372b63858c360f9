//! The one writer of a store.
//!
//! Rows are written as they come, synced some at a time, and count once they are committed: the last rows are synced, then
//! their records and one of the two counts of the header are written, and synced. What a commit was interrupted in is the rows since the last
//! one: the other count still says where these begin, and the records between the two, which have CRCs of their own,
//! say whether it came through.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

use super::disk::{Disk, Paced};
use super::format::{
    Header, Manifest, Paths, RECORD_BYTES, at, doing, record_offset, replace, scale, seal, slot_bytes, slot_offset,
    sync_directory, write,
};
use super::reader::{StoreReader, Tolerance, lost_manifest, read_manifest};
use crate::error::{Error, Result};
use crate::memory::{PIECE, ROWS_OF_STORE, grow, reserved};
use crate::progress::Progress;

/// Bytes of copied rows and their records between two commits, which closing waits for where a copy was interrupted.
const COMMIT_BYTES: u64 = 16 << 20;

/// Bytes of records that are written at once: a multiple of what the system keeps in one piece.
const WRITTEN: usize = 4 << 20;

/// Appends rows to two files, committing in steps.
#[derive(Debug)]
pub struct Appender<D> {
    manifest: Manifest,
    rows: Paced<D>,
    records: Paced<D>,
    rows_path: PathBuf,
    records_path: PathBuf,
    committed: u64,
    /// Records of the rows that were written since.
    pending: Vec<u8>,
    /// The slot that the next commit writes to.
    slot: usize,
    /// Whether what was written of a cancelled append may lie behind the rows.
    tail: bool,
    /// Whether the files are in a state that only opening the store anew can tell.
    failed: bool,
}

impl<D: Disk> Appender<D> {
    /// Goes on after `committed` rows: makes both counts say so, then cuts off what lies behind.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn new(
        manifest: Manifest,
        (rows, rows_path): (D, PathBuf),
        (records, records_path): (D, PathBuf),
        committed: u64,
    ) -> Result<Self> {
        let (rows, records, pending) = (Paced::new(rows), Paced::new(records), Vec::new());
        let (slot, tail, failed) = (0, false, false);
        let mut appender =
            Self { manifest, rows, records, rows_path, records_path, committed, pending, slot, tail, failed };
        // In this order: a count must never speak of rows that are other ones by now.
        appender.write_counts()?;
        appender.cut()?;
        Ok(appender)
    }

    /// Rows that no crash can take away any more.
    pub fn committed(&self) -> u64 {
        self.committed
    }

    /// Rows in all.
    pub fn count(&self) -> u64 {
        self.committed + (self.pending.len() / RECORD_BYTES) as u64
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Appends sketches, row-major (n, dim), and their n records; fills in scale and CRCs of each record. They count
    /// from the next [`Appender::commit`] on. If it fails, the store is as it was before, but for a sync that fails, which
    /// is a commit that does.
    ///
    /// # Errors
    /// If the sizes do not fit, a value is not finite, the memory cannot be had, a file cannot be written, or the
    /// computation was cancelled.
    pub fn append(&mut self, sketches: &[f32], records: &[u8], progress: &Progress) -> Result<()> {
        let dim = self.manifest.dim;
        if !sketches.len().is_multiple_of(dim) {
            return Err(Error::shape("sketches", format!("(n, {dim})"), format!("({},)", sketches.len())));
        }
        let count = sketches.len() / dim;
        if records.len() != count * RECORD_BYTES {
            let expected = format!("({count},) with {RECORD_BYTES} bytes each");
            return Err(Error::shape("records", expected, format!("({},) bytes", records.len())));
        }
        for (piece, sketches) in sketches.chunks(PIECE.div_ceil(dim) * dim).enumerate() {
            progress.check()?;
            if let Some(index) = sketches.iter().position(|value| !value.is_finite()) {
                let (row, column) = (piece * PIECE.div_ceil(dim) + index / dim, index % dim);
                return Err(Error::NonFiniteRow { array: "sketches", row, column, value: f64::from(sketches[index]) });
            }
        }
        self.check()?;
        let before = self.pending.len();
        grow(&mut self.pending, records.len(), ROWS_OF_STORE)?;
        let result = self.append_pieces(sketches, records, progress);
        if let Err(error) = &result
            && !self.failed
        {
            self.pending.truncate(before);
            // Cutting off half a gigabyte takes a third of a second, for which nobody who interrupts should wait.
            if matches!(error, Error::Cancelled) { self.tail = true } else { self.give_back() }
        }
        result
    }

    /// Some rows at a time, which bounds the bytes that encoding takes.
    fn append_pieces(&mut self, sketches: &[f32], records: &[u8], progress: &Progress) -> Result<()> {
        let Manifest { dim, encoding, .. } = self.manifest;
        let rows = PIECE.div_ceil(dim);
        let mut encoded = reserved(rows.min(records.len() / RECORD_BYTES) * self.manifest.row_bytes(), ROWS_OF_STORE)?;
        for (sketches, records) in sketches.chunks(rows * dim).zip(records.chunks(rows * RECORD_BYTES)) {
            progress.check()?;
            encoded.clear();
            let scales: Vec<f32> = sketches.chunks_exact(dim).map(|row| encoding.encode(row, &mut encoded)).collect();
            self.append_encoded(&encoded, &scales, records)?;
        }
        Ok(())
    }

    /// Appends rows that are encoded already, with the scale of each. If it fails, the store is as [`Appender::append`]
    /// says.
    ///
    /// # Errors
    /// If the memory cannot be had, or a file cannot be written, or could not be before.
    ///
    /// # Panics
    /// If the sizes do not fit.
    pub fn append_encoded(&mut self, encoded: &[u8], scales: &[f32], records: &[u8]) -> Result<()> {
        let row_bytes = self.manifest.row_bytes();
        assert!(encoded.len() == scales.len() * row_bytes && records.len() == scales.len() * RECORD_BYTES);
        self.check()?;
        let first = self.count();
        let before = self.pending.len();
        grow(&mut self.pending, records.len(), ROWS_OF_STORE)?;
        if let Err(error) = self.rows.write_at(encoded, first * row_bytes as u64) {
            self.give_back();
            let (count, kept) = (scales.len(), self.committed);
            let what = || format!("writing {count} rows from row {first} on; the {kept} committed rows are kept");
            return Err(doing(&self.rows_path, what)(error));
        }
        self.pending.extend_from_slice(records);
        let records = self.pending[before..].chunks_exact_mut(RECORD_BYTES);
        for (row, ((record, encoded), &scale)) in
            (first..).zip(records.zip(encoded.chunks_exact(row_bytes)).zip(scales))
        {
            seal(record, row, scale, encoded);
        }
        if let Err(error) = self.rows.keep_up() {
            let error = doing(&self.rows_path, self.committing())(error);
            self.fail();
            return Err(error);
        }
        Ok(())
    }

    /// Waits until everything appended is on disk, and counts it. If it fails, what was committed before is kept.
    ///
    /// Waiting for the disk cannot be cancelled; what is written before can, and nothing is lost by that.
    ///
    /// # Errors
    /// If the computation was cancelled, or the operating system could not write. Then, or if it failed before, the store
    /// has to be opened anew.
    pub fn commit(&mut self, progress: &Progress) -> Result<()> {
        self.check()?;
        if self.pending.is_empty() {
            return Ok(());
        }
        let count = self.count();
        let result = self.write_commit(count, progress);
        if matches!(result, Err(Error::Cancelled)) {
            // No count speaks of what was written.
        } else if result.is_err() {
            self.fail();
        } else {
            self.pending.clear();
            self.committed = count;
            self.slot = 1 - self.slot;
        }
        result
    }

    fn write_commit(&mut self, count: u64, progress: &Progress) -> Result<()> {
        let (first, what) = (self.committed, self.committing());
        self.rows.sync().map_err(doing(&self.rows_path, &what))?;
        for (piece, records) in self.pending.chunks(WRITTEN).enumerate() {
            progress.check()?;
            let offset = record_offset(first) + (piece * WRITTEN) as u64;
            let written = self.records.write_at(records, offset);
            written.and_then(|()| self.records.keep_up()).map_err(doing(&self.records_path, &what))?;
        }
        let counted = self.records.write_at(&slot_bytes(count), slot_offset(self.slot) as u64);
        counted.and_then(|()| self.records.sync()).map_err(doing(&self.records_path, what))
    }

    /// What fails where rows cannot be synced.
    fn committing(&self) -> impl Fn() -> String + use<D> {
        let (first, count) = (self.committed, self.count());
        move || format!("committing rows {first} to {}; those before are kept", count - 1)
    }

    /// After a failed sync the system may have dropped what it could not write: the files say one thing now and another
    /// after a restart.
    fn fail(&mut self) {
        self.failed = true;
        self.pending.clear();
        self.give_back();
    }

    /// Commits, cuts off what a cancelled append left, and makes both counts of the header agree: a store that was closed is
    /// the same whenever it was committed, and damage to it cannot be taken for an interrupted commit.
    ///
    /// # Errors
    /// As [`Appender::commit`].
    pub fn close(&mut self, progress: &Progress) -> Result<()> {
        if self.failed {
            return Ok(()); // which was said
        }
        self.commit(progress)?;
        self.write_counts()?;
        if std::mem::take(&mut self.tail) { self.cut() } else { Ok(()) }
    }

    /// One after the other, so that a crash leaves one of them whole.
    fn write_counts(&mut self) -> Result<()> {
        for slot in 0..2 {
            let written = self.records.write_at(&slot_bytes(self.committed), slot_offset(slot) as u64);
            written.and_then(|()| self.records.sync()).map_err(at(&self.records_path))?;
        }
        Ok(())
    }

    /// Cuts off whatever lies behind the last committed row.
    fn cut(&mut self) -> Result<()> {
        let rows = self.committed * self.manifest.row_bytes() as u64;
        self.rows.set_len(rows).map_err(at(&self.rows_path))?;
        self.records.set_len(record_offset(self.committed)).map_err(at(&self.records_path))
    }

    /// Gives the room of rows that could not be written back, as far as that goes: what is left of them counts nothing.
    fn give_back(&mut self) {
        let rows = self.count() * self.manifest.row_bytes() as u64;
        let _ = self.rows.set_len(rows);
        let _ = self.records.set_len(record_offset(self.committed));
    }

    fn check(&self) -> Result<()> {
        if self.failed {
            let reason = "writing failed before; open the store anew to go on after the rows that are kept".to_owned();
            return Err(Error::StoreFormat { path: self.rows_path.clone(), reason });
        }
        Ok(())
    }
}

/// Appends rows to a store in a directory. Holds its lock until it is dropped.
///
/// ```
/// use bpo::progress::Progress;
/// use bpo::store::format::{Manifest, RECORD_BYTES};
/// use bpo::store::{StoreReader, StoreWriter, Tolerance};
///
/// # let directory = tempfile::tempdir().unwrap();
/// let path = directory.path().join("gradients");
/// let mut writer = StoreWriter::create(&path, Manifest::new(2, "float16", "{\"model\": \"mine\"}")?)?;
/// writer.appender().append(&[0.5, 1.0, -2.0, 0.25], &[0; 2 * RECORD_BYTES], &Progress::default())?;
/// // A row counts once it is committed.
/// assert_eq!(StoreReader::open(&path, Tolerance::None, &Progress::default())?.count(), 0);
/// writer.appender().close(&Progress::default())?;
/// assert_eq!(StoreReader::open(&path, Tolerance::None, &Progress::default())?.count(), 2);
/// # Ok::<(), bpo::Error>(())
/// ```
#[derive(Debug)]
pub struct StoreWriter {
    paths: Paths,
    appender: Appender<File>,
    /// Locked; the lock goes with the file handle.
    _lock: File,
}

impl StoreWriter {
    /// Makes a new store in `directory`, which may exist, or finishes making one.
    ///
    /// # Errors
    /// If there is a store already, another process is writing to it, or a file cannot be written.
    pub fn create(directory: &Path, manifest: Manifest) -> Result<Self> {
        let paths = Paths::new(directory);
        fs::create_dir_all(directory).map_err(at(directory))?;
        let lock = lock(&paths)?;
        if paths.manifest.exists() {
            let reason = "there is a store already; append to it, or choose another directory".to_owned();
            return Err(Error::StoreFormat { path: paths.directory, reason });
        }
        if let Some(error) = lost_manifest(&paths) {
            return Err(error);
        }
        let bytes = manifest.to_bytes();
        let rows = paths.rows(manifest.encoding);
        let header = Header::bytes(crc32fast::hash(&bytes), 0);
        write(&rows, &[])?;
        write(&paths.records, &header)?;
        // The manifest goes last, so that there is a store or there is none.
        replace(&paths.copy, &bytes)?;
        replace(&paths.manifest, &bytes)?;
        sync_directory(directory)?;
        Self::open(paths, manifest, 0, lock)
    }

    /// Opens the store in `directory` to add rows after the last committed one.
    ///
    /// # Errors
    /// If there is no store, it is damaged, another process is writing to it, a file cannot be written, or the computation
    /// was cancelled.
    pub fn append_to(directory: &Path, progress: &Progress) -> Result<Self> {
        // Before the lock, so that nothing is made where no store is.
        read_manifest(&Paths::new(directory))?;
        let lock = lock(&Paths::new(directory))?;
        let (paths, manifest, count) = StoreReader::open(directory, Tolerance::None, progress)?.into_parts();
        Self::open(paths, manifest, count, lock)
    }

    fn open(paths: Paths, manifest: Manifest, count: u64, lock: File) -> Result<Self> {
        let open = |path: PathBuf| {
            let file = OpenOptions::new().write(true).open(&path).map_err(at(&path))?;
            Ok::<_, Error>((file, path))
        };
        let (rows, records) = (open(paths.rows(manifest.encoding))?, open(paths.records.clone())?);
        let appender = Appender::new(manifest, rows, records, count)?;
        Ok(Self { paths, appender, _lock: lock })
    }

    pub fn appender(&mut self) -> &mut Appender<File> {
        &mut self.appender
    }

    pub fn count(&self) -> u64 {
        self.appender.count()
    }

    pub fn manifest(&self) -> &Manifest {
        self.appender.manifest()
    }

    pub fn directory(&self) -> &Path {
        &self.paths.directory
    }

    /// Appends and commits the rows of another store that `wanted` says, bytes and all where the encodings are the same.
    ///
    /// # Errors
    /// If the other store is damaged or its rows have another length, or a file cannot be read or written.
    pub fn copy_from(&mut self, other: &StoreReader, wanted: &[bool], progress: &Progress) -> Result<()> {
        let (ours, theirs) = (self.manifest().clone(), other.manifest().clone());
        if ours.dim != theirs.dim {
            return Err(Error::argument("dim", format!("{} in every store", ours.dim), theirs.dim));
        }
        let same = ours.encoding == theirs.encoding;
        other.read_rows(wanted, progress, |rows| {
            let records: Vec<u8> = rows.iter().flat_map(|row| row.record).copied().collect();
            if same {
                let encoded: Vec<u8> = rows.iter().flat_map(|row| row.encoded).copied().collect();
                let scales: Vec<f32> = rows.iter().map(|row| scale(row.record)).collect();
                self.appender.append_encoded(&encoded, &scales, &records)?;
            } else {
                let mut sketches = vec![0.0; rows.len() * theirs.dim];
                for (row, out) in rows.iter().zip(sketches.chunks_exact_mut(theirs.dim)) {
                    theirs.encoding.decode(row.encoded, scale(row.record), out);
                }
                self.appender.append(&sketches, &records, progress)?;
            }
            let uncommitted = self.appender.count() - self.appender.committed();
            let bytes = uncommitted * (ours.row_bytes() + RECORD_BYTES) as u64;
            if bytes >= COMMIT_BYTES { self.appender.commit(progress) } else { Ok(()) }
        })?;
        self.appender.commit(progress)
    }
}

/// Takes the lock of a store.
///
/// # Errors
/// If another process has it, the file system knows no locks, or a file of the store is a link or no file.
pub fn lock(paths: &Paths) -> Result<File> {
    paths.check_own_files()?;
    let path = &paths.lock;
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(at(path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::StoreLocked { path: paths.directory.clone() }),
        Err(TryLockError::Error(source)) => {
            let what = || "locking; name a directory on a file system that has locks".to_owned();
            Err(doing(path, what)(source))
        }
    }
}
