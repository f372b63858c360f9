//! Checked row-major views over borrowed float32, float16, bfloat16 or int8 values.

use std::ops::Range;

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::pages::forget_pages;
use crate::simd;
pub use crate::simd::Element;

/// Values of a sketch at most: 16 million, 64 MiB a row.
pub const MAX_DIM: usize = 1 << 24;

/// The borrowed values of a matrix, whatever their type.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    /// Bytes, and the factor of each row where that is not 1.
    I8(&'a [i8], Option<&'a [f32]>),
}

impl Values<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::I8(values, _) => values.len(),
        }
    }
}

/// Checks the values of an array of rows of `dim`.
///
/// # Errors
/// If one is not finite.
pub fn check_finite(array: &'static str, values: &[f32], dim: usize) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => {
            let value = f64::from(values[index]);
            Err(Error::NonFiniteRow { array, row: index / dim, column: index % dim, value })
        }
        None => Ok(()),
    }
}

/// Rows of float32 in memory of their own, each from a line of the cache on.
///
/// A register that straddles two lines takes two loads: inner products of rows in a second-level cache, 16 bytes beyond a
/// line as NumPy allocates them, took 1.8 times as long.
#[derive(Debug, Default)]
pub struct AlignedRows {
    values: Vec<f32>,
    first: usize,
    dim: usize,
}

impl AlignedRows {
    /// Values of a line of the cache.
    const LINE: usize = 16;

    /// Makes them `count` rows of `dim` values, which are yet to be written.
    pub fn resize(&mut self, count: usize, dim: usize) {
        self.dim = dim;
        self.values.resize(count * self.stride() + Self::LINE, 0.0);
        self.first = self.values.as_ptr().align_offset(Self::LINE * size_of::<f32>());
    }

    fn stride(&self) -> usize {
        self.dim.next_multiple_of(Self::LINE)
    }

    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[self.first + index * self.stride()..][..self.dim]
    }

    pub fn row_mut(&mut self, index: usize) -> &mut [f32] {
        let stride = self.stride();
        &mut self.values[self.first + index * stride..][..self.dim]
    }
}

/// A row-major matrix view of `count` rows of `dim` values.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    values: Values<'a>,
    count: usize,
    dim: usize,
    mapped: bool,
}

impl<'a> Rows<'a> {
    /// # Errors
    /// [`Error::Shape`] unless there are exactly `count * dim` values, and a factor for each row of bytes.
    pub fn new(values: Values<'a>, count: usize, dim: usize) -> Result<Self> {
        if let Values::I8(_, Some(scales)) = values
            && scales.len() != count
        {
            return Err(Error::shape("scales", format!("({count},)"), format!("({},)", scales.len())));
        }
        if count.checked_mul(dim) != Some(values.len()) {
            return Err(Error::shape("rows", format!("({count}, {dim})"), format!("({},)", values.len())));
        }
        Ok(Self { values, count, dim, mapped: false })
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

    /// Bytes of a row as it lies in memory.
    pub fn row_bytes(&self) -> usize {
        self.dim
            * match self.values {
                Values::F32(_) => size_of::<f32>(),
                Values::F16(_) | Values::Bf16(_) => size_of::<f16>(),
                Values::I8(..) => size_of::<i8>(),
            }
    }

    /// `count` values of row `index` from `first` on: a part of it where it is float32, else written to `scratch`.
    pub fn part<'r>(&'r self, index: usize, first: usize, count: usize, scratch: &'r mut [f32]) -> &'r [f32] {
        let range = index * self.dim + first..index * self.dim + first + count;
        match self.values {
            Values::F32(values) => return &values[range],
            Values::F16(values) => f16::widen(&values[range], scratch),
            Values::Bf16(values) => bf16::widen(&values[range], scratch),
            Values::I8(values, scales) => {
                let scale = scales.map_or(1.0, |scales| scales[index]);
                for (out, &value) in scratch.iter_mut().zip(&values[range]) {
                    *out = scale * f32::from(value);
                }
            }
        }
        &scratch[..count]
    }

    /// `count` rows from `first` on, where they are float32 and there.
    pub fn adjacent(&self, first: usize, count: usize) -> Option<&[f32]> {
        match self.values {
            Values::F32(values) => values.get(first * self.dim..(first + count) * self.dim),
            _ => None,
        }
    }

    /// Row `index`: itself where it is float32, else written to `scratch`, which holds `dim` values.
    pub fn row<'r>(&'r self, index: usize, scratch: &'r mut [f32]) -> &'r [f32] {
        self.part(index, 0, self.dim, scratch)
    }

    /// Says that the rows lie in pages of a file, mapped so that all who map it see one another's changes.
    ///
    /// # Safety
    /// They do: [`Rows::forget`] throws away what such pages hold in memory alone, and they are read from the file again.
    pub unsafe fn set_mapped(&mut self) {
        self.mapped = true;
    }

    pub fn mapped(&self) -> bool {
        self.mapped
    }

    /// Lets the pages of some rows of a mapped file leave the memory of this process until they are read again. Does
    /// nothing for other rows.
    pub fn forget(&self, rows: Range<usize>) {
        if !self.mapped || rows.is_empty() {
            return;
        }
        let range = rows.start * self.dim..rows.end * self.dim;
        // SAFETY: whoever called `set_mapped` vouched for the pages.
        unsafe {
            match self.values {
                Values::F32(values) => forget_pages(&values[range]),
                Values::F16(values) => forget_pages(&values[range]),
                Values::Bf16(values) => forget_pages(&values[range]),
                Values::I8(values, _) => forget_pages(&values[range]),
            }
        }
    }

    /// Asks for row `index`, which will be read soon.
    pub fn prefetch(&self, index: usize) {
        let range = index * self.dim..(index + 1) * self.dim;
        match self.values {
            Values::F32(values) => simd::prefetch(&values[range]),
            Values::F16(values) => simd::prefetch(&values[range]),
            Values::Bf16(values) => simd::prefetch(&values[range]),
            Values::I8(values, _) => simd::prefetch(&values[range]),
        }
    }

    /// Writes row `index` as float32 into `out`, which holds `dim` values.
    pub fn copy_row(&self, index: usize, out: &mut [f32]) {
        if let Values::F32(values) = self.values {
            out.copy_from_slice(&values[index * self.dim..(index + 1) * self.dim]);
        } else {
            self.row(index, out);
        }
    }
}
