//! New centroids from the sums of their points.

use rayon::prelude::*;

use super::assign::Centroids;
use super::params::Metric;
use crate::points::{Points, Tile};
use crate::simd;

/// Partial sums of one block of tiles.
#[derive(Debug)]
pub struct PartialSums {
    sums: Vec<f32>,
    counts: Vec<u64>,
    /// (slot of the row, cluster, point, coefficient) of the tile at hand.
    shares: Vec<(usize, u32, usize, f32)>,
}

impl PartialSums {
    pub fn new(clusters: usize, dim: usize) -> Self {
        Self { sums: vec![0.0; clusters * dim], counts: vec![0; clusters], shares: Vec::new() }
    }

    /// Adds the points of a tile to the sums of the clusters in `labels`.
    ///
    /// The coefficients with which one row enters one cluster are added up first, so the row is added once for all of a
    /// prompt's pairs in that cluster.
    pub fn add_tile<const TERMS: usize>(
        &mut self,
        points: &Points<TERMS>,
        tile: &Tile,
        gathered: &[f32],
        labels: &[u32],
    ) {
        let dim = points.dim();
        self.shares.clear();
        for (point, &cluster) in tile.points.clone().zip(labels) {
            self.counts[cluster as usize] += 1;
            for (slot, coefficient) in points.slots(point).into_iter().zip(points.coefficients(point)) {
                self.shares.push((slot, cluster, point, coefficient));
            }
        }
        self.shares.sort_unstable_by_key(|&(slot, cluster, point, _)| (slot, cluster, point));
        for same in self.shares.chunk_by(|left, right| (left.0, left.1) == (right.0, right.1)) {
            let (slot, cluster, ..) = same[0];
            let coefficient = same.iter().map(|share| share.3).sum();
            let sum = &mut self.sums[cluster as usize * dim..(cluster as usize + 1) * dim];
            simd::add_scaled(sum, coefficient, &gathered[slot * dim..(slot + 1) * dim]);
        }
    }
}

/// Sums and sizes of the clusters.
#[derive(Debug)]
pub struct Sums {
    sums: Vec<f64>,
    counts: Vec<u64>,
    dim: usize,
}

impl Sums {
    /// Folds the partial sums in block order.
    pub fn fold(blocks: &[PartialSums], clusters: usize, dim: usize) -> Self {
        let mut sums = vec![0.0; clusters * dim];
        sums.par_chunks_exact_mut(dim).enumerate().for_each(|(cluster, sum)| {
            for block in blocks {
                simd::add_scaled_wide(sum, 1.0, &block.sums[cluster * dim..(cluster + 1) * dim]);
            }
        });
        let counts = (0..clusters).map(|cluster| blocks.iter().map(|block| block.counts[cluster]).sum()).collect();
        Self { sums, counts, dim }
    }

    /// Gives each empty cluster the point farthest from its centroid (ties: the lower point), never the only point of
    /// another cluster, and changes `labels` accordingly.
    pub fn refill_empty<const TERMS: usize>(
        &mut self,
        points: &Points<TERMS>,
        labels: &mut [u32],
        squared_distances: &[f32],
    ) {
        let empty: Vec<usize> = (0..self.counts.len()).filter(|&cluster| self.counts[cluster] == 0).collect();
        if empty.is_empty() {
            return;
        }
        let mut farthest: Vec<usize> = (0..points.count()).collect();
        farthest.sort_by(|&left, &right| squared_distances[right].total_cmp(&squared_distances[left]));
        let mut farthest = farthest.into_iter();
        let mut values = vec![0.0; self.dim];
        for cluster in empty {
            // As there are at least as many points as clusters, an empty cluster leaves another with two points.
            let point =
                farthest.find(|&point| self.counts[labels[point] as usize] > 1).expect("a cluster of two points");
            let donor = labels[point] as usize;
            points.write_alone(point, &mut values);
            simd::add_scaled_wide(&mut self.sums[donor * self.dim..(donor + 1) * self.dim], -1.0, &values);
            simd::add_scaled_wide(&mut self.sums[cluster * self.dim..(cluster + 1) * self.dim], 1.0, &values);
            self.counts[donor] -= 1;
            self.counts[cluster] = 1;
            labels[point] = cluster as u32;
        }
    }

    /// The centroids, and the squared length of the way that they went from `previous`.
    ///
    /// The mean of a cluster; with [`Metric::Cosine`] its direction. A spherical cluster whose points cancel out has no
    /// direction and keeps the one it had.
    pub fn centroids(&self, metric: Metric, previous: &Centroids) -> (Centroids, f64) {
        let mut values = vec![0.0; self.sums.len()];
        let shifts: Vec<f64> = values
            .par_chunks_exact_mut(self.dim)
            .enumerate()
            .map(|(cluster, centroid)| {
                let sum = &self.sums[cluster * self.dim..(cluster + 1) * self.dim];
                let divisor = match metric {
                    Metric::Euclidean => self.counts[cluster] as f64,
                    Metric::Cosine => sum.iter().map(|value| value * value).sum::<f64>().sqrt(),
                };
                if divisor > 0.0 {
                    for (value, sum) in centroid.iter_mut().zip(sum) {
                        *value = (sum / divisor) as f32;
                    }
                } else {
                    centroid.copy_from_slice(previous.row(cluster));
                }
                f64::from(simd::squared_distance(centroid, previous.row(cluster)))
            })
            .collect();
        (Centroids::new(values, self.dim), shifts.iter().sum())
    }
}
