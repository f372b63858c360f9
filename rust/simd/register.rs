//! Registers of float32 and float64 at each level, and what the kernels of [`super::dots`] do with one.

use std::ops::{Add, Mul, Sub};

/// Numbers that are worked on side by side. Its methods are always inlined, so that a kernel may be written once for all
/// registers: the instructions are those of the function that it ends up in.
pub trait Register: Copy {
    type Number: Copy + Default;
    const LANES: usize;

    /// # Safety
    /// The machine has the instructions of the register, as for all that follows.
    unsafe fn zero() -> Self;

    /// # Safety
    /// There are as many values as lanes.
    unsafe fn load(values: *const Self::Number) -> Self;

    /// The first `count` values, and zeros in the other lanes.
    ///
    /// # Safety
    /// There are as many values as `count`, or as lanes if it exceeds them.
    unsafe fn load_first(values: *const Self::Number, count: usize) -> Self;

    /// # Safety
    /// See [`Register::zero`].
    unsafe fn multiply(self, other: Self) -> Self;

    /// # Safety
    /// See [`Register::zero`].
    unsafe fn add(self, other: Self) -> Self;

    /// # Safety
    /// See [`Register::zero`].
    unsafe fn subtract(self, other: Self) -> Self;

    /// Adds the lanes up as a tree: the upper half to the lower one, again and again.
    ///
    /// # Safety
    /// See [`Register::zero`].
    unsafe fn fold(self) -> Self::Number;
}

/// Implements [`Register`] by functions of the level.
#[cfg(target_arch = "x86_64")]
macro_rules! register {
    (
        $register:ident of $number:ident, lanes = $lanes:literal, zero = $zero:ident, load = $load:ident,
        load_first = $load_first:ident, multiply = $multiply:ident, add = $add:ident, subtract = $subtract:ident,
        fold = $fold:ident $(,)?
    ) => {
        impl Register for $register {
            type Number = $number;
            const LANES: usize = $lanes;

            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: promised by the caller.
                unsafe { $zero() }
            }

            #[inline(always)]
            unsafe fn load(values: *const $number) -> Self {
                // SAFETY: promised by the caller.
                unsafe { $load(values) }
            }

            #[inline(always)]
            unsafe fn load_first(values: *const $number, count: usize) -> Self {
                // SAFETY: promised by the caller.
                unsafe { $load_first(values, count) }
            }

            #[inline(always)]
            unsafe fn multiply(self, other: Self) -> Self {
                // SAFETY: promised by the caller.
                unsafe { $multiply(self, other) }
            }

            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                // SAFETY: promised by the caller.
                unsafe { $add(self, other) }
            }

            #[inline(always)]
            unsafe fn subtract(self, other: Self) -> Self {
                // SAFETY: promised by the caller.
                unsafe { $subtract(self, other) }
            }

            #[inline(always)]
            unsafe fn fold(self) -> $number {
                // SAFETY: promised by the caller.
                unsafe { $fold(self) }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::x86_64::*;

    use super::Register;

    register! {
        __m512 of f32,
        lanes = 16,
        zero = _mm512_setzero_ps,
        load = _mm512_loadu_ps,
        load_first = load_first_512,
        multiply = _mm512_mul_ps,
        add = _mm512_add_ps,
        subtract = _mm512_sub_ps,
        fold = fold_512,
    }

    register! {
        __m512d of f64,
        lanes = 8,
        zero = _mm512_setzero_pd,
        load = _mm512_loadu_pd,
        load_first = load_first_512_double,
        multiply = _mm512_mul_pd,
        add = _mm512_add_pd,
        subtract = _mm512_sub_pd,
        fold = fold_512_double,
    }

    register! {
        __m256 of f32,
        lanes = 8,
        zero = _mm256_setzero_ps,
        load = _mm256_loadu_ps,
        load_first = load_first_256,
        multiply = _mm256_mul_ps,
        add = _mm256_add_ps,
        subtract = _mm256_sub_ps,
        fold = fold_256,
    }

    register! {
        __m256d of f64,
        lanes = 4,
        zero = _mm256_setzero_pd,
        load = _mm256_loadu_pd,
        load_first = load_first_256_double,
        multiply = _mm256_mul_pd,
        add = _mm256_add_pd,
        subtract = _mm256_sub_pd,
        fold = fold_256_double,
    }

    /// # Safety
    /// As for [`Register::load_first`].
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load_first_512(values: *const f32, count: usize) -> __m512 {
        let mask = ((1u32 << count.min(16)) - 1) as __mmask16;
        // SAFETY: the mask leaves out what lies beyond.
        unsafe { _mm512_maskz_loadu_ps(mask, values) }
    }

    /// # Safety
    /// As for [`Register::load_first`].
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn load_first_512_double(values: *const f64, count: usize) -> __m512d {
        let mask = ((1u32 << count.min(8)) - 1) as __mmask8;
        // SAFETY: the mask leaves out what lies beyond.
        unsafe { _mm512_maskz_loadu_pd(mask, values) }
    }

    /// # Safety
    /// As for [`Register::load_first`].
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load_first_256(values: *const f32, count: usize) -> __m256 {
        let mask =
            _mm256_cmpgt_epi32(_mm256_set1_epi32(count.min(8) as i32), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        // SAFETY: the mask leaves out what lies beyond.
        unsafe { _mm256_maskload_ps(values, mask) }
    }

    /// # Safety
    /// As for [`Register::load_first`].
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load_first_256_double(values: *const f64, count: usize) -> __m256d {
        let mask = _mm256_cmpgt_epi64(_mm256_set1_epi64x(count.min(4) as i64), _mm256_setr_epi64x(0, 1, 2, 3));
        // SAFETY: the mask leaves out what lies beyond.
        unsafe { _mm256_maskload_pd(values, mask) }
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    #[inline]
    fn fold_512(lanes: __m512) -> f32 {
        fold_256(_mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes)))
    }

    #[target_feature(enable = "avx512f,avx512dq")]
    #[inline]
    fn fold_512_double(lanes: __m512d) -> f64 {
        fold_256_double(_mm256_add_pd(_mm512_castpd512_pd256(lanes), _mm512_extractf64x4_pd::<1>(lanes)))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn fold_256(lanes: __m256) -> f32 {
        let lanes = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
        _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes)))
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn fold_256_double(lanes: __m256d) -> f64 {
        let lanes = _mm_add_pd(_mm256_castpd256_pd128(lanes), _mm256_extractf128_pd::<1>(lanes));
        _mm_cvtsd_f64(_mm_add_sd(lanes, _mm_unpackhi_pd(lanes, lanes)))
    }
}

/// What the compiler makes of it, on every machine.
impl<T, const LANES: usize> Register for [T; LANES]
where
    T: Copy + Default + Add<Output = T> + Mul<Output = T> + Sub<Output = T>,
{
    type Number = T;
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn zero() -> Self {
        [T::default(); LANES]
    }

    #[inline(always)]
    unsafe fn load(values: *const T) -> Self {
        // SAFETY: promised by the caller.
        unsafe { values.cast::<Self>().read() }
    }

    #[inline(always)]
    unsafe fn load_first(values: *const T, count: usize) -> Self {
        // SAFETY: promised by the caller.
        let values = unsafe { std::slice::from_raw_parts(values, count.min(LANES)) };
        let mut lanes = [T::default(); LANES];
        lanes[..values.len()].copy_from_slice(values);
        lanes
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] * other[lane])
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] - other[lane])
    }

    #[inline(always)]
    unsafe fn fold(self) -> T {
        fold_lanes(self)
    }
}

/// Adds the lanes up as a tree, always the same one.
///
/// Not inlined: the optimizer would arrange the lanes of the sums for the tree, at 2.4 times the cost of a product.
#[inline(never)]
pub fn fold_lanes<T: Copy + Add<Output = T>, const LANES: usize>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = lanes[lane] + lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}
