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

/// A kernel: `sums[r][c] += Σ rows[r][p] · panel[p][c]`, where some depths of a column lie side by side, two registers of
/// columns at a time.
#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    (
        $(#[$attribute:meta])*
        $name:ident($row:ty, $column:ty), step = $step:expr, lanes = $lanes:literal, zero = $zero:ident,
        load = $load:ident, store = $store:ident, fill = $fill:ident,
        add = |$sum:ident, $columns:ident, $value:ident| $add:expr $(,)?
    ) => {
        $(#[$attribute])*
        ///
        /// # Safety
        /// The machine has the instructions, and for each step there are the readable values of each row and the panel.
        pub unsafe fn $name<const ROWS: usize>(
            rows: [*const $row; ROWS],
            panel: *const $column,
            steps: usize,
            sums: &mut Sums<ROWS>,
        ) {
            use std::arch::x86_64::*;
            for first in (0..PANEL).step_by(2 * $lanes) {
                let mut lanes = [[$zero(); 2]; ROWS];
                for (sums, lanes) in sums.iter().zip(&mut lanes) {
                    // SAFETY: two registers from `first` on lie within a row of sums.
                    unsafe {
                        lanes[0] = $load(sums.as_ptr().add(first).cast());
                        lanes[1] = $load(sums.as_ptr().add(first + $lanes).cast());
                    }
                }
                for step in 0..steps {
                    // SAFETY: `step < steps`, for which the caller vouches.
                    unsafe {
                        let columns = panel.add((step * PANEL + first) * $step);
                        let columns = [$load(columns.cast()), $load(columns.add($lanes * $step).cast())];
                        for row in 0..ROWS {
                            let $value = $fill(rows[row].add(step * $step).cast::<i32>().read_unaligned());
                            for half in 0..2 {
                                let ($sum, $columns) = (lanes[row][half], columns[half]);
                                lanes[row][half] = $add;
                            }
                        }
                    }
                }
                for (sums, lanes) in sums.iter_mut().zip(lanes) {
                    // SAFETY: as above.
                    unsafe {
                        $store(sums.as_mut_ptr().add(first).cast(), lanes[0]);
                        $store(sums.as_mut_ptr().add(first + $lanes).cast(), lanes[1]);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel! {
    /// The panel holds `value + 128` in unsigned bytes, four depths of a column side by side.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    vnni_avx512(i8, u8),
    step = VNNI_STEP, lanes = 16, zero = _mm512_setzero_si512, load = _mm512_loadu_si512, store = _mm512_storeu_si512,
    fill = _mm512_set1_epi32, add = |sum, columns, value| _mm512_dpbusd_epi32(sum, columns, value),
}

#[cfg(target_arch = "x86_64")]
kernel! {
    /// As [`vnni_avx512`], with registers of half the width.
    #[target_feature(enable = "avx2,avxvnni")]
    vnni_avx2(i8, u8),
    step = VNNI_STEP, lanes = 8, zero = _mm256_setzero_si256, load = _mm256_loadu_si256, store = _mm256_storeu_si256,
    fill = _mm256_set1_epi32, add = |sum, columns, value| _mm256_dpbusd_avx_epi32(sum, columns, value),
}

#[cfg(target_arch = "x86_64")]
kernel! {
    /// All are 16-bit, two depths of a column side by side.
    #[target_feature(enable = "avx2")]
    pairs_avx2(i16, i16),
    step = PAIR_STEP, lanes = 8, zero = _mm256_setzero_si256, load = _mm256_loadu_si256, store = _mm256_storeu_si256,
    fill = _mm256_set1_epi32,
    add = |sum, columns, value| _mm256_add_epi32(sum, _mm256_madd_epi16(columns, value)),
}

#[cfg(target_arch = "x86_64")]
kernel! {
    /// As [`pairs_avx2`], with registers of twice the width.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pairs_avx512(i16, i16),
    step = PAIR_STEP, lanes = 16, zero = _mm512_setzero_si512, load = _mm512_loadu_si512, store = _mm512_storeu_si512,
    fill = _mm512_set1_epi32,
    add = |sum, columns, value| _mm512_add_epi32(sum, _mm512_madd_epi16(columns, value)),
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
