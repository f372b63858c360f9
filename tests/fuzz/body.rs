//! What the fuzzer does with one input: makes the files of a store of it, then reads, repairs and continues that store
//! and checks what must hold. The test that replays the corpus includes this file too.
//!
//! An input is two bytes and then edits. The first byte says what the files are to begin with: none, or those of a small
//! store, see [`base`]. The second says which checksums are made right at the end, see [`seal`], so that what lies behind
//! the checks is reached. The low two bits of the first byte of an edit choose the file, the next three what is done:
//!
//! | edit | | then, with numbers little-endian |
//! |---|---|---|
//! | 0 | write | offset u16, length u8, that many bytes |
//! | 1 | insert | the same |
//! | 2 | delete | offset u16, length u16 |
//! | 3 | copy within the file | from u16, to u16, length u8 |
//! | 4 | write a u64 of any size | offset u16, factor u8, shift u8; one less with the highest bit of the shift |
//! | 5 | add a hole at the end | factor u8, shift u8: up to 255 << 32 bytes, which is almost 1 TiB |
//! | 6 | remove the file | |
//! | 7 | make checksums right | as the second byte of the input |

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use bpo::progress::Progress;
use bpo::store::format::{
    HEADER_BYTES, Header, Manifest, Paths, RECORD_BYTES, is_set_aside, is_sound_record, is_sound_row, record_offset,
    scale, seal_record, slot_bytes, slot_offset,
};
use bpo::store::{Encoding, StoreReader, StoreWriter, Tolerance, repair};
use bpo::{Error, Result};

const DTYPES: [&str; 4] = ["float32", "float16", "bfloat16", "int8"];
const FINGERPRINT: &str = "{\"model\": \"tiny\"}";

/// Bytes of a file that are not in a hole, at most.
const MAX_BYTES: usize = 1 << 16;

/// Rows, and bytes of them, up to which all is read: some blocks of either, and still some milliseconds. Nothing but
/// the sound header and records of a store bounds the time to read it, and rows in a hole cost a fuzzer nothing.
const MAX_ROWS: u64 = 1 << 16;
const MAX_ROWS_BYTES: u64 = 4 << 20;

/// Rows up to which a reader is asked to verify none of them, which shows what it allocates for each.
const MAX_IDLE_ROWS: u64 = 1 << 20;

/// What may be allocated at once. The most that the reader has a reason for is a manifest of 16 MiB, in a vector that
/// doubles; then a list of 2^20 damaged records, which doubles too, and blocks of a few MiB. A row of MAX_DIM numbers
/// has 64 MiB, but rows of more than [`MAX_ROWS_BYTES`] are not read here.
const MAX_ALLOCATION: usize = 48 << 20;

/// What may be allocated in all: two manifests, and what the two vectors above leave while they grow.
const MAX_LIVE: usize = 128 << 20;

/// Refuses what no store of this size is worth, which ends the process as running out of memory would.
struct Bounded;

static LIVE: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Bounded = Bounded;

impl Bounded {
    /// Counts `size` bytes, unless they are too many.
    fn admit(size: usize) -> bool {
        let live = LIVE.fetch_add(size, Ordering::Relaxed) + size;
        let fits = size <= MAX_ALLOCATION && live <= MAX_LIVE;
        if !fits {
            LIVE.fetch_sub(size, Ordering::Relaxed);
        }
        fits
    }
}

// SAFETY: all memory is the system's; a null pointer is how an allocator refuses.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller vouches for the layout.
        if Self::admit(layout.size()) { unsafe { System.alloc(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller vouches for the layout.
        if Self::admit(layout.size()) { unsafe { System.alloc_zeroed(layout) } } else { std::ptr::null_mut() }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer is of this allocator, so of the system's.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !Self::admit(size) {
            return std::ptr::null_mut();
        }
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the pointer is of this allocator, so of the system's; the caller vouches for the rest.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// A file before it is written.
#[derive(Clone, Default)]
struct Content {
    there: bool,
    bytes: Vec<u8>,
    /// Zeros behind the bytes, which take no room.
    hole: u64,
}

/// The manifest, its copy, the records and the rows.
type Contents = [Content; 4];

/// The files of every store that an input can begin with.
static BASES: LazyLock<Vec<Contents>> = LazyLock::new(|| {
    // One thread, the one that asks: then the same input takes the same way through the code.
    rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().expect("the first to do so");
    (0..=u8::MAX).map(base).collect()
});

fn encoding(choice: u8) -> Encoding {
    Encoding::of(DTYPES[usize::from(choice >> 1 & 3)]).expect("a type of a store")
}

/// Bit 0 says whether there are files at all, bits 1 and 2 the type of the numbers, bit 3 whether the store was closed,
/// bits 4 and 5 the dimension, bits 6 and 7 the commits.
fn base(choice: u8) -> Contents {
    if choice & 1 == 0 {
        return Contents::default();
    }
    let directory = Directory::new("base");
    let dim = 2 + usize::from(choice >> 4 & 3) % 3;
    let manifest = Manifest::new(dim, encoding(choice).name(), FINGERPRINT).expect("a manifest");
    let mut writer = StoreWriter::create(&directory.path, manifest).expect("a new store");
    let batches: &[usize] = [&[][..], &[1], &[2, 3], &[1, 4, 2]][usize::from(choice >> 6)];
    for &count in batches {
        append_rows(&mut writer, count);
    }
    if choice & 8 != 0 {
        writer.appender().close(&Progress::default()).expect("a closed store");
    }
    drop(writer);
    directory.files(encoding(choice)).map(|path| Content {
        there: true,
        bytes: fs::read(path).expect("a file of the store"),
        hole: 0,
    })
}

/// Sketches and records that depend on nothing but the number of the row.
fn append_rows(writer: &mut StoreWriter, count: usize) -> Vec<f32> {
    let (first, dim) = (writer.count() as usize, writer.manifest().dim);
    let rows = first..first + count;
    let sketches: Vec<f32> =
        rows.clone().flat_map(|row| (0..dim).map(move |column| (row * 7 + column) as f32 - 2.5)).collect();
    let records: Vec<u8> =
        rows.flat_map(|row| (0..RECORD_BYTES).map(move |byte| (row * 31 + byte) as u8 & 0x37)).collect();
    writer.appender().append(&sketches, &records, &Progress::default()).expect("rows that can be appended");
    writer.appender().commit(&Progress::default()).expect("a commit");
    sketches
}

/// A directory that is there while this is, and stays if the process panics: then it shows what was read.
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn new(name: &str) -> Self {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let path = parent.join(format!("bpo-fuzz-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self { path }
    }

    fn files(&self, encoding: Encoding) -> [PathBuf; 4] {
        let paths = Paths::new(&self.path);
        [paths.manifest.clone(), paths.copy.clone(), paths.records.clone(), paths.rows(encoding)]
    }

    /// Names, sizes and bytes of all files; no bytes of one that is too large for a store that was repaired here, which
    /// is the file of rows of another type.
    fn read(&self) -> Vec<(PathBuf, u64, Vec<u8>)> {
        let entries = fs::read_dir(&self.path).expect("the directory");
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("a file").path()).collect();
        paths.sort();
        let read = |path: PathBuf| {
            let size = size(&path);
            let is_large = size > record_offset(MAX_ROWS).max(MAX_ROWS_BYTES);
            let bytes = if is_large { Vec::new() } else { fs::read(&path).expect("a file") };
            (path, size, bytes)
        };
        paths.into_iter().map(read).collect()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The rest of an input. What is not there any more reads as None.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        self.0.split_off_first().copied()
    }

    fn short(&mut self) -> Option<usize> {
        Some(usize::from(self.byte()?) | usize::from(self.byte()?) << 8)
    }

    /// As many bytes as the next one says, or as are left.
    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()?);
        self.0.split_off(..length.min(self.0.len()))
    }

    /// `factor << shift`; the highest bit of the shift asks for one less.
    fn number(&mut self) -> Option<u64> {
        let (factor, shift) = (u64::from(self.byte()?), self.byte()?);
        Some((factor << (shift & 63)).wrapping_sub(u64::from(shift >> 7)))
    }
}

/// One edit; None at the end of the input.
fn edit(input: &mut Input, contents: &mut Contents, encoding: Encoding) -> Option<()> {
    let code = input.byte()?;
    let kind = code >> 2 & 7;
    if kind == 7 {
        seal(contents, input.byte()?, encoding);
        return Some(());
    }
    let content = &mut contents[usize::from(code & 3)];
    let bytes = &mut content.bytes;
    // Beyond the end there is nothing to edit; what lies there instead makes more of an input.
    let place = |offset: usize, bytes: &[u8]| offset % (bytes.len() + 1);
    match kind {
        0 => {
            let at = place(input.short()?, bytes);
            overwrite(bytes, at, input.bytes()?);
        }
        1 => {
            let at = place(input.short()?, bytes);
            bytes.splice(at..at, input.bytes()?.iter().copied());
        }
        2 => {
            let at = place(input.short()?, bytes);
            let end = (at + input.short()?).min(bytes.len());
            bytes.drain(at..end);
            if at == bytes.len() {
                content.hole = 0;
            }
        }
        3 => {
            let (from, to) = (place(input.short()?, bytes), place(input.short()?, bytes));
            let end = (from + usize::from(input.byte()?)).min(bytes.len());
            let copied = bytes[from..end].to_vec();
            overwrite(bytes, to, &copied);
        }
        4 => {
            let at = place(input.short()?, bytes);
            overwrite(bytes, at, &input.number()?.to_le_bytes());
        }
        5 => {
            let (factor, shift) = (u64::from(input.byte()?), input.byte()?);
            // A manifest is read up to its largest size, which takes so long that one factor in 256 is enough.
            let shift = if code & 3 < 2 && factor < 255 { shift % 9 } else { shift % 33 };
            content.hole = factor << shift;
        }
        _ => {
            *content = Content::default();
            return Some(());
        }
    }
    content.there = true;
    content.bytes.truncate(MAX_BYTES);
    Some(())
}

/// Writes over what is there, and on behind it.
fn overwrite(bytes: &mut Vec<u8>, at: usize, written: &[u8]) {
    let end = (at + written.len()).min(bytes.len());
    bytes.splice(at..end, written.iter().copied());
}

/// Makes right, each if its bit is set: 0 the fixed part of the header, 1 the CRC of the manifest in it, 2 its own CRC,
/// 3 the CRCs of the two counts, 4 those of the rows, 5 those of the records, 6 the copy of the manifest.
fn seal(contents: &mut Contents, which: u8, encoding: Encoding) {
    let asked = |bit: u8| which >> bit & 1 != 0;
    let [manifest, copy, records, rows] = contents;
    if asked(6) {
        copy.clone_from(manifest);
    }
    if let Some((header, records)) = records.bytes.split_first_chunk_mut::<HEADER_BYTES>() {
        if asked(0) {
            let fixed = Header::bytes(0, 0);
            header[..16].copy_from_slice(&fixed[..16]);
            header[56..].copy_from_slice(&fixed[56..]);
        }
        // A manifest in a hole is one of nothing but zeros, and no store has it.
        if asked(1) {
            header[16..20].copy_from_slice(&crc32fast::hash(&manifest.bytes).to_le_bytes());
        }
        if asked(2) {
            let crc = crc32fast::hash(&header[..20]);
            header[20..24].copy_from_slice(&crc.to_le_bytes());
        }
        for slot in (0..2).filter(|_| asked(3)) {
            let slot = &mut header[slot_offset(slot)..];
            let count = u64::from_le_bytes(slot[..8].try_into().expect("eight bytes"));
            slot[..16].copy_from_slice(&slot_bytes(count));
        }
        let parsed = Manifest::parse(Path::new("manifest.json"), &manifest.bytes);
        let row_bytes = parsed.map_or(encoding.row_bytes(2), |manifest| manifest.row_bytes());
        for (row, record) in (0..).zip(records.chunks_exact_mut(RECORD_BYTES)) {
            if asked(4) && row_bytes <= MAX_BYTES {
                let first = (row * row_bytes).min(rows.bytes.len());
                let mut encoded = rows.bytes[first..(first + row_bytes).min(rows.bytes.len())].to_vec();
                encoded.resize(row_bytes, 0);
                record[64..68].copy_from_slice(&crc32fast::hash(&encoded).to_le_bytes());
            }
            if asked(5) {
                seal_record(record, row as u64);
            }
        }
    }
}

/// Runs one input.
///
/// # Panics
/// If something does not hold that has to.
pub fn store(data: &[u8]) {
    let bases = &*BASES;
    let mut input = Input(data);
    let (Some(choice), Some(sealed)) = (input.byte(), input.byte()) else { return };
    let mut contents = bases[usize::from(choice)].clone();
    while edit(&mut input, &mut contents, encoding(choice)).is_some() {}
    seal(&mut contents, sealed, encoding(choice));

    let directory = Directory::new("store");
    for (path, content) in directory.files(encoding(choice)).iter().zip(&contents) {
        if content.there {
            fs::write(path, &content.bytes).expect("a file that can be written");
            let size = content.bytes.len() as u64 + content.hole;
            if File::options().write(true).open(path).and_then(|file| file.set_len(size)).is_err() {
                return; // a file system that has no holes has no room for this input
            }
        }
    }
    drop(contents);

    let opened = StoreReader::open(&directory.path, Tolerance::None, &Progress::default());
    let tolerated = StoreReader::open(&directory.path, Tolerance::SoundRows, &Progress::default());
    for error in [opened.as_ref().err(), tolerated.as_ref().err()].into_iter().flatten() {
        check_error(error);
    }
    if let Ok(opened) = &opened {
        let tolerated = tolerated.as_ref().expect("what is not damaged can be read");
        assert_eq!((opened.count(), opened.tail()), (tolerated.count(), tolerated.tail()));
    }
    if let Some((count, is_whole)) = tolerated.as_ref().ok().and_then(expected_count) {
        assert_eq!((tolerated.as_ref().map_or(0, StoreReader::count), opened.is_ok()), (count, is_whole));
    }
    let mut before = tolerated.as_ref().ok().map(check_reader);
    if let (Ok(_), Some(Some(before)), true) = (&opened, &mut before, sealed >> 7 != 0) {
        check_append(&directory, before);
    }
    if can_repair(&directory) {
        check_repair(&directory, before.map(|before| before.expect("a store small enough to repair can be read")));
    }
}

/// What a store is found to hold.
struct Found {
    records: Vec<u8>,
    /// Rows that are damaged.
    damaged: Vec<u64>,
    /// Rows that are neither damaged nor set aside.
    sketches: Vec<Vec<u8>>,
    tail: u64,
}

impl Found {
    fn count(&self) -> u64 {
        (self.records.len() / RECORD_BYTES) as u64
    }
}

/// Bytes of a file, holes included; none if it is not there.
fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Whether reading all of some rows takes a moment at most.
fn is_small(count: u64, row_bytes: u64) -> bool {
    count <= MAX_ROWS && count * row_bytes <= MAX_ROWS_BYTES
}

/// The rows that the format says are committed, as far as they are there, and whether they all are and have sound
/// records. None if it speaks of very many.
fn expected_count(reader: &StoreReader) -> Option<(u64, bool)> {
    let mut records = Vec::new();
    let file = File::open(&reader.paths().records).expect("records");
    file.take(record_offset(MAX_ROWS)).read_to_end(&mut records).expect("records that can be read");
    let (header, records) = records.split_first_chunk().expect("a header");
    let counts = Header::parse(header).counts.filter(|counts| counts.larger <= MAX_ROWS)?;
    let there = (size(&reader.rows_path()) / reader.manifest().row_bytes() as u64) as usize;
    let records: Vec<&[u8]> = records.chunks_exact(RECORD_BYTES).take(there).collect();
    let is_sound = |row: u64| records.get(row as usize).is_some_and(|record| is_sound_record(record, row));
    let smaller = counts.smaller.unwrap_or(counts.larger);
    let committed = if (smaller..counts.larger).all(is_sound) { counts.larger } else { smaller };
    Some((committed.min(records.len() as u64), (0..committed).all(is_sound)))
}

/// Reads a store in every way. None if it is too large for that.
fn check_reader(reader: &StoreReader) -> Option<Found> {
    let (count, row_bytes) = (reader.count(), reader.manifest().row_bytes() as u64);
    let behind_rows = size(&reader.rows_path()).checked_sub(count.checked_mul(row_bytes).expect("in the file"));
    let behind_records = size(&reader.paths().records).checked_sub(record_offset(count));
    let tail = behind_rows.expect("rows are in the file") + behind_records.expect("records are in the file");
    assert_eq!(reader.tail(), tail);
    let wrong = vec![true; usize::from(count == 0)];
    assert!(matches!(reader.verify(Some(&wrong), &Progress::default()), Err(Error::Shape { .. })));
    if count <= MAX_IDLE_ROWS {
        let found = reader.verify(Some(&vec![false; count as usize]), &Progress::default()).expect("nothing is read");
        assert!(found.is_empty());
    }
    if !is_small(count, row_bytes) {
        return None;
    }

    let records = reader.records(&Progress::default()).expect("records that can be read");
    assert_eq!(records.len() as u64, count * RECORD_BYTES as u64);
    assert!((0..).zip(records.chunks(RECORD_BYTES)).all(|(row, record)| is_sound_record(record, row)));

    let progress = Progress::default();
    let damaged = reader.verify(None, &progress).expect("rows that can be read");
    assert_eq!(progress.steps(), (count, count));
    assert!(damaged.is_sorted_by(|one, next| one < next) && damaged.last().is_none_or(|&last| last < count));
    let every_third: Vec<bool> = (0..count).map(|row| row % 3 == 0).collect();
    let expected: Vec<u64> = damaged.iter().copied().filter(|row| row % 3 == 0).collect();
    assert_eq!(reader.verify(Some(&every_third), &Progress::default()).expect("rows that can be read"), expected);

    let mut is_sound = vec![true; count as usize];
    damaged.iter().for_each(|&row| is_sound[row as usize] = false);
    let expected: Vec<&[u8]> = records
        .chunks(RECORD_BYTES)
        .zip(&is_sound)
        .filter(|(record, sound)| **sound && !is_set_aside(record))
        .map(|(record, _)| record)
        .collect();
    let (read, sketches) = read_rows(reader, &is_sound, &expected);
    read.expect("rows that are sound can be read");
    assert_eq!(sketches.len(), expected.len());
    // Asked for all, it may stop at one that is damaged, but never show it.
    let (read, all) = read_rows(reader, &vec![true; count as usize], &expected);
    assert!(sketches.starts_with(&all));
    match read {
        Ok(()) => assert_eq!(all.len(), expected.len()),
        Err(error) => assert!(!damaged.is_empty() && matches!(error, Error::StoreDamaged { .. }), "{error}"),
    }
    Some(Found { records, damaged, sketches, tail })
}

/// Reads rows, whose records have to be these in this order.
fn read_rows(reader: &StoreReader, wanted: &[bool], expected: &[&[u8]]) -> (Result<()>, Vec<Vec<u8>>) {
    let mut sketches = Vec::new();
    let read = reader.read_rows(wanted, &Progress::default(), |rows| {
        for row in rows {
            assert_eq!(row.record, expected[sketches.len()]);
            assert!(is_sound_row(row.record, row.encoded));
            sketches.push(row.encoded.to_vec());
        }
        Ok(())
    });
    (read, sketches)
}

/// A store that can be read in full is repaired in a moment. Rows that nothing but a repair would find are counted too.
fn can_repair(directory: &Directory) -> bool {
    let paths = Paths::new(&directory.path);
    let records = size(&paths.records).saturating_sub(HEADER_BYTES as u64) / RECORD_BYTES as u64;
    let mut header = [0; HEADER_BYTES];
    let read = File::open(&paths.records).and_then(|mut file| file.read_exact(&mut header));
    let counts = read.ok().and_then(|()| Header::parse(&header).counts);
    let claimed = counts.map_or(u64::MAX, |counts| counts.larger);
    [&paths.manifest, &paths.copy].into_iter().all(|path| {
        let manifest = Manifest::read_bytes(path).and_then(|bytes| Manifest::parse(path, &bytes));
        manifest.ok().is_none_or(|manifest| {
            let row_bytes = manifest.row_bytes() as u64;
            let rows = size(&paths.rows(manifest.encoding)) / row_bytes;
            is_small(rows.min(records).min(claimed), row_bytes)
        })
    })
}

fn check_repair(directory: &Directory, before: Option<Found>) {
    let progress = Progress::default();
    let done = match repair(&directory.path, &progress) {
        Ok(done) => done,
        Err(error) => {
            check_error(&error);
            assert!(before.is_none(), "what can be read can be repaired: {error}");
            return;
        }
    };
    let paths = Paths::new(&directory.path);
    assert_eq!(Manifest::read_bytes(&paths.manifest).ok(), Manifest::read_bytes(&paths.copy).ok());
    let reader = StoreReader::open(&directory.path, Tolerance::None, &Progress::default()).expect("a repaired store");
    let mut after = check_reader(&reader).expect("a store no larger than before");
    assert!(after.damaged.is_empty() && after.tail == 0 && after.count() == done.count);
    let is_aside = |row: u64| is_set_aside(&after.records[row as usize * RECORD_BYTES..][..RECORD_BYTES]);
    assert!(done.set_aside.iter().all(|&row| is_aside(row)));
    if let Some(before) = before {
        assert_eq!((&before.damaged, before.tail, before.count()), (&done.set_aside, done.cut, done.count));
        assert!(before.sketches == after.sketches, "repair keeps the rows that are sound");
        let records = before.records.chunks(RECORD_BYTES).zip(after.records.chunks(RECORD_BYTES));
        let mut damaged = done.set_aside.iter().copied().peekable();
        for (row, (before, after)) in (0..).zip(records) {
            assert!(damaged.next_if_eq(&row).is_some() || before == after, "repair keeps the record of row {row}");
        }
    }

    let files = directory.read();
    assert!(files.iter().all(|(path, ..)| path.extension().is_none_or(|ending| ending != "new")));
    let again = repair(&directory.path, &progress).expect("a store that was repaired");
    assert_eq!((again.count, again.lost, again.cut), (done.count, 0, 0));
    assert!(again.mended.is_empty() && again.set_aside.is_empty(), "{again:?}");
    assert!(files == directory.read(), "a second repair changes nothing");
    check_append(directory, &mut after);
}

/// Appends two rows to a store that is not damaged but perhaps in its rows.
fn check_append(directory: &Directory, found: &mut Found) {
    let mut writer = StoreWriter::append_to(&directory.path, &Progress::default()).expect("a store that can go on");
    assert_eq!(writer.count(), found.count());
    let row_bytes = writer.manifest().row_bytes() as u64;
    if !is_small(found.count() + 2, row_bytes) {
        found.tail = 0;
        return;
    }
    let written = append_rows(&mut writer, 2);
    writer.appender().close(&Progress::default()).expect("a store that can be closed");
    drop(writer);

    let reader =
        StoreReader::open(&directory.path, Tolerance::None, &Progress::default()).expect("a store that went on");
    let longer = check_reader(&reader).expect("two rows more");
    assert_eq!((longer.count(), longer.tail), (found.count() + 2, 0));
    assert!(longer.records.starts_with(&found.records) && longer.damaged == found.damaged);
    let (kept, appended) = longer.sketches.split_at(longer.sketches.len() - 2);
    assert!(kept == found.sketches);
    let records = longer.records.chunks(RECORD_BYTES).skip(found.count() as usize);
    let mut sketch = vec![0.0; reader.manifest().dim];
    for ((encoded, record), written) in appended.iter().zip(records).zip(written.chunks(sketch.len())) {
        reader.manifest().encoding.decode(encoded, scale(record), &mut sketch);
        let largest = written.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        assert!(sketch.iter().zip(written).all(|(read, written)| (read - written).abs() <= largest / 100.0));
    }
    *found = longer;
}

/// A file that is not there is the one error of the system that there can be.
fn check_error(error: &Error) {
    let message = error.to_string();
    match error {
        Error::StoreDamaged { .. } | Error::StoreFormat { .. } | Error::StoreVersion { .. } => {}
        Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => {}
        _ => panic!("{message}"),
    }
}
