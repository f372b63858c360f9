//! Dense maps with independent entries of variance 1/dim: the reference that the sparse sketch is measured against.

use rayon::prelude::*;

use super::Sketcher;
use crate::error::Result;
use crate::matrix::Element;
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd;

/// Outputs whose entries are drawn together: as many as one position of a stream has bits.
const COLUMNS: usize = 128;

/// Coordinates between two looks at the cancel token. Their entries fill 128 KiB.
const WAVE: usize = 256;

/// Writes the entries of one coordinate in one group of columns, before scaling.
pub type Draw = fn(seed: u64, group: usize, coordinate: u64, entries: &mut [f32; COLUMNS]);

/// ±1 from the 128 bits at (group of columns, coordinate).
pub fn rademacher(seed: u64, group: usize, coordinate: u64, entries: &mut [f32; COLUMNS]) {
    let words = Stream::new(seed, Purpose::SketchEntries, group as u32).words(coordinate);
    for (entries, word) in entries.as_chunks_mut::<32>().0.iter_mut().zip(words) {
        for (bit, entry) in entries.iter_mut().enumerate() {
            *entry = if word >> bit & 1 == 0 { 1.0 } else { -1.0 };
        }
    }
}

/// Standard normal values: Box and Muller's transform of pairs of words. Output 4q + 2h + (0, 1) of a group comes from
/// words 2h and 2h + 1 at position 32 · coordinate + q.
pub fn normal(seed: u64, group: usize, coordinate: u64, entries: &mut [f32; COLUMNS]) {
    let mut words = [[0; 4]; COLUMNS / 4];
    let first = coordinate.wrapping_mul(words.len() as u64);
    Stream::new(seed, Purpose::SketchEntries, group as u32).fill(first, &mut words);
    for (pair, words) in entries.as_chunks_mut::<2>().0.iter_mut().zip(words.as_flattened().as_chunks::<2>().0) {
        // The middle of a cell of width 2^-32: never zero, so the logarithm is finite.
        let [radius, angle] = words.map(|word| (f64::from(word) + 0.5) / 2f64.powi(32));
        let radius = (-2.0 * radius.ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * angle).sin_cos();
        *pair = [(radius * cosine) as f32, (radius * sine) as f32];
    }
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
    let scale = (sketcher.dim as f32).sqrt().recip();
    let groups = sketcher.dim.div_ceil(COLUMNS);
    progress.start(width.div_ceil(WAVE) * groups);

    // Regroup the outputs so that each group of columns, over all rows, belongs to one task.
    let mut columns: Vec<Vec<&mut [f32]>> = (0..groups).map(|_| Vec::new()).collect();
    for out in out.chunks_exact_mut(sketcher.dim) {
        for (group, out) in out.chunks_mut(COLUMNS).enumerate() {
            columns[group].push(out);
        }
    }
    columns.into_par_iter().enumerate().try_for_each(|(group, mut outs)| {
        let mut entries = vec![[0.0; COLUMNS]; WAVE];
        let mut scratch = [0.0; WAVE];
        for start in (0..width).step_by(WAVE) {
            let stop = width.min(start + WAVE);
            for (column, entries) in (start..stop).zip(&mut entries) {
                draw(sketcher.seed, group, offset + column as u64, entries);
                entries.iter_mut().for_each(|entry| *entry *= scale);
            }
            for (row, out) in values.chunks_exact(width).zip(&mut outs) {
                let row = T::widen(&row[start..stop], &mut scratch);
                for (value, entries) in row.iter().zip(&entries) {
                    simd::add_scaled(out, *value, entries);
                }
            }
            progress.advance(1)?;
        }
        Ok(())
    })
}
