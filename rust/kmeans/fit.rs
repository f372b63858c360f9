//! The driver: survey the points, seed, alternate assignment and update, assign once more.

use super::assign::{Centroids, Products, assign_tile};
use super::init::plus_plus;
use super::params::{Init, Metric, Params};
use super::update::{PartialSums, Sums};
use crate::error::{Error, Result};
use crate::points::Points;
use crate::progress::Progress;
use crate::simd;

/// Blocks of passes that carry little state.
const BLOCKS: usize = 64;

/// Bytes of partial sums over all blocks. With 64 blocks this is reached at one million centroid values.
const PARTIAL_SUM_BYTES: usize = 256 << 20;

/// Squared norms at most: below it, no squared distance of two points overflows float32.
const MAX_SQUARED_NORM: f32 = f32::MAX / 16.0;

/// What k-means found.
#[derive(Clone, Debug)]
pub struct Clustering {
    /// Row-major (clusters, dim).
    pub centroids: Vec<f32>,
    /// The cluster of each point.
    pub labels: Vec<i32>,
    /// The Euclidean distance of each point to its centroid; with [`Metric::Cosine`], 1 − cosine.
    pub distances: Vec<f32>,
    /// Entry i is the inertia with the centroids after i updates: the sum of the squared distances, or with
    /// [`Metric::Cosine`] of 1 − cosine.
    pub inertia: Vec<f64>,
    /// How often the centroids were updated.
    pub iterations: usize,
    /// Whether the labels or the centroids settled before `max_iterations`.
    pub converged: bool,
}

/// Clusters the points.
///
/// # Errors
/// If the parameters do not fit the points, a row is not finite, a point has no direction ([`Metric::Cosine`]), or the
/// computation was cancelled.
pub fn fit<const TERMS: usize>(mut points: Points<TERMS>, params: &Params, progress: &Progress) -> Result<Clustering> {
    params.check(points.count(), points.dim())?;
    let dim = points.dim();
    let seeding_passes = if matches!(params.init, Init::PlusPlus) { params.clusters } else { 0 };
    progress.start(points.tiles().len() * (2 + seeding_passes + params.max_iterations + 1));

    let raw = survey(&points, progress)?;
    // Far from the origin the expanded distance cancels, so dense points are measured from their mean. Pairs need not
    // be: their coefficients hardly ever sum to one, and those of a margin loss sum to zero.
    let centred = params.metric == Metric::Euclidean && TERMS == 1;
    match params.metric {
        Metric::Euclidean if centred => points.set_origin(raw.mean.clone()),
        Metric::Euclidean => {}
        Metric::Cosine => points.scale(&inverse_norms(&raw.squared_norms)?),
    }
    let Survey { squared_norms, mean_variance, .. } = survey(&points, progress)?;

    let mut first = match &params.init {
        Init::PlusPlus => plus_plus(&points, &squared_norms, params.clusters, params.seed, progress)?,
        Init::Centroids(given) if centred => {
            let mut given = given.clone();
            given.chunks_exact_mut(dim).for_each(|centroid| simd::subtract(centroid, &raw.mean));
            given
        }
        Init::Centroids(given) => given.clone(),
    };
    if params.metric == Metric::Cosine {
        normalize_rows(&mut first, dim)?;
    }
    let mut centroids = Centroids::new(first, dim);

    let mut labels: Vec<u32> = Vec::new();
    let mut inertia = Vec::new();
    let mut converged = false;
    while !converged && inertia.len() < params.max_iterations {
        let mut step = assign_and_sum(&points, &squared_norms, &centroids, progress)?;
        inertia.push(step.squared_distances.iter().map(|&distance| f64::from(distance)).sum());
        converged = step.labels == labels;
        step.sums.refill_empty(&points, &mut step.labels, &step.squared_distances);
        let (moved, shift) = step.sums.centroids(params.metric, &centroids);
        converged |= shift <= params.tolerance * mean_variance;
        centroids = moved;
        labels = step.labels;
    }
    let iterations = inertia.len();
    let (labels, squared_distances) = assign_exactly(&points, &squared_norms, &centroids, progress)?;
    inertia.push(squared_distances.iter().map(|&distance| f64::from(distance)).sum());

    let distances = match params.metric {
        Metric::Euclidean => squared_distances.iter().map(|distance| distance.sqrt()).collect(),
        // ‖x − c‖² = 2 − 2⟨x, c⟩ for unit vectors.
        Metric::Cosine => {
            inertia.iter_mut().for_each(|inertia| *inertia /= 2.0);
            squared_distances.iter().map(|distance| distance / 2.0).collect()
        }
    };
    let mut centroids = centroids.values;
    if centred {
        centroids.chunks_exact_mut(dim).for_each(|centroid| simd::add_scaled(centroid, 1.0, &raw.mean));
    }
    progress.finish();
    Ok(Clustering { centroids, labels, distances, inertia, iterations, converged })
}

/// What one look at all points tells.
struct Survey {
    squared_norms: Vec<f32>,
    mean: Vec<f32>,
    /// The variance of a coordinate, averaged over the coordinates.
    mean_variance: f64,
}

fn survey<const TERMS: usize>(points: &Points<TERMS>, progress: &Progress) -> Result<Survey> {
    let dim = points.dim();
    let start = || (Vec::new(), vec![0.0; dim], vec![0.0; dim]);
    let blocks =
        points.fold_blocks(BLOCKS, progress, start, |(squared_norms, sum, point_values), tile, gathered| {
            for point in tile.points.clone() {
                points.write(point, gathered, point_values);
                squared_norms.push(simd::dot(point_values, point_values));
                simd::add_scaled_wide(sum, 1.0, point_values);
            }
        })?;
    let squared_norms: Vec<f32> = blocks.iter().flat_map(|(squared_norms, ..)| squared_norms).copied().collect();
    if let Some(point) = squared_norms.iter().position(|norm| norm.is_nan() || *norm > MAX_SQUARED_NORM) {
        return Err(points.not_finite(point));
    }
    let count = points.count() as f64;
    let sum = |index: usize| blocks.iter().map(|(_, sum, _)| sum[index]).sum::<f64>();
    let mean: Vec<f64> = (0..dim).map(|index| sum(index) / count).collect();
    let mean_square = squared_norms.iter().map(|&norm| f64::from(norm)).sum::<f64>() / count;
    let square_of_mean: f64 = mean.iter().map(|value| value * value).sum();
    Ok(Survey {
        squared_norms,
        mean: mean.into_iter().map(|value| value as f32).collect(),
        mean_variance: (mean_square - square_of_mean).max(0.0) / dim as f64,
    })
}

fn inverse_norms(squared_norms: &[f32]) -> Result<Vec<f32>> {
    let inverse = |(point, &squared_norm): (usize, &f32)| {
        if squared_norm > 0.0 { Ok(squared_norm.sqrt().recip()) } else { Err(Error::ZeroPoint { point }) }
    };
    squared_norms.iter().enumerate().map(inverse).collect()
}

fn normalize_rows(centroids: &mut [f32], dim: usize) -> Result<()> {
    for (row, centroid) in centroids.chunks_exact_mut(dim).enumerate() {
        let norm = simd::dot(centroid, centroid).sqrt();
        if norm.is_nan() || norm <= 0.0 {
            return Err(Error::argument(
                "init",
                "free of zero rows with metric=\"cosine\"",
                format!("zero in row {row}"),
            ));
        }
        centroid.iter_mut().for_each(|value| *value /= norm);
    }
    Ok(())
}

struct Step {
    labels: Vec<u32>,
    squared_distances: Vec<f32>,
    sums: Sums,
}

/// One pass: assigns every point and sums up the points of each cluster while their rows are in the cache.
fn assign_and_sum<const TERMS: usize>(
    points: &Points<TERMS>,
    squared_norms: &[f32],
    centroids: &Centroids,
    progress: &Progress,
) -> Result<Step> {
    struct State {
        labels: Vec<u32>,
        squared_distances: Vec<f32>,
        products: Products,
        sums: PartialSums,
    }
    let (clusters, dim) = (centroids.count(), points.dim());
    let start = || State {
        labels: Vec::new(),
        squared_distances: Vec::new(),
        products: Products::default(),
        sums: PartialSums::new(clusters, dim),
    };
    let limit = (PARTIAL_SUM_BYTES / size_of_val(centroids.values.as_slice())).clamp(8, BLOCKS);
    let blocks = points.fold_blocks(limit, progress, start, |state, tile, gathered| {
        state.products.compute(gathered, centroids);
        let first = state.labels.len();
        for (cluster, distance) in assign_tile(points, tile, squared_norms, &state.products, centroids) {
            state.labels.push(cluster as u32);
            state.squared_distances.push(distance);
        }
        state.sums.add_tile(points, tile, gathered, &state.labels[first..]);
    })?;
    let mut labels = Vec::with_capacity(points.count());
    let mut squared_distances = Vec::with_capacity(points.count());
    let mut sums = Vec::with_capacity(blocks.len());
    for block in blocks {
        labels.extend(block.labels);
        squared_distances.extend(block.squared_distances);
        sums.push(block.sums);
    }
    Ok(Step { labels, squared_distances, sums: Sums::fold(&sums, clusters, dim) })
}

/// The last pass: labels, and squared distances computed from x − c, free of the cancellation of the expanded form.
fn assign_exactly<const TERMS: usize>(
    points: &Points<TERMS>,
    squared_norms: &[f32],
    centroids: &Centroids,
    progress: &Progress,
) -> Result<(Vec<i32>, Vec<f32>)> {
    let start = || (Vec::new(), Products::default(), vec![0.0; points.dim()]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(assigned, products, values), tile, gathered| {
        products.compute(gathered, centroids);
        let nearest = assign_tile(points, tile, squared_norms, products, centroids);
        for (point, (cluster, _)) in tile.points.clone().zip(nearest) {
            points.write(point, gathered, values);
            assigned.push((cluster as i32, simd::squared_distance(values, centroids.row(cluster))));
        }
    })?;
    Ok(blocks.into_iter().flat_map(|(assigned, ..)| assigned).unzip())
}
