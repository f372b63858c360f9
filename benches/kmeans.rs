//! Iterations of k-means over rows, over pairs, and the seeding, in points visited.

use bpo::kmeans::{Init, Params, fit};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::rng::{Purpose, Stream};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const DIM: usize = 512;
const CLUSTERS: usize = 64;
const ITERATIONS: usize = 3;
const RESPONSES: usize = 8;
const PROMPTS: usize = 250;

fn clusterings(criterion: &mut Criterion) {
    let stream = Stream::new(0, Purpose::Shuffle, 0);
    let values: Vec<f32> =
        (0..PROMPTS * RESPONSES * DIM).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect();
    let rows = Rows::new(Values::F32(&values), PROMPTS * RESPONSES, DIM).unwrap();
    let mut pairs = Vec::new();
    for prompt in 0..PROMPTS {
        for first in 0..RESPONSES {
            pairs.extend((first + 1..RESPONSES).map(|second| [first, second].map(|r| (prompt * RESPONSES + r) as i64)));
        }
    }
    let coefficients = vec![[1.0, -1.0]; pairs.len()];
    let given = Params {
        init: Init::Centroids(values[..CLUSTERS * DIM].to_vec()),
        max_iterations: ITERATIONS,
        tolerance: 0.0,
        ..Params::new(CLUSTERS)
    };
    let seeded = Params { max_iterations: 1, tolerance: 0.0, ..Params::new(CLUSTERS) };

    let mut group = criterion.benchmark_group("kmeans");
    group.sample_size(10);
    group.throughput(Throughput::Elements((ITERATIONS * rows.count()) as u64));
    group.bench_function("rows", |bencher| {
        bencher.iter(|| {
            fit(Points::from_rows(rows, &Progress::default()).unwrap(), &given, &Progress::default()).unwrap()
        });
    });
    group.throughput(Throughput::Elements((ITERATIONS * pairs.len()) as u64));
    group.bench_function("pairs", |bencher| {
        bencher.iter(|| {
            let points = Points::from_pairs(rows, &pairs, &coefficients, &Progress::default()).unwrap();
            fit(points, &given, &Progress::default()).unwrap()
        });
    });
    group.throughput(Throughput::Elements((CLUSTERS * rows.count()) as u64));
    group.bench_function("seeding", |bencher| {
        bencher.iter(|| {
            fit(Points::from_rows(rows, &Progress::default()).unwrap(), &seeded, &Progress::default()).unwrap()
        });
    });
    group.finish();
}

criterion_group!(benches, clusterings);
criterion_main!(benches);
