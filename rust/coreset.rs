//! Per cluster, the pairs whose weighted sum comes closest to the cluster's mean.
//!
//! The choice of TAGCOS (arXiv 2407.15235): orthogonal matching pursuit with non-negative weights. Each step picks the
//! pair with the largest inner product with the residual, then fits the weights of all picked pairs anew by non-negative
//! least squares (Lawson and Hanson, "Solving least squares problems", 1974, chapter 23). The mean of a cluster is a sum
//! of its pairs, so the residual reaches zero after at most about d picks; what is left of the quota then goes to the
//! pairs with the largest inner product with the mean, without weight. Quotas are in proportion to the clusters' sizes,
//! by the method of the largest remainder.
//!
//! A step has to look at every pair of the cluster. It looks at copies rounded to bytes, whose error is bounded by the
//! Cauchy–Schwarz inequality, and computes the exact inner product for those alone that may be the largest.
//!
//! For clusters of n pairs with quotas q, of which s have a weight, it takes O(n d + q (n d / 4 + s d + s²)) time for each
//! in units of float32 arithmetic, and n d + 8 q (d + s) bytes for each that is worked on, one for each thread at most.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::{Depths, Limits, Prompts};
use crate::shares::largest_remainder;
use crate::simd::dots::dots;
use crate::simd::{self, add_scaled_float64, dispatch};

/// Pairs of one piece of work.
const CHUNK: usize = 512;

/// Bytes of rounded copies above which the threads share a cluster; below it each takes one of its own. Sharing from 4 MiB
/// on ran as fast on two threads (50 clusters of 10 MB); this bounds the memory of many.
const SHARED_BYTES: usize = 1 << 28;

/// Inner products with the residual that count as zero, relative to the mean's length: what float64 leaves of one.
const VANISHED: f64 = 1e-10;

/// What rounding in float32 may take from a length, relative to it.
const FLOAT32: f64 = 1e-5;

/// Squared distance from the span of the others, relative to its squared length, below which a pair adds nothing.
const DEPENDENT: f64 = 1e-12;

/// The pairs chosen, cluster after cluster in the order of their choice.
#[derive(Clone, Debug, Default)]
pub struct Coreset {
    pub picks: Vec<usize>,
    /// Not negative; within a cluster the pairs times their weights add up to about the cluster's mean.
    pub weights: Vec<f64>,
}

/// Chooses `budget` pairs, fewer only if the limits leave fewer. Clusters share what the limits keep a cluster from using.
///
/// # Errors
/// If shapes do not fit, a cluster is negative, a row is not finite, or the computation was cancelled.
pub fn coreset(
    points: &Points<2>,
    clusters: &[i32],
    budget: usize,
    limits: Limits,
    progress: &Progress,
) -> Result<Coreset> {
    check(points, clusters, limits)?;
    let names: Vec<i64> = clusters.iter().map(|&cluster| i64::from(cluster)).collect();
    let numbered = Prompts::number(&names, progress)?;
    let mut members = vec![Vec::new(); numbered.count()];
    for (pair, &cluster) in numbered.numbers.iter().enumerate() {
        if limits.eligible.is_none_or(|eligible| eligible[pair]) {
            members[cluster as usize].push(pair);
        }
    }
    members.retain(|members| !members.is_empty());
    let available: usize = members.iter().map(Vec::len).sum();
    let budget = budget.min(available);
    progress.start(budget);
    if budget == 0 {
        return Ok(Coreset::default());
    }
    let sizes: Vec<f64> = members.iter().map(|members| members.len() as f64).collect();
    let quotas = largest_remainder(&sizes, budget);
    let shared = |members: &[usize]| members.len().saturating_mul(points.dim()) > SHARED_BYTES;
    let mut pursuits = match Depths::new(limits, progress)? {
        // Which prompts are full depends on the clusters before, so they take turns.
        Some(mut cap) => {
            let pursue = |(members, &quota): (&Vec<usize>, &usize)| {
                Pursuit::run(points, members, quota, Some(&mut cap), true, progress)
            };
            let mut pursuits = members.iter().zip(&quotas).map(pursue).collect::<Result<Vec<_>>>()?;
            share_rest(points, &members, budget, &mut pursuits, &mut cap, progress)?;
            pursuits
        }
        None => {
            let run =
                |index: usize, parallel| Pursuit::run(points, &members[index], quotas[index], None, parallel, progress);
            let alone = |index: &usize| !shared(&members[*index]);
            let mut pursuits: Vec<Option<Pursuit>> = (0..members.len())
                .into_par_iter()
                .with_max_len(1)
                .map(|index| alone(&index).then(|| run(index, false)).transpose())
                .collect::<Result<_>>()?;
            for (index, pursuit) in pursuits.iter_mut().enumerate().filter(|(_, pursuit)| pursuit.is_none()) {
                *pursuit = Some(run(index, true)?);
            }
            pursuits.into_iter().flatten().collect()
        }
    };
    progress.finish();
    let mut coreset = Coreset::default();
    for pursuit in &mut pursuits {
        pursuit.weights.resize(pursuit.picks.len(), 0.0);
        coreset.picks.append(&mut pursuit.picks);
        coreset.weights.append(&mut pursuit.weights);
    }
    Ok(coreset)
}

fn check(points: &Points<2>, clusters: &[i32], limits: Limits) -> Result<()> {
    if points.dim() == 0 {
        return Err(Error::shape("rows", "(n, d) with d >= 1", "(n, 0)"));
    }
    if clusters.len() != points.count() {
        let expected = format!("({},), one for each pair", points.count());
        return Err(Error::shape("clusters", expected, format!("({},)", clusters.len())));
    }
    if let Some(index) = clusters.iter().position(|&cluster| cluster < 0) {
        let label = i64::from(clusters[index]);
        return Err(Error::ClusterOutOfRange { array: "clusters", index, label, clusters: i32::MAX as usize });
    }
    limits.check(points.count())
}

/// Shares among the clusters, in proportion to the pairs that they may still use, what the cap kept others from using.
fn share_rest(
    points: &Points<2>,
    members: &[Vec<usize>],
    budget: usize,
    pursuits: &mut [Pursuit],
    cap: &mut Depths,
    progress: &Progress,
) -> Result<()> {
    let mut picked = vec![false; points.count()];
    pursuits.iter().flat_map(|pursuit| &pursuit.picks).for_each(|&pair| picked[pair] = true);
    loop {
        let left = budget - pursuits.iter().map(|pursuit| pursuit.picks.len()).sum::<usize>();
        let usable = |members: &Vec<usize>| -> Vec<usize> {
            members.iter().copied().filter(|&pair| !picked[pair] && !cap.full(pair)).collect()
        };
        let usable: Vec<Vec<usize>> = members.iter().map(usable).collect();
        if left == 0 || usable.iter().all(Vec::is_empty) {
            return Ok(());
        }
        let masses: Vec<f64> = usable.iter().map(|pairs| pairs.len() as f64).collect();
        for ((pursuit, pairs), quota) in pursuits.iter_mut().zip(&usable).zip(largest_remainder(&masses, left)) {
            let before = pursuit.picks.len();
            pursuit.fill(points, pairs, quota, Some(cap), progress)?;
            pursuit.picks[before..].iter().for_each(|&pair| picked[pair] = true);
        }
    }
}

/// The choice within one cluster.
struct Pursuit {
    mean: Vec<f64>,
    picks: Vec<usize>,
    /// Of the first picks; those after have none.
    weights: Vec<f64>,
}

impl Pursuit {
    fn run(
        points: &Points<2>,
        members: &[usize],
        quota: usize,
        mut cap: Option<&mut Depths>,
        parallel: bool,
        progress: &Progress,
    ) -> Result<Self> {
        let dim = points.dim();
        let (mut copies, mean) = Copies::new(points, members, parallel, progress)?;
        let mut pursuit = Self { mean, picks: Vec::new(), weights: Vec::new() };
        let smallest = VANISHED * dots(&pursuit.mean, [&pursuit.mean])[0].sqrt();
        let mut residual = pursuit.mean.clone();
        let mut atoms: Vec<Vec<f64>> = Vec::new();
        let mut fit = Fit::default();
        let mut values = vec![0.0; dim];
        while pursuit.picks.len() < quota {
            let full = |index: usize| cap.as_ref().is_some_and(|cap| cap.full(members[index]));
            let Some((index, product)) = copies.best(points, members, &residual, full, parallel, progress)? else {
                break;
            };
            if product <= smallest {
                break;
            }
            let pair = members[index];
            copies.open[index] = false;
            if let Some(cap) = &mut cap {
                cap.count(pair);
            }
            pursuit.picks.push(pair);
            let mut atom = vec![0.0; dim];
            write_float64(points, pair, &mut values, &mut atom);
            let mut products: Vec<f64> = atoms.iter().map(|other| dots(&atom, [other])[0]).collect();
            products.push(dots(&atom, [&atom])[0]);
            fit.add(products, dots(&atom, [&pursuit.mean])[0], smallest);
            atoms.push(atom);
            residual.copy_from_slice(&pursuit.mean);
            for (&index, &weight) in fit.active.iter().zip(&fit.weights) {
                add_scaled_float64(&mut residual, -weight, &atoms[index]);
            }
            progress.advance(1)?;
        }
        pursuit.weights = vec![0.0; pursuit.picks.len()];
        for (&index, &weight) in fit.active.iter().zip(&fit.weights) {
            pursuit.weights[index] = weight;
        }
        let open: Vec<usize> =
            members.iter().zip(&copies.open).filter(|(_, open)| **open).map(|(&pair, _)| pair).collect();
        drop(copies);
        let left = quota - pursuit.picks.len();
        pursuit.fill(points, &open, left, cap, progress)?;
        Ok(pursuit)
    }

    /// Picks the pairs with the largest inner product with the mean (ties: the lower pair).
    fn fill(
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
                let (mut values, mut doubles) = (vec![0.0; points.dim()], vec![0.0; points.dim()]);
                let product = |&pair: &usize| {
                    write_float64(points, pair, &mut values, &mut doubles);
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

fn write_float64(points: &Points<2>, pair: usize, values: &mut [f32], out: &mut [f64]) {
    points.write_alone(pair, values);
    simd::to_float64(values, out);
}

/// Room for the codes and the steps of some pairs.
type Chunk<'a> = (&'a mut [i8], &'a mut [[f64; 3]]);

/// The pairs of a cluster, rounded to multiples of a step of their own.
struct Copies {
    codes: Vec<i8>,
    dim: usize,
    /// Of each pair: the step, the length of the copy, and the length of what rounding took.
    steps: Vec<[f64; 3]>,
    /// Whether a pair was not picked yet.
    open: Vec<bool>,
}

impl Copies {
    /// The copies, and the mean of the pairs.
    fn new(points: &Points<2>, members: &[usize], parallel: bool, progress: &Progress) -> Result<(Self, Vec<f64>)> {
        let dim = points.dim();
        let mut codes = vec![0; members.len() * dim];
        let mut steps = vec![[0.0; 3]; members.len()];
        let copy = |((codes, steps), pairs): (Chunk, &[usize])| -> Result<Vec<f64>> {
            progress.check()?;
            let mut sum = vec![0.0; dim];
            let (mut values, mut doubles, mut rounded) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]);
            for ((codes, steps), &pair) in codes.chunks_exact_mut(dim).zip(steps).zip(pairs) {
                write_float64(points, pair, &mut values, &mut doubles);
                let [square] = dots(&doubles, [&doubles]);
                if !square.is_finite() {
                    return Err(points.not_finite(pair));
                }
                add_scaled_float64(&mut sum, 1.0, &doubles);
                // In units of the step, so that no square overflows or vanishes.
                let largest = simd::largest_magnitude(&values);
                let inverse = f32::from(i8::MAX) / largest;
                *steps = if inverse.is_finite() {
                    round(&mut values, inverse, codes, &mut rounded);
                    let [copy] = dots(&rounded, [&rounded]).map(|square| f64::from(square).sqrt());
                    let [lost] = dots(&values, [&values]).map(|square| f64::from(square).sqrt());
                    let step = f64::from(largest) / f64::from(i8::MAX);
                    [step, step * copy * (1.0 + FLOAT32), step * (lost + FLOAT32 * copy)]
                } else {
                    [0.0, 0.0, square.sqrt()]
                };
            }
            Ok(sum)
        };
        let sums: Vec<Vec<f64>> = if parallel {
            let chunks = codes.par_chunks_mut(CHUNK * dim).zip(steps.par_chunks_mut(CHUNK));
            chunks.zip(members.par_chunks(CHUNK)).map(copy).collect::<Result<_>>()?
        } else {
            let chunks = codes.chunks_mut(CHUNK * dim).zip(steps.chunks_mut(CHUNK));
            chunks.zip(members.chunks(CHUNK)).map(copy).collect::<Result<_>>()?
        };
        let mean = |index: usize| sums.iter().map(|sum| sum[index]).sum::<f64>() / members.len() as f64;
        let mean = (0..dim).map(mean).collect();
        Ok((Self { codes, dim, steps, open: vec![true; members.len()] }, mean))
    }

    /// The open pair with the largest inner product with the residual (ties: the lower pair), and that product.
    fn best(
        &self,
        points: &Points<2>,
        members: &[usize],
        residual: &[f64],
        full: impl Fn(usize) -> bool + Sync,
        parallel: bool,
        progress: &Progress,
    ) -> Result<Option<(usize, f64)>> {
        // The residual is rounded too, to numbers whose inner product with a copy fits into 32 bits.
        let largest = residual.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
        let limit = i32::MAX as usize / (i8::MAX as usize * self.dim);
        let limit = limit.clamp(1, i16::MAX as usize) as f64;
        let step = if largest > 0.0 { largest / limit } else { 1.0 };
        let codes: Vec<i16> = residual.iter().map(|value| (value / step).round_ties_even() as i16).collect();
        let lost: f64 =
            residual.iter().zip(&codes).map(|(value, &code)| (value - step * f64::from(code)).powi(2)).sum();
        let (length, lost) = (dots(residual, [residual])[0].sqrt(), lost.sqrt());

        // Bounds of each product from below and above; the last factor covers the rounding of the bounds themselves.
        let bounds = |index: usize| {
            let [own_step, copy, own_lost] = self.steps[index];
            let product = multiply_codes(&self.codes[index * self.dim..(index + 1) * self.dim], &codes);
            let middle = own_step * step * f64::from(product);
            let error = (own_lost * length + copy * lost) * (1.0 + 1e-9) + 1e-13 * copy * length;
            (middle - error, middle + error)
        };
        let of_chunk = |chunk: usize| {
            let indices = chunk * CHUNK..members.len().min((chunk + 1) * CHUNK);
            let mut lowest = f64::NEG_INFINITY;
            let mut uppers: Vec<(usize, f64)> = Vec::new();
            for index in indices.filter(|&index| self.open[index] && !full(index)) {
                let (lower, upper) = bounds(index);
                lowest = lowest.max(lower);
                if upper >= lowest {
                    uppers.push((index, upper));
                }
            }
            progress.check().map(|()| (lowest, uppers))
        };
        let count = members.len().div_ceil(CHUNK);
        let chunks: Vec<(f64, Vec<(usize, f64)>)> = if parallel {
            (0..count).into_par_iter().map(of_chunk).collect::<Result<_>>()?
        } else {
            (0..count).map(of_chunk).collect::<Result<_>>()?
        };
        let lowest = chunks.iter().fold(f64::NEG_INFINITY, |lowest, (lower, _)| lowest.max(*lower));
        let (mut values, mut doubles) = (vec![0.0; self.dim], vec![0.0; self.dim]);
        let mut best: Option<(usize, f64)> = None;
        for &(index, upper) in chunks.iter().flat_map(|(_, uppers)| uppers) {
            if upper >= best.map_or(lowest, |(_, product)| product.max(lowest)) {
                write_float64(points, members[index], &mut values, &mut doubles);
                let [product] = dots(&doubles, [residual]);
                if best.is_none_or(|(_, best)| product > best) {
                    best = Some((index, product));
                }
            }
        }
        Ok(best)
    }
}

/// Non-negative least squares by the active set method: weights of vectors whose weighted sum is closest to a target.
#[derive(Default)]
struct Fit {
    /// Inner products of each vector with those before it and itself, and with the target.
    products: Vec<Vec<f64>>,
    targets: Vec<f64>,
    /// Vectors with a positive weight, in the order of the factor's rows, and the weights.
    active: Vec<usize>,
    weights: Vec<f64>,
    /// The Cholesky factor of the active vectors' Gram matrix, row by row, and the target's solution with it.
    factor: Vec<Vec<f64>>,
    solution: Vec<f64>,
}

impl Fit {
    /// Adds a vector and fits the weights anew. Gradients up to `smallest` count as zero.
    fn add(&mut self, products: Vec<f64>, target: f64, smallest: f64) {
        self.products.push(products);
        self.targets.push(target);
        let mut entering = Some(self.targets.len() - 1);
        // Each turn lowers the distance, so none repeats; the limit only guards against rounding.
        for _ in 0..3 * self.targets.len() {
            let Some(vector) = entering else { return };
            if !self.enter(vector) {
                return;
            }
            self.leave_negative();
            let gradient = |&vector: &usize| {
                let reached = |(&other, weight): (&usize, &f64)| self.product(vector, other) * weight;
                self.targets[vector] - self.active.iter().zip(&self.weights).map(reached).sum::<f64>()
            };
            let idle = (0..self.targets.len()).filter(|vector| !self.active.contains(vector));
            let best = idle.map(|vector| (gradient(&vector), vector)).max_by(|left, right| left.0.total_cmp(&right.0));
            entering = best
                .filter(|(gradient, vector)| *gradient > smallest && *vector != entering.unwrap_or(usize::MAX))
                .map(|(_, vector)| vector);
        }
    }

    fn product(&self, left: usize, right: usize) -> f64 {
        self.products[left.max(right)][left.min(right)]
    }

    /// Appends a vector to the factor; returns whether it is independent of the active ones.
    fn enter(&mut self, vector: usize) -> bool {
        let mut row: Vec<f64> = Vec::with_capacity(self.active.len() + 1);
        for (other, earlier) in self.active.iter().zip(&self.factor) {
            let rank = row.len();
            let [reached] = dots(&earlier[..rank], [&row]);
            row.push((self.product(vector, *other) - reached) / earlier[rank]);
        }
        let square = self.product(vector, vector);
        let rest = square - dots(&row, [&row])[0];
        if rest.is_nan() || rest <= DEPENDENT * square {
            return false;
        }
        self.solution.push((self.targets[vector] - dots(&row, [&self.solution])[0]) / rest.sqrt());
        row.push(rest.sqrt());
        self.factor.push(row);
        self.active.push(vector);
        self.weights.push(0.0);
        true
    }

    /// Goes from the weights towards those of least squares, and drops the vectors whose weights reach zero on the way.
    fn leave_negative(&mut self) {
        loop {
            let free = self.least_squares();
            let reach = |(&from, &to): (&f64, &f64)| match to {
                ..=0.0 if from > 0.0 => from / (from - to),
                ..=0.0 => 0.0,
                _ => 1.0,
            };
            let blocking =
                self.weights.iter().zip(&free).map(reach).enumerate().min_by(|left, right| left.1.total_cmp(&right.1));
            let Some((vector, part)) = blocking.filter(|_| free.iter().any(|&weight| weight <= 0.0)) else {
                self.weights = free;
                return;
            };
            for (weight, free) in self.weights.iter_mut().zip(&free) {
                *weight += part * (free - *weight);
            }
            self.drop(vector);
        }
    }

    fn least_squares(&self) -> Vec<f64> {
        let mut weights = self.solution.clone();
        for (rank, row) in self.factor.iter().enumerate().rev() {
            weights[rank] /= row[rank];
            let (before, weight) = weights.split_at_mut(rank);
            add_scaled_float64(before, -weight[0], row);
        }
        weights
    }

    /// Takes a row out of the factor and rotates the columns of those below it until they are triangular again.
    fn drop(&mut self, rank: usize) {
        self.active.remove(rank);
        self.weights.remove(rank);
        self.factor.remove(rank);
        let mut rotations: Vec<[f64; 2]> = Vec::new();
        let rotate = |row: &mut [f64], rotations: &[[f64; 2]]| {
            for (column, [cosine, sine]) in (rank..).zip(rotations) {
                let (left, right) = (row[column], row[column + 1]);
                row[column] = cosine * left + sine * right;
                row[column + 1] = cosine * right - sine * left;
            }
        };
        for row in &mut self.factor[rank..] {
            rotate(row, &rotations);
            let column = row.len() - 2;
            let length = row[column].hypot(row[column + 1]);
            rotations.push([row[column] / length, row[column + 1] / length]);
            row.truncate(column + 1);
            row[column] = length;
        }
        rotate(&mut self.solution, &rotations);
        self.solution.pop();
    }
}

dispatch! {
    /// The inner product of whole numbers, whose order of addition never shows.
    fn multiply_codes(left: &[i8], right: &[i16]) -> i32 {
        let products = left.iter().zip(right).map(|(&left, &right)| i32::from(left) * i32::from(right));
        products.sum()
    }
}

dispatch! {
    /// Multiplies the values by `scale` and rounds them, to codes and to the same as numbers; what rounding took stays.
    fn round(values: &mut [f32], scale: f32, codes: &mut [i8], rounded: &mut [f32]) {
        /// Adding it leaves no room for a fraction, which rounds small numbers on every machine alike.
        const SHIFT: f32 = 12_582_912.0;
        for ((value, code), rounded) in values.iter_mut().zip(codes).zip(rounded) {
            let scaled = *value * scale;
            *rounded = (scaled + SHIFT) - SHIFT;
            *code = *rounded as i8;
            *value = scaled - *rounded;
        }
    }
}
