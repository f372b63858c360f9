//! The matrix product: the same bits however it is cut and wherever it runs, and the right ones.

use bpo::gemm::{Packed, Strided, multiply, multiply_add};
use bpo::rng::{Purpose, Stream};
use bpo::simd::{self, Level};
use proptest::prelude::*;

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The definition: one chain of fused multiply-adds for each output. `right` is column by column.
fn reference(left: &[f32], right: &[f32], depth: usize) -> Vec<f32> {
    let chain = |row: &[f32], column: &[f32]| {
        row.iter().zip(column).fold(0.0, |sum, (left, right)| f32::mul_add(*left, *right, sum))
    };
    left.chunks(depth).flat_map(|row| right.chunks(depth).map(move |column| chain(row, column))).collect()
}

/// The product without the padding.
fn product(left: &[f32], right: &[f32], depth: usize) -> Vec<f32> {
    let packed = Packed::from_columns(right, depth);
    let mut out = vec![f32::NAN; left.len() / depth * packed.padded_columns()];
    multiply(left, &packed, &mut out);
    out.chunks(packed.padded_columns()).flat_map(|row| row[..packed.columns()].to_vec()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_level_is_the_definition(
        rows in 1usize..40, depth in 1usize..50, columns in 1usize..140, seed in 0u64..1000,
    ) {
        let (left, right) = (values(rows * depth, seed), values(columns * depth, seed + 1));
        let expected = bits(&reference(&left, &right, depth));
        for level in [Level::Plain, Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vnni] {
            simd::set_level(level);
            prop_assert_eq!(&bits(&product(&left, &right, depth)), &expected);
        }
    }

    #[test]
    fn slices_of_the_depth_chain_to_the_same_bits(
        rows in 1usize..30, depth in 2usize..1500, columns in 1usize..70, cut in 0.0..1.0, seed in 0u64..1000,
    ) {
        let cut = 1 + (cut * (depth - 1) as f64) as usize;
        let (left, right) = (values(rows * depth, seed), values(columns * depth, seed + 1));
        let whole = Packed::from_columns(&right, depth);
        let mut expected = vec![0.0; rows * whole.padded_columns()];
        multiply(&left, &whole, &mut expected);
        let mut out = vec![0.0; expected.len()];
        for (start, end) in [(0, cut), (cut, depth)] {
            let slices: Vec<f32> = right.chunks(depth).flat_map(|column| column[start..end].to_vec()).collect();
            if start < end {
                let packed = Packed::from_columns(&slices, end - start);
                multiply_add(Strided { values: &left[start..], stride: depth }, &packed, &mut out);
            }
        }
        prop_assert_eq!(bits(&out), bits(&expected));
    }
}

/// Depths below, at and above the parts that the product is cut into, and distances of rows that are copied.
#[test]
fn long_depths_are_the_definition() {
    for (rows, depth, columns) in [(13, 511, 9), (25, 1024, 8), (12, 1024, 70), (7, 2048, 300), (3, 1100, 33)] {
        let (left, right) = (values(rows * depth, 1), values(columns * depth, 2));
        assert_eq!(bits(&product(&left, &right, depth)), bits(&reference(&left, &right, depth)));
    }
}

#[test]
fn a_row_does_not_depend_on_its_tile() {
    let (depth, columns) = (1024, 100);
    let (left, right) = (values(50 * depth, 1), values(columns * depth, 2));
    let whole = product(&left, &right, depth);
    for (start, end) in [(0, 1), (7, 9), (11, 30), (49, 50)] {
        let part = product(&left[start * depth..end * depth], &right, depth);
        assert_eq!(bits(&part), bits(&whole[start * columns..end * columns]));
    }
}

#[test]
fn agrees_with_float64() {
    let (rows, depth, columns) = (20, 700, 50);
    let (left, right) = (values(rows * depth, 3), values(columns * depth, 4));
    let out = product(&left, &right, depth);
    for (row, out) in left.chunks(depth).zip(out.chunks(columns)) {
        for (column, out) in right.chunks(depth).zip(out) {
            let exact: f64 = row.iter().zip(column).map(|(left, right)| f64::from(*left) * f64::from(*right)).sum();
            assert!((f64::from(*out) - exact).abs() < 1e-4);
        }
    }
}

#[test]
fn padding_is_zero() {
    let packed = Packed::from_columns(&values(3 * 10, 1), 10);
    let mut out = vec![1.0; 2 * packed.padded_columns()];
    multiply(&values(20, 2), &packed, &mut out);
    assert!(out.chunks(packed.padded_columns()).all(|row| row[3..].iter().all(|value| *value == 0.0)));
}
