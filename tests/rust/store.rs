//! The store: what is written comes back; no crash, loss of power, failed write or flipped bit makes a wrong row be read.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bpo::Error;
use bpo::progress::Progress;
use bpo::store::disk::Disk;
use bpo::store::format::{
    HEADER_BYTES, Header, Manifest, Paths, RECORD_BYTES, SLOT_BYTES, is_set_aside, record_offset, scale, slot_bytes,
    slot_offset,
};
use bpo::store::{Appender, Encoding, Row, StoreReader, StoreWriter, Tolerance, repair};
use proptest::prelude::*;

const DIM: usize = 3;
const DTYPES: [&str; 4] = ["float32", "float16", "bfloat16", "int8"];

fn manifest(dtype: &str) -> Manifest {
    Manifest::new(DIM, dtype, "{\"model\": \"tiny\"}").unwrap()
}

/// Sketches and records of some rows, which depend on nothing but their numbers.
fn rows(range: std::ops::Range<usize>) -> (Vec<f32>, Vec<u8>) {
    let sketches = range.clone().flat_map(|row| (0..DIM).map(move |column| (row * 7 + column) as f32 - 2.5)).collect();
    let records = range.flat_map(|row| (0..RECORD_BYTES).map(move |byte| (row * 31 + byte) as u8 & 0x37)).collect();
    (sketches, records)
}

/// Writes a whole store of batches of the given sizes, each committed.
fn write(directory: &Path, dtype: &str, batches: &[usize]) {
    let mut writer = StoreWriter::create(directory, manifest(dtype)).unwrap();
    append(writer.appender(), batches);
    writer.appender().close().unwrap();
}

fn append<D: Disk>(appender: &mut Appender<D>, batches: &[usize]) {
    for &count in batches {
        let first = appender.count() as usize;
        let (sketches, records) = rows(first..first + count);
        appender.append(&sketches, &records).unwrap();
        appender.commit().unwrap();
    }
}

/// A directory in memory where there is one: thousands of syncs are not what these tests are about.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.file_name().unwrap().into(), fs::read(&path).unwrap())).collect()
}

/// The sketches and records of a store, after a check of every row.
fn contents(directory: &Path) -> Result<(Vec<f32>, Vec<u8>), Error> {
    let reader = StoreReader::open(directory, Tolerance::None)?;
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
    assert_eq!(reader.records().unwrap().len(), reader.count() as usize * RECORD_BYTES);
    Ok((sketches, records))
}

fn expected(count: usize) -> (Vec<f32>, Vec<u8>) {
    let (sketches, records) = rows(0..count);
    (sketches, records.chunks(RECORD_BYTES).flat_map(|record| &record[..60]).copied().collect())
}

proptest! {
    #[test]
    fn written_numbers_come_back(
        dtype in prop::sample::select(&DTYPES[..]),
        row in prop::collection::vec(prop_oneof![-1e3f32..1e3, prop::num::f32::ANY, Just(0.0)], 1..40),
    ) {
        prop_assume!(row.iter().all(|value| value.is_finite()));
        let encoding = Encoding::of(dtype).unwrap();
        let mut bytes = Vec::new();
        let scale = encoding.encode(&row, &mut bytes);
        prop_assert_eq!(bytes.len(), encoding.row_bytes(row.len()));
        prop_assert!(scale > 0.0 && scale.is_finite());
        let mut read = vec![0.0; row.len()];
        encoding.decode(&bytes, scale, &mut read);
        let largest = f64::from(row.iter().fold(0.0f32, |largest, value| largest.max(value.abs())));
        for (&written, &read) in row.iter().zip(&read) {
            let error = (f64::from(written) - f64::from(read)).abs();
            let bound = match encoding {
                Encoding::Float32 => 0.0,
                // Half a unit in the last place; below the normal numbers, half a step of the smallest.
                Encoding::Float16 => (f64::from(written).abs() / 2048.0).max(largest * 2f64.powi(-39)).max(2e-45),
                Encoding::Bfloat16 => (f64::from(written).abs() / 256.0).max(1e-40),
                Encoding::Int8 => (largest / 127.0 * 0.5001).max(1e-38),
            };
            let overflows = encoding == Encoding::Bfloat16 && written.abs() > 3.38e38;
            prop_assert!(error <= bound || overflows, "{} became {} with scale {}", written, read, scale);
        }
        // Once more changes nothing.
        let mut again = Vec::new();
        let same = encoding.encode(&read, &mut again);
        if read.iter().all(|value| value.is_finite()) && encoding != Encoding::Int8 {
            prop_assert_eq!((scale, &bytes), (same, &again));
        }
    }

    #[test]
    fn any_batches_come_back(dtype in prop::sample::select(&DTYPES[..]), batches in prop::collection::vec(0usize..5, 0..6)) {
        let directory = scratch();
        write(directory.path(), dtype, &batches);
        let count = batches.iter().sum();
        let (sketches, records) = contents(directory.path()).unwrap();
        let (written, sealed) = expected(count);
        prop_assert_eq!(records, sealed);
        for (read, written) in sketches.iter().zip(written) {
            prop_assert!((read - written).abs() <= written.abs().max(30.0) / 100.0);
        }
        // One batch or many, the files are the same.
        let other = scratch();
        write(other.path(), dtype, &[count]);
        prop_assert_eq!(files(directory.path()), files(other.path()));
    }
}

/// A file in memory that forgets, when power is lost, whatever it likes of what was not synced.
#[derive(Clone, Debug, Default)]
struct Volatile(Arc<Mutex<Contents>>);

#[derive(Debug, Default)]
struct Contents {
    synced: Vec<u8>,
    since: Vec<Change>,
}

#[derive(Clone, Debug)]
enum Change {
    Write { bytes: Vec<u8>, offset: usize },
    Length(usize),
}

impl Volatile {
    fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Contents { synced: bytes, since: Vec::new() })))
    }

    /// What is there after power was lost: of each write since the last sync, the bytes of a random part.
    fn lose_power(&self, random: &mut impl FnMut(usize) -> usize) -> Vec<u8> {
        let contents = self.0.lock().unwrap();
        let mut bytes = contents.synced.clone();
        for change in &contents.since {
            match change {
                Change::Length(length) if random(2) == 0 => bytes.resize(*length, 0),
                Change::Length(_) => {}
                Change::Write { bytes: written, offset } => {
                    let (from, to) = match random(4) {
                        0 => (0, written.len()),
                        1 => (0, 0),
                        _ => {
                            let from = random(written.len() + 1);
                            (from, from + random(written.len() - from + 1))
                        }
                    };
                    // The size may be there before the bytes are, and then anything is.
                    if bytes.len() < offset + to || (bytes.len() < offset + written.len() && random(2) == 0) {
                        let garbage = random(2) as u8 * 0xa5;
                        bytes.resize(offset + if random(2) == 0 { to } else { written.len() }, garbage);
                    }
                    bytes[offset + from..offset + to].copy_from_slice(&written[from..to]);
                }
            }
        }
        bytes
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Length(length) => bytes.resize(*length, 0),
        Change::Write { bytes: written, offset } => {
            if bytes.len() < offset + written.len() {
                bytes.resize(offset + written.len(), 0);
            }
            bytes[*offset..offset + written.len()].copy_from_slice(written);
        }
    }
}

impl Disk for Volatile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.lock().unwrap().since.push(Change::Write { bytes: bytes.to_vec(), offset: offset as usize });
        Ok(())
    }

    fn set_len(&mut self, size: u64) -> io::Result<()> {
        self.0.lock().unwrap().since.push(Change::Length(size as usize));
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        let mut contents = self.0.lock().unwrap();
        let since = std::mem::take(&mut contents.since);
        since.iter().for_each(|change| apply(&mut contents.synced, change));
        Ok(())
    }
}

/// xorshift, so that a failing case is one number.
fn random(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    }
}

/// Power is lost at a random place, and again in what follows, until the store is finished. `BPO_POWER_LOSSES` sets the
/// number of such lives of a store.
#[test]
fn no_loss_of_power_loses_a_committed_row_or_leaves_a_torn_one() {
    const TOTAL: usize = 24;
    let lives = std::env::var("BPO_POWER_LOSSES").map_or(300, |count| count.parse().unwrap());
    let (mut losses, mut rolled_back) = (0, 0);
    for life in 0..lives {
        let mut random = random(life);
        let dtype = DTYPES[random(4)];
        let manifest = manifest(dtype);
        let directory = scratch();
        write(directory.path(), dtype, &[]);
        let paths = Paths::new(directory.path());
        let rows_path = paths.rows(manifest.encoding);
        let mut acknowledged = 0;
        loop {
            let (sketches, records) = (fs::read(&rows_path).unwrap(), fs::read(&paths.records).unwrap());
            let (sketches, records) = (Volatile::new(sketches), Volatile::new(records));
            let count = StoreReader::open(directory.path(), Tolerance::None).unwrap().count();
            assert!(count >= acknowledged, "life {life}: {count} rows of {acknowledged}");
            let (written, sealed) = expected(count as usize);
            let (found, found_records) = contents(directory.path()).unwrap();
            assert_eq!(found_records, sealed, "life {life}");
            assert!(
                found.iter().zip(&written).all(|(a, b)| (a - b).abs() <= b.abs().max(200.0) / 100.0),
                "life {life}"
            );

            // Steps until power is lost, which may be in the middle of opening.
            let mut fuse = Fuse { left: random(14), disks: [sketches.clone(), records.clone()] };
            let finished =
                fuse.run(manifest.clone(), &rows_path, &paths.records, count, TOTAL, &mut acknowledged, &mut random);
            for (path, disk) in [(&rows_path, &sketches), (&paths.records, &records)] {
                fs::write(
                    path,
                    if finished { disk.0.lock().unwrap().synced.clone() } else { disk.lose_power(&mut random) },
                )
                .unwrap();
            }
            if finished {
                break;
            }
            losses += 1;
            let counts = Header::parse(fs::read(&paths.records).unwrap()[..HEADER_BYTES].try_into().unwrap()).counts;
            rolled_back += usize::from(
                counts.unwrap().larger > StoreReader::open(directory.path(), Tolerance::None).unwrap().count(),
            );
        }
        let whole = scratch();
        write(whole.path(), dtype, &[TOTAL]);
        assert_eq!(files(directory.path()), files(whole.path()), "life {life}");
    }
    println!("{losses} losses of power in {lives} lives, {rolled_back} of them in a commit that was undone");
    assert!(losses > lives as usize && rolled_back > 0);
}

/// Two disks that stop after a number of operations.
struct Fuse {
    left: usize,
    disks: [Volatile; 2],
}

/// One of the two.
struct Fused<'a>(Volatile, &'a Mutex<usize>);

impl Fused<'_> {
    fn burn(&self) -> io::Result<()> {
        let mut left = self.1.lock().unwrap();
        *left = left.checked_sub(1).ok_or_else(|| io::Error::other("no power"))?;
        Ok(())
    }
}

impl Disk for Fused<'_> {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        // What is under way when power is lost may be on disk in part.
        self.0.write_at(bytes, offset)?;
        self.burn()
    }

    fn set_len(&mut self, size: u64) -> io::Result<()> {
        self.burn()?;
        self.0.set_len(size)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.burn()?;
        self.0.sync()
    }
}

impl Fuse {
    /// Returns whether the store was finished; `acknowledged` are the rows that were reported as committed.
    #[expect(clippy::too_many_arguments, reason = "a test")]
    fn run(
        &mut self,
        manifest: Manifest,
        rows_path: &Path,
        records_path: &Path,
        count: u64,
        total: usize,
        acknowledged: &mut u64,
        random: &mut impl FnMut(usize) -> usize,
    ) -> bool {
        let left = Mutex::new(self.left);
        let [sketches, records] = self.disks.clone().map(|disk| Fused(disk, &left));
        let files = ((sketches, rows_path.into()), (records, records_path.into()));
        let Ok(mut appender) = Appender::new(manifest, files.0, files.1, count) else { return false };
        while (appender.count() as usize) < total {
            let first = appender.count() as usize;
            let (sketches, records) = rows(first..(first + 1 + random(4)).min(total));
            if appender.append(&sketches, &records).is_err() {
                return false;
            }
            if random(2) == 0 {
                if appender.commit().is_err() {
                    return false;
                }
                *acknowledged = appender.committed();
            }
        }
        appender.close().is_ok()
    }
}

/// A disk that refuses one operation, writing half of it, and works again after that.
struct Failing(fs::File, Arc<Mutex<usize>>);

impl Failing {
    fn fails(&self) -> bool {
        let mut left = self.1.lock().unwrap();
        *left = left.wrapping_sub(1);
        *left == 0
    }
}

impl Disk for Failing {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if self.fails() {
            self.0.write_at(&bytes[..bytes.len() / 2], offset)?;
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.0.write_at(bytes, offset)
    }

    fn set_len(&mut self, size: u64) -> io::Result<()> {
        Disk::set_len(&mut self.0, size)
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.fails() { Err(io::Error::other("the device is gone")) } else { self.0.sync() }
    }
}

#[test]
fn whichever_write_fails_what_was_committed_is_kept_and_the_rest_can_follow() {
    for nth in 1..16 {
        let directory = scratch();
        write(directory.path(), "int8", &[2]);
        let paths = Paths::new(directory.path());
        let left = Arc::new(Mutex::new(0));
        let open = |path: PathBuf| {
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            (Failing(file, Arc::clone(&left)), path)
        };
        let (sketches, records) = (open(paths.rows(Encoding::Int8)), open(paths.records.clone()));
        let mut appender = Appender::new(manifest("int8"), sketches, records, 2).unwrap();
        *left.lock().unwrap() = nth;
        let (mut committed, mut failed) = (2, None);
        for batch in 0..4 {
            let (sketches, records) = rows(2 + batch..3 + batch);
            match appender.append(&sketches, &records).and_then(|()| appender.commit()) {
                Ok(()) => committed += 1,
                Err(error) => {
                    failed = Some(error.to_string());
                    break;
                }
            }
            assert_eq!(appender.committed(), committed);
        }
        let failed = failed.unwrap_or_default();
        assert!(nth > 12 || failed.contains("kept"), "{nth}: {failed}");
        assert!(nth > 12 || failed.contains(".i8") || failed.contains("records.bin"), "{nth}: {failed}");
        let _ = appender.close();
        drop(appender);
        let reader = StoreReader::open(directory.path(), Tolerance::None).unwrap();
        assert!(reader.count() >= committed, "{nth}: {} rows of {committed}", reader.count());
        let mut writer = StoreWriter::append_to(directory.path()).unwrap();
        let first = writer.count() as usize;
        append(writer.appender(), &[6 - first]);
        writer.appender().close().unwrap();
        let whole = scratch();
        write(whole.path(), "int8", &[6]);
        assert_eq!(files(directory.path()), files(whole.path()), "{nth}");
    }
}

/// Every bit of every file, in a store that was closed and in one that was not.
#[test]
fn every_flipped_bit_is_detected_or_harmless() {
    let directory = scratch();
    for dtype in DTYPES {
        for closed in [true, false] {
            let path = directory.path().join(format!("{dtype}-{closed}"));
            {
                let mut writer = StoreWriter::create(&path, manifest(dtype)).unwrap();
                append(writer.appender(), &[2, 3]);
                if closed {
                    writer.appender().close().unwrap();
                }
            }
            let whole = contents(&path).unwrap();
            let described = StoreReader::open(&path, Tolerance::None).unwrap().manifest().clone();
            let (mut detected, mut harmless) = (0, 0);
            for (name, bytes) in files(&path) {
                for bit in 0..8 * bytes.len() {
                    let mut flipped = bytes.clone();
                    flipped[bit / 8] ^= 1 << (bit % 8);
                    fs::write(path.join(&name), &flipped).unwrap();
                    match contents(&path) {
                        Err(Error::StoreDamaged { .. } | Error::StoreVersion { .. } | Error::StoreFormat { .. }) => {
                            detected += 1;
                        }
                        Err(other) => panic!("{name:?} bit {bit}: {other}"),
                        Ok(found) => {
                            let found_manifest = StoreReader::open(&path, Tolerance::None).unwrap().manifest().clone();
                            let rows = found.0.len() / DIM;
                            // Of a store that was not closed, damage to the last commit undoes it.
                            assert!(rows == 5 || (!closed && rows == 2), "{name:?} bit {bit}: {rows} rows");
                            assert!(
                                whole.0.starts_with(&found.0) && whole.1.starts_with(&found.1),
                                "{name:?} bit {bit}"
                            );
                            assert_eq!(found_manifest, described, "{name:?} bit {bit}");
                            harmless += 1;
                        }
                    }
                    // Repair brings back a store in which nothing is wrong, the rows that are sound among it.
                    if bit % 29 == 0 {
                        repair(&path, &Progress::default())
                            .unwrap_or_else(|error| panic!("{name:?} bit {bit}: {error}"));
                        let reader = StoreReader::open(&path, Tolerance::None).unwrap();
                        assert!(reader.verify(None, &Progress::default()).unwrap().is_empty());
                        let records = reader.records().unwrap();
                        let aside = records.chunks(RECORD_BYTES).filter(|record| is_set_aside(record)).count() as u64;
                        let lost = 5 - (reader.count() - aside);
                        assert!(lost <= 1 || (!closed && lost <= 3), "{name:?} bit {bit}: {lost} rows lost");
                        drop(reader);
                        fs::remove_dir_all(&path).unwrap();
                        let mut writer = StoreWriter::create(&path, manifest(dtype)).unwrap();
                        append(writer.appender(), &[2, 3]);
                        if closed {
                            writer.appender().close().unwrap();
                        }
                    }
                    fs::write(path.join(&name), &bytes).unwrap();
                }
            }
            assert!(detected > 8 * 5 * RECORD_BYTES / 2, "{detected}");
            // Harmless are those of the copy of the manifest, of a count that the other one outvotes, and where the store
            // was not closed those of the last commit.
            println!("{dtype}, closed {closed}: {detected} detected, {harmless} harmless");
            assert!(!closed || harmless < detected / 2);
        }
    }
}

/// A file of any size.
#[test]
fn files_cut_short_are_refused_and_their_rows_can_be_taken_and_mended() {
    for name in ["rows.f32", "records.bin"] {
        let row_bytes = if name == "rows.f32" { 4 * DIM } else { RECORD_BYTES };
        let header = if name == "rows.f32" { 0 } else { HEADER_BYTES };
        for size in (header..header + 5 * row_bytes).step_by(5) {
            let directory = scratch();
            write(directory.path(), "float32", &[2, 3]);
            let path = directory.path().join(name);
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(size as u64).unwrap();
            let message = StoreReader::open(directory.path(), Tolerance::None).unwrap_err().to_string();
            let complete = (size - header) / row_bytes;
            assert!(message.contains(name) && message.contains(&format!("hold {complete} rows of 5")), "{message}");
            assert!(matches!(StoreWriter::append_to(directory.path()), Err(Error::StoreDamaged { .. })));
            let reader = StoreReader::open(directory.path(), Tolerance::SoundRows).unwrap();
            assert_eq!(reader.count() as usize, complete);

            let done = repair(directory.path(), &Progress::default()).unwrap();
            assert_eq!((done.count as usize, done.lost as usize, done.set_aside.len()), (complete, 5 - complete, 0));
            let mut writer = StoreWriter::append_to(directory.path()).unwrap();
            append(writer.appender(), &[5 - complete]);
            writer.appender().close().unwrap();
            let whole = scratch();
            write(whole.path(), "float32", &[5]);
            assert_eq!(files(directory.path()), files(whole.path()), "{name} of {size} bytes");
        }
    }
}

#[test]
fn a_record_in_another_place_is_damaged() {
    let directory = scratch();
    write(directory.path(), "float32", &[4]);
    let path = directory.path().join("records.bin");
    let mut bytes = fs::read(&path).unwrap();
    let (one, two) = bytes[HEADER_BYTES..].split_at_mut(2 * RECORD_BYTES);
    one[..RECORD_BYTES].swap_with_slice(&mut two[..RECORD_BYTES]);
    fs::write(&path, bytes).unwrap();
    let message = StoreReader::open(directory.path(), Tolerance::None).unwrap_err().to_string();
    assert!(message.contains("record of row 0, at byte 72, is damaged, and so are 1 others"), "{message}");
}

#[test]
fn a_manifest_of_another_store_is_refused() {
    let directory = scratch();
    let (one, other) = (directory.path().join("one"), directory.path().join("other"));
    write(&one, "float32", &[4]);
    StoreWriter::create(&other, Manifest::new(DIM, "float32", "{\"model\": \"huge\"}").unwrap()).unwrap();
    fs::copy(other.join("manifest.json"), one.join("manifest.json")).unwrap();
    let error = StoreReader::open(&one, Tolerance::None).unwrap_err();
    assert!(matches!(&error, Error::StoreDamaged { path, .. } if path.ends_with("manifest.json")), "{error}");
    assert_eq!(repair(&one, &Progress::default()).unwrap().mended, ["manifest.json"]);
    assert_eq!(contents(&one).unwrap().1, expected(4).1);
}

#[test]
fn one_writer_at_a_time() {
    let directory = scratch();
    let writer = StoreWriter::create(directory.path(), manifest("float32")).unwrap();
    assert!(matches!(StoreWriter::append_to(directory.path()), Err(Error::StoreLocked { .. })));
    assert!(matches!(repair(directory.path(), &Progress::default()), Err(Error::StoreLocked { .. })));
    drop(writer);
    assert!(StoreWriter::append_to(directory.path()).is_ok());
}

/// Power may be lost when the size and the count of a commit are on disk and its records are not: zeros.
#[test]
fn an_interrupted_commit_of_millions_of_rows_is_undone() {
    let directory = scratch();
    write(directory.path(), "int8", &[2]);
    let paths = Paths::new(directory.path());
    let larger = 2 + (1 << 20) + 5000;
    let mut bytes = fs::read(&paths.records).unwrap();
    bytes[slot_offset(1)..][..SLOT_BYTES].copy_from_slice(&slot_bytes(larger));
    fs::write(&paths.records, bytes).unwrap();
    for (path, size) in [(&paths.records, record_offset(larger)), (&paths.rows(Encoding::Int8), larger * DIM as u64)] {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(size).unwrap();
    }
    assert_eq!(StoreReader::open(directory.path(), Tolerance::None).unwrap().count(), 2);
    assert_eq!(repair(directory.path(), &Progress::default()).unwrap().count, 2);
    assert_eq!(contents(directory.path()).unwrap().1, expected(2).1);
}

#[test]
fn damaged_records_read_as_set_aside_whatever_is_in_them() {
    let directory = scratch();
    write(directory.path(), "float32", &[4]);
    let path = directory.path().join("records.bin");
    let mut bytes = fs::read(&path).unwrap();
    bytes[HEADER_BYTES + RECORD_BYTES + 52] ^= 8; // the flag of a row that is set aside
    bytes[HEADER_BYTES + 2 * RECORD_BYTES + 40] ^= 1;
    fs::write(&path, bytes).unwrap();
    let reader = StoreReader::open(directory.path(), Tolerance::SoundRows).unwrap();
    let mut seen = 0;
    let count = |rows: &[Row]| {
        seen += rows.len();
        Ok(())
    };
    reader.read_rows(&[true; 4], &Progress::default(), count).unwrap();
    assert_eq!(seen, 2);
}

#[test]
fn one_manifest_that_can_be_read_suffices_for_a_repair() {
    for (garbled, restored) in [("manifest.json", "manifest.json"), ("manifest.copy.json", "manifest.copy.json")] {
        let directory = scratch();
        write(directory.path(), "float16", &[4]);
        let path = directory.path().join("records.bin");
        let mut bytes = fs::read(&path).unwrap();
        bytes[3] ^= 1; // the header, which would tell which of the two it is
        fs::write(&path, bytes).unwrap();
        fs::write(directory.path().join(garbled), "{\"format\": [{").unwrap();
        let done = repair(directory.path(), &Progress::default()).unwrap();
        assert_eq!(done.mended, [restored, "records.bin"]);
        assert_eq!(contents(directory.path()).unwrap().1, expected(4).1);
    }
    // Two that differ do not.
    let directory = scratch();
    write(directory.path(), "float16", &[4]);
    let other = Manifest::new(DIM, "float16", "{\"model\": \"huge\"}").unwrap();
    fs::write(directory.path().join("manifest.copy.json"), other.to_bytes()).unwrap();
    fs::write(directory.path().join("records.bin"), [0; 500]).unwrap();
    let message = repair(directory.path(), &Progress::default()).unwrap_err().to_string();
    assert!(message.contains("one of two manifests is not as it was written"), "{message}");
}

#[test]
fn a_message_shows_no_more_of_a_value_than_a_line() {
    let directory = scratch();
    let path = directory.path().join("manifest.json");
    fs::write(&path, format!("{{\"format\": \"{}\"}}", "ä".repeat(400_000))).unwrap();
    assert!(StoreReader::open(directory.path(), Tolerance::None).unwrap_err().to_string().len() < 400);
    fs::write(&path, vec![b' '; 2 << 20]).unwrap();
    let message = StoreReader::open(directory.path(), Tolerance::None).unwrap_err().to_string();
    assert!(message.contains("more than 1048576 bytes are too many for a manifest"), "{message}");
}

/// A store from somebody else may hold links to files of ours, or pipes.
#[cfg(unix)]
#[test]
fn links_are_not_written_through_and_pipes_not_waited_for() {
    let directory = scratch();
    let precious = directory.path().join("precious");
    let store = directory.path().join("store");
    for name in ["manifest.json", "manifest.copy.json", "records.bin", "rows.int8", "lock"] {
        fs::write(&precious, "mine").unwrap();
        let _ = fs::remove_dir_all(&store);
        write(&store, "int8", &[3]);
        let path = if name == "rows.int8" { Paths::new(&store).rows(Encoding::Int8) } else { store.join(name) };
        let moved = directory.path().join("moved");
        if name != "lock" {
            fs::rename(&path, &moved).unwrap();
            fs::copy(&moved, &precious).unwrap(); // as it should be, but elsewhere
        } else {
            fs::remove_file(&path).unwrap();
        }
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        let before = fs::read(&precious).unwrap();
        for error in [StoreWriter::append_to(&store).unwrap_err(), repair(&store, &Progress::default()).unwrap_err()] {
            assert!(error.to_string().contains("this is no regular file of the store"), "{name}: {error}");
        }
        assert_eq!(fs::read(&precious).unwrap(), before, "{name}");

        if name != "lock" {
            fs::remove_file(&path).unwrap();
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            if name != "manifest.copy.json" {
                let error = StoreReader::open(&store, Tolerance::SoundRows).unwrap_err();
                assert!(error.to_string().contains("this is no regular file of the store"), "{name}: {error}");
            }
        }
    }
    // What an interrupted run leaves is replaced, and a link in its place is taken away.
    let _ = fs::remove_dir_all(&store);
    write(&store, "int8", &[3]);
    fs::write(&precious, "mine").unwrap();
    for name in ["manifest.new", "manifest.copy.new", "records.new"] {
        std::os::unix::fs::symlink(&precious, store.join(name)).unwrap();
    }
    let mut rows = fs::read(Paths::new(&store).rows(Encoding::Int8)).unwrap();
    rows[1] ^= 1;
    fs::write(Paths::new(&store).rows(Encoding::Int8), rows).unwrap();
    for name in ["manifest.json", "manifest.copy.json"] {
        let whole = fs::read(store.join(name)).unwrap();
        fs::write(store.join(name), "{").unwrap();
        assert!(repair(&store, &Progress::default()).unwrap().mended.contains(&name.to_owned()));
        assert_eq!(fs::read(store.join(name)).unwrap(), whole);
    }
    assert_eq!(fs::read(&precious).unwrap(), b"mine");
}
