//! Every algorithm once, on so little data that Miri can follow it: `make miri` looks for undefined behaviour in them.

use bpo::coreset::{CACHE_BYTES, coreset};
use bpo::d_optimal::d_optimal;
use bpo::depth::{Candidates, allocate_depth};
use bpo::gemm::{Packed, multiply};
use bpo::gemm8::{self, Buffers, Packed8, Scale, quantize, stride};
use bpo::kmeans::{Init, Metric, Params, assign, fit, fit_rows};
use bpo::matrix::{Element, Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::prompts::Limits;
use bpo::ranking::{Ranking, ranking_keys};
use bpo::rng::{Purpose, Stream};
use bpo::simd::Run;
use bpo::sketch::{Kind, Sketcher};
use bpo::store::format::{Manifest, RECORD_BYTES};
use bpo::store::{Encoding, StoreReader, StoreWriter, Tolerance, repair};
use bpo::usefulness::{pair_norms, score_pairs};
use half::{bf16, f16};

const ROWS: usize = 12;

/// Rows in 8 bits from 48 dimensions on, and in float32 below.
const DIMS: [usize; 2] = [5, 50];

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn view(values: &[f32], dim: usize) -> Rows<'_> {
    Rows::new(Values::F32(values), values.len() / dim, dim).unwrap()
}

/// Each row with the next one.
fn pairs(rows: Rows<'_>) -> Points<'_, 2> {
    let pairs: Vec<[i64; 2]> = (0..rows.count() as i64 - 1).map(|row| [row, row + 1]).collect();
    Points::from_pairs(rows, &pairs, &vec![[1.0, -1.0]; pairs.len()], &Progress::default()).unwrap()
}

fn difference(values: &[f32], dim: usize, pair: usize) -> Vec<f32> {
    (pair * dim..(pair + 1) * dim).map(|index| values[index] - values[index + dim]).collect()
}

fn norm(values: &[f32]) -> f32 {
    values.iter().map(|value| value * value).sum::<f32>().sqrt()
}

#[test]
fn words() {
    let stream = Stream::new(7, Purpose::Gumbel, 3);
    let mut words = [[0; 4]; 5];
    stream.fill(u64::MAX - 1, &mut words);
    assert_eq!(words[4], stream.words(2));
}

#[test]
fn elements() {
    let expected = values(37, 0);
    let halves: Vec<f16> = expected.iter().map(|&value| f16::from_f32(value)).collect();
    let brains: Vec<bf16> = expected.iter().map(|&value| bf16::from_f32(value)).collect();
    let mut widened = vec![0.0; expected.len()];
    f16::widen(&halves[1..], &mut widened);
    assert!(widened.iter().zip(&halves[1..]).all(|(value, half)| *value == half.to_f32()));
    bf16::widen(&brains[1..], &mut widened);
    assert!(widened.iter().zip(&brains[1..]).all(|(value, brain)| *value == brain.to_f32()));
    let run = Run { value: 0, sum: 0, count: 36 };
    f16::add_signed(&mut widened[..36], 1.0, &halves[1..], &[0x5555_5555; 3], 33, &[run], true);
    assert_eq!(widened[0], brains[1].to_f32() + halves[1].to_f32());
    assert_eq!(widened[1], brains[2].to_f32() - halves[2].to_f32());
}

#[test]
fn matrices() {
    let bytes = [1i8, -2, 3, 4, 5, -6];
    let rows = Rows::new(Values::I8(&bytes, Some(&[2.0, 0.5])), 2, 3).unwrap();
    let mut scratch = [0.0; 3];
    assert_eq!(rows.row(1, &mut scratch), [2.0, 2.5, -3.0]);
    assert_eq!(rows.part(0, 1, 2, &mut scratch), [-4.0, 6.0]);
    rows.prefetch(1);
}

#[test]
fn products() {
    let (depth, columns) = (21, 35);
    let (left, right) = (values(3 * depth, 0), values(columns * depth, 1));
    let packed = Packed::from_columns(&right, depth);
    let mut out = vec![f32::NAN; 3 * packed.padded_columns()];
    multiply(&left, &packed, &mut out);
    for (index, row) in left.chunks_exact(depth).enumerate() {
        for (column, values) in right.chunks_exact(depth).enumerate() {
            let expected = row.iter().zip(values).fold(0.0, |sum, (left, right)| f32::mul_add(*left, *right, sum));
            assert_eq!(out[index * packed.padded_columns() + column], expected);
        }
    }
}

#[test]
fn products_in_8_bits() {
    let (depth, columns) = (70, 3);
    let quantized = |count: usize, seed: u64| -> (Vec<i8>, Vec<Scale>) {
        let mut bytes = vec![0; count * stride(depth)];
        let rows = bytes.chunks_exact_mut(stride(depth));
        let scales = rows.enumerate().map(|(row, out)| quantize(&values(depth, seed + row as u64), out)).collect();
        (bytes, scales)
    };
    let ((rows, scales), (bytes, factors)) = (quantized(5, 0), quantized(columns, 50));
    let factors: Vec<f32> = factors.iter().map(|scale| scale.factor).collect();
    let packed = Packed8::new(&bytes, &factors, stride(depth));
    let mut out = vec![f32::NAN; scales.len() * packed.padded_columns()];
    gemm8::multiply(&rows, &scales, &packed, &mut Buffers::default(), &mut out);
    for (row, left) in rows.chunks_exact(stride(depth)).enumerate() {
        for (column, right) in bytes.chunks_exact(stride(depth)).enumerate() {
            let sum: i32 = left.iter().zip(right).map(|(&left, &right)| i32::from(left) * i32::from(right)).sum();
            let expected = sum as f32 * scales[row].factor * factors[column];
            assert!((out[row * packed.padded_columns() + column] - expected).abs() <= 1e-5 * expected.abs());
        }
    }
}

#[test]
fn clusters() {
    let progress = Progress::default();
    for dim in DIMS {
        let values = values(ROWS * dim, 1);
        let params = Params { max_iterations: 2, ..Params::new(3) };
        let found = fit_rows(view(&values, dim), Some(&[1.0; ROWS]), &params, &progress).unwrap();
        let points = Points::from_rows(view(&values, dim), &progress).unwrap();
        let (labels, distances) = assign(points, &found.centroids, Metric::Euclidean, &progress).unwrap();
        assert_eq!(labels, found.labels);
        for (point, values) in values.chunks_exact(dim).enumerate() {
            let distance = |centroid: &[f32]| {
                norm(&values.iter().zip(centroid).map(|(value, other)| value - other).collect::<Vec<_>>())
            };
            let nearest = found.centroids.chunks_exact(dim).map(distance).fold(f32::INFINITY, f32::min);
            assert!((distances[point] - nearest).abs() < 1e-5);
        }
        let init = Init::Centroids(difference(&values, dim, 0));
        let params = Params { init, metric: Metric::Cosine, max_iterations: 1, ..Params::new(1) };
        let found = fit(pairs(view(&values, dim)), &params, &progress).unwrap();
        assert!((norm(&found.centroids) - 1.0).abs() < 1e-5);
    }
    let values = values(ROWS * 5, 1);
    let params = Params { max_iterations: 3, batch_size: Some(4), ..Params::new(2) };
    assert_eq!(fit_rows(view(&values, 5), None, &params, &progress).unwrap().labels.len(), ROWS);
}

#[test]
fn scores() {
    let progress = Progress::default();
    let dim = 5;
    let values = values(ROWS * dim, 2);
    let points = pairs(view(&values, dim));
    let lengths = pair_norms(&points, &progress).unwrap();
    let scores = score_pairs(&points, &values[..2 * dim], &[0, 1].repeat(6)[..ROWS - 1], None, &progress).unwrap();
    for pair in 0..ROWS - 1 {
        let vector = difference(&values, dim, pair);
        assert!((lengths[pair] - norm(&vector)).abs() < 1e-5);
        let alignment: f32 = vector.iter().zip(&scores.direction).map(|(value, other)| value * other).sum();
        assert!((scores.alignment[pair] - alignment).abs() < 1e-5);
    }
}

#[test]
fn choices() {
    let progress = Progress::default();
    let dim = 5;
    let values = values(ROWS * dim, 3);
    let points = pairs(view(&values, dim));
    let prompts: Vec<i64> = (0..ROWS as i64 - 1).map(|pair| pair / 2).collect();
    let clusters: Vec<i32> = (0..ROWS as i32 - 1).map(|pair| pair % 2).collect();
    let limits = Limits { eligible: Some(&[true; ROWS - 1]), depth: Some((&prompts, 1)) };
    let design = d_optimal(&points, 4, 1.0, limits, &progress).unwrap();
    let chosen = coreset(&points, &clusters, 4, limits, CACHE_BYTES, &progress).unwrap();
    for mut picks in [design.picks, chosen.picks] {
        picks.sort_by_key(|&pair| prompts[pair]);
        assert_eq!(picks.len(), 4);
        assert!(picks.windows(2).all(|picks| prompts[picks[0]] < prompts[picks[1]]));
    }
}

#[test]
fn depths() {
    let progress = Progress::default();
    let usefulness = ranking_keys(&[0.5, 2.0, 1.0, -1.0], Ranking::Softmax { temperature: 0.1 }, 0, &progress).unwrap();
    let candidates = Candidates { prompts: &[0, 0, 9, 9], clusters: &[0, 1, 0, 1], usefulness: &usefulness };
    let kept = allocate_depth(candidates, 3, true, Some(2), None, &progress).unwrap();
    assert_eq!(kept, [true, true, true, false]);
}

#[test]
fn sketches() {
    let progress = Progress::default();
    let width = 40;
    let values = values(2 * width, 4);
    let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
    for kind in [Kind::Sparse, Kind::Rademacher, Kind::Normal] {
        let sketcher = Sketcher::new(12, 1, kind, if kind == Kind::Sparse { 3 } else { 1 }).unwrap();
        let sketch = |rows: Rows, offset: u64| {
            let mut out = vec![0.0; rows.count() * 12];
            sketcher.sketch(rows, offset, &mut out, &progress).unwrap();
            out
        };
        let whole = sketch(view(&values, width), 100);
        assert_eq!(whole[12..], sketch(view(&values[width..], width), 100));
        let rounded = sketch(Rows::new(Values::F16(&halves), 2, width).unwrap(), 100);
        assert!(whole.iter().zip(&rounded).all(|(value, other)| (value - other).abs() < 0.02));
    }
}

#[test]
fn stores() {
    let progress = Progress::default();
    for encoding in Encoding::ALL {
        let directory = tempfile::tempdir().unwrap();
        let values = values(4 * 3, 5);
        let manifest = Manifest::new(3, encoding.name(), "{\"model\": \"tiny\"}").unwrap();
        let mut writer = StoreWriter::create(directory.path(), manifest).unwrap();
        for rows in values.chunks(2 * 3) {
            writer.appender().append(rows, &[0; 2 * RECORD_BYTES], &progress).unwrap();
            writer.appender().commit(&progress).unwrap();
        }
        drop(writer);
        let reader = StoreReader::open(directory.path(), Tolerance::None, &progress).unwrap();
        assert_eq!((reader.count(), reader.verify(None, &progress).unwrap()), (4, vec![]));
        let mut bytes = std::fs::read(reader.rows_path()).unwrap();
        bytes[encoding.row_bytes(3)] ^= 1;
        std::fs::write(reader.rows_path(), bytes).unwrap();
        assert_eq!(reader.verify(Some(&[false, true, true, false]), &progress).unwrap(), [1]);
        assert_eq!(repair(directory.path(), &progress).unwrap().set_aside, [1]);
        assert!(
            StoreReader::open(directory.path(), Tolerance::None, &progress)
                .unwrap()
                .check(&[true; 4], &progress)
                .is_ok()
        );
    }
}
