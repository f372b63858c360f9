//! Scores of each pair, from which its usefulness is taken.

mod products;

use crate::error::{Error, Result};
use crate::matrix::check_finite;
use crate::memory::{RESULTS, TILES, build, first, room};
use crate::points::{BLOCKS, Points};
use crate::progress::Progress;
use crate::simd;
use crate::simd::dots::dots;
use products::{Centroids, Products, TRUSTED_SQUARES, Target};

/// Rows that are added to a sum at once.
const ADDED: usize = 4;

/// ‖z_p‖ of each pair.
///
/// ‖a h_w + b h_l‖² = a²‖h_w‖² + 2ab⟨h_w, h_l⟩ + b²‖h_l‖², so a row is read once for all its pairs. Where the sum
/// cancels, the pair is formed and measured instead.
///
/// Those of rows that are not finite, or too long for float32, are not finite either.
///
/// ```
/// use bpo::matrix::{Rows, Values};
/// use bpo::points::Points;
/// use bpo::progress::Progress;
/// use bpo::usefulness::pair_norms;
///
/// let rows = Rows::new(Values::F32(&[3.0, 0.0, 0.0, 4.0]), 2, 2)?;
/// let pairs = Points::from_pairs(rows, &[[0, 1], [1, 1]], &[[1.0, -1.0]; 2], &Progress::default())?;
/// assert_eq!(pair_norms(&pairs, &Progress::default())?, [5.0, 0.0]);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn pair_norms(points: &Points<2>, progress: &Progress) -> Result<Vec<f32>> {
    let own = points.own().points.clone();
    progress.start(points.own().tiles.len());
    let mut norms = build(points.count(), RESULTS, progress, |_| 0.0)?;
    let start = || (Products::new(0), vec![0.0; points.dim()], vec![0.0; points.dim()]);
    points.fill_blocks(&mut norms[own.clone()], progress, start, |(products, row, values), tile, norms| {
        products.compute(points, tile, None);
        for (index, pair) in tile.points.clone().enumerate() {
            let expanded = products.expand(points, pair, index);
            norms[index] = if expanded.trusted() {
                expanded.square.sqrt() as f32
            } else {
                length(points.read(tile, pair, row, values))
            };
        }
    })?;
    points.processes().complete(&mut norms, own)?;
    Ok(norms)
}

/// Scores of pairs against their centroids and the optimization direction.
#[derive(Clone, Debug)]
pub struct Scores {
    /// ⟨z, c/‖c‖⟩; zero where the centroid is zero.
    pub centrality: Vec<f32>,
    /// ‖z − c‖.
    pub distance: Vec<f32>,
    /// ⟨z, u⟩.
    pub alignment: Vec<f32>,
    /// u, of unit length; zero where the pairs cancel out.
    pub direction: Vec<f32>,
}

/// Scores every pair against the centroid of its cluster (row-major `centroids`) and against the unit `direction`: the
/// normalised mean of the pairs, unless one is given (which is normalised too).
///
/// Every score is linear or bilinear in the rows, so pairs are not formed: a row is multiplied once with `direction`,
/// with itself, with its partners, and with each centroid that its pairs belong to; the rest is arithmetic on those
/// numbers, ‖z − c‖² = ‖z‖² − 2⟨z, c⟩ + ‖c‖². Where that cancels, the pair is formed and measured instead. One pass over
/// the rows; one more, which adds up each row once, if no direction is given.
///
/// ```
/// use bpo::matrix::{Rows, Values};
/// use bpo::points::Points;
/// use bpo::progress::Progress;
/// use bpo::usefulness::score_pairs;
///
/// let rows = Rows::new(Values::F32(&[3.0, 0.0, 0.0, 4.0]), 2, 2)?;
/// let pairs = Points::from_pairs(rows, &[[0, 1]], &[[1.0, -1.0]], &Progress::default())?;
/// let scores = score_pairs(&pairs, &[3.0, 0.0], &[0], Some(&[0.0, -2.0]), &Progress::default())?;
/// // The pair is (3, -4).
/// assert_eq!((scores.centrality[0], scores.distance[0], scores.alignment[0]), (3.0, 4.0, 4.0));
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, a label has no centroid, a value is not finite, the memory cannot be had, or the computation was
/// cancelled.
pub fn score_pairs(
    points: &Points<2>,
    centroids: &[f32],
    labels: &[i32],
    direction: Option<&[f32]>,
    progress: &Progress,
) -> Result<Scores> {
    let dim = points.dim();
    check(points, centroids, labels, direction, progress)?;
    let passes = if direction.is_some() { 1 } else { 2 };
    let own = points.own().points.clone();
    progress.start(passes * points.own().tiles.len());
    let direction = match direction {
        Some(given) => normalized(given.iter().map(|&value| f64::from(value)).collect()),
        None => normalized(sum(points, progress)?),
    };
    let centroids = Centroids::new(centroids, dim)?;
    let target = Target { centroids: &centroids, labels, direction: &direction };

    let zeros = || build(points.count(), RESULTS, progress, |_| 0.0);
    let (mut centrality, mut distance, mut alignment) = (zeros()?, zeros()?, zeros()?);
    let scores = ((&mut centrality[own.clone()], &mut distance[own.clone()]), &mut alignment[own.clone()]);
    let start = || (Products::new(centroids.squares.len()), vec![0.0; dim], vec![0.0; dim]);
    points.fill_blocks(scores, progress, start, |(products, row, values), tile, scores| {
        let ((centrality, distance), alignment) = scores;
        products.compute(points, tile, Some(&target));
        for (index, pair) in tile.points.clone().enumerate() {
            let cluster = labels[pair] as usize;
            let scores = products
                .score(points, pair, index, centroids.squares[cluster])
                .unwrap_or_else(|| measure(points.read(tile, pair, row, values), centroids.row(cluster), &direction));
            centrality[index] = (scores[0] * centroids.inverse_norms[cluster]) as f32;
            (distance[index], alignment[index]) = (scores[1] as f32, scores[2] as f32);
        }
    })?;
    if let Some(pair) = first(own.len(), progress, |pair| !distance[own.start + pair].is_finite())? {
        return Err(points.not_finite(own.start + pair));
    }
    for scores in [&mut centrality, &mut distance, &mut alignment] {
        points.processes().complete(scores, own.clone())?;
    }
    Ok(Scores { centrality, distance, alignment, direction })
}

/// The length of a vector: in float64 where float32 cannot hold its square.
fn length(values: &[f32]) -> f32 {
    let square = simd::dot(values, values);
    if TRUSTED_SQUARES.contains(&square) { square.sqrt() } else { simd::squared_norm_float64(values).sqrt() as f32 }
}

/// ⟨z, c⟩, ‖z − c‖ and ⟨z, u⟩: in float64 where float32 cannot hold the squares.
fn measure(pair: &[f32], centroid: &[f32], direction: &[f32]) -> [f64; 3] {
    let square = simd::squared_distance(pair, centroid);
    let regular = |values: &[f32]| TRUSTED_SQUARES.contains(&simd::dot(values, values));
    if TRUSTED_SQUARES.contains(&square) && regular(pair) && regular(centroid) {
        let [product, alignment] = dots(pair, [centroid, direction]);
        return [product, square.sqrt(), alignment].map(f64::from);
    }
    let [pair_doubles, centroid_doubles, direction] = [pair, centroid, direction].map(|values| {
        let mut doubles = vec![0.0; values.len()];
        simd::to_float64(values, &mut doubles);
        doubles
    });
    let [product, alignment] = dots(&pair_doubles, [&centroid_doubles, &direction]);
    [product, simd::squared_distance_float64(pair, centroid).sqrt(), alignment]
}

fn check(
    points: &Points<2>,
    centroids: &[f32],
    labels: &[i32],
    direction: Option<&[f32]>,
    progress: &Progress,
) -> Result<()> {
    let dim = points.dim();
    if dim == 0 {
        return Err(Error::shape("rows", "(n, d) with d >= 1", "(n, 0)"));
    }
    if !centroids.len().is_multiple_of(dim) {
        return Err(Error::shape("centroids", format!("(k, {dim})"), format!("({},)", centroids.len())));
    }
    let clusters = centroids.len() / dim;
    if labels.len() != points.count() {
        let expected = format!("({},), one for each pair", points.count());
        return Err(Error::shape("labels", expected, format!("({},)", labels.len())));
    }
    let known = |label: i32| usize::try_from(label).is_ok_and(|label| label < clusters);
    if let Some(index) = first(labels.len(), progress, |pair| !known(labels[pair]))? {
        let label = i64::from(labels[index]);
        return Err(Error::ClusterOutOfRange { array: "labels", index, label, clusters });
    }
    check_finite("centroids", centroids, dim)?;
    if let Some(direction) = direction {
        if direction.len() != dim {
            return Err(Error::shape("direction", format!("({dim},)"), format!("({},)", direction.len())));
        }
        if let Some(index) = direction.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFinite { array: "direction", index, value: f64::from(direction[index]) });
        }
    }
    Ok(())
}

/// The sum of the pairs: each row once, times the sum of its coefficients.
fn sum(points: &Points<2>, progress: &Progress) -> Result<Vec<f64>> {
    let dim = points.dim();
    room(BLOCKS.min(points.tiles().len()) * size_of::<f64>() * dim, TILES)?;
    let start = || (vec![0.0; dim], Vec::new(), vec![vec![0.0; dim]; ADDED]);
    let blocks = points.fold_blocks(progress, start, |(sum, factors, scratch), tile| {
        let rows = points.rows_of(tile);
        factors.clear();
        factors.resize(rows.len(), 0.0);
        for pair in tile.points.clone() {
            for (slot, coefficient) in points.slots(pair).into_iter().zip(points.coefficients(pair)) {
                factors[slot] += f64::from(coefficient);
            }
        }
        let (factors, rest) = factors.as_chunks::<ADDED>();
        let (rows, rest_rows) = rows.as_chunks::<ADDED>();
        for (factors, rows) in factors.iter().zip(rows) {
            let mut scratch = scratch.iter_mut();
            let terms = rows.map(|row| points.rows().row(row, scratch.next().expect("as many as rows")));
            simd::add_terms_to_float64(sum, *factors, terms);
        }
        for (factor, &row) in rest.iter().zip(rest_rows) {
            simd::add_scaled_to_float64(sum, *factor, points.rows().row(row, &mut scratch[0]));
        }
    })?;
    let blocks: Vec<f64> = blocks.into_iter().flat_map(|(sum, ..)| sum).collect();
    let blocks = points.processes().gathered(&blocks)?.concat();
    Ok((0..dim).map(|index| blocks.chunks_exact(dim).map(|sum| sum[index]).sum()).collect())
}

fn normalized(values: Vec<f64>) -> Vec<f32> {
    let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { norm.recip() } else { 0.0 };
    values.into_iter().map(|value| (value * scale) as f32).collect()
}
