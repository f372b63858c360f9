//! What k-means is asked to do, checked once.

use crate::error::{Error, Result};
use crate::matrix::check_finite;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Squared Euclidean distance.
    Euclidean,
    /// Spherical k-means: points and centroids have unit length.
    Cosine,
}

/// The first centroids.
#[derive(Clone, Debug)]
pub enum Init {
    /// k-means‖ ended by greedy k-means++.
    PlusPlus,
    /// Given centroids, row-major (clusters, dim).
    Centroids(Vec<f32>),
}

#[derive(Clone, Debug)]
pub struct Params {
    pub clusters: usize,
    pub init: Init,
    pub metric: Metric,
    pub max_iterations: usize,
    /// Points of the first mini-batch; all points at once if none.
    pub batch_size: Option<usize>,
    /// Stop once the squared shift of the centroids is at most this times the mean variance of a coordinate.
    pub tolerance: f64,
    pub seed: u64,
    /// Bytes of rounded rows that are kept from pass to pass, if that suffices for all of them; else every pass rounds
    /// its rows anew, which costs about a tenth of a pass with 256 clusters. The result is the same.
    pub cache_bytes: usize,
}

/// What [`Params::cache_bytes`] is unless told otherwise.
pub const CACHE_BYTES: usize = 1 << 30;

impl Params {
    /// `clusters` clusters with the defaults that scikit-learn users know.
    pub fn new(clusters: usize) -> Self {
        Self {
            clusters,
            init: Init::PlusPlus,
            metric: Metric::Euclidean,
            max_iterations: 100,
            batch_size: None,
            tolerance: 1e-4,
            seed: 0,
            cache_bytes: CACHE_BYTES,
        }
    }

    /// # Errors
    /// If the parameters make no sense for `points` points of `dim` values.
    pub fn check(&self, points: usize, dim: usize) -> Result<()> {
        if dim == 0 {
            return Err(Error::shape("rows", "(n, d) with d >= 1", format!("({points}, 0)")));
        }
        if self.clusters == 0 {
            return Err(Error::argument("k", "at least 1", self.clusters));
        }
        if self.clusters > points {
            return Err(Error::TooManyClusters { clusters: self.clusters, points });
        }
        if i32::try_from(self.clusters).is_err() {
            return Err(Error::argument("k", format!("at most {}", i32::MAX), self.clusters));
        }
        if self.max_iterations == 0 {
            return Err(Error::argument("max_iter", "at least 1", self.max_iterations));
        }
        if self.batch_size == Some(0) {
            return Err(Error::argument("batch_size", "at least 1", 0));
        }
        if !(self.tolerance >= 0.0 && self.tolerance.is_finite()) {
            return Err(Error::argument("tol", "finite and not negative", self.tolerance));
        }
        if let Init::Centroids(centroids) = &self.init {
            if centroids.len() != self.clusters * dim {
                let expected = format!("({}, {dim})", self.clusters);
                let found = format!("({}, {dim})", centroids.len() as f64 / dim as f64);
                return Err(Error::shape("init", expected, found));
            }
            check_finite("init", centroids, dim)?;
        }
        Ok(())
    }
}
