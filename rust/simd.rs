//! Vector kernels and the one place of run-time dispatch.
//!
//! Every kernel is plain Rust over arrays of a fixed number of lanes, compiled once for each [`Level`]. The order of the
//! additions is written down by the lanes and nothing fuses a multiplication with an addition, so every level gives the
//! same bits: a result does not depend on the machine's vector width.

use std::sync::atomic::{AtomicU8, Ordering};

/// The instruction sets that a kernel is compiled for. Outside x86-64 the baseline (NEON on AArch64) is all there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    Plain = 1,
    Avx2 = 2,
    Avx512 = 3,
}

static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The best level of this machine.
pub fn detected_level() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx512 {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") {
            return Level::Avx2;
        }
    }
    Level::Plain
}

/// The level that kernels run at.
#[inline]
pub fn level() -> Level {
    match LEVEL.load(Ordering::Relaxed) {
        1 => Level::Plain,
        2 => Level::Avx2,
        3 => Level::Avx512,
        _ => set_level(detected_level()),
    }
}

/// Runs kernels at `level`, or at the best level of this machine where that is lower; returns the level in force.
///
/// For comparing the levels with one another; they give the same bits, so it is safe at any time.
pub fn set_level(level: Level) -> Level {
    let level = level.min(detected_level());
    LEVEL.store(level as u8, Ordering::Relaxed);
    level
}

/// Compiles a function once for each [`Level`] and picks one at run time.
macro_rules! dispatch {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<const $generic:ident: usize>)? (
            $($argument:ident: $kind:ty),* $(,)?
        ) $(-> $output:ty)? $body:block
    ) => {
        $(#[$attribute])*
        #[inline]
        $visibility fn $name $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? {
            #[inline(always)]
            fn plain $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512 $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? {
                    plain $(::<$generic>)? ($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2 $(<const $generic: usize>)? ($($argument: $kind),*) $(-> $output)? {
                    plain $(::<$generic>)? ($($argument),*)
                }
                match $crate::simd::level() {
                    // SAFETY: `level` never exceeds what this machine was detected to have.
                    $crate::simd::Level::Avx512 => return unsafe { avx512 $(::<$generic>)? ($($argument),*) },
                    // SAFETY: as above.
                    $crate::simd::Level::Avx2 => return unsafe { avx2 $(::<$generic>)? ($($argument),*) },
                    $crate::simd::Level::Plain => {}
                }
            }
            plain $(::<$generic>)? ($($argument),*)
        }
    };
}
pub(crate) use dispatch;

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
    /// `sum[j] += sign(j) * scale * values[j]`, where `sign(j)` is −1 if bit `first + j` of `signs` is set.
    ///
    /// Bit `i` of a sequence of words is bit `i % 32` of word `i / 32`.
    pub fn add_signed(sum: &mut [f32], scale: f32, values: &[f32], signs: &[u32], first: usize) {
        const SIGN: u32 = 1 << 31;
        let one = |sum: &mut f32, value: f32, index: usize| {
            let sign = (signs[index / 32] << (31 - index % 32)) & SIGN;
            *sum += f32::from_bits((scale * value).to_bits() ^ sign);
        };
        // Whole words of signs in the middle, single signs before and after.
        let head = (first.next_multiple_of(32) - first).min(sum.len());
        let (sum_head, sum) = sum.split_at_mut(head);
        let (values_head, values) = values.split_at(head);
        for (index, (sum, value)) in sum_head.iter_mut().zip(values_head).enumerate() {
            one(sum, *value, first + index);
        }
        let first = first + head;
        let (sum_words, sum_tail) = sum.as_chunks_mut::<32>();
        let (value_words, values_tail) = values.as_chunks::<32>();
        let first_word = first / 32;
        for ((sum, values), word) in sum_words.iter_mut().zip(value_words).zip(&signs[first_word.min(signs.len())..]) {
            for lane in 0..32 {
                let sign = (word << (31 - lane)) & SIGN;
                sum[lane] += f32::from_bits((scale * values[lane]).to_bits() ^ sign);
            }
        }
        let tail = first + sum_words.len() * 32;
        for (index, (sum, value)) in sum_tail.iter_mut().zip(values_tail).enumerate() {
            one(sum, *value, tail + index);
        }
    }
}
