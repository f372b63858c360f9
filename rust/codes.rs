//! Vectors as whole numbers, whose inner product with a copy in 8 bits is exact.

use crate::simd::dispatch;
use crate::simd::dots::dots;

/// A vector, rounded to numbers whose inner product with a copy fits into 32 bits.
pub struct Rounded {
    pub codes: Vec<i16>,
    pub step: f64,
    /// The length of the vector itself.
    pub length: f64,
    /// The length of what rounding took.
    pub lost: f64,
}

impl Rounded {
    pub fn new(vector: &[f64]) -> Self {
        let largest = vector.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let limit = i32::MAX as usize / (i8::MAX as usize * vector.len());
        let limit = limit.clamp(1, i16::MAX as usize) as f64;
        let step = if largest > 0.0 { largest / limit } else { 1.0 };
        let codes: Vec<i16> = vector.iter().map(|value| (value / step).round_ties_even() as i16).collect();
        let lost: f64 = vector.iter().zip(&codes).map(|(value, &code)| (value - step * f64::from(code)).powi(2)).sum();
        Self { codes, step, length: dots(vector, [vector])[0].sqrt(), lost: lost.sqrt() }
    }
}

dispatch! {
    /// The inner product of whole numbers, whose order of addition never shows.
    pub fn multiply_codes(left: &[i8], right: &[i16]) -> i32 {
        // A loop, as the compiler then multiplies two by two: not through an iterator's sum, which it may leave apart.
        let mut sum = 0;
        for (left, right) in left.iter().zip(right) {
            sum += i32::from(*left) * i32::from(*right);
        }
        sum
    }
}
