//! The pair with the largest inner product with a vector: copies rounded to bytes bound the products, and those alone that
//! may be the largest are computed.

use std::ops::Range;

use rayon::prelude::*;

use crate::codes::{Rounded, multiply_codes};
use crate::error::Result;
use crate::memory::{CACHE, POINTS, filled, push};
use crate::points::Points;
use crate::progress::Progress;
use crate::simd::dots::dots;
use crate::simd::{self, add_scaled_float64, dispatch};

/// Pairs of one piece of work.
pub const CHUNK: usize = 512;

/// What rounding in float32 may take from a length, relative to it.
const FLOAT32: f64 = 1e-5;

/// Roundings of a product in float64 beside those of its sum.
const OTHER_STEPS: f64 = 512.0;

/// How a pair was rounded.
#[derive(Clone, Copy, Default)]
struct Rounding {
    /// What the copy is a multiple of.
    step: f64,
    /// The length of the copy.
    length: f64,
    /// The length of what rounding took.
    lost: f64,
}

/// Room for the codes of some pairs, and how they were rounded.
type Chunk<'a> = (&'a mut [i8], &'a mut [Rounding]);

/// The pairs of a cluster, rounded to multiples of a step of their own; the first of them, as far as memory goes.
pub struct Copies {
    codes: Vec<i8>,
    dim: usize,
    /// Of each pair that has a copy.
    roundings: Vec<Rounding>,
    /// Whether a pair was not picked yet.
    pub open: Vec<bool>,
}

impl Copies {
    /// The copies of as many pairs as fit into `bytes`, and the mean of all.
    ///
    /// # Errors
    /// If a pair is not finite, the memory cannot be had, or the computation was cancelled.
    pub fn new(
        points: &Points<2>,
        members: &[usize],
        bytes: usize,
        parallel: bool,
        progress: &Progress,
    ) -> Result<(Self, Vec<f64>)> {
        let dim = points.dim();
        let kept = members.len().min(bytes / dim);
        let mut codes = filled(kept * dim, 0, CACHE)?;
        let mut roundings = filled(kept, Rounding::default(), CACHE)?;
        let open = filled(members.len(), true, POINTS)?;
        let mut sum = vec![0.0; dim];
        // Sums of a few chunks at a time, added up in their order.
        let window = points.rows_at_once().div_ceil(2 * CHUNK) * CHUNK;
        let mut rooms = codes.chunks_mut(CHUNK * dim).zip(roundings.chunks_mut(CHUNK));
        for members in members.chunks(window) {
            let chunks: Vec<(&[usize], Chunk)> =
                members.chunks(CHUNK).map(|pairs| (pairs, rooms.next().unwrap_or_default())).collect();
            let copy = |(pairs, room): (&[usize], Chunk)| copy_pairs(points, pairs, room, progress);
            let sums: Vec<Vec<f64>> = if parallel {
                chunks.into_par_iter().map(copy).collect::<Result<_>>()?
            } else {
                chunks.into_iter().map(copy).collect::<Result<_>>()?
            };
            sums.iter().for_each(|part| add_scaled_float64(&mut sum, 1.0, part));
            points.forget(0..points.tiles().len());
        }
        let mean = sum.into_iter().map(|sum| sum / members.len() as f64).collect();
        Ok((Self { codes, dim, roundings, open }, mean))
    }

    /// The open pair with the largest inner product with the residual (ties: the lower pair), and that product.
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn best(
        &self,
        points: &Points<2>,
        members: &[usize],
        residual: &[f64],
        full: impl Fn(usize) -> bool + Sync,
        parallel: bool,
        progress: &Progress,
    ) -> Result<Option<(usize, f64)>> {
        let rounded = Rounded::new(residual);
        let of_chunk = |chunk: usize| {
            progress.check()?;
            let range = chunk * CHUNK..members.len().min((chunk + 1) * CHUNK);
            let copied = self.roundings.len();
            if range.end <= copied {
                return self.possible(range, |index| self.bounds(index, &rounded), &full);
            }
            let open = range.clone().filter(|&index| index >= copied && self.open[index] && !full(index));
            let products = RowProducts::new(points, open.map(|index| members[index]), residual, rounded.length);
            points.forget(0..points.tiles().len());
            let bounds = |index: usize| {
                if index < copied { self.bounds(index, &rounded) } else { products.bounds(points, members[index]) }
            };
            self.possible(range, bounds, &full)
        };
        let count = members.len().div_ceil(CHUNK);
        let chunks: Vec<Possible> = if parallel {
            (0..count).into_par_iter().map(of_chunk).collect::<Result<_>>()?
        } else {
            (0..count).map(of_chunk).collect::<Result<_>>()?
        };
        let lowest = chunks.iter().fold(f64::NEG_INFINITY, |lowest, chunk| lowest.max(chunk.lowest));
        let mut best: Option<(usize, f64)> = None;
        for &(index, upper) in chunks.iter().flat_map(|chunk| &chunk.uppers) {
            if upper >= best.map_or(lowest, |(_, product)| product.max(lowest)) {
                let product = exact(points, members[index], residual);
                if best.is_none_or(|(_, best)| product > best) {
                    best = Some((index, product));
                }
            }
        }
        points.forget(0..points.tiles().len());
        Ok(best)
    }

    /// The open pairs of a range that may have the largest product as far as the others of the range tell.
    fn possible(
        &self,
        range: Range<usize>,
        bounds: impl Fn(usize) -> (f64, f64),
        full: impl Fn(usize) -> bool,
    ) -> Result<Possible> {
        let mut possible = Possible { lowest: f64::NEG_INFINITY, uppers: Vec::new() };
        for index in range.filter(|&index| self.open[index] && !full(index)) {
            let (lower, upper) = bounds(index);
            possible.lowest = possible.lowest.max(lower);
            if upper >= possible.lowest {
                push(&mut possible.uppers, (index, upper), POINTS)?;
            }
        }
        Ok(possible)
    }

    /// What the product of a pair with the residual is at least and at most (Cauchy and Schwarz). The last terms of the
    /// error cover the rounding of the bounds themselves.
    fn bounds(&self, index: usize, residual: &Rounded) -> (f64, f64) {
        let own = &self.roundings[index];
        let product = multiply_codes(&self.codes[index * self.dim..(index + 1) * self.dim], &residual.codes);
        let middle = own.step * residual.step * f64::from(product);
        let rounding = (self.dim as f64 + OTHER_STEPS) * f64::EPSILON;
        let error = (own.lost * residual.length + own.length * residual.lost) * (1.0 + 1e-9)
            + rounding * (own.length + own.lost) * residual.length;
        (middle - error, middle + error)
    }
}

/// The inner product of a pair with the residual.
fn exact(points: &Points<2>, pair: usize, residual: &[f64]) -> f64 {
    let (mut values, mut doubles) = (vec![0.0; points.dim()], vec![0.0; points.dim()]);
    points.write_float64(pair, &mut values, &mut doubles);
    dots(&doubles, [residual])[0]
}

/// The inner products of a residual with the rows of some pairs, for pairs that have no copy.
struct RowProducts {
    /// Ascending.
    rows: Vec<usize>,
    /// Of each row: the product, and its length.
    products: Vec<[f64; 2]>,
    /// The length of the residual.
    length: f64,
}

impl RowProducts {
    fn new(points: &Points<2>, pairs: impl Iterator<Item = usize>, residual: &[f64], length: f64) -> Self {
        let mut rows: Vec<usize> = pairs.flat_map(|pair| points.rows_of_point(pair)).collect();
        rows.sort_unstable();
        rows.dedup();
        let (mut values, mut doubles) = (vec![0.0; points.dim()], vec![0.0; points.dim()]);
        let product = |&row: &usize| {
            simd::to_float64(points.rows().row(row, &mut values), &mut doubles);
            let [product, square] = dots(&doubles, [residual, &doubles]);
            [product, square.sqrt()]
        };
        let products = rows.iter().map(product).collect();
        Self { rows, products, length }
    }

    /// What the product of a pair is at least and at most: the pair itself is a sum in float32, which rounds.
    fn bounds(&self, points: &Points<2>, pair: usize) -> (f64, f64) {
        let terms = points.rows_of_point(pair).into_iter().zip(points.coefficients_float64(pair));
        let (mut middle, mut spread) = (0.0, points.dim() as f64 * f64::from(f32::MIN_POSITIVE));
        for (row, coefficient) in terms {
            let place = self.rows.binary_search(&row).expect("the rows of every open pair are here");
            let [product, length] = self.products[place];
            middle += coefficient * product;
            spread += coefficient.abs() * length;
        }
        let error = 2.0 * f64::from(f32::EPSILON) * spread * self.length;
        (middle - error, middle + error)
    }
}

/// What is left of the search in one piece of work.
struct Possible {
    /// What the largest product is at least.
    lowest: f64,
    /// Pairs by their place in the cluster, and what their products are at most.
    uppers: Vec<(usize, f64)>,
}

/// Adds up some pairs, and copies as many of them as there is room for.
fn copy_pairs(points: &Points<2>, pairs: &[usize], room: Chunk, progress: &Progress) -> Result<Vec<f64>> {
    progress.check()?;
    let dim = points.dim();
    let (codes, roundings) = room;
    let mut sum = vec![0.0; dim];
    let (mut values, mut doubles, mut rounded) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]);
    let mut rooms = codes.chunks_exact_mut(dim).zip(roundings);
    for &pair in pairs {
        points.write_float64(pair, &mut values, &mut doubles);
        let [square] = dots(&doubles, [&doubles]);
        if !square.is_finite() {
            return Err(points.not_finite(pair));
        }
        add_scaled_float64(&mut sum, 1.0, &doubles);
        if let Some((codes, rounding)) = rooms.next() {
            *rounding = copy(&mut values, square, codes, &mut rounded);
        }
    }
    Ok(sum)
}

/// Rounds a pair to codes. `rounded` is room for as many numbers.
fn copy(values: &mut [f32], square: f64, codes: &mut [i8], rounded: &mut [f32]) -> Rounding {
    // In units of the step, so that no square overflows or vanishes.
    let largest = simd::largest_magnitude(values);
    let inverse = f32::from(i8::MAX) / largest;
    if !inverse.is_finite() {
        return Rounding { step: 0.0, length: 0.0, lost: square.sqrt() };
    }
    round(values, inverse, codes, rounded);
    // In float64: sums of many alike lose as much as they are of, and a few large values may leave most to `lost`.
    let [copy, lost] = [&*rounded, &*values].map(|values| simd::squared_norm_float64(values).sqrt());
    let step = f64::from(largest) / f64::from(i8::MAX);
    Rounding { step, length: step * copy * (1.0 + FLOAT32), lost: step * (lost + FLOAT32 * copy) }
}

dispatch! {
    /// Multiplies the values by `scale` and rounds them, to codes and to the same as numbers; what rounding took stays.
    fn round(values: &mut [f32], scale: f32, codes: &mut [i8], rounded: &mut [f32]) {
        /// Adding it leaves no room for a fraction, which rounds small numbers on every machine alike.
        const SHIFT: f32 = 12_582_912.0;
        for ((value, code), rounded) in values.iter_mut().zip(codes).zip(rounded) {
            let scaled = *value * scale;
            *rounded = (scaled + SHIFT) - SHIFT;
            *code = *rounded as i8;
            *value = scaled - *rounded;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::copy;

    /// One large value leaves all others to what is lost; a sum in float32 says a thousandth less of it than it is.
    #[test]
    fn a_wide_copy_loses_no_more_than_it_says() {
        for others in [0.49, -0.4999, 0.126] {
            let mut values = vec![others; 1 << 18];
            values[0] = 127.0;
            let lost = values[1..].iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
            let square = lost * lost + 127.0f64.powi(2);
            let (mut codes, mut rounded) = (vec![0; values.len()], vec![0.0; values.len()]);
            let rounding = copy(&mut values, square, &mut codes, &mut rounded);
            assert_eq!(codes.iter().filter(|&&code| code != 0).count(), 1);
            assert!((lost..1.001 * lost).contains(&rounding.lost), "{} of {lost}", rounding.lost);
        }
    }
}
