//! Readers of a store: any number, also while a writer is at work.

use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::Path;

use super::format::{Manifest, Paths, RECORD_BYTES, at, is_sound};
use crate::error::Result;
use crate::progress::Progress;

/// Buffer of a file that is read from start to end.
const BUFFER_BYTES: usize = 1 << 20;

/// The rows that were complete when the store was opened.
#[derive(Debug)]
pub struct StoreReader {
    paths: Paths,
    manifest: Manifest,
    count: u64,
}

impl StoreReader {
    /// # Errors
    /// If there is no store in `directory` or its manifest is not valid.
    pub fn open(directory: &Path) -> Result<Self> {
        let paths = Paths::new(directory);
        let manifest = Manifest::read(&paths.manifest)?;
        let size = |path: &Path| Ok(fs::metadata(path).map_err(at(path))?.len());
        let count = manifest.complete_rows(size(&paths.rows)?, size(&paths.records)?);
        Ok(Self { paths, manifest, count })
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The records, 64 bytes each.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn records(&self) -> Result<Vec<u8>> {
        let path = &self.paths.records;
        // The count was derived from the size of this file, so no more is allocated than is there.
        let mut records = vec![0; self.count as usize * RECORD_BYTES];
        File::open(path).and_then(|mut file| file.read_exact(&mut records)).map_err(at(path))?;
        Ok(records)
    }

    /// Reads every row and returns the indices of those whose CRC does not fit.
    ///
    /// # Errors
    /// If a file cannot be read or the computation was cancelled.
    pub fn verify(&self, progress: &Progress) -> Result<Vec<i64>> {
        progress.start(self.count as usize);
        let open =
            |path: &Path| File::open(path).map(|file| BufReader::with_capacity(BUFFER_BYTES, file)).map_err(at(path));
        let (mut rows, mut records) = (open(&self.paths.rows)?, open(&self.paths.records)?);
        let mut row = vec![0; self.manifest.row_bytes()];
        let mut record = [0; RECORD_BYTES];
        let mut damaged = Vec::new();
        for index in 0..self.count {
            rows.read_exact(&mut row).map_err(at(&self.paths.rows))?;
            records.read_exact(&mut record).map_err(at(&self.paths.records))?;
            if !is_sound(&record, &row) {
                damaged.push(index as i64);
            }
            progress.advance(1)?;
        }
        Ok(damaged)
    }
}
