//! How far what is computed of a point and a centroid may be from what is measured.
//!
//! s(c) = ‖c‖²/2 − ⟨x, c⟩ is computed from a product in place of ⟨x, c⟩, and stands for half of the measured squared
//! distance less ‖x‖²/2. The two differ by at most a [`Margin`], which adds up
//!
//! - what rounding to 8 bits took: ‖x − x̂‖ ‖c‖ + ‖x̂‖ ‖c − ĉ‖ (Cauchy and Schwarz);
//! - or what a product in float32 lost: a chain of d additions is wrong by at most d roundings of the sum of the
//!   magnitudes, and that is at most Σ |aₜ| ‖hₜ‖ ‖c‖;
//! - whatever else is rounded: the norms, s itself, and the measured distance in 32 lanes. All that is in proportion to
//!   (Σ |aₜ| ‖hₜ‖ + ‖c‖)².
//!
//! - and what underflows: results below 2⁻¹²⁶ may be wrong by as much, so every product by d of these, each of which an
//!   integer of 8 bits squared may have multiplied ([`UNDERFLOW`]).
//!
//! All this holds where no product overflows. Where one may, a point's bounds are [`Bound::UNKNOWN`], and all of its
//! centroids are measured.

use super::approximate::Bound;

/// Half of the distance between 1 and the next float32: what rounding takes at most, relative to the result.
pub const UNIT_ROUNDOFF: f32 = f32::EPSILON / 2.0;

/// Norms are rounded; what they bound is not.
pub const INFLATION: f32 = 1.001;

/// What underflow may take from one step of a product: 2⁻¹²⁶, as subnormal numbers may count as zero, times the square
/// of 127, and four times that for the steps that are counted once where they are several.
const UNDERFLOW: f32 = f32::MIN_POSITIVE * 65536.0;

/// Steps beside those of the product.
const OTHER_STEPS: f32 = 256.0;

/// How products are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    EightBits,
    Float32,
}

/// The roundings of points of one dimension, in proportion to what they are roundings of.
#[derive(Clone, Copy, Debug)]
pub struct ErrorModel {
    /// Of a product in float32.
    chain: f32,
    /// Of whatever else.
    rest: f32,
    /// What underflow takes from a product of numbers about as long as 1.
    underflow: f32,
    /// What it took from a pair before that was scaled.
    vanished: f32,
}

/// What s is wrong by at most for one point x: `slack`, and a part for each centroid, as one far away must not blur the
/// others.
#[derive(Clone, Copy, Debug)]
pub struct Margin {
    /// Of ‖c‖, ‖c − ĉ‖ and ‖c‖².
    pub factors: [f32; 3],
    pub slack: f32,
}

impl ErrorModel {
    /// Of points that were multiplied by `scale`.
    pub fn new(dim: usize, scale: f32) -> Self {
        let dim = dim as f32;
        Self {
            chain: 1.01 * (dim + 8.0) * UNIT_ROUNDOFF,
            rest: (dim / 32.0 + 32.0) * UNIT_ROUNDOFF,
            underflow: (dim + OTHER_STEPS) * UNDERFLOW,
            vanished: 4.0 * scale * dim.sqrt() * f32::from_bits(1),
        }
    }

    /// The margin of a point whose rows are multiplied by coefficients of the given `magnitude`, in sum.
    pub fn margin(&self, point: &Bound, magnitude: f32, precision: Precision) -> Margin {
        // Of (spread + ‖c‖)², the part of the product and those of the squares.
        let blur = 2.0 * self.rest * point.spread + self.vanished;
        let slack = self.rest * point.spread * point.spread + self.underflow * (1.0 + magnitude);
        let factors = match precision {
            Precision::EightBits => {
                let norm = INFLATION * point.squared_norm.sqrt() as f32;
                [point.error + blur, norm + point.error, self.rest]
            }
            Precision::Float32 => [self.chain * point.spread + blur, 0.0, self.rest],
        };
        // Finite, so that they take nothing from a centroid that is zero.
        Margin { factors: factors.map(|factor| factor.min(f32::MAX)), slack }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::approximate::{Approximation, TileBytes};
    use super::super::centroids::Centroids;
    use super::{ErrorModel, Precision};
    use crate::matrix::{Rows, Values};
    use crate::points::Points;
    use crate::progress::Progress;
    use crate::rng::{Purpose, Stream};
    use crate::{gemm, gemm8, simd};

    /// Of all points and centroids, the largest error of s as a share of what the margin allows.
    fn largest_share<const TERMS: usize>(points: &Points<TERMS>, centroids: &[f32], precision: Precision) -> f64 {
        let dim = points.dim();
        let approximation = Approximation::new(points, false, 0, &Progress::default()).unwrap();
        let centroids = Centroids::new(centroids.to_vec(), dim, 1.0, &approximation).unwrap();
        let model = ErrorModel::new(dim, points.scale());
        let mut largest = 0.0f64;
        for (index, tile) in points.tiles().iter().enumerate() {
            let products = products(points, index, &approximation, &centroids, precision);
            for point in tile.points.clone() {
                let magnitude = points.coefficients(point).iter().map(|own| own.abs()).sum();
                let margin = model.margin(&approximation.bounds[point], magnitude, precision);
                let mut values = vec![0.0; dim];
                points.write_alone(point, &mut values);
                for cluster in 0..centroids.count() {
                    let padded = centroids.half_norms.len();
                    let terms = points.slots(point).into_iter().zip(points.coefficients(point));
                    let s = terms.fold(centroids.half_norms[cluster], |s, (slot, coefficient)| {
                        s - coefficient * products[slot * padded + cluster]
                    });
                    let measured = f64::from(simd::squared_distance(&values, centroids.vectors().row(cluster)));
                    let error = f64::from(s) + approximation.bounds[point].squared_norm / 2.0 - measured / 2.0;
                    let lengths = [&centroids.norms, &centroids.errors, &centroids.squares];
                    let parts = margin.factors.iter().zip(lengths);
                    let own: f64 = parts.map(|(factor, of)| f64::from(*factor) * f64::from(of[cluster])).sum();
                    largest = largest.max(error.abs() / (own + f64::from(margin.slack)));
                }
            }
        }
        largest
    }

    fn products<const TERMS: usize>(
        points: &Points<TERMS>,
        index: usize,
        approximation: &Approximation,
        centroids: &Centroids,
        precision: Precision,
    ) -> Vec<f32> {
        let tile = &points.tiles()[index];
        let mut products = vec![0.0; points.rows_of(tile).len() * centroids.half_norms.len()];
        let (mut gathered, mut bytes) = (Vec::new(), TileBytes::default());
        match precision {
            Precision::EightBits => {
                let bytes = approximation.bytes(points, index, tile, &mut gathered, &mut bytes);
                let packed = centroids.eight_bits.as_ref().expect("the dimension allows it");
                gemm8::multiply(&bytes.bytes, &bytes.scales, packed, &mut gemm8::Buffers::default(), &mut products);
            }
            Precision::Float32 => {
                let rows = points.gather_or_borrow(tile, None, &mut gathered);
                gemm::multiply(rows, centroids.float32(), &mut products);
            }
        }
        products
    }

    fn share_of_one(point: &[f32], centroid: &[f32], precision: Precision) -> f64 {
        let rows = Rows::new(Values::F32(point), 1, point.len()).unwrap();
        largest_share(&Points::from_rows(rows, &Progress::default()).unwrap(), centroid, precision)
    }

    /// A vector from which rounding to 8 bits takes a half of every value but the first, and the signs of what it takes.
    fn halves(dim: usize) -> (Vec<f32>, Vec<f32>) {
        let value = |index: usize| if index == 0 { 127.0 } else { (index % 4) as f32 + 0.5 };
        let values: Vec<f32> = (0..dim).map(value).collect();
        let lost = values.iter().map(|value| value - value.round_ties_even());
        let signs = lost.map(|lost| if lost == 0.0 { 0.0 } else { lost.signum() }).collect();
        (values, signs)
    }

    #[test]
    fn rounding_of_a_point_to_8_bits_uses_all_of_its_margin() {
        let (point, centroid) = halves(128);
        let share = share_of_one(&point, &centroid, Precision::EightBits);
        assert!((0.99..=1.0).contains(&share), "{share}");
    }

    #[test]
    fn rounding_of_a_centroid_to_8_bits_uses_all_of_its_margin() {
        let (centroid, point) = halves(128);
        let share = share_of_one(&point, &centroid, Precision::EightBits);
        assert!((0.99..=1.0).contains(&share), "{share}");
    }

    /// 1 and then half a step again and again, all of which the sum loses.
    fn lost_steps(dim: usize, ones: usize) -> Vec<f32> {
        (0..dim).map(|index| if index < ones { 1.0 } else { 2f32.powi(-12) }).collect()
    }

    #[test]
    fn a_chain_of_additions_uses_most_of_its_margin() {
        let point = lost_steps(1 << 14, 1);
        let share = share_of_one(&point, &point, Precision::Float32);
        assert!((0.85..=1.0).contains(&share), "{share}");
    }

    /// Half of what is allowed, since half of the squared distance counts.
    #[test]
    fn the_lanes_of_a_distance_use_half_of_their_margin() {
        let point = lost_steps(1 << 16, 32);
        let share = share_of_one(&point, &vec![0.0; point.len()], Precision::Float32);
        assert!((0.45..=0.5).contains(&share), "{share}");
    }

    /// The second row alone makes the error, and what it adds to the pair.
    #[test]
    fn every_row_of_a_pair_counts() {
        let dim = 1 << 14;
        let values: Vec<f32> = [vec![1e-3; dim], lost_steps(dim, 1)].concat();
        let rows = Rows::new(Values::F32(&values), 2, dim).unwrap();
        let pairs =
            Points::from_pairs(rows, &[[0, 1], [1, 0]], &[[1.0, -1.0], [1.0, -1.0]], &Progress::default()).unwrap();
        let share = largest_share(&pairs, &values[dim..], Precision::Float32);
        assert!((0.6..=1.0).contains(&share), "{share}");
    }

    /// Products of 2^-121 with 2^-13 keep few of their bits, and a coefficient of 2^120 brings out what they lost.
    #[test]
    fn coefficients_multiply_what_underflows() {
        let values = [1.1 * 2f32.powi(-121); 64];
        let rows = Rows::new(Values::F32(&values), 1, 64).unwrap();
        let pairs = Points::from_pairs(rows, &[[0, 0]], &[[2f32.powi(120), 0.0]], &Progress::default()).unwrap();
        let centroids: Vec<f32> = (0..16).flat_map(|step| [(1.0 + step as f32 / 16.0) * 2f32.powi(-13); 64]).collect();
        for precision in [Precision::EightBits, Precision::Float32] {
            let share = largest_share(&pairs, &centroids, precision);
            assert!(share <= 1.0, "{share}, {precision:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_error_exceeds_its_margin(
            dim in 48usize..200, seed in 0u64..1000, offset in prop::sample::select(vec![0.0f32, 1.0, 100.0]), scale in -75i32..20,
        ) {
            let stream = Stream::new(seed, Purpose::Shuffle, 0);
            let value = |index: usize| (stream.uniform(index as u64) as f32 - 0.5 + offset) * 2f32.powi(scale);
            let values: Vec<f32> = (0..20 * dim).map(value).collect();
            let rows = Rows::new(Values::F32(&values), 20, dim).unwrap();
            let pairs: Vec<[i64; 2]> = (0..19).map(|row| [row, row + 1]).collect();
            let coefficients: Vec<[f32; 2]> = (0..19).map(|pair| [1.0 + pair as f32, -0.7]).collect();
            let pairs = Points::from_pairs(rows, &pairs, &coefficients, &Progress::default()).unwrap();
            for precision in [Precision::EightBits, Precision::Float32] {
                let share = largest_share(&Points::from_rows(rows, &Progress::default()).unwrap(), &values[..7 * dim], precision);
                prop_assert!(share <= 1.0, "{share} of rows, {precision:?}");
                let share = largest_share(&pairs, &values[..7 * dim], precision);
                prop_assert!(share <= 1.0, "{share} of pairs, {precision:?}");
            }
        }
    }
}
