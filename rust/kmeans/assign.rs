//! The nearest centroid of each point.
//!
//! Whatever is cheap decides first, and what it leaves open is measured: the nearest centroid is always the one with the
//! lowest ‖x − c‖², added up in one order from the differences, and the lower one of two alike. So a label depends
//! neither on how the products were computed nor on the machine, the threads or the tile, and nothing cancels.
//!
//! With s(c) = ‖c‖²/2 − ⟨x, c⟩, half the squared distance less ‖x‖²/2, and a product of x̂ with ĉ in place of ⟨x, c⟩,
//! s is wrong by at most ‖x − x̂‖ ‖c‖ + ‖x̂‖ ‖c − ĉ‖ (Cauchy and Schwarz) and by roundings. Centroids whose s must lie
//! above the highest that the lowest can be are out. On weak clusters (20,000 × 512, k = 256) products in 8 bits leave
//! 4.2 centroids of a point in the first pass and 1.4 in the eighth; bounds that carry over from pass to pass (Hamerly,
//! Elkan, groups of 16) spared 0 to 3 %, 7 to 70 % and 0 to 8 % of the distances there, and were left out.

use std::ops::Range;
use std::sync::OnceLock;

use super::approximate::{Approximation, INFLATION, TileBytes};
use crate::gemm::{self, Packed};
use crate::gemm8::{self, Packed8, quantize, stride};
use crate::points::{Points, Tile};
use crate::simd;
use crate::simd::dots::each_squared_distance;

/// Half of the distance between 1 and the next float32.
const ROUNDING: f32 = f32::EPSILON / 2.0;

/// Centroids, row-major, and what the bounds need of them.
#[derive(Debug)]
pub struct Centroids {
    pub values: Vec<f32>,
    dim: usize,
    /// Measured from the origin of the points.
    centred: Vec<f32>,
    /// ‖c‖²/2, infinite for the columns that fill the last panel.
    half_norms: Vec<f32>,
    /// ‖c‖, and ‖c − ĉ‖ at most.
    norms: Vec<f32>,
    errors: Vec<f32>,
    /// ‖c‖².
    squares: Vec<f32>,
    /// None where the points go without.
    eight_bits: Option<Packed8>,
    float32: OnceLock<Packed>,
}

impl Centroids {
    pub fn new(values: Vec<f32>, dim: usize, approximation: &Approximation) -> Self {
        let mut centred = values.clone();
        if let Some(origin) = &approximation.origin {
            centred.chunks_exact_mut(dim).for_each(|centroid| simd::subtract(centroid, origin));
        }
        let count = values.len() / dim;
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
        Self { values, dim, centred, half_norms, norms, errors, squares, eight_bits, float32: OnceLock::new() }
    }

    pub fn count(&self) -> usize {
        self.values.len() / self.dim
    }

    pub fn row(&self, cluster: usize) -> &[f32] {
        &self.values[cluster * self.dim..(cluster + 1) * self.dim]
    }

    fn float32(&self) -> &Packed {
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

/// The nearest centroid of a point.
#[derive(Clone, Copy, Debug)]
pub enum Nearest {
    /// No centroid is nearer than the limit.
    None,
    /// No other one is possible.
    Only(u32),
    /// The squared distance was measured.
    Measured(u32, f32),
}

/// Buffers that are reused from tile to tile.
#[derive(Debug, Default)]
pub struct Scratch {
    gathered: Vec<f32>,
    bytes: TileBytes,
    buffers: gemm8::Buffers,
    products: Vec<f32>,
    lower: Vec<f32>,
    candidates: Vec<u32>,
    /// Points that need a measurement, with their limit and their part of the candidates.
    open: Vec<(usize, f32, Range<usize>)>,
    row: Vec<f32>,
    values: Vec<f32>,
}

/// What is searched for what.
#[derive(Clone, Copy, Debug)]
pub struct Search<'s, 'a, const TERMS: usize> {
    pub points: &'s Points<'a, TERMS>,
    pub approximation: &'s Approximation,
    pub centroids: &'s Centroids,
}

/// How well products are known: the error of one is at most `rows · ‖c‖` for each point, and `columns · ‖c − ĉ‖`.
#[derive(Clone, Copy)]
enum Precision {
    EightBits,
    Float32,
}

impl<const TERMS: usize> Search<'_, '_, TERMS> {
    /// Finds the nearest centroid of each point of a tile that is nearer than the square root of its limit; a limit is
    /// asked for once, just before its point.
    pub fn tile(
        &self,
        scratch: &mut Scratch,
        index: usize,
        tile: &Tile,
        limit: impl Fn(usize) -> f32,
        mut found: impl FnMut(usize, Nearest),
    ) {
        let Self { points, approximation, centroids } = self;
        let dim = points.dim();
        let padded = centroids.half_norms.len();
        scratch.products.resize(points.rows_of(tile).len() * padded, 0.0);
        scratch.lower.resize(padded, 0.0);
        scratch.row.resize(dim, 0.0);
        scratch.values.resize(dim, 0.0);
        let mut next = tile.points.start;
        if let Some(packed) = &centroids.eight_bits
            && !approximation.needs_float32(index)
        {
            let Scratch { gathered, bytes, buffers, products, .. } = scratch;
            let bytes = approximation.bytes(points, index, tile, gathered, bytes);
            gemm8::multiply(&bytes.bytes, &bytes.scales, packed, buffers, products);
            next = self.decide(scratch, tile, next, Precision::EightBits, &limit, &mut found);
            if next < tile.points.end {
                approximation.set_needs_float32(index);
            }
        }
        if next < tile.points.end {
            let Scratch { gathered, products, .. } = scratch;
            let rows = points.gather_or_borrow(tile, approximation.origin.as_deref(), gathered);
            gemm::multiply(rows, centroids.float32(), products);
            self.decide(scratch, tile, next, Precision::Float32, &limit, &mut found);
        }
    }

    /// Decides the points of a tile from `first` on by its products. Returns the first point left over: if products in
    /// 8 bits leave too much to be measured, they are given up.
    fn decide(
        &self,
        scratch: &mut Scratch,
        tile: &Tile,
        first: usize,
        precision: Precision,
        limit: &impl Fn(usize) -> f32,
        found: &mut impl FnMut(usize, Nearest),
    ) -> usize {
        let Self { points, approximation, centroids } = *self;
        let padded = centroids.half_norms.len();
        let dim = points.dim() as f32;
        // Measuring one centroid costs about as much as its product with ten rows in 8 bits, so beyond an eighth of the
        // centroids the products in float32 are cheaper.
        let affordable = (centroids.count() / 8).max(8);
        scratch.candidates.clear();
        scratch.open.clear();
        let mut end = tile.points.end;
        for point in first..tile.points.end {
            let terms = points.slots(point).map(|slot| &scratch.products[slot * padded..(slot + 1) * padded]);
            let bound = approximation.bounds[point];
            // Whatever else is rounded, the norms, s itself and the measured distance in 32 lanes, is in proportion to
            // (Σ |aₜ| ‖hₜ‖ + ‖c‖)². A bound for each centroid, as one far away must not blur the others.
            let rounding = (dim / 32.0 + 32.0) * ROUNDING;
            let blur = 2.0 * rounding * bound.spread;
            let factors = match precision {
                Precision::EightBits => {
                    let norm = INFLATION * bound.squared_norm.sqrt() as f32;
                    [bound.error + blur, norm + bound.error, rounding]
                }
                // A chain of d additions is wrong by at most d roundings of the sum of the magnitudes.
                Precision::Float32 => [1.01 * (dim + 8.0) * ROUNDING * bound.spread + blur, 0.0, rounding],
            };
            let slack = rounding * bound.spread * bound.spread;
            let limit = limit(point);
            let highest = simd::lower_bounds(
                &centroids.half_norms,
                points.coefficients(point),
                terms,
                [&centroids.norms, &centroids.errors, &centroids.squares],
                factors,
                &mut scratch.lower,
            );
            let highest = highest.min(((f64::from(limit) - bound.squared_norm) / 2.0) as f32);
            let start = scratch.candidates.len();
            // Finite, so that the columns that fill the last panel are never found.
            let highest = (highest + 2.0 * slack).min(f32::MAX);
            simd::at_most(&scratch.lower, highest, &mut scratch.candidates);
            match &scratch.candidates[start..] {
                [] => found(point, Nearest::None),
                &[only] if limit == f32::INFINITY => {
                    scratch.candidates.truncate(start);
                    found(point, Nearest::Only(only));
                }
                _ => scratch.open.push((point, limit, start..scratch.candidates.len())),
            }
            let decided = point + 1 - first;
            if matches!(precision, Precision::EightBits) && scratch.candidates.len() > affordable * (decided + 8) {
                end = point + 1;
                break;
            }
        }
        for (index, (point, limit, candidates)) in scratch.open.iter().enumerate() {
            if let Some((ahead, ..)) = scratch.open.get(index + 1) {
                points.prefetch(tile, *ahead);
            }
            let values = points.read(tile, *point, &mut scratch.row, &mut scratch.values);
            let mut nearest = (u32::MAX, *limit);
            let candidates = &scratch.candidates[candidates.clone()];
            let centroid = |index: usize| centroids.row(candidates[index] as usize);
            each_squared_distance(values, candidates.len(), centroid, |index, distance| {
                if distance < nearest.1 {
                    nearest = (candidates[index], distance);
                }
            });
            found(*point, if nearest.0 == u32::MAX { Nearest::None } else { Nearest::Measured(nearest.0, nearest.1) });
        }
        end
    }
}
