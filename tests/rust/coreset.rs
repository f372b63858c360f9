//! The pursuit against its definition, step by step, in float64.

use bpo::coreset::{CACHE_BYTES, Coreset, coreset};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::prompts::Limits;
use bpo::rng::{Purpose, Stream};
use proptest::prelude::*;

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn dot(left: &[f64], right: &[f64]) -> f64 {
    left.iter().zip(right).map(|(left, right)| left * right).sum()
}

/// A problem of one or more clusters whose pairs overlap, some of them equal.
struct Problem {
    rows: Vec<f32>,
    dim: usize,
    pairs: Vec<[i64; 2]>,
    coefficients: Vec<[f32; 2]>,
    clusters: Vec<i32>,
}

impl Problem {
    fn new(count: usize, dim: usize, clusters: usize, seed: u64) -> Self {
        let stream = Stream::new(seed, Purpose::Seeding, 0);
        let row = |index: usize| stream.below(index as u64, 30) as i64;
        let distinct = count.div_ceil(2).max(count.saturating_sub(5));
        let pairs = (0..count).map(|pair| [row(2 * (pair % distinct)), row(2 * (pair % distinct) + 1)]).collect();
        let clusters = (0..count).map(|pair| (stream.below(9000 + pair as u64, clusters) * 2) as i32).collect();
        Self { rows: values(30 * dim, seed), dim, pairs, coefficients: vec![[1.0, -0.75]; count], clusters }
    }

    fn choose(&self, budget: usize, limits: Limits) -> (Coreset, Vec<Vec<f64>>) {
        let view = Rows::new(Values::F32(&self.rows), 30, self.dim).unwrap();
        let points = Points::from_pairs(view, &self.pairs, &self.coefficients, &Progress::default()).unwrap();
        let vectors = (0..self.pairs.len())
            .map(|pair| {
                let mut vector = vec![0.0; self.dim];
                points.write_alone(pair, &mut vector);
                vector.into_iter().map(f64::from).collect()
            })
            .collect();
        (coreset(&points, &self.clusters, budget, limits, CACHE_BYTES, &Progress::default()).unwrap(), vectors)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn each_pick_follows_from_those_before(count in 1usize..80, dim in 1usize..40, seed in 0u64..1000) {
        let problem = Problem::new(count, dim, 1, seed);
        let mut before: Option<(Coreset, Vec<f64>)> = None;
        for budget in 1..=count {
            let (chosen, vectors) = problem.choose(budget, Limits::default());
            prop_assert_eq!(chosen.picks.len(), budget);
            let mean: Vec<f64> =
                (0..dim).map(|column| vectors.iter().map(|vector| vector[column]).sum::<f64>() / count as f64).collect();
            let length = dot(&mean, &mean).sqrt();
            let mut residual = mean.clone();
            for (&pick, weight) in chosen.picks.iter().zip(&chosen.weights) {
                prop_assert!(*weight >= 0.0);
                residual.iter_mut().zip(&vectors[pick]).for_each(|(residual, value)| *residual -= weight * value);
            }
            // The conditions of Karush, Kuhn and Tucker, which say that no other weights are better.
            let fitted = chosen.weights.iter().any(|&weight| weight > 0.0);
            for (&pick, &weight) in chosen.picks.iter().zip(&chosen.weights).filter(|_| fitted) {
                let gradient = dot(&vectors[pick], &residual);
                let norm = dot(&vectors[pick], &vectors[pick]).sqrt();
                prop_assert!(gradient <= 1e-8 * length * (1.0 + norm), "{gradient}");
                prop_assert!(weight == 0.0 || gradient >= -1e-8 * length * (1.0 + norm), "{gradient}");
            }
            // The pick is the best for the residual before it, or for the mean once that has vanished.
            let previous = before.as_ref().map_or(&mean, |(_, residual)| residual);
            let picked = before.as_ref().map_or(&[][..], |(chosen, _)| &chosen.picks[..]);
            prop_assert_eq!(&chosen.picks[..picked.len()], picked);
            let pick = chosen.picks[budget - 1];
            let rest = || (0..count).filter(|pair| !picked.contains(pair));
            let best = |target: &[f64]| {
                let products = rest().map(|pair| dot(&vectors[pair], target));
                products.fold(f64::NEG_INFINITY, f64::max) - dot(&vectors[pick], target)
            };
            let vanished = rest().all(|pair| dot(&vectors[pair], previous) <= 1e-9 * length);
            prop_assert!(best(previous) <= 1e-9 * length || vanished && best(&mean) <= 1e-9 * length);
            prop_assert!(rest().all(|pair| vectors[pair] != vectors[pick] || pair >= pick));
            before = Some((chosen, residual));
        }
    }

    #[test]
    fn quotas_limits_and_sum_hold(
        count in 1usize..150,
        clusters in 1usize..5,
        budget in 0usize..170,
        seed in 0u64..1000,
        max_depth in prop::option::of(1usize..5),
        masked in any::<bool>(),
    ) {
        let problem = Problem::new(count, 12, clusters, seed);
        let prompts: Vec<i64> = (0..count as i64).map(|pair| pair * 7 % 13).collect();
        let eligible: Vec<bool> = (0..count).map(|pair| pair % 4 != 1).collect();
        let limits = Limits {
            eligible: masked.then_some(eligible.as_slice()),
            depth: max_depth.map(|depth| (prompts.as_slice(), depth)),
        };
        let (chosen, _) = problem.choose(budget, limits);
        // Pairs without a copy, some of them or all, are found by their rows, with the same result.
        let view = Rows::new(Values::F32(&problem.rows), 30, problem.dim).unwrap();
        let points = Points::from_pairs(view, &problem.pairs, &problem.coefficients, &Progress::default()).unwrap();
        for cache_bytes in [0, problem.dim * count / 3] {
            let same = coreset(&points, &problem.clusters, budget, limits, cache_bytes, &Progress::default()).unwrap();
            prop_assert_eq!((&same.picks, &same.weights), (&chosen.picks, &chosen.weights));
        }
        let usable = |pair: usize| !masked || eligible[pair];
        let available: usize = (0..13)
            .map(|prompt| (0..count).filter(|&pair| prompts[pair] == prompt && usable(pair)).count())
            .map(|size| size.min(max_depth.unwrap_or(usize::MAX)))
            .sum();
        prop_assert_eq!(chosen.picks.len(), budget.min(available));
        prop_assert_eq!(chosen.weights.len(), chosen.picks.len());
        prop_assert!(chosen.picks.iter().all(|&pick| usable(pick)));
        let mut sorted = chosen.picks.clone();
        sorted.sort_unstable();
        prop_assert!(sorted.is_sorted_by(|left, right| left < right));
        for prompt in 0..13 {
            let depth = sorted.iter().filter(|&&pick| prompts[pick] == prompt).count();
            prop_assert!(depth <= max_depth.unwrap_or(usize::MAX));
        }
        if max_depth.is_none() {
            let usable_count = (0..count).filter(|&pair| usable(pair)).count();
            for cluster in 0..2 * clusters as i32 {
                let size = (0..count).filter(|&pair| problem.clusters[pair] == cluster && usable(pair)).count();
                let picked = sorted.iter().filter(|&&pick| problem.clusters[pick] == cluster).count();
                let share = size as f64 * budget.min(usable_count) as f64 / usable_count.max(1) as f64;
                prop_assert!((picked as f64 - share).abs() < 1.0);
            }
        }
    }
}
