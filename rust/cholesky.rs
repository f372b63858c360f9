//! Symmetric positive definite matrices in float64: the Cholesky factor, and systems with it.
//!
//! Everything is one step, [`eliminate`], on rows that do not know of one another; so it runs in parallel over chunks of
//! rows of a fixed size, and no result depends on the number of threads.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::filled;
use crate::progress::Progress;
use crate::simd::add_scaled_float64;
use crate::simd::dots::{Grid, add_products};

/// Columns that are eliminated at once.
const BLOCK: usize = 32;

/// Rows of one piece of work.
pub const CHUNK: usize = 64;

/// A matrix of `dim` rows and columns of zeros, if the memory can be had.
///
/// # Errors
/// [`Error::Memory`].
pub fn zeros(dim: usize) -> Result<Vec<f64>> {
    filled(dim.saturating_mul(dim), 0.0, "two (d, d) float64 matrices; sketch to fewer dimensions")
}

/// Replaces the lower triangle of `matrix`, A, by its Cholesky factor L with LLᵀ = A. dim³/3 multiplications and
/// additions.
///
/// # Errors
/// If the matrix is not positive definite, or the computation was cancelled.
pub fn factor(matrix: &mut [f64], dim: usize, progress: &Progress) -> Result<()> {
    for first in (0..dim).step_by(BLOCK) {
        let end = dim.min(first + BLOCK);
        let (above, below) = matrix.split_at_mut(end * dim);
        let pivots = &mut above[first * dim..];
        subtract_products(pivots, dim, first, end);
        for row in first..end {
            for column in first..=row {
                let (row_values, column_values) =
                    (&pivots[(row - first) * dim..][..dim], &pivots[(column - first) * dim..][..dim]);
                let product = |index: usize| row_values[index] * column_values[index];
                let value = row_values[column] - (first..column).map(product).sum::<f64>();
                pivots[(row - first) * dim + column] = if column < row {
                    value / pivots[(column - first) * dim + column]
                } else if value > 0.0 {
                    value.sqrt()
                } else {
                    return Err(Error::NotDefinite);
                };
            }
        }
        let pivots = &above[first * dim..];
        below.par_chunks_mut(CHUNK * dim).try_for_each(|rows| {
            eliminate(rows, pivots, dim, first, end);
            progress.check()
        })?;
    }
    Ok(())
}

/// Subtracts from the columns `first..end` of the rows, which are also the rows `first..end` of the factor, the products
/// of what lies to the left.
fn subtract_products(rows: &mut [f64], dim: usize, first: usize, end: usize) {
    let (count, width) = (end - first, end - first);
    let mut products = vec![0.0; count * width];
    let grid = Grid::new(rows, count, dim);
    add_products(1.0, grid, grid, first, &mut products, width);
    for (row, products) in rows.chunks_exact_mut(dim).zip(products.chunks_exact(width)) {
        for (value, product) in row[first..end].iter_mut().zip(products) {
            *value -= product;
        }
    }
}

/// Solves Ly = v for each row v of at most [`CHUNK`], in place, on the calling thread. dim²/2 multiplications and
/// additions a row.
pub fn solve(factor: &[f64], dim: usize, rows: &mut [f64]) {
    for first in (0..dim).step_by(BLOCK) {
        let end = dim.min(first + BLOCK);
        eliminate(rows, &factor[first * dim..end * dim], dim, first, end);
    }
}

/// Computes the values `first..end` of each solution, given those before them and the rows `first..end` of the factor.
fn eliminate(rows: &mut [f64], pivots: &[f64], dim: usize, first: usize, end: usize) {
    let (count, width) = (rows.len() / dim, end - first);
    let mut products = vec![0.0; count * width];
    add_products(1.0, Grid::new(rows, count, dim), Grid::new(pivots, width, dim), first, &mut products, width);
    // Column by column, so that the vectors run over the rows.
    let mut columns = vec![0.0; width * count];
    for (index, row) in rows.chunks_exact(dim).enumerate() {
        for column in 0..width {
            columns[column * count + index] = row[first + column] - products[index * width + column];
        }
    }
    for column in 0..width {
        let (solved, rest) = columns.split_at_mut(column * count);
        let pivots = &pivots[column * dim + first..];
        for (other, solved) in solved.chunks_exact(count).enumerate() {
            add_scaled_float64(&mut rest[..count], -pivots[other], solved);
        }
        rest[..count].iter_mut().for_each(|value| *value /= pivots[column]);
    }
    for (index, row) in rows.chunks_exact_mut(dim).enumerate() {
        for column in 0..width {
            row[first + column] = columns[column * count + index];
        }
    }
}
