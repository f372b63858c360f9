//! Symmetric positive definite matrices in float64: sums of squares, the Cholesky factor, and systems with it.
//!
//! Everything is made of blocks of 16 x 16 numbers and of one step, `eliminate`, on 16 right sides that do not know of
//! others; so it runs in parallel, and no result depends on the number of threads. Dimensions are rounded up to whole
//! blocks: what is added is zero, but for the diagonal.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::filled;
use crate::progress::Progress;
use crate::simd::block::{Lanes, SIDE, multiply_add, substitute};

/// A lower triangle, of a symmetric matrix or a factor, in panels of 16 rows.
///
/// Panel i begins with column 0 and ends with its block on the diagonal; column s of it holds the numbers s of the rows
/// from 16 i on. Above the diagonal a block has whatever it has.
///
/// ```
/// use bpo::cholesky::Triangle;
/// use bpo::progress::Progress;
/// use bpo::simd::block::{Lanes, SIDE};
///
/// let mut matrix = Triangle::zeros(2)?;
/// matrix.set_diagonal(1.0);
/// let mut vector = Lanes([0.0; SIDE]);
/// vector.0[..2].copy_from_slice(&[3.0, 4.0]);
/// matrix.add_products(&[vector], 1, &Progress::default())?; // I + vvᵀ
/// matrix.factor(&Progress::default())?;
/// let determinant = (matrix.get(0, 0) * matrix.get(1, 1)).powi(2);
/// assert!((determinant - 26.0).abs() < 1e-12);
/// # Ok::<(), bpo::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Triangle {
    values: Vec<Lanes>,
    panels: usize,
}

/// Where a panel begins: those before it have 16, 32, ... columns.
fn start(panel: usize) -> usize {
    SIDE * panel * (panel + 1) / 2
}

/// Rows of zeros, if the memory can be had.
///
/// # Errors
/// [`Error::Memory`].
pub fn zeros(count: usize) -> Result<Vec<Lanes>> {
    filled(count, Lanes::ZERO, "float64 matrices of d * d numbers; sketch to fewer dimensions")
}

impl Triangle {
    /// A triangle of zeros of `dim` rows, if the memory can be had: 4 dim² bytes.
    ///
    /// # Errors
    /// [`Error::Memory`].
    pub fn zeros(dim: usize) -> Result<Self> {
        let panels = dim.div_ceil(SIDE);
        Ok(Self { values: zeros(start(panels))?, panels })
    }

    /// Rows of whole blocks.
    pub fn rows(&self) -> usize {
        SIDE * self.panels
    }

    fn panel(&self, panel: usize) -> &[Lanes] {
        &self.values[start(panel)..start(panel + 1)]
    }

    /// The number in a row and a column not right of it.
    pub fn get(&self, row: usize, column: usize) -> f64 {
        self.values[start(row / SIDE) + column].0[row % SIDE]
    }

    pub fn set_diagonal(&mut self, value: f64) {
        for row in 0..self.rows() {
            self.values[start(row / SIDE) + row].0[row % SIDE] = value;
        }
    }

    pub fn copy_from(&mut self, other: &Self) {
        self.values.copy_from_slice(&other.values);
    }

    /// Each panel, cut out of the whole.
    fn split(mut values: &mut [Lanes], panels: std::ops::Range<usize>) -> Vec<&mut [Lanes]> {
        let cut = |panel| values.split_off_mut(..SIDE * (panel + 1)).expect("the panels make up the whole");
        panels.map(cut).collect()
    }

    /// Adds to the number in row r and column c the inner product of the r-th and the c-th of `vectors`. They lie in
    /// groups of 16, which have `depth` rows each.
    ///
    /// # Errors
    /// If the computation was cancelled.
    ///
    /// # Panics
    /// If there are not as many groups as panels.
    pub fn add_products(&mut self, vectors: &[Lanes], depth: usize, progress: &Progress) -> Result<()> {
        assert_eq!(vectors.len(), self.panels * depth);
        let group = |panel: usize| &vectors[panel * depth..(panel + 1) * depth];
        let panels = Self::split(&mut self.values, 0..self.panels);
        panels.into_par_iter().enumerate().with_max_len(1).try_for_each(|(panel, values)| {
            for (index, block) in values.as_chunks_mut::<SIDE>().0.iter_mut().enumerate() {
                multiply_add::<false>(group(index), group(panel), block);
            }
            progress.check()
        })
    }

    /// Replaces A by its Cholesky factor L with LLᵀ = A. dim³/6 fused multiply-adds.
    ///
    /// # Errors
    /// If the matrix is not positive definite, or the computation was cancelled.
    pub fn factor(&mut self, progress: &Progress) -> Result<()> {
        for index in 0..self.panels {
            let (above, below) = self.values.split_at_mut(start(index + 1));
            let panel = &mut above[start(index)..];
            let (solved, block) = panel.split_at_mut(SIDE * index);
            let block = block.first_chunk_mut().expect("a panel ends with its block on the diagonal");
            multiply_add::<true>(solved, solved, block);
            factor_block(block)?;
            let panel = &*panel;
            let panels = Self::split(below, index + 1..self.panels);
            panels.into_par_iter().try_for_each(|other| {
                eliminate(panel, other);
                progress.check()
            })?;
        }
        Ok(())
    }

    /// Solves Ly = v for each v of some groups of 16, in place, on the calling thread. dim²/2 fused multiply-adds for
    /// each.
    pub fn solve(&self, groups: &mut [Lanes]) {
        for index in 0..self.panels {
            groups.chunks_exact_mut(self.rows()).for_each(|group| eliminate(self.panel(index), group));
        }
    }
}

/// Computes the values of 16 solutions that belong to a panel of the factor, given those before them.
fn eliminate(panel: &[Lanes], group: &mut [Lanes]) {
    let (left, lower) = panel.split_last_chunk().expect("a panel ends with its block on the diagonal");
    let (solved, rest) = group.split_at_mut(left.len());
    let block = rest.first_chunk_mut().expect("there is a value for each row of the factor");
    multiply_add::<true>(left, solved, block);
    substitute(lower, block);
}

/// The factor of a block on the diagonal.
fn factor_block(block: &mut [Lanes; SIDE]) -> Result<()> {
    for row in 0..SIDE {
        for column in 0..=row {
            let product = |index: usize| block[index].0[row] * block[index].0[column];
            let value = block[column].0[row] - (0..column).map(product).sum::<f64>();
            block[column].0[row] = if column < row {
                value / block[column].0[column]
            } else if value > 0.0 {
                value.sqrt()
            } else {
                return Err(Error::NotDefinite);
            };
        }
    }
    Ok(())
}
