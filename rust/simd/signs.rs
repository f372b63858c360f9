//! Random signs as entries of a panel.

use super::tile::{PANEL, PanelRow};
use super::{Level, level};

/// Writes ±`scale`, which is positive, to all columns: bit j of the word of a row is the sign of column j.
///
/// With intrinsics, because the compiler would work on several rows side by side and scatter the columns.
pub fn spread_signs(rows: &mut [PanelRow], words: &[u32], scale: f32) {
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level is one that this machine was detected to have.
        Level::Avx512 | Level::Avx512Vnni => unsafe { avx512(rows, words, scale) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { avx2(rows, words, scale) },
        #[cfg(target_arch = "aarch64")]
        Level::Neon => super::neon::spread_signs(rows, words, scale),
        _ => {
            for (row, word) in rows.iter_mut().zip(words) {
                for column in 0..PANEL {
                    row.0[column] = f32::from_bits(scale.to_bits() | (word >> column) << 31);
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(rows: &mut [PanelRow], words: &[u32], scale: f32) {
    use std::arch::x86_64::*;

    let (positive, negative) = (_mm512_set1_ps(scale), _mm512_set1_ps(-scale));
    for (row, word) in rows.iter_mut().zip(words) {
        for (half, columns) in row.0.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let entries = _mm512_mask_blend_ps((word >> (16 * half)) as __mmask16, positive, negative);
            // SAFETY: there are sixteen columns.
            unsafe { _mm512_storeu_ps(columns.as_mut_ptr(), entries) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2(rows: &mut [PanelRow], words: &[u32], scale: f32) {
    use std::arch::x86_64::*;

    let (scale, sign) = (_mm256_set1_ps(scale), _mm256_set1_epi32(i32::MIN));
    let shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (row, word) in rows.iter_mut().zip(words) {
        for (quarter, columns) in row.0.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let word = _mm256_set1_epi32((word >> (8 * quarter)) as i32);
            let signs = _mm256_and_si256(_mm256_sllv_epi32(word, shifts), sign);
            // SAFETY: there are eight columns.
            unsafe { _mm256_storeu_ps(columns.as_mut_ptr(), _mm256_or_ps(scale, _mm256_castsi256_ps(signs))) };
        }
    }
}
