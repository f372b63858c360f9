//! The gradient store: one sketch and one record for each response, in a directory that only grows.
//!
//! | file | content |
//! |---|---|
//! | `manifest.json` | format, version, dim, dtype and the fingerprint of what the rows were computed from |
//! | `rows.f32` | the sketches: row-major little-endian float32, no header, so it can be mapped as it is |
//! | `records.bin` | 64 bytes for each row, see [`format`] |
//! | `lock` | held by the writer; the operating system releases it when the writer dies |
//!
//! A row counts once both its sketch and its record are complete. What a killed writer left behind that point is
//! ignored by readers and cut off by the next writer.

pub mod format;
mod reader;
mod writer;

pub use reader::StoreReader;
pub use writer::StoreWriter;
