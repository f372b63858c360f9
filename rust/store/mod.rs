//! The gradient store: one sketch and one record for each response, in a directory that only grows.
//!
//! | file | content |
//! |---|---|
//! | `manifest.json` | format, version, dim, dtype and the fingerprint of what the rows were computed from |
//! | `manifest.copy.json` | the same bytes, for repairs |
//! | `rows.f32`, `.f16`, `.bf16` or `.i8` | the sketches: row-major, little-endian, no header, so it can be mapped as it is |
//! | `records.bin` | a header with the number of rows, then 72 bytes for each row, see [`mod@format`] |
//! | `lock` | held by the writer; the operating system releases it when the writer dies |
//!
//! A row counts once it is committed, see [`Appender::commit`]. What lies behind the last committed row is ignored by
//! readers and cut off by the next writer. docs/store-format.md describes the format for users.

pub mod disk;
pub mod encoding;
pub mod format;
mod reader;
mod repair;
mod writer;

pub use encoding::Encoding;
pub use reader::{Row, StoreReader, Tolerance};
pub use repair::{Repair, repair};
pub use writer::{Appender, StoreWriter};
