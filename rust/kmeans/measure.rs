//! Squared distances that are right whatever the lengths: in float32, and in float64 where that underflows.
//!
//! Points are multiplied by a power of two such that the longest squares safely in float32. Those that are shorter by many
//! orders of magnitude may vanish there, so what lies close together is measured in float64, as it was before.

use crate::error::Result;
use crate::memory::{CENTROIDS, copied};
use crate::points::{Points, Tile};
use crate::simd;

/// Vectors before and after they are multiplied by a power of two, row-major.
#[derive(Debug)]
pub struct Vectors {
    unscaled: Vec<f32>,
    /// None if they are the same.
    scaled: Option<Vec<f32>>,
    dim: usize,
}

impl Vectors {
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(values: Vec<f32>, dim: usize, scale: f32) -> Result<Self> {
        let mut scaled = None;
        if scale != 1.0 {
            let mut copy = copied(&values, CENTROIDS)?;
            copy.iter_mut().for_each(|value| *value *= scale);
            scaled = Some(copy);
        }
        Ok(Self { unscaled: values, scaled, dim })
    }

    pub fn scaled(&self) -> &[f32] {
        self.scaled.as_deref().unwrap_or(&self.unscaled)
    }

    pub fn row(&self, index: usize) -> &[f32] {
        &self.scaled()[index * self.dim..(index + 1) * self.dim]
    }

    pub fn unscaled_row(&self, index: usize) -> &[f32] {
        &self.unscaled[index * self.dim..(index + 1) * self.dim]
    }

    /// What was given to [`Vectors::new`].
    pub fn into_unscaled(self) -> Vec<f32> {
        self.unscaled
    }
}

/// How distances between vectors of one length and scale are measured; all are those of scaled vectors.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Squared distances of which float32 has all digits, at least: 2²⁶ times what underflow takes at most.
    smallest: f32,
    /// What those of unscaled vectors are multiplied by.
    squared_scale: f64,
}

impl Measure {
    pub fn new(dim: usize, scale: f32) -> Self {
        Self { smallest: dim as f32 * f32::MIN_POSITIVE * 2f32.powi(26), squared_scale: f64::from(scale).powi(2) }
    }

    /// Whether a squared distance in float32 has to be measured again, in float64.
    pub fn vanishes(&self, squared_distance: f32) -> bool {
        squared_distance < self.smallest
    }

    /// Of unscaled vectors.
    pub fn in_float64(&self, left: &[f32], right: &[f32]) -> f64 {
        simd::squared_distance_float64(left, right) * self.squared_scale
    }

    /// Of a vector to one of others.
    pub fn between(&self, vectors: &Vectors, index: usize, others: &Vectors, other: usize) -> f64 {
        let squared = simd::squared_distance(vectors.row(index), others.row(other));
        if self.vanishes(squared) {
            return self.in_float64(vectors.unscaled_row(index), others.unscaled_row(other));
        }
        f64::from(squared)
    }

    /// Of a point of `tile` to one of the vectors. The two buffers hold a row each.
    pub fn of_point<const TERMS: usize>(
        &self,
        points: &Points<TERMS>,
        tile: &Tile,
        point: usize,
        vector: (&Vectors, usize),
        (row, values): (&mut [f32], &mut [f32]),
    ) -> f64 {
        let (vectors, index) = vector;
        let squared = simd::squared_distance(points.read(tile, point, row, values), vectors.row(index));
        if self.vanishes(squared) {
            return self.in_float64(points.read_unscaled(tile, point, row, values), vectors.unscaled_row(index));
        }
        f64::from(squared)
    }
}
