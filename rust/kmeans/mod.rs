//! Lloyd's k-means over dense rows and over preference pairs, which are never materialised.
//!
//! The squared distance of a point x to a centroid c is expanded as ‖x‖² + 2 (‖c‖²/2 − ⟨x, c⟩). With x = Σ aₜ hₜ the
//! last term is Σ aₜ ⟨hₜ, c⟩, so a tile needs one matrix product of its distinct rows with the centroids, and then a
//! few operations for each point and centroid.
//!
//! Rows:
//!
//! ```
//! use bpo::kmeans::{Params, fit_rows};
//! use bpo::matrix::{Rows, Values};
//! use bpo::progress::Progress;
//!
//! let rows = [[0.0, 0.5], [9.0, 9.5], [0.5, 0.0], [9.5, 9.0]];
//! let rows = Rows::new(Values::F32(rows.as_flattened()), 4, 2)?;
//! let found = fit_rows(rows, None, &Params::new(2), &Progress::default())?;
//! assert!(found.labels[0] == found.labels[2] && found.labels[0] != found.labels[1]);
//! assert_eq!(found.inertia.last(), Some(&0.5));
//! # Ok::<(), bpo::Error>(())
//! ```
//!
//! Pairs, here of three responses by their directions:
//!
//! ```
//! use bpo::kmeans::{Metric, Params, fit};
//! use bpo::matrix::{Rows, Values};
//! use bpo::points::Points;
//! use bpo::progress::Progress;
//!
//! let responses = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.9]];
//! let rows = Rows::new(Values::F32(responses.as_flattened()), 3, 2)?;
//! let pairs = Points::from_pairs(rows, &[[0, 1], [0, 2], [1, 0]], &[[1.0, -1.0]; 3], &Progress::default())?;
//! let params = Params { metric: Metric::Cosine, ..Params::new(2) };
//! let labels = fit(pairs, &params, &Progress::default())?.labels;
//! assert!(labels[0] == labels[1] && labels[0] != labels[2]);
//! # Ok::<(), bpo::Error>(())
//! ```
//!
//! Rows and centroids that are there:
//!
//! ```
//! use bpo::kmeans::{Metric, assign};
//! use bpo::matrix::{Rows, Values};
//! use bpo::points::Points;
//! use bpo::progress::Progress;
//!
//! let rows = Rows::new(Values::F32(&[3.0, 4.0, 0.0, 1.0]), 2, 2)?;
//! let points = Points::from_rows(rows, &Progress::default())?;
//! let centroids = [0.0, 0.0, 3.0, 3.0];
//! let (labels, distances) = assign(points, &centroids, Metric::Euclidean, &Progress::default())?;
//! assert_eq!((labels, distances), (vec![1, 0], vec![1.0, 1.0]));
//! # Ok::<(), bpo::Error>(())
//! ```

mod approximate;
mod assign;
mod centroids;
mod error_model;
mod fit;
mod init;
mod measure;
mod params;
mod prepare;
mod update;

pub use fit::{Clustering, assign, fit, fit_rows};
pub use params::{CACHE_BYTES, Init, Metric, Params};
