//! Dense maps with independent entries of variance 1/dim: the reference that the sparse sketch is measured against.
//!
//! The entries are drawn a slice of the coordinates at a time, straight into the panels of a matrix product, which adds the
//! slice to the sketches of all rows before the next one is drawn.

use rayon::prelude::*;

use super::Sketcher;
use crate::error::Result;
use crate::gemm::{PANEL, Packed, PanelRow, Strided, multiply_add};
use crate::matrix::Element;
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd::{dispatch, spread_signs};

/// Columns that are drawn by one task: each value of a gradient that is read meets so many entries.
const COLUMNS: usize = 4 * PANEL;

/// Bytes that one task takes for each row.
pub const SUMS: usize = size_of::<f32>() * COLUMNS + 2 * size_of::<&[f32]>();

/// Coordinates that are drawn at a time: 128 KiB of entries, an eighth of a second-level cache.
const SLICE: usize = 256;

/// Rows that are widened at a time, of a slice each: 48 KiB.
const ROWS: usize = 48;

/// Rows of a task at least, where there are more threads than panels: fewer would not pay for drawing the entries again.
const MIN_ROWS: usize = 64;

/// Draws the entries of consecutive coordinates in one panel.
pub type Draw = fn(panel: &mut [PanelRow], stream: &Stream, first: u64, scale: f32);

/// ±`scale`: bit j of word c % 4 at position c / 4 is the sign of column j at coordinate c.
pub fn rademacher(panel: &mut [PanelRow], stream: &Stream, first: u64, scale: f32) {
    const POSITIONS: usize = 32;
    let mut words = [[0; 4]; POSITIONS];
    let mut position = first / 4;
    let mut skip = (first % 4) as usize;
    let mut rest = panel;
    while !rest.is_empty() {
        let count = rest.len().min(4 * POSITIONS - skip);
        let words = &mut words[..(skip + count).div_ceil(4)];
        stream.fill(position, words);
        let (rows, later) = rest.split_at_mut(count);
        spread_signs(rows, &words.as_flattened()[skip..], scale);
        rest = later;
        position += words.len() as u64;
        skip = 0;
    }
}

/// Normal entries of standard deviation `scale`: the transform of Box and Muller. Columns j and 16 + j of coordinate c come
/// from words j and 16 + j of the eight positions from 8 · c on.
pub fn normal(panel: &mut [PanelRow], stream: &Stream, first: u64, scale: f32) {
    const COORDINATES: usize = 16;
    const POSITIONS: usize = PANEL / 4;
    let mut words = [[0; 4]; COORDINATES * POSITIONS];
    let mut position = first.wrapping_mul(POSITIONS as u64);
    for rows in panel.chunks_mut(COORDINATES) {
        let words = &mut words[..rows.len() * POSITIONS];
        stream.fill(position, words);
        transform(rows, words.as_flattened(), scale);
        position = position.wrapping_add(words.len() as u64);
    }
}

dispatch! {
    /// Takes 16 words for the radii and 16 for the angles of a row.
    fn transform(rows: &mut [PanelRow], words: &[u32], scale: f32) {
        for (row, words) in rows.iter_mut().zip(words.as_chunks::<PANEL>().0) {
            for lane in 0..PANEL / 2 {
                let radius = scale * minus_twice_log(words[lane]).sqrt();
                let (sine, cosine) = sine_cosine(words[PANEL / 2 + lane]);
                row.0[lane] = radius * cosine;
                row.0[PANEL / 2 + lane] = radius * sine;
            }
        }
    }
}

/// −2 ln u of the number u in (0, 1] that stands at the middle of the cell `word` of width 2^-32.
///
/// Written out, like the functions below, because those of a system's library differ in the last bits. Both polynomials
/// were fitted at the nodes of Chebyshev; this one is off by 4e-7 at most, in proportion.
#[inline(always)]
fn minus_twice_log(word: u32) -> f32 {
    const CELL: f32 = 1.0 / (1u64 << 32) as f32;
    const HALF_SQUARE_ROOT: i32 = std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32;
    // u = 2^exponent · (1 + x), with 1 + x from √½ to √2.
    let bits = (word as f32).mul_add(CELL, CELL / 2.0).to_bits() as i32;
    let exponent = (bits - HALF_SQUARE_ROOT) >> 23;
    let x = f32::from_bits((bits - (exponent << 23)) as u32) - 1.0;
    let series =
        [0.202_681_14, -0.324_683_8, 0.344_940_27, -0.397_971_3, 0.499_401_42, -0.666_702_3, 1.000_007_3, -1.999_999_9];
    let ratio = series[1..].iter().fold(series[0], |sum, coefficient| f32::mul_add(sum, x, *coefficient));
    (exponent as f32).mul_add(-2.0 * std::f32::consts::LN_2, x * ratio)
}

/// Sine and cosine of an angle that is uniform over the circle: bits 0 to 29 of `word` choose a point of the quarter around
/// the first axis, the others one of the four quarters.
#[inline(always)]
fn sine_cosine(word: u32) -> (f32, f32) {
    // From −1 to 1 for −π/4 to π/4.
    let angle = ((word << 2) as i32) as f32 * (1.0 / (1u32 << 31) as f32);
    let square = angle * angle;
    let series = |coefficients: [f32; 4]| {
        coefficients[1..].iter().fold(coefficients[0], |sum, coefficient| f32::mul_add(sum, square, *coefficient))
    };
    let along = series([-0.000_318_879, 0.015_849_913, -0.308_424_26, 1.0]);
    let across = angle * series([-3.595_44e-5, 0.002_490_006_9, -0.080_745_436, std::f32::consts::FRAC_PI_4]);
    let along = f32::from_bits(along.to_bits() ^ (word << 1 & 1 << 31));
    if word >> 31 == 0 { (across, along) } else { (along, across) }
}

pub fn add<T: Element>(
    sketcher: &Sketcher,
    draw: Draw,
    values: &[T],
    width: usize,
    offset: u64,
    out: &mut [f32],
    progress: &Progress,
) -> Result<()> {
    let tasks = tasks(sketcher, values, width, out);
    progress.start(tasks.len() * width.div_ceil(SLICE));
    tasks.into_par_iter().try_for_each(|task| task.add(sketcher, draw, offset, progress))
}

/// Some rows of gradients and some columns of their sketches.
struct Task<'t, T> {
    rows: Vec<&'t [T]>,
    first_panel: usize,
    outs: Vec<&'t mut [f32]>,
}

/// Cuts the columns into as many groups as there are threads or more, and the rows where there are fewer panels than
/// threads. An output belongs to one task, so the cut does not change any bit.
fn tasks<'t, T>(sketcher: &Sketcher, values: &'t [T], width: usize, out: &'t mut [f32]) -> Vec<Task<'t, T>> {
    let threads = rayon::current_num_threads();
    let panels = sketcher.dim.div_ceil(PANEL);
    let groups = sketcher.dim.div_ceil(COLUMNS).next_multiple_of(threads).min(panels);
    let bounds: Vec<usize> = (0..=groups).map(|group| group * panels / groups).collect();
    let rows = values.len() / width;
    let parts = threads.div_ceil(groups).min(rows / MIN_ROWS).max(1);
    let size = rows.div_ceil(parts);
    let mut tasks = Vec::with_capacity(groups * parts);
    for (values, out) in values.chunks(size * width).zip(out.chunks_mut(size * sketcher.dim)) {
        let first_task = tasks.len();
        let rows: Vec<&[T]> = values.chunks_exact(width).collect();
        tasks.extend(bounds[..groups].iter().map(|&first_panel| Task {
            rows: rows.clone(),
            first_panel,
            outs: Vec::with_capacity(rows.len()),
        }));
        for mut row in out.chunks_exact_mut(sketcher.dim) {
            for (task, bounds) in tasks[first_task..].iter_mut().zip(bounds.windows(2)) {
                let columns = ((bounds[1] - bounds[0]) * PANEL).min(row.len());
                let (out, rest) = row.split_at_mut(columns);
                task.outs.push(out);
                row = rest;
            }
        }
    }
    tasks
}

impl<T: Element> Task<'_, T> {
    fn add(mut self, sketcher: &Sketcher, draw: Draw, offset: u64, progress: &Progress) -> Result<()> {
        let scale = (sketcher.dim as f32).sqrt().recip();
        let width = self.rows[0].len();
        let columns = self.outs[0].len();
        let mut entries = Packed::zeros(0, columns);
        let padded = entries.padded_columns();
        let mut sums = vec![0.0; self.rows.len() * padded];
        for (sums, out) in sums.chunks_exact_mut(padded).zip(&self.outs) {
            sums[..columns].copy_from_slice(out);
        }
        let mut widened = vec![0.0; ROWS * SLICE];
        for start in (0..width).step_by(SLICE) {
            let stop = width.min(start + SLICE);
            for (index, panel) in entries.refill(stop - start).enumerate() {
                let stream = Stream::new(sketcher.seed, Purpose::SketchEntries, (self.first_panel + index) as u32);
                draw(panel, &stream, offset + start as u64, scale);
            }
            for (rows, sums) in self.rows.chunks(ROWS).zip(sums.chunks_mut(ROWS * padded)) {
                for (row, widened) in rows.iter().zip(widened.chunks_exact_mut(SLICE)) {
                    T::widen(&row[start..stop], widened);
                }
                multiply_add(Strided { values: &widened, stride: SLICE }, &entries, sums);
                progress.check()?;
            }
            progress.advance(1)?;
        }
        for (sums, out) in sums.chunks_exact(padded).zip(&mut self.outs) {
            out.copy_from_slice(&sums[..columns]);
        }
        Ok(())
    }
}
