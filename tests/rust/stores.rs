//! Stores to test on, and what should be in them.

use std::fs;
use std::path::{Path, PathBuf};

use bpo::Error;
use bpo::progress::Progress;
use bpo::store::disk::Disk;
use bpo::store::format::{Manifest, RECORD_BYTES, scale};
use bpo::store::{Appender, StoreReader, StoreWriter, Tolerance};

pub const DIM: usize = 3;
pub const DTYPES: [&str; 4] = ["float32", "float16", "bfloat16", "int8"];

pub fn manifest(dtype: &str) -> Manifest {
    Manifest::new(DIM, dtype, "{\"model\": \"tiny\"}").unwrap()
}

/// Sketches and records of some rows, which depend on nothing but their numbers.
pub fn rows(range: std::ops::Range<usize>) -> (Vec<f32>, Vec<u8>) {
    let sketches = range.clone().flat_map(|row| (0..DIM).map(move |column| (row * 7 + column) as f32 - 2.5)).collect();
    let records = range.flat_map(|row| (0..RECORD_BYTES).map(move |byte| (row * 31 + byte) as u8 & 0x37)).collect();
    (sketches, records)
}

/// Writes a whole store of batches of the given sizes, each committed.
pub fn write(directory: &Path, dtype: &str, batches: &[usize]) {
    let mut writer = StoreWriter::create(directory, manifest(dtype)).unwrap();
    append(writer.appender(), batches);
    writer.appender().close(&Progress::default()).unwrap();
}

pub fn append<D: Disk>(appender: &mut Appender<D>, batches: &[usize]) {
    for &count in batches {
        let first = appender.count() as usize;
        let (sketches, records) = rows(first..first + count);
        appender.append(&sketches, &records, &Progress::default()).unwrap();
        appender.commit(&Progress::default()).unwrap();
    }
}

/// A directory in memory where there is one: thousands of syncs are not what these tests are about.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

pub fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

/// The sketches and records of a store, after a check of every row.
pub fn contents(directory: &Path) -> Result<(Vec<f32>, Vec<u8>), Error> {
    let reader = StoreReader::open(directory, Tolerance::None, &Progress::default())?;
    let (mut sketches, mut records) = (Vec::new(), Vec::new());
    let encoding = reader.manifest().encoding;
    let progress = Progress::default();
    reader.read_rows(&vec![true; reader.count() as usize], &progress, |found| {
        for row in found {
            let mut sketch = [0.0; DIM];
            encoding.decode(row.encoded, scale(row.record), &mut sketch);
            sketches.extend(sketch);
            records.extend(&row.record[..60]); // the others are filled in by the store
        }
        Ok(())
    })?;
    assert!(reader.verify(None, &progress).unwrap().is_empty());
    assert_eq!(reader.records(&Progress::default()).unwrap().len(), reader.count() as usize * RECORD_BYTES);
    Ok((sketches, records))
}

pub fn expected(count: usize) -> (Vec<f32>, Vec<u8>) {
    let (sketches, records) = rows(0..count);
    (sketches, records.chunks(RECORD_BYTES).flat_map(|record| &record[..60]).copied().collect())
}
