//! Names, sizes and checks of the files of a store.
//!
//! A record, little-endian: prompt_id `[u8; 16]`, response_id `[u8; 16]`, score f64, logp f32, ref_logp f32,
//! length u32, flags u32, log_weight f32, crc32 u32. The CRC covers the 60 bytes before it and then the row's sketch.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::matrix::MAX_DIM;

pub const FORMAT: &str = "bpo-store";
pub const FORMAT_VERSION: u64 = 2;
pub const RECORD_BYTES: usize = 64;

/// Where the CRC lies in a record.
const CRC: std::ops::Range<usize> = 60..64;

/// A manifest is a page or two; anything near this size is something else.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// The paths of a store.
#[derive(Clone, Debug)]
pub struct Paths {
    pub directory: PathBuf,
    pub manifest: PathBuf,
    pub rows: PathBuf,
    pub records: PathBuf,
    pub lock: PathBuf,
}

impl Paths {
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_path_buf(),
            manifest: directory.join("manifest.json"),
            rows: directory.join("rows.f32"),
            records: directory.join("records.bin"),
            lock: directory.join("lock"),
        }
    }
}

/// Names the file in an I/O error.
pub fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    |source| Error::Io { path: path.to_path_buf(), source }
}

/// What `manifest.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub dim: usize,
    /// Any JSON object; the store only keeps it.
    pub fingerprint: Map<String, Value>,
}

impl Manifest {
    /// # Errors
    /// If `dim` is out of range or `fingerprint` is not a JSON object.
    pub fn new(dim: usize, fingerprint: &str) -> Result<Self> {
        if !(1..=MAX_DIM).contains(&dim) {
            return Err(Error::argument("dim", format!("in 1..={MAX_DIM}"), dim));
        }
        let fingerprint = serde_json::from_str(fingerprint)
            .map_err(|error| Error::argument("fingerprint_json", "a JSON object", format!("not one: {error}")))?;
        Ok(Self { dim, fingerprint })
    }

    /// Reads and checks a manifest.
    pub fn read(path: &Path) -> Result<Self> {
        let invalid = |reason: String| Error::StoreFormat { path: path.to_path_buf(), reason };
        let mut file = File::open(path).map_err(at(path))?;
        let size = file.metadata().map_err(at(path))?.len();
        if size > MAX_MANIFEST_BYTES {
            return Err(invalid(format!("{size} bytes are too many for a manifest; this is not a store")));
        }
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(at(path))?;
        let manifest: Value =
            serde_json::from_str(&text).map_err(|error| invalid(format!("this is not a manifest: {error}")))?;
        if manifest["format"] != FORMAT {
            return Err(invalid(format!(
                "the format is {}, not \"{FORMAT}\"; this is not a store",
                manifest["format"]
            )));
        }
        if manifest["format_version"] != FORMAT_VERSION {
            return Err(invalid(format!(
                "the store has format version {}, but this release reads version {FORMAT_VERSION}; \
                 use the release of bpo that wrote it",
                manifest["format_version"]
            )));
        }
        if manifest["dtype"] != "float32" {
            return Err(invalid(format!("the dtype is {}, not \"float32\"", manifest["dtype"])));
        }
        let dim = manifest["dim"]
            .as_u64()
            .and_then(|dim| usize::try_from(dim).ok())
            .filter(|dim| (1..=MAX_DIM).contains(dim))
            .ok_or_else(|| invalid(format!("dim is {}, not in 1..={MAX_DIM}", manifest["dim"])))?;
        let Value::Object(fingerprint) = &manifest["fingerprint"] else {
            return Err(invalid("the fingerprint is not a JSON object".to_owned()));
        };
        Ok(Self { dim, fingerprint: fingerprint.clone() })
    }

    /// Writes the manifest so that a crash leaves either none or a whole one.
    pub fn write(&self, paths: &Paths) -> Result<()> {
        let manifest = json!({
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dim": self.dim,
            "dtype": "float32",
            "fingerprint": self.fingerprint,
        });
        let temporary = paths.directory.join("manifest.json.new");
        let mut file = File::create(&temporary).map_err(at(&temporary))?;
        file.write_all(format!("{manifest:#}\n").as_bytes()).map_err(at(&temporary))?;
        file.sync_all().map_err(at(&temporary))?;
        std::fs::rename(&temporary, &paths.manifest).map_err(at(&paths.manifest))
    }

    pub fn row_bytes(&self) -> usize {
        self.dim * size_of::<f32>()
    }

    /// Rows of which both the sketch and the record are complete.
    pub fn complete_rows(&self, rows_bytes: u64, records_bytes: u64) -> u64 {
        (rows_bytes / self.row_bytes() as u64).min(records_bytes / RECORD_BYTES as u64)
    }
}

/// The CRC that belongs to a record and the bytes of its row.
fn checksum(record: &[u8], row: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..CRC.start]);
    hasher.update(row);
    hasher.finalize()
}

/// Fills in the CRC of a record.
pub fn seal(record: &mut [u8], row: &[u8]) {
    let checksum = checksum(record, row);
    record[CRC].copy_from_slice(&checksum.to_le_bytes());
}

/// Whether a record and its row are as they were written.
pub fn is_sound(record: &[u8], row: &[u8]) -> bool {
    record[CRC] == checksum(record, row).to_le_bytes()
}
