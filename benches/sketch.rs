//! Sketches of gradients: sparse ones in bytes read, dense ones in floating-point operations.

use bpo::matrix::{Rows, Values};
use bpo::progress::Progress;
use bpo::rng::{Purpose, Stream};
use bpo::sketch::{Kind, Sketcher};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};

fn sparse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse");
    let stream = Stream::new(0, Purpose::Shuffle, 0);
    let (count, width) = (16, 1_000_000);
    let values: Vec<f32> = (0..count * width).map(|index| stream.uniform(index as u64 % 1000) as f32 - 0.5).collect();
    let halves: Vec<f16> = values.iter().map(|value| f16::from_f32(*value)).collect();
    let brains: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
    let types = [
        ("float32", Values::F32(&values), 4),
        ("float16", Values::F16(&halves), 2),
        ("bfloat16", Values::Bf16(&brains), 2),
    ];
    for (name, values, bytes) in types {
        for (dim, nnz) in [(512, 1), (1024, 1), (4096, 1), (8192, 1), (1024, 4)] {
            let sketcher = Sketcher::new(dim, 0, Kind::Sparse, nnz).unwrap();
            let rows = Rows::new(values, count, width).unwrap();
            let mut out = vec![0.0; count * dim];
            group.throughput(Throughput::Bytes((count * width * bytes) as u64));
            group.bench_function(BenchmarkId::new(name, format!("{dim}, nnz={nnz}")), |bencher| {
                bencher.iter(|| sketcher.sketch(rows, 0, &mut out, &Progress::default()).unwrap());
            });
        }
    }
    group.finish();
}

fn dense(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("dense");
    let (dim, width) = (1024, 20_000);
    for (name, kind) in [("rademacher", Kind::Rademacher), ("normal", Kind::Normal)] {
        for count in [1, 16, 64, 256] {
            let sketcher = Sketcher::new(dim, 0, kind, 1).unwrap();
            let values = vec![0.5; count * width];
            let rows = Rows::new(Values::F32(&values), count, width).unwrap();
            let mut out = vec![0.0; count * dim];
            // An element is a floating-point operation: one multiplication with its addition are two.
            group.throughput(Throughput::Elements((2 * count * width * dim) as u64));
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                bencher.iter(|| sketcher.sketch(rows, 0, &mut out, &Progress::default()).unwrap());
            });
        }
    }
    group.finish();
}

criterion_group!(benches, sparse, dense);
criterion_main!(benches);
