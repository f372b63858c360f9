//! Mends a store as far as it can be: what is sound stays where it is, and what is not is set aside to be computed anew.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow::{Break, Continue};
use std::path::Path;

use super::disk::{Disk, Paced};
use super::format::{
    Counts, HEADER_BYTES, Header, Manifest, Paths, RECORD_BYTES, at, create, is_sound_record, record_offset, replace,
    set_aside, size, sync_directory,
};
use super::reader::{MAX_DAMAGED, StoreReader, Tolerance, for_records, read_header};
use super::writer::lock;
use crate::error::{Error, Result};
use crate::progress::Progress;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// Files that were written anew, by name.
    pub mended: Vec<String>,
    /// Rows that were damaged and are set aside now, ascending.
    pub set_aside: Vec<u64>,
    /// Rows that a file cut short had lost.
    pub lost: u64,
    /// Bytes cut off behind the last committed row.
    pub cut: u64,
    /// Rows of the store, those that are set aside included.
    pub count: u64,
}

/// Repairs the store in `directory`: manifest, header, records, then what lies behind them. No row is moved, and records
/// are written beside the old file first, so a repair that is interrupted can be repeated.
///
/// ```
/// use bpo::progress::Progress;
/// use bpo::store::repair;
/// # use bpo::store::{StoreReader, StoreWriter, Tolerance};
/// # use bpo::store::format::{Manifest, RECORD_BYTES};
///
/// # let directory = tempfile::tempdir().unwrap();
/// let path = directory.path().join("gradients");
/// # let mut writer = StoreWriter::create(&path, Manifest::new(2, "float16", "{}")?)?;
/// # writer.appender().append(&[0.5, 1.0, -2.0, 0.25], &[0; 2 * RECORD_BYTES], &Progress::default())?;
/// # writer.appender().close(&Progress::default())?;
/// # drop(writer);
/// std::fs::remove_file(path.join("manifest.json")).unwrap();
/// let done = repair(&path, &Progress::default())?;
/// assert_eq!((done.mended, done.count), (vec!["manifest.json".to_owned()], 2));
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If neither the manifest nor its copy is sound, a process is writing to the store, the computation was cancelled, or a
/// file cannot be read or written; a row that cannot be read at all may be readable again, so it stops the repair.
pub fn repair(directory: &Path, progress: &Progress) -> Result<Repair> {
    let paths = Paths::new(directory);
    // Before the lock, so that nothing is made where no store is.
    let bytes = sound_manifest(&paths, read_header(&paths.records)?)?;
    let manifest = Manifest::parse(&paths.manifest, &bytes)?;
    let _lock = lock(&paths)?;

    let mut done = Repair::default();
    restore_manifest(&paths, &bytes, &mut done)?;
    let rows_path = paths.rows(manifest.encoding);
    for path in [&paths.records, &rows_path] {
        OpenOptions::new().append(true).create(true).open(path).map_err(at(path))?;
    }
    let manifest_crc = crc32fast::hash(&bytes);
    let counts = restore_header(&paths, manifest_crc, &mut done, progress)?;

    let reader = StoreReader::open(directory, Tolerance::SoundRows, progress)?;
    done.count = reader.count();
    // Where the counts differ and the smaller one is there, a commit was interrupted: nothing that counted is lost.
    done.lost = counts.smaller.unwrap_or(counts.larger).saturating_sub(done.count);
    done.cut = reader.tail();
    done.set_aside = reader.verify(None, progress)?;
    let agree = counts.larger == done.count && counts.smaller == Some(done.count);
    if !done.set_aside.is_empty() || !agree {
        rewrite_records(&paths, manifest_crc, &mut done, progress)?;
    }
    cut(&rows_path, done.count * manifest.row_bytes() as u64)?;
    cut(&paths.records, record_offset(done.count))?;
    sync_directory(directory)?;
    Ok(done)
}

/// Writes the manifest and its copy, where they are not as they should be.
fn restore_manifest(paths: &Paths, bytes: &Vec<u8>, done: &mut Repair) -> Result<()> {
    for path in [&paths.manifest, &paths.copy] {
        if Manifest::read_bytes(path).ok().as_ref() != Some(bytes) {
            replace(path, bytes)?;
            done.mended.push(name(path));
        }
    }
    Ok(())
}

/// Writes the header, if it is damaged, with the count that it had or, if both are lost, up to the last record that is
/// one. Returns the counts.
fn restore_header(paths: &Paths, manifest_crc: u32, done: &mut Repair, progress: &Progress) -> Result<Counts> {
    let path = &paths.records;
    let header = read_header(path)?;
    let counts = header.and_then(|header| header.counts);
    if let Some(counts) = counts
        && header.is_some_and(|header| header.manifest_crc == Some(manifest_crc))
    {
        return Ok(counts);
    }
    let there = size(path)?.saturating_sub(HEADER_BYTES as u64) / RECORD_BYTES as u64;
    let count = counts.map_or_else(|| last_sound(path, there, progress), |counts| Ok(counts.larger))?;
    let mut file = OpenOptions::new().write(true).open(path).map_err(at(path))?;
    file.write_all(&Header::bytes(manifest_crc, count)).and_then(|()| file.sync_all()).map_err(at(path))?;
    done.mended.push(name(path));
    Ok(Counts { larger: count, smaller: Some(count) })
}

/// Writes the records anew, those of damaged rows as set aside, with a header whose counts agree.
fn rewrite_records(paths: &Paths, manifest_crc: u32, done: &mut Repair, progress: &Progress) -> Result<()> {
    let temporary = paths.records.with_extension("new");
    let mut file = Paced::new(create(&temporary)?);
    file.write_at(&Header::bytes(manifest_crc, done.count), 0).map_err(at(&temporary))?;
    let mut damaged = done.set_aside.iter().copied().peekable();
    for_records(&paths.records, 0..done.count, progress, |first, records| {
        let mut records = records.to_vec();
        for (row, record) in (first..).zip(records.chunks_exact_mut(RECORD_BYTES)) {
            if damaged.next_if_eq(&row).is_some() {
                record.copy_from_slice(&set_aside(row));
            }
        }
        let written = file.write_at(&records, record_offset(first));
        written.and_then(|()| file.keep_up()).map_err(at(&temporary))?;
        Ok(Continue(()))
    })?;
    file.sync().map_err(at(&temporary))?;
    fs::rename(&temporary, &paths.records).map_err(at(&paths.records))?;
    if !done.mended.contains(&name(&paths.records)) {
        done.mended.push(name(&paths.records));
    }
    Ok(())
}

/// Cuts off what lies behind the last row.
fn cut(path: &Path, size: u64) -> Result<()> {
    let mut file = OpenOptions::new().write(true).open(path).map_err(at(path))?;
    Disk::set_len(&mut file, size).and_then(|()| file.sync_all()).map_err(at(path))
}

/// The bytes of the manifest or of its copy, whichever is as it was written.
fn sound_manifest(paths: &Paths, header: Option<Header>) -> Result<Vec<u8>> {
    let read = |path: &Path| match Manifest::read_bytes(path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(Error::StoreFormat { .. }) => Ok(None),
        other => other.map(Some),
    };
    let candidates: Vec<Vec<u8>> = [read(&paths.manifest)?, read(&paths.copy)?].into_iter().flatten().collect();
    if candidates.is_empty() {
        return Manifest::read_bytes(&paths.manifest); // which says why
    }
    let sound: Vec<&Vec<u8>> = match header.and_then(|header| header.manifest_crc) {
        Some(crc) => candidates.iter().filter(|bytes| crc32fast::hash(bytes) == crc).collect(),
        // Without the header, what is a manifest at all.
        None => candidates.iter().filter(|bytes| Manifest::parse(&paths.manifest, bytes).is_ok()).collect(),
    };
    match sound[..] {
        [one, ref others @ ..] if others.iter().all(|other| *other == one) => Ok(one.clone()),
        _ => {
            // A store of another version has another header; this says so.
            if let Err(error @ Error::StoreVersion { .. }) = Manifest::parse(&paths.manifest, &candidates[0]) {
                return Err(error);
            }
            let found =
                if sound.is_empty() { "neither the manifest nor its copy is" } else { "one of two manifests is not" };
            let reason = format!("{found} as it was written, so nothing says what the rows are");
            Err(Error::StoreFormat { path: paths.manifest.clone(), reason })
        }
    }
}

/// One more than the last row with a sound record; looks no further than over a gap that no commit leaves.
fn last_sound(path: &Path, there: u64, progress: &Progress) -> Result<u64> {
    let mut count = 0;
    for_records(path, 0..there, progress, |first, records| {
        let rows = (first..).zip(records.chunks_exact(RECORD_BYTES));
        if let Some((row, _)) = rows.filter(|(row, record)| is_sound_record(record, *row)).last() {
            count = row + 1;
        }
        let seen = first + (records.len() / RECORD_BYTES) as u64;
        Ok(if seen - count > MAX_DAMAGED as u64 { Break(()) } else { Continue(()) })
    })?;
    Ok(count)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
