//! The choice within one cluster: orthogonal matching pursuit, and the pairs that fill up the quota after it.

use rayon::prelude::*;

use super::least_squares::Fit;
use super::search::{CHUNK, Copies};
use crate::error::Result;
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
    /// If a pair is not finite or the computation was cancelled.
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
        let mut pursuit = Self { mean, picks: Vec::new(), weights: Vec::new() };
        let mut atoms = Atoms::default();
        let mut residual = pursuit.mean.clone();
        while pursuit.picks.len() < quota {
            let full = |index: usize| cap.as_ref().is_some_and(|cap| cap.full(members[index]));
            let best = copies.best(points, members, &residual, full, parallel, progress)?;
            let Some((index, _)) = best.filter(|(_, product)| *product > smallest) else { break };
            let pair = members[index];
            copies.open[index] = false;
            if let Some(cap) = &mut cap {
                cap.count(pair);
            }
            pursuit.picks.push(pair);
            atoms.add(points, pair, &pursuit.mean, smallest);
            atoms.subtract_from(&pursuit.mean, &mut residual);
            progress.advance(1)?;
        }
        pursuit.weights = atoms.weights();
        let open: Vec<usize> =
            members.iter().zip(&copies.open).filter(|(_, open)| **open).map(|(&pair, _)| pair).collect();
        drop(copies);
        let left = quota - pursuit.picks.len();
        pursuit.fill(points, &open, left, cap, progress)?;
        Ok(pursuit)
    }

    /// Picks the pairs with the largest inner product with the mean (ties: the lower pair).
    ///
    /// # Errors
    /// If the computation was cancelled.
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
        let chunks: Vec<Vec<(f64, usize)>> = pairs
            .par_chunks(CHUNK)
            .map(|pairs| {
                progress.check()?;
                points.forget(0..points.tiles().len());
                let (mut values, mut doubles) = (vec![0.0; points.dim()], vec![0.0; points.dim()]);
                let product = |&pair: &usize| {
                    points.write_float64(pair, &mut values, &mut doubles);
                    (dots(&doubles, [&self.mean])[0], pair)
                };
                Ok(pairs.iter().map(product).collect())
            })
            .collect::<Result<_>>()?;
        let mut ranked = chunks.concat();
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
    fn add(&mut self, points: &Points<2>, pair: usize, mean: &[f64], smallest: f64) {
        let mut vector = vec![0.0; points.dim()];
        points.write_float64(pair, &mut vec![0.0; points.dim()], &mut vector);
        let mut products: Vec<f64> = self.vectors.iter().map(|other| dots(&vector, [other])[0]).collect();
        products.push(dots(&vector, [&vector])[0]);
        self.fit.add(products, dots(&vector, [mean])[0], smallest);
        self.vectors.push(vector);
    }

    /// Writes what the weighted sum leaves of the mean.
    fn subtract_from(&self, mean: &[f64], residual: &mut [f64]) {
        residual.copy_from_slice(mean);
        for (&index, &weight) in self.fit.active.iter().zip(&self.fit.weights) {
            add_scaled_float64(residual, -weight, &self.vectors[index]);
        }
    }

    /// Of each pair in the order of the picks; zero for those that are not needed.
    fn weights(&self) -> Vec<f64> {
        let mut weights = vec![0.0; self.vectors.len()];
        for (&index, &weight) in self.fit.active.iter().zip(&self.fit.weights) {
            weights[index] = weight;
        }
        weights
    }
}
