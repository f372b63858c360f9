//! Kernels: every level gives the same bits, and the plain answer.

use bpo::gemm::PanelRow;
use bpo::rng::{Purpose, Stream, philox};
use bpo::simd::block::{self, Lanes, SIDE};
use bpo::simd::dots::{Grid, add_products, dots};
use bpo::simd::{self, Element, Level, Run};
use half::{bf16, f16};
use proptest::prelude::*;

fn values(count: usize, seed: u64) -> Vec<f32> {
    let stream = Stream::new(seed, Purpose::Shuffle, 0);
    (0..count).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect()
}

fn lanes(count: usize, seed: u64) -> Vec<Lanes> {
    let values = values(count * SIDE, seed);
    values.as_chunks().0.iter().map(|values| Lanes(values.map(f64::from))).collect()
}

/// Every kernel of blocks, on as many rows on the left as fit.
fn block_kernels(depth: usize, seed: u64) -> Vec<f64> {
    let (left, right) = (lanes(depth, seed), lanes(depth, seed + 1));
    let mut blocks = [[Lanes([0.5; SIDE]); SIDE]; 3];
    block::multiply_add::<false>(&left, &right, &mut blocks[0]);
    block::multiply_add::<true>(&left, &right, &mut blocks[1]);
    let rows: Vec<f64> = left.iter().flat_map(|lanes| lanes.0).collect();
    let count = (depth % (SIDE + 1)).min(rows.len() / (depth + 1));
    block::multiply_add_rows(&rows, depth + 1, &right, &mut blocks[2][..count]);
    let mut lower = [Lanes([0.25; SIDE]); SIDE];
    (0..SIDE).for_each(|row| lower[row].0[row] = 1.5 + row as f64);
    let [mut solved, ..] = blocks;
    block::substitute(&lower, &mut solved);
    let norms = block::squared_norms(&right);
    blocks.as_flattened().iter().chain(&solved).flat_map(|lanes| lanes.0).chain(norms).collect()
}

/// Every kernel on one input, as bits.
fn all_kernels(size: usize, seed: u64, first: usize) -> Vec<u64> {
    let (left, right, offsets) = (values(size, seed), values(size, seed + 1), values(size, seed + 2));
    let signs: Vec<u32> = (0..(first + size).div_ceil(32) as u32).map(|i| philox([i, 0, 0, 0], [0, 0])[0]).collect();
    let mut bits =
        vec![u64::from(simd::largest_magnitude(&left).to_bits()), simd::squared_norm_float64(&left).to_bits()];
    bits.push(simd::squared_distance_float64(&left, &right).to_bits());
    let mut lower = vec![0.0; size];
    let terms: [&[f32]; 2] = [&left, &right];
    let highest =
        simd::lower_bounds(&offsets, [0.3, -0.7], terms, [&left, &right, &offsets], [0.2, 0.1, 0.05], &mut lower);
    let mut found = Vec::new();
    simd::not_above(&lower, highest, size, &mut found);
    bits.push(u64::from(highest.to_bits()));
    bits.extend(found.into_iter().map(u64::from));
    let mut bytes = vec![0; size];
    bits.push(u64::from(simd::round_to_bytes(&left, 200.0, &mut bytes).cast_unsigned()));
    simd::subtract_bytes(&mut lower, 0.1, &bytes);
    let sums: Vec<i32> = bytes.iter().map(|&byte| 1000 * i32::from(byte)).collect();
    let mut scaled = vec![0.0; size];
    simd::scale_sums(&sums, 77, 0.3, &right, &mut scaled);
    bits.extend(lower.iter().chain(&scaled).map(|value| u64::from(value.to_bits())));
    simd::scale(&mut scaled, 0.7, &left);
    bits.extend(scaled.iter().map(|value| u64::from(value.to_bits())));
    bits.push(u64::from(simd::dot(&left, &right).to_bits()));
    bits.push(u64::from(simd::squared_distance(&left, &right).to_bits()));
    let distance = simd::squared_distance(&left, &right);
    simd::dots::each_squared_distance(&left, 7, |_| &right, |_, other| assert_eq!(other, distance));
    let mut eighths = vec![0; size];
    simd::round_to_bytes(&left, 8.0, &mut eighths);
    bits.push(simd::squared_rest(&left, 0.125, &eighths).to_bits());
    let mut narrow = left.clone();
    simd::add_scaled(&mut narrow, 0.3, &right);
    let run = Run { value: 0, sum: 0, count: size };
    f32::add_signed(&mut narrow, 0.7, &offsets, &signs, first, &[run], true);
    simd::subtract(&mut narrow, &right);
    let mut combined = vec![0.0; size];
    simd::combine(&mut combined, [0.3, -0.7], [&left, &right]);
    let mut float64_sums = vec![0.0f64; size];
    simd::add_scaled_to_float64(&mut float64_sums, 0.1, &combined);
    let mut one_by_one = float64_sums.clone();
    simd::add_scaled_to_float64(&mut one_by_one, 0.7, &left);
    simd::add_scaled_to_float64(&mut one_by_one, -0.3, &right);
    simd::add_terms_to_float64(&mut float64_sums, [0.7, -0.3], [&left, &right]);
    assert_eq!(float64_sums, one_by_one);
    let mut products = [0.25f64; 25];
    let mut words = vec![[0; 4]; size];
    Stream::new(seed, Purpose::Gumbel, 3).fill(u64::from(u32::MAX) - 3, &mut words);
    bits.extend(narrow.iter().chain(&combined).map(|value| u64::from(value.to_bits())));
    let vectors = [&left, &right, &offsets, &left, &combined].map(|vector| vector.as_slice());
    bits.extend(dots(&right, vectors).map(|product| u64::from(product.to_bits())));
    let stacked: Vec<f64> = vectors.concat().into_iter().map(f64::from).collect();
    let grid = Grid::new(&stacked, 5, size);
    add_products(-1.0, grid, grid, size, &mut products, 5);
    bits.extend(products.map(f64::to_bits));
    bits.extend(float64_sums.iter().map(|value| value.to_bits()));
    bits.extend(simd::pair_products([0.3, -0.7], [&left, &right], &stacked[..size]).map(f64::to_bits));
    bits.extend(block_kernels(size, seed).iter().map(|value| value.to_bits()));
    bits.extend(words.as_flattened().iter().map(|&word| u64::from(word)));
    bits
}

proptest! {
    #[test]
    fn levels_give_the_same_bits(size in 1usize..300, seed in 0u64..1000, first in 0usize..200) {
        simd::set_level(Level::Plain);
        let plain = all_kernels(size, seed, first);
        for level in LEVELS {
            simd::set_level(level);
            prop_assert_eq!(&all_kernels(size, seed, first), &plain);
        }
    }

    #[test]
    fn reductions_agree_with_float64(size in 0usize..400, seed in 0u64..1000) {
        let (left, right) = (values(size, seed), values(size, seed + 1));
        let pairs = || left.iter().zip(&right).map(|(&left, &right)| (f64::from(left), f64::from(right)));
        let dot: f64 = pairs().map(|(left, right)| left * right).sum();
        let distance: f64 = pairs().map(|(left, right)| (left - right).powi(2)).sum();
        prop_assert!((f64::from(simd::dot(&left, &right)) - dot).abs() < 1e-4);
        prop_assert!((f64::from(simd::squared_distance(&left, &right)) - distance).abs() < 1e-4);
    }

    #[test]
    fn products_agree_with_float64(rows in 1usize..9, others in 1usize..140, dim in 1usize..70, seed in 0u64..1000) {
        let (stride, padding) = (dim + 3, 2);
        let (left, right) = (values(rows * stride, seed), values(others * stride, seed + 1));
        let mut products = vec![0.5; rows * (others + padding)];
        let grids = (Grid::new(&left, rows, stride), Grid::new(&right, others, stride));
        add_products(-2.0, grids.0, grids.1, dim, &mut products, others + padding);
        for row in 0..rows {
            for other in 0..others {
                let (left, right) = (&left[row * stride..][..dim], &right[other * stride..][..dim]);
                let product: f64 = left.iter().zip(right).map(|(&left, &right)| f64::from(left) * f64::from(right)).sum();
                let found = products[row * (others + padding) + other];
                prop_assert!((f64::from(found) - (0.5 - 2.0 * product)).abs() < 1e-5);
                // Neither the tile nor the neighbours show in the bits.
                let mut alone = [0.5];
                add_products(-2.0, Grid::new(left, 1, dim), Grid::new(right, 1, dim), dim, &mut alone, 1);
                prop_assert_eq!(alone[0].to_bits(), found.to_bits());
            }
            prop_assert!(products[row * (others + padding) + others..][..padding].iter().all(|&value| value == 0.5));
        }
    }

    #[test]
    fn blocks_agree_with_the_sums_of_products(depth in 0usize..70, count in 0usize..17, seed in 0u64..1000) {
        let (left, right) = (lanes(depth, seed), lanes(depth, seed + 1));
        let mut blocks = [[Lanes([0.5; SIDE]); SIDE]; 3];
        block::multiply_add::<false>(&left, &right, &mut blocks[0]);
        block::multiply_add::<true>(&left, &right, &mut blocks[1]);
        let rows: Vec<f64> = (0..SIDE * (depth + 3)).map(|index| left.get(index % (depth + 3)).map_or(9.0, |lanes| lanes.0[index / (depth + 3)])).collect();
        block::multiply_add_rows(&rows, depth + 3, &right, &mut blocks[2][..count]);
        for row in 0..SIDE {
            for column in 0..SIDE {
                let chain = |sign: f64| left.iter().zip(&right).fold(0.5, |sum: f64, (left, right)| (sign * left.0[row]).mul_add(right.0[column], sum));
                prop_assert_eq!(blocks[0][row].0[column], chain(1.0));
                prop_assert_eq!(blocks[1][row].0[column], chain(-1.0));
                prop_assert_eq!(blocks[2][row].0[column], if row < count { chain(1.0) } else { 0.5 });
            }
        }
    }

    #[test]
    fn substitution_solves(seed in 0u64..1000) {
        let (mut lower, mut block) = ([Lanes::ZERO; SIDE], [Lanes::ZERO; SIDE]);
        lower.copy_from_slice(&lanes(SIDE, seed));
        block.copy_from_slice(&lanes(SIDE, seed + 1));
        (0..SIDE).for_each(|row| lower[row].0[row] += 2.0);
        let right = block;
        block::substitute(&lower, &mut block);
        let norms = block::squared_norms(&block);
        for column in 0..SIDE {
            for row in 0..SIDE {
                let product: f64 = (0..=row).map(|index| lower[index].0[row] * block[index].0[column]).sum();
                prop_assert!((product - right[row].0[column]).abs() < 1e-12);
            }
            let norm: f64 = block.iter().map(|lanes| lanes.0[column].powi(2)).sum();
            prop_assert!((norm - norms[column]).abs() < 1e-12);
        }
    }

    #[test]
    fn bounds_hold_the_values(chunks in 1usize..8, seed in 0u64..1000) {
        let size = 16 * chunks;
        let [offsets, first, second, left, right] = [0, 1, 2, 3, 4].map(|index| values(size, seed + index));
        let (left, right): (Vec<f32>, Vec<f32>) = (left.iter().map(|v| v.abs()).collect(), right.iter().map(|v| v.abs()).collect());
        let mut lower = vec![0.0; size];
        let margins: [&[f32]; 3] = [&left, &right, &left];
        let highest = simd::lower_bounds(&offsets, [0.3, -0.7], [&first, &second], margins, [0.2, 0.1, 0.3], &mut lower);
        let value = |index: usize| offsets[index] - 0.3 * first[index] + 0.7 * second[index];
        let margin = |index: usize| 0.5 * left[index] + 0.1 * right[index];
        for index in 0..size {
            prop_assert!((lower[index] - (value(index) - margin(index))).abs() < 1e-6);
        }
        let expected = (0..size).map(|index| value(index) + margin(index)).fold(f32::INFINITY, f32::min);
        prop_assert!((highest - expected).abs() < 1e-6);
        let mut found = Vec::new();
        simd::not_above(&lower, highest, size, &mut found);
        let expected: Vec<u32> = (0..size as u32).filter(|&index| lower[index as usize] <= highest).collect();
        prop_assert_eq!(found, expected);
        // What is not a number is not ruled out, and what lies behind the count is not found.
        let mut lower = vec![f32::INFINITY; size];
        lower[size / 2] = f32::NAN;
        lower[size - 1] = f32::NAN;
        let mut found = Vec::new();
        simd::not_above(&lower, highest, size - 1, &mut found);
        prop_assert_eq!(found, [size as u32 / 2]);
    }

    #[test]
    fn signs_are_taken_bit_by_bit(size in 0usize..200, first in 0usize..100, seed in 0u32..1000) {
        let signs: Vec<u32> = (0..10).map(|i| philox([i, seed, 0, 0], [0, 0])[0]).collect();
        let values = values(size, u64::from(seed));
        let mut sums = vec![1.0; size];
        f32::add_signed(&mut sums, 0.5, &values, &signs, first, &[Run { value: 0, sum: 0, count: size }], false);
        for (index, (sum, value)) in sums.iter().zip(&values).enumerate() {
            let negative = signs[(first + index) / 32] >> ((first + index) % 32) & 1 == 1;
            prop_assert_eq!(*sum, 1.0 + if negative { -0.5 * value } else { 0.5 * value });
        }
    }

    #[test]
    fn words_are_addressed_one_by_one(first in 0u64..u64::MAX - 100, count in 0usize..70, seed in any::<u64>()) {
        let stream = Stream::new(seed, Purpose::SketchSigns, 2);
        let mut words = vec![[0; 4]; count];
        stream.fill(first, &mut words);
        for (index, words) in words.iter().enumerate() {
            prop_assert_eq!(*words, stream.words(first + index as u64));
        }
    }

    #[test]
    fn runs_are_added_one_by_one(
        size in 1usize..200, first in 0usize..100, shift in 0usize..20, cuts in [0usize..70, 0..70, 0..70], bits in any::<u64>(),
    ) {
        let stream = Stream::new(bits, Purpose::Shuffle, 0);
        // Finite patterns of any size, the subnormal ones among them.
        let patterns: Vec<u16> = (0..size as u64).map(|index| stream.words(index)[0] as u16 & 0xBBFF).collect();
        let halves: Vec<f16> = patterns.iter().map(|&bits| f16::from_bits(bits)).collect();
        let brains: Vec<bf16> = patterns.iter().map(|&bits| bf16::from_bits(bits)).collect();
        let floats: Vec<f32> = halves.iter().map(|half| half.to_f32()).collect();
        let signs: Vec<u32> = (0..10).map(|index| stream.words(index)[1]).collect();
        // Runs that touch and meet one another, of which the last ends with the values and the sums.
        let mut runs = Vec::new();
        for (index, cut) in cuts.into_iter().enumerate() {
            let value = (cut * (index + 1)) % size;
            runs.push(Run { value, sum: cut.min(value), count: cut.min(size - value) });
        }
        runs.push(Run { value: size / 2, sum: size / 2, count: size - size / 2 });
        for level in LEVELS {
            simd::set_level(level);
            prop_assert_eq!(sums(&halves, &signs, first, shift, &runs), sums_one_by_one(&halves, &signs, first, shift, &runs));
            prop_assert_eq!(sums(&brains, &signs, first, shift, &runs), sums_one_by_one(&brains, &signs, first, shift, &runs));
            prop_assert_eq!(sums(&floats, &signs, first, shift, &runs), sums_one_by_one(&floats, &signs, first, shift, &runs));
        }
    }
}

const LEVELS: [Level; 5] = [Level::Plain, Level::Avx2, Level::AvxVnni, Level::Avx512, Level::Avx512Vnni];

/// Sums, as bits, that begin at any place of a cache line and of which some are -0.
fn sums<T: Element>(values: &[T], signs: &[u32], first: usize, shift: usize, runs: &[Run]) -> Vec<u32> {
    let mut sums = start(shift + values.len());
    T::add_signed(&mut sums[shift..], 0.7, values, signs, first, runs, true);
    sums.iter().map(|sum| sum.to_bits()).collect()
}

fn sums_one_by_one<T: Element>(values: &[T], signs: &[u32], first: usize, shift: usize, runs: &[Run]) -> Vec<u32> {
    let mut sums = start(shift + values.len());
    for run in runs {
        for index in 0..run.count {
            let bit = first + run.value + index;
            let sign = if signs[bit / 32] >> (bit % 32) & 1 == 1 { -1.0 } else { 1.0 };
            sums[shift + run.sum + index] += sign * (0.7 * values[run.value + index].to_f32());
        }
    }
    sums.iter().map(|sum| sum.to_bits()).collect()
}

fn start(count: usize) -> Vec<f32> {
    (0..count).map(|index| if index % 3 == 0 { -0.0 } else { 0.25 }).collect()
}

#[test]
fn every_half_widens_exactly() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
    let mut out = vec![0.0; halves.len()];
    for level in LEVELS {
        simd::set_level(level);
        // An odd length, so that the rest of a vector counts too.
        f16::widen(&halves[1..], &mut out);
        for (half, widened) in halves[1..].iter().zip(&out) {
            assert!(widened.to_bits() == f32::from(*half).to_bits() || half.is_nan() && widened.is_nan());
        }
        bf16::widen(&brains[1..], &mut out);
        for (brain, widened) in brains[1..].iter().zip(&out) {
            assert!(widened.to_bits() == f32::from(*brain).to_bits() || brain.is_nan() && widened.is_nan());
        }
    }
}

#[test]
fn spread_signs_follow_the_bits() {
    let words: Vec<u32> = (0..9).map(|index| philox([index, 0, 0, 0], [0, 0])[0]).collect();
    for level in LEVELS {
        simd::set_level(level);
        let mut rows = [PanelRow::ZERO; 9];
        simd::spread_signs(&mut rows, &words, 0.5);
        for (row, word) in rows.iter().zip(&words) {
            for (column, entry) in row.0.iter().enumerate() {
                assert_eq!(*entry, if word >> column & 1 == 1 { -0.5 } else { 0.5 });
            }
        }
    }
}
