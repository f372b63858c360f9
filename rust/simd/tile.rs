//! The micro-kernels of the float32 product.
//!
//! Each output is one chain of fused multiply-adds in ascending order of the depth. Fusing rounds once and is the same
//! operation on every machine, and a vector only computes several chains side by side, so the bits of an output depend
//! on its row, its column and its start alone.

use super::{Level, level};

/// Columns of a panel: two AVX-512 registers.
pub const PANEL: usize = 32;

/// Rows of a tile: with two registers of columns they keep 24 of the 32 AVX-512 registers as sums.
pub const ROWS: usize = 12;

/// One row of a panel.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub struct PanelRow(pub [f32; PANEL]);

impl PanelRow {
    pub const ZERO: Self = Self([0.0; PANEL]);
}

/// Rows of values at a fixed distance: the first of each `stride` values are meant.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    pub values: &'a [f32],
    pub stride: usize,
}

/// `out += left * panel` for the first `rows` rows of `left`, over as much of its depth as the panel has rows, and for the
/// first `columns` columns of the panel. Rows of `out` begin `out_stride` values apart. Of the columns that follow, those
/// up to a multiple of 8 are added to as well.
///
/// # Panics
/// If `rows` or `columns` are out of range, or `left` or `out` is too short.
pub fn multiply_add(
    left: Strided,
    rows: usize,
    panel: &[PanelRow],
    columns: usize,
    out: &mut [f32],
    out_stride: usize,
) {
    assert!((1..=ROWS).contains(&rows) && columns <= PANEL && columns <= out_stride);
    assert!(left.values.len() >= (rows - 1) * left.stride + panel.len());
    let level = level();
    let mut column = 0;
    while column < columns {
        let width = match columns - column {
            ..=8 => 8,
            25.. if level >= Level::Avx512 => PANEL,
            _ => 16,
        };
        // Sixteen AVX2 registers hold the sums of six rows of two vectors.
        let most_rows = if width == 16 && level < Level::Avx512 { 6 } else { ROWS };
        for first in (0..rows).step_by(most_rows) {
            let rows = most_rows.min(rows - first);
            let out = &mut out[first * out_stride + column..];
            assert!(out.len() >= (rows - 1) * out_stride + width);
            let left_values = &left.values[first * left.stride..];
            // SAFETY: `left` has `rows` rows from `first` on, each as long as the panel, a row of the panel has `width`
            // values from `column` on, and `out` has as many in each row, all by the assertions; the level is one that
            // this machine was detected to have.
            unsafe {
                let product = Product {
                    rows,
                    depth: panel.len(),
                    left: left_values.as_ptr(),
                    left_stride: left.stride,
                    right: panel.as_ptr().cast::<f32>().add(column),
                    out: out.as_mut_ptr(),
                    out_stride,
                };
                match (level, width) {
                    (Level::Plain, 16) => plain::run::<2>(product),
                    (Level::Plain, _) => plain::run::<1>(product),
                    #[cfg(target_arch = "x86_64")]
                    (_, PANEL) => avx512::run::<2>(product),
                    #[cfg(target_arch = "x86_64")]
                    (Level::Avx2, 16) => avx2::run::<2>(product),
                    #[cfg(target_arch = "x86_64")]
                    (_, 16) => avx512::run::<1>(product),
                    #[cfg(target_arch = "x86_64")]
                    _ => avx2::run::<1>(product),
                    #[cfg(target_arch = "aarch64")]
                    (Level::Neon, 16) => neon::run::<4>(product),
                    #[cfg(target_arch = "aarch64")]
                    (Level::Neon, _) => neon::run::<2>(product),
                    #[cfg(not(target_arch = "x86_64"))]
                    _ => unreachable!("every other level is one of x86-64"),
                }
            }
        }
        column += width;
    }
}

/// What a kernel multiplies: `left` (rows, depth), `right` (depth, some columns of a panel).
struct Product {
    rows: usize,
    depth: usize,
    left: *const f32,
    left_stride: usize,
    right: *const f32,
    out: *mut f32,
    out_stride: usize,
}

/// A module with the kernel of one kind of vectors.
macro_rules! kernel {
    (
        $module:ident, $(features = $features:literal,)? lanes = $lanes:literal,
        load = $load:path, store = $store:path, fill = $fill:path, fuse = $fuse:path $(,)?
    ) => {
        mod $module {
            use super::{PANEL, Product};

            /// # Safety
            /// The product must lie within its factors and sums, and the machine must have the instructions.
            pub unsafe fn run<const VECTORS: usize>(product: Product) {
                // SAFETY: promised by the caller.
                unsafe {
                    match product.rows {
                        1 => rows::<1, VECTORS>(product),
                        2 => rows::<2, VECTORS>(product),
                        3 => rows::<3, VECTORS>(product),
                        4 => rows::<4, VECTORS>(product),
                        5 => rows::<5, VECTORS>(product),
                        6 => rows::<6, VECTORS>(product),
                        7 => rows::<7, VECTORS>(product),
                        8 => rows::<8, VECTORS>(product),
                        9 => rows::<9, VECTORS>(product),
                        10 => rows::<10, VECTORS>(product),
                        11 => rows::<11, VECTORS>(product),
                        12 => rows::<12, VECTORS>(product),
                        _ => unreachable!("a tile has at most 12 rows"),
                    }
                }
            }

            $(#[target_feature(enable = $features)])?
            unsafe fn rows<const ROWS: usize, const VECTORS: usize>(product: Product) {
                let Product { depth, left, left_stride, right, out, out_stride, .. } = product;
                // SAFETY: promised by the caller.
                unsafe {
                    let mut sums = [[$fill(0.0); VECTORS]; ROWS];
                    for row in 0..ROWS {
                        for vector in 0..VECTORS {
                            sums[row][vector] = $load(out.add(row * out_stride + vector * $lanes));
                        }
                    }
                    for step in 0..depth {
                        let mut columns = [$fill(0.0); VECTORS];
                        for vector in 0..VECTORS {
                            columns[vector] = $load(right.add(step * PANEL + vector * $lanes));
                        }
                        for row in 0..ROWS {
                            let value = $fill(*left.add(row * left_stride + step));
                            for vector in 0..VECTORS {
                                sums[row][vector] = $fuse(value, columns[vector], sums[row][vector]);
                            }
                        }
                    }
                    for row in 0..ROWS {
                        for vector in 0..VECTORS {
                            $store(out.add(row * out_stride + vector * $lanes), sums[row][vector]);
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
    lanes = 16,
    load = std::arch::x86_64::_mm512_loadu_ps,
    store = std::arch::x86_64::_mm512_storeu_ps,
    fill = std::arch::x86_64::_mm512_set1_ps,
    fuse = std::arch::x86_64::_mm512_fmadd_ps,
}

#[cfg(target_arch = "x86_64")]
kernel! {
    avx2,
    features = "avx2,fma",
    lanes = 8,
    load = std::arch::x86_64::_mm256_loadu_ps,
    store = std::arch::x86_64::_mm256_storeu_ps,
    fill = std::arch::x86_64::_mm256_set1_ps,
    fuse = std::arch::x86_64::_mm256_fmadd_ps,
}

#[cfg(target_arch = "aarch64")]
kernel! {
    neon,
    lanes = 4,
    load = std::arch::aarch64::vld1q_f32,
    store = std::arch::aarch64::vst1q_f32,
    fill = std::arch::aarch64::vdupq_n_f32,
    fuse = super::super::neon::fuse,
}

kernel! {
    plain,
    lanes = 8,
    load = super::load,
    store = super::store,
    fill = super::fill,
    fuse = super::fuse,
}

/// # Safety
/// There must be eight values.
#[inline(always)]
unsafe fn load(values: *const f32) -> [f32; 8] {
    // SAFETY: promised by the caller.
    unsafe { values.cast::<[f32; 8]>().read() }
}

/// # Safety
/// There must be eight values.
#[inline(always)]
unsafe fn store(values: *mut f32, vector: [f32; 8]) {
    // SAFETY: promised by the caller.
    unsafe { values.cast::<[f32; 8]>().write(vector) }
}

#[inline(always)]
fn fill(value: f32) -> [f32; 8] {
    [value; 8]
}

#[inline(always)]
fn fuse(left: [f32; 8], right: [f32; 8], sum: [f32; 8]) -> [f32; 8] {
    std::array::from_fn(|lane| left[lane].mul_add(right[lane], sum[lane]))
}
