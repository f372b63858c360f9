//! The lazy rounds against the plain greedy algorithm with an explicit inverse.

use bpo::Error;
use bpo::cholesky::Triangle;
use bpo::d_optimal::d_optimal;
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::prompts::Limits;
use bpo::rng::{Purpose, Stream};
use bpo::simd::block::{Lanes, SIDE};
use proptest::prelude::*;

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

/// vᵀMv for a symmetric matrix.
fn form(matrix: &[f64], vector: &[f64]) -> f64 {
    apply(matrix, vector).iter().zip(vector).map(|(left, right)| left * right).sum()
}

fn apply(matrix: &[f64], vector: &[f64]) -> Vec<f64> {
    let row = |row: &[f64]| row.iter().zip(vector).map(|(left, right)| left * right).sum();
    matrix.chunks_exact(vector.len()).map(row).collect()
}

/// Follows the picks by Sherman–Morrison; each must have the largest gain of all that were allowed, but for rounding.
fn assert_greedy(
    vectors: &[Vec<f64>],
    regularization: f64,
    allowed: impl Fn(&[usize], usize) -> bool,
    picks: &[usize],
    gains: &[f64],
) {
    let dim = vectors[0].len();
    let mut inverse = vec![0.0; dim * dim];
    (0..dim).for_each(|index| inverse[index * (dim + 1)] = 1.0 / regularization);
    for (step, (&pick, &gain)) in picks.iter().zip(gains).enumerate() {
        let found = form(&inverse, &vectors[pick]).ln_1p();
        assert!((found - gain).abs() <= 1e-9 * (1.0 + gain), "step {step}: {found} {gain}");
        assert!(allowed(&picks[..step], pick) && !picks[..step].contains(&pick));
        for pair in (0..vectors.len()).filter(|&pair| !picks[..step].contains(&pair) && allowed(&picks[..step], pair)) {
            let other = form(&inverse, &vectors[pair]).ln_1p();
            assert!(other <= gain + 1e-9 * (1.0 + gain), "step {step}: {pair} beats {pick}");
            // Only equal vectors tie for certain; elsewhere rounding decides.
            assert!(vectors[pair] != vectors[pick] || pair >= pick);
        }
        let product = apply(&inverse, &vectors[pick]);
        let scale = 1.0 / (1.0 + form(&inverse, &vectors[pick]));
        for row in 0..dim {
            for column in 0..dim {
                inverse[row * dim + column] -= scale * product[row] * product[column];
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn picks_are_those_of_the_plain_greedy_algorithm(
        count in 1usize..160,
        dim in 1usize..40,
        budget in 0usize..200,
        seed in 0u64..1000,
        regularization in prop::sample::select(vec![1e-4, 0.1, 1.0, 100.0]),
        max_depth in prop::option::of(1usize..4),
        masked in any::<bool>(),
    ) {
        let row_count = 25;
        let rows = values(row_count * dim, seed);
        let stream = Stream::new(seed, Purpose::Seeding, 0);
        let row = |index: usize| stream.below(index as u64, row_count) as i64;
        // Pairs of one row with itself are zero vectors; the last are copies of the first.
        let distinct = count.div_ceil(2);
        let pairs: Vec<[i64; 2]> = (0..count).map(|pair| [row(2 * (pair % distinct)), row(2 * (pair % distinct) + 1)]).collect();
        let coefficients: Vec<[f32; 2]> = (0..count).map(|pair| [(pair % distinct % 7) as f32 * 0.3; 2]).map(|[a, b]| [a, -b]).collect();
        let prompts: Vec<i64> = (0..count as i64).map(|pair| pair % 11 - 3).collect();
        let eligible: Vec<bool> = (0..count).map(|pair| pair % 5 != 2).collect();
        let view = Rows::new(Values::F32(&rows), row_count, dim).unwrap();
        let points = Points::from_pairs(view, &pairs, &coefficients, &Progress::default()).unwrap();
        let limits = Limits {
            eligible: masked.then_some(eligible.as_slice()),
            depth: max_depth.map(|depth| (prompts.as_slice(), depth)),
        };
        let design = d_optimal(&points, budget, regularization, limits, &Progress::default()).unwrap();

        let vectors: Vec<Vec<f64>> = (0..count)
            .map(|pair| {
                let mut vector = vec![0.0; dim];
                points.write_alone(pair, &mut vector);
                vector.into_iter().map(f64::from).collect()
            })
            .collect();
        let allowed = |picks: &[usize], pair: usize| {
            let depth = picks.iter().filter(|&&pick| prompts[pick] == prompts[pair]).count();
            (!masked || eligible[pair]) && max_depth.is_none_or(|cap| depth < cap)
        };
        let available: usize = (-3..8)
            .map(|prompt| (0..count).filter(|&pair| prompts[pair] == prompt && (!masked || eligible[pair])).count())
            .map(|size| size.min(max_depth.unwrap_or(usize::MAX)))
            .sum();
        prop_assert_eq!(design.picks.len(), budget.min(available));
        assert_greedy(&vectors, regularization, allowed, &design.picks, &design.gains);
    }
}

#[test]
fn thousands_of_picks_do_not_drift() {
    let (row_count, dim) = (1500, 24);
    let rows = values(row_count * dim, 0);
    let pairs: Vec<[i64; 2]> = (0..4000).map(|pair| [pair * 7 % 1500, (pair * 11 + 5) % 1500]).collect();
    let coefficients: Vec<[f32; 2]> = values(4000, 1).iter().map(|&value| [30.0 * value, -30.0 * value]).collect();
    let view = Rows::new(Values::F32(&rows), row_count, dim).unwrap();
    let points = Points::from_pairs(view, &pairs, &coefficients, &Progress::default()).unwrap();
    let design = d_optimal(&points, 3000, 1e-3, Limits::default(), &Progress::default()).unwrap();
    assert!(design.gains.is_sorted_by(|earlier, later| later <= earlier));
    // The gains add up to the growth of log det A, by an elimination from scratch.
    let mut matrix = Triangle::zeros(dim).unwrap();
    matrix.set_diagonal(1e-3);
    let mut vector = vec![0.0; dim];
    for &pick in &design.picks {
        points.write_alone(pick, &mut vector);
        let mut groups = vec![Lanes::ZERO; dim.div_ceil(SIDE)];
        vector.iter().enumerate().for_each(|(index, &value)| groups[index / SIDE].0[index % SIDE] = f64::from(value));
        matrix.add_products(&groups, 1, &Progress::default()).unwrap();
    }
    matrix.factor(&Progress::default()).unwrap();
    let log_determinant: f64 = (0..dim).map(|index| 2.0 * (matrix.get(index, index) / 1e-3f64.sqrt()).ln()).sum();
    let total: f64 = design.gains.iter().sum();
    assert!((total - log_determinant).abs() < 1e-9 * total, "{total} {log_determinant}");
}

#[test]
fn what_cannot_be_chosen_from_is_refused() {
    let rows = [1.0, f32::NAN];
    let view = Rows::new(Values::F32(&rows), 2, 1).unwrap();
    let points = Points::from_pairs(view, &[[0, 0], [0, 1]], &[[1.0, -1.0]; 2], &Progress::default()).unwrap();
    let choose =
        |regularization: f64, limits: Limits| d_optimal(&points, 1, regularization, limits, &Progress::default());
    assert!(matches!(choose(0.0, Limits::default()), Err(Error::Argument { argument: "regularization", .. })));
    assert!(matches!(choose(1.0, Limits::default()), Err(Error::NonFiniteRow { array: "rows", row: 1, .. })));
    let limits = Limits { eligible: Some(&[true]), ..Limits::default() };
    assert!(matches!(choose(1.0, limits), Err(Error::Shape { array: "eligible", .. })));
    let limits = Limits { depth: Some((&[0, 0], 0)), ..Limits::default() };
    assert!(matches!(choose(1.0, limits), Err(Error::Argument { argument: "max_depth", .. })));
}
