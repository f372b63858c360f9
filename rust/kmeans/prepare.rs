//! What points and centroids go through before they meet.

use std::ops::Range;

use super::approximate::Approximation;
use super::params::Metric;
use crate::error::{Error, Result};
use crate::memory::{POINTS, build, each, first};
use crate::points::Points;
use crate::progress::Progress;
use crate::simd;

/// Norms whose squares and products are safe from overflow and from subnormal numbers.
const SAFE_NORMS: Range<f64> = 1e-6..1e6;

/// Rounds the points to 8 bits; gives them unit length for [`Metric::Cosine`], or else, where the squares of points or of
/// the `centroids` given would leave the range of float32, multiplies them by a power of two.
pub fn prepare<const TERMS: usize>(
    points: &mut Points<TERMS>,
    centroids: &[f32],
    metric: Metric,
    cache_bytes: usize,
    progress: &Progress,
) -> Result<Approximation> {
    let dim = points.dim();
    // Pairs need no origin: the coefficients of a margin loss sum to zero. Unit vectors have theirs.
    let centred = metric == Metric::Euclidean && TERMS == 1;
    let mut approximation = Approximation::new(points, centred, cache_bytes, progress)?;
    let norm = |point: usize| approximation.bounds[point].squared_norm.sqrt();
    if metric == Metric::Cosine {
        let own = points.own().points.clone();
        let factor = |point: usize| if own.contains(&point) { norm(point).recip() as f32 } else { 1.0 };
        let factors = build(points.count(), POINTS, progress, factor)?;
        if let Some(point) = first(points.count(), progress, |point| !factors[point].is_finite())? {
            let zero = approximation.bounds[point].squared_norm == 0.0;
            let (array, point) = (Points::<TERMS>::ARRAY, points.number(point));
            return Err(if zero { Error::ZeroPoint { array, point } } else { Error::TooShort { array, point } });
        }
        points.multiply(&factors, progress)?;
        approximation.multiply(&factors, progress)?;
        return Ok(approximation);
    }
    let origin = approximation.origin_or_zero(dim);
    let lengths = centroids.chunks_exact(dim).map(|centroid| simd::squared_distance_float64(centroid, &origin).sqrt());
    let mut largest = lengths.fold(0.0, f64::max);
    each(points.count(), progress, |point| largest = largest.max(norm(point)))?;
    largest = points.processes().gathered(&[largest])?.concat().into_iter().fold(largest, f64::max);
    if is_safe(largest) {
        return Ok(approximation);
    }
    points.set_scale((-largest.log2().round()).clamp(-126.0, 126.0).exp2() as f32);
    Approximation::new(points, false, cache_bytes, progress)
}

/// Whether points and centroids can be measured as they are, given the longest of them.
pub fn is_safe(largest: f64) -> bool {
    largest == 0.0 || SAFE_NORMS.contains(&largest)
}

pub fn normalize_rows(array: &'static str, centroids: &mut [f32], dim: usize) -> Result<()> {
    for (row, centroid) in centroids.chunks_exact_mut(dim).enumerate() {
        let norm = simd::squared_norm_float64(centroid).sqrt();
        if norm.is_nan() || norm <= 0.0 {
            return Err(Error::ZeroRow { array, row });
        }
        if (norm as f32).is_normal() {
            let norm = norm as f32;
            centroid.iter_mut().for_each(|value| *value /= norm);
        } else {
            centroid.iter_mut().for_each(|value| *value = (f64::from(*value) / norm) as f32);
        }
    }
    Ok(())
}
