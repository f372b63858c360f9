//! Readers of a store: any number, also while a writer is at work. Nothing that a file says is believed, or allocated
//! for, before it is checked.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::ops::ControlFlow::{self, Break, Continue};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::format::{
    Counts, HEADER_BYTES, Header, Manifest, Paths, RECORD_BYTES, at, doing, is_set_aside, is_sound_record,
    is_sound_row, open, record_offset, set_aside, size,
};
use crate::error::{Error, Result};
use crate::memory::{ROWS_OF_STORE, grow, reserved};
use crate::progress::Progress;

/// Bytes of rows and records that are read at once.
const BLOCK_BYTES: usize = 1 << 20;

/// Records that are read at once.
const BLOCK_RECORDS: u64 = 1 << 14;

/// More damaged records are no store any more; it also bounds the list of them.
pub const MAX_DAMAGED: usize = 1 << 20;

/// What to do about damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// Refuse the store.
    None,
    /// Take the rows that are sound; the others read as set aside.
    SoundRows,
}

/// The rows that were committed when the store was opened.
///
/// ```
/// use bpo::progress::Progress;
/// # use bpo::store::StoreWriter;
/// # use bpo::store::format::{Manifest, RECORD_BYTES};
/// use bpo::store::{StoreReader, Tolerance};
///
/// # let directory = tempfile::tempdir().unwrap();
/// let path = directory.path().join("gradients");
/// # let mut writer = StoreWriter::create(&path, Manifest::new(2, "float16", "{}")?)?;
/// # writer.appender().append(&[0.5, 1.0, -2.0, 0.25], &[0; 2 * RECORD_BYTES], &Progress::default())?;
/// # writer.appender().close(&Progress::default())?;
/// # drop(writer);
/// let reader = StoreReader::open(&path, Tolerance::None, &Progress::default())?;
/// assert_eq!((reader.count(), reader.manifest().dim), (2, 2));
/// assert!(reader.verify(None, &Progress::default())?.is_empty());
/// std::fs::write(reader.rows_path(), [0x55; 8]).unwrap();
/// assert_eq!(reader.verify(None, &Progress::default())?, [0, 1]); // what is no longer as it was written
/// # Ok::<(), bpo::Error>(())
/// ```
#[derive(Debug)]
pub struct StoreReader {
    paths: Paths,
    manifest: Manifest,
    count: u64,
    /// Rows whose record is damaged, ascending.
    damaged: Vec<u64>,
    /// Bytes behind the last committed row.
    tail: u64,
    /// Whether both counts of the header are the same.
    closed: bool,
}

/// A row as it lies in the files.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    pub record: &'a [u8],
    pub encoded: &'a [u8],
}

impl StoreReader {
    /// # Errors
    /// If there is no store in `directory`, it is of another version, more of it is damaged than tolerated, or the
    /// computation was cancelled.
    pub fn open(directory: &Path, tolerance: Tolerance, progress: &Progress) -> Result<Self> {
        let paths = Paths::new(directory);
        let bytes = read_manifest(&paths)?;
        let header = read_header(&paths.records)?;
        if header.is_some_and(|header| header.manifest_crc.is_some_and(|crc| crc != crc32fast::hash(&bytes))) {
            return Err(damage(&paths.manifest, "it is not as it was written".to_owned()));
        }
        let manifest = Manifest::parse(&paths.manifest, &bytes)?;
        let Some(Header { manifest_crc: Some(_), counts }) = header else {
            let size = size(&paths.records)?;
            let reason = format!("its header, bytes 0 to {HEADER_BYTES} of {size}, is damaged");
            return Err(damage(&paths.records, reason));
        };
        let Some(counts) = counts else {
            return Err(damage(&paths.records, "both counts of rows in its header are damaged".to_owned()));
        };
        let mut reader = Self { paths, manifest, count: 0, damaged: Vec::new(), tail: 0, closed: false };
        reader.decide_count(counts, tolerance, progress)?;
        Ok(reader)
    }

    /// Finds out how many rows are committed. Of the two counts the larger holds if all that it speaks of is there;
    /// else, where they differ, the last commit was interrupted and the smaller one holds.
    fn decide_count(&mut self, counts: Counts, tolerance: Tolerance, progress: &Progress) -> Result<()> {
        let rows_path = self.rows_path();
        let (rows_size, records_size) = (size(&rows_path)?, size(&self.paths.records)?);
        let row_bytes = self.manifest.row_bytes() as u64;
        let rows_there = rows_size / row_bytes;
        let records_there = records_size.saturating_sub(HEADER_BYTES as u64) / RECORD_BYTES as u64;
        let there = rows_there.min(records_there);

        let smaller = counts.smaller.filter(|&smaller| smaller < counts.larger);
        self.closed = counts.smaller == Some(counts.larger);
        let interrupted = match smaller {
            Some(smaller) => {
                there < counts.larger || !are_sound(&self.paths.records, smaller..counts.larger, progress)?
            }
            None => false,
        };
        let committed = if interrupted { smaller.unwrap_or_default() } else { counts.larger };
        if there < committed && tolerance == Tolerance::None {
            let (path, size, has) = if rows_there < committed {
                (&rows_path, rows_size, rows_there)
            } else {
                (&self.paths.records, records_size, records_there)
            };
            let reason = format!("it is cut short: {size} bytes hold {has} rows of {committed}");
            return Err(damage(path, reason));
        }
        self.count = committed.min(there);
        self.damaged = damaged_records(&self.paths.records, 0..self.count, progress)?;
        if let Some(&row) = self.damaged.first()
            && tolerance == Tolerance::None
        {
            return Err(damaged_record(&self.paths.records, row, self.damaged.len() - 1));
        }
        self.tail = (rows_size - self.count * row_bytes) + records_size.saturating_sub(record_offset(self.count));
        Ok(())
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

    pub fn rows_path(&self) -> PathBuf {
        self.paths.rows(self.manifest.encoding)
    }

    /// Whether its last writer closed it, so that its files are those of any other store of the same rows.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Bytes behind the last committed row, which count for nothing.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Paths, manifest and number of rows.
    pub fn into_parts(self) -> (Paths, Manifest, u64) {
        (self.paths, self.manifest, self.count)
    }

    /// The records, one after the other; damaged ones are as those of rows that are set aside.
    ///
    /// # Errors
    /// If the file cannot be read, or was damaged since it was opened, the memory cannot be had, or the computation was
    /// cancelled.
    pub fn records(&self, progress: &Progress) -> Result<Vec<u8>> {
        let mut all = reserved((self.count as usize).saturating_mul(RECORD_BYTES), ROWS_OF_STORE)?;
        let mut damaged = self.damaged.iter().copied().peekable();
        for_records(&self.paths.records, 0..self.count, progress, |first, records| {
            for (row, record) in (first..).zip(records.chunks_exact(RECORD_BYTES)) {
                if damaged.next_if_eq(&row).is_some() {
                    all.extend_from_slice(&set_aside(row));
                } else if is_sound_record(record, row) {
                    all.extend_from_slice(record);
                } else {
                    return Err(damaged_record(&self.paths.records, row, 0));
                }
            }
            Ok(Continue(()))
        })?;
        Ok(all)
    }

    /// Reads rows and returns those that are damaged, ascending, those with a damaged record included.
    ///
    /// # Errors
    /// If a file cannot be read, `wanted` has another length than the store, or the computation was cancelled.
    pub fn verify(&self, wanted: Option<&[bool]>, progress: &Progress) -> Result<Vec<u64>> {
        if let Some(wanted) = wanted {
            self.check_wanted(wanted)?;
        }
        progress.start(self.count as usize);
        let found: Vec<Vec<u64>> = self
            .blocks()
            .into_par_iter()
            .map_init(
                || (open(&self.rows_path()), open(&self.paths.records), Buffers::default()),
                |(rows, records, buffers), block| {
                    let length = (block.end - block.start) as usize;
                    let asked = wanted.is_none_or(|wanted| wanted[block.start as usize..][..length].contains(&true));
                    let mut found = Vec::new();
                    if asked {
                        let (rows, records) = (opened(rows)?, opened(records)?);
                        for (row, Row { record, encoded }) in
                            (block.start..).zip(self.read(rows, records, &block, buffers)?)
                        {
                            let asked = wanted.is_none_or(|wanted| wanted[row as usize]);
                            let sound =
                                is_sound_record(record, row) && (is_set_aside(record) || is_sound_row(record, encoded));
                            if asked && !sound {
                                found.push(row);
                            }
                        }
                    }
                    progress.advance(length)?;
                    Ok(found)
                },
            )
            .collect::<Result<_>>()?;
        let mut damaged = reserved(found.iter().map(Vec::len).sum(), ROWS_OF_STORE)?;
        found.iter().for_each(|found| damaged.extend_from_slice(found));
        Ok(damaged)
    }

    /// Shows `visit` the rows that are wanted and not set aside, in order, some at a time.
    ///
    /// # Errors
    /// As [`StoreReader::verify`], and if one of them is damaged.
    pub fn read_rows(
        &self,
        wanted: &[bool],
        progress: &Progress,
        mut visit: impl FnMut(&[Row]) -> Result<()>,
    ) -> Result<()> {
        self.check_wanted(wanted)?;
        progress.start(self.count as usize);
        let (mut rows, mut records) = (open(&self.rows_path())?, open(&self.paths.records)?);
        let mut buffers = Buffers::default();
        for block in self.blocks() {
            let length = (block.end - block.start) as usize;
            if wanted[block.start as usize..][..length].contains(&true) {
                let mut chosen = Vec::new();
                for (row, found) in (block.start..).zip(self.read(&mut rows, &mut records, &block, &mut buffers)?) {
                    if !wanted[row as usize] || self.damaged.binary_search(&row).is_ok() {
                        continue; // those that are damaged are tolerated, and as if they were set aside
                    }
                    if !is_sound_record(found.record, row) {
                        return Err(damaged_record(&self.paths.records, row, 0));
                    }
                    if is_set_aside(found.record) {
                        continue;
                    }
                    if !is_sound_row(found.record, found.encoded) {
                        return Err(self.damaged_row(row, 0));
                    }
                    chosen.push(found);
                }
                if !chosen.is_empty() {
                    visit(&chosen)?;
                }
            }
            progress.advance(length)?;
        }
        Ok(())
    }

    /// Checks that rows are as they were written.
    ///
    /// # Errors
    /// As [`StoreReader::verify`], and if one is not.
    pub fn check(&self, wanted: &[bool], progress: &Progress) -> Result<()> {
        let damaged = self.verify(Some(wanted), progress)?;
        damaged.first().map_or(Ok(()), |&row| Err(self.damaged_row(row, damaged.len() - 1)))
    }

    /// The error for a row that is not as it was written, and others beside it.
    fn damaged_row(&self, row: u64, others: usize) -> Error {
        let (place, others) = (row * self.manifest.row_bytes() as u64, and_others(", nor are", others));
        damage(&self.rows_path(), format!("row {row}, at byte {place}, is not as it was written{others}"))
    }

    /// The rows in pieces that are read at once.
    fn blocks(&self) -> Vec<Range<u64>> {
        let step = (BLOCK_BYTES / (self.manifest.row_bytes() + RECORD_BYTES)).max(1) as u64;
        (0..self.count.div_ceil(step)).map(|block| block * step..((block + 1) * step).min(self.count)).collect()
    }

    fn read<'b>(
        &self,
        rows: &mut File,
        records: &mut File,
        block: &Range<u64>,
        buffers: &'b mut Buffers,
    ) -> Result<impl Iterator<Item = Row<'b>> + use<'b>> {
        let length = (block.end - block.start) as usize;
        let row_bytes = self.manifest.row_bytes();
        let more = (length * row_bytes).saturating_sub(buffers.rows.len());
        grow(&mut buffers.rows, more, ROWS_OF_STORE)?;
        buffers.rows.resize(length * row_bytes, 0);
        buffers.records.resize(length * RECORD_BYTES, 0);
        let what = || format!("reading rows {} to {}", block.start, block.end - 1);
        read_at(rows, block.start * row_bytes as u64, &mut buffers.rows).map_err(doing(&self.rows_path(), what))?;
        read_at(records, record_offset(block.start), &mut buffers.records).map_err(doing(&self.paths.records, what))?;
        let parts = buffers.records.chunks_exact(RECORD_BYTES).zip(buffers.rows.chunks_exact(row_bytes));
        Ok(parts.map(|(record, encoded)| Row { record, encoded }))
    }

    fn check_wanted(&self, wanted: &[bool]) -> Result<()> {
        if wanted.len() as u64 == self.count {
            return Ok(());
        }
        Err(Error::shape("wanted", format!("({},)", self.count), format!("({},)", wanted.len())))
    }
}

#[derive(Default)]
struct Buffers {
    rows: Vec<u8>,
    records: Vec<u8>,
}

/// The error for a file that is damaged.
pub fn damage(path: &Path, damage: String) -> Error {
    Error::StoreDamaged { path: path.to_path_buf(), damage }
}

fn and_others(words: &str, others: usize) -> String {
    if others == 0 { String::new() } else { format!("{words} {others} others") }
}

/// The error for a damaged record, and others beside it.
fn damaged_record(path: &Path, row: u64, others: usize) -> Error {
    let others = and_others(", and so are", others);
    damage(path, format!("the record of row {row}, at byte {}, is damaged{others}", record_offset(row)))
}

/// The bytes of the manifest.
pub fn read_manifest(paths: &Paths) -> Result<Vec<u8>> {
    Manifest::read_bytes(&paths.manifest).map_err(|error| lost_manifest(paths).unwrap_or(error))
}

/// The error for a store that lost its manifest: None where there are no rows to be lost with it.
pub fn lost_manifest(paths: &Paths) -> Option<Error> {
    let header = read_header(&paths.records).ok()??;
    let missing = !paths.manifest.exists() && header.counts?.larger > 0;
    missing.then(|| damage(&paths.manifest, "it is missing, but the rows are there".to_owned()))
}

/// The header of the records, None if the file is too short for one or not there.
pub fn read_header(path: &Path) -> Result<Option<Header>> {
    let mut bytes = [0; HEADER_BYTES];
    match open(path).and_then(|mut file| file.read_exact(&mut bytes).map_err(at(path))) {
        Ok(()) => Ok(Some(Header::parse(&bytes))),
        Err(Error::Io { source, .. }) if matches!(source.kind(), ErrorKind::UnexpectedEof | ErrorKind::NotFound) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Rows of a range whose records are damaged, ascending.
///
/// # Errors
/// If the file cannot be read or is shorter, or more records are damaged than a store could have.
fn damaged_records(path: &Path, range: Range<u64>, progress: &Progress) -> Result<Vec<u64>> {
    let mut damaged = Vec::new();
    for_records(path, range, progress, |first, records| {
        let sound = |(row, record): &(u64, &[u8])| is_sound_record(record, *row);
        let rows = (first..).zip(records.chunks_exact(RECORD_BYTES)).filter(|row| !sound(row)).map(|(row, _)| row);
        damaged.extend(rows);
        if damaged.len() > MAX_DAMAGED {
            let reason = format!("more than {MAX_DAMAGED} records are damaged; this is not a store any more");
            return Err(Error::StoreFormat { path: path.to_path_buf(), reason });
        }
        Ok(Continue(()))
    })?;
    Ok(damaged)
}

/// Whether all records of a range are sound; looks no further than the first that is not.
fn are_sound(path: &Path, range: Range<u64>, progress: &Progress) -> Result<bool> {
    let mut sound = true;
    for_records(path, range, progress, |first, records| {
        sound = (first..).zip(records.chunks_exact(RECORD_BYTES)).all(|(row, record)| is_sound_record(record, row));
        Ok(if sound { Continue(()) } else { Break(()) })
    })?;
    Ok(sound)
}

/// Shows `visit` the records of a range, some at a time, with the row of the first of them, until it has seen enough.
///
/// # Errors
/// If the file cannot be read, the computation was cancelled, or what `visit` gives.
pub fn for_records(
    path: &Path,
    range: Range<u64>,
    progress: &Progress,
    mut visit: impl FnMut(u64, &[u8]) -> Result<ControlFlow<()>>,
) -> Result<()> {
    let mut file = open(path)?;
    let mut buffer = Vec::new();
    let mut first = range.start;
    while first < range.end {
        progress.check()?;
        let end = range.end.min(first + BLOCK_RECORDS);
        buffer.resize((end - first) as usize * RECORD_BYTES, 0);
        let what = || format!("reading the records of rows {first} to {}", end - 1);
        read_at(&mut file, record_offset(first), &mut buffer).map_err(doing(path, what))?;
        if visit(first, &buffer)?.is_break() {
            break;
        }
        first = end;
    }
    Ok(())
}

fn read_at(file: &mut File, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}

/// A file that a thread opened for itself, or why it could not.
fn opened(file: &mut Result<File>) -> Result<&mut File> {
    match file {
        Ok(file) => Ok(file),
        Err(_) => match std::mem::replace(file, Err(Error::Cancelled)) {
            Err(error) => Err(error),
            Ok(_) => unreachable!("it is an error"),
        },
    }
}
