//! Replays what the fuzzer of the store has found, without the fuzzer: every input reads, repairs and continues a store.

use std::fs;
use std::path::{Path, PathBuf};

#[path = "../fuzz/body.rs"]
mod body;

#[test]
fn the_corpus_of_the_fuzzer() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/store");
    let mut inputs: Vec<PathBuf> = fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    for input in &inputs {
        println!("{}", input.display()); // the last one is shown where one fails
        body::store(&fs::read(input).unwrap());
    }
    println!("{} inputs", inputs.len());
    assert!(!inputs.is_empty());
}
