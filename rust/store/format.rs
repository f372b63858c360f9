//! Names, layout and checks of the files of a store. docs/store-format.md says the same for users.
//!
//! `records.bin`, little-endian: a header of 72 bytes, then a record of 72 bytes for each row.
//!
//! | header | | record | |
//! |---|---|---|---|
//! | 0 | magic `bpostore` | 0 | prompt_id `[u8; 16]` |
//! | 8 | format version u32 | 16 | response_id `[u8; 16]` |
//! | 12 | bytes of a record u32 | 32 | score f64 |
//! | 16 | CRC of manifest.json u32 | 40 | logp f32 |
//! | 20 | CRC of bytes 0..20 u32 | 44 | ref_logp f32 |
//! | 24 | slot 0: rows u64, CRC u32, zero u32 | 48 | length u32 |
//! | 40 | slot 1: the same | 52 | flags u32 |
//! | 56 | zeros | 56 | log_weight f32 |
//! | | | 60 | scale f32 |
//! | | | 64 | CRC of the row u32 |
//! | | | 68 | CRC of the record u32 |
//!
//! The CRC of a slot covers its eight bytes; that of a record the number of its row (u64) and its first 68 bytes, so
//! that a record in another's place is noticed.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::encoding::Encoding;
use crate::error::{Error, Result};
use crate::matrix::MAX_DIM;

pub const FORMAT: &str = "bpo-store";
pub const FORMAT_VERSION: u32 = 3;
pub const HEADER_BYTES: usize = 72;
pub const RECORD_BYTES: usize = 72;

const MAGIC: &[u8; 8] = b"bpostore";

/// A manifest is a page or two; anything near this size is something else. JSON can take a hundred times its size.
const MAX_MANIFEST_BYTES: u64 = 1 << 20;

/// Characters of a value that a message shows.
const SHOWN: usize = 60;

/// Set in the flags of a record that repair set aside: its row is void, its ids are zero.
pub const SET_ASIDE: u32 = 8;

const RESPONSE_ID: std::ops::Range<usize> = 16..32;
const FLAGS: std::ops::Range<usize> = 52..56;
const SCALE: std::ops::Range<usize> = 60..64;
const ROW_CRC: std::ops::Range<usize> = 64..68;
const RECORD_CRC: std::ops::Range<usize> = 68..72;

/// The paths of a store.
#[derive(Clone, Debug)]
pub struct Paths {
    pub directory: PathBuf,
    pub manifest: PathBuf,
    /// The same bytes as the manifest, from which it can be restored.
    pub copy: PathBuf,
    pub records: PathBuf,
    pub lock: PathBuf,
}

impl Paths {
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_path_buf(),
            manifest: directory.join("manifest.json"),
            copy: directory.join("manifest.copy.json"),
            records: directory.join("records.bin"),
            lock: directory.join("lock"),
        }
    }

    /// Checks that every file that a writer would write to, where it is there, is one of this directory and no link: the
    /// store may be from somebody else.
    ///
    /// # Errors
    /// If one is something else.
    pub fn check_own_files(&self) -> Result<()> {
        let rows = Encoding::ALL.map(|encoding| self.rows(encoding));
        let others = [&self.manifest, &self.copy, &self.records, &self.lock];
        others.into_iter().chain(&rows).try_for_each(|path| check_own_file(path))
    }

    /// The file of the sketches, which is named after their encoding.
    pub fn rows(&self, encoding: Encoding) -> PathBuf {
        self.directory.join(format!("rows.{}", encoding.suffix()))
    }
}

/// Names the file in an I/O error.
pub fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    |source| Error::Io { path: path.to_path_buf(), doing: None, source }
}

/// Names the file in an I/O error, and what was being done.
pub fn doing(path: &Path, doing: impl FnOnce() -> String) -> impl FnOnce(std::io::Error) -> Error {
    |source| Error::Io { path: path.to_path_buf(), doing: Some(doing()), source }
}

/// What `manifest.json` says.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub dim: usize,
    pub encoding: Encoding,
    /// Any JSON object; the store only keeps it.
    pub fingerprint: Map<String, Value>,
}

impl Manifest {
    /// # Errors
    /// If `dim` is out of range, `dtype` is none of a store, or `fingerprint` is not a JSON object.
    pub fn new(dim: usize, dtype: &str, fingerprint: &str) -> Result<Self> {
        if !(1..=MAX_DIM).contains(&dim) {
            return Err(Error::argument("dim", format!("in 1..={MAX_DIM}"), dim));
        }
        let encoding = Encoding::of(dtype)
            .ok_or_else(|| Error::argument("dtype", format!("one of {}", Encoding::names()), dtype))?;
        let fingerprint = serde_json::from_str(fingerprint)
            .map_err(|error| Error::argument("fingerprint_json", "a JSON object", format!("not one: {error}")))?;
        Ok(Self { dim, encoding, fingerprint })
    }

    /// Reads a file that should be a manifest, or the copy of one.
    ///
    /// # Errors
    /// If it cannot be read, or is far larger than a manifest.
    pub fn read_bytes(path: &Path) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        open(path)?.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes).map_err(at(path))?;
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            let reason =
                format!("more than {MAX_MANIFEST_BYTES} bytes are too many for a manifest; this is not a store");
            return Err(Error::StoreFormat { path: path.to_path_buf(), reason });
        }
        Ok(bytes)
    }

    /// Checks the bytes of a manifest.
    ///
    /// # Errors
    /// If they are not those of one, or of another version.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let invalid = |reason: String| Error::StoreFormat { path: path.to_path_buf(), reason };
        let manifest: Value = serde_json::from_slice(bytes).map_err(|error| {
            invalid(format!("this is no manifest: {error}; `bpo store repair` restores that of a store from its copy"))
        })?;
        if manifest["format"] != FORMAT {
            let found = shown(&manifest["format"]);
            return Err(invalid(format!("the format is {found}, not \"{FORMAT}\"; this is not a store")));
        }
        let version = &manifest["format_version"];
        if *version != FORMAT_VERSION {
            let newer = version.as_u64().is_some_and(|version| version > u64::from(FORMAT_VERSION));
            let remedy =
                if newer { "update bpo" } else { "use the release of bpo that wrote it, or another directory" };
            return Err(Error::StoreVersion {
                path: path.to_path_buf(),
                found: shown(version),
                known: FORMAT_VERSION,
                remedy,
            });
        }
        let encoding = manifest["dtype"].as_str().and_then(Encoding::of).ok_or_else(|| {
            invalid(format!("the dtype is {}, none of {}", shown(&manifest["dtype"]), Encoding::names()))
        })?;
        let dim = manifest["dim"]
            .as_u64()
            .and_then(|dim| usize::try_from(dim).ok())
            .filter(|dim| (1..=MAX_DIM).contains(dim))
            .ok_or_else(|| invalid(format!("dim is {}, not in 1..={MAX_DIM}", shown(&manifest["dim"]))))?;
        let Value::Object(fingerprint) = &manifest["fingerprint"] else {
            return Err(invalid("the fingerprint is not a JSON object".to_owned()));
        };
        Ok(Self { dim, encoding, fingerprint: fingerprint.clone() })
    }

    /// The text of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let manifest = json!({
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dim": self.dim,
            "dtype": self.encoding.name(),
            "fingerprint": self.fingerprint,
        });
        format!("{manifest:#}\n").into_bytes()
    }

    /// Bytes of a row of the sketches.
    pub fn row_bytes(&self) -> usize {
        self.encoding.row_bytes(self.dim)
    }
}

/// A value as a message shows it.
fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Makes a new file where an interrupted run may have left one. What else may be there, such as a link to a file of
/// somebody else, is taken away and not written through.
pub fn create(path: &Path) -> Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => OpenOptions::new().write(true).create_new(true).open(path),
    }
    .map_err(at(path))
}

/// Writes a small file and waits until it is on disk.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = create(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(at(path))
}

/// Writes a small file so that a crash leaves the old one or the new one, whole.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("new");
    write(&temporary, bytes)?;
    fs::rename(&temporary, path).map_err(at(path))
}

/// Opens a file to read it.
///
/// # Errors
/// If it cannot be read, or is no regular file: opening a pipe would wait for ever.
pub fn open(path: &Path) -> Result<File> {
    size(path)?;
    File::open(path).map_err(at(path))
}

/// Bytes of a file.
///
/// # Errors
/// If it is not there, or is no regular file.
pub fn size(path: &Path) -> Result<u64> {
    let found = fs::metadata(path).map_err(at(path))?;
    if found.is_file() { Ok(found.len()) } else { Err(no_file(path)) }
}

/// See [`Paths::check_own_files`].
fn check_own_file(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => Err(no_file(path)),
        Err(error) if error.kind() != ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

fn no_file(path: &Path) -> Error {
    let reason = "this is no regular file of the store; nothing is read from it or written to it".to_owned();
    Error::StoreFormat { path: path.to_path_buf(), reason }
}

/// Waits until the names of the files of a directory are on disk.
pub fn sync_directory(directory: &Path) -> Result<()> {
    // Elsewhere a directory cannot be opened as a file, and its names are written with the files.
    if cfg!(unix) { File::open(directory).and_then(|file| file.sync_all()).map_err(at(directory)) } else { Ok(()) }
}

/// The two counts of rows in a header: what was written last, and before that. One that is damaged is None.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub larger: u64,
    pub smaller: Option<u64>,
}

/// What a header is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// CRC of the manifest; None if the fixed part of the header is damaged.
    pub manifest_crc: Option<u32>,
    /// None if both slots are damaged.
    pub counts: Option<Counts>,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let fixed = bytes[..8] == *MAGIC
            && word(8) == FORMAT_VERSION
            && word(12) as usize == RECORD_BYTES
            && word(20) == crc32fast::hash(&bytes[..20])
            && bytes[56..].iter().all(|&byte| byte == 0);
        let slot = |at: usize| {
            let count: [u8; 8] = bytes[at..at + 8].try_into().expect("eight bytes");
            (word(at + 8) == crc32fast::hash(&count) && word(at + 12) == 0).then(|| u64::from_le_bytes(count))
        };
        let counts = match (slot(24), slot(40)) {
            (Some(one), Some(other)) => Some(Counts { larger: one.max(other), smaller: Some(one.min(other)) }),
            (Some(count), None) | (None, Some(count)) => Some(Counts { larger: count, smaller: None }),
            (None, None) => None,
        };
        Self { manifest_crc: fixed.then(|| word(16)), counts }
    }

    /// A header whose slots agree.
    pub fn bytes(manifest_crc: u32, count: u64) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(RECORD_BYTES as u32).to_le_bytes());
        bytes[16..20].copy_from_slice(&manifest_crc.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        for slot in 0..2 {
            bytes[slot_offset(slot)..][..SLOT_BYTES].copy_from_slice(&slot_bytes(count));
        }
        bytes
    }
}

pub const SLOT_BYTES: usize = 16;

/// Where a slot lies in the header.
pub fn slot_offset(slot: usize) -> usize {
    24 + slot * SLOT_BYTES
}

pub fn slot_bytes(count: u64) -> [u8; SLOT_BYTES] {
    let mut bytes = [0; SLOT_BYTES];
    bytes[..8].copy_from_slice(&count.to_le_bytes());
    bytes[8..12].copy_from_slice(&crc32fast::hash(&count.to_le_bytes()).to_le_bytes());
    bytes
}

/// Where the record of a row lies in the file.
pub fn record_offset(row: u64) -> u64 {
    HEADER_BYTES as u64 + row * RECORD_BYTES as u64
}

fn record_crc(row: u64, record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&row.to_le_bytes());
    hasher.update(&record[..RECORD_CRC.start]);
    hasher.finalize()
}

/// Fills in the scale of a record and its two CRCs.
pub fn seal(record: &mut [u8], row: u64, scale: f32, encoded: &[u8]) {
    record[SCALE].copy_from_slice(&scale.to_le_bytes());
    record[ROW_CRC].copy_from_slice(&crc32fast::hash(encoded).to_le_bytes());
    seal_record(record, row);
}

/// Fills in the CRC of a record that is whole otherwise.
pub fn seal_record(record: &mut [u8], row: u64) {
    let crc = record_crc(row, record);
    record[RECORD_CRC].copy_from_slice(&crc.to_le_bytes());
}

/// The record of a row that is set aside.
pub fn set_aside(row: u64) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[FLAGS].copy_from_slice(&SET_ASIDE.to_le_bytes());
    seal_record(&mut record, row);
    record
}

pub fn is_set_aside(record: &[u8]) -> bool {
    u32::from_le_bytes(record[FLAGS].try_into().expect("four bytes")) & SET_ASIDE != 0
}

pub fn response_id(record: &[u8]) -> [u8; 16] {
    record[RESPONSE_ID].try_into().expect("sixteen bytes")
}

pub fn scale(record: &[u8]) -> f32 {
    f32::from_le_bytes(record[SCALE].try_into().expect("four bytes"))
}

/// Whether a record is as it was written, and that of this row.
pub fn is_sound_record(record: &[u8], row: u64) -> bool {
    record[RECORD_CRC] == record_crc(row, record).to_le_bytes()
}

/// Whether the bytes of a row are those that its record was written with.
pub fn is_sound_row(record: &[u8], encoded: &[u8]) -> bool {
    record[ROW_CRC] == crc32fast::hash(encoded).to_le_bytes()
}
