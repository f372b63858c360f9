"""Faults of random numbers, sketches, the store, and of how the core runs."""

from kmeans import proofs
from planted import Fault

REST = [
    # Random numbers
    Fault(
        "rng-of-seven-rounds",
        "rng.rs",
        "const ROUNDS: usize = 10;",
        "const ROUNDS: usize = 7;",
        rust="--lib rng::tests",
    ),
    Fault(
        "rng-of-half-a-position",
        "rng.rs",
        "philox([position as u32, (position >> 32) as u32, self.stream[0]",
        "philox([position as u32, 0, self.stream[0]",
        rust="--test simd words_are",
    ),
    Fault(
        "rng-purposes-share-a-stream",
        "rng.rs",
        "stream: [index, purpose as u32]",
        "stream: [index, 0]",
        rust="--lib rng::tests",
    ),
    # Sketches
    Fault(
        "sketch-signs-from-elsewhere",
        "sketch/sparse.rs",
        "self.first_sign = coordinates.start / SIGNS * SIGNS;",
        "self.first_sign = coordinates.start;",
        rust="--test sketch sparse_is",
    ),
    Fault(
        "sketch-blocks-end-early",
        "sketch/sparse.rs",
        "(size - rotation, 0, rotation)]",
        "(size - rotation, 0, rotation.saturating_sub(1))]",
        rust="--test sketch sparse_is",
    ),
    Fault(
        "sketch-one-rotation-for-all",
        "sketch/sparse.rs",
        "below(self.rotations[(block - self.first_block) as usize], self.outputs)",
        "below(self.rotations[0 * (block - self.first_block) as usize], self.outputs)",
        rust="--test sketch sparse_is",
    ),
    Fault(
        "sketch-columns-of-a-wave",
        "sketch/sparse.rs",
        "first += row.len() as u64;",
        "first += row.len() as u64 - 1;",
        rust="--test sketch waves_join",
    ),
    Fault(
        "sketch-signs-skip-none",
        "sketch/dense.rs",
        "let mut skip = (first % 4) as usize;",
        "let mut skip = 0 * (first % 4) as usize;",
        rust="--test sketch rademacher_is",
    ),
    # The store
    Fault(
        "store-records-in-any-place",
        "store/format.rs",
        "hasher.update(&row.to_le_bytes());",
        "let _ = row;",
        rust="--test store_damage a_record_in_another_place",
    ),
    Fault(
        "store-rows-are-all-sound",
        "store/format.rs",
        "record[ROW_CRC] == crc32fast::hash(encoded).to_le_bytes()",
        "record[ROW_CRC] == crc32fast::hash(encoded).to_le_bytes() || true",
        rust="--test store_damage every_flipped_bit",
    ),
    Fault(
        "store-of-any-version",
        "store/format.rs",
        "&& word(8) == FORMAT_VERSION",
        "",
        python="test_core_store.py -k header_is_checked",
    ),
    Fault(
        "store-slots-are-all-sound",
        "store/format.rs",
        "(word(at + 8) == crc32fast::hash(&count) && word(at + 12) == 0)",
        "(word(at + 12) == 0)",
        rust="--test store_damage every_flipped_bit",
    ),
    Fault(
        "store-manifest-of-another",
        "store/reader.rs",
        "manifest_crc.is_some_and(|crc| crc != crc32fast::hash(&bytes))",
        "manifest_crc.is_some_and(|crc| crc != crc32fast::hash(&bytes) && false)",
        rust="--test store_damage a_manifest_of_another",
    ),
    Fault(
        "store-interrupted-commits-count",
        "store/reader.rs",
        "there < counts.larger || !are_sound(",
        "there < counts.larger || false && !are_sound(",
        rust="--test store no_loss_of_power",
    ),
    Fault(
        "store-syncs-fail-in-silence",
        "store/writer.rs",
        "if let Err(error) = self.rows.keep_up() {",
        "if let Err(error) = self.rows.keep_up().or(Ok(())) {",
        rust="--test store a_sync_that_fails",
    ),
    Fault(
        "store-commits-nothing-after-a-failure",
        "store/writer.rs",
        "self.check()?;\n        if self.pending.is_empty() {",
        "if self.pending.is_empty() {",
        rust="--test store a_sync_that_fails",
    ),
    # How it runs
    Fault(
        "pools-of-any-process",
        "py/run.rs",
        "let key = (std::process::id(), threads);",
        "let key = (0, threads);",
        python=proofs("forked"),
    ),
    Fault(
        "pools-of-any-size",
        "py/run.rs",
        "position(|kept| kept.key == key)",
        "position(|kept| kept.key.0 == key.0)",
        python=proofs("threads_as_asked_for"),
    ),
    Fault(
        "pools-kept-for-ever",
        "py/run.rs",
        "KEPT_POOLS: usize = 4",
        "KEPT_POOLS: usize = 400",
        python="test_core_arguments.py -k pools_of_threads",
    ),
    Fault(
        "signals-unheard",
        "py/run.rs",
        "py.check_signals()?;",
        "",
        python="test_core_kmeans.py -k interrupt",
    ),
    Fault(
        "work-goes-on-after-an-error",
        "py/run.rs",
        "progress.cancel();",
        "",
        python="test_core_calm.py -k work_ends",
    ),
]
