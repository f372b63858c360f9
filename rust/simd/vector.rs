//! Kernels over whole vectors.
//!
//! Plain Rust over arrays of a fixed number of lanes. The order of the additions is written down by the lanes and nothing
//! fuses a multiplication with an addition.

use super::dispatch;

/// Independent accumulators of a reduction: two AVX-512 registers, enough to hide the latency of an addition.
const LANES: usize = 32;

/// Adds the lanes up as a tree, always the same one.
#[inline(always)]
fn fold_lanes(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

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
    /// `sum += scale * values`, where the sum is carried in float64.
    pub fn add_scaled_wide(sum: &mut [f64], scale: f64, values: &[f32]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += scale * f64::from(*value);
        }
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
    /// The lowest `offsets[j] - sum of coefficients[t] * terms[t][j]`, with its index; ties go to the lower index.
    pub fn lowest<const TERMS: usize>(
        offsets: &[f32],
        coefficients: [f32; TERMS],
        terms: [&[f32]; TERMS],
    ) -> (usize, f32) {
        const WIDTH: usize = 16;
        let terms = terms.map(|term| &term[..offsets.len()]);
        let mut values = [f32::INFINITY; WIDTH];
        let mut blocks = [0u32; WIDTH];
        let (chunks, _) = offsets.as_chunks::<WIDTH>();
        let term_chunks = terms.map(|term| term.as_chunks::<WIDTH>().0);
        for (block, offset) in chunks.iter().enumerate() {
            let chunk = term_chunks.map(|term| term[block]);
            for lane in 0..WIDTH {
                let mut value = offset[lane];
                for term in 0..TERMS {
                    value -= coefficients[term] * chunk[term][lane];
                }
                let lower = value < values[lane];
                values[lane] = if lower { value } else { values[lane] };
                blocks[lane] = if lower { block as u32 } else { blocks[lane] };
            }
        }
        let mut best = (usize::MAX, f32::INFINITY);
        for lane in 0..WIDTH {
            let index = blocks[lane] as usize * WIDTH + lane;
            if values[lane] < best.1 || (values[lane] == best.1 && index < best.0) {
                best = (index, values[lane]);
            }
        }
        for index in chunks.len() * WIDTH..offsets.len() {
            let mut value = offsets[index];
            for term in 0..TERMS {
                value -= coefficients[term] * terms[term][index];
            }
            if value < best.1 {
                best = (index, value);
            }
        }
        best
    }
}

dispatch! {
    /// `sum += scale * values` in float64, over the length of the sum.
    pub fn add_scaled_double(sum: &mut [f64], scale: f64, values: &[f64]) {
        for (sum, value) in sum.iter_mut().zip(values) {
            *sum += scale * value;
        }
    }
}
