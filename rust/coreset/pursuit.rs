//! The choice within one cluster: orthogonal matching pursuit, and the pairs that fill up the quota after it.

use rayon::prelude::*;

use super::least_squares::Fit;
use super::search::{CHUNK, Copies};
use crate::error::Result;
use crate::memory::{PICKS, filled, grow, push, reserved, room};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::Depths;
use crate::simd::add_scaled_float64;
use crate::simd::dots::dots;

/// Inner products with the residual that count as zero, relative to the mean's length: what float64 leaves of one.
const VANISHED: f64 = 1e-10;

/// How a cluster is worked on; the choice does not depend on it.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Bytes of its pairs in 8 bits at most; without copies a step takes about ten times as long.
    pub copy_bytes: usize,
    /// Whether all threads share it.
    pub parallel: bool,
}

/// The choice within one cluster.
pub struct Pursuit {
    mean: Vec<f64>,
    pub picks: Vec<usize>,
    /// Of the first picks; those after have none.
    pub weights: Vec<f64>,
}

impl Pursuit {
    /// Picks `quota` pairs, fewer only if the cap leaves fewer.
    ///
    /// # Errors
    /// If a pair is not finite, the memory cannot be had, or the computation was cancelled.
    pub fn run(
        points: &Points<2>,
        members: &[usize],
        quota: usize,
        mut cap: Option<&mut Depths>,
        work: Work,
        progress: &Progress,
    ) -> Result<Self> {
        let Work { copy_bytes, parallel } = work;
        let (mut copies, mean) = Copies::new(points, members, copy_bytes, parallel, progress)?;
        let smallest = VANISHED * dots(&mean, [&mean])[0].sqrt();
        let mut pursuit = Self { mean, picks: reserved(quota, PICKS)?, weights: Vec::new() };
        let mut atoms = Atoms::default();
        let mut residual = pursuit.mean.clone();
        while pursuit.picks.len() < quota {
            // What the picks have taken is not that of the small lists of a step.
            room(0, PICKS)?;
            let full = |index: usize| cap.as_ref().is_some_and(|cap| cap.full(members[index]));
            let best = copies.best(points, members, &residual, full, parallel, progress)?;
            let Some((index, _)) = best.filter(|(_, product)| *product > smallest) else { break };
            let pair = members[index];
            copies.open[index] = false;
            if let Some(cap) = &mut cap {
                cap.count(pair);
            }
            pursuit.picks.push(pair);
            atoms.add(points, pair, &pursuit.mean, smallest)?;
            atoms.subtract_from(&pursuit.mean, &mut residual);
            progress.advance(1)?;
        }
        pursuit.weights = atoms.weights()?;
        let mut open = reserved(members.len() - pursuit.picks.len(), PICKS)?;
        open.extend(members.iter().zip(&copies.open).filter(|(_, open)| **open).map(|(&pair, _)| pair));
        drop(copies);
        let left = quota - pursuit.picks.len();
        pursuit.fill(points, &open, left, cap, progress)?;
        Ok(pursuit)
    }

    /// Picks the pairs with the largest inner product with the mean (ties: the lower pair).
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn fill(
        &mut self,
        points: &Points<2>,
        pairs: &[usize],
        quota: usize,
        mut cap: Option<&mut Depths>,
        progress: &Progress,
    ) -> Result<()> {
        if quota == 0 {
            return Ok(());
        }
        grow(&mut self.picks, quota.min(pairs.len()), PICKS)?;
        let mut ranked: Vec<(f64, usize)> = filled(pairs.len(), (0.0, 0), PICKS)?;
        ranked.par_chunks_mut(CHUNK).zip(pairs.par_chunks(CHUNK)).try_for_each(|(ranked, pairs)| {
            progress.check()?;
            points.forget(0..points.tiles().len());
            let (mut values, mut doubles) = (vec![0.0; points.dim()], vec![0.0; points.dim()]);
            for (ranked, &pair) in ranked.iter_mut().zip(pairs) {
                points.write_float64(pair, &mut values, &mut doubles);
                *ranked = (dots(&doubles, [&self.mean])[0], pair);
            }
            Ok(())
        })?;
        ranked.sort_unstable_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(&right.1)));
        let end = self.picks.len() + quota;
        for (_, pair) in ranked {
            if self.picks.len() == end {
                break;
            }
            if let Some(cap) = &mut cap {
                if cap.full(pair) {
                    continue;
                }
                cap.count(pair);
            }
            self.picks.push(pair);
            progress.advance(1)?;
        }
        Ok(())
    }
}

/// The pairs picked, as vectors, and how the mean is made of them.
#[derive(Default)]
struct Atoms {
    vectors: Vec<Vec<f64>>,
    fit: Fit,
}

impl Atoms {
    fn add(&mut self, points: &Points<2>, pair: usize, mean: &[f64], smallest: f64) -> Result<()> {
        let mut vector = filled(points.dim(), 0.0, PICKS)?;
        points.write_float64(pair, &mut filled(points.dim(), 0.0, PICKS)?, &mut vector);
        let mut products = reserved(self.vectors.len() + 1, PICKS)?;
        products.extend(self.vectors.iter().map(|other| dots(&vector, [other])[0]));
        products.push(dots(&vector, [&vector])[0]);
        self.fit.add(products, dots(&vector, [mean])[0], smallest)?;
        push(&mut self.vectors, vector, PICKS)
    }

    /// Writes what the weighted sum leaves of the mean.
    fn subtract_from(&self, mean: &[f64], residual: &mut [f64]) {
        residual.copy_from_slice(mean);
        for (&index, &weight) in self.fit.active.iter().zip(&self.fit.weights) {
            add_scaled_float64(residual, -weight, &self.vectors[index]);
        }
    }

    /// Of each pair in the order of the picks; zero for those that are not needed.
    fn weights(&self) -> Result<Vec<f64>> {
        let mut weights = filled(self.vectors.len(), 0.0, PICKS)?;
        for (&index, &weight) in self.fit.active.iter().zip(&self.fit.weights) {
            weights[index] = weight;
        }
        Ok(weights)
    }
}
