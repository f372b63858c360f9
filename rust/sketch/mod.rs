//! Random linear maps from p coordinates to a few, which keep inner products: E⟨Rx, Ry⟩ = ⟨x, y⟩.
//!
//! Every entry of R is addressed by (seed, coordinate), so a slice of the coordinates can be sketched alone and added to
//! what is there. Each output receives its additions in ascending order of the coordinates, so slices that are fed in
//! that order give the same bits as the whole, for any number of rows or threads.

mod dense;
mod sparse;

use crate::error::{Error, Result};
use crate::matrix::{Element, MAX_DIM, Rows, Values};
use crate::memory::{TILES, room};
use crate::progress::Progress;

/// Entries of a coordinate at most. Each has signs and rotations of its own to be drawn and kept.
const MAX_NNZ: usize = 256;

/// Rows that are sketched at once: so many that what is drawn for them costs nothing, and no more, as each is some tasks.
const ROWS: usize = 1 << 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Rotated blocks, `nnz` entries for each coordinate.
    Sparse,
    /// Dense ±1 entries.
    Rademacher,
    /// Dense normal entries.
    Normal,
}

/// ```
/// use bpo::matrix::{Rows, Values};
/// use bpo::progress::Progress;
/// use bpo::sketch::{Kind, Sketcher};
///
/// let gradients: Vec<f32> = (0..2 * 10_000).map(|index| (index as f32 * 0.7).sin()).collect();
/// let rows = Rows::new(Values::F32(&gradients), 2, 10_000)?;
/// let mut sketches = vec![0.0; 2 * 1024];
/// Sketcher::new(1024, 7, Kind::Sparse, 1)?.sketch(rows, 0, &mut sketches, &Progress::default())?;
/// let square = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>();
/// assert!((square(&sketches[..1024]) / square(&gradients[..10_000]) - 1.0).abs() < 0.15);
/// # Ok::<(), bpo::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Sketcher {
    dim: usize,
    seed: u64,
    kind: Kind,
    nnz: usize,
}

impl Sketcher {
    /// # Errors
    /// If `dim` is out of range, or `nnz` does not divide it or is above 256, or it is not 1 for a dense sketch.
    pub fn new(dim: usize, seed: u64, kind: Kind, nnz: usize) -> Result<Self> {
        if !(1..=MAX_DIM).contains(&dim) {
            return Err(Error::argument("dim", format!("in 1..={MAX_DIM}"), dim));
        }
        if nnz == 0 || nnz > MAX_NNZ || !dim.is_multiple_of(nnz) {
            return Err(Error::argument("nnz", format!("a divisor of dim = {dim}, at most {MAX_NNZ}"), nnz));
        }
        if kind != Kind::Sparse && nnz != 1 {
            return Err(Error::argument("nnz", "1 unless kind=\"sparse\"", nnz));
        }
        Ok(Self { dim, seed, kind, nnz })
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn nnz(&self) -> usize {
        self.nnz
    }

    /// Adds the sketch of each row to the row of `out`, row-major (rows, dim). The first value of a row is coordinate
    /// `offset`.
    ///
    /// # Errors
    /// If `out` has another size, the coordinates do not fit into 64 bits, the memory for what is drawn cannot be had, or
    /// the computation was cancelled.
    pub fn sketch(&self, gradients: Rows, offset: u64, out: &mut [f32], progress: &Progress) -> Result<()> {
        if out.len() != gradients.count() * self.dim {
            let expected = format!("({}, {})", gradients.count(), self.dim);
            return Err(Error::shape("out", expected, format!("({},)", out.len())));
        }
        if offset.checked_add(gradients.dim() as u64).is_none_or(|end| end > 1 << 62) {
            return Err(Error::argument("offset", "below 2^62 with the coordinates that follow", offset));
        }
        if gradients.dim() == 0 || gradients.count() == 0 {
            return Ok(());
        }
        match gradients.values() {
            Values::F32(values) => self.add(values, gradients.dim(), offset, out, progress),
            Values::F16(values) => self.add(values, gradients.dim(), offset, out, progress),
            Values::Bf16(values) => self.add(values, gradients.dim(), offset, out, progress),
            Values::I8(..) => Err(Error::argument("gradients", "float32, float16 or bfloat16", "int8")),
        }
    }

    fn add<T: Element>(
        &self,
        values: &[T],
        width: usize,
        offset: u64,
        out: &mut [f32],
        progress: &Progress,
    ) -> Result<()> {
        if self.kind == Kind::Sparse {
            let wave = sparse::wave(self.nnz).min(width as u64) as usize;
            // Signs and rotations, of 16 bytes for 128 coordinates and for a block.
            let drawn = wave / 8 + 16 * wave / (self.dim / self.nnz);
            room(self.nnz * drawn, "the signs and rotations of a sketch; lower `nnz`")?;
        } else {
            // Sums of all rows, a few columns for each thread.
            room(rayon::current_num_threads() * dense::SUMS * ROWS.min(values.len() / width), TILES)?;
        }
        for (values, out) in values.chunks(ROWS * width).zip(out.chunks_mut(ROWS * self.dim)) {
            progress.check()?;
            match self.kind {
                Kind::Sparse => sparse::add(self, values, width, offset, out, progress),
                Kind::Rademacher => dense::add(self, dense::rademacher, values, width, offset, out, progress),
                Kind::Normal => dense::add(self, dense::normal, values, width, offset, out, progress),
            }?;
        }
        Ok(())
    }
}
