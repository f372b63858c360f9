//! The products of all rows with a vector, known up to an error that is bounded.

use rayon::prelude::*;

use crate::codes::{Rounded, multiply_codes};
use crate::error::Result;
use crate::memory::{CACHE, POINTS, build, filled};
use crate::points::Points;
use crate::progress::Progress;
use crate::simd;
use crate::simd::dots::dots;

/// Rows of one piece of work.
const PIECE: usize = 128;

/// Smallest magnitude whose copies keep their digits; rows below have copies of zero, and all is lost.
const LEAST: f32 = 1e-34;

/// What rounding in float32 takes from a row, relative to its length, with room to spare.
const FLOAT32: f64 = 1e-6;

/// What rounding in float64 takes, likewise.
const FLOAT64: f64 = 1e-9;

/// How a row was rounded.
#[derive(Clone, Copy, Debug, Default)]
struct Rounding {
    /// What the copy is a multiple of.
    step: f64,
    /// The length of the copy at most.
    length: f64,
    /// The length of what rounding took at most.
    lost: f64,
}

/// The product of a row with a vector, and how far it may be off.
#[derive(Clone, Copy, Debug, Default)]
pub struct Product {
    pub value: f64,
    pub error: f64,
}

/// Some rows; the first of them, as far as memory goes, have copies in 8 bits.
pub struct Copies<'a> {
    points: &'a Points<'a, 2>,
    rows: Vec<usize>,
    codes: Vec<i8>,
    roundings: Vec<Rounding>,
}

impl<'a> Copies<'a> {
    pub fn new(points: &'a Points<'a, 2>, rows: Vec<usize>, bytes: usize, progress: &Progress) -> Result<Self> {
        let dim = points.dim();
        let kept = rows.len().min(bytes / dim);
        let mut codes = build(kept * dim, CACHE, progress, |_| 0)?;
        let mut roundings = filled(rows.len(), Rounding::default(), POINTS)?;
        let (copied, others) = roundings.split_at_mut(kept);
        let scratch = || vec![0.0; dim];
        let pieces = codes.par_chunks_mut(PIECE * dim).zip(copied.par_chunks_mut(PIECE)).zip(rows.par_chunks(PIECE));
        pieces.try_for_each_init(scratch, |scratch, ((codes, roundings), rows)| {
            for ((codes, rounding), &row) in codes.chunks_exact_mut(dim).zip(roundings).zip(rows) {
                *rounding = copy(points.rows().row(row, scratch), codes);
            }
            progress.check()
        })?;
        let pieces = others.par_chunks_mut(PIECE).zip(rows[kept..].par_chunks(PIECE));
        pieces.try_for_each_init(scratch, |scratch, (roundings, rows)| {
            for (rounding, &row) in roundings.iter_mut().zip(rows) {
                rounding.length = simd::squared_norm_float64(points.rows().row(row, scratch)).sqrt();
            }
            progress.check()
        })?;
        points.forget(points.own().tiles.clone());
        Ok(Self { points, rows, codes, roundings })
    }

    pub fn count(&self) -> usize {
        self.rows.len()
    }

    /// The products of all rows with a vector.
    pub fn multiply(&self, vector: &[f64], products: &mut [Product], progress: &Progress) -> Result<()> {
        let dim = vector.len();
        let rounded = Rounded::new(vector);
        let kept = self.codes.len() / dim;
        let (copied, others) = products.split_at_mut(kept);
        let (roundings, rows) = (&self.roundings, &self.rows);
        let pieces = copied.par_chunks_mut(PIECE).zip(self.codes.par_chunks(PIECE * dim));
        pieces.zip(roundings.par_chunks(PIECE)).try_for_each(|((products, codes), roundings)| {
            for ((product, codes), own) in products.iter_mut().zip(codes.chunks_exact(dim)).zip(roundings) {
                let error = own.lost * rounded.length + own.length * rounded.lost;
                *product = Product {
                    value: own.step * rounded.step * f64::from(multiply_codes(codes, &rounded.codes)),
                    error: error * (1.0 + FLOAT64),
                };
            }
            progress.check()
        })?;
        let scratch = || (vec![0.0; dim], vec![0.0; dim]);
        let pieces = others.par_chunks_mut(PIECE).zip(rows[kept..].par_chunks(PIECE));
        pieces.zip(roundings[kept..].par_chunks(PIECE)).try_for_each_init(
            scratch,
            |(values, doubles), ((products, rows), roundings)| {
                for ((product, &row), own) in products.iter_mut().zip(rows).zip(roundings) {
                    simd::to_float64(self.points.rows().row(row, values), doubles);
                    let [value] = dots(doubles, [vector]);
                    *product = Product { value, error: FLOAT64 * own.length * rounded.length };
                }
                progress.check()
            },
        )?;
        if kept < rows.len() {
            self.points.forget(self.points.own().tiles.clone());
        }
        Ok(())
    }
}

/// Rounds a row to codes.
fn copy(values: &[f32], codes: &mut [i8]) -> Rounding {
    let largest = simd::largest_magnitude(values);
    let length = simd::squared_norm_float64(values).sqrt();
    if largest < LEAST {
        return Rounding { step: 0.0, length: 0.0, lost: length };
    }
    let step = largest / f32::from(i8::MAX);
    simd::round_to_bytes(values, f32::from(i8::MAX) / largest, codes);
    let lost = simd::squared_rest(values, step, codes).sqrt() + FLOAT32 * length;
    Rounding { step: f64::from(step), length: length + lost, lost }
}
