//! The matrix product at the tile shapes of k-means, on one thread.

use std::hint::black_box;

use bpo::gemm::{Packed, multiply};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn products(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    for dim in [384, 1024, 4096] {
        for columns in [8, 32, 100, 256, 1024] {
            let rows = 256;
            let left = vec![0.5; rows * dim];
            let right = Packed::from_columns(&vec![0.25; columns * dim], dim);
            let mut product = vec![0.0; rows * right.padded_columns()];
            // An element is a floating-point operation: one multiplication with its addition are two.
            group.throughput(Throughput::Elements((2 * rows * dim * columns) as u64));
            group.bench_function(BenchmarkId::from_parameter(format!("{rows}x{dim}x{columns}")), |bencher| {
                bencher.iter(|| multiply(black_box(&left), black_box(&right), &mut product));
            });
        }
    }
    for columns in [32, 256, 1024] {
        let dim = 1024;
        let right = vec![0.25; columns * dim];
        group.throughput(Throughput::Bytes(size_of_val(right.as_slice()) as u64));
        group.bench_function(BenchmarkId::new("pack", format!("{dim}x{columns}")), |bencher| {
            bencher.iter(|| Packed::from_columns(black_box(&right), dim));
        });
    }
    group.finish();
}

criterion_group!(benches, products);
criterion_main!(benches);
