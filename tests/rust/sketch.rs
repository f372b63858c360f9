//! Sketches against their definition, coordinate by coordinate.

use bpo::Error;
use bpo::matrix::{Rows, Values};
use bpo::progress::Progress;
use bpo::rng::{Purpose, Stream};
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

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

#[test]
fn waves_join() {
    let sketcher = Sketcher::new(1000, 5, Kind::Sparse, 2).unwrap();
    let values = values(40_000);
    let offset = (1 << 20) - 20_001;
    assert_eq!(sketch(&sketcher, &values, 1, offset), sparse_reference(&sketcher, &values, offset));
}

#[test]
fn threads_do_not_matter() {
    let values = values(30_000);
    for kind in [Kind::Sparse, Kind::Rademacher] {
        let sketcher = Sketcher::new(2048, 5, kind, 1).unwrap();
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| sketch(&sketcher, &values, 2, 77))
        };
        assert_eq!(run(1), run(7));
    }
}

#[test]
fn cancel_stops() {
    let progress = Progress::default();
    progress.cancel();
    let sketcher = Sketcher::new(8, 0, Kind::Sparse, 1).unwrap();
    let gradients = Rows::new(Values::F32(&[1.0; 8]), 1, 8).unwrap();
    assert!(matches!(sketcher.sketch(gradients, 0, &mut [0.0; 8], &progress), Err(Error::Cancelled)));
}
