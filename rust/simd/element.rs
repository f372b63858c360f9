//! Kernels over the elements of gradients and sketches: float32, and the two types of half precision, which widen exactly.

use super::{Level, level};

/// An element that widens to float32.
pub trait Element: Copy + Send + Sync {
    fn to_f32(self) -> f32;

    /// Writes `values` as float32 to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter.
    fn widen(values: &[Self], out: &mut [f32]);

    /// `sum[j] += sign(j) * scale * values[j]`, where `sign(j)` is −1 if bit `first + j` of `signs` is set.
    ///
    /// Bit `i` of a sequence of words is bit `i % 32` of word `i / 32`. `far` fetches values further ahead.
    ///
    /// # Panics
    /// If a slice is shorter than `values` needs.
    fn add_signed(sum: &mut [f32], scale: f32, values: &[Self], signs: &[u32], first: usize, far: bool);
}

/// Bytes between a value and what is fetched with it into the first cache. The sums in between keep the processor from
/// running ahead itself. Measured on one thread of a Zen 4, with values in memory: as fast as without up to 1024 sums, 1.25
/// (float32) to 1.45 (float16) times as fast at 4096. With 1024, 4096 and 8192 it ran 0.9 to 1 times as fast.
const AHEAD: usize = 2048;

/// The same into the second cache, for long blocks, on top of [`AHEAD`]. Measured on two threads of a Zen 4, sixteen rows
/// of 1e7 values, in turns with [`AHEAD`] alone for short runs and this alone for long ones: 1.2 times as fast at 4096 and
/// 8192 sums; 16384 was the same. Alone, it took a third off the speed at 512 and 1024 sums. Four blocks for one load and
/// store of the sums gained no more for float32, and took a quarter off the speed of half precision.
const FAR_AHEAD: usize = 8192;

/// Elements whose signs are one word.
const WORD: usize = 32;

/// The signs of [`WORD`] elements from bit `first` on; zero beyond the last word.
#[inline(always)]
fn signs_at(signs: &[u32], first: usize) -> u32 {
    let [low, high] = [0, 1].map(|next| signs.get(first / 32 + next).map_or(0, |word| u64::from(*word)));
    ((low | high << 32) >> (first % 32)) as u32
}

#[inline(always)]
fn widen_plain<T: Element>(values: &[T], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.to_f32();
    }
}

#[inline(always)]
fn add_signed_plain<T: Element>(sum: &mut [f32], scale: f32, values: &[T], signs: &[u32], first: usize) {
    let chunks = sum.chunks_mut(WORD).zip(values.chunks(WORD));
    for (chunk, (sum, values)) in chunks.enumerate() {
        let word = signs_at(signs, first + chunk * WORD);
        for (lane, (sum, value)) in sum.iter_mut().zip(values).enumerate() {
            *sum += f32::from_bits((scale * value.to_f32()).to_bits() ^ (word >> lane) << 31);
        }
    }
}

macro_rules! element {
    (
        $element:ty, to_f32 = $to_f32:expr, avx512 = $avx512:ident, avx2 = $avx2:ident,
        sixteen = |$from:ident| $sixteen:expr, up_to_sixteen = |$mask:ident, $masked:ident| $up_to_sixteen:expr,
        eight = |$start:ident| $eight:expr $(,)?
    ) => {
        impl Element for $element {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to_f32(self)
            }

            #[inline]
            fn widen(values: &[Self], out: &mut [f32]) {
                let out = &mut out[..values.len()];
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the level is one that this machine was detected to have.
                    Level::Avx512 | Level::Avx512Vnni => unsafe { $avx512::widen(values, out) },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Level::Avx2 => unsafe { $avx2::widen(values, out) },
                    _ => widen_plain(values, out),
                }
            }

            #[inline]
            fn add_signed(sum: &mut [f32], scale: f32, values: &[Self], signs: &[u32], first: usize, far: bool) {
                let sum = &mut sum[..values.len()];
                assert!(first + values.len() <= 32 * signs.len());
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the level is one that this machine was detected to have.
                    Level::Avx512 | Level::Avx512Vnni => unsafe {
                        $avx512::add_signed(sum, scale, values, signs, first, far);
                    },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Level::Avx2 => unsafe { $avx2::add_signed(sum, scale, values, signs, first) },
                    _ => add_signed_plain(sum, scale, values, signs, first),
                }
            }
        }

        #[cfg(target_arch = "x86_64")]
        mod $avx512 {
            use std::arch::x86_64::*;

            use super::{AHEAD, FAR_AHEAD, WORD, signs_at};

            const LANES: usize = 16;

            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            #[inline]
            fn load($from: &[$element; LANES]) -> __m512 {
                let $from = $from.as_ptr();
                // SAFETY: there are sixteen elements.
                unsafe { $sixteen }
            }

            /// Fills up with zeros.
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            #[inline]
            fn load_up_to_sixteen($masked: &[$element]) -> __m512 {
                let $mask = lanes($masked.len());
                let $masked = $masked.as_ptr();
                // SAFETY: lanes beyond the elements are masked out.
                unsafe { $up_to_sixteen }
            }

            #[inline(always)]
            fn lanes(count: usize) -> __mmask16 {
                ((1u32 << count.min(LANES)) - 1) as __mmask16
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            pub fn widen(values: &[$element], out: &mut [f32]) {
                let (values, values_tail) = values.as_chunks::<LANES>();
                let (out, out_tail) = out.as_chunks_mut::<LANES>();
                for (values, out) in values.iter().zip(out) {
                    // SAFETY: there are sixteen outputs.
                    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), load(values)) };
                }
                // SAFETY: lanes beyond the outputs are masked out.
                unsafe {
                    _mm512_mask_storeu_ps(
                        out_tail.as_mut_ptr(),
                        lanes(out_tail.len()),
                        load_up_to_sixteen(values_tail),
                    );
                }
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            pub fn add_signed(
                sum: &mut [f32],
                scale: f32,
                values: &[$element],
                signs: &[u32],
                mut first: usize,
                far: bool,
            ) {
                let scale = _mm512_set1_ps(scale);
                // Sums on a cache line's grid: a store that straddles two lines takes twice as long.
                let head = sum.as_ptr().align_offset(64).min(sum.len());
                let (sums_head, sum) = sum.split_at_mut(head);
                let (values_head, values) = values.split_at(head);
                add_few(sums_head, scale, values_head, signs, first);
                first += head;
                let (sums, sums_tail) = sum.as_chunks_mut::<WORD>();
                let (values, values_tail) = values.as_chunks::<WORD>();
                if far {
                    add_words::<true>(sums, scale, values, signs, first);
                } else {
                    add_words::<false>(sums, scale, values, signs, first);
                }
                add_few(sums_tail, scale, values_tail, signs, first + sums.len() * WORD);
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            #[inline]
            fn add_words<const FAR: bool>(
                sums: &mut [[f32; WORD]],
                scale: __m512,
                values: &[[$element; WORD]],
                signs: &[u32],
                mut first: usize,
            ) {
                for (sum, values) in sums.iter_mut().zip(values) {
                    for line in values.chunks(64 / size_of::<$element>()) {
                        let line = line.as_ptr().cast::<i8>();
                        if FAR {
                            _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(FAR_AHEAD));
                        }
                        _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD));
                    }
                    let word = signs_at(signs, first);
                    first += WORD;
                    let sums = sum.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<LANES>().0);
                    for (half, (sum, values)) in sums.enumerate() {
                        let negative = (word >> (half * LANES)) as __mmask16;
                        let term = _mm512_mul_ps(scale, load(values));
                        // SAFETY: there are sixteen sums.
                        unsafe {
                            let before = _mm512_loadu_ps(sum.as_ptr());
                            let after = _mm512_mask_sub_ps(_mm512_add_ps(before, term), negative, before, term);
                            _mm512_storeu_ps(sum.as_mut_ptr(), after);
                        }
                    }
                }
            }

            /// Adds fewer than [`WORD`].
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            #[inline]
            fn add_few(sum: &mut [f32], scale: __m512, values: &[$element], signs: &[u32], first: usize) {
                let mut word = signs_at(signs, first);
                for (sum, values) in sum.chunks_mut(LANES).zip(values.chunks(LANES)) {
                    let term = _mm512_mul_ps(scale, load_up_to_sixteen(values));
                    let lanes = lanes(sum.len());
                    // SAFETY: lanes beyond the sums are masked out.
                    unsafe {
                        let before = _mm512_maskz_loadu_ps(lanes, sum.as_ptr());
                        let after = _mm512_mask_sub_ps(_mm512_add_ps(before, term), word as __mmask16, before, term);
                        _mm512_mask_storeu_ps(sum.as_mut_ptr(), lanes, after);
                    }
                    word >>= LANES;
                }
            }
        }

        #[cfg(target_arch = "x86_64")]
        mod $avx2 {
            use std::arch::x86_64::*;

            use super::{WORD, add_signed_plain, signs_at, widen_plain};

            const LANES: usize = 8;

            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            fn load($start: &[$element; LANES]) -> __m256 {
                let $start = $start.as_ptr();
                // SAFETY: there are eight elements.
                unsafe { $eight }
            }

            #[target_feature(enable = "avx2,fma,f16c")]
            pub fn widen(values: &[$element], out: &mut [f32]) {
                let (values, values_tail) = values.as_chunks::<LANES>();
                let (out, out_tail) = out.as_chunks_mut::<LANES>();
                for (values, out) in values.iter().zip(out) {
                    // SAFETY: there are eight outputs.
                    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), load(values)) };
                }
                widen_plain(values_tail, out_tail);
            }

            #[target_feature(enable = "avx2,fma,f16c")]
            pub fn add_signed(sum: &mut [f32], scale: f32, values: &[$element], signs: &[u32], mut first: usize) {
                let scales = _mm256_set1_ps(scale);
                let sign = _mm256_set1_epi32(i32::MIN);
                let (sums, sums_tail) = sum.as_chunks_mut::<WORD>();
                let (values, values_tail) = values.as_chunks::<WORD>();
                for (sum, values) in sums.iter_mut().zip(values) {
                    let word = _mm256_set1_epi32(signs_at(signs, first) as i32);
                    first += WORD;
                    let mut shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
                    for (sum, values) in sum.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<LANES>().0) {
                        let signs = _mm256_and_si256(_mm256_sllv_epi32(word, shifts), sign);
                        let term = _mm256_xor_ps(_mm256_mul_ps(scales, load(values)), _mm256_castsi256_ps(signs));
                        // SAFETY: there are eight sums.
                        unsafe {
                            let before = _mm256_loadu_ps(sum.as_ptr());
                            _mm256_storeu_ps(sum.as_mut_ptr(), _mm256_add_ps(before, term));
                        }
                        shifts = _mm256_sub_epi32(shifts, _mm256_set1_epi32(LANES as i32));
                    }
                }
                add_signed_plain(sums_tail, scale, values_tail, signs, first);
            }
        }
    };
}

element! {
    f32,
    to_f32 = |value| value,
    avx512 = f32_avx512,
    avx2 = f32_avx2,
    sixteen = |values| _mm512_loadu_ps(values),
    up_to_sixteen = |mask, values| _mm512_maskz_loadu_ps(mask, values),
    eight = |values| _mm256_loadu_ps(values),
}

element! {
    half::f16,
    to_f32 = half::f16::to_f32_const,
    avx512 = f16_avx512,
    avx2 = f16_avx2,
    sixteen = |values| _mm512_cvtph_ps(_mm256_loadu_si256(values.cast())),
    up_to_sixteen = |mask, values| _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values.cast())),
    eight = |values| _mm256_cvtph_ps(_mm_loadu_si128(values.cast())),
}

element! {
    half::bf16,
    to_f32 = |value: half::bf16| f32::from_bits(u32::from(value.to_bits()) << 16),
    avx512 = bf16_avx512,
    avx2 = bf16_avx2,
    sixteen = |values| {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(values.cast()))))
    },
    up_to_sixteen = |mask, values| {
        let bits = _mm256_maskz_loadu_epi16(mask, values.cast());
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    },
    eight = |values| {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(values.cast()))))
    },
}
