//! The store: what is written comes back, and no crash, loss of power or failed write makes a wrong row be read.

mod stores;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bpo::Error;
use bpo::progress::Progress;
use bpo::store::disk::Disk;
use bpo::store::format::{HEADER_BYTES, Header, Manifest, Paths};
use bpo::store::{Appender, Encoding, StoreReader, StoreWriter, Tolerance};
use proptest::prelude::*;
use stores::{DTYPES, append, contents, expected, files, manifest, rows, scratch, write};

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
        // Once more changes nothing, but where rounding carried the largest number to another power of two, and with
        // it the scale.
        let mut again = Vec::new();
        let same = encoding.encode(&read, &mut again);
        let power = |row: &[f32]| row.iter().map(|value| value.abs().to_bits() >> 23).max();
        let carried = encoding == Encoding::Float16 && power(&row) != power(&read);
        if read.iter().all(|value| value.is_finite()) && encoding != Encoding::Int8 && !carried {
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
            let count = StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap().count();
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
                counts.unwrap().larger
                    > StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap().count(),
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
    /// So that some rows and records are synced before the commit that counts them, and others are not.
    const AT_ONCE: u64 = 100;

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
            if appender.append(&sketches, &records, &Progress::default()).is_err() {
                return false;
            }
            if random(2) == 0 {
                if appender.commit(&Progress::default()).is_err() {
                    return false;
                }
                *acknowledged = appender.committed();
            }
        }
        appender.close(&Progress::default()).is_ok()
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
    const AT_ONCE: u64 = 12;

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

/// A store of two rows on such a disk, and what says which operation it refuses.
fn failing(directory: &Path) -> (Appender<Failing>, Arc<Mutex<usize>>) {
    write(directory, "int8", &[2]);
    let paths = Paths::new(directory);
    let left = Arc::new(Mutex::new(0));
    let open = |path: PathBuf| {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        (Failing(file, Arc::clone(&left)), path)
    };
    let (sketches, records) = (open(paths.rows(Encoding::Int8)), open(paths.records.clone()));
    (Appender::new(manifest("int8"), sketches, records, 2).unwrap(), left)
}

/// Rows have 3 bytes, and 12 of them are waited for: those of the first three rows are not, those of five are.
#[test]
fn a_sync_that_fails_between_commits_takes_all_that_was_not_committed() {
    let directory = scratch();
    let (mut appender, left) = failing(directory.path());
    let append = |appender: &mut Appender<Failing>, range| {
        let (sketches, records) = rows(range);
        appender.append(&sketches, &records, &Progress::default())
    };
    append(&mut appender, 2..5).unwrap();
    *left.lock().unwrap() = 2; // the write succeeds, and the sync after it does not
    let error = append(&mut appender, 5..7).unwrap_err().to_string();
    assert!(error.contains("the device is gone while committing rows 2 to 6; those before are kept"), "{error}");
    assert_eq!((appender.committed(), appender.count()), (2, 2));
    for refused in [append(&mut appender, 2..3), appender.commit(&Progress::default())] {
        assert!(refused.unwrap_err().to_string().contains("writing failed before"));
    }
    appender.close(&Progress::default()).unwrap();
    drop(appender);
    let whole = scratch();
    write(whole.path(), "int8", &[2]);
    assert_eq!(files(directory.path()), files(whole.path()));
}

/// A disk that has what goes on cancelled once much was written.
#[derive(Debug)]
struct Cancelling(fs::File, Arc<Progress>);

impl Disk for Cancelling {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if bytes.len() > 1000 {
            self.1.cancel();
        }
        self.0.write_at(bytes, offset)
    }

    fn set_len(&mut self, size: u64) -> io::Result<()> {
        Disk::set_len(&mut self.0, size)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.sync()
    }
}

#[test]
fn what_a_cancelled_append_wrote_is_cut_off_in_the_end() {
    let directory = scratch();
    write(directory.path(), "int8", &[2]);
    let paths = Paths::new(directory.path());
    let progress = Arc::new(Progress::default());
    let open = |path: PathBuf| {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        (Cancelling(file, Arc::clone(&progress)), path)
    };
    let (sketches, records) = (open(paths.rows(Encoding::Int8)), open(paths.records.clone()));
    let mut appender = Appender::new(manifest("int8"), sketches, records, 2).unwrap();
    // More than is written at once.
    let (sketches, records) = rows(2..100_000);
    assert!(matches!(appender.append(&sketches, &records, &progress), Err(Error::Cancelled)));
    assert_eq!(appender.count(), 2);
    append(&mut appender, &[1]);
    appender.close(&Progress::default()).unwrap();
    let whole = scratch();
    write(whole.path(), "int8", &[3]);
    assert_eq!(files(directory.path()), files(whole.path()));
}

#[test]
fn whichever_write_fails_what_was_committed_is_kept_and_the_rest_can_follow() {
    for nth in 1..16 {
        let directory = scratch();
        let (mut appender, left) = failing(directory.path());
        *left.lock().unwrap() = nth;
        let (mut committed, mut failed) = (2, None);
        for batch in 0..4 {
            let (sketches, records) = rows(2 + batch..3 + batch);
            match appender
                .append(&sketches, &records, &Progress::default())
                .and_then(|()| appender.commit(&Progress::default()))
            {
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
        let _ = appender.close(&Progress::default());
        drop(appender);
        let reader = StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap();
        assert!(reader.count() >= committed, "{nth}: {} rows of {committed}", reader.count());
        let mut writer = StoreWriter::append_to(directory.path(), &Progress::default()).unwrap();
        let first = writer.count() as usize;
        append(writer.appender(), &[6 - first]);
        writer.appender().close(&Progress::default()).unwrap();
        let whole = scratch();
        write(whole.path(), "int8", &[6]);
        assert_eq!(files(directory.path()), files(whole.path()), "{nth}");
    }
}
