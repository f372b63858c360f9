//! Checked row-major views over borrowed float32, float16 or bfloat16 values.

use half::{bf16, f16};

use crate::error::{Error, Result};
pub use crate::simd::Element;

/// Values of a sketch at most: 16 million, 64 MiB a row.
pub const MAX_DIM: usize = 1 << 24;

/// The borrowed values of a matrix, whatever their type.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }
}

/// A row-major matrix view of `count` rows of `dim` values.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    values: Values<'a>,
    count: usize,
    dim: usize,
}

impl<'a> Rows<'a> {
    /// # Errors
    /// [`Error::Shape`] unless there are exactly `count * dim` values.
    pub fn new(values: Values<'a>, count: usize, dim: usize) -> Result<Self> {
        if count.checked_mul(dim) != Some(values.len()) {
            return Err(Error::shape("rows", format!("({count}, {dim})"), format!("({},)", values.len())));
        }
        Ok(Self { values, count, dim })
    }

    pub fn values(&self) -> Values<'a> {
        self.values
    }

    pub fn count(&self) -> usize {
        self.count
    }

    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Writes row `index` as float32 into `out`, which holds `dim` values.
    pub fn copy_row(&self, index: usize, out: &mut [f32]) {
        let range = index * self.dim..(index + 1) * self.dim;
        match self.values {
            Values::F32(values) => f32::widen(&values[range], out),
            Values::F16(values) => f16::widen(&values[range], out),
            Values::Bf16(values) => bf16::widen(&values[range], out),
        }
    }
}
