//! The 8-bit product at the tile shapes of k-means, on one thread, at every level of this machine.

use std::hint::black_box;

use bpo::gemm8::{Buffers, Packed8, Scale, multiply, quantize, stride};
use bpo::simd::{self, Level};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn products(criterion: &mut Criterion) {
    for level in [Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vnni] {
        if simd::set_level(level) != level {
            continue;
        }
        let mut group = criterion.benchmark_group(format!("gemm8 {level:?}"));
        for dim in [512, 1024, 4096] {
            for columns in [32, 256, 1024] {
                let rows = 252;
                let values: Vec<f32> = (0..rows * dim).map(|index| (index as f32).sin()).collect();
                let mut left = vec![0; rows * stride(dim)];
                let scales: Vec<Scale> = values
                    .chunks_exact(dim)
                    .zip(left.chunks_exact_mut(stride(dim)))
                    .map(|(values, out)| quantize(values, out))
                    .collect();
                let packed = Packed8::new(&vec![3; columns * stride(dim)], &vec![1.0; columns], stride(dim));
                let mut buffers = Buffers::default();
                let mut product = vec![0.0; rows * packed.padded_columns()];
                // One element is one multiplication with its addition.
                group.throughput(Throughput::Elements((rows * dim * columns) as u64));
                group.bench_function(BenchmarkId::from_parameter(format!("{rows}x{dim}x{columns}")), |bencher| {
                    bencher.iter(|| multiply(black_box(&left), &scales, &packed, &mut buffers, &mut product));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
