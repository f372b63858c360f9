//! Rotated blocks: a count sketch whose hash is injective inside a block.
//!
//! With m = dim / nnz, repetition s fills outputs s·m to (s + 1)·m. It cuts the coordinates into blocks of m; the values
//! of a block are multiplied by random signs and by 1/√nnz, rotated by a random offset, and added to the m outputs. Loads
//! and stores are contiguous, so it runs at about the speed of memory.
//!
//! Two coordinates of one block never meet; two of different blocks meet with probability 1/m in each repetition, with
//! independent signs. So the estimate of an inner product is unbiased, with a variance of about ‖x‖²‖y‖²/dim. That the
//! repetitions have outputs of their own is the block construction of Kane and Nelson, "Sparser Johnson-Lindenstrauss
//! transforms" (JACM 2014).

use std::ops::Range;

use rayon::prelude::*;

use super::Sketcher;
use crate::error::Result;
use crate::matrix::Element;
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd;

/// Coordinates between two looks at the cancel token. Their signs are drawn once for all rows and fill 128 KiB, which
/// stays in the second-level cache.
const WAVE: u64 = 1 << 20;

/// Signs from one position of a stream.
const SIGNS: u64 = 128;

/// Coordinates that are widened at once: 16 KiB of float32.
const CHUNK: usize = 4096;

/// Outputs that one task fills at least, where there are fewer rows than threads.
const MIN_OUTPUTS: usize = 256;

pub fn add<T: Element>(
    sketcher: &Sketcher,
    values: &[T],
    width: usize,
    offset: u64,
    out: &mut [f32],
    progress: &Progress,
) -> Result<()> {
    let end = offset + width as u64;
    let waves = (end - 1) / WAVE - offset / WAVE + 1;
    progress.start(waves as usize * sketcher.nnz);
    let mut signs = Vec::new();
    let mut start = offset;
    while start < end {
        // Waves lie on a fixed grid, so a word of signs never straddles two.
        let stop = end.min((start / WAVE + 1) * WAVE);
        for repetition in 0..sketcher.nnz {
            let map = Map::new(sketcher, repetition);
            let first_sign = map.draw_signs(start..stop, &mut signs);
            let columns = (start - offset) as usize..(stop - offset) as usize;
            map.tasks(values, width, out).into_par_iter().for_each(|mut task| {
                task.add(&map, &columns, start, &signs, first_sign);
            });
            progress.advance(1)?;
        }
        start = stop;
    }
    Ok(())
}

/// One repetition.
struct Map {
    /// The outputs of this repetition within a row of the sketch.
    outputs: Range<usize>,
    dim: usize,
    scale: f32,
    signs: Stream,
    rotations: Stream,
}

impl Map {
    fn new(sketcher: &Sketcher, repetition: usize) -> Self {
        let size = sketcher.dim / sketcher.nnz;
        Self {
            outputs: repetition * size..(repetition + 1) * size,
            dim: sketcher.dim,
            scale: (sketcher.nnz as f32).sqrt().recip(),
            signs: Stream::new(sketcher.seed, Purpose::SketchSigns, repetition as u32),
            rotations: Stream::new(sketcher.seed, Purpose::SketchRotations, repetition as u32),
        }
    }

    /// Draws a sign bit for each coordinate; returns the coordinate of the first bit.
    fn draw_signs(&self, coordinates: Range<u64>, signs: &mut Vec<[u32; 4]>) -> u64 {
        let positions = coordinates.start / SIGNS..coordinates.end.div_ceil(SIGNS);
        signs.resize((positions.end - positions.start) as usize, [0; 4]);
        signs.par_chunks_mut(CHUNK / 4).enumerate().for_each(|(chunk, words)| {
            self.signs.fill(positions.start + (chunk * CHUNK / 4) as u64, words);
        });
        positions.start * SIGNS
    }

    /// One task for each row, or several that share the outputs of a row where there are more threads than rows. An
    /// output belongs to one task, so the cut does not change any bit.
    fn tasks<'t, T: Element>(&self, values: &'t [T], width: usize, out: &'t mut [f32]) -> Vec<Task<'t, T>> {
        let rows = values.len() / width;
        let parts = rayon::current_num_threads().div_ceil(rows).min(self.outputs.len() / MIN_OUTPUTS).max(1);
        let size = self.outputs.len().div_ceil(parts);
        let mut tasks = Vec::with_capacity(rows * parts);
        for (row, out) in values.chunks_exact(width).zip(out.chunks_exact_mut(self.dim)) {
            for (part, out) in out[self.outputs.clone()].chunks_mut(size).enumerate() {
                tasks.push(Task { row, first_output: part * size, out });
            }
        }
        tasks
    }
}

/// One row, and consecutive outputs of a repetition.
struct Task<'t, T> {
    row: &'t [T],
    first_output: usize,
    out: &'t mut [f32],
}

impl<T: Element> Task<'_, T> {
    /// Adds those of `columns` that meet these outputs. The first column is coordinate `start`.
    fn add(&mut self, map: &Map, columns: &Range<usize>, start: u64, signs: &[[u32; 4]], first_sign: u64) {
        let size = map.outputs.len() as u64;
        let end = start + columns.len() as u64;
        let (first_output, end_output) = (self.first_output as u64, (self.first_output + self.out.len()) as u64);
        let mut scratch = [0.0; CHUNK];
        for block in start / size..=(end - 1) / size {
            let rotation = map.rotations.below(block, map.outputs.len()) as u64;
            // A rotated block is two runs: (first position, first output, length).
            for (position, output, length) in [(0, rotation, size - rotation), (size - rotation, 0, rotation)] {
                // What lies before or after the coordinates and outputs at hand is skipped.
                let coordinate = block * size + position;
                let skip = start.saturating_sub(coordinate).max(first_output.saturating_sub(output));
                let stop = length.min(end.saturating_sub(coordinate)).min(end_output.saturating_sub(output));
                if skip >= stop {
                    continue;
                }
                let count = (stop - skip) as usize;
                let out = &mut self.out[(output + skip - first_output) as usize..][..count];
                let row = &self.row[columns.start + (coordinate + skip - start) as usize..][..count];
                let mut sign = (coordinate + skip - first_sign) as usize;
                for (out, values) in out.chunks_mut(CHUNK).zip(row.chunks(CHUNK)) {
                    simd::add_signed(out, map.scale, T::widen(values, &mut scratch), signs.as_flattened(), sign);
                    sign += values.len();
                }
            }
        }
    }
}
