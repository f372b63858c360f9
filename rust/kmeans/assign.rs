//! The nearest centroid of each point.
//!
//! Whatever is cheap decides first, and what it leaves open is measured: the nearest centroid is always the one with the
//! lowest ‖x − c‖², added up in one order from the differences, and the lower one of two alike. So a label depends
//! neither on how the products were computed nor on the machine, the threads or the tile, and nothing cancels.
//!
//! With s(c) = ‖c‖²/2 − ⟨x, c⟩, half the squared distance less ‖x‖²/2, and a product in place of ⟨x, c⟩, centroids whose
//! s must lie above the highest that the lowest can be are out. How wrong s can be says [`super::error_model`]; what lies
//! so close together that float32 underflows is measured in float64, see [`super::measure`]. On weak clusters (20,000 × 512, k = 256) products in 8 bits leave 4.2 centroids of a point
//! in the first pass and 1.4 in the eighth; bounds that carry over from pass to pass (Hamerly, Elkan, groups of 16) spared
//! 0 to 3 %, 7 to 70 % and 0 to 8 % of the distances there, and were left out.

use std::ops::Range;

use super::approximate::{Approximation, Bound, TileBytes};
use super::centroids::Centroids;
use super::error_model::{ErrorModel, Precision};
use super::measure::Measure;
use crate::error::Result;
use crate::gemm;
use crate::gemm8;
use crate::points::{Points, Tile};
use crate::simd;
use crate::simd::dots::each_squared_distance;

/// Candidates of some points beyond which these are measured before others are looked at, which bounds the memory.
const MOST_CANDIDATES: usize = 1 << 16;

/// The nearest centroid of a point.
#[derive(Clone, Copy, Debug)]
pub enum Nearest {
    /// No centroid is nearer than the limit.
    None,
    /// No other one is possible.
    Only(u32),
    /// The squared distance was measured.
    Measured(u32, f64),
}

/// Buffers that are reused from tile to tile.
#[derive(Debug, Default)]
pub struct Scratch {
    gathered: Vec<f32>,
    bytes: TileBytes,
    /// Of the points of a tile that is looked at when it meets the centroids.
    bounds: Vec<Bound>,
    buffers: gemm8::Buffers,
    products: Vec<f32>,
    lower: Vec<f32>,
    candidates: Vec<u32>,
    /// Points that need a measurement, with their limit and their part of the candidates.
    open: Vec<(usize, f64, Range<usize>)>,
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

impl<const TERMS: usize> Search<'_, '_, TERMS> {
    /// Finds the nearest centroid of each point of a tile that is nearer than the square root of its limit; a limit is
    /// asked for once, just before its point.
    pub fn tile(
        &self,
        scratch: &mut Scratch,
        index: usize,
        tile: &Tile,
        limit: impl Fn(usize) -> f64,
        found: impl FnMut(usize, Nearest),
    ) {
        let bounds = &self.approximation.bounds[tile.points.clone()];
        self.tile_within(scratch, index, tile, bounds, limit, found);
    }

    /// As [`Search::tile`], of points that are looked at only now and have no limit; returns the largest squared norm. It
    /// finds nothing where that is not finite.
    pub fn tile_unseen(
        &self,
        scratch: &mut Scratch,
        index: usize,
        tile: &Tile,
        found: impl FnMut(usize, Nearest),
    ) -> Result<f64> {
        let mut bounds = std::mem::take(&mut scratch.bounds);
        let Scratch { gathered, values, .. } = scratch;
        values.resize(self.points.dim(), 0.0);
        self.approximation.look(self.points, tile, gathered, values, &mut bounds)?;
        let finite = bounds.iter().all(|bound| bound.squared_norm.is_finite());
        if finite {
            self.tile_within(scratch, index, tile, &bounds, |_| f64::MAX, found);
        }
        let largest = bounds.iter().map(|bound| bound.squared_norm).fold(0.0, f64::max);
        scratch.bounds = bounds;
        Ok(if finite { largest } else { f64::INFINITY })
    }

    fn tile_within(
        &self,
        scratch: &mut Scratch,
        index: usize,
        tile: &Tile,
        bounds: &[Bound],
        limit: impl Fn(usize) -> f64,
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
            next = self.decide(scratch, tile, (next, bounds), Precision::EightBits, &limit, &mut found);
            if next < tile.points.end {
                approximation.set_needs_float32(index);
            }
        }
        if next < tile.points.end {
            let Scratch { gathered, products, .. } = scratch;
            let rows = points.gather_or_borrow(tile, approximation.origin.as_deref(), gathered);
            gemm::multiply(rows, centroids.float32(), products);
            self.decide(scratch, tile, (next, bounds), Precision::Float32, &limit, &mut found);
        }
    }

    /// Decides the points of a tile from `first` on by its products and the bounds of all its points. Returns the first
    /// point left over: if products in 8 bits leave too much to be measured, they are given up.
    fn decide(
        &self,
        scratch: &mut Scratch,
        tile: &Tile,
        (first, bounds): (usize, &[Bound]),
        precision: Precision,
        limit: &impl Fn(usize) -> f64,
        found: &mut impl FnMut(usize, Nearest),
    ) -> usize {
        let model = ErrorModel::new(self.points.dim(), self.points.scale());
        let (mut end, mut measured) = (tile.points.end, 0);
        for point in first..tile.points.end {
            let limit = limit(point);
            let candidates =
                self.rule_out(scratch, point, (limit, &bounds[point - tile.points.start]), model, precision);
            match &scratch.candidates[candidates.clone()] {
                [] => found(point, Nearest::None),
                &[only] if limit == f64::INFINITY => {
                    scratch.candidates.truncate(candidates.start);
                    found(point, Nearest::Only(only));
                }
                _ => scratch.open.push((point, limit, candidates)),
            }
            let listed = measured + scratch.candidates.len();
            if precision == Precision::EightBits && self.is_too_open(listed, point + 1 - first) {
                end = point + 1;
                break;
            }
            if scratch.candidates.len() > MOST_CANDIDATES {
                self.measure(scratch, tile, found);
                measured = listed;
            }
        }
        self.measure(scratch, tile, found);
        end
    }

    /// Lists the centroids that can be the nearest of a point, nearer than the square root of the limit: those whose s
    /// need not lie above the highest that the lowest can be.
    fn rule_out(
        &self,
        scratch: &mut Scratch,
        point: usize,
        (limit, bound): (f64, &Bound),
        model: ErrorModel,
        precision: Precision,
    ) -> Range<usize> {
        let Self { points, centroids, .. } = *self;
        let Scratch { products, lower, candidates, .. } = scratch;
        let padded = centroids.half_norms.len();
        let coefficients = points.coefficients(point);
        let magnitude = coefficients.iter().map(|coefficient| coefficient.abs()).sum();
        let margin = model.margin(bound, magnitude, precision);
        let highest = simd::lower_bounds(
            &centroids.half_norms,
            coefficients,
            points.slots(point).map(|slot| &products[slot * padded..(slot + 1) * padded]),
            [&centroids.norms, &centroids.errors, &centroids.squares],
            margin.factors,
            lower,
        );
        let highest = highest.min(((limit - bound.squared_norm) / 2.0) as f32);
        // Finite, so that the columns that fill the last panel are never found.
        let highest = (highest + 2.0 * margin.slack).min(f32::MAX);
        let start = candidates.len();
        simd::not_above(lower, highest, centroids.count(), candidates);
        start..candidates.len()
    }

    /// Whether so many candidates of so many points are more than products in 8 bits are worth: measuring one centroid
    /// costs about as much as its product with ten rows in 8 bits, so beyond an eighth of the centroids the products in
    /// float32 are cheaper.
    fn is_too_open(&self, candidates: usize, points: usize) -> bool {
        let affordable = (self.centroids.count() / 8).max(8);
        candidates > affordable * (points + 8)
    }

    /// Measures the candidates of the open points, which then are none.
    fn measure(&self, scratch: &mut Scratch, tile: &Tile, found: &mut impl FnMut(usize, Nearest)) {
        let Self { points, centroids, .. } = *self;
        let (vectors, measure) = (centroids.vectors(), Measure::new(points.dim(), points.scale()));
        let Scratch { candidates, open, row, values, .. } = scratch;
        for (index, (point, limit, range)) in open.iter().enumerate() {
            if let Some((ahead, ..)) = open.get(index + 1) {
                points.prefetch(tile, *ahead);
            }
            let mut nearest = (u32::MAX, *limit);
            let candidates = &candidates[range.clone()];
            let centroid = |index: usize| vectors.row(candidates[index] as usize);
            let mut vanished = false;
            let in_float32 = points.read(tile, *point, row, values);
            each_squared_distance(in_float32, candidates.len(), centroid, |index, distance| {
                vanished |= measure.vanishes(distance);
                if f64::from(distance) < nearest.1 {
                    nearest = (candidates[index], f64::from(distance));
                }
            });
            if vanished {
                nearest = (u32::MAX, *limit);
                let unscaled = points.read_unscaled(tile, *point, row, values);
                for &candidate in candidates {
                    let distance = measure.in_float64(unscaled, vectors.unscaled_row(candidate as usize));
                    if distance < nearest.1 {
                        nearest = (candidate, distance);
                    }
                }
            }
            found(*point, if nearest.0 == u32::MAX { Nearest::None } else { Nearest::Measured(nearest.0, nearest.1) });
        }
        candidates.clear();
        open.clear();
    }
}
