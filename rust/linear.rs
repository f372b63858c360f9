//! What a linear model asks of rows in each pass: their products with a vector, and their weighted sum.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::matrix::Rows;
use crate::memory::{RESULTS, filled, first};
use crate::progress::Progress;
use crate::simd::dots::dots;
use crate::simd::{add_scaled_to_float64, to_float64};

/// Rows of one piece of work; sums are those of pieces, in their order, whatever the threads.
const PIECE: usize = 256;

/// Pieces whose sums are there at the same time.
const PIECES: usize = 64;

/// The products of some rows with a vector, in float64.
///
/// ```
/// use bpo::linear::products;
/// use bpo::matrix::{Rows, Values};
/// use bpo::progress::Progress;
///
/// let rows = Rows::new(Values::F32(&[1.0, 2.0, 3.0, 4.0]), 2, 2)?;
/// assert_eq!(products(rows, &[1, 0], &[1.0, -1.0], &Progress::default())?, [-1.0, -1.0]);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, a row is not there, the memory cannot be had, or the computation was cancelled.
pub fn products(rows: Rows, index: &[usize], vector: &[f64], progress: &Progress) -> Result<Vec<f64>> {
    let dim = rows.dim();
    check_index(rows, index, progress)?;
    if vector.len() != dim {
        return Err(Error::shape("vector", format!("({dim},)"), format!("({},)", vector.len())));
    }
    let mut products = filled(index.len(), 0.0, RESULTS)?;
    let pieces = products.par_chunks_mut(PIECE).zip(index.par_chunks(PIECE));
    pieces.try_for_each_init(
        || (vec![0.0; dim], vec![0.0; dim]),
        |(values, doubles), (products, index)| {
            for (product, &row) in products.iter_mut().zip(index) {
                to_float64(rows.row(row, values), doubles);
                [*product] = dots(doubles, [vector]);
            }
            progress.check()
        },
    )?;
    progress.finish();
    Ok(products)
}

/// The sum of some rows, each times its weight, in float64.
///
/// ```
/// use bpo::linear::weighted_sum;
/// use bpo::matrix::{Rows, Values};
/// use bpo::progress::Progress;
///
/// let rows = Rows::new(Values::F32(&[1.0, 2.0, 3.0, 4.0]), 2, 2)?;
/// assert_eq!(weighted_sum(rows, &[1, 0], &[1.0, -1.0], &Progress::default())?, [2.0, 2.0]);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, a row is not there, the memory cannot be had, or the computation was cancelled.
pub fn weighted_sum(rows: Rows, index: &[usize], weights: &[f64], progress: &Progress) -> Result<Vec<f64>> {
    let dim = rows.dim();
    check_index(rows, index, progress)?;
    if weights.len() != index.len() {
        return Err(Error::shape(
            "weights",
            format!("({},), as `index` has", index.len()),
            format!("({},)", weights.len()),
        ));
    }
    let mut sum = filled(dim, 0.0, RESULTS)?;
    for (index, weights) in index.chunks(PIECE * PIECES).zip(weights.chunks(PIECE * PIECES)) {
        let pieces = index.par_chunks(PIECE).zip(weights.par_chunks(PIECE));
        let sums: Vec<Vec<f64>> = pieces
            .map_init(
                || vec![0.0; dim],
                |values, (index, weights)| {
                    let mut sum = filled(dim, 0.0, RESULTS)?;
                    for (&row, &weight) in index.iter().zip(weights) {
                        add_scaled_to_float64(&mut sum, weight, rows.row(row, values));
                    }
                    progress.check().map(|()| sum)
                },
            )
            .collect::<Result<_>>()?;
        for piece in sums {
            sum.iter_mut().zip(piece).for_each(|(sum, value)| *sum += value);
        }
    }
    progress.finish();
    Ok(sum)
}

fn check_index(rows: Rows, index: &[usize], progress: &Progress) -> Result<()> {
    match first(index.len(), progress, |place| index[place] >= rows.count())? {
        Some(place) => Err(Error::argument("index", format!("numbers of the {} rows", rows.count()), index[place])),
        None => Ok(()),
    }
}
