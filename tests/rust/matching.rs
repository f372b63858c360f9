//! Picks by copies of the rows against the plain greedy algorithm, which forms every sum.

use bpo::Error;
use bpo::matching::{Sharing, matching};
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

/// The cosine of a sum and the target; none where it is zero.
fn cosine(sum: &[f64], target: &[f64]) -> Option<f64> {
    let square = dot(sum, sum);
    (square > 0.0).then(|| dot(sum, target) / (square * dot(target, target)).sqrt())
}

/// Follows the picks; each must have the largest cosine of all that were allowed, but for rounding.
fn assert_greedy(
    vectors: &[Vec<f64>],
    target: &[f64],
    allowed: impl Fn(&[usize], usize) -> bool,
    picks: &[usize],
    cosines: &[f64],
) {
    let mut sum = vec![0.0; target.len()];
    for (step, (&pick, &found)) in picks.iter().zip(cosines).enumerate() {
        let before = &picks[..step];
        let with =
            |pair: usize| -> Vec<f64> { sum.iter().zip(&vectors[pair]).map(|(sum, value)| sum + value).collect() };
        let own = cosine(&with(pick), target);
        assert!((own.unwrap_or(0.0) - found).abs() < 1e-12, "step {step}: {own:?} {found}");
        assert!(allowed(before, pick) && !before.contains(&pick));
        for pair in (0..vectors.len()).filter(|&pair| !before.contains(&pair) && allowed(before, pair)) {
            let other = cosine(&with(pair), target).unwrap_or(f64::NEG_INFINITY);
            assert!(other <= own.unwrap_or(f64::NEG_INFINITY) + 1e-12, "step {step}: {pair} beats {pick}");
            assert!(vectors[pair] != vectors[pick] || pair >= pick);
        }
        sum = with(pick);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn picks_are_those_of_the_plain_greedy_algorithm(
        count in 1usize..900,
        dim in prop::sample::select(vec![1, 2, 7, 33]),
        budget in 0usize..129, // then several are picked at once
        seed in 0u64..1000,
        max_depth in prop::option::of(1usize..4),
        masked in any::<bool>(),
        // Rows that have a copy.
        cached in prop::sample::select(vec![0usize, 31, 1000]),
        // Pairs for one another's opposite, and for the target or against it.
        leaning in prop::sample::select(vec![0.0f32, 0.5, -3.0]),
    ) {
        let row_count = 60;
        let target = values(dim, seed + 1);
        let mut rows = values(row_count * dim, seed);
        for row in rows.chunks_exact_mut(dim).step_by(2) {
            row.iter_mut().zip(&target).for_each(|(value, target)| *value += leaning * target);
        }
        let stream = Stream::new(seed, Purpose::Seeding, 0);
        // Pairs of one row with itself are zero vectors; the last are copies of the first.
        let distinct = count.div_ceil(2);
        let row = |index: usize| stream.below(index as u64, row_count) as i64;
        let pairs: Vec<[i64; 2]> =
            (0..count).map(|pair| [row(2 * (pair % distinct)), row(2 * (pair % distinct) + 1)]).collect();
        let weight = |pair: usize| (pair % distinct % 7) as f32 * 0.3 - 0.6;
        let coefficients: Vec<[f32; 2]> = (0..count).map(|pair| [weight(pair), -weight(pair)]).collect();
        let prompts: Vec<i64> = (0..count as i64).map(|pair| pair % 211 - 3).collect();
        let eligible: Vec<bool> = (0..count).map(|pair| pair % 5 != 2).collect();
        let view = Rows::new(Values::F32(&rows), row_count, dim).unwrap();
        let points = Points::from_pairs(view, &pairs, &coefficients, &Progress::default()).unwrap();
        let limits = Limits {
            eligible: masked.then_some(eligible.as_slice()),
            depth: max_depth.map(|depth| (prompts.as_slice(), depth)),
        };
        let found = matching(&points, &target, budget, limits, Sharing::default(), cached * dim, &Progress::default()).unwrap();

        let vectors: Vec<Vec<f64>> = pairs
            .iter()
            .zip(&coefficients)
            .map(|(pair, coefficients)| {
                let value = |index: usize| {
                    let value = |term: usize| f64::from(coefficients[term]) * f64::from(rows[pair[term] as usize * dim + index]);
                    value(0) + value(1)
                };
                (0..dim).map(value).collect()
            })
            .collect();
        let allowed = |picks: &[usize], pair: usize| {
            let depth = picks.iter().filter(|&&pick| prompts[pick] == prompts[pair]).count();
            (!masked || eligible[pair]) && max_depth.is_none_or(|cap| depth < cap)
        };
        let available: usize = (-3..208)
            .map(|prompt| (0..count).filter(|&pair| prompts[pair] == prompt && (!masked || eligible[pair])).count())
            .map(|size| size.min(max_depth.unwrap_or(usize::MAX)))
            .sum();
        prop_assert_eq!(found.picks.len(), budget.min(available));
        let target: Vec<f64> = target.into_iter().map(f64::from).collect();
        assert_greedy(&vectors, &target, allowed, &found.picks, &found.cosines);
    }
}

#[test]
fn what_has_no_direction_is_refused() {
    let rows = [1.0, f32::NAN];
    let view = Rows::new(Values::F32(&rows), 2, 1).unwrap();
    let points = Points::from_pairs(view, &[[0, 0], [0, 1]], &[[1.0, -1.0]; 2], &Progress::default()).unwrap();
    let choose = |target: &[f32], limits: Limits| {
        matching(&points, target, 1, limits, Sharing::default(), 1 << 20, &Progress::default())
    };
    assert!(matches!(choose(&[0.0], Limits::default()), Err(Error::ZeroVector { array: "target" })));
    assert!(matches!(choose(&[], Limits::default()), Err(Error::Shape { array: "target", .. })));
    assert!(matches!(choose(&[f32::INFINITY], Limits::default()), Err(Error::NotFinite { array: "target", .. })));
    assert!(matches!(choose(&[1.0], Limits::default()), Err(Error::NonFiniteRow { array: "rows", row: 1, .. })));
    let limits = Limits { depth: Some((&[0, 0], 0)), ..Limits::default() };
    assert!(matches!(choose(&[1.0], limits), Err(Error::Argument { argument: "max_depth", .. })));
}

#[test]
fn what_cannot_be_shared_out_is_refused() {
    let rows = [1.0, 2.0];
    let view = Rows::new(Values::F32(&rows), 2, 1).unwrap();
    let points = Points::from_pairs(view, &[[0, 0], [1, 1]], &[[1.0, 0.0]; 2], &Progress::default()).unwrap();
    let choose = |limits: Limits, sharing: Sharing| {
        matching(&points, &[1.0], 1, limits, sharing, 1 << 20, &Progress::default()).map(|found| found.picks)
    };
    let of_clusters = |clusters| Sharing { clusters: Some(clusters), ..Sharing::default() };
    assert_eq!(choose(Limits::default(), of_clusters((&[4, 2], None))).unwrap(), [1]); // ties: the lower cluster
    let refused = choose(Limits::default(), of_clusters((&[0], None)));
    assert!(matches!(refused, Err(Error::Shape { array: "clusters", .. })));
    let refused = choose(Limits::default(), of_clusters((&[0, 2], Some(&[1.0, 1.0]))));
    assert!(matches!(refused, Err(Error::ClusterOutOfRange { index: 1, label: 2, clusters: 2, .. })));
    let refused = choose(Limits::default(), of_clusters((&[0, 0], Some(&[f64::NAN]))));
    assert!(matches!(refused, Err(Error::Weight { array: "cluster_weights", index: 0, .. })));
    let each = Sharing { every_prompt: true, ..Sharing::default() };
    assert!(matches!(choose(Limits::default(), each), Err(Error::Argument { argument: "every_prompt", .. })));
    let limits = Limits { depth: Some((&[0, 1], usize::MAX)), ..Limits::default() };
    assert!(matches!(choose(limits, each), Err(Error::BudgetBelowPrompts { budget: 1, prompts: 2 })));
}
