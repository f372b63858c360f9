//! Greedy k-means++: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (SODA 2007), with the
//! several trials for each centroid that scikit-learn makes.

use rayon::prelude::*;

use super::assign::{Centroids, Products, squared_distances};
use crate::error::Result;
use crate::points::Points;
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};

/// Blocks of tiles with a potential of their own; the draw looks through one of them.
const BLOCKS: usize = 64;

/// Trials for each centroid after the first: 2 + ln k, as in scikit-learn.
fn trials(clusters: usize) -> usize {
    2 + (clusters as f64).ln() as usize
}

/// Distances of a block's points to the trial centroids, and what the potential would be with each.
struct Block {
    /// min(closest so far, distance to the trial), trial after trial for each point.
    closest: Vec<f32>,
    potentials: Vec<f64>,
}

/// Picks `clusters` points, each with a probability in proportion to its squared distance to those picked before; of a
/// few such draws the one that lowers the sum of those distances most.
pub fn plus_plus<const TERMS: usize>(
    points: &Points<TERMS>,
    squared_norms: &[f32],
    clusters: usize,
    seed: u64,
    progress: &Progress,
) -> Result<Vec<f32>> {
    let mut centroids = Vec::with_capacity(clusters * points.dim());
    let mut closest = vec![f32::INFINITY; points.count()];
    let mut block_potentials = Vec::new();
    for cluster in 0..clusters {
        let stream = Stream::new(seed, Purpose::Seeding, cluster as u32);
        let drawn: Vec<usize> = if cluster == 0 {
            vec![stream.below(0, points.count())]
        } else {
            (0..trials(clusters) as u64).map(|trial| draw(stream, trial, &closest, &block_potentials)).collect()
        };
        let candidates = materialize(points, &drawn);
        let blocks = measure(points, squared_norms, &closest, &candidates, progress)?;
        let potential = |trial: usize| blocks.iter().map(|block| block.potentials[trial]).sum::<f64>();
        let potentials: Vec<f64> = (0..drawn.len()).map(potential).collect();
        let best =
            (1..drawn.len()).fold(0, |best, trial| if potentials[trial] < potentials[best] { trial } else { best });

        centroids.extend_from_slice(candidates.row(best));
        block_potentials.clear();
        let mut end = 0;
        for block in &blocks {
            let start = end;
            end += block.closest.len() / drawn.len();
            for (closest, trials) in closest[start..end].iter_mut().zip(block.closest.chunks_exact(drawn.len())) {
                *closest = trials[best];
            }
            block_potentials.push((end, block.potentials[best]));
        }
    }
    Ok(centroids)
}

/// Draws a point in proportion to its entry of `closest`, whose sums are given for each block with the block's end.
fn draw(stream: Stream, trial: u64, closest: &[f32], block_potentials: &[(usize, f64)]) -> usize {
    let total: f64 = block_potentials.iter().map(|(_, potential)| potential).sum();
    if total <= 0.0 {
        // Every point coincides with a centroid, so any will do.
        return stream.below(trial, closest.len());
    }
    let mut left = stream.uniform(trial) * total;
    let mut start = 0;
    // Rounding may leave a crumb at the end, which goes to the last point that can be drawn.
    let last =
        |distances: &[f32]| distances.iter().rposition(|&distance| distance > 0.0).expect("a positive potential");
    for &(end, potential) in block_potentials {
        if left < potential {
            let distances = &closest[start..end];
            let drawn = distances.iter().position(|&distance| {
                left -= f64::from(distance);
                left < 0.0
            });
            return start + drawn.unwrap_or_else(|| last(distances));
        }
        left -= potential;
        start = end;
    }
    last(closest)
}

fn materialize<const TERMS: usize>(points: &Points<TERMS>, drawn: &[usize]) -> Centroids {
    let mut values = vec![0.0; drawn.len() * points.dim()];
    for (&point, out) in drawn.iter().zip(values.chunks_exact_mut(points.dim())) {
        points.write_alone(point, out);
    }
    Centroids::new(values, points.dim())
}

fn measure<const TERMS: usize>(
    points: &Points<TERMS>,
    squared_norms: &[f32],
    closest: &[f32],
    candidates: &Centroids,
    progress: &Progress,
) -> Result<Vec<Block>> {
    let trials = candidates.count();
    let start =
        || (Block { closest: Vec::new(), potentials: vec![0.0; trials] }, Products::default(), vec![0.0; trials]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(block, products, distances), tile, gathered| {
        products.compute(gathered, candidates);
        for point in tile.points.clone() {
            squared_distances(points, point, squared_norms[point], products, candidates, distances);
            for (distance, potential) in distances.iter_mut().zip(&mut block.potentials) {
                *distance = distance.min(closest[point]);
                *potential += f64::from(*distance);
            }
            block.closest.extend_from_slice(distances);
        }
    })?;
    Ok(blocks.into_par_iter().map(|(block, ..)| block).collect())
}
