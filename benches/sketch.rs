//! Sketches of gradients, in bytes read.

use bpo::matrix::{Rows, Values};
use bpo::progress::Progress;
use bpo::sketch::{Kind, Sketcher};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const DIM: usize = 1024;

fn sketches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sketch");
    let cases = [
        ("sparse", Kind::Sparse, 1, 1, 1_000_000),
        ("sparse", Kind::Sparse, 1, 16, 1_000_000),
        ("sparse nnz=4", Kind::Sparse, 4, 16, 1_000_000),
        ("rademacher", Kind::Rademacher, 1, 16, 10_000),
        ("normal", Kind::Normal, 1, 16, 10_000),
    ];
    for (name, kind, nnz, count, width) in cases {
        let sketcher = Sketcher::new(DIM, 0, kind, nnz).unwrap();
        let values = vec![0.5f32; count * width];
        let rows = Rows::new(Values::F32(&values), count, width).unwrap();
        let mut out = vec![0.0; count * DIM];
        group.throughput(Throughput::Bytes(size_of_val(values.as_slice()) as u64));
        group.bench_function(BenchmarkId::new(name, format!("{count}x{width}")), |bencher| {
            bencher.iter(|| sketcher.sketch(rows, 0, &mut out, &Progress::default()).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, sketches);
criterion_main!(benches);
