//! Sums of the points of each cluster, kept from pass to pass and changed by the points that moved.

use rayon::prelude::*;

use super::approximate::Approximation;
use super::measure::Vectors;
use super::params::Metric;
use crate::error::Result;
use crate::exchange::{List, State};
use crate::memory::{CENTROIDS, POINTS, chosen, copied, filled, reserved};
use crate::order::{descending, sort};
use crate::points::{Points, Tile};
use crate::progress::Progress;
use crate::simd;

/// The label of a point that no cluster has yet.
pub const UNASSIGNED: u32 = u32::MAX;

/// Columns of a sum that one task adds up where there are fewer clusters than that would keep threads busy: 16 lines of
/// the cache of each row.
const COLUMNS: usize = 256;

/// Rows that are added to a sum between two looks at the cancel token.
const ADDED: usize = 1 << 10;

/// A point that goes from one cluster to another.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    pub point: usize,
    pub from: u32,
    pub to: u32,
}

/// What one tile changes.
#[derive(Debug, Default)]
pub struct Changes {
    moves: Vec<Move>,
    /// (cluster, row, coefficient): what is added to the sums.
    shares: Vec<(u32, usize, f64)>,
}

impl Changes {
    /// The coefficients with which one row enters one cluster are added up first, so the row is added once for all of a
    /// prompt's pairs that go there.
    pub fn new<const TERMS: usize>(points: &Points<TERMS>, tile: &Tile, moves: Vec<Move>) -> Self {
        let rows = points.rows_of(tile);
        let mut shares = Vec::with_capacity(2 * TERMS * moves.len());
        for &Move { point, from, to } in &moves {
            let weight = points.weight(point);
            for (slot, coefficient) in points.slots(point).into_iter().zip(points.coefficients_float64(point)) {
                let share = weight * coefficient;
                shares.push((to, slot, share));
                if from != UNASSIGNED {
                    shares.push((from, slot, -share));
                }
            }
        }
        if TERMS > 1 {
            // Stable, so that coefficients are added up in the order of the points.
            shares.sort_by_key(|&(cluster, slot, _)| (slot, cluster));
            shares.dedup_by(|next, first| {
                let same = (next.0, next.1) == (first.0, first.1);
                if same {
                    first.2 += next.2;
                }
                same
            });
        }
        let shares = shares.into_iter().filter(|share| share.2 != 0.0);
        Self { moves, shares: shares.map(|(cluster, slot, share)| (cluster, rows[slot], share)).collect() }
    }

    pub fn count(&self) -> usize {
        self.moves.len()
    }
}

/// Sums and sizes of the clusters.
#[derive(Debug)]
pub struct Sums {
    sums: Vec<f64>,
    /// Σ w.
    weights: Vec<f64>,
    /// Σ w ‖x‖², measured from the origin.
    squared_norms: Vec<f64>,
    /// Points whose weight is not zero.
    counts: Vec<u64>,
    dim: usize,
}

impl State for Sums {
    fn lists(&mut self, list: &mut dyn List) {
        list.doubles(&mut self.sums);
        list.doubles(&mut self.weights);
        list.doubles(&mut self.squared_norms);
        list.counts(&mut self.counts);
    }
}

impl Sums {
    /// # Errors
    /// If the memory cannot be had.
    pub fn new(clusters: usize, dim: usize) -> Result<Self> {
        Ok(Self {
            sums: filled(clusters.saturating_mul(dim), 0.0, CENTROIDS)?,
            weights: filled(clusters, 0.0, CENTROIDS)?,
            squared_norms: filled(clusters, 0.0, CENTROIDS)?,
            counts: filled(clusters, 0, CENTROIDS)?,
            dim,
        })
    }

    /// Applies the changes of tiles in their order. A sum belongs to one thread, so the order of its additions is fixed.
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn apply<const TERMS: usize>(
        &mut self,
        points: &Points<TERMS>,
        approximation: &Approximation,
        changes: &[Changes],
        progress: &Progress,
    ) -> Result<()> {
        for &Move { point, from, to } in changes.iter().flat_map(|changes| &changes.moves) {
            let weight = points.weight(point);
            let squared = weight * approximation.bounds[point].squared_norm;
            let present = u64::from(weight > 0.0);
            self.counts[to as usize] += present;
            self.weights[to as usize] += weight;
            self.squared_norms[to as usize] += squared;
            if from != UNASSIGNED {
                self.counts[from as usize] -= present;
                self.weights[from as usize] -= weight;
                self.squared_norms[from as usize] -= squared;
            }
        }

        // Sort the shares by cluster, keeping their order.
        let clusters = self.counts.len();
        progress.check()?;
        let mut starts = filled(clusters + 1, 0, CENTROIDS)?;
        let shares = || changes.iter().flat_map(|changes| &changes.shares);
        shares().for_each(|share| starts[share.0 as usize + 1] += 1);
        for cluster in 0..clusters {
            starts[cluster + 1] += starts[cluster];
        }
        let mut sorted = filled(starts[clusters], (0, 0.0), POINTS)?;
        let mut next = copied(&starts, CENTROIDS)?;
        for &(cluster, row, share) in shares() {
            sorted[next[cluster as usize]] = (row, share);
            next[cluster as usize] += 1;
        }

        let rows = points.rows();
        let dim = self.dim;
        // Whole rows stay in the cache while they are added, so cut them only where clusters are few.
        let width = if clusters >= 4 * rayon::current_num_threads() { dim } else { COLUMNS };
        let tasks = self.sums.par_chunks_mut(dim).zip(starts.par_windows(2));
        tasks.filter(|(_, range)| range[0] < range[1]).try_for_each(|(sum, range)| {
            sum.par_chunks_mut(width).enumerate().try_for_each_init(
                || vec![0.0; width],
                |scratch, (part, sum)| {
                    let shares = &sorted[range[0]..range[1]];
                    for (index, &(row, share)) in shares.iter().enumerate() {
                        if index.is_multiple_of(ADDED) {
                            progress.check()?;
                        }
                        if width == dim
                            && let Some((ahead, _)) = shares.get(index + 1)
                        {
                            rows.prefetch(*ahead);
                        }
                        simd::add_scaled_to_float64(sum, share, rows.part(row, part * width, sum.len(), scratch));
                    }
                    Ok(())
                },
            )
        })
    }

    /// Σ w ‖x − c‖² of all points that are in a cluster, without looking at them: Σ w ‖x‖² − 2 Σⱼ ⟨Sⱼ, cⱼ⟩ + Σⱼ Wⱼ ‖cⱼ‖²,
    /// all measured from the origin.
    pub fn inertia(&self, centroids: &Vectors, approximation: &Approximation) -> f64 {
        let origin = approximation.origin_or_zero(self.dim);
        let mut inertia = self.squared_norms.iter().sum::<f64>();
        for (cluster, (sum, weight)) in self.sums.chunks_exact(self.dim).zip(&self.weights).enumerate() {
            let terms = sum.iter().zip(centroids.row(cluster)).zip(&*origin);
            inertia += terms
                .map(|((sum, centroid), origin)| {
                    let (centroid, origin) = (f64::from(*centroid), f64::from(*origin));
                    let centred = centroid - origin;
                    centred * (weight * centred - 2.0 * (sum - weight * origin))
                })
                .sum::<f64>();
        }
        inertia.max(0.0)
    }

    /// The variance of a coordinate, averaged over the coordinates.
    pub fn mean_variance(&self, approximation: &Approximation) -> f64 {
        let weight: f64 = self.weights.iter().sum();
        let mut mean = vec![0.0; self.dim];
        for sum in self.sums.chunks_exact(self.dim) {
            mean.iter_mut().zip(sum).for_each(|(mean, sum)| *mean += sum / weight);
        }
        let origin = approximation.origin_or_zero(self.dim);
        mean.iter_mut().zip(&*origin).for_each(|(mean, origin)| *mean -= f64::from(*origin));
        let mean_square = self.squared_norms.iter().sum::<f64>() / weight;
        let square_of_mean: f64 = mean.iter().map(|value| value * value).sum();
        (mean_square - square_of_mean).max(0.0) / self.dim as f64
    }

    pub fn empty(&self) -> Vec<u32> {
        (0..self.counts.len()).filter(|&cluster| self.counts[cluster] == 0).map(|cluster| cluster as u32).collect()
    }

    /// The moves that give each of the `empty` clusters the point that adds most to the inertia (ties: the lower point),
    /// never the only point of another cluster.
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn refill<const TERMS: usize>(
        &self,
        points: &Points<TERMS>,
        empty: &[u32],
        labels: &[u32],
        squared_distances: &[f64],
        progress: &Progress,
    ) -> Result<Vec<Move>> {
        let cost = |point: usize| descending(points.weight(point) * squared_distances[point]);
        let key = |point: usize| (points.weight(point) > 0.0).then(|| (cost(point), point));
        let farthest = sort(chosen(labels.len(), POINTS, progress, key)?, progress)?;
        let mut counts = copied(&self.counts, CENTROIDS)?;
        let mut farthest = farthest.into_iter().map(|(_, point)| point);
        let mut moves = reserved(empty.len(), CENTROIDS)?;
        for &to in empty {
            // With fewer points of positive weight than clusters, some stay empty.
            let Some(point) = farthest.find(|&point| counts[labels[point] as usize] > 1) else { break };
            counts[labels[point] as usize] -= 1;
            counts[to as usize] += 1;
            moves.push(Move { point, from: labels[point], to });
        }
        Ok(moves)
    }

    /// The centroids, as they are before the points are multiplied by `scale`.
    ///
    /// The mean of a cluster; with [`Metric::Cosine`] its direction. An empty cluster, or a spherical one whose points
    /// cancel out, keeps the centroid that it had.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn centroids(&self, metric: Metric, previous: &Vectors, scale: f32) -> Result<Vec<f32>> {
        let mut values = filled(self.sums.len(), 0.0, CENTROIDS)?;
        let inverse = f64::from(scale).recip();
        values.par_chunks_exact_mut(self.dim).enumerate().for_each(|(cluster, centroid)| {
            let sum = &self.sums[cluster * self.dim..(cluster + 1) * self.dim];
            let divisor = match metric {
                _ if self.counts[cluster] == 0 => 0.0,
                Metric::Euclidean => self.weights[cluster],
                Metric::Cosine => sum.iter().map(|value| value * value).sum::<f64>().sqrt(),
            };
            if divisor <= 0.0 {
                centroid.copy_from_slice(previous.unscaled_row(cluster));
                return;
            }
            for (value, sum) in centroid.iter_mut().zip(sum) {
                *value = (sum / divisor * inverse) as f32;
            }
        });
        Ok(values)
    }

    /// The squared standard error of each centroid, σ²/(n − 1), infinite for clusters of one point.
    pub fn standard_errors(&self, approximation: &Approximation) -> Vec<f64> {
        let origin = approximation.origin_or_zero(self.dim);
        let clusters = self.sums.chunks_exact(self.dim).zip(&self.weights).zip(&self.squared_norms);
        clusters
            .map(|((sum, weight), squared_norm)| {
                let centred = |(sum, origin): (&f64, &f32)| (sum - weight * f64::from(*origin)).powi(2);
                let squared_sum: f64 = sum.iter().zip(&*origin).map(centred).sum();
                let within = (squared_norm - squared_sum / weight).max(0.0);
                if *weight > 1.0 { within / (weight * (weight - 1.0)) } else { f64::INFINITY }
            })
            .collect()
    }
}
