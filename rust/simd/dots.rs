//! Many inner products at once: a vector that was loaded serves several of them.
//!
//! A product is the sum of a fixed number of chains, each with a stride of that number along the vectors, folded as a
//! tree; nothing fuses a multiplication with an addition. So neither the number of products that are computed side by
//! side nor the [`Level`] ever shows.

use super::{Level, level};

/// Rows and columns of a tile: with two registers a product they keep 24 of the 32 AVX-512 registers as sums.
const ROWS: usize = 3;
const COLUMNS: usize = 4;

/// Depth after which the sums are folded, in bytes of a row: the seven rows of a tile stay in a first-level cache of
/// 32 KiB.
const DEPTH_BYTES: usize = 4096;

/// Rows on the right that meet all rows on the left before the next ones: at the depth above they fill a quarter of a
/// second-level cache of 1 MiB.
const BLOCK: usize = 64;

/// Rows at a fixed distance.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a, T> {
    values: &'a [T],
    count: usize,
    stride: usize,
}

impl<'a, T> Grid<'a, T> {
    /// `count` rows that begin `stride` values apart.
    pub fn new(values: &'a [T], count: usize, stride: usize) -> Self {
        Self { values, count, stride }
    }
}

/// The inner products of one vector with several of its length.
///
/// # Panics
/// If the vectors differ in length.
pub fn dots<T: Number, const COUNT: usize>(vector: &[T], others: [&[T]; COUNT]) -> [T; COUNT] {
    let [products] = T::tile([vector], others);
    products
}

/// `products[i][j] += sign * ⟨left[i], right[j]⟩` over the first `depth` values of the rows, on the calling thread; rows
/// of `products` begin `stride` values apart.
///
/// # Panics
/// If a row or a product lies outside its slice.
pub fn add_products<T: Number>(
    sign: T,
    left: Grid<T>,
    right: Grid<T>,
    depth: usize,
    products: &mut [T],
    stride: usize,
) {
    let step = DEPTH_BYTES / size_of::<T>();
    for start in (0..depth).step_by(step) {
        let range = start..depth.min(start + step);
        for block in (0..right.count).step_by(BLOCK) {
            let end = right.count.min(block + BLOCK);
            for row in (0..left.count).step_by(ROWS) {
                for column in (block..end).step_by(COLUMNS) {
                    let products = &mut products[row * stride + column..];
                    let (rows, columns) = (ROWS.min(left.count - row), COLUMNS.min(end - column));
                    let left = |index: usize| &left.values[(row + index) * left.stride..][range.clone()];
                    let right = |index: usize| &right.values[(column + index) * right.stride..][range.clone()];
                    // Beyond the edge the last row stands in for those that are not there.
                    let left = std::array::from_fn(|index| left(index.min(rows - 1)));
                    let right = std::array::from_fn(|index| right(index.min(columns - 1)));
                    let tile: [[T; COLUMNS]; ROWS] = T::tile(left, right);
                    for (row, values) in tile.iter().enumerate().take(rows) {
                        for (product, value) in products[row * stride..][..columns].iter_mut().zip(values) {
                            *product = T::add_scaled(*product, sign, *value);
                        }
                    }
                }
            }
        }
    }
}

/// What inner products are computed of: float32 or float64.
pub trait Number: Copy + Send + Sync {
    /// The product of each vector on the left with each on the right.
    fn tile<const ROWS: usize, const COLUMNS: usize>(
        left: [&[Self]; ROWS],
        right: [&[Self]; COLUMNS],
    ) -> [[Self; COLUMNS]; ROWS];

    fn add_scaled(sum: Self, scale: Self, value: Self) -> Self;
}

/// The tree over the lanes of one register.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
fn fold_singles(lanes: std::arch::x86_64::__m512) -> f32 {
    use std::arch::x86_64::*;
    let lanes = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps::<1>(lanes));
    let lanes = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
    let lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
    _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes)))
}

/// As [`fold_singles`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
fn fold_doubles(lanes: std::arch::x86_64::__m512d) -> f64 {
    use std::arch::x86_64::*;
    let lanes = _mm256_add_pd(_mm512_castpd512_pd256(lanes), _mm512_extractf64x4_pd::<1>(lanes));
    let lanes = _mm_add_pd(_mm256_castpd256_pd128(lanes), _mm256_extractf128_pd::<1>(lanes));
    _mm_cvtsd_f64(_mm_add_sd(lanes, _mm_unpackhi_pd(lanes, lanes)))
}

/// Implements [`Number`] over vectors of each level.
macro_rules! number {
    (
        $number:ident, chains = $chains:literal,
        avx512 = (
            $load512:ident, $masked512:ident, $zero512:ident, $multiply512:ident, $add512:ident, $fold512:ident
        ),
        avx2 = ($load256:ident, $store256:ident, $zero256:ident, $multiply256:ident, $add256:ident) $(,)?
    ) => {
        impl Number for $number {
            #[inline]
            fn tile<const ROWS: usize, const COLUMNS: usize>(
                left: [&[Self]; ROWS],
                right: [&[Self]; COLUMNS],
            ) -> [[Self; COLUMNS]; ROWS] {
                const CHAINS: usize = $chains;

                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx512dq")]
                unsafe fn avx512<const ROWS: usize, const COLUMNS: usize>(
                    left: [*const $number; ROWS],
                    right: [*const $number; COLUMNS],
                    depth: usize,
                ) -> [[$number; COLUMNS]; ROWS] {
                    use std::arch::x86_64::{$add512, $load512, $masked512, $multiply512, $zero512};
                    const WIDTH: usize = CHAINS / 2;
                    let mut lanes = [[[$zero512(); 2]; COLUMNS]; ROWS];
                    let whole = depth - depth % CHAINS;
                    // Masks are for the ends alone: with one on every load a product took 1.2 times as long.
                    // SAFETY: the caller promises `depth` values in each vector; the masks leave out what lies beyond, and
                    // adding the zeros in its place changes no bit, as no sum is ever -0.
                    unsafe {
                        for start in (0..whole).step_by(CHAINS) {
                            for half in 0..2 {
                                let at = start + half * WIDTH;
                                let others = right.map(|right| $load512(right.add(at)));
                                for row in 0..ROWS {
                                    let value = $load512(left[row].add(at));
                                    for column in 0..COLUMNS {
                                        let product = $multiply512(value, others[column]);
                                        lanes[row][column][half] = $add512(lanes[row][column][half], product);
                                    }
                                }
                            }
                        }
                        for half in 0..2 {
                            let at = whole + half * WIDTH;
                            let mask = ((1u32 << depth.saturating_sub(at).min(WIDTH)) - 1) as _;
                            let others = right.map(|right| $masked512(mask, right.wrapping_add(at)));
                            for row in 0..ROWS {
                                let value = $masked512(mask, left[row].wrapping_add(at));
                                for column in 0..COLUMNS {
                                    let product = $multiply512(value, others[column]);
                                    lanes[row][column][half] = $add512(lanes[row][column][half], product);
                                }
                            }
                        }
                    }
                    lanes.map(|lanes| lanes.map(|[first, second]| $fold512($add512(first, second))))
                }

                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2")]
                unsafe fn avx2<const COLUMNS: usize>(
                    left: *const $number,
                    right: [*const $number; COLUMNS],
                    count: usize,
                    sums: &mut [[$number; CHAINS]],
                ) {
                    use std::arch::x86_64::{$add256, $load256, $multiply256, $store256, $zero256};
                    const WIDTH: usize = CHAINS / 4;
                    let mut lanes = [[$zero256(); 4]; COLUMNS];
                    // SAFETY: the caller promises `count` times CHAINS values in each vector and COLUMNS sums.
                    unsafe {
                        for chunk in 0..count {
                            for quarter in 0..4 {
                                let at = chunk * CHAINS + quarter * WIDTH;
                                let value = $load256(left.add(at));
                                for column in 0..COLUMNS {
                                    let product = $multiply256(value, $load256(right[column].add(at)));
                                    lanes[column][quarter] = $add256(lanes[column][quarter], product);
                                }
                            }
                        }
                        for column in 0..COLUMNS {
                            for quarter in 0..4 {
                                $store256(sums[column].as_mut_ptr().add(quarter * WIDTH), lanes[column][quarter]);
                            }
                        }
                    }
                }

                fn plain(left: &[$number], right: &[$number], sums: &mut [$number; CHAINS]) {
                    for (left, right) in left.as_chunks::<CHAINS>().0.iter().zip(right.as_chunks::<CHAINS>().0) {
                        for chain in 0..CHAINS {
                            sums[chain] += left[chain] * right[chain];
                        }
                    }
                }

                let depth = left[0].len();
                assert!(left.iter().chain(&right).all(|vector| vector.len() == depth));
                #[cfg(target_arch = "x86_64")]
                if level() >= Level::Avx512 {
                    // SAFETY: the level is one that this machine was detected to have; all vectors have `depth` values.
                    return unsafe { avx512(left.map(<[_]>::as_ptr), right.map(<[_]>::as_ptr), depth) };
                }
                let count = depth / CHAINS;
                let mut sums = [[[0.0; CHAINS]; COLUMNS]; ROWS];
                match level() {
                    #[cfg(target_arch = "x86_64")]
                    Level::Avx2 => {
                        for (left, sums) in left.iter().zip(&mut sums) {
                            // Sixteen registers hold the sums of three products.
                            for (right, sums) in right.chunks(3).zip(sums.chunks_mut(3)) {
                                let left = left.as_ptr();
                                // SAFETY: as above.
                                unsafe {
                                    match *right {
                                        [a, b, c] => avx2(left, [a, b, c].map(<[_]>::as_ptr), count, sums),
                                        [a, b] => avx2(left, [a, b].map(<[_]>::as_ptr), count, sums),
                                        _ => avx2(left, [right[0].as_ptr()], count, sums),
                                    }
                                }
                            }
                        }
                    }
                    _ => {
                        for (left, sums) in left.iter().zip(&mut sums) {
                            for (right, sums) in right.iter().zip(sums) {
                                plain(left, right, sums);
                            }
                        }
                    }
                }
                let rest = count * CHAINS;
                let mut products = [[0.0; COLUMNS]; ROWS];
                for row in 0..ROWS {
                    for column in 0..COLUMNS {
                        let sums = &mut sums[row][column];
                        let pairs = left[row][rest..].iter().zip(&right[column][rest..]);
                        for (sum, (left, right)) in sums.iter_mut().zip(pairs) {
                            *sum += left * right;
                        }
                        let mut width = CHAINS / 2;
                        while width > 0 {
                            for chain in 0..width {
                                sums[chain] += sums[chain + width];
                            }
                            width /= 2;
                        }
                        products[row][column] = sums[0];
                    }
                }
                products
            }

            fn add_scaled(sum: Self, scale: Self, value: Self) -> Self {
                sum + scale * value
            }
        }
    };
}

number! {
    f32,
    chains = 32,
    avx512 = (
        _mm512_loadu_ps, _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_mul_ps, _mm512_add_ps, fold_singles
    ),
    avx2 = (_mm256_loadu_ps, _mm256_storeu_ps, _mm256_setzero_ps, _mm256_mul_ps, _mm256_add_ps),
}

number! {
    f64,
    chains = 16,
    avx512 = (
        _mm512_loadu_pd, _mm512_maskz_loadu_pd, _mm512_setzero_pd, _mm512_mul_pd, _mm512_add_pd, fold_doubles
    ),
    avx2 = (_mm256_loadu_pd, _mm256_storeu_pd, _mm256_setzero_pd, _mm256_mul_pd, _mm256_add_pd),
}

/// The squared Euclidean distances of one vector to several of its length, each as [`super::squared_distance`] adds it up.
///
/// # Panics
/// If the vectors differ in length.
pub fn squared_distances<const COUNT: usize>(vector: &[f32], others: [&[f32]; COUNT]) -> [f32; COUNT] {
    assert!(others.iter().all(|other| other.len() == vector.len()));
    match level() {
        // SAFETY: the level is one that this machine was detected to have; all vectors have one length.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni => unsafe { squared_distances_avx512(vector, others.map(<[f32]>::as_ptr)) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { squared_distances_avx2(vector, others.map(<[f32]>::as_ptr)) },
        _ => others.map(|other| super::squared_distance(vector, other)),
    }
}

/// Shows `found` the squared distance of a vector to each of `count` others, in order, several at a time.
pub fn each_squared_distance<'r>(
    vector: &[f32],
    count: usize,
    other: impl Fn(usize) -> &'r [f32],
    mut found: impl FnMut(usize, f32),
) {
    let mut index = 0;
    while index < count {
        let at = |offset: usize| other(index + offset);
        let mut tell = |distances: &[f32]| {
            distances.iter().enumerate().for_each(|(offset, distance)| found(index + offset, *distance));
            distances.len()
        };
        index += match count - index {
            4.. => tell(&squared_distances(vector, [0, 1, 2, 3].map(at))),
            2.. => tell(&squared_distances(vector, [0, 1].map(at))),
            _ => tell(&squared_distances(vector, [at(0)])),
        };
    }
}

/// # Safety
/// The machine has AVX-512, and each of `others` points to as many values as `vector` has.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn squared_distances_avx512<const COUNT: usize>(vector: &[f32], others: [*const f32; COUNT]) -> [f32; COUNT] {
    use std::arch::x86_64::*;
    let mut lanes = [[_mm512_setzero_ps(); 2]; COUNT];
    for start in (0..vector.len()).step_by(32) {
        for half in 0..2 {
            let at = start + 16 * half;
            let left = vector.len().saturating_sub(at).min(16);
            let mask = ((1u32 << left) - 1) as u16;
            // SAFETY: the mask leaves out what lies beyond the end; the squared difference of the zeros in its place
            // changes no sum.
            unsafe {
                let value = _mm512_maskz_loadu_ps(mask, vector.as_ptr().wrapping_add(at));
                for (lanes, other) in lanes.iter_mut().zip(others) {
                    let difference = _mm512_sub_ps(value, _mm512_maskz_loadu_ps(mask, other.wrapping_add(at)));
                    lanes[half] = _mm512_add_ps(lanes[half], _mm512_mul_ps(difference, difference));
                }
            }
        }
    }
    lanes.map(|[first, second]| fold_singles(_mm512_add_ps(first, second)))
}

/// # Safety
/// The machine has AVX2, and each of `others` points to as many values as `vector` has.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn squared_distances_avx2<const COUNT: usize>(vector: &[f32], others: [*const f32; COUNT]) -> [f32; COUNT] {
    use std::arch::x86_64::*;
    let whole = vector.len() / 32 * 32;
    others.map(|other| {
        let mut lanes = [_mm256_setzero_ps(); 4];
        let mut rest = [0.0f32; 32];
        // SAFETY: everything is read below the end of the vectors.
        unsafe {
            for start in (0..whole).step_by(32) {
                for (quarter, lanes) in lanes.iter_mut().enumerate() {
                    let at = start + 8 * quarter;
                    let value = _mm256_loadu_ps(vector.as_ptr().add(at));
                    let difference = _mm256_sub_ps(value, _mm256_loadu_ps(other.add(at)));
                    *lanes = _mm256_add_ps(*lanes, _mm256_mul_ps(difference, difference));
                }
            }
            for (index, value) in vector[whole..].iter().enumerate() {
                let difference = value - *other.add(whole + index);
                rest[index] = difference * difference;
            }
            for (quarter, lanes) in lanes.iter_mut().enumerate() {
                *lanes = _mm256_add_ps(*lanes, _mm256_loadu_ps(rest.as_ptr().add(8 * quarter)));
            }
        }
        let lanes = _mm256_add_ps(_mm256_add_ps(lanes[0], lanes[2]), _mm256_add_ps(lanes[1], lanes[3]));
        let lanes = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let lanes = _mm_add_ps(lanes, _mm_movehl_ps(lanes, lanes));
        _mm_cvtss_f32(_mm_add_ss(lanes, _mm_movehdup_ps(lanes)))
    })
}
