//! The store: any batches come back, and any torn tail is cut off.

use std::fs::OpenOptions;

use bpo::Error;
use bpo::progress::Progress;
use bpo::store::format::{Manifest, RECORD_BYTES};
use bpo::store::{StoreReader, StoreWriter};
use proptest::prelude::*;

const DIM: usize = 3;

fn append(writer: &mut StoreWriter, count: usize) {
    let sketches: Vec<f32> = (0..count * DIM).map(|index| index as f32).collect();
    writer.append(&sketches, &vec![7; count * RECORD_BYTES]).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn torn_tails_are_cut(batches in prop::collection::vec(0usize..5, 1..4), rows in 0u64..200, records in 0u64..1000) {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = StoreWriter::create(directory.path(), Manifest::new(DIM, "{\"a\": 1}").unwrap()).unwrap();
        for &count in &batches {
            append(&mut writer, count);
        }
        let count = batches.iter().sum::<usize>() as u64;
        prop_assert_eq!(writer.count(), count);
        drop(writer);

        let cut = |name: &str, size: u64| {
            let file = OpenOptions::new().write(true).open(directory.path().join(name)).unwrap();
            let size = size.min(file.metadata().unwrap().len());
            file.set_len(size).unwrap();
            size
        };
        let rows = cut("rows.f32", rows);
        let records = cut("records.bin", records);
        let complete = (rows / (4 * DIM as u64)).min(records / RECORD_BYTES as u64);
        let reader = StoreReader::open(directory.path()).unwrap();
        prop_assert_eq!(reader.count(), complete);
        prop_assert!(reader.verify(&Progress::default()).unwrap().is_empty());

        let mut writer = StoreWriter::append_to(directory.path()).unwrap();
        append(&mut writer, 2);
        let reader = StoreReader::open(directory.path()).unwrap();
        prop_assert_eq!(reader.count(), complete + 2);
        prop_assert_eq!(reader.records().unwrap().len() as u64, (complete + 2) * RECORD_BYTES as u64);
        prop_assert!(reader.verify(&Progress::default()).unwrap().is_empty());
    }
}

#[test]
fn a_second_writer_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let writer = StoreWriter::create(directory.path(), Manifest::new(DIM, "{}").unwrap()).unwrap();
    assert!(matches!(StoreWriter::append_to(directory.path()), Err(Error::StoreLocked { .. })));
    drop(writer);
    StoreWriter::append_to(directory.path()).unwrap();
}
