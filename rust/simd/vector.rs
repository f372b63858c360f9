//! Kernels over whole vectors.
//!
//! Plain Rust over arrays of a fixed number of lanes. The order of the additions is written down by the lanes and nothing
//! fuses a multiplication with an addition.

use std::cmp::Ordering;

use super::dispatch;
use super::register::fold_lanes;

/// Independent accumulators of a reduction: two AVX-512 registers, enough to hide the latency of an addition.
const LANES: usize = 32;

dispatch! {
    /// The inner product of two vectors of one length.
    pub fn dot(left: &[f32], right: &[f32]) -> f32 {
        let (left, left_rest) = left.as_chunks::<LANES>();
        let (right, right_rest) = right.as_chunks::<LANES>();
        let mut lanes = [0.0; LANES];
        for (left, right) in left.iter().zip(right) {
            for lane in 0..LANES {
                lanes[lane] += left[lane] * right[lane];
            }
        }
        for (lane, (left, right)) in left_rest.iter().zip(right_rest).enumerate() {
            lanes[lane] += left * right;
        }
        fold_lanes(lanes)
    }
}

dispatch! {
    /// The squared Euclidean distance of two vectors of one length.
    pub fn squared_distance(left: &[f32], right: &[f32]) -> f32 {
        let (left, left_rest) = left.as_chunks::<LANES>();
        let (right, right_rest) = right.as_chunks::<LANES>();
        let mut lanes = [0.0; LANES];
        for (left, right) in left.iter().zip(right) {
            for lane in 0..LANES {
                let difference = left[lane] - right[lane];
                lanes[lane] += difference * difference;
            }
        }
        for (lane, (left, right)) in left_rest.iter().zip(right_rest).enumerate() {
            let difference = left - right;
            lanes[lane] += difference * difference;
        }
        fold_lanes(lanes)
    }
}

dispatch! {
    /// `sum += scale * values`.
    pub fn add_scaled(sum: &mut [f32], scale: f32, values: &[f32]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += scale * value;
        }
    }
}

dispatch! {
    /// `sum += scales[t] * values[t]`, one term after the other, where the sum is carried in float64.
    pub fn add_terms_to_float64<const TERMS: usize>(sum: &mut [f64], scales: [f64; TERMS], values: [&[f32]; TERMS]) {
        let values = values.map(|values| &values[..sum.len()]);
        for (index, sum) in sum.iter_mut().enumerate() {
            for term in 0..TERMS {
                *sum += scales[term] * f64::from(values[term][index]);
            }
        }
    }
}

/// `sum += scale * values`, where the sum is carried in float64.
pub fn add_scaled_to_float64(sum: &mut [f64], scale: f64, values: &[f32]) {
    add_terms_to_float64(sum, [scale], [values]);
}

dispatch! {
    /// Writes `values` in float64.
    pub fn to_float64(values: &[f32], out: &mut [f64]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = f64::from(*value);
        }
    }
}

dispatch! {
    /// `out = scale * values`.
    pub fn scale(out: &mut [f32], scale: f32, values: &[f32]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = scale * value;
        }
    }
}

dispatch! {
    /// `values *= factor`.
    pub fn multiply(values: &mut [f32], factor: f32) {
        values.iter_mut().for_each(|value| *value *= factor);
    }
}

dispatch! {
    /// `values -= other`.
    pub fn subtract(values: &mut [f32], other: &[f32]) {
        for (value, other) in values.iter_mut().zip(other) {
            *value -= other;
        }
    }
}

dispatch! {
    /// `out = sum of coefficients[t] * terms[t]`.
    pub fn combine<const TERMS: usize>(out: &mut [f32], coefficients: [f32; TERMS], terms: [&[f32]; TERMS]) {
        let terms = terms.map(|term| &term[..out.len()]);
        for (index, out) in out.iter_mut().enumerate() {
            let mut value = coefficients[0] * terms[0][index];
            for term in 1..TERMS {
                value += coefficients[term] * terms[term][index];
            }
            *out = value;
        }
    }
}

dispatch! {
    /// The largest magnitude; NaN counts for nothing.
    pub fn largest_magnitude(values: &[f32]) -> f32 {
        let (chunks, rest) = values.as_chunks::<LANES>();
        let mut lanes = [0.0f32; LANES];
        for chunk in chunks {
            for lane in 0..LANES {
                let magnitude = chunk[lane].abs();
                lanes[lane] = if magnitude > lanes[lane] { magnitude } else { lanes[lane] };
            }
        }
        rest.iter().chain(&lanes).fold(0.0, |largest, value| largest.max(value.abs()))
    }
}

dispatch! {
    /// `out = values * factor`, rounded to the nearest integer (ties to even), where no magnitude exceeds 127; returns the
    /// sum of the integers.
    pub fn round_to_bytes(values: &[f32], factor: f32, out: &mut [i8]) -> i32 {
        // Adding 1.5 · 2^23 leaves the integer in the lowest bits of the significand.
        const SHIFT: f32 = 12_582_912.0;
        let mut sum = 0i32;
        for (value, out) in values.iter().zip(out) {
            let integer = (value * factor + SHIFT).to_bits().wrapping_sub(SHIFT.to_bits()).cast_signed();
            sum = sum.wrapping_add(integer);
            *out = integer as i8;
        }
        sum
    }
}

dispatch! {
    /// `out = (sums - offset) * factor * factors`; a difference beyond 32 bits wraps.
    pub fn scale_sums(sums: &[i32], offset: i32, factor: f32, factors: &[f32], out: &mut [f32]) {
        for ((sum, column), out) in sums.iter().zip(factors).zip(out) {
            *out = sum.wrapping_sub(offset) as f32 * (factor * column);
        }
    }
}

dispatch! {
    /// The squared Euclidean norm in float64.
    pub fn squared_norm_float64(values: &[f32]) -> f64 {
        const WIDTH: usize = 16;
        let (chunks, rest) = values.as_chunks::<WIDTH>();
        let mut lanes = [0.0f64; WIDTH];
        for chunk in chunks {
            for lane in 0..WIDTH {
                let value = f64::from(chunk[lane]);
                lanes[lane] += value * value;
            }
        }
        for (lane, value) in rest.iter().enumerate() {
            lanes[lane] += f64::from(*value) * f64::from(*value);
        }
        lanes.iter().sum()
    }
}

dispatch! {
    /// The squared Euclidean distance of two vectors of one length in float64, in which no square of float32 numbers
    /// overflows or vanishes.
    pub fn squared_distance_float64(left: &[f32], right: &[f32]) -> f64 {
        const WIDTH: usize = 16;
        let (left, left_rest) = left.as_chunks::<WIDTH>();
        let (right, right_rest) = right.as_chunks::<WIDTH>();
        let mut lanes = [0.0f64; WIDTH];
        for (left, right) in left.iter().zip(right) {
            for lane in 0..WIDTH {
                let difference = f64::from(left[lane]) - f64::from(right[lane]);
                lanes[lane] += difference * difference;
            }
        }
        for (lane, (left, right)) in left_rest.iter().zip(right_rest).enumerate() {
            let difference = f64::from(*left) - f64::from(*right);
            lanes[lane] += difference * difference;
        }
        lanes.iter().sum()
    }
}

dispatch! {
    /// With `value(j) = offsets[j] - sum of coefficients[t] * terms[t][j]`, which is known up to
    /// `margin(j) = sum of factors[i] * margins[i][j]`: writes the lowest that each can be to `lower` and returns
    /// the highest that the lowest of all can be. What is not a number bounds nothing.
    pub fn lower_bounds<const TERMS: usize>(
        offsets: &[f32],
        coefficients: [f32; TERMS],
        terms: [&[f32]; TERMS],
        margins: [&[f32]; 3],
        factors: [f32; 3],
        lower: &mut [f32],
    ) -> f32 {
        const WIDTH: usize = 16;
        let chunks = offsets.as_chunks::<WIDTH>().0;
        let terms = terms.map(|term| &term.as_chunks::<WIDTH>().0[..chunks.len()]);
        let margins = margins.map(|margin| &margin.as_chunks::<WIDTH>().0[..chunks.len()]);
        let lower = &mut lower.as_chunks_mut::<WIDTH>().0[..chunks.len()];
        let mut upper = [f32::INFINITY; WIDTH];
        // A loop over the lanes for each step: of all steps in one the compiler made scalar code, at five times the cost.
        for index in 0..chunks.len() {
            let mut value = chunks[index];
            for term in 0..TERMS {
                for lane in 0..WIDTH {
                    value[lane] -= coefficients[term] * terms[term][index][lane];
                }
            }
            let mut margin = margins[0][index].map(|margin| factors[0] * margin);
            for part in 1..3 {
                for lane in 0..WIDTH {
                    margin[lane] += factors[part] * margins[part][index][lane];
                }
            }
            for lane in 0..WIDTH {
                lower[index][lane] = value[lane] - margin[lane];
            }
            for lane in 0..WIDTH {
                let highest = value[lane] + margin[lane];
                upper[lane] = if highest < upper[lane] { highest } else { upper[lane] };
            }
        }
        let mut width = WIDTH / 2;
        while width > 0 {
            for lane in 0..width {
                let other = upper[lane + width];
                upper[lane] = if other < upper[lane] { other } else { upper[lane] };
            }
            width /= 2;
        }
        upper[0]
    }
}

dispatch! {
    /// Appends the indices, below `count`, of the values that are not above `limit`: of those that are not a number, too.
    pub fn not_above(values: &[f32], limit: f32, count: usize, found: &mut Vec<u32>) {
        const WIDTH: usize = 16;
        for (index, chunk) in values.as_chunks::<WIDTH>().0.iter().enumerate() {
            let mut above = true;
            for lane in 0..WIDTH {
                above &= chunk[lane] > limit;
            }
            if !above {
                let lanes = 0..WIDTH.min(count.saturating_sub(index * WIDTH));
                let possible = |lane: &usize| !matches!(chunk[*lane].partial_cmp(&limit), Some(Ordering::Greater));
                found.extend(lanes.filter(possible).map(|lane| (index * WIDTH + lane) as u32));
            }
        }
    }
}

dispatch! {
    /// `values -= factor * bytes`.
    pub fn subtract_bytes(values: &mut [f32], factor: f32, bytes: &[i8]) {
        for (value, byte) in values.iter_mut().zip(bytes) {
            *value -= factor * f32::from(*byte);
        }
    }
}

/// Asks for the lines of a slice that will be read soon, in no order that the hardware could guess.
#[inline]
pub fn prefetch<T>(values: &[T]) {
    const LINE: usize = 64;
    #[cfg(target_arch = "x86_64")]
    for start in (0..size_of_val(values)).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect that a program could see, and the address lies within the slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(values.as_ptr().cast::<i8>().add(start)) };
    }
    #[cfg(target_arch = "aarch64")]
    for start in (0..size_of_val(values)).step_by(LINE) {
        super::neon::prefetch::<false>(values.as_ptr().cast::<u8>().wrapping_add(start));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = (values, LINE);
}

dispatch! {
    /// `sum += scale * values` in float64, over the length of the sum.
    pub fn add_scaled_float64(sum: &mut [f64], scale: f64, values: &[f64]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += scale * value;
        }
    }
}

dispatch! {
    /// The squared norm, in float64, of `values - factor * bytes`.
    pub fn squared_rest(values: &[f32], factor: f32, bytes: &[i8]) -> f64 {
        const WIDTH: usize = 16;
        let bytes = &bytes[..values.len()];
        let (value_chunks, value_rest) = values.as_chunks::<WIDTH>();
        let (byte_chunks, byte_rest) = bytes.as_chunks::<WIDTH>();
        let mut lanes = [0.0f64; WIDTH];
        for (values, bytes) in value_chunks.iter().zip(byte_chunks) {
            for lane in 0..WIDTH {
                let rest = f64::from(values[lane] - factor * f32::from(bytes[lane]));
                lanes[lane] += rest * rest;
            }
        }
        for (lane, (value, byte)) in value_rest.iter().zip(byte_rest).enumerate() {
            let rest = f64::from(value - factor * f32::from(*byte));
            lanes[lane] += rest * rest;
        }
        lanes.iter().sum()
    }
}

dispatch! {
    /// The inner product with `other`, and the squared norm, of the vector that is the sum of two scaled ones, in float64.
    pub fn pair_products(coefficients: [f64; 2], terms: [&[f32]; 2], other: &[f64]) -> [f64; 2] {
        const WIDTH: usize = 16;
        let [chosen, rejected] = terms.map(|term| term[..other.len()].as_chunks::<WIDTH>());
        let (others, others_rest) = other.as_chunks::<WIDTH>();
        let value = |chosen: f32, rejected: f32| {
            coefficients[0] * f64::from(chosen) + coefficients[1] * f64::from(rejected)
        };
        let (mut products, mut squares) = ([0.0f64; WIDTH], [0.0f64; WIDTH]);
        for ((chosen, rejected), other) in chosen.0.iter().zip(rejected.0).zip(others) {
            for lane in 0..WIDTH {
                let value = value(chosen[lane], rejected[lane]);
                products[lane] += value * other[lane];
                squares[lane] += value * value;
            }
        }
        for (lane, other) in others_rest.iter().enumerate() {
            let value = value(chosen.1[lane], rejected.1[lane]);
            products[lane] += value * other;
            squares[lane] += value * value;
        }
        [products.iter().sum(), squares.iter().sum()]
    }
}
