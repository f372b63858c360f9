//! Results that were recorded once, on x86-64: every level of every machine gives the same bits.
//!
//! Where one changes on purpose, stores of before do not fit sketches of after, and the changelog has to say so.

use bpo::gemm::{Packed, multiply};
use bpo::gemm8::{Buffers, Packed8, Scale, multiply as multiply8, quantize, stride};
use bpo::kmeans::{Metric, Params, fit};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::rng::{Purpose, Stream};
use bpo::simd::{self, Level, dots};
use bpo::sketch::{Kind, Sketcher};
use half::{bf16, f16};

const LEVELS: [Level; 4] = [Level::Plain, Level::Avx2, Level::Avx512, Level::Avx512Vnni];

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn crc(values: &[f32]) -> u32 {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    crc32fast::hash(&bytes)
}

/// At each level in turn.
fn assert_recorded<T: PartialEq + std::fmt::Debug>(expected: T, run: impl Fn() -> T) {
    for level in LEVELS {
        let level = simd::set_level(level);
        assert_eq!(run(), expected, "{level:?}");
    }
}

#[test]
fn sketches() {
    let (count, width) = (3, 5000);
    let floats = values(count * width, 1);
    let halves: Vec<f16> = floats.iter().map(|&value| f16::from_f32(value)).collect();
    let brains: Vec<bf16> = floats.iter().map(|&value| bf16::from_f32(value)).collect();
    let kinds = [(96, Kind::Sparse, 1), (1024, Kind::Sparse, 4), (4100, Kind::Sparse, 1)]
        .into_iter()
        .chain([(70, Kind::Rademacher, 1), (70, Kind::Normal, 1)]);
    let expected = [
        [0x685F_9D19, 0x858F_35D8, 0x6316_4239],
        [0x1B8C_E131, 0xE0CD_D58E, 0x837F_6891],
        [0x210A_5949, 0xCBF2_D740, 0xEFAA_6E01],
        [0xEEE0_9F92, 0x8ED4_92F0, 0x10DF_564F],
        [0xBC8C_A826, 0x09DC_552E, 0xAD62_19C3],
    ];
    assert_recorded(expected, || {
        let found = kinds.clone().map(|(dim, kind, nnz)| {
            let sketcher = Sketcher::new(dim, 7, kind, nnz).unwrap();
            [Values::F32(&floats), Values::F16(&halves), Values::Bf16(&brains)].map(|values| {
                let mut out = vec![0.0; count * dim];
                let rows = Rows::new(values, count, width).unwrap();
                sketcher.sketch(rows, 123, &mut out, &Progress::default()).unwrap();
                crc(&out)
            })
        });
        found.collect::<Vec<_>>().try_into().unwrap()
    });
}

#[test]
fn products() {
    let (rows, columns, depth) = (29, 75, 1100);
    let (left, right) = (values(rows * depth, 2), values(columns * depth, 3));
    assert_recorded([0x735A_623F, 0xF4E6_8763], || {
        let packed = Packed::from_columns(&right, depth);
        let mut out = vec![0.0; rows * packed.padded_columns()];
        multiply(&left, &packed, &mut out);
        let mut dots_of_all = vec![0.0; rows * columns];
        let grids = [(&left, rows), (&right, columns)].map(|(values, count)| dots::Grid::new(values, count, depth));
        dots::add_products(0.75, grids[0], grids[1], depth, &mut dots_of_all, columns);
        [crc(&out), crc(&dots_of_all)]
    });
}

#[test]
fn products_in_8_bits() {
    let (rows, columns, depth) = (29, 75, 1100);
    let quantized = |count: usize, seed: u64| {
        let mut bytes = vec![0; count * stride(depth)];
        let values = values(count * depth, seed);
        let rows = values.chunks_exact(depth).zip(bytes.chunks_exact_mut(stride(depth)));
        let scales: Vec<Scale> = rows.map(|(values, bytes)| quantize(values, bytes)).collect();
        (bytes, scales)
    };
    assert_recorded(0x66B8_B1C1, || {
        let ((left, scales), (right, right_scales)) = (quantized(rows, 4), quantized(columns, 5));
        let factors: Vec<f32> = right_scales.iter().map(|scale| scale.factor).collect();
        let packed = Packed8::new(&right, &factors, stride(depth));
        let mut out = vec![0.0; rows * packed.padded_columns()];
        multiply8(&left, &scales, &packed, &mut Buffers::default(), &mut out);
        crc(&out)
    });
}

#[test]
fn clusterings() {
    let (count, dim) = (700, 80);
    let points = values(count * dim, 6);
    assert_recorded([(0xEDB4_0C83, 0x7A3C_DD02), (0x66FF_9EC9, 0xCAEA_181C)], || {
        [Metric::Euclidean, Metric::Cosine].map(|metric| {
            let params = Params { metric, max_iterations: 5, seed: 8, ..Params::new(9) };
            let rows = Rows::new(Values::F32(&points), count, dim).unwrap();
            let progress = Progress::default();
            let found = fit(Points::from_rows(rows, &progress).unwrap(), &params, &progress).unwrap();
            let labels: Vec<f32> = found.labels.iter().map(|&label| label as f32).collect();
            (crc(&labels), crc(&found.centroids))
        })
    });
}
