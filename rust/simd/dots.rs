//! Many inner products, or squared distances, at once: a vector that was loaded serves several of them.
//!
//! Each is the sum of a fixed number of chains, each with a stride of that number along the vectors, folded as a tree;
//! nothing fuses a multiplication with an addition. So neither how many are computed side by side nor the [`Level`] ever
//! shows. One kernel does all, `sums`, over the registers of a level and over what is added up.

use std::ops::{Add, Mul};

use super::register::Register;
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
    let [products] = tile::<Product, T, 1, COUNT>([vector], others);
    products
}

/// The squared Euclidean distances of one vector to several of its length, each as [`super::squared_distance`] adds it up.
///
/// # Panics
/// If the vectors differ in length.
pub fn squared_distances<const COUNT: usize>(vector: &[f32], others: [&[f32]; COUNT]) -> [f32; COUNT] {
    let [distances] = tile::<SquaredDifference, f32, 1, COUNT>([vector], others);
    distances
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
                    let tile = tile::<Product, T, ROWS, COLUMNS>(left, right);
                    for (row, values) in tile.iter().enumerate().take(rows) {
                        for (product, value) in products[row * stride..][..columns].iter_mut().zip(values) {
                            *product = *product + sign * *value;
                        }
                    }
                }
            }
        }
    }
}

/// What inner products are computed of: float32 or float64.
///
/// # Safety
/// Each register needs no more instructions than its level promises, and 128 bytes of it hold the chains.
pub unsafe trait Number: Copy + Default + Send + Sync + Add<Output = Self> + Mul<Output = Self> {
    #[cfg(target_arch = "x86_64")]
    type Avx512: Register<Number = Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx2: Register<Number = Self>;
    #[cfg(target_arch = "aarch64")]
    type Neon: Register<Number = Self>;
    type Plain: Register<Number = Self>;
}

// SAFETY: the registers are those of the levels.
unsafe impl Number for f32 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256;
    #[cfg(target_arch = "aarch64")]
    type Neon = std::arch::aarch64::float32x4_t;
    type Plain = [Self; 32];
}

// SAFETY: as above.
unsafe impl Number for f64 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = std::arch::x86_64::__m512d;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = std::arch::x86_64::__m256d;
    #[cfg(target_arch = "aarch64")]
    type Neon = std::arch::aarch64::float64x2_t;
    type Plain = [Self; 16];
}

/// What is added up of two numbers.
trait Term {
    /// # Safety
    /// The machine has the instructions of the register.
    unsafe fn of<R: Register>(left: R, right: R) -> R;
}

struct Product;

impl Term for Product {
    #[inline(always)]
    unsafe fn of<R: Register>(left: R, right: R) -> R {
        // SAFETY: promised by the caller.
        unsafe { left.multiply(right) }
    }
}

struct SquaredDifference;

impl Term for SquaredDifference {
    #[inline(always)]
    unsafe fn of<R: Register>(left: R, right: R) -> R {
        // SAFETY: promised by the caller.
        unsafe {
            let difference = left.subtract(right);
            difference.multiply(difference)
        }
    }
}

/// The terms of each vector on the left with each on the right, added up over `depth` values. The chains lie in `PARTS`
/// registers.
///
/// # Safety
/// The machine has the instructions of the register, and each vector has `depth` values.
#[inline(always)]
unsafe fn sums<T: Term, R: Register, const PARTS: usize, const ROWS: usize, const COLUMNS: usize>(
    left: [*const R::Number; ROWS],
    right: [*const R::Number; COLUMNS],
    depth: usize,
) -> [[R::Number; COLUMNS]; ROWS] {
    let chains = PARTS * R::LANES;
    let whole = depth - depth % chains;
    // SAFETY: what is read lies within the `depth` values that the caller promises.
    unsafe {
        let mut sums = [[[R::zero(); PARTS]; COLUMNS]; ROWS];
        for start in (0..whole).step_by(chains) {
            add_terms::<T, R, true, PARTS, ROWS, COLUMNS>(&mut sums, left, right, start, depth);
        }
        if whole < depth {
            add_terms::<T, R, false, PARTS, ROWS, COLUMNS>(&mut sums, left, right, whole, depth);
        }
        let mut folded = [[R::Number::default(); COLUMNS]; ROWS];
        for row in 0..ROWS {
            for column in 0..COLUMNS {
                let parts = &mut sums[row][column];
                let mut width = PARTS / 2;
                while width > 0 {
                    for part in 0..width {
                        parts[part] = parts[part].add(parts[part + width]);
                    }
                    width /= 2;
                }
                folded[row][column] = parts[0].fold();
            }
        }
        folded
    }
}

/// Adds one term to each chain, from `start` on. Unless all are `WHOLE`, chains beyond `depth` get that of two zeros,
/// which changes no bit, as no sum is ever -0.
///
/// # Safety
/// As for [`sums`], and `start` is at most `depth`.
#[inline(always)]
unsafe fn add_terms<
    T: Term,
    R: Register,
    const WHOLE: bool,
    const PARTS: usize,
    const ROWS: usize,
    const COLUMNS: usize,
>(
    sums: &mut [[[R; PARTS]; COLUMNS]; ROWS],
    left: [*const R::Number; ROWS],
    right: [*const R::Number; COLUMNS],
    start: usize,
    depth: usize,
) {
    // SAFETY: promised by the caller.
    unsafe {
        for part in 0..PARTS {
            let at = start + part * R::LANES;
            let mut others = [R::zero(); COLUMNS];
            for column in 0..COLUMNS {
                others[column] = load::<R, WHOLE>(right[column], at, depth);
            }
            for row in 0..ROWS {
                let value = load::<R, WHOLE>(left[row], at, depth);
                for column in 0..COLUMNS {
                    sums[row][column][part] = sums[row][column][part].add(T::of(value, others[column]));
                }
            }
        }
    }
}

/// The values of a register from `at` on, those beyond `depth` being zero unless all are `WHOLE`.
///
/// # Safety
/// There are `depth` values, and the machine has the instructions of the register.
#[inline(always)]
unsafe fn load<R: Register, const WHOLE: bool>(values: *const R::Number, at: usize, depth: usize) -> R {
    // Masks are for the ends alone: with one on every load a product took 1.2 times as long.
    // SAFETY: promised by the caller; `load_first` reads no more than is left.
    unsafe {
        if WHOLE { R::load(values.add(at)) } else { R::load_first(values.wrapping_add(at), depth.saturating_sub(at)) }
    }
}

/// [`sums`] at AVX-512.
///
/// # Safety
/// The machine has AVX-512, and each vector has `depth` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
unsafe fn sums_avx512<T: Term, N: Number, const ROWS: usize, const COLUMNS: usize>(
    left: [*const N; ROWS],
    right: [*const N; COLUMNS],
    depth: usize,
) -> [[N; COLUMNS]; ROWS] {
    // SAFETY: promised by the caller.
    unsafe { sums::<T, N::Avx512, 2, ROWS, COLUMNS>(left, right, depth) }
}

/// [`sums`] at AVX2.
///
/// # Safety
/// The machine has AVX2, and each vector has `depth` values.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn sums_avx2<T: Term, N: Number, const COLUMNS: usize>(
    left: *const N,
    right: [*const N; COLUMNS],
    depth: usize,
) -> [N; COLUMNS] {
    // SAFETY: promised by the caller.
    let [sums] = unsafe { sums::<T, N::Avx2, 4, 1, COLUMNS>([left], right, depth) };
    sums
}

/// [`sums`] at NEON, of vectors with `depth` values.
#[cfg(target_arch = "aarch64")]
fn sums_neon<T: Term, N: Number, const ROWS: usize, const COLUMNS: usize>(
    left: [&[N]; ROWS],
    right: [&[N]; COLUMNS],
    depth: usize,
) -> [[N; COLUMNS]; ROWS] {
    let mut tile = [[N::default(); COLUMNS]; ROWS];
    for (left, tile) in left.iter().zip(&mut tile) {
        // Of 32 registers, 24 hold the sums of three terms.
        for (right, tile) in right.chunks(3).zip(tile.chunks_mut(3)) {
            let (left, right) = ([left.as_ptr()], |index: usize| right[index].as_ptr());
            // SAFETY: all vectors have `depth` values, and every AArch64 has NEON.
            unsafe {
                match tile {
                    [_, _, _] => {
                        let [found] = sums::<T, N::Neon, 8, 1, 3>(left, [0, 1, 2].map(right), depth);
                        tile.copy_from_slice(&found);
                    }
                    [_, _] => {
                        let [found] = sums::<T, N::Neon, 8, 1, 2>(left, [0, 1].map(right), depth);
                        tile.copy_from_slice(&found);
                    }
                    _ => [[tile[0]]] = sums::<T, N::Neon, 8, 1, 1>(left, [right(0)], depth),
                }
            }
        }
    }
    tile
}

/// The sums of the terms of each vector on the left with each on the right.
#[inline]
fn tile<T: Term, N: Number, const ROWS: usize, const COLUMNS: usize>(
    left: [&[N]; ROWS],
    right: [&[N]; COLUMNS],
) -> [[N; COLUMNS]; ROWS] {
    let depth = left[0].len();
    assert!(left.iter().chain(&right).all(|vector| vector.len() == depth));
    let mut tile = [[N::default(); COLUMNS]; ROWS];
    match level() {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Vnni => {
            // SAFETY: the level is one that this machine was detected to have; all vectors have `depth` values.
            tile =
                unsafe { sums_avx512::<T, N, ROWS, COLUMNS>(left.map(<[_]>::as_ptr), right.map(<[_]>::as_ptr), depth) };
        }
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => {
            for (left, tile) in left.iter().zip(&mut tile) {
                // Sixteen registers hold the sums of three terms.
                for (right, tile) in right.chunks(3).zip(tile.chunks_mut(3)) {
                    let (left, right) = (left.as_ptr(), |index: usize| right[index].as_ptr());
                    // SAFETY: as above.
                    unsafe {
                        match tile {
                            [_, _, _] => tile.copy_from_slice(&sums_avx2::<T, N, 3>(left, [0, 1, 2].map(right), depth)),
                            [_, _] => tile.copy_from_slice(&sums_avx2::<T, N, 2>(left, [0, 1].map(right), depth)),
                            _ => tile.copy_from_slice(&sums_avx2::<T, N, 1>(left, [right(0)], depth)),
                        }
                    }
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        Level::Neon => tile = sums_neon::<T, N, ROWS, COLUMNS>(left, right, depth),
        _ => {
            for (left, tile) in left.iter().zip(&mut tile) {
                for (right, sum) in right.iter().zip(tile) {
                    // SAFETY: both vectors have `depth` values, and every machine has what this compiles to.
                    let [[found]] = unsafe { sums::<T, N::Plain, 1, 1, 1>([left.as_ptr()], [right.as_ptr()], depth) };
                    *sum = found;
                }
            }
        }
    }
    tile
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
