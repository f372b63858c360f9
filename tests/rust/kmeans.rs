//! K-means against Lloyd's algorithm written out, and pairs against materialised pairs.

use bpo::kmeans::{Clustering, Init, Metric, Params, assign, fit};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::rng::{Purpose, Stream};
use bpo::simd::{self, Level};
use proptest::prelude::*;

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn cluster_rows(values: &[f32], dim: usize, params: &Params) -> Clustering {
    let rows = Rows::new(Values::F32(values), values.len() / dim, dim).unwrap();
    fit(Points::from_rows(rows, &Progress::default()).unwrap(), params, &Progress::default()).unwrap()
}

fn squared_distance(left: &[f32], right: &[f32]) -> f64 {
    left.iter().zip(right).map(|(&left, &right)| (f64::from(left) - f64::from(right)).powi(2)).sum()
}

/// The inertia after `iterations` of Lloyd's algorithm. An empty cluster is not expected.
fn lloyd(points: &[f32], dim: usize, mut centroids: Vec<f32>, iterations: usize) -> f64 {
    let nearest = |point: &[f32], centroids: &[f32]| {
        let distances = centroids.chunks_exact(dim).map(|centroid| squared_distance(point, centroid));
        distances.enumerate().min_by(|left, right| left.1.total_cmp(&right.1)).unwrap()
    };
    for _ in 0..iterations {
        let mut sums = vec![0.0; centroids.len()];
        let mut counts = vec![0.0; centroids.len() / dim];
        for point in points.chunks_exact(dim) {
            let (cluster, _) = nearest(point, &centroids);
            counts[cluster] += 1.0;
            for (sum, value) in sums[cluster * dim..].iter_mut().zip(point) {
                *sum += f64::from(*value);
            }
        }
        for (index, centroid) in centroids.iter_mut().enumerate() {
            *centroid = (sums[index] / counts[index / dim]) as f32;
        }
    }
    points.chunks_exact(dim).map(|point| nearest(point, &centroids).1).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn rows_follow_lloyd(count in 40usize..700, dim in 1usize..20, clusters in 1usize..5, seed in 0u64..1000) {
        let points = values(count * dim, seed);
        let init = points[..clusters * dim].to_vec();
        let params = Params {
            init: Init::Centroids(init.clone()),
            max_iterations: 4,
            tolerance: 0.0,
            ..Params::new(clusters)
        };
        let found = cluster_rows(&points, dim, &params);
        let expected = lloyd(&points, dim, init, 4);
        prop_assert!((found.inertia.last().unwrap() - expected).abs() <= 1e-3 * expected);
    }

    #[test]
    fn pairs_follow_materialised_pairs(
        prompts in 3usize..40, dim in 1usize..30, clusters in 1usize..6, seed in 0u64..1000, cosine in any::<bool>(),
    ) {
        let responses = 5;
        let rows = values(prompts * responses * dim, seed);
        let mut pairs = Vec::new();
        for prompt in 0..prompts {
            for first in 0..responses {
                pairs.extend((first + 1..responses).map(|second| [first, second].map(|r| (prompt * responses + r) as i64)));
            }
        }
        let coefficients: Vec<[f32; 2]> =
            values(pairs.len(), seed + 1).into_iter().map(|value| [1.0 + value, -1.0 - value]).collect();
        let row = |index: i64| &rows[index as usize * dim..(index as usize + 1) * dim];
        let mut materialised = Vec::new();
        for (pair, coefficients) in pairs.iter().zip(&coefficients) {
            let terms = row(pair[0]).iter().zip(row(pair[1]));
            materialised.extend(terms.map(|(left, right)| coefficients[0] * left + coefficients[1] * right));
        }
        let params = Params {
            init: Init::Centroids(materialised[..clusters * dim].to_vec()),
            metric: if cosine { Metric::Cosine } else { Metric::Euclidean },
            max_iterations: 3,
            tolerance: 0.0,
            ..Params::new(clusters)
        };
        let view = Rows::new(Values::F32(&rows), prompts * responses, dim).unwrap();
        let points = Points::from_pairs(view, &pairs, &coefficients, &Progress::default()).unwrap();
        let implicit = fit(points, &params, &Progress::default()).unwrap();
        let explicit = cluster_rows(&materialised, dim, &params);
        let (implicit, explicit) = (implicit.inertia.last().unwrap(), explicit.inertia.last().unwrap());
        prop_assert!((implicit - explicit).abs() <= 1e-3 * explicit + 1e-6);
    }

    #[test]
    fn seeding_never_fails(count in 1usize..30, distinct in 1usize..5, clusters in 1usize..30, seed in 0u64..1000) {
        let clusters = clusters.min(count);
        let points: Vec<f32> = (0..count).map(|index| (index % distinct) as f32).collect();
        let found = cluster_rows(&points, 1, &Params { seed, ..Params::new(clusters) });
        prop_assert!(found.converged);
        prop_assert!(found.labels.iter().all(|&label| (label as usize) < clusters));
        if distinct <= clusters {
            prop_assert!(*found.inertia.last().unwrap() < 1e-6);
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let points = values(3000 * 16, 0);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| cluster_rows(&points, 16, &Params::new(12)))
    };
    let (one, many) = (run(1), run(5));
    assert_eq!(one.labels, many.labels);
    assert_eq!(one.centroids, many.centroids);
    assert_eq!(one.inertia, many.inertia);
}

/// Products differ from level to level in speed alone; what they leave open is measured in one order.
#[test]
fn levels_do_not_matter() {
    let points = values(2000 * 100, 3);
    let mut found = Vec::new();
    for level in [Level::Plain, Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vnni] {
        simd::set_level(level);
        found.push(cluster_rows(&points, 100, &Params { max_iterations: 5, ..Params::new(20) }));
    }
    for other in &found[1..] {
        assert_eq!(other.labels, found[0].labels);
        assert_eq!(other.centroids, found[0].centroids);
        assert_eq!(other.inertia, found[0].inertia);
        assert_eq!(other.distances, found[0].distances);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Bounds in 8 bits may rule out nothing that is nearest: every label is the centroid with the lowest distance.
    #[test]
    fn labels_are_nearest(
        count in 30usize..400, dim in 48usize..200, clusters in 2usize..30, seed in 0u64..1000,
        offset in prop::sample::select(vec![0.0f32, 10.0, 1000.0]), outlier in any::<bool>(), scale in -20i32..20,
    ) {
        let mut points = values(count * dim, seed);
        points.iter_mut().for_each(|value| *value = (*value + offset) * 2f32.powi(scale));
        if outlier {
            points[0] *= 1e5;
        }
        // Duplicates tie exactly.
        let copy = points[..dim].to_vec();
        points[dim..2 * dim].copy_from_slice(&copy);
        let params = Params { max_iterations: 3, seed, ..Params::new(clusters) };
        let found = cluster_rows(&points, dim, &params);
        for (point, (values, &label)) in points.chunks_exact(dim).zip(&found.labels).enumerate() {
            let distance = |centroid: &[f32]| squared_distance(values, centroid);
            let nearest = found.centroids.chunks_exact(dim).map(distance).fold(f64::INFINITY, f64::min);
            let own = distance(&found.centroids[label as usize * dim..(label as usize + 1) * dim]);
            prop_assert!(own <= nearest * (1.0 + 1e-5) + 1e-30, "point {}: {} but {}", point, own, nearest);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Pairs of a row with nothing are looked at before they meet the centroids, as rows are where they are far from 1.
    #[test]
    fn rows_that_are_read_once_get_the_same_labels(
        count in 1usize..400,
        dim in prop::sample::select(vec![3usize, 47, 64, 500]),
        clusters in prop::sample::select(vec![1usize, 9, 31, 70, 130]),
        offset in prop::sample::select(vec![0.0f32, 2.0, 300.0]),
        scale in prop::sample::select(vec![1.0f32, 1e-3, 1e-12, 1e12]),
        seed in 0u64..1000,
    ) {
        let moved = |values: Vec<f32>| values.iter().map(|value| (value + offset) * scale).collect::<Vec<f32>>();
        let (points, centroids) = (moved(values(count * dim, seed)), moved(values(clusters * dim, seed + 1)));
        let rows = Rows::new(Values::F32(&points), count, dim).unwrap();
        let pairs: Vec<[i64; 2]> = (0..count as i64).map(|row| [row, row]).collect();
        let progress = Progress::default();
        let pairs = Points::from_pairs(rows, &pairs, &vec![[1.0, 0.0]; count], &progress).unwrap();
        let points = Points::from_rows(rows, &progress).unwrap();
        let (labels, distances) = assign(points, &centroids, Metric::Euclidean, &progress).unwrap();
        let expected = assign(pairs, &centroids, Metric::Euclidean, &progress).unwrap();
        prop_assert_eq!(labels, expected.0);
        prop_assert_eq!(distances, expected.1);
    }
}
