//! Products of rows with columns that were both rounded to 8 bits: two to four times as fast as in float32.
//!
//! A vector v becomes integers q in −127..=127 and a scale s with v ≈ s·q. The integer sums are exact, so a product is
//! wrong only by what the rounding to 8 bits left over, which whoever needs a proof can bound by the norms of v − s·q.

use std::ops::Range;

#[cfg(target_arch = "aarch64")]
use crate::simd::NEON_ROWS;
use crate::simd::integer_tile::{self as tile, AVX2_ROWS, AVX512_ROWS, PAIR_STEP, PANEL, Sums, VNNI_STEP};
use crate::simd::{self, Level};

/// Depth at most: below it no sum of products of a byte with 127 overflows 32 bits.
pub const MAX_DEPTH: usize = 1 << 16;

/// Depths are padded with zeros to a multiple of this, a line of the cache.
const ALIGNMENT: usize = 64;

/// Depths and panels that all rows of a tile meet before the next ones. 14 rows of so many bytes, or 6 of twice as many,
/// stay in a first-level cache of 32 KiB, and the panels, 256 or 512 KiB, in a second-level one of 1 MiB.
const DEPTH: usize = 1024;
const PANELS: usize = 8;

/// The bytes of one row of `depth` values.
///
/// Never whole pages: rows that far apart would fight for the same few lines of the first-level cache, at 0.8 times the
/// rate.
pub fn stride(depth: usize) -> usize {
    let stride = depth.next_multiple_of(ALIGNMENT);
    if stride.is_multiple_of(4096) { stride + ALIGNMENT } else { stride }
}

/// What turns the integers of a row back into its values.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scale {
    pub factor: f32,
    /// The sum of the integers.
    sum: i32,
}

/// Rounds `values` to 8 bits. `out` holds [`stride`] bytes, of which the last are padding.
pub fn quantize(values: &[f32], out: &mut [i8]) -> Scale {
    let largest = simd::largest_magnitude(values);
    let inverse = 127.0 / largest;
    // Too small for a factor (all zero, or subnormal) or not finite: no integer says anything about the row.
    if !(inverse.is_finite() && inverse > 0.0) {
        out.fill(0);
        return Scale::default();
    }
    let (out, padding) = out.split_at_mut(values.len());
    padding.fill(0);
    let sum = simd::round_to_bytes(values, inverse, out);
    Scale { factor: largest / 127.0, sum }
}

/// Columns, each given as a contiguous row of bytes, in the order in which the micro-kernel reads them.
#[derive(Debug)]
pub struct Packed8 {
    panels: Panels,
    /// Padded to whole panels with zeros.
    factors: Vec<f32>,
    stride: usize,
}

#[derive(Debug)]
enum Panels {
    Vnni(Vec<u8>),
    Pairs(Vec<i16>),
    /// Bytes as they are.
    #[cfg(target_arch = "aarch64")]
    Bytes(Vec<i8>),
}

impl Packed8 {
    /// Packs the columns whose bytes lie [`stride`] apart.
    pub fn new(columns: &[i8], factors: &[f32], stride: usize) -> Self {
        let padded = factors.len().next_multiple_of(PANEL);
        let mut padded_factors = factors.to_vec();
        padded_factors.resize(padded, 0.0);
        #[cfg(target_arch = "aarch64")]
        if simd::multiplies_bytes() {
            let panels = Panels::Bytes(pack(columns, padded, stride, VNNI_STEP, 0, |value| value));
            return Self { panels, factors: padded_factors, stride };
        }
        let panels = if tile::uses_vnni(simd::level_of_bytes()) {
            Panels::Vnni(pack(columns, padded, stride, VNNI_STEP, 128, |value| value.cast_unsigned().wrapping_add(128)))
        } else {
            Panels::Pairs(pack(columns, padded, stride, PAIR_STEP, 0, i16::from))
        };
        Self { panels, factors: padded_factors, stride }
    }

    /// Columns with those that fill the last panel, whose products are zero.
    pub fn padded_columns(&self) -> usize {
        self.factors.len()
    }
}

/// [panel][depth / step][column][step]
fn pack<T: Copy>(
    columns: &[i8],
    padded: usize,
    stride: usize,
    step: usize,
    padding: T,
    convert: impl Fn(i8) -> T,
) -> Vec<T> {
    let mut panels = vec![padding; padded * stride];
    for (column, values) in columns.chunks_exact(stride).enumerate() {
        let panel = &mut panels[column / PANEL * PANEL * stride..][..PANEL * stride];
        for (depth, values) in values.chunks_exact(step).enumerate() {
            let out = &mut panel[(depth * PANEL + column % PANEL) * step..][..step];
            for (out, value) in out.iter_mut().zip(values) {
                *out = convert(*value);
            }
        }
    }
    panels
}

/// `out = rows · columns`, row-major (rows, padded columns), on the calling thread.
///
/// `rows` holds the bytes of as many rows as there are `scales`, [`stride`] apart.
///
/// # Panics
/// If a slice does not have the size that the others imply.
pub fn multiply(rows: &[i8], scales: &[Scale], packed: &Packed8, buffers: &mut Buffers, out: &mut [f32]) {
    let width = packed.padded_columns();
    assert_eq!(rows.len(), scales.len() * packed.stride);
    assert_eq!(out.len(), scales.len() * width);
    buffers.sums.resize(PANELS * scales.len(), [0; PANEL]);
    let panels = width / PANEL;
    for first_panel in (0..panels).step_by(PANELS) {
        let panels = first_panel..panels.min(first_panel + PANELS);
        buffers.sums.fill([0; PANEL]);
        for start in (0..packed.stride).step_by(DEPTH) {
            let depths = start..packed.stride.min(start + DEPTH);
            let mut first = 0;
            while first < scales.len() {
                let left = scales.len() - first;
                let group = match (&packed.panels, simd::level()) {
                    #[cfg(target_arch = "aarch64")]
                    (_, Level::Neon) if left >= NEON_ROWS => group::<NEON_ROWS>,
                    #[cfg(target_arch = "aarch64")]
                    (_, Level::Neon) => group::<1>,
                    (Panels::Pairs(_), Level::Plain | Level::Avx2 | Level::AvxVnni) if left >= AVX2_ROWS => {
                        group::<AVX2_ROWS>
                    }
                    (Panels::Pairs(_), Level::Plain | Level::Avx2 | Level::AvxVnni) => group::<1>,
                    _ if left >= AVX512_ROWS => group::<AVX512_ROWS>,
                    _ if left >= 4 => group::<4>,
                    _ => group::<1>,
                };
                first += group(rows, scales, packed, first, &panels, &depths, buffers, out);
            }
        }
    }
}

/// Memory that products reuse: fresh pages for each would cost as much as a small product.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Rows of a group in 16 bits.
    sixteen_bits: Vec<i16>,
    /// Sums of all rows, panel after panel.
    sums: Vec<[i32; PANEL]>,
}

/// Multiplies `ROWS` rows from `first` on with a part of the columns; returns `ROWS`.
#[expect(clippy::too_many_arguments, reason = "the ranges of the loops around it")]
fn group<const ROWS: usize>(
    rows: &[i8],
    scales: &[Scale],
    packed: &Packed8,
    first: usize,
    panels: &Range<usize>,
    depths: &Range<usize>,
    buffers: &mut Buffers,
    out: &mut [f32],
) -> usize {
    let stride = packed.stride;
    let count = depths.len();
    let rows: [&[i8]; ROWS] = parts(&rows[first * stride + depths.start..], stride, count);
    let Buffers { sixteen_bits, sums } = buffers;
    if matches!(packed.panels, Panels::Pairs(_)) {
        sixteen_bits.clear();
        rows.iter().for_each(|row| sixteen_bits.extend(row.iter().map(|&value| i16::from(value))));
    }
    for panel in panels.clone() {
        let values = (panel * stride + depths.start) * PANEL..(panel * stride + depths.end) * PANEL;
        let sums = &mut sums[(panel - panels.start) * scales.len() + first..][..ROWS];
        let sums: &mut Sums<ROWS> = sums.try_into().expect("as many as asked for");
        let biased = match &packed.panels {
            Panels::Vnni(packed) => {
                vnni(rows, &packed[values], sums);
                true
            }
            Panels::Pairs(packed) => {
                pairs(parts(sixteen_bits, count, count), &packed[values], sums);
                false
            }
            #[cfg(target_arch = "aarch64")]
            Panels::Bytes(packed) => {
                simd::multiply_bytes(rows, &packed[values], sums);
                false
            }
        };
        if depths.end == stride {
            let factors = &packed.factors[panel * PANEL..][..PANEL];
            for (row, sums) in sums.iter().enumerate() {
                let Scale { factor, sum } = scales[first + row];
                let out = &mut out[(first + row) * packed.padded_columns() + panel * PANEL..][..PANEL];
                // A row that became NaN meanwhile has any sum; what is made of it is a label or an error all the same.
                let offset = if biased { sum.wrapping_mul(128) } else { 0 };
                simd::scale_sums(sums, offset, factor, factors, out);
            }
        }
    }
    ROWS
}

/// The first `count` values of `ROWS` rows that lie `stride` apart.
fn parts<T, const ROWS: usize>(rows: &[T], stride: usize, count: usize) -> [&[T]; ROWS] {
    std::array::from_fn(|row| &rows[row * stride..row * stride + count])
}

fn vnni<const ROWS: usize>(rows: [&[i8]; ROWS], panel: &[u8], sums: &mut Sums<ROWS>) {
    let steps = panel.len() / (PANEL * VNNI_STEP);
    assert!(rows.iter().all(|row| row.len() == steps * VNNI_STEP));
    #[cfg(target_arch = "x86_64")]
    {
        let wide = match simd::level_of_bytes() {
            Level::Avx512Vnni => true,
            Level::AvxVnni => false,
            // Another level since they were packed.
            _ => simd::is_detected(Level::Avx512Vnni),
        };
        let rows = rows.map(<[i8]>::as_ptr);
        // SAFETY: a level is one that this machine was detected to have, and panels of bytes are packed only where one of
        // these two was; the sizes were checked above.
        unsafe {
            if wide {
                tile::vnni_avx512(rows, panel.as_ptr(), steps, sums);
            } else {
                tile::vnni_avx2(rows, panel.as_ptr(), steps, sums);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("panels of bytes are packed only where VNNI was detected: {steps} steps, {} rows", sums.len());
}

fn pairs<const ROWS: usize>(rows: [&[i16]; ROWS], panel: &[i16], sums: &mut Sums<ROWS>) {
    let steps = panel.len() / (PANEL * PAIR_STEP);
    assert!(rows.iter().all(|row| row.len() == steps * PAIR_STEP));
    #[cfg(target_arch = "x86_64")]
    match simd::level() {
        // SAFETY: `level` never exceeds what this machine was detected to have; the sizes were checked above.
        Level::Avx512 | Level::Avx512Vnni => unsafe {
            return tile::pairs_avx512(rows.map(<[i16]>::as_ptr), panel.as_ptr(), steps, sums);
        },
        // SAFETY: as above.
        Level::Avx2 | Level::AvxVnni => unsafe {
            return tile::pairs_avx2(rows.map(<[i16]>::as_ptr), panel.as_ptr(), steps, sums);
        },
        Level::Plain => {}
    }
    #[cfg(target_arch = "aarch64")]
    if simd::level() == Level::Neon {
        return simd::multiply_pairs(rows, panel, sums);
    }
    tile::pairs_plain(rows, panel, sums);
}
