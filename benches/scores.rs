//! Norms, scores, depth and choices of pairs, in pairs.

use bpo::coreset::{CACHE_BYTES, coreset};
use bpo::d_optimal::d_optimal;
use bpo::depth::{Candidates, allocate_depth};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::prompts::Limits;
use bpo::rng::{Purpose, Stream};
use bpo::usefulness::{pair_norms, score_pairs};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const DIM: usize = 1024;
const CLUSTERS: usize = 50;
const RESPONSES: usize = 8;
const PROMPTS: usize = 500;

fn scores(criterion: &mut Criterion) {
    let stream = Stream::new(0, Purpose::Shuffle, 0);
    let values: Vec<f32> =
        (0..PROMPTS * RESPONSES * DIM).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect();
    let rows = Rows::new(Values::F32(&values), PROMPTS * RESPONSES, DIM).unwrap();
    let mut pairs = Vec::new();
    let mut prompts = Vec::new();
    for prompt in 0..PROMPTS {
        for first in 0..RESPONSES {
            for second in first + 1..RESPONSES {
                pairs.push([first, second].map(|response| (prompt * RESPONSES + response) as i64));
                prompts.push(prompt as i64);
            }
        }
    }
    let coefficients = vec![[1.0, -1.0]; pairs.len()];
    let points = Points::from_pairs(rows, &pairs, &coefficients, &Progress::default()).unwrap();
    let labels: Vec<i32> = (0..pairs.len()).map(|pair| (pair % CLUSTERS) as i32).collect();
    let usefulness: Vec<f64> = (0..pairs.len()).map(|pair| stream.uniform(pair as u64)).collect();

    let mut group = criterion.benchmark_group("scores");
    group.throughput(Throughput::Elements(pairs.len() as u64));
    group.bench_function("pair_norms", |bencher| {
        bencher.iter(|| pair_norms(&points, &Progress::default()).unwrap());
    });
    group.bench_function("score_pairs", |bencher| {
        bencher.iter(|| score_pairs(&points, &values[..CLUSTERS * DIM], &labels, None, &Progress::default()).unwrap());
    });
    let candidates = Candidates { prompts: &prompts, clusters: &labels, usefulness: &usefulness };
    group.bench_function("allocate_depth", |bencher| {
        bencher.iter(|| allocate_depth(candidates, 2 * PROMPTS, true, Some(4), None, &Progress::default()).unwrap());
    });
    group.sample_size(10);
    group.bench_function("d_optimal", |bencher| {
        bencher.iter(|| d_optimal(&points, PROMPTS, 1.0, Limits::default(), &Progress::default()).unwrap());
    });
    group.bench_function("coreset", |bencher| {
        bencher
            .iter(|| coreset(&points, &labels, PROMPTS, Limits::default(), CACHE_BYTES, &Progress::default()).unwrap());
    });
    group.finish();
}

criterion_group!(benches, scores);
criterion_main!(benches);
