//! Centroids, packed for the products with them, and the lengths that bound the errors of these.

use std::sync::OnceLock;

use super::approximate::Approximation;
use super::error_model::INFLATION;
use super::measure::Vectors;
use crate::error::Result;
use crate::gemm::{self, Packed};
use crate::gemm8::{Packed8, quantize, stride};
use crate::memory::{self, CENTROIDS};
use crate::points::Points;
use crate::simd;

#[derive(Debug)]
pub struct Centroids {
    vectors: Vectors,
    dim: usize,
    /// Scaled as the points are, and measured from their origin.
    centred: Vec<f32>,
    /// ‖c‖²/2, infinite for the columns that fill the last panel.
    pub half_norms: Vec<f32>,
    /// ‖c‖, and ‖c − ĉ‖ at most.
    pub norms: Vec<f32>,
    pub errors: Vec<f32>,
    /// ‖c‖².
    pub squares: Vec<f32>,
    /// None where the points go without.
    pub eight_bits: Option<Packed8>,
    float32: OnceLock<Packed>,
}

impl Centroids {
    /// `values` as they were before the points were multiplied by `scale`.
    ///
    /// # Errors
    /// If there is no room for their copies.
    pub fn new(values: Vec<f32>, dim: usize, scale: f32, approximation: &Approximation) -> Result<Self> {
        // Centred, in bytes and packed.
        memory::room(values.len().saturating_mul(size_of::<f32>() + 4), CENTROIDS)?;
        let vectors = Vectors::new(values, dim, scale)?;
        let mut centred = vectors.scaled().to_vec();
        if let Some(origin) = &approximation.origin {
            centred.chunks_exact_mut(dim).for_each(|centroid| simd::subtract(centroid, origin));
        }
        let count = centred.len() / dim;
        let padded = count.next_multiple_of(gemm::PANEL);
        let mut half_norms = vec![f32::INFINITY; padded];
        let (mut norms, mut squares) = (vec![0.0; padded], vec![0.0; padded]);
        for (index, centroid) in centred.chunks_exact(dim).enumerate() {
            let squared = simd::squared_norm_float64(centroid);
            half_norms[index] = (squared / 2.0) as f32;
            squares[index] = squared as f32;
            norms[index] = INFLATION * squared.sqrt() as f32;
        }
        let mut errors = vec![0.0; padded];
        let eight_bits = approximation.eight_bits.then(|| round(&centred, dim, &mut errors));
        Ok(Self { vectors, dim, centred, half_norms, norms, errors, squares, eight_bits, float32: OnceLock::new() })
    }

    /// Asks whether there is room for a pass over the points: products of their rows with each centroid, and the centroids
    /// packed for them.
    ///
    /// # Errors
    /// [`crate::Error::Memory`].
    pub fn room<const TERMS: usize>(&self, points: &Points<TERMS>) -> Result<()> {
        memory::room(size_of_val(&*self.centred), CENTROIDS)?;
        points.room(size_of_val(&*self.norms))
    }

    pub fn count(&self) -> usize {
        self.centred.len() / self.dim
    }

    pub fn into_vectors(self) -> Vectors {
        self.vectors
    }

    pub fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// For products in float32; packed when first asked for.
    pub fn float32(&self) -> &Packed {
        self.float32.get_or_init(|| Packed::from_columns(&self.centred, self.dim))
    }
}

/// Packs centroids in 8 bits, and writes how far each is from what it stands for.
fn round(centred: &[f32], dim: usize, errors: &mut [f32]) -> Packed8 {
    let stride = stride(dim);
    let mut bytes = vec![0; centred.len() / dim * stride];
    let mut factors = Vec::with_capacity(centred.len() / dim);
    for ((values, bytes), error) in centred.chunks_exact(dim).zip(bytes.chunks_exact_mut(stride)).zip(errors) {
        let factor = quantize(values, bytes).factor;
        factors.push(factor);
        *error = INFLATION * simd::squared_rest(values, factor, bytes).sqrt() as f32;
    }
    Packed8::new(&bytes, &factors, stride)
}
