//! How the numbers of a row are kept: as they are, or in half or a quarter of the bytes.
//!
//! A sketch is `scale * row`. The scale of float16 is a power of two that puts the largest number of the row near the
//! top of its range, so nothing overflows and little is lost to subnormals; that of int8 is the largest number / 127.

use half::{bf16, f16};

/// The type of a stored number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Float32,
    Float16,
    Bfloat16,
    Int8,
}

/// float16 reaches 65504, just below 2^16.
const FLOAT16_EXPONENT: i32 = 15;

impl Encoding {
    pub const ALL: [Self; 4] = [Self::Float32, Self::Float16, Self::Bfloat16, Self::Int8];

    /// The encoding of a name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|encoding| encoding.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Float32 => "float32",
            Self::Float16 => "float16",
            Self::Bfloat16 => "bfloat16",
            Self::Int8 => "int8",
        }
    }

    /// All names, for messages.
    pub fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The ending of the name of a file of rows.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Float32 => "f32",
            Self::Float16 => "f16",
            Self::Bfloat16 => "bf16",
            Self::Int8 => "i8",
        }
    }

    pub fn row_bytes(self, dim: usize) -> usize {
        match self {
            Self::Float32 => 4 * dim,
            Self::Float16 | Self::Bfloat16 => 2 * dim,
            Self::Int8 => dim,
        }
    }

    /// Appends the bytes of a row to `out`, little-endian, and returns its scale.
    pub fn encode(self, row: &[f32], out: &mut Vec<u8>) -> f32 {
        let largest = row.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        match self {
            Self::Float32 => {
                out.extend(row.iter().flat_map(|value| value.to_le_bytes()));
                1.0
            }
            Self::Bfloat16 => {
                out.extend(row.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()));
                1.0
            }
            Self::Float16 => {
                let scale = float16_scale(largest);
                // Both factors are powers of two, so the quotient is exact but for subnormal numbers.
                out.extend(row.iter().flat_map(|value| f16::from_f32(value / scale).to_le_bytes()));
                scale
            }
            Self::Int8 => {
                let scale = int8_scale(largest);
                out.extend(row.iter().map(|value| (value / scale).round_ties_even() as i8 as u8));
                scale
            }
        }
    }

    /// Writes the numbers of a row, times its scale, to `out`.
    ///
    /// # Panics
    /// If the lengths do not fit.
    pub fn decode(self, bytes: &[u8], scale: f32, out: &mut [f32]) {
        assert_eq!(bytes.len(), self.row_bytes(out.len()));
        match self {
            Self::Float32 => widen(bytes, out, |bytes: [u8; 4]| scale * f32::from_le_bytes(bytes)),
            Self::Float16 => widen(bytes, out, |bytes: [u8; 2]| scale * f16::from_le_bytes(bytes).to_f32()),
            Self::Bfloat16 => widen(bytes, out, |bytes: [u8; 2]| scale * bf16::from_le_bytes(bytes).to_f32()),
            Self::Int8 => widen(bytes, out, |bytes: [u8; 1]| scale * f32::from(i8::from_le_bytes(bytes))),
        }
    }
}

fn widen<const BYTES: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; BYTES]) -> f32) {
    for (out, &bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
        *out = value(bytes);
    }
}

/// A power of two that brings `largest` below 2^15; a normal number, so that dividing by it loses nothing.
fn float16_scale(largest: f32) -> f32 {
    if largest == 0.0 || !largest.is_finite() {
        return 1.0;
    }
    let exponent = (largest.to_bits() >> 23) as i32 - 127; // −127 for subnormal numbers
    2.0_f32.powi((exponent + 1 - FLOAT16_EXPONENT).clamp(-126, 127))
}

/// The step between two numbers; never so small that a quotient by it leaves −127..=127.
fn int8_scale(largest: f32) -> f32 {
    let scale = largest / 127.0;
    if scale.is_normal() {
        scale
    } else if largest.is_finite() {
        f32::MIN_POSITIVE
    } else {
        1.0
    }
}
