//! Micro-kernels of the 8-bit product: a few rows times one panel of columns, summed exactly in 32-bit integers.
//!
//! Sums of integers have no rounding, so every kernel gives the same numbers and they may add in any order.

use super::Level;

/// Columns of a panel, as in float32: rows of both products are padded alike.
pub use super::tile::PANEL;

/// Depths that one step of a panel holds: four bytes with VNNI, two 16-bit integers otherwise.
pub const VNNI_STEP: usize = 4;
pub const PAIR_STEP: usize = 2;

/// Rows of a full tile: 14 × 2 sums, two registers of columns and one broadcast fill the 32 registers of AVX-512.
pub const AVX512_ROWS: usize = 14;
/// 6 × 2 sums of half a panel, and the rest as above, fill the 16 registers of AVX2.
pub const AVX2_ROWS: usize = 6;

/// Sums of `ROWS` rows with a panel.
pub type Sums<const ROWS: usize> = [[i32; PANEL]; ROWS];

/// Whether the panels of this level hold bytes for VNNI, else 16-bit pairs.
pub fn uses_vnni(level: Level) -> bool {
    matches!(level, Level::AvxVnni | Level::Avx512Vnni)
}

/// `sums[r][c] += Σ rows[r][p] · panel[p][c]`, where the panel holds `value + 128` in unsigned bytes, four depths of a
/// column side by side.
///
/// # Safety
/// The machine has AVX-512 VNNI, each of `rows` points to `4 * steps` readable bytes and `panel` to `128 * steps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub unsafe fn vnni_avx512<const ROWS: usize>(
    rows: [*const i8; ROWS],
    panel: *const u8,
    steps: usize,
    sums: &mut Sums<ROWS>,
) {
    use std::arch::x86_64::*;
    let mut lanes = [[_mm512_setzero_si512(); 2]; ROWS];
    for (sums, lanes) in sums.iter().zip(&mut lanes) {
        // SAFETY: two registers are one row of sums.
        *lanes = unsafe { [0, 16].map(|column| _mm512_loadu_si512(sums.as_ptr().add(column).cast())) };
    }
    for step in 0..steps {
        // SAFETY: `step < steps`, for which the caller vouches.
        unsafe {
            let left = _mm512_loadu_si512(panel.add(step * 128).cast());
            let right = _mm512_loadu_si512(panel.add(step * 128 + 64).cast());
            for row in 0..ROWS {
                let value = _mm512_set1_epi32(rows[row].add(step * VNNI_STEP).cast::<i32>().read_unaligned());
                lanes[row][0] = _mm512_dpbusd_epi32(lanes[row][0], left, value);
                lanes[row][1] = _mm512_dpbusd_epi32(lanes[row][1], right, value);
            }
        }
    }
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        // SAFETY: two registers are one row of sums.
        unsafe {
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), lanes[0]);
            _mm512_storeu_si512(sums.as_mut_ptr().add(16).cast(), lanes[1]);
        }
    }
}

/// As [`vnni_avx512`], with registers of half the width.
///
/// # Safety
/// The machine has AVX-VNNI, each of `rows` points to `4 * steps` readable bytes and `panel` to `128 * steps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avxvnni")]
pub unsafe fn vnni_avx2<const ROWS: usize>(
    rows: [*const i8; ROWS],
    panel: *const u8,
    steps: usize,
    sums: &mut Sums<ROWS>,
) {
    use std::arch::x86_64::*;
    for half in 0..2 {
        let mut lanes = [[_mm256_setzero_si256(); 2]; ROWS];
        for (sums, lanes) in sums.iter().zip(&mut lanes) {
            // SAFETY: four registers are one row of sums.
            *lanes = unsafe { [0, 8].map(|column| _mm256_loadu_si256(sums.as_ptr().add(half * 16 + column).cast())) };
        }
        for step in 0..steps {
            // SAFETY: `step < steps`, for which the caller vouches.
            unsafe {
                let columns = panel.add(step * 128 + half * 64);
                let left = _mm256_loadu_si256(columns.cast());
                let right = _mm256_loadu_si256(columns.add(32).cast());
                for row in 0..ROWS {
                    let value = _mm256_set1_epi32(rows[row].add(step * VNNI_STEP).cast::<i32>().read_unaligned());
                    lanes[row][0] = _mm256_dpbusd_avx_epi32(lanes[row][0], left, value);
                    lanes[row][1] = _mm256_dpbusd_avx_epi32(lanes[row][1], right, value);
                }
            }
        }
        for (sums, lanes) in sums.iter_mut().zip(lanes) {
            // SAFETY: four registers are one row of sums.
            unsafe {
                _mm256_storeu_si256(sums.as_mut_ptr().add(half * 16).cast(), lanes[0]);
                _mm256_storeu_si256(sums.as_mut_ptr().add(half * 16 + 8).cast(), lanes[1]);
            }
        }
    }
}

/// `sums[r][c] += Σ rows[r][p] · panel[p][c]`, all 16-bit, two depths of a column side by side.
///
/// # Safety
/// The machine has AVX2, each of `rows` points to `2 * steps` readable values and `panel` to `64 * steps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
pub unsafe fn pairs_avx2<const ROWS: usize>(
    rows: [*const i16; ROWS],
    panel: *const i16,
    steps: usize,
    sums: &mut Sums<ROWS>,
) {
    use std::arch::x86_64::*;
    for half in 0..2 {
        let mut lanes = [[_mm256_setzero_si256(); 2]; ROWS];
        for (sums, lanes) in sums.iter().zip(&mut lanes) {
            // SAFETY: four registers are one row of sums.
            *lanes = unsafe { [0, 8].map(|column| _mm256_loadu_si256(sums.as_ptr().add(half * 16 + column).cast())) };
        }
        for step in 0..steps {
            // SAFETY: `step < steps`, for which the caller vouches.
            unsafe {
                let columns = panel.add(step * 2 * PANEL + half * PANEL);
                let left = _mm256_loadu_si256(columns.cast());
                let right = _mm256_loadu_si256(columns.add(16).cast());
                for row in 0..ROWS {
                    let value = _mm256_set1_epi32(rows[row].add(step * PAIR_STEP).cast::<i32>().read_unaligned());
                    lanes[row][0] = _mm256_add_epi32(lanes[row][0], _mm256_madd_epi16(left, value));
                    lanes[row][1] = _mm256_add_epi32(lanes[row][1], _mm256_madd_epi16(right, value));
                }
            }
        }
        for (sums, lanes) in sums.iter_mut().zip(lanes) {
            // SAFETY: four registers are one row of sums.
            unsafe {
                _mm256_storeu_si256(sums.as_mut_ptr().add(half * 16).cast(), lanes[0]);
                _mm256_storeu_si256(sums.as_mut_ptr().add(half * 16 + 8).cast(), lanes[1]);
            }
        }
    }
}

/// As [`pairs_avx2`], with registers of twice the width.
///
/// # Safety
/// The machine has AVX-512, each of `rows` points to `2 * steps` readable values and `panel` to `64 * steps`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub unsafe fn pairs_avx512<const ROWS: usize>(
    rows: [*const i16; ROWS],
    panel: *const i16,
    steps: usize,
    sums: &mut Sums<ROWS>,
) {
    use std::arch::x86_64::*;
    let mut lanes = [[_mm512_setzero_si512(); 2]; ROWS];
    for (sums, lanes) in sums.iter().zip(&mut lanes) {
        // SAFETY: two registers are one row of sums.
        *lanes = unsafe { [0, 16].map(|column| _mm512_loadu_si512(sums.as_ptr().add(column).cast())) };
    }
    for step in 0..steps {
        // SAFETY: `step < steps`, for which the caller vouches.
        unsafe {
            let columns = panel.add(step * 2 * PANEL);
            let left = _mm512_loadu_si512(columns.cast());
            let right = _mm512_loadu_si512(columns.add(32).cast());
            for row in 0..ROWS {
                let value = _mm512_set1_epi32(rows[row].add(step * PAIR_STEP).cast::<i32>().read_unaligned());
                lanes[row][0] = _mm512_add_epi32(lanes[row][0], _mm512_madd_epi16(left, value));
                lanes[row][1] = _mm512_add_epi32(lanes[row][1], _mm512_madd_epi16(right, value));
            }
        }
    }
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        // SAFETY: two registers are one row of sums.
        unsafe {
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), lanes[0]);
            _mm512_storeu_si512(sums.as_mut_ptr().add(16).cast(), lanes[1]);
        }
    }
}

/// The same in plain Rust, for every other machine.
pub fn pairs_plain<const ROWS: usize>(rows: [&[i16]; ROWS], panel: &[i16], sums: &mut Sums<ROWS>) {
    for (sums, row) in sums.iter_mut().zip(rows) {
        for (columns, values) in panel.chunks_exact(2 * PANEL).zip(row.chunks_exact(2)) {
            let values = [i32::from(values[0]), i32::from(values[1])];
            for (sum, column) in sums.iter_mut().zip(columns.as_chunks::<2>().0) {
                *sum += values[0] * i32::from(column[0]) + values[1] * i32::from(column[1]);
            }
        }
    }
}
