//! Scores against their definition in float64.

use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::ranking::{Ranking, ranking_keys};
use bpo::rng::{Purpose, Stream};
use bpo::usefulness::{pair_norms, score_pairs};
use half::f16;
use proptest::prelude::*;

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

proptest! {
    #[test]
    fn scores_are_what_they_are_defined_to_be(count in 1usize..400, dim in 1usize..40, seed in 0u64..1000) {
        let (row_count, clusters) = (17, 3);
        let rows = values(row_count * dim, seed);
        let centroids = values(clusters * dim, seed + 1);
        let coefficients: Vec<[f32; 2]> = values(2 * count, seed + 2).as_chunks().0.to_vec();
        let pairs: Vec<[i64; 2]> = (0..count).map(|pair| [pair % 17, (pair * 5 + 1) % 17].map(|row| row as i64)).collect();
        let labels: Vec<i32> = (0..count).map(|pair| (pair % clusters) as i32).collect();
        let view = Rows::new(Values::F32(&rows), row_count, dim).unwrap();
        let points = Points::from_pairs(view, &pairs, &coefficients, &Progress::default()).unwrap();
        let scores = score_pairs(&points, &centroids, &labels, None, &Progress::default()).unwrap();
        let norms = pair_norms(&points, &Progress::default()).unwrap();
        let direction: Vec<f64> = scores.direction.iter().map(|&value| f64::from(value)).collect();
        for pair in 0..count {
            let point: Vec<f64> = (0..dim)
                .map(|column| {
                    let term = |side: usize| {
                        f64::from(coefficients[pair][side]) * f64::from(rows[pairs[pair][side] as usize * dim + column])
                    };
                    term(0) + term(1)
                })
                .collect();
            let centroid = &centroids[labels[pair] as usize * dim..][..dim];
            let centroid: Vec<f64> = centroid.iter().map(|&value| f64::from(value)).collect();
            let difference: Vec<f64> = point.iter().zip(&centroid).map(|(point, centroid)| point - centroid).collect();
            let close = |found: f32, expected: f64| (f64::from(found) - expected).abs() < 1e-4;
            prop_assert!(close(norms[pair], dot(&point, &point).sqrt()));
            prop_assert!(close(scores.centrality[pair], dot(&point, &centroid) / dot(&centroid, &centroid).sqrt()));
            prop_assert!(close(scores.distance[pair], dot(&difference, &difference).sqrt()));
            prop_assert!(close(scores.alignment[pair], dot(&point, &direction)));
        }
    }
}

/// Pairs of groups of rows that no pair leaves: all pairs of a group, or some of them in any order and direction.
fn grouped_pairs(sizes: &[usize], all: bool, seed: u64) -> Vec<[i64; 2]> {
    let stream = Stream::new(seed, Purpose::Shuffle, 1);
    let mut pairs = Vec::new();
    let mut first = 0;
    for &size in sizes {
        let of_group = (0..size).flat_map(|one| (0..=one).map(move |other| [first + one, first + other]));
        pairs.extend(of_group.map(|pair| pair.map(|row| row as i64)));
        first += size;
    }
    let count = pairs.len() as u64;
    pairs.sort_by_key(|pair| stream.words((pair[0] * 300 + pair[1]) as u64)[0]);
    if !all {
        pairs.truncate(count as usize / 7 + 1);
    }
    pairs.iter().map(|&[one, other]| if (one + other) % 3 == 0 { [other, one] } else { [one, other] }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A product is the same to the bit whether its group is multiplied as a whole or its pair alone.
    #[test]
    fn a_score_does_not_depend_on_the_other_pairs(
        sizes in prop::collection::vec(1usize..12, 1..8),
        large in prop::option::of(60usize..80),
        dim in prop::sample::select(vec![1usize, 31, 100, 520, 1024]),
        all in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let sizes: Vec<usize> = sizes.into_iter().chain(large).collect();
        let row_count: usize = sizes.iter().sum();
        let rows = values(row_count * dim, seed);
        let view = Rows::new(Values::F32(&rows), row_count, dim).unwrap();
        let centroids = values(5 * dim, seed + 1);
        let direction = values(dim, seed + 2);
        let pairs = grouped_pairs(&sizes, all, seed);
        let labels: Vec<i32> = (0..pairs.len() as i32).map(|pair| pair * pair % 5).collect();
        let coefficients = vec![[0.7, -0.4]; pairs.len()];
        let score = |range: std::ops::Range<usize>| {
            let (own, factors) = (&pairs[range.clone()], &coefficients[range.clone()]);
            let points = Points::from_pairs(view, own, factors, &Progress::default()).unwrap();
            let progress = Progress::default();
            let scores = score_pairs(&points, &centroids, &labels[range], Some(&direction), &progress).unwrap();
            let norms = pair_norms(&points, &progress).unwrap();
            (0..norms.len())
                .map(|pair| [norms[pair], scores.centrality[pair], scores.distance[pair], scores.alignment[pair]])
                .collect::<Vec<_>>()
        };
        let together = score(0..pairs.len());
        for pair in (0..pairs.len()).step_by(pairs.len() / 40 + 1) {
            prop_assert_eq!(together[pair], score(pair..pair + 1)[0], "pair {:?}", pairs[pair]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Rows in half precision are widened a group at a time, others read where they lie.
    #[test]
    fn a_score_does_not_depend_on_how_rows_are_kept(
        sizes in prop::collection::vec(1usize..12, 1..70),
        dim in prop::sample::select(vec![1usize, 31, 100]),
        all in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let row_count: usize = sizes.iter().sum();
        let half: Vec<f16> = values(row_count * dim, seed).into_iter().map(f16::from_f32).collect();
        let wide: Vec<f32> = half.iter().map(|value| value.to_f32()).collect();
        let centroids = values(5 * dim, seed + 1);
        let pairs = grouped_pairs(&sizes, all, seed);
        let labels: Vec<i32> = (0..pairs.len() as i32).map(|pair| pair * pair % 5).collect();
        let coefficients = vec![[0.7, -0.4]; pairs.len()];
        let progress = Progress::default();
        let [half, wide] = [Values::F16(&half), Values::F32(&wide)].map(|rows| {
            let rows = Rows::new(rows, row_count, dim).unwrap();
            let points = Points::from_pairs(rows, &pairs, &coefficients, &progress).unwrap();
            let scores = score_pairs(&points, &centroids, &labels, None, &progress).unwrap();
            let norms = pair_norms(&points, &progress).unwrap();
            [norms, scores.centrality, scores.distance, scores.alignment, scores.direction]
        });
        prop_assert_eq!(half, wide);
    }
}

/// Rows close to one far point, so that the rows of a pair nearly cancel.
fn far_rows(row_count: usize, dim: usize, distance: f32, seed: u64) -> Vec<f32> {
    let origin = values(dim, seed + 100);
    values(row_count * dim, seed)
        .iter()
        .enumerate()
        .map(|(index, value)| value + distance * origin[index % dim])
        .collect()
}

proptest! {
    #[test]
    fn nothing_is_lost_to_cancellation(
        dim in 1usize..200,
        seed in 0u64..1000,
        distance in prop::sample::select(vec![0f32, 1.0, 4.0, 30.0, 1e3]),
        scale in prop::sample::select(vec![1f32, 1e-25, 1e17]),
    ) {
        let (row_count, clusters) = (12, 4);
        let rows: Vec<f32> = far_rows(row_count, dim, distance, seed).iter().map(|value| value * scale).collect();
        let pairs: Vec<[i64; 2]> = (0..row_count as i64).flat_map(|w| (0..w).map(move |l| [w, l])).collect();
        let coefficients = vec![[0.7 / scale, -0.7 / scale]; pairs.len()];
        let point = |pair: usize| -> Vec<f64> {
            let [w, l] = pairs[pair].map(|row| &rows[row as usize * dim..][..dim]);
            let [a, b] = coefficients[pair].map(f64::from);
            w.iter().zip(l).map(|(&w, &l)| a * f64::from(w) + b * f64::from(l)).collect()
        };
        // The first pairs lie on their centroid, but for the rounding to float32.
        let centroids: Vec<f32> = (0..clusters).flat_map(|pair| point(pair).into_iter().map(|value| value as f32)).collect();
        let labels: Vec<i32> = (0..pairs.len()).map(|pair| (pair % clusters) as i32).collect();
        let direction = values(dim, seed + 1);
        let view = Rows::new(Values::F32(&rows), row_count, dim).unwrap();
        let points = Points::from_pairs(view, &pairs, &coefficients, &Progress::default()).unwrap();
        let progress = Progress::default();
        let scores = score_pairs(&points, &centroids, &labels, Some(&direction), &progress).unwrap();
        let norms = pair_norms(&points, &progress).unwrap();
        let unit: Vec<f64> = scores.direction.iter().map(|&value| f64::from(value)).collect();
        for pair in 0..pairs.len() {
            let values = point(pair);
            let centroid: Vec<f64> =
                centroids[labels[pair] as usize * dim..][..dim].iter().map(|&value| f64::from(value)).collect();
            let difference: Vec<f64> = values.iter().zip(&centroid).map(|(value, centroid)| value - centroid).collect();
            let norm = dot(&values, &values).sqrt();
            // What forming the pair in float32 would lose, which is all that may be lost.
            let [w, l] = pairs[pair].map(|row| {
                let row: Vec<f64> = rows[row as usize * dim..][..dim].iter().map(|&value| f64::from(value)).collect();
                dot(&row, &row).sqrt() * f64::from(coefficients[pair][0])
            });
            let allowed = 1e-5 * norm + 1e-7 * (w + l);
            let close = |found: f32, expected: f64| (f64::from(found) - expected).abs() <= allowed;
            prop_assert!(close(norms[pair], norm), "{} {}", norms[pair], norm);
            prop_assert!(close(scores.distance[pair], dot(&difference, &difference).sqrt()));
            prop_assert!(close(scores.alignment[pair], dot(&values, &unit)));
            prop_assert!(close(scores.centrality[pair], dot(&values, &centroid) / dot(&centroid, &centroid).sqrt()));
        }
    }
}

#[test]
fn softmax_keys_are_finite() {
    let keys =
        ranking_keys(&vec![0.0; 100_000], Ranking::Softmax { temperature: 1.0 }, 0, &Progress::default()).unwrap();
    assert!(keys.iter().all(|key| key.is_finite()));
}
