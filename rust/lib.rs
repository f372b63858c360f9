//! The core of Balanced Preference Optimization.
//!
//! The data goes one way: gradients are [`sketch`]ed while they are hot, the sketches go to the [`store`], rows of the
//! store are clustered as preference pairs by [`kmeans`], the pairs are scored by [`usefulness`] and put in order by
//! [`ranking`], and [`depth`] gives each prompt its share of the budget; [`coreset`], [`d_optimal`] and [`matching`] choose
//! pairs by other rules. `py` exposes exactly this to Python.
//!
//! Results never depend on the number of threads: work is cut into pieces of a size fixed by the data alone, and the
//! partial results are folded in the order of the pieces.

pub mod cholesky;
mod codes;
pub mod coreset;
pub mod d_optimal;
pub mod depth;
pub mod error;
pub mod exchange;
pub mod gemm;
pub mod gemm8;
pub mod kmeans;
pub mod linear;
pub mod matching;
pub mod matrix;
pub mod memory;
pub mod order;
mod pages;
pub mod points;
pub mod progress;
pub mod prompts;
pub mod ranking;
pub mod rng;
pub mod shares;
pub mod simd;
pub mod sketch;
pub mod store;
pub mod usefulness;

#[cfg(feature = "python")]
mod py;

pub use error::{Error, Result};
