//! Sketches against their definition, coordinate by coordinate.

use bpo::Error;
use bpo::matrix::{Rows, Values};
use bpo::progress::Progress;
use bpo::rng::{Purpose, Stream};
use bpo::simd::{self, Level};
use bpo::sketch::{Kind, Sketcher};
use proptest::prelude::*;

fn values(count: usize) -> Vec<f32> {
    let stream = Stream::new(9, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn sketch(sketcher: &Sketcher, values: &[f32], rows: usize, offset: u64) -> Vec<f32> {
    let mut out = vec![0.0; rows * sketcher.dim()];
    let gradients = Rows::new(Values::F32(values), rows, values.len() / rows).unwrap();
    sketcher.sketch(gradients, offset, &mut out, &Progress::default()).unwrap();
    out
}

/// The definition of the sparse map.
fn sparse_reference(sketcher: &Sketcher, values: &[f32], offset: u64) -> Vec<f32> {
    let mut out = vec![0.0; sketcher.dim()];
    let size = sketcher.dim() / sketcher.nnz();
    for repetition in 0..sketcher.nnz() {
        let signs = Stream::new(sketcher.seed(), Purpose::SketchSigns, repetition as u32);
        let rotations = Stream::new(sketcher.seed(), Purpose::SketchRotations, repetition as u32);
        for (index, value) in values.iter().enumerate() {
            let coordinate = offset + index as u64;
            let word = signs.words(coordinate / 128)[(coordinate % 128 / 32) as usize];
            let sign = if word >> (coordinate % 32) & 1 == 1 { -1.0 } else { 1.0 };
            let rotation = rotations.below(coordinate / size as u64, size);
            let position = (coordinate % size as u64) as usize;
            out[repetition * size + (position + rotation) % size] +=
                sign * ((sketcher.nnz() as f32).sqrt().recip() * value);
        }
    }
    out
}

/// The definition of the dense map of signs.
fn rademacher_reference(sketcher: &Sketcher, values: &[f32], offset: u64) -> Vec<f32> {
    let scale = (sketcher.dim() as f32).sqrt().recip();
    let output = |column: usize| {
        let stream = Stream::new(sketcher.seed(), Purpose::SketchEntries, (column / 32) as u32);
        values.iter().zip(offset..).fold(0.0, |sum, (value, coordinate)| {
            let word = stream.words(coordinate / 4)[(coordinate % 4) as usize];
            value.mul_add(if word >> (column % 32) & 1 == 1 { -scale } else { scale }, sum)
        })
    };
    (0..sketcher.dim()).map(output).collect()
}

/// The definition of a normal entry, in float64.
fn normal_entry(sketcher: &Sketcher, column: usize, coordinate: u64) -> f64 {
    let stream = Stream::new(sketcher.seed(), Purpose::SketchEntries, (column / 32) as u32);
    let word = |index: usize| stream.words(8 * coordinate + (index / 4) as u64)[index % 4];
    let lane = column % 16;
    let uniform = (f64::from(word(lane)) + 0.5) / 2f64.powi(32);
    let angle = word(16 + lane);
    // A point of the quarter around the first axis, which is turned by the upper bits.
    let quarter = (f64::from(angle << 2 >> 2) / 2f64.powi(29) - if angle >> 29 & 1 == 1 { 2.0 } else { 0.0 })
        * std::f64::consts::FRAC_PI_4;
    let along = if angle >> 30 & 1 == 1 { -quarter.cos() } else { quarter.cos() };
    let (cosine, sine) = if angle >> 31 == 1 { (quarter.sin(), along) } else { (along, quarter.sin()) };
    (-2.0 * uniform.ln() / sketcher.dim() as f64).sqrt() * if column % 32 < 16 { cosine } else { sine }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn rademacher_is_what_it_is_defined_to_be(
        dim in 1usize..200, width in 1usize..700, offset in 0u64..1000, seed in any::<u64>(),
    ) {
        let sketcher = Sketcher::new(dim, seed, Kind::Rademacher, 1).unwrap();
        let values = values(width);
        prop_assert_eq!(sketch(&sketcher, &values, 1, offset), rademacher_reference(&sketcher, &values, offset));
    }

    #[test]
    fn normal_is_what_it_is_defined_to_be(dim in 1usize..100, coordinate in 0u64..1 << 61, seed in any::<u64>()) {
        let sketcher = Sketcher::new(dim, seed, Kind::Normal, 1).unwrap();
        for (column, entry) in sketch(&sketcher, &[1.0], 1, coordinate).into_iter().enumerate() {
            prop_assert!((f64::from(entry) - normal_entry(&sketcher, column, coordinate)).abs() < 1e-6);
        }
    }

    #[test]
    fn sparse_is_what_it_is_defined_to_be(
        size in 1usize..700, nnz in 1usize..5, width in 1usize..3000, offset in 0u64..5000, seed in any::<u64>(),
    ) {
        let sketcher = Sketcher::new(size * nnz, seed, Kind::Sparse, nnz).unwrap();
        let values = values(width);
        prop_assert_eq!(sketch(&sketcher, &values, 1, offset), sparse_reference(&sketcher, &values, offset));
    }

    #[test]
    fn slices_add_up_to_the_same_bits(
        dim in 1usize..500, cut in 1usize..2000, offset in 0u64..1000, kind in 0usize..3,
    ) {
        let kind = [Kind::Sparse, Kind::Rademacher, Kind::Normal][kind];
        let sketcher = Sketcher::new(dim, 1, kind, 1).unwrap();
        let values = values(2000);
        let (left, right) = values.split_at(cut);
        let mut out = sketch(&sketcher, left, 1, offset);
        let right = Rows::new(Values::F32(right), 1, right.len()).unwrap();
        sketcher.sketch(right, offset + cut as u64, &mut out, &Progress::default()).unwrap();
        prop_assert_eq!(out, sketch(&sketcher, &values, 1, offset));
    }
}

/// Each of more values than meet all repetitions at once.
#[test]
fn waves_join() {
    let sketcher = Sketcher::new(1000, 5, Kind::Sparse, 2).unwrap();
    let values = values(150_000);
    let offset = (1 << 20) - 70_001;
    assert_eq!(sketch(&sketcher, &values, 1, offset), sparse_reference(&sketcher, &values, offset));
}

#[test]
fn levels_give_the_same_bits() {
    for kind in [Kind::Sparse, Kind::Rademacher, Kind::Normal] {
        let sketcher = Sketcher::new(70, 5, kind, 1).unwrap();
        let run = |level| {
            simd::set_level(level);
            sketch(&sketcher, &values(3000), 3, 7)
        };
        let plain = run(Level::Plain);
        for level in [Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vnni] {
            assert_eq!(run(level), plain);
        }
    }
}

/// Many outputs and few rows, and the other way round.
#[test]
fn threads_do_not_matter() {
    for (kind, width) in [(Kind::Sparse, 30_000), (Kind::Rademacher, 3000), (Kind::Normal, 3000)] {
        let values = values(width);
        for (dim, rows) in [(2048, 2), (70, 300)] {
            let sketcher = Sketcher::new(dim, 5, kind, 1).unwrap();
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| sketch(&sketcher, &values, rows, 77))
            };
            assert_eq!(run(1), run(7));
        }
    }
}

#[test]
fn cancel_stops() {
    let progress = Progress::default();
    progress.cancel();
    for kind in [Kind::Sparse, Kind::Rademacher, Kind::Normal] {
        let sketcher = Sketcher::new(8, 0, kind, 1).unwrap();
        let gradients = Rows::new(Values::F32(&[1.0; 8]), 1, 8).unwrap();
        assert!(matches!(sketcher.sketch(gradients, 0, &mut [0.0; 8], &progress), Err(Error::Cancelled)));
    }
}
