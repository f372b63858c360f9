//! Kernels over the elements of gradients and sketches: float32, and the two types of half precision, which widen exactly.

#[cfg(target_arch = "aarch64")]
use super::neon;
use super::{Level, level};

/// An element that widens to float32.
pub trait Element: Copy + Send + Sync {
    fn to_f32(self) -> f32;

    /// Writes `values` as float32 to the start of `out`.
    ///
    /// # Panics
    /// If `out` is shorter.
    fn widen(values: &[Self], out: &mut [f32]);

    /// For each run in turn, `sums[sum + j] += sign(value + j) * scale * values[value + j]` for all `j` below `count`, where
    /// `sign(i)` is −1 if bit `first + i` of `signs` is set.
    ///
    /// Bit `i` of a sequence of words is bit `i % 32` of word `i / 32`. `far` fetches values further ahead.
    ///
    /// # Panics
    /// If a run leaves the sums or the values, or a value has no sign.
    fn add_signed(sums: &mut [f32], scale: f32, values: &[Self], signs: &[u32], first: usize, runs: &[Run], far: bool);
}

/// Values side by side that meet sums side by side.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// The first value.
    pub value: usize,
    /// The first sum.
    pub sum: usize,
    pub count: usize,
}

/// Bytes between a value and what is fetched with it into the first cache. The sums in between keep the processor from
/// running ahead itself. Measured on one thread of a Zen 4, with values in memory: as fast as without up to 1024 sums, 1.25
/// (float32) to 1.45 (float16) times as fast at 4096. With 1024, 4096 and 8192 it ran 0.9 to 1 times as fast. On a Zen 3
/// with AVX2 it gained a quarter from 512 sums on (float16).
pub const AHEAD: usize = 2048;

/// The same into the second cache, for long blocks, on top of [`AHEAD`]. Measured on two threads of a Zen 4, sixteen rows
/// of 1e7 values, in turns with [`AHEAD`] alone for short runs and this alone for long ones: 1.2 times as fast at 4096 and
/// 8192 sums; 16384 was the same. Alone, it took a third off the speed at 512 and 1024 sums. Four blocks for one load and
/// store of the sums gained no more for float32, and took a quarter off the speed of half precision.
pub const FAR_AHEAD: usize = 8192;

/// Elements whose signs are one word.
pub const WORD: usize = 32;

/// The signs of [`WORD`] elements from bit `first` on; zero beyond the last word.
#[inline(always)]
pub fn signs_at(signs: &[u32], first: usize) -> u32 {
    let [low, high] = [signs.get(first / 32), signs.get(first / 32 + 1)];
    let (low, high) = (u64::from(*low.unwrap_or(&0)), u64::from(*high.unwrap_or(&0)));
    ((low | high << 32) >> (first % 32)) as u32
}

#[inline(always)]
fn widen_plain<T: Element>(values: &[T], out: &mut [f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = value.to_f32();
    }
}

#[inline(always)]
fn add_signed_plain<T: Element>(sums: &mut [f32], scale: f32, values: &[T], signs: &[u32], first: usize, runs: &[Run]) {
    for run in runs {
        let sums = sums[run.sum..][..run.count].chunks_mut(WORD);
        let values = values[run.value..][..run.count].chunks(WORD);
        for (chunk, (sums, values)) in sums.zip(values).enumerate() {
            let word = signs_at(signs, first + run.value + chunk * WORD);
            for (lane, (sum, value)) in sums.iter_mut().zip(values).enumerate() {
                *sum += f32::from_bits((scale * value.to_f32()).to_bits() ^ (word >> lane) << 31);
            }
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
                    #[cfg(target_arch = "aarch64")]
                    Level::Neon => neon::widen(values, out),
                    _ => widen_plain(values, out),
                }
            }

            #[inline]
            fn add_signed(
                sums: &mut [f32],
                scale: f32,
                values: &[Self],
                signs: &[u32],
                first: usize,
                runs: &[Run],
                far: bool,
            ) {
                assert!(first + values.len() <= WORD * signs.len());
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the level is one that this machine was detected to have.
                    Level::Avx512 | Level::Avx512Vnni => unsafe {
                        $avx512::add_signed(sums, scale, values, signs, first, runs, far);
                    },
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: as above.
                    Level::Avx2 => unsafe { $avx2::add_signed(sums, scale, values, signs, first, runs, far) },
                    #[cfg(target_arch = "aarch64")]
                    Level::Neon => neon::add_signed(sums, scale, values, signs, first, runs, far),
                    _ => add_signed_plain(sums, scale, values, signs, first, runs),
                }
            }
        }

        #[cfg(target_arch = "x86_64")]
        mod $avx512 {
            use std::arch::x86_64::*;

            use super::{AHEAD, FAR_AHEAD, Run, WORD, signs_at};

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
                sums: &mut [f32],
                scale: f32,
                values: &[$element],
                signs: &[u32],
                first: usize,
                runs: &[Run],
                far: bool,
            ) {
                let scale = _mm512_set1_ps(scale);
                for run in runs {
                    let sums = &mut sums[run.sum..][..run.count];
                    add_run(sums, scale, &values[run.value..][..run.count], signs, first + run.value, far);
                }
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            #[inline]
            fn add_run(
                sum: &mut [f32],
                scale: __m512,
                values: &[$element],
                signs: &[u32],
                mut first: usize,
                far: bool,
            ) {
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

            use super::{AHEAD, FAR_AHEAD, Run, WORD, signs_at, widen_plain};

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
            pub fn add_signed(
                sums: &mut [f32],
                scale: f32,
                values: &[$element],
                signs: &[u32],
                first: usize,
                runs: &[Run],
                far: bool,
            ) {
                let scales = [_mm256_set1_ps(scale), _mm256_set1_ps(-scale)];
                for run in runs {
                    assert!(run.value + run.count <= values.len());
                    add_run(sums, scales, values, signs, first, *run, far);
                }
            }

            /// Goes through the sums on the grid of registers: what straddles two lines of the cache takes twice as long,
            /// and what was just stored in two parts cannot be loaded at once.
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            fn add_run(
                sums: &mut [f32],
                scales: [__m256; 2],
                values: &[$element],
                signs: &[u32],
                first: usize,
                mut run: Run,
                far: bool,
            ) {
                let lane = sums.as_ptr().wrapping_add(run.sum).addr() / size_of::<f32>() % LANES;
                if lane > 0 && run.count > 0 {
                    let head = run.count.min(LANES - lane);
                    // SAFETY: the machine has the instructions of this function.
                    unsafe { add_few(sums, scales, values, signs, first, Run { count: head, ..run }, lane) };
                    run = Run { value: run.value + head, sum: run.sum + head, count: run.count - head };
                }
                let (words, rest) = sums[run.sum..][..run.count].as_chunks_mut::<WORD>();
                let (value_words, value_rest) = values[run.value..][..run.count].as_chunks::<WORD>();
                let mut bit = first + run.value;
                for (sums, values) in words.iter_mut().zip(value_words) {
                    for line in values.chunks(64 / size_of::<$element>()) {
                        let line = line.as_ptr().cast::<i8>();
                        if far {
                            _mm_prefetch::<_MM_HINT_T1>(line.wrapping_add(FAR_AHEAD));
                        }
                        _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(AHEAD));
                    }
                    add_registers(sums, scales, values, signs_at(signs, bit));
                    bit += WORD;
                }
                add_registers(rest, scales, value_rest, signs_at(signs, bit));
                let tail = run.count % LANES;
                if tail > 0 {
                    let done = run.count - tail;
                    let run = Run { value: run.value + done, sum: run.sum + done, count: tail };
                    // SAFETY: as above.
                    unsafe { add_few(sums, scales, values, signs, first, run, 0) };
                }
            }

            /// Adds whole registers, of a word at most.
            #[target_feature(enable = "avx2,fma,f16c")]
            #[inline]
            fn add_registers(sums: &mut [f32], scales: [__m256; 2], values: &[$element], word: u32) {
                let mut word = _mm256_set1_epi32(word as i32);
                for (sums, values) in sums.as_chunks_mut::<LANES>().0.iter_mut().zip(values.as_chunks::<LANES>().0) {
                    let term = _mm256_mul_ps(signed(scales, word), load(values));
                    // SAFETY: there are eight sums.
                    unsafe {
                        let before = _mm256_loadu_ps(sums.as_ptr());
                        _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(before, term));
                    }
                    word = _mm256_srli_epi32::<{ LANES as i32 }>(word);
                }
            }

            /// Adds a run that begins at `lane` of a register and lies within it. Not a function of its own: calling it took as
            /// long as what it does.
            ///
            /// # Safety
            /// The machine has AVX2 and F16C.
            #[inline(always)]
            unsafe fn add_few(
                sums: &mut [f32],
                scales: [__m256; 2],
                values: &[$element],
                signs: &[u32],
                first: usize,
                run: Run,
                lane: usize,
            ) {
                let Run { value, sum, count } = run;
                // SAFETY: promised by the caller, and there are as many sums and terms as lanes.
                unsafe {
                    // No closures here: they would have the features, and what calls them would not, so neither is inlined.
                    let values = match values.get(value.wrapping_sub(lane)..).and_then(<[_]>::first_chunk) {
                        Some(values) => load(values),
                        None => load(&alone(&values[value..][..count], lane)),
                    };
                    let word = _mm256_set1_epi32((signs_at(signs, first + value) << lane) as i32);
                    let term = _mm256_mul_ps(signed(scales, word), values);
                    // Adding -0 changes no bit.
                    let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
                    let outside = _mm256_or_si256(
                        _mm256_cmpgt_epi32(_mm256_set1_epi32(lane as i32), numbers),
                        _mm256_cmpgt_epi32(numbers, _mm256_set1_epi32((lane + count) as i32 - 1)),
                    );
                    let term = _mm256_blendv_ps(term, _mm256_set1_ps(-0.0), _mm256_castsi256_ps(outside));
                    match sums.get_mut(sum.wrapping_sub(lane)..).and_then(<[_]>::first_chunk_mut::<LANES>) {
                        Some(sums) => {
                            let before = _mm256_loadu_ps(sums.as_ptr());
                            _mm256_storeu_ps(sums.as_mut_ptr(), _mm256_add_ps(before, term));
                        }
                        None => {
                            let mut terms = [0.0; LANES];
                            _mm256_storeu_ps(terms.as_mut_ptr(), term);
                            add_plain(&mut sums[sum..][..count], &terms[lane..]);
                        }
                    }
                }
            }

            /// A register of values with these from `lane` on.
            #[cold]
            #[inline(never)]
            fn alone(values: &[$element], lane: usize) -> [$element; LANES] {
                std::array::from_fn(|index| values[index.saturating_sub(lane).min(values.len() - 1)])
            }

            #[cold]
            #[inline(never)]
            fn add_plain(sums: &mut [f32], terms: &[f32]) {
                sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
            }

            /// The second of `scales` where the bit of a lane is set, which is one of the first eight.
            #[target_feature(enable = "avx2")]
            #[inline]
            fn signed(scales: [__m256; 2], word: __m256i) -> __m256 {
                let bits = _mm256_sllv_epi32(word, _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24));
                _mm256_blendv_ps(scales[0], scales[1], _mm256_castsi256_ps(bits))
            }
        }
    };
}

/// Exactly, in one instruction where every processor has it.
#[inline(always)]
fn f16_to_f32(value: half::f16) -> f32 {
    #[cfg(target_arch = "aarch64")]
    return neon::f16_to_f32(value);
    #[cfg(not(target_arch = "aarch64"))]
    value.to_f32_const()
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
    to_f32 = f16_to_f32,
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
