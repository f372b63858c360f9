//! The one writer of a store.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use super::format::{Manifest, Paths, RECORD_BYTES, at, seal};
use crate::error::{Error, Result};

/// Appends rows. Holds the lock of the store until it is dropped.
#[derive(Debug)]
pub struct StoreWriter {
    paths: Paths,
    manifest: Manifest,
    rows: File,
    records: File,
    count: u64,
    /// Locked; the lock goes with the file handle.
    _lock: File,
}

impl StoreWriter {
    /// Makes a new store in `directory`, which may exist.
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
        manifest.write(&paths)?;
        Self::open(paths, manifest, lock)
    }

    /// Opens the store in `directory` to add rows after the last complete one.
    ///
    /// # Errors
    /// If there is no store, its manifest is not valid, another process is writing to it, or a file cannot be written.
    pub fn append_to(directory: &Path) -> Result<Self> {
        let paths = Paths::new(directory);
        let manifest = Manifest::read(&paths.manifest)?;
        let lock = lock(&paths)?;
        Self::open(paths, manifest, lock)
    }

    fn open(paths: Paths, manifest: Manifest, lock: File) -> Result<Self> {
        let open = |path: &Path| {
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(at(path))
        };
        let (rows, records) = (open(&paths.rows)?, open(&paths.records)?);
        let size = |file: &File, path: &Path| Ok(file.metadata().map_err(at(path))?.len());
        let count = manifest.complete_rows(size(&rows, &paths.rows)?, size(&records, &paths.records)?);
        let mut writer = Self { paths, manifest, rows, records, count, _lock: lock };
        writer.cut_tail()?;
        Ok(writer)
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn dim(&self) -> usize {
        self.manifest.dim
    }

    pub fn directory(&self) -> &Path {
        &self.paths.directory
    }

    /// Appends sketches, row-major (n, dim), and their n records; fills in the CRC of each record.
    ///
    /// Sketches are written before records, so a row without a record is never counted. If a write fails, the store
    /// goes back to the rows that it had.
    ///
    /// # Errors
    /// If the sizes do not fit or a file cannot be written.
    pub fn append(&mut self, sketches: &[f32], records: &[u8]) -> Result<()> {
        let dim = self.manifest.dim;
        let count = sketches.len() / dim;
        if sketches.len() != count * dim {
            return Err(Error::shape("sketches", format!("(n, {dim})"), format!("({},)", sketches.len())));
        }
        if records.len() != count * RECORD_BYTES {
            let expected = format!("({count},) with {RECORD_BYTES} bytes each");
            return Err(Error::shape("records", expected, format!("({},) bytes", records.len())));
        }
        let rows: Vec<u8> = sketches.iter().flat_map(|value| value.to_le_bytes()).collect();
        let mut records = records.to_vec();
        for (record, row) in records.chunks_exact_mut(RECORD_BYTES).zip(rows.chunks_exact(self.manifest.row_bytes())) {
            seal(record, row);
        }
        let written = self
            .rows
            .write_all(&rows)
            .map_err(at(&self.paths.rows))
            .and_then(|()| self.records.write_all(&records).map_err(at(&self.paths.records)));
        if let Err(error) = written {
            self.cut_tail()?;
            return Err(error);
        }
        self.count += count as u64;
        Ok(())
    }

    /// Waits until everything is on disk.
    ///
    /// # Errors
    /// If the operating system could not write.
    pub fn flush(&mut self) -> Result<()> {
        self.rows.sync_data().map_err(at(&self.paths.rows))?;
        self.records.sync_data().map_err(at(&self.paths.records))
    }

    /// Cuts off whatever lies behind the last complete row, and moves there.
    fn cut_tail(&mut self) -> Result<()> {
        let cut = |file: &mut File, path: &Path, size: u64| {
            file.set_len(size).and_then(|()| file.seek(SeekFrom::Start(size))).map_err(at(path)).map(|_| ())
        };
        cut(&mut self.rows, &self.paths.rows, self.count * self.manifest.row_bytes() as u64)?;
        cut(&mut self.records, &self.paths.records, self.count * RECORD_BYTES as u64)
    }
}

fn lock(paths: &Paths) -> Result<File> {
    let path = &paths.lock;
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(at(path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::StoreLocked { path: paths.directory.clone() }),
        Err(TryLockError::Error(source)) => Err(Error::Io { path: path.clone(), source }),
    }
}
