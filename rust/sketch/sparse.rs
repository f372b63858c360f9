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
use crate::rng::{Purpose, Stream, below};
use crate::simd::Run;

/// Coordinates between two looks at the cancel token. Their signs are drawn once for all rows and fill 128 KiB, which
/// stays in the second-level cache.
const WAVE: u64 = 1 << 20;

/// Coordinates of one row that meet all repetitions before the next ones: 256 KiB of float32, which come from memory
/// once and from the second-level cache after that.
const STRETCH: u64 = 1 << 16;

/// Signs from one position of a stream.
const SIGNS: u64 = 128;

/// Positions that one thread draws at a time.
const POSITIONS: usize = 1024;

/// Coordinates for each output from which on a stretch is added up on the side, where the sums lie as the kernels like them.
const ASIDE: usize = 32;

/// Values before and after such sums, so that they begin at a line of the cache and whole registers may be stored.
const MARGIN: usize = 16;

/// Runs that are added by one call.
const RUNS: usize = 128;

/// Outputs that one task fills at least, where there are few rows for the threads.
const MIN_OUTPUTS: usize = 256;

/// Tasks for each thread at least, so that no thread waits long for another at the end of a wave.
const TASKS: usize = 4;

/// Outputs of a repetition from which on values are fetched far ahead. Measured as the distance was: at 2048 outputs it
/// gained 7 % for float32 and lost 4 % for float16, at 1024 it lost a tenth for half precision. By the length of a run
/// instead, it missed the short runs of long blocks; for the first repetition only, it changed nothing.
const FAR_OUTPUTS: usize = 4096;

/// Coordinates of a wave: with many repetitions a shorter one keeps their signs in the cache.
pub fn wave(nnz: usize) -> u64 {
    (WAVE / nnz.next_power_of_two() as u64).max(STRETCH)
}

pub fn add<T: Element>(
    sketcher: &Sketcher,
    values: &[T],
    width: usize,
    offset: u64,
    out: &mut [f32],
    progress: &Progress,
) -> Result<()> {
    let end = offset + width as u64;
    let wave = wave(sketcher.nnz);
    progress.start(((end - 1) / wave - offset / wave + 1) as usize);
    let mut repetitions: Vec<Repetition> = (0..sketcher.nnz).map(|index| Repetition::new(sketcher, index)).collect();
    let scale = (sketcher.nnz as f32).sqrt().recip();
    let mut start = offset;
    while start < end {
        // Waves lie on a fixed grid, so a word of signs never straddles two.
        let stop = end.min((start / wave + 1) * wave);
        for repetition in &mut repetitions {
            progress.check()?;
            repetition.draw(start..stop);
        }
        let columns = (start - offset) as usize..(stop - offset) as usize;
        tasks(sketcher, values, width, out).into_par_iter().try_for_each(|mut task| {
            let row = &task.row[columns.clone()];
            let mut first = start;
            for row in row.chunks(STRETCH as usize) {
                for (index, repetition) in repetitions.iter().enumerate() {
                    progress.check()?;
                    task.add(index, repetition, row, first, scale);
                }
                first += row.len() as u64;
            }
            Ok(())
        })?;
        progress.advance(1)?;
        start = stop;
    }
    Ok(())
}

/// What one repetition does to the coordinates of a wave.
struct Repetition {
    /// How many outputs it has; the length of a block.
    outputs: usize,
    sign_stream: Stream,
    rotation_stream: Stream,
    signs: Vec<[u32; 4]>,
    /// The coordinate of the first sign.
    first_sign: u64,
    rotations: Vec<[u32; 4]>,
    /// The block of the first rotation.
    first_block: u64,
}

impl Repetition {
    fn new(sketcher: &Sketcher, index: usize) -> Self {
        Self {
            outputs: sketcher.dim / sketcher.nnz,
            sign_stream: Stream::new(sketcher.seed, Purpose::SketchSigns, index as u32),
            rotation_stream: Stream::new(sketcher.seed, Purpose::SketchRotations, index as u32),
            signs: Vec::new(),
            first_sign: 0,
            rotations: Vec::new(),
            first_block: 0,
        }
    }

    /// Draws a sign bit for each coordinate and a rotation for each block.
    fn draw(&mut self, coordinates: Range<u64>) {
        let size = self.outputs as u64;
        self.first_sign = coordinates.start / SIGNS * SIGNS;
        self.first_block = coordinates.start / size;
        fill(&self.sign_stream, coordinates.start / SIGNS..coordinates.end.div_ceil(SIGNS), &mut self.signs);
        fill(&self.rotation_stream, self.first_block..coordinates.end.div_ceil(size), &mut self.rotations);
    }

    fn rotation(&self, block: u64) -> u64 {
        below(self.rotations[(block - self.first_block) as usize], self.outputs) as u64
    }

    /// Adds those of `values` that meet a part of the outputs. The first value is coordinate `start`, and the sum of the first
    /// output is `sums[margin]`.
    fn add<T: Element>(
        &self,
        values: &[T],
        start: u64,
        scale: f32,
        part: &Range<usize>,
        sums: &mut [f32],
        margin: usize,
    ) {
        let size = self.outputs as u64;
        let end = start + values.len() as u64;
        let (first_output, end_output) = (part.start as u64, part.end as u64);
        let signs = self.signs.as_flattened();
        let first = (start - self.first_sign) as usize;
        let far = self.outputs >= FAR_OUTPUTS;
        let mut runs = Vec::with_capacity(RUNS);
        for block in start / size..=(end - 1) / size {
            let rotation = self.rotation(block);
            // A rotated block is two runs: (first position, first output, length).
            for (position, output, length) in [(0, rotation, size - rotation), (size - rotation, 0, rotation)] {
                // What lies before or after the coordinates and outputs at hand is skipped.
                let coordinate = block * size + position;
                let skip = start.saturating_sub(coordinate).max(first_output.saturating_sub(output));
                let stop = length.min(end.saturating_sub(coordinate)).min(end_output.saturating_sub(output));
                if skip < stop {
                    runs.push(Run {
                        value: (coordinate + skip - start) as usize,
                        sum: margin + (output + skip - first_output) as usize,
                        count: (stop - skip) as usize,
                    });
                }
            }
            if runs.len() + 2 > RUNS {
                T::add_signed(sums, scale, values, signs, first, &runs, far);
                runs.clear();
            }
        }
        T::add_signed(sums, scale, values, signs, first, &runs, far);
    }
}

fn fill(stream: &Stream, positions: Range<u64>, words: &mut Vec<[u32; 4]>) {
    words.resize((positions.end - positions.start) as usize, [0; 4]);
    words.par_chunks_mut(POSITIONS).enumerate().for_each(|(chunk, words)| {
        stream.fill(positions.start + (chunk * POSITIONS) as u64, words);
    });
}

/// One row, and the same part of the outputs of each repetition.
struct Task<'t, T> {
    row: &'t [T],
    /// Outputs of a repetition.
    part: Range<usize>,
    /// The part of each repetition.
    outs: Vec<&'t mut [f32]>,
    /// The sums of a repetition and what surrounds them.
    aside: Vec<f32>,
}

/// One task for each row, or several that share the outputs of a row where there are few rows for the threads. An output
/// belongs to one task, so the cut does not change any bit.
fn tasks<'t, T>(sketcher: &Sketcher, values: &'t [T], width: usize, out: &'t mut [f32]) -> Vec<Task<'t, T>> {
    let size = sketcher.dim / sketcher.nnz;
    let rows = values.len() / width;
    let threads = rayon::current_num_threads();
    let parts = if rows.is_multiple_of(threads) { 1 } else { (TASKS * threads).div_ceil(rows) };
    let part_size = size.div_ceil(parts.min(size / MIN_OUTPUTS).max(1));
    let mut tasks = Vec::with_capacity(rows * size.div_ceil(part_size));
    for (row, out) in values.chunks_exact(width).zip(out.chunks_exact_mut(sketcher.dim)) {
        let first_task = tasks.len();
        tasks.extend((0..size).step_by(part_size).map(|start| Task {
            row,
            part: start..size.min(start + part_size),
            outs: Vec::with_capacity(sketcher.nnz),
            aside: Vec::new(),
        }));
        for out in out.chunks_exact_mut(size) {
            for (task, out) in tasks[first_task..].iter_mut().zip(out.chunks_mut(part_size)) {
                task.outs.push(out);
            }
        }
    }
    tasks
}

impl<T: Element> Task<'_, T> {
    /// Adds those of `values` that meet the outputs of this task in one repetition. The first value is coordinate `start`.
    fn add(&mut self, index: usize, repetition: &Repetition, values: &[T], start: u64, scale: f32) {
        let out = &mut *self.outs[index];
        if values.len() < ASIDE * out.len() {
            return repetition.add(values, start, scale, &self.part, out, 0);
        }
        self.aside.resize(out.len() + 3 * MARGIN, 0.0);
        let margin = MARGIN + self.aside[MARGIN..].as_ptr().align_offset(MARGIN * size_of::<f32>());
        self.aside[margin..][..out.len()].copy_from_slice(out);
        repetition.add(values, start, scale, &self.part, &mut self.aside, margin);
        out.copy_from_slice(&self.aside[margin..][..out.len()]);
    }
}
