//! Points in 8 bits, and how far each may be from what it stands for.
//!
//! Products with the centroids in 8 bits decide most points; the bounds kept here say which centroids are out of the
//! question, so what is found in the end is exact.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use super::error_model::INFLATION;
use crate::error::Result;
use crate::gemm8::{self, Scale, quantize, stride};
use crate::memory::{CACHE, PIECE, POINTS, build, first, grow};
use crate::points::{Points, Tile};
use crate::progress::Progress;
use crate::simd;

/// Values of a row at least for products in 8 bits: below it the work for each product outweighs the product.
const MIN_DIM: usize = 48;

/// Tiles whose mean is the origin.
const SAMPLED_TILES: usize = 16;

/// Rows of each of these tiles that are enough for points that meet their centroids once.
const SINGLE_ROWS: usize = 16;

/// What is known of one point x and what it was rounded to, x̂, both measured from the origin.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    /// ‖x‖².
    pub squared_norm: f64,
    /// ‖x − x̂‖ at most.
    pub error: f32,
    /// Σ |aₜ| ‖hₜ‖, what roundings of a sum of products are in proportion to.
    pub spread: f32,
}

/// Lengths whose products with centroids are safe from overflow.
const LONGEST: f64 = 1e30;

impl Bound {
    /// Of a point whose products may overflow: nothing is known of them.
    pub const UNKNOWN: f32 = f32::MAX;

    fn forget(&mut self) {
        (self.error, self.spread) = (Self::UNKNOWN, Self::UNKNOWN);
    }

    fn is_known(&self) -> bool {
        f64::from(self.error.max(self.spread)) <= LONGEST
    }
}

/// The distinct rows of one tile in 8 bits.
#[derive(Debug, Default)]
pub struct TileBytes {
    pub bytes: Vec<i8>,
    pub scales: Vec<Scale>,
}

#[derive(Debug)]
pub struct Approximation {
    /// What rows are measured from: far from the origin, the products of the expanded distance would hide it.
    pub origin: Option<Vec<f32>>,
    /// Of each point; zeros of those of other processes.
    pub bounds: Vec<Bound>,
    /// Of each tile of this process, and the first of these; empty where they are not kept.
    stored: Vec<TileBytes>,
    first: usize,
    /// Of each tile, whether 8 bits were seen not to decide it.
    needs_float32: Vec<AtomicBool>,
    /// Whether products in 8 bits are worth a try.
    pub eight_bits: bool,
}

impl Approximation {
    /// Looks at every point of this process once. Only points that are single rows can be `centred`. Keeps the rounded rows if they fit
    /// into `cache_bytes`.
    ///
    /// # Errors
    /// If a point is not finite, the memory cannot be had, or the computation was cancelled.
    pub fn new<const TERMS: usize>(
        points: &Points<TERMS>,
        centred: bool,
        cache_bytes: usize,
        progress: &Progress,
    ) -> Result<Self> {
        let dim = points.dim();
        let eight_bits = (MIN_DIM..=gemm8::MAX_DEPTH).contains(&dim);
        let origin = if centred { origin(points, usize::MAX)? } else { None };
        let own = points.own();
        let rows: usize = points.tiles()[own.tiles.clone()].iter().map(|tile| points.rows_of(tile).len()).sum();
        let store = eight_bits && rows.saturating_mul(stride(dim)) <= cache_bytes;

        let unseen = Bound { squared_norm: 0.0, error: 0.0, spread: 0.0 };
        let mut bounds = build(points.count(), POINTS, progress, |_| unseen)?;
        let start = || (Vec::new(), vec![0.0; dim]);
        let seen = &mut bounds[own.points.clone()];
        let stored = points.visit(own.tiles.clone(), seen, start, |(gathered, values), _, tile, bounds| {
            let bytes = bound_points(points, tile, origin.as_deref(), eight_bits, (gathered, values), bounds)?;
            progress.advance(1)?;
            Ok(if store { bytes } else { TileBytes::default() })
        })?;
        if let Some(point) = first(bounds.len(), progress, |point| !bounds[point].squared_norm.is_finite())? {
            return Err(points.not_finite(point));
        }
        let stored = if store { stored } else { Vec::new() };
        let needs_float32 = undecided(points, progress)?;
        Ok(Self { origin, bounds, stored, first: own.tiles.start, needs_float32, eight_bits })
    }

    /// Looks at some rows only, for points that meet their centroids once and without 8 bits: their tiles are looked at when
    /// they do, see [`Approximation::look`].
    ///
    /// # Errors
    /// If the memory cannot be had or the computation was cancelled.
    pub fn unseen<const TERMS: usize>(points: &Points<TERMS>, progress: &Progress) -> Result<Self> {
        let origin = origin(points, SINGLE_ROWS)?;
        let needs_float32 = undecided(points, progress)?;
        Ok(Self { origin, bounds: Vec::new(), stored: Vec::new(), first: 0, needs_float32, eight_bits: false })
    }

    /// Looks at the points of a tile.
    pub fn look<const TERMS: usize>(
        &self,
        points: &Points<TERMS>,
        tile: &Tile,
        gathered: &mut Vec<f32>,
        values: &mut [f32],
        bounds: &mut Vec<Bound>,
    ) -> Result<()> {
        bounds.clear();
        bounds.resize(tile.points.len(), Bound { squared_norm: 0.0, error: 0.0, spread: 0.0 });
        bound_points(points, tile, self.origin.as_deref(), false, (gathered, values), bounds).map(|_| ())
    }

    /// The origin, or zeros.
    pub fn origin_or_zero(&self, dim: usize) -> Cow<'_, [f32]> {
        self.origin.as_deref().map_or_else(|| vec![0.0; dim].into(), Cow::from)
    }

    /// Follows [`Points::multiply`].
    ///
    /// # Errors
    /// If the computation was cancelled.
    pub fn multiply(&mut self, factors: &[f32], progress: &Progress) -> Result<()> {
        self.bounds.par_chunks_mut(PIECE).zip(factors.par_chunks(PIECE)).try_for_each(|(bounds, factors)| {
            for (bound, factor) in bounds.iter_mut().zip(factors) {
                bound.squared_norm *= f64::from(*factor).powi(2);
                if bound.is_known() {
                    bound.error *= INFLATION * factor;
                    bound.spread *= factor;
                }
                if !bound.is_known() {
                    bound.forget();
                }
            }
            progress.check()
        })
    }

    /// Whether 8 bits were seen not to decide a tile.
    pub fn needs_float32(&self, tile: usize) -> bool {
        self.needs_float32[tile].load(Ordering::Relaxed)
    }

    /// From now on the tile goes without 8 bits. One thread at a time visits a tile, and passes follow one another.
    pub fn set_needs_float32(&self, tile: usize) {
        self.needs_float32[tile].store(true, Ordering::Relaxed);
    }

    /// The rows of a tile in 8 bits; `scratch` is for those that are not kept.
    pub fn bytes<'b, const TERMS: usize>(
        &'b self,
        points: &Points<TERMS>,
        index: usize,
        tile: &Tile,
        gathered: &mut Vec<f32>,
        scratch: &'b mut TileBytes,
    ) -> &'b TileBytes {
        if let Some(stored) = self.stored.get(index - self.first) {
            return stored;
        }
        scratch.round(points.gather_or_borrow(tile, self.origin.as_deref(), gathered), points.dim());
        scratch
    }
}

/// Looks at the points of a tile, and rounds its rows if they are wanted in `eight_bits`. The buffers are reused from tile
/// to tile.
///
/// # Errors
/// If the memory for the rounded rows cannot be had: those of all tiles may be kept.
fn bound_points<const TERMS: usize>(
    points: &Points<TERMS>,
    tile: &Tile,
    origin: Option<&[f32]>,
    eight_bits: bool,
    (gathered, values): (&mut Vec<f32>, &mut [f32]),
    bounds: &mut [Bound],
) -> Result<TileBytes> {
    let dim = points.dim();
    let rows = if TERMS == 1 {
        points.gather_or_borrow(tile, origin, gathered)
    } else {
        // Gathered anyhow: what rounding leaves of the rows is written over them.
        points.gather(tile, gathered);
        &*gathered
    };
    let mut bytes = TileBytes::default();
    if eight_bits {
        grow(&mut bytes.bytes, rows.len() / dim * stride(dim), CACHE)?;
        bytes.round(rows, dim);
    }
    let squares: Vec<f64> = rows.chunks_exact(dim).map(simd::squared_norm_float64).collect();
    let mut known = Vec::with_capacity(bounds.len());
    for (point, bound) in tile.points.clone().zip(bounds.iter_mut()) {
        let (slots, coefficients) = (points.slots(point), points.coefficients(point));
        let terms = slots.into_iter().zip(coefficients);
        bound.spread = terms.map(|(slot, factor)| f64::from(factor.abs()) * squares[slot].sqrt()).sum::<f64>() as f32;
        let exact = coefficients.map(f64::from) == points.coefficients_float64(point);
        known.push(exact && slots.iter().all(|&slot| squares[slot] <= LONGEST * LONGEST));
        bound.squared_norm = if TERMS == 1 {
            f64::from(coefficients[0]).powi(2) * squares[slots[0]]
        } else {
            points.write(point, rows, values);
            simd::squared_norm_float64(values)
        };
        if eight_bits && TERMS == 1 {
            let error = bytes.squared_error(slots[0], &rows[slots[0] * dim..(slots[0] + 1) * dim]).sqrt();
            bound.error = INFLATION * coefficients[0].abs() * error as f32;
        }
    }
    if eight_bits && TERMS > 1 {
        bytes.leave_errors(gathered, dim);
        for (point, bound) in tile.points.clone().zip(bounds.iter_mut()) {
            points.write(point, gathered, values);
            bound.error = INFLATION * simd::squared_norm_float64(values).sqrt() as f32;
        }
    }
    let unknown = bounds.iter_mut().zip(known).filter(|(bound, known)| !(*known && bound.is_known()));
    unknown.for_each(|(bound, _)| bound.forget());
    Ok(bytes)
}

/// For each tile, that 8 bits were not seen to fail.
fn undecided<const TERMS: usize>(points: &Points<TERMS>, progress: &Progress) -> Result<Vec<AtomicBool>> {
    build(points.tiles().len(), POINTS, progress, |_| AtomicBool::new(false))
}

impl TileBytes {
    fn round(&mut self, gathered: &[f32], dim: usize) {
        let stride = stride(dim);
        self.bytes.resize(gathered.len() / dim * stride, 0);
        let rows = gathered.chunks_exact(dim).zip(self.bytes.chunks_exact_mut(stride));
        self.scales.clear();
        self.scales.extend(rows.map(|(values, bytes)| quantize(values, bytes)));
    }

    /// The squared norm of what rounding took from the row of a slot.
    fn squared_error(&self, slot: usize, values: &[f32]) -> f64 {
        let stride = stride(values.len());
        simd::squared_rest(values, self.scales[slot].factor, &self.bytes[slot * stride..(slot + 1) * stride])
    }

    /// Leaves of the rows what rounding took from them.
    fn leave_errors(&self, gathered: &mut [f32], dim: usize) {
        let rows = gathered.chunks_exact_mut(dim).zip(self.bytes.chunks_exact(stride(dim)));
        for ((values, bytes), scale) in rows.zip(&self.scales) {
            simd::subtract_bytes(values, scale.factor, bytes);
        }
    }
}

/// The mean of the first rows of a few tiles spread over the points. Any origin gives exact results, so a sample will do,
/// and none is taken where it would not shorten the rows by much or where differences from it may overflow.
fn origin<const TERMS: usize>(points: &Points<TERMS>, rows_of_each: usize) -> Result<Option<Vec<f32>>> {
    let dim = points.dim();
    let tiles = points.tiles();
    let sampled = SAMPLED_TILES.min(tiles.len());
    // The sum of the rows, that of their squares, and how many they are.
    let mut seen = vec![0.0f64; dim + 2];
    points.processes().in_turn(&mut seen, |seen| {
        let (sum, rest) = seen.split_at_mut(dim);
        let mut scratch = vec![0.0; dim];
        let sampled = (0..sampled).map(|index| index * tiles.len() / sampled);
        for tile in sampled.filter(|tile| points.own().tiles.contains(tile)) {
            for &row in points.rows_of(&tiles[tile]).iter().take(rows_of_each) {
                let values = points.rows().row(row, &mut scratch);
                simd::add_scaled_to_float64(sum, 1.0, values);
                rest[0] += simd::squared_norm_float64(values);
                rest[1] += 1.0;
            }
        }
        Ok(())
    })?;
    let (sum, squares, count) = (&seen[..dim], seen[dim], seen[dim + 1]);
    let mean: Vec<f32> = sum.iter().map(|value| (value / count) as f32).collect();
    let worthwhile = simd::squared_norm_float64(&mean) > 0.05 * squares / count;
    Ok((worthwhile && mean.iter().all(|value| f64::from(value.abs()) <= LONGEST)).then_some(mean))
}
