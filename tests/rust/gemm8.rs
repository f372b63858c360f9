//! The 8-bit product: every level gives the same bits, and the integers are those of the definition.

use bpo::gemm8::{Buffers, Packed8, Scale, multiply, quantize, stride};
use bpo::rng::{Purpose, Stream};
use bpo::simd::{self, Level};
use proptest::prelude::*;

fn quantized(count: usize, depth: usize, seed: u64) -> (Vec<f32>, Vec<i8>, Vec<Scale>) {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    let values: Vec<f32> = (0..count * depth).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect();
    let mut bytes = vec![0; count * stride(depth)];
    let rows = values.chunks_exact(depth).zip(bytes.chunks_exact_mut(stride(depth)));
    let scales = rows.map(|(values, bytes)| quantize(values, bytes)).collect();
    (values, bytes, scales)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products_are_those_of_the_integers(
        rows in 1usize..40, columns in 1usize..300, depth in 1usize..2500, seed in 0u64..1000,
    ) {
        let (_, left, left_scales) = quantized(rows, depth, seed);
        let (_, right, right_scales) = quantized(columns, depth, seed + 1);
        let factors: Vec<f32> = right_scales.iter().map(|scale| scale.factor).collect();
        let (mut all, mut buffers) = (Vec::new(), Buffers::default());
        for level in [Level::Plain, Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vnni] {
            simd::set_level(level);
            let packed = Packed8::new(&right, &factors, stride(depth));
            let mut out = vec![f32::NAN; rows * packed.padded_columns()];
            multiply(&left, &left_scales, &packed, &mut buffers, &mut out);
            all.push(out);
        }
        simd::set_level(Level::Avx512Vnni);
        let width = all[0].len() / rows;
        for row in 0..rows {
            for column in 0..columns {
                let bytes = |bytes: &'_ [i8], index: usize| bytes[index * stride(depth)..(index + 1) * stride(depth)].to_vec();
                let terms = bytes(&left, row).into_iter().zip(bytes(&right, column));
                let sum: i32 = terms.map(|(left, right)| i32::from(left) * i32::from(right)).sum();
                prop_assert_eq!(all[0][row * width + column], sum as f32 * (left_scales[row].factor * factors[column]));
            }
            prop_assert!(all[0][row * width + columns..(row + 1) * width].iter().all(|&product| product == 0.0));
        }
        prop_assert!(all.iter().all(|out| out == &all[0]));
    }

    #[test]
    fn bytes_are_within_half_a_step(depth in 1usize..200, seed in 0u64..1000, exponent in -30i32..30) {
        let (values, ..) = quantized(1, depth, seed);
        let values: Vec<f32> = values.iter().map(|value| value * 2f32.powi(exponent)).collect();
        let mut bytes = vec![1; stride(depth)];
        let scale = quantize(&values, &mut bytes);
        for (value, byte) in values.iter().zip(&bytes) {
            prop_assert!((value - scale.factor * f32::from(*byte)).abs() <= 0.5001 * scale.factor);
        }
        prop_assert!(bytes[depth..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn rows_without_a_scale_become_zeros() {
    for value in [0.0, 1e-44, f32::NAN, f32::INFINITY] {
        let mut bytes = vec![1; stride(3)];
        assert_eq!(quantize(&[value; 3], &mut bytes).factor, 0.0);
        assert!(bytes.iter().all(|&byte| byte == 0));
    }
}
