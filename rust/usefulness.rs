//! Scores of each pair, from which its usefulness is taken, and the order in which pairs are to be kept.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::points::Points;
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd;

/// Blocks of tiles: fixed, so that sums fold alike on any number of threads.
const BLOCKS: usize = 64;

/// ‖z_p‖ of each pair.
///
/// # Errors
/// If a row is not finite or the computation was cancelled.
pub fn pair_norms(points: &Points<2>, progress: &Progress) -> Result<Vec<f32>> {
    progress.start(points.tiles().len());
    let start = || (Vec::new(), vec![0.0; points.dim()]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(norms, values), tile, gathered| {
        for pair in tile.points.clone() {
            points.write(pair, gathered, values);
            norms.push(simd::dot(values, values).sqrt());
        }
    })?;
    let norms: Vec<f32> = blocks.into_iter().flat_map(|(norms, _)| norms).collect();
    match norms.iter().position(|norm| !norm.is_finite()) {
        Some(pair) => Err(points.not_finite(pair)),
        None => Ok(norms),
    }
}

/// Scores of pairs against their centroids and the optimization direction.
#[derive(Clone, Debug)]
pub struct Scores {
    /// ⟨z, c/‖c‖⟩; zero where the centroid is zero.
    pub centrality: Vec<f32>,
    /// ‖z − c‖.
    pub distance: Vec<f32>,
    /// ⟨z, u⟩.
    pub alignment: Vec<f32>,
    /// u, of unit length; zero where the pairs cancel out.
    pub direction: Vec<f32>,
}

/// Scores every pair against the centroid of its cluster (row-major `centroids`) and against the unit `direction`: the
/// normalised mean of the pairs, unless one is given (which is normalised too).
///
/// # Errors
/// If shapes do not fit, a label has no centroid, a value is not finite, or the computation was cancelled.
pub fn score_pairs(
    points: &Points<2>,
    centroids: &[f32],
    labels: &[i32],
    direction: Option<&[f32]>,
    progress: &Progress,
) -> Result<Scores> {
    let dim = points.dim();
    check(points, centroids, labels, direction)?;
    let passes = if direction.is_some() { 1 } else { 2 };
    progress.start(passes * points.tiles().len());
    let direction = match direction {
        Some(given) => normalized(given.iter().map(|&value| f64::from(value)).collect()),
        None => normalized(sum(points, progress)?),
    };
    let inverse_norms: Vec<f32> = centroids
        .chunks_exact(dim)
        .map(|centroid| simd::dot(centroid, centroid).sqrt())
        .map(|norm| if norm > 0.0 { norm.recip() } else { 0.0 })
        .collect();

    let start = || (Vec::new(), vec![0.0; dim]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(scores, values), tile, gathered| {
        for pair in tile.points.clone() {
            points.write(pair, gathered, values);
            let cluster = labels[pair] as usize;
            let centroid = &centroids[cluster * dim..(cluster + 1) * dim];
            let centrality = simd::dot(values, centroid) * inverse_norms[cluster];
            let distance = simd::squared_distance(values, centroid).sqrt();
            scores.push((centrality, distance, simd::dot(values, &direction)));
        }
    })?;
    let mut scores = Scores {
        centrality: Vec::with_capacity(points.count()),
        distance: Vec::with_capacity(points.count()),
        alignment: Vec::with_capacity(points.count()),
        direction,
    };
    for (centrality, distance, alignment) in blocks.into_iter().flat_map(|(scores, _)| scores) {
        scores.centrality.push(centrality);
        scores.distance.push(distance);
        scores.alignment.push(alignment);
    }
    match scores.distance.iter().position(|distance| !distance.is_finite()) {
        Some(pair) => Err(points.not_finite(pair)),
        None => Ok(scores),
    }
}

fn check(points: &Points<2>, centroids: &[f32], labels: &[i32], direction: Option<&[f32]>) -> Result<()> {
    let dim = points.dim();
    if dim == 0 {
        return Err(Error::shape("rows", "(n, d) with d >= 1", "(n, 0)"));
    }
    if !centroids.len().is_multiple_of(dim) {
        return Err(Error::shape("centroids", format!("(k, {dim})"), format!("({},)", centroids.len())));
    }
    let clusters = centroids.len() / dim;
    if labels.len() != points.count() {
        let expected = format!("({},), one for each pair", points.count());
        return Err(Error::shape("labels", expected, format!("({},)", labels.len())));
    }
    let known = |label: i32| usize::try_from(label).is_ok_and(|label| label < clusters);
    if let Some(index) = labels.iter().position(|&label| !known(label)) {
        let label = i64::from(labels[index]);
        return Err(Error::ClusterOutOfRange { array: "labels", index, label, clusters });
    }
    if let Some(index) = centroids.iter().position(|value| !value.is_finite()) {
        return Err(Error::NonFiniteRow { array: "centroids", row: index / dim });
    }
    if let Some(direction) = direction {
        if direction.len() != dim {
            return Err(Error::shape("direction", format!("({dim},)"), format!("({},)", direction.len())));
        }
        if let Some(index) = direction.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFinite { array: "direction", index, value: f64::from(direction[index]) });
        }
    }
    Ok(())
}

fn sum(points: &Points<2>, progress: &Progress) -> Result<Vec<f64>> {
    let dim = points.dim();
    let start = || (vec![0.0; dim], vec![0.0; dim]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(sum, values), tile, gathered| {
        for pair in tile.points.clone() {
            points.write(pair, gathered, values);
            simd::add_scaled_wide(sum, 1.0, values);
        }
    })?;
    Ok((0..dim).map(|index| blocks.iter().map(|(sum, _)| sum[index]).sum()).collect())
}

fn normalized(values: Vec<f64>) -> Vec<f32> {
    let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { norm.recip() } else { 0.0 };
    values.into_iter().map(|value| (value * scale) as f32).collect()
}

/// The order in which the pairs of a cluster are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ranking {
    /// The highest score first.
    Nearest,
    /// The lowest score first.
    Farthest,
    /// Drawn without replacement in proportion to exp(score / temperature).
    Softmax { temperature: f64 },
    /// Whatever the score.
    Random,
}

/// A key for each score; the pair with the larger key is kept first.
///
/// Sorting by score / temperature plus Gumbel noise draws without replacement from the softmax: Kool, van Hoof and
/// Welling, "Stochastic beams and where to find them" (ICML 2019). The noise of a pair depends on the seed and the
/// pair's index alone.
///
/// # Errors
/// If a score is not finite or the temperature is not positive.
pub fn ranking_keys(scores: &[f64], ranking: Ranking, seed: u64) -> Result<Vec<f64>> {
    if let Some(index) = scores.iter().position(|score| !score.is_finite()) {
        return Err(Error::NotFinite { array: "scores", index, value: scores[index] });
    }
    let keys = scores.par_iter().enumerate();
    Ok(match ranking {
        Ranking::Nearest => scores.to_vec(),
        Ranking::Farthest => keys.map(|(_, score)| -score).collect(),
        Ranking::Random => {
            let stream = Stream::new(seed, Purpose::Shuffle, 0);
            keys.map(|(pair, _)| stream.uniform(pair as u64)).collect()
        }
        Ranking::Softmax { temperature } => {
            if !(temperature > 0.0 && temperature.is_finite()) {
                return Err(Error::argument("temperature", "finite and above 0", temperature));
            }
            let stream = Stream::new(seed, Purpose::Gumbel, 0);
            // The middle of the 2^-53 wide cell that was drawn keeps both logarithms finite.
            let gumbel = |pair: usize| -(-(stream.uniform(pair as u64) + f64::EPSILON / 4.0).ln()).ln();
            keys.map(|(pair, score)| score / temperature + gumbel(pair)).collect()
        }
    })
}
