//! Scores of each pair, from which its usefulness is taken, and the order in which pairs are to be kept.

use std::ops::RangeInclusive;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::points::{Points, Tile};
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd;
use crate::simd::dots::dots;

/// Blocks of tiles: fixed, so that sums fold alike on any number of threads.
const BLOCKS: usize = 64;

/// Keys that a thread makes between two looks at the cancel token: about a millisecond.
const RANKED_AT_ONCE: usize = 1 << 14;

/// Smallest share of its own terms at which an expanded square is trusted. A share of 1/16 costs a length at most a factor
/// of 16 over the rounding of one inner product (measured: 1.2e-6 relative at 1024 values, 1.7e-6 at 8192); pairs of rows
/// whose cosine is up to 0.94 stay on the fast path.
const TRUSTED_SHARE: f64 = 1.0 / 16.0;

/// Squared norms whose products neither overflow nor lose digits to subnormal numbers.
const TRUSTED_SQUARES: RangeInclusive<f32> = 7.9e-31..=1.2e30;

/// Vectors that a row is multiplied with at once: a load of the row serves four products. With two a product took 1.1
/// times as long, with eight 1.2 times.
const BATCH: usize = 4;

/// ‖z_p‖ of each pair.
///
/// ‖a h_w + b h_l‖² = a²‖h_w‖² + 2ab⟨h_w, h_l⟩ + b²‖h_l‖², so a row is read once for all its pairs. Where the sum
/// cancels, the pair is formed and measured instead.
///
/// # Errors
/// If a row is not finite or the computation was cancelled.
pub fn pair_norms(points: &Points<2>, progress: &Progress) -> Result<Vec<f32>> {
    progress.start(points.tiles().len());
    let start = || (Vec::new(), Products::new(0), vec![0.0; points.dim()]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(norms, products, values), tile, gathered| {
        products.compute(points, tile, gathered, None);
        for (index, pair) in tile.points.clone().enumerate() {
            let expanded = products.expand(points, pair, index);
            norms.push(if expanded.trusted() {
                expanded.square.sqrt() as f32
            } else {
                points.write(pair, gathered, values);
                simd::dot(values, values).sqrt()
            });
        }
    })?;
    let mut norms = vec![0.0; points.count()];
    let parts = split(&mut norms, blocks.iter().map(|(part, ..)| part.len()));
    parts.into_par_iter().zip(&blocks).for_each(|(norms, (part, ..))| norms.copy_from_slice(part));
    match norms.par_iter().position_first(|norm| !norm.is_finite()) {
        Some(pair) => Err(points.not_finite(pair)),
        None => Ok(norms),
    }
}

/// Cuts a slice into consecutive parts of the given lengths.
fn split<T>(mut values: &mut [T], lengths: impl Iterator<Item = usize>) -> Vec<&mut [T]> {
    let cut = |length| values.split_off_mut(..length).expect("the parts make up the whole");
    lengths.map(cut).collect()
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
/// # Errors
/// If shapes do not fit, a label has no centroid, a value is not finite, or the computation was cancelled.
pub fn score_pairs(
    points: &Points<2>,
    centroids: &[f32],
    labels: &[i32],
    direction: Option<&[f32]>,
    progress: &Progress,
) -> Result<Scores> {
    let dim = points.dim();
    check(points, centroids, labels, direction)?;
    let passes = if direction.is_some() { 1 } else { 2 };
    progress.start(passes * points.tiles().len());
    let direction = match direction {
        Some(given) => normalized(given.iter().map(|&value| f64::from(value)).collect()),
        None => normalized(sum(points, progress)?),
    };
    let centroids = Centroids::new(centroids, dim);
    let target = Target { centroids: &centroids, labels, direction: &direction };

    let start = || (Vec::new(), Products::new(centroids.squares.len()), vec![0.0; dim]);
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(scores, products, values), tile, gathered| {
        products.compute(points, tile, gathered, Some(&target));
        for (index, pair) in tile.points.clone().enumerate() {
            let cluster = labels[pair] as usize;
            scores.push(match products.score(points, pair, index, centroids.squares[cluster]) {
                Some([product, distance, alignment]) => {
                    [product * centroids.inverse_norms[cluster], distance, alignment].map(|score| score as f32)
                }
                None => {
                    points.write(pair, gathered, values);
                    let centroid = centroids.row(cluster);
                    let [product, alignment] = dots(values, [centroid, &direction]);
                    let centrality = f64::from(product) * centroids.inverse_norms[cluster];
                    [centrality as f32, simd::squared_distance(values, centroid).sqrt(), alignment]
                }
            });
        }
    })?;
    let mut scores = Scores {
        centrality: vec![0.0; points.count()],
        distance: vec![0.0; points.count()],
        alignment: vec![0.0; points.count()],
        direction,
    };
    let lengths = || blocks.iter().map(|(part, ..)| part.len());
    let parts = split(&mut scores.centrality, lengths())
        .into_par_iter()
        .zip(split(&mut scores.distance, lengths()))
        .zip(split(&mut scores.alignment, lengths()));
    parts.zip(&blocks).for_each(|(((centrality, distance), alignment), (part, ..))| {
        for (index, scores) in part.iter().enumerate() {
            [centrality[index], distance[index], alignment[index]] = *scores;
        }
    });
    match scores.distance.par_iter().position_first(|distance| !distance.is_finite()) {
        Some(pair) => Err(points.not_finite(pair)),
        None => Ok(scores),
    }
}

/// What pairs are scored against.
struct Target<'a> {
    centroids: &'a Centroids<'a>,
    labels: &'a [i32],
    direction: &'a [f32],
}

struct Centroids<'a> {
    values: &'a [f32],
    dim: usize,
    squares: Vec<f32>,
    inverse_norms: Vec<f64>,
}

impl<'a> Centroids<'a> {
    fn new(values: &'a [f32], dim: usize) -> Self {
        let squares: Vec<f32> = values.chunks_exact(dim).map(|centroid| simd::dot(centroid, centroid)).collect();
        let inverse = |&square: &f32| if square > 0.0 { f64::from(square).sqrt().recip() } else { 0.0 };
        let inverse_norms = squares.iter().map(inverse).collect();
        Self { values, dim, squares, inverse_norms }
    }

    fn row(&self, cluster: usize) -> &'a [f32] {
        &self.values[cluster * self.dim..(cluster + 1) * self.dim]
    }
}

/// A product that a row of the tile is needed for, and where it goes.
#[derive(Clone, Copy, Debug, Default)]
struct Request {
    /// A slot of the tile for the partner of a pair, else a cluster.
    with: u32,
    /// The pair within the tile.
    index: u32,
    place: Place,
}

/// Which of the products of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Place {
    #[default]
    Partner = 0,
    ChosenCentroid = 1,
    RejectedCentroid = 2,
}

/// The products of a tile's rows that its pairs need, each computed once; reused from tile to tile.
struct Products {
    /// Requests of the slots, one slot after the other, and where those of a slot end.
    requests: Vec<Request>,
    ends: Vec<usize>,
    /// For each cluster the last row that was multiplied with it, and the product's place among those of the row.
    memo: Vec<(usize, u32)>,
    /// Rows looked at so far.
    rows: usize,
    /// Of each slot: ‖h‖² and ⟨h, u⟩.
    squares: Vec<f32>,
    alignments: Vec<f32>,
    /// Of each pair, by [`Place`].
    pairs: Vec<[f32; 3]>,
}

impl Products {
    fn new(clusters: usize) -> Self {
        Self {
            requests: Vec::new(),
            ends: Vec::new(),
            memo: vec![(0, 0); clusters],
            rows: 0,
            squares: Vec::new(),
            alignments: Vec::new(),
            pairs: Vec::new(),
        }
    }

    fn compute(&mut self, points: &Points<2>, tile: &Tile, gathered: &[f32], target: Option<&Target>) {
        let dim = points.dim();
        let slots = gathered.len() / dim;
        let row = |slot: usize| &gathered[slot * dim..(slot + 1) * dim];
        self.request(points, tile, slots, target.map(|target| target.labels));
        self.squares.resize(slots, 0.0);
        self.alignments.resize(slots, 0.0);
        self.pairs.resize(tile.points.len(), [0.0; 3]);
        let (mut others, mut products, mut sources) = (Vec::new(), Vec::new(), Vec::new());
        for slot in 0..slots {
            let requests = &self.requests[if slot == 0 { 0 } else { self.ends[slot - 1] }..self.ends[slot]];
            self.rows += 1;
            others.clear();
            others.push(row(slot));
            others.extend(target.map(|target| target.direction));
            sources.clear();
            for request in requests {
                let mut source = others.len() as u32;
                match target {
                    Some(target) if request.place != Place::Partner => {
                        let known = &mut self.memo[request.with as usize];
                        if known.0 == self.rows {
                            source = known.1;
                        } else {
                            *known = (self.rows, source);
                            others.push(target.centroids.row(request.with as usize));
                        }
                    }
                    _ => others.push(row(request.with as usize)),
                }
                sources.push(source);
            }
            multiply(row(slot), &others, &mut products);
            self.squares[slot] = products[0];
            if target.is_some() {
                self.alignments[slot] = products[1];
            }
            for (request, &source) in requests.iter().zip(&sources) {
                self.pairs[request.index as usize][request.place as usize] = products[source as usize];
            }
        }
    }

    /// Sorts what the pairs need by the row that it is computed with.
    fn request(&mut self, points: &Points<2>, tile: &Tile, slots: usize, labels: Option<&[i32]>) {
        self.ends.clear();
        self.ends.resize(slots + 1, 0);
        let each = if labels.is_some() { [2, 1] } else { [1, 0] };
        for pair in tile.points.clone() {
            let [chosen, rejected] = points.slots(pair);
            self.ends[chosen + 1] += each[0];
            self.ends[rejected + 1] += each[1];
        }
        for slot in 0..slots {
            self.ends[slot + 1] += self.ends[slot];
        }
        self.requests.resize(self.ends[slots], Request::default());
        let mut put = |slot: usize, request: Request| {
            self.requests[self.ends[slot]] = request;
            self.ends[slot] += 1;
        };
        for (index, pair) in tile.points.clone().enumerate() {
            let [chosen, rejected] = points.slots(pair);
            let index = index as u32;
            put(chosen, Request { with: rejected as u32, index, place: Place::Partner });
            if let Some(labels) = labels {
                let with = labels[pair] as u32;
                put(chosen, Request { with, index, place: Place::ChosenCentroid });
                put(rejected, Request { with, index, place: Place::RejectedCentroid });
            }
        }
    }

    /// ‖z‖² of the pair that is `index`-th in the tile.
    fn expand(&self, points: &Points<2>, pair: usize, index: usize) -> Expanded {
        let [chosen, rejected] = points.slots(pair).map(|slot| self.squares[slot]);
        let [a, b] = points.coefficients(pair).map(f64::from);
        let terms = a * a * f64::from(chosen) + b * b * f64::from(rejected);
        let square = terms + 2.0 * a * b * f64::from(self.pairs[index][Place::Partner as usize]);
        let regular = TRUSTED_SQUARES.contains(&chosen) && TRUSTED_SQUARES.contains(&rejected);
        Expanded { square, terms, regular }
    }

    /// ⟨z, c⟩, ‖z − c‖ and ⟨z, u⟩ of a pair whose centroid has the given ‖c‖²; none if rounding may have spoiled them.
    fn score(&self, points: &Points<2>, pair: usize, index: usize, centroid_square: f32) -> Option<[f64; 3]> {
        let length = self.expand(points, pair, index);
        let [a, b] = points.coefficients(pair).map(f64::from);
        let combine = |[chosen, rejected]: [f32; 2]| a * f64::from(chosen) + b * f64::from(rejected);
        let [_, chosen, rejected] = self.pairs[index];
        let product = combine([chosen, rejected]);
        let centroid_square_term = f64::from(centroid_square);
        let distance = Expanded {
            square: length.square - 2.0 * product + centroid_square_term,
            terms: length.terms + centroid_square_term,
            regular: length.regular && TRUSTED_SQUARES.contains(&centroid_square),
        };
        let trusted = length.trusted() && distance.trusted();
        let alignment = combine(points.slots(pair).map(|slot| self.alignments[slot]));
        trusted.then(|| [product, distance.square.sqrt(), alignment])
    }
}

/// A square as the sum of its terms.
struct Expanded {
    square: f64,
    /// The sum of the terms that are squares themselves.
    terms: f64,
    /// Whether float32 holds the terms with all their digits.
    regular: bool,
}

impl Expanded {
    fn trusted(&self) -> bool {
        self.regular && self.square >= TRUSTED_SHARE * self.terms
    }
}

/// The inner products of a row with others.
fn multiply(row: &[f32], others: &[&[f32]], products: &mut Vec<f32>) {
    products.clear();
    let (batches, rest) = others.as_chunks::<BATCH>();
    for batch in batches {
        products.extend(dots(row, *batch));
    }
    match *rest {
        [first, second, third] => products.extend(dots(row, [first, second, third])),
        [first, second] => products.extend(dots(row, [first, second])),
        [first] => products.extend(dots(row, [first])),
        _ => {}
    }
}

fn check(points: &Points<2>, centroids: &[f32], labels: &[i32], direction: Option<&[f32]>) -> Result<()> {
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
    if let Some(index) = labels.iter().position(|&label| !known(label)) {
        let label = i64::from(labels[index]);
        return Err(Error::ClusterOutOfRange { array: "labels", index, label, clusters });
    }
    if let Some(index) = centroids.iter().position(|value| !value.is_finite()) {
        return Err(Error::NonFiniteRow { array: "centroids", row: index / dim });
    }
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
    let start = || (vec![0.0; dim], Vec::new());
    let blocks = points.fold_blocks(BLOCKS, progress, start, |(sum, factors), tile, gathered| {
        factors.clear();
        factors.resize(gathered.len() / dim, 0.0);
        for pair in tile.points.clone() {
            for (slot, coefficient) in points.slots(pair).into_iter().zip(points.coefficients(pair)) {
                factors[slot] += f64::from(coefficient);
            }
        }
        for (factor, row) in factors.iter().zip(gathered.chunks_exact(dim)) {
            simd::add_scaled_to_float64(sum, *factor, row);
        }
    })?;
    Ok((0..dim).map(|index| blocks.iter().map(|(sum, _)| sum[index]).sum()).collect())
}

fn normalized(values: Vec<f64>) -> Vec<f32> {
    let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let scale = if norm > 0.0 { norm.recip() } else { 0.0 };
    values.into_iter().map(|value| (value * scale) as f32).collect()
}

/// The order in which the pairs of a cluster are kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Ranking {
    /// The highest score first.
    Nearest,
    /// The lowest score first.
    Farthest,
    /// Drawn without replacement in proportion to exp(score / temperature).
    Softmax { temperature: f64 },
    /// Whatever the score.
    Random,
}

/// A key for each score; the pair with the larger key is kept first.
///
/// Sorting by score / temperature plus Gumbel noise draws without replacement from the softmax: Kool, van Hoof and
/// Welling, "Stochastic beams and where to find them" (ICML 2019). The noise of a pair depends on the seed and the
/// pair's index alone.
///
/// O(P) time for P pairs.
///
/// # Errors
/// If a score is not finite, the temperature is not positive, or the computation was cancelled.
pub fn ranking_keys(scores: &[f64], ranking: Ranking, seed: u64, progress: &Progress) -> Result<Vec<f64>> {
    if let Some(index) = scores.par_iter().position_first(|score| !score.is_finite()) {
        return Err(Error::NotFinite { array: "scores", index, value: scores[index] });
    }
    match ranking {
        Ranking::Nearest => map_scores(scores, progress, |_, score| score),
        Ranking::Farthest => map_scores(scores, progress, |_, score| -score),
        Ranking::Random => {
            let stream = Stream::new(seed, Purpose::Shuffle, 0);
            map_scores(scores, progress, |pair, _| stream.uniform(pair as u64))
        }
        Ranking::Softmax { temperature } => {
            if !(temperature > 0.0 && temperature.is_finite()) {
                return Err(Error::argument("temperature", "finite and above 0", temperature));
            }
            let stream = Stream::new(seed, Purpose::Gumbel, 0);
            // The middle of the cell of 2^-53 that was drawn keeps both logarithms finite.
            let gumbel = |pair: usize| -(-(stream.uniform(pair as u64) + f64::EPSILON / 4.0).ln()).ln();
            map_scores(scores, progress, |pair, score| score / temperature + gumbel(pair))
        }
    }
}

/// A key for each pair and its score.
fn map_scores(scores: &[f64], progress: &Progress, key: impl Fn(usize, f64) -> f64 + Sync) -> Result<Vec<f64>> {
    let mut keys = vec![0.0; scores.len()];
    let chunks = keys.par_chunks_mut(RANKED_AT_ONCE).zip(scores.par_chunks(RANKED_AT_ONCE)).enumerate();
    progress.start(scores.len().div_ceil(RANKED_AT_ONCE));
    chunks.try_for_each(|(chunk, (keys, scores))| {
        for (index, (out, &score)) in keys.iter_mut().zip(scores).enumerate() {
            *out = key(chunk * RANKED_AT_ONCE + index, score);
        }
        progress.advance(1)
    })?;
    Ok(keys)
}
