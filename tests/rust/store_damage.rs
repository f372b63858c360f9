//! Stores that are damaged or not ours: no flipped bit, cut file or strange file makes a wrong row be read.

mod stores;

use std::fs;

use bpo::Error;
use bpo::progress::Progress;
use bpo::store::format::{
    HEADER_BYTES, Manifest, Paths, RECORD_BYTES, SLOT_BYTES, is_set_aside, record_offset, slot_bytes, slot_offset,
};
use bpo::store::{Encoding, Row, StoreReader, StoreWriter, Tolerance, repair};
use stores::{DIM, DTYPES, append, contents, expected, files, manifest, scratch, write};

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
                    writer.appender().close(&Progress::default()).unwrap();
                }
            }
            let whole = contents(&path).unwrap();
            let described = StoreReader::open(&path, Tolerance::None, &Progress::default()).unwrap().manifest().clone();
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
                            let found_manifest = StoreReader::open(&path, Tolerance::None, &Progress::default())
                                .unwrap()
                                .manifest()
                                .clone();
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
                        let reader = StoreReader::open(&path, Tolerance::None, &Progress::default()).unwrap();
                        assert!(reader.verify(None, &Progress::default()).unwrap().is_empty());
                        let records = reader.records(&Progress::default()).unwrap();
                        let aside = records.chunks(RECORD_BYTES).filter(|record| is_set_aside(record)).count() as u64;
                        let lost = 5 - (reader.count() - aside);
                        assert!(lost <= 1 || (!closed && lost <= 3), "{name:?} bit {bit}: {lost} rows lost");
                        drop(reader);
                        fs::remove_dir_all(&path).unwrap();
                        let mut writer = StoreWriter::create(&path, manifest(dtype)).unwrap();
                        append(writer.appender(), &[2, 3]);
                        if closed {
                            writer.appender().close(&Progress::default()).unwrap();
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
            let message =
                StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap_err().to_string();
            let complete = (size - header) / row_bytes;
            assert!(message.contains(name) && message.contains(&format!("hold {complete} rows of 5")), "{message}");
            assert!(matches!(
                StoreWriter::append_to(directory.path(), &Progress::default()),
                Err(Error::StoreDamaged { .. })
            ));
            let reader = StoreReader::open(directory.path(), Tolerance::SoundRows, &Progress::default()).unwrap();
            assert_eq!(reader.count() as usize, complete);

            let done = repair(directory.path(), &Progress::default()).unwrap();
            assert_eq!((done.count as usize, done.lost as usize, done.set_aside.len()), (complete, 5 - complete, 0));
            let mut writer = StoreWriter::append_to(directory.path(), &Progress::default()).unwrap();
            append(writer.appender(), &[5 - complete]);
            writer.appender().close(&Progress::default()).unwrap();
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
    let message = StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap_err().to_string();
    assert!(message.contains("record of row 0, at byte 72, is damaged, and so are 1 others"), "{message}");
}

#[test]
fn a_manifest_of_another_store_is_refused() {
    let directory = scratch();
    let (one, other) = (directory.path().join("one"), directory.path().join("other"));
    write(&one, "float32", &[4]);
    StoreWriter::create(&other, Manifest::new(DIM, "float32", "{\"model\": \"huge\"}").unwrap()).unwrap();
    fs::copy(other.join("manifest.json"), one.join("manifest.json")).unwrap();
    let error = StoreReader::open(&one, Tolerance::None, &Progress::default()).unwrap_err();
    assert!(matches!(&error, Error::StoreDamaged { path, .. } if path.ends_with("manifest.json")), "{error}");
    assert_eq!(repair(&one, &Progress::default()).unwrap().mended, ["manifest.json"]);
    assert_eq!(contents(&one).unwrap().1, expected(4).1);
}

#[test]
fn one_writer_at_a_time() {
    let directory = scratch();
    let writer = StoreWriter::create(directory.path(), manifest("float32")).unwrap();
    assert!(matches!(StoreWriter::append_to(directory.path(), &Progress::default()), Err(Error::StoreLocked { .. })));
    assert!(matches!(repair(directory.path(), &Progress::default()), Err(Error::StoreLocked { .. })));
    drop(writer);
    assert!(StoreWriter::append_to(directory.path(), &Progress::default()).is_ok());
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
    assert_eq!(StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap().count(), 2);
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
    let reader = StoreReader::open(directory.path(), Tolerance::SoundRows, &Progress::default()).unwrap();
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
    assert!(
        StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap_err().to_string().len() < 400
    );
    fs::write(&path, vec![b' '; 2 << 20]).unwrap();
    let message = StoreReader::open(directory.path(), Tolerance::None, &Progress::default()).unwrap_err().to_string();
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
        for error in [
            StoreWriter::append_to(&store, &Progress::default()).unwrap_err(),
            repair(&store, &Progress::default()).unwrap_err(),
        ] {
            assert!(error.to_string().contains("this is no regular file of the store"), "{name}: {error}");
        }
        assert_eq!(fs::read(&precious).unwrap(), before, "{name}");

        if name != "lock" {
            fs::remove_file(&path).unwrap();
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            if name != "manifest.copy.json" {
                let error = StoreReader::open(&store, Tolerance::SoundRows, &Progress::default()).unwrap_err();
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
