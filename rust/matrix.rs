//! Checked row-major views over borrowed float32, float16 or bfloat16 values.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Error, Result};

/// Values of a sketch at most: 16 million, 64 MiB a row.
pub const MAX_DIM: usize = 1 << 24;

/// An element that widens to float32.
pub trait Element: Copy + Send + Sync {
    /// `values` as float32: the slice itself where it already is, else written to the start of `scratch`.
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
}

impl Element for f32 {
    fn widen<'a>(values: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        values
    }
}

impl Element for f16 {
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let widened = &mut scratch[..values.len()];
        values.convert_to_f32_slice(widened);
        widened
    }
}

impl Element for bf16 {
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let widened = &mut scratch[..values.len()];
        for (wide, value) in widened.iter_mut().zip(values) {
            *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
        widened
    }
}

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
            Values::F32(values) => out.copy_from_slice(&values[range]),
            Values::F16(values) => {
                f16::widen(&values[range], out);
            }
            Values::Bf16(values) => {
                bf16::widen(&values[range], out);
            }
        }
    }
}
