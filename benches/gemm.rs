//! The matrix product at the tile shapes of k-means, on one thread.

use std::hint::black_box;

use bpo::gemm::multiply;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    for dim in [384, 1024, 4096] {
        for columns in [8, 64, 256] {
            let rows = 256;
            let (left, right) = (vec![0.5; rows * dim], vec![0.25; dim * columns]);
            let mut product = vec![0.0; rows * columns];
            // One element is one multiplication with its addition.
            group.throughput(Throughput::Elements((rows * dim * columns) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{rows}x{dim}x{columns}")), |bencher| {
                bencher.iter(|| multiply(black_box(&left), black_box(&right), dim, &mut product));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
