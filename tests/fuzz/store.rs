//! The fuzzer of the reader of a store. `make fuzz` builds and runs it; the files in `corpus/store` are its inputs.

#![no_main]

mod body;

libfuzzer_sys::fuzz_target!(|data: &[u8]| body::store(data));
