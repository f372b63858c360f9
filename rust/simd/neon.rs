//! What the kernels of the other files are on AArch64, where NEON is part of every processor.
//!
//! Instructions that the oldest compiler we build with has no function for are named.

use std::arch::aarch64::*;
use std::arch::asm;

use super::element::{AHEAD, FAR_AHEAD, Run, WORD, signs_at};
use super::integer_tile::{PAIR_STEP, PANEL, Sums, VNNI_STEP};
use super::register::Register;
use super::tile::PanelRow;
use super::{Level, level};

const LANES: usize = 4;

/// An element of which four widen at once.
pub trait Narrow: super::Element {
    fn widen_four(values: &[Self; LANES]) -> float32x4_t;
}

impl Narrow for f32 {
    #[inline(always)]
    fn widen_four(values: &[Self; LANES]) -> float32x4_t {
        // SAFETY: there are four values.
        unsafe { vld1q_f32(values.as_ptr()) }
    }
}

impl Narrow for half::f16 {
    #[inline(always)]
    fn widen_four(values: &[Self; LANES]) -> float32x4_t {
        // SAFETY: there are four values; the instruction reads and writes registers alone.
        unsafe {
            let widened: float32x4_t;
            let values = vld1_u16(values.as_ptr().cast());
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) widened, in(vreg) values, options(pure, nomem, nostack, preserves_flags));
            widened
        }
    }
}

impl Narrow for half::bf16 {
    #[inline(always)]
    fn widen_four(values: &[Self; LANES]) -> float32x4_t {
        // SAFETY: there are four values.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(values.as_ptr().cast()))) }
    }
}

/// One value in the hardware's conversion.
#[inline(always)]
pub fn f16_to_f32(value: half::f16) -> f32 {
    let widened: f32;
    // SAFETY: the instruction reads and writes registers alone.
    unsafe {
        let bits = f32::from_bits(u32::from(value.to_bits()));
        asm!("fcvt {0:s}, {1:h}", out(vreg) widened, in(vreg) bits, options(pure, nomem, nostack, preserves_flags));
    }
    widened
}

pub fn widen<T: Narrow>(values: &[T], out: &mut [f32]) {
    let (values, values_tail) = values.as_chunks::<LANES>();
    let (out, out_tail) = out.as_chunks_mut::<LANES>();
    for (values, out) in values.iter().zip(out) {
        // SAFETY: there are four outputs.
        unsafe { vst1q_f32(out.as_mut_ptr(), T::widen_four(values)) };
    }
    for (out, value) in out_tail.iter_mut().zip(values_tail) {
        *out = value.to_f32();
    }
}

/// As [`super::Element::add_signed`].
pub fn add_signed<T: Narrow>(
    sums: &mut [f32],
    scale: f32,
    values: &[T],
    signs: &[u32],
    first: usize,
    runs: &[Run],
    far: bool,
) {
    // SAFETY: there are four shifts, and four sums to each register.
    unsafe {
        let (scales, sign) = (vdupq_n_f32(scale), vdupq_n_u32(1 << 31));
        let shifts = vld1q_s32([31, 30, 29, 28].as_ptr());
        for run in runs {
            let sums = sums[run.sum..][..run.count].chunks_mut(WORD);
            let values = values[run.value..][..run.count].chunks(WORD);
            let mut bit = first + run.value;
            for (sums, values) in sums.zip(values) {
                for line in values.chunks(64 / size_of::<T>()) {
                    let line = line.as_ptr().cast::<u8>();
                    if far {
                        prefetch::<true>(line.wrapping_add(FAR_AHEAD));
                    }
                    prefetch::<false>(line.wrapping_add(AHEAD));
                }
                let mut word = signs_at(signs, bit);
                bit += WORD;
                let (sums, sums_tail) = sums.as_chunks_mut::<LANES>();
                let (values, values_tail) = values.as_chunks::<LANES>();
                for (sums, values) in sums.iter_mut().zip(values) {
                    let signs = vandq_u32(vshlq_u32(vdupq_n_u32(word), shifts), sign);
                    let term = vreinterpretq_u32_f32(vmulq_f32(scales, T::widen_four(values)));
                    let term = vreinterpretq_f32_u32(veorq_u32(term, signs));
                    vst1q_f32(sums.as_mut_ptr(), vaddq_f32(vld1q_f32(sums.as_ptr()), term));
                    word >>= LANES;
                }
                for (lane, (sum, value)) in sums_tail.iter_mut().zip(values_tail).enumerate() {
                    *sum += f32::from_bits((scale * value.to_f32()).to_bits() ^ (word >> lane) << 31);
                }
            }
        }
    }
}

/// As [`super::spread_signs`].
pub fn spread_signs(rows: &mut [PanelRow], words: &[u32], scale: f32) {
    // SAFETY: there are four shifts, and four columns to each register.
    unsafe {
        let (scale, sign) = (vreinterpretq_u32_f32(vdupq_n_f32(scale)), vdupq_n_u32(1 << 31));
        let shifts = vld1q_s32([31, 30, 29, 28].as_ptr());
        for (row, word) in rows.iter_mut().zip(words) {
            for (part, columns) in row.0.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let signs = vandq_u32(vshlq_u32(vdupq_n_u32(word >> (LANES * part)), shifts), sign);
                vst1q_f32(columns.as_mut_ptr(), vreinterpretq_f32_u32(vorrq_u32(scale, signs)));
            }
        }
    }
}

/// `sum + left * right`, rounded once.
///
/// # Safety
/// Every AArch64 has NEON.
#[inline(always)]
pub unsafe fn fuse(left: float32x4_t, right: float32x4_t, sum: float32x4_t) -> float32x4_t {
    // SAFETY: as above.
    unsafe { vfmaq_f32(sum, left, right) }
}

/// Asks for the line of the cache in which a value lies: for the first cache, or for the second if it is `FAR` ahead.
#[inline(always)]
pub fn prefetch<const FAR: bool>(line: *const u8) {
    // SAFETY: a prefetch has no effect that a program could see.
    unsafe {
        if FAR {
            asm!("prfm pldl2keep, [{0}]", in(reg) line, options(readonly, nostack, preserves_flags));
        } else {
            asm!("prfm pldl1keep, [{0}]", in(reg) line, options(readonly, nostack, preserves_flags));
        }
    }
}

impl Register for float32x4_t {
    type Number = f32;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: NEON is part of every processor, as below.
        unsafe { vdupq_n_f32(0.0) }
    }

    #[inline(always)]
    unsafe fn load(values: *const f32) -> Self {
        // SAFETY: promised by the caller.
        unsafe { vld1q_f32(values) }
    }

    #[inline(always)]
    unsafe fn load_first(values: *const f32, count: usize) -> Self {
        // SAFETY: promised by the caller.
        unsafe { vld1q_f32(<[f32; 4]>::load_first(values, count).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { vmulq_f32(self, other) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { vaddq_f32(self, other) }
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { vsubq_f32(self, other) }
    }

    #[inline(always)]
    unsafe fn fold(self) -> f32 {
        // SAFETY: as above.
        unsafe {
            let halves = vadd_f32(vget_low_f32(self), vget_high_f32(self));
            vget_lane_f32::<0>(halves) + vget_lane_f32::<1>(halves)
        }
    }
}

impl Register for float64x2_t {
    type Number = f64;
    const LANES: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: NEON is part of every processor, as below.
        unsafe { vdupq_n_f64(0.0) }
    }

    #[inline(always)]
    unsafe fn load(values: *const f64) -> Self {
        // SAFETY: promised by the caller.
        unsafe { vld1q_f64(values) }
    }

    #[inline(always)]
    unsafe fn load_first(values: *const f64, count: usize) -> Self {
        // SAFETY: promised by the caller.
        unsafe { vld1q_f64(<[f64; 2]>::load_first(values, count).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { vmulq_f64(self, other) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { vaddq_f64(self, other) }
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        // SAFETY: as above.
        unsafe { vsubq_f64(self, other) }
    }

    #[inline(always)]
    unsafe fn fold(self) -> f64 {
        // SAFETY: as above.
        unsafe { vgetq_lane_f64::<0>(self) + vgetq_lane_f64::<1>(self) }
    }
}

/// Whether products of bytes are one instruction.
pub fn multiplies_bytes() -> bool {
    level() == Level::Neon && std::arch::is_aarch64_feature_detected!("dotprod")
}

/// Rows of a tile of the 8-bit product: 6 × 4 sums of half a panel, 4 registers of columns and one broadcast.
pub const NEON_ROWS: usize = 6;

/// Columns of a panel whose sums stay in registers at once.
const COLUMNS: usize = 16;

/// As [`super::integer_tile::pairs_plain`].
///
/// # Panics
/// If the rows have another depth than the panel.
pub fn multiply_pairs<const ROWS: usize>(rows: [&[i16]; ROWS], panel: &[i16], sums: &mut Sums<ROWS>) {
    let (panel, _) = panel.as_chunks::<{ PAIR_STEP * PANEL }>();
    assert!(rows.iter().all(|row| row.len() == PAIR_STEP * panel.len()));
    for first in (0..PANEL).step_by(COLUMNS) {
        // SAFETY: a register of pairs is four columns; those from `first` on lie within the panel.
        unsafe {
            let mut lanes = [[vdupq_n_s32(0); COLUMNS / LANES]; ROWS];
            for (step, columns) in panel.iter().enumerate() {
                let columns: [int16x4x2_t; COLUMNS / LANES] =
                    std::array::from_fn(|part| vld2_s16(columns[PAIR_STEP * (first + LANES * part)..].as_ptr()));
                for (row, lanes) in rows.iter().zip(&mut lanes) {
                    let values = &row[PAIR_STEP * step..][..PAIR_STEP];
                    for (lanes, columns) in lanes.iter_mut().zip(&columns) {
                        *lanes = vmlal_n_s16(vmlal_n_s16(*lanes, columns.0, values[0]), columns.1, values[1]);
                    }
                }
            }
            add(sums, &lanes, first);
        }
    }
}

/// `sums[r][c] += Σ rows[r][p] · panel[p][c]`, where four depths of a column lie side by side in the panel.
///
/// # Panics
/// If the rows have another depth than the panel, or the machine has no products of bytes.
pub fn multiply_bytes<const ROWS: usize>(rows: [&[i8]; ROWS], panel: &[i8], sums: &mut Sums<ROWS>) {
    let (panel, _) = panel.as_chunks::<{ VNNI_STEP * PANEL }>();
    assert!(rows.iter().all(|row| row.len() == VNNI_STEP * panel.len()));
    assert!(std::arch::is_aarch64_feature_detected!("dotprod"));
    // SAFETY: it was just asserted that the machine has the instruction.
    unsafe { bytes(rows, panel, sums) }
}

#[target_feature(enable = "dotprod")]
fn bytes<const ROWS: usize>(rows: [&[i8]; ROWS], panel: &[[i8; VNNI_STEP * PANEL]], sums: &mut Sums<ROWS>) {
    for first in (0..PANEL).step_by(COLUMNS) {
        let mut lanes = [[vdupq_n_s32(0); COLUMNS / LANES]; ROWS];
        for (step, columns) in panel.iter().enumerate() {
            let mut registers = [vdupq_n_s8(0); COLUMNS / LANES];
            for (part, register) in registers.iter_mut().enumerate() {
                // SAFETY: a register of bytes is four columns, which lie within the panel.
                *register = unsafe { vld1q_s8(columns[VNNI_STEP * (first + LANES * part)..].as_ptr()) };
            }
            for (row, lanes) in rows.iter().zip(&mut lanes) {
                let values = row[VNNI_STEP * step..]
                    .first_chunk()
                    .map_or(0, |values| i32::from_ne_bytes(values.map(i8::cast_unsigned)));
                let values = vdupq_n_s32(values);
                for (lanes, columns) in lanes.iter_mut().zip(&registers) {
                    // SAFETY: the instruction reads and writes registers alone.
                    unsafe {
                        asm!(
                            "sdot {0:v}.4s, {1:v}.16b, {2:v}.16b",
                            inout(vreg) *lanes,
                            in(vreg) *columns,
                            in(vreg) values,
                            options(pure, nomem, nostack, preserves_flags),
                        );
                    }
                }
            }
        }
        add(sums, &lanes, first);
    }
}

/// Adds registers to the sums from column `first` on.
#[inline(always)]
fn add<const ROWS: usize>(sums: &mut Sums<ROWS>, lanes: &[[int32x4_t; COLUMNS / LANES]; ROWS], first: usize) {
    for (sums, lanes) in sums.iter_mut().zip(lanes) {
        for (sums, lanes) in sums[first..].as_chunks_mut::<LANES>().0.iter_mut().zip(lanes) {
            // SAFETY: there are four sums.
            unsafe { vst1q_s32(sums.as_mut_ptr(), vaddq_s32(vld1q_s32(sums.as_ptr()), *lanes)) };
        }
    }
}
