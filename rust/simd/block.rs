//! The micro-kernels of the float64 product, in blocks of [`SIDE`] columns.
//!
//! Each output is one chain of fused multiply-adds in ascending order of the depth, as in [`super::tile`]: its bits do not
//! depend on the level, nor on what is computed beside it.

use super::{Level, level};

/// Rows and columns of a block: two AVX-512 registers a row.
pub const SIDE: usize = 16;

/// One row of a block: a number for each of its columns.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct Lanes(pub [f64; SIDE]);

impl Lanes {
    pub const ZERO: Self = Self([0.0; SIDE]);
}

/// `out[i][j] += sum over s of left[s][i] * right[s][j]`, or `-=` to `SUBTRACT`.
///
/// # Panics
/// If the factors differ in depth.
pub fn multiply_add<const SUBTRACT: bool>(left: &[Lanes], right: &[Lanes], out: &mut [Lanes; SIDE]) {
    assert_eq!(left.len(), right.len());
    let left = left.as_ptr().cast::<f64>();
    // SAFETY: both factors have the depth, and `out` has a row for each column of the left one.
    unsafe { run::<SUBTRACT, true>(left, SIDE, right, out) };
}

/// `out[i][j] += sum over s of left[i * stride + s] * right[s][j]`, for as many rows as `out` has.
///
/// # Panics
/// If `left` is too short.
pub fn multiply_add_rows(left: &[f64], stride: usize, right: &[Lanes], out: &mut [Lanes]) {
    assert!(out.is_empty() || left.len() >= (out.len() - 1) * stride + right.len());
    // SAFETY: `left` has as many rows as `out`, each of the depth, by the assertion.
    unsafe { run::<false, false>(left.as_ptr(), stride, right, out) };
}

/// A few rows at a time, as many as the registers hold sums of. A row of `left` begins one value after another where it is
/// `PACKED`, and its values then lie `stride` apart; else the other way round.
///
/// # Safety
/// `left` has as many rows as `out`, each as deep as `right`.
unsafe fn run<const SUBTRACT: bool, const PACKED: bool>(
    left: *const f64,
    stride: usize,
    right: &[Lanes],
    out: &mut [Lanes],
) {
    let level = level();
    let most = if level >= Level::Avx512 { 8 } else { 6 };
    let (count, tiles) = (out.len(), out.len().div_ceil(most));
    for tile in 0..tiles {
        let (first, end) = (tile * count / tiles, (tile + 1) * count / tiles);
        let out = &mut out[first..end];
        // SAFETY: promised by the caller; the level is one that this machine was detected to have.
        unsafe {
            let product = Product {
                rows: out.len(),
                depth: right.len(),
                left: left.add(if PACKED { first } else { first * stride }),
                stride,
                right: right.as_ptr().cast(),
                out: out.as_mut_ptr().cast(),
            };
            match level {
                #[cfg(target_arch = "x86_64")]
                Level::Avx512 | Level::Avx512Vnni => avx512::run::<SUBTRACT, PACKED>(product),
                #[cfg(target_arch = "x86_64")]
                Level::Avx2 => avx2::run::<SUBTRACT, PACKED>(product),
                _ => plain::run::<SUBTRACT, PACKED>(product),
            }
        }
    }
}

/// What a kernel multiplies: `left` (rows, depth), `right` (depth, [`SIDE`]).
#[derive(Clone, Copy)]
struct Product {
    rows: usize,
    depth: usize,
    left: *const f64,
    stride: usize,
    right: *const f64,
    out: *mut f64,
}

/// A module with the kernel of one kind of vectors, of which two at a time hold columns.
macro_rules! kernel {
    (
        $module:ident, $(features = $features:literal,)? lanes = $lanes:literal, load = $load:path, store = $store:path,
        fill = $fill:path, multiply = $multiply:path, subtract = $subtract:path, fuse = $fuse:path,
        fuse_negative = $fuse_negative:path $(,)?
    ) => {
        mod $module {
            use super::{Product, SIDE};

            /// # Safety
            /// The product must lie within its factors and sums, and the machine must have the instructions.
            pub unsafe fn run<const SUBTRACT: bool, const PACKED: bool>(product: Product) {
                for column in (0..SIDE).step_by(2 * $lanes) {
                    // SAFETY: promised by the caller.
                    unsafe {
                        match product.rows {
                            1 => rows::<SUBTRACT, PACKED, 1>(product, column),
                            2 => rows::<SUBTRACT, PACKED, 2>(product, column),
                            3 => rows::<SUBTRACT, PACKED, 3>(product, column),
                            4 => rows::<SUBTRACT, PACKED, 4>(product, column),
                            5 => rows::<SUBTRACT, PACKED, 5>(product, column),
                            6 => rows::<SUBTRACT, PACKED, 6>(product, column),
                            7 => rows::<SUBTRACT, PACKED, 7>(product, column),
                            8 => rows::<SUBTRACT, PACKED, 8>(product, column),
                            _ => unreachable!("a tile has at most 8 rows"),
                        }
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn rows<const SUBTRACT: bool, const PACKED: bool, const ROWS: usize>(
                product: Product,
                column: usize,
            ) {
                let Product { depth, left, stride, right, out, .. } = product;
                // SAFETY: promised by the caller.
                unsafe {
                    let (right, out) = (right.add(column), out.add(column));
                    let mut sums = [[$fill(0.0); 2]; ROWS];
                    for row in 0..ROWS {
                        for vector in 0..2 {
                            sums[row][vector] = $load(out.add(row * SIDE + vector * $lanes));
                        }
                    }
                    for step in 0..depth {
                        let columns = [$load(right.add(step * SIDE)), $load(right.add(step * SIDE + $lanes))];
                        for row in 0..ROWS {
                            let place = if PACKED { step * SIDE + row } else { row * stride + step };
                            let value = $fill(*left.add(place));
                            for vector in 0..2 {
                                let sum = &mut sums[row][vector];
                                *sum = if SUBTRACT {
                                    $fuse_negative(value, columns[vector], *sum)
                                } else {
                                    $fuse(value, columns[vector], *sum)
                                };
                            }
                        }
                    }
                    for row in 0..ROWS {
                        for vector in 0..2 {
                            $store(out.add(row * SIDE + vector * $lanes), sums[row][vector]);
                        }
                    }
                }
            }

            /// # Safety
            /// Both have as many rows as columns, and the machine must have the instructions.
            $(#[target_feature(enable = $features)])?
            pub unsafe fn substitute(lower: *const f64, block: *mut f64) {
                for column in (0..SIDE).step_by(2 * $lanes) {
                    for row in 0..SIDE {
                        // SAFETY: promised by the caller.
                        unsafe {
                            let values = block.add(row * SIDE + column);
                            let inverse = $fill((*lower.add(row * SIDE + row)).recip());
                            let solved = [0, $lanes].map(|lane| $multiply($load(values.add(lane)), inverse));
                            $store(values, solved[0]);
                            $store(values.add($lanes), solved[1]);
                            for other in row + 1..SIDE {
                                let rest = block.add(other * SIDE + column);
                                let factor = $fill(*lower.add(row * SIDE + other));
                                for vector in 0..2 {
                                    let rest = rest.add(vector * $lanes);
                                    $store(rest, $subtract($load(rest), $multiply(factor, solved[vector])));
                                }
                            }
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel! {
    avx512,
    features = "avx512f",
    lanes = 8,
    load = std::arch::x86_64::_mm512_loadu_pd,
    store = std::arch::x86_64::_mm512_storeu_pd,
    fill = std::arch::x86_64::_mm512_set1_pd,
    multiply = std::arch::x86_64::_mm512_mul_pd,
    subtract = std::arch::x86_64::_mm512_sub_pd,
    fuse = std::arch::x86_64::_mm512_fmadd_pd,
    fuse_negative = std::arch::x86_64::_mm512_fnmadd_pd,
}

#[cfg(target_arch = "x86_64")]
kernel! {
    avx2,
    features = "avx2,fma",
    lanes = 4,
    load = std::arch::x86_64::_mm256_loadu_pd,
    store = std::arch::x86_64::_mm256_storeu_pd,
    fill = std::arch::x86_64::_mm256_set1_pd,
    multiply = std::arch::x86_64::_mm256_mul_pd,
    subtract = std::arch::x86_64::_mm256_sub_pd,
    fuse = std::arch::x86_64::_mm256_fmadd_pd,
    fuse_negative = std::arch::x86_64::_mm256_fnmadd_pd,
}

kernel! {
    plain,
    lanes = 4,
    load = super::load,
    store = super::store,
    fill = super::fill,
    multiply = super::multiply,
    subtract = super::subtract,
    fuse = super::fuse,
    fuse_negative = super::fuse_negative,
}

/// # Safety
/// There must be four values.
#[inline(always)]
unsafe fn load(values: *const f64) -> [f64; 4] {
    // SAFETY: promised by the caller.
    unsafe { values.cast::<[f64; 4]>().read() }
}

/// # Safety
/// There must be four values.
#[inline(always)]
unsafe fn store(values: *mut f64, vector: [f64; 4]) {
    // SAFETY: promised by the caller.
    unsafe { values.cast::<[f64; 4]>().write(vector) }
}

#[inline(always)]
fn fill(value: f64) -> [f64; 4] {
    [value; 4]
}

#[inline(always)]
fn multiply(left: [f64; 4], right: [f64; 4]) -> [f64; 4] {
    std::array::from_fn(|lane| left[lane] * right[lane])
}

#[inline(always)]
fn subtract(left: [f64; 4], right: [f64; 4]) -> [f64; 4] {
    std::array::from_fn(|lane| left[lane] - right[lane])
}

#[inline(always)]
fn fuse(left: [f64; 4], right: [f64; 4], sum: [f64; 4]) -> [f64; 4] {
    std::array::from_fn(|lane| left[lane].mul_add(right[lane], sum[lane]))
}

#[inline(always)]
fn fuse_negative(left: [f64; 4], right: [f64; 4], sum: [f64; 4]) -> [f64; 4] {
    std::array::from_fn(|lane| (-left[lane]).mul_add(right[lane], sum[lane]))
}

/// Solves Ly = v for each column v of `block`, L being the lower triangle whose row i is the i-th number of each of `lower`.
///
/// With intrinsics, because the compiler worked on single numbers, at five times the cost.
pub fn substitute(lower: &[Lanes; SIDE], block: &mut [Lanes; SIDE]) {
    let (lower, block) = (lower.as_ptr().cast(), block.as_mut_ptr().cast());
    // SAFETY: both have as many rows as columns; the level is one that this machine was detected to have.
    unsafe {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vnni => avx512::substitute(lower, block),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::substitute(lower, block),
            _ => plain::substitute(lower, block),
        }
    }
}

super::dispatch! {
    /// The squared norm of each column.
    pub fn squared_norms(columns: &[Lanes]) -> [f64; 16] {
        // Two chains hide some of the latency of an addition.
        let mut sums = [[0.0; SIDE]; 2];
        for (index, row) in columns.iter().enumerate() {
            for lane in 0..SIDE {
                sums[index % 2][lane] += row.0[lane] * row.0[lane];
            }
        }
        std::array::from_fn(|lane| sums[0][lane] + sums[1][lane])
    }
}
