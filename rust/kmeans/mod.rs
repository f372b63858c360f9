//! Lloyd's k-means over dense rows and over preference pairs, which are never materialised.
//!
//! The squared distance of a point x to a centroid c is expanded as ‖x‖² + 2 (‖c‖²/2 − ⟨x, c⟩). With x = Σ aₜ hₜ the
//! last term is Σ aₜ ⟨hₜ, c⟩, so a tile needs one matrix product of its distinct rows with the centroids, and then a
//! few operations for each point and centroid.

mod approximate;
mod assign;
mod centroids;
mod error_model;
mod fit;
mod init;
mod measure;
mod params;
mod update;

pub use fit::{Clustering, assign, fit, fit_rows};
pub use params::{CACHE_BYTES, Init, Metric, Params};
