//! The driver: look at the points, seed, alternate assignment and update, assign once more.

use std::ops::Range;

use rayon::prelude::*;

use super::approximate::Approximation;
use super::assign::{Nearest, Scratch, Search};
use super::centroids::Centroids;
use super::init::seed;
use super::measure::Measure;
use super::params::{CACHE_BYTES, Init, Metric, Params};
use super::prepare::{is_safe, normalize_rows, prepare};
use super::update::{Changes, Move, Sums, UNASSIGNED};
use crate::error::{Error, Result};
use crate::matrix::{Rows, check_finite};
use crate::memory::{CENTROIDS, POINTS, RESULTS, build, copied, each, first};
use crate::points::{Points, Tile};
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd;

/// Tiles between two updates of the sums: 32,256 rows, enough for 64 threads, and 32 MiB of 256 float32 each, which the
/// update still finds in the last-level cache.
const CHUNK: usize = 128;

/// Centroids up to which rows that meet them once are not rounded to 8 bits: on a Zen 3 that took 0.30 microseconds for a row
/// of 512 and saved 0.18 of 0.69 with 64.
const SINGLE_CLUSTERS: usize = 64;

/// What k-means found.
#[derive(Clone, Debug)]
pub struct Clustering {
    /// Row-major (clusters, dim).
    pub centroids: Vec<f32>,
    /// The cluster of each point.
    pub labels: Vec<i32>,
    /// The Euclidean distance of each point to its centroid; with [`Metric::Cosine`], 1 − cosine.
    pub distances: Vec<f32>,
    /// Entry i is the inertia with the centroids after i updates: the sum of the squared distances, or with
    /// [`Metric::Cosine`] of 1 − cosine, each times the weight of its point. With mini-batches, all but the last belong
    /// to the rows of the batch.
    pub inertia: Vec<f64>,
    /// How often the centroids were updated.
    pub iterations: usize,
    /// Whether the labels or the centroids settled before `max_iterations`.
    pub converged: bool,
}

/// Clusters the points.
///
/// # Errors
/// If the parameters do not fit the points, a row is not finite, a point has no direction ([`Metric::Cosine`]), or the
/// computation was cancelled.
pub fn fit<const TERMS: usize>(mut points: Points<TERMS>, params: &Params, progress: &Progress) -> Result<Clustering> {
    params.check(points.count(), points.dim())?;
    let dim = points.dim();
    let tiles = points.tiles().len();
    progress
        .start(points.own().tiles.len().saturating_mul(params.max_iterations.saturating_add(2 + super::init::PASSES)));

    let given = match &params.init {
        Init::PlusPlus => [].as_slice(),
        Init::Centroids(given) => given,
    };
    let approximation = prepare(&mut points, given, params.metric, params.cache_bytes, progress)?;
    let mut first = match &params.init {
        Init::PlusPlus => seed(&points, &approximation, params, progress)?,
        Init::Centroids(given) => copied(given, CENTROIDS)?,
    };
    if params.metric == Metric::Cosine {
        normalize_rows("init", &mut first, dim)?;
    }
    let sums = Sums::new(params.clusters, dim)?;
    let mut state = State::new(points, approximation, first, sums, progress)?;

    let mut inertia = Vec::new();
    let mut converged = false;
    let mut labels_settled = false;
    let mut threshold = None;
    let mut active = params.batch_size.map_or(tiles, |batch| batch.div_ceil(tiles_size(&state.points)).clamp(1, tiles));
    while !converged && inertia.len() < params.max_iterations {
        let changed = state.assign(0..active, progress)?;
        inertia.push(state.sums.inertia(state.centroids.vectors(), &state.approximation));
        labels_settled = changed == 0 && active == tiles;
        let refilled = state.refill_empty(0..active, progress)?;
        let shifts = state.update(params.metric)?;
        if active == tiles {
            // The same in every pass over all points.
            let threshold =
                *threshold.get_or_insert_with(|| params.tolerance * state.sums.mean_variance(&state.approximation));
            converged = labels_settled || shifts.iter().sum::<f64>() <= threshold;
        } else if batch_is_exhausted(&shifts, &state.sums.standard_errors(&state.approximation)) {
            active = (2 * active).min(tiles);
        }
        labels_settled &= refilled == 0;
    }
    let squared_distances =
        if labels_settled { state.squared_distances(0..tiles, progress)? } else { state.measure(progress)? };
    progress.finish();
    state.finish(params.metric, squared_distances, inertia, converged, progress)
}

/// Clusters rows, each with the weight given for it. Mini-batches take the rows in random order.
///
/// # Errors
/// As [`fit`], and if the weights do not fit the rows.
pub fn fit_rows(rows: Rows, weights: Option<&[f32]>, params: &Params, progress: &Progress) -> Result<Clustering> {
    let mut points = match params.batch_size {
        Some(_) => Points::from_order(rows, shuffled(rows.count(), params.seed, progress)?, progress)?,
        None => Points::from_rows(rows, progress)?,
    };
    if let Some(weights) = weights {
        points.set_weights(weights, progress)?;
    }
    let mut found = fit(points, params, progress)?;
    if params.batch_size.is_some() {
        let order = shuffled(rows.count(), params.seed, progress)?;
        let mut labels = build(order.len(), RESULTS, progress, |_| 0)?;
        let mut distances = build(order.len(), RESULTS, progress, |_| 0.0)?;
        each(order.len(), progress, |point| {
            labels[order[point]] = found.labels[point];
            distances[order[point]] = found.distances[point];
        })?;
        (found.labels, found.distances) = (labels, distances);
    }
    Ok(found)
}

fn shuffled(count: usize, seed: u64, progress: &Progress) -> Result<Vec<usize>> {
    let stream = Stream::new(seed, Purpose::Batches, 0);
    let mut order = build(count, POINTS, progress, |row| row)?;
    // The last one first.
    each(count.saturating_sub(1), progress, |turn| {
        let index = count - 1 - turn;
        order.swap(index, stream.below(index as u64, index + 1));
    })?;
    Ok(order)
}

/// The cluster of each point among given centroids, and its distance as in [`Clustering::distances`].
///
/// # Errors
/// As [`fit`].
pub fn assign<const TERMS: usize>(
    mut points: Points<TERMS>,
    centroids: &[f32],
    metric: Metric,
    progress: &Progress,
) -> Result<(Vec<i32>, Vec<f32>)> {
    let dim = points.dim();
    if dim == 0 || centroids.is_empty() || !centroids.len().is_multiple_of(dim) {
        let (expected, found) = (format!("(k, {dim}) with k and d of at least 1"), format!("({},)", centroids.len()));
        return Err(Error::shape("centroids", expected, found));
    }
    check_finite("centroids", centroids, dim)?;
    let mut passes = 2;
    if metric == Metric::Euclidean && TERMS == 1 && centroids.len() / dim <= SINGLE_CLUSTERS {
        if let Some(found) = assign_unseen(&points, centroids, progress)? {
            return Ok(found);
        }
        passes = 3;
    }
    progress.start(passes * points.tiles().len());
    let approximation = prepare(&mut points, centroids, metric, CACHE_BYTES, progress)?;
    let mut centroids = copied(centroids, CENTROIDS)?;
    if metric == Metric::Cosine {
        normalize_rows("centroids", &mut centroids, dim)?;
    }
    let mut state = State::new(points, approximation, centroids, Sums::new(0, dim)?, progress)?;
    let squared_distances = state.measure(progress)?;
    progress.finish();
    let clustering = state.finish(metric, squared_distances, Vec::new(), true, progress)?;
    Ok((clustering.labels, clustering.distances))
}

/// [`assign`] where nothing needs to be known of the points before they meet the centroids, so that they are read once;
/// none where the squares of some may leave the range of float32.
fn assign_unseen<const TERMS: usize>(
    points: &Points<TERMS>,
    centroids: &[f32],
    progress: &Progress,
) -> Result<Option<(Vec<i32>, Vec<f32>)>> {
    let dim = points.dim();
    let tiles = points.tiles().len();
    progress.start(tiles);
    let approximation = Approximation::unseen(points, progress)?;
    let origin = approximation.origin_or_zero(dim);
    let longest =
        centroids.chunks_exact(dim).map(|own| simd::squared_distance_float64(own, &origin)).fold(0.0, f64::max);
    let centroids = Centroids::new(copied(centroids, CENTROIDS)?, dim, points.scale(), &approximation)?;
    let search = Search { points, approximation: &approximation, centroids: &centroids };
    centroids.room(points)?;
    let mut labels = build(points.count(), RESULTS, progress, |_| UNASSIGNED.cast_signed())?;
    let mut distances = build(points.count(), RESULTS, progress, |_| 0.0f32)?;
    let results = (&mut labels[..], &mut distances[..]);
    let squares = points.visit(0..tiles, results, Scratch::default, |scratch, index, tile, (labels, distances)| {
        let largest = search.tile_unseen(scratch, index, tile, |point, nearest| {
            if let Nearest::Measured(label, distance) = nearest {
                let place = point - tile.points.start;
                (labels[place], distances[place]) = (label.cast_signed(), distance.sqrt() as f32);
            }
        })?;
        progress.advance(1)?;
        Ok(largest)
    })?;
    // Points that are not finite are found and named there, too.
    if squares.iter().any(|square| !square.is_finite()) || !is_safe(squares.into_iter().fold(longest, f64::max).sqrt())
    {
        return Ok(None);
    }
    if let Some(point) = first(labels.len(), progress, |point| labels[point] == UNASSIGNED.cast_signed())? {
        return Err(points.changed(point));
    }
    progress.finish();
    Ok(Some((labels, distances)))
}

/// Checks that every point of a tile got a label, which one that is not finite does not.
fn assigned<const TERMS: usize>(points: &Points<TERMS>, tile: &Tile, labels: &[u32]) -> Result<()> {
    match labels.iter().position(|&label| label == UNASSIGNED) {
        Some(index) => Err(points.changed(tile.points.start + index)),
        None => Ok(()),
    }
}

fn tiles_size<const TERMS: usize>(points: &Points<TERMS>) -> usize {
    points.count().div_ceil(points.tiles().len())
}

/// Whether a batch has little more to tell: the centroids moved by less than their standard error, in the median over
/// the clusters. The rule of Newling and Fleuret, "Nested mini-batch k-means" (NIPS 2016).
fn batch_is_exhausted(shifts: &[f64], standard_errors: &[f64]) -> bool {
    let mut ratios: Vec<f64> = shifts
        .iter()
        .zip(standard_errors)
        .map(|(shift, error)| if *shift > 0.0 { error / shift } else { f64::INFINITY })
        .collect();
    let middle = ratios.len() / 2;
    *ratios.select_nth_unstable_by(middle, f64::total_cmp).1 >= 1.0
}

struct State<'a, const TERMS: usize> {
    points: Points<'a, TERMS>,
    approximation: Approximation,
    centroids: Centroids,
    labels: Vec<u32>,
    sums: Sums,
}

impl<'a, const TERMS: usize> State<'a, TERMS> {
    /// With the first `centroids`, as they were before the points were scaled.
    fn new(
        points: Points<'a, TERMS>,
        approximation: Approximation,
        centroids: Vec<f32>,
        sums: Sums,
        progress: &Progress,
    ) -> Result<Self> {
        let centroids = Centroids::new(centroids, points.dim(), points.scale(), &approximation)?;
        let labels = build(points.count(), POINTS, progress, |_| UNASSIGNED)?;
        Ok(Self { labels, sums, centroids, points, approximation })
    }

    /// Those of some tiles that are this process's.
    fn own(&self, tiles: &Range<usize>) -> Range<usize> {
        let own = &self.points.own().tiles;
        own.start.min(tiles.end)..own.end.min(tiles.end)
    }

    /// Assigns the points of the first tiles and brings the sums up to date; returns how many labels changed.
    ///
    /// The first process adds up the rows of a chunk while they are in the cache. Others find out first what is to be added,
    /// at the same time, and then wait for their turn to do it.
    fn assign(&mut self, tiles: Range<usize>, progress: &Progress) -> Result<usize> {
        let mut changed = 0;
        let tiles = self.own(&tiles);
        let Self { points, approximation, centroids, labels, sums } = self;
        let search = Search { points, approximation, centroids };
        centroids.room(points)?;
        let mut first = tiles.start;
        let mut waiting = Vec::new();
        while first < tiles.end {
            // Cuts change no sum: each adds up its rows in their order.
            let chunk = first..tiles.end.min(first + points.window(first, CHUNK));
            let next = chunk.end;
            let forget = chunk.clone();
            let labels = &mut labels[points.tiles()[first].points.start..];
            let changes = points.visit(chunk, labels, Scratch::default, |scratch, index, tile, labels| {
                let mut moves = Vec::new();
                search.tile(
                    scratch,
                    index,
                    tile,
                    |_| f64::INFINITY,
                    |point, nearest| {
                        let label = &mut labels[point - tile.points.start];
                        if let Nearest::Only(to) | Nearest::Measured(to, _) = nearest
                            && to != *label
                        {
                            moves.push(Move { point, from: *label, to });
                            *label = to;
                        }
                    },
                );
                assigned(points, tile, labels)?;
                progress.advance(1)?;
                Ok(Changes::new(points, tile, moves))
            })?;
            changed += changes.iter().map(Changes::count).sum::<usize>();
            if points.processes().rank() == 0 {
                sums.apply(points, approximation, &changes, progress)?;
                points.forget(forget);
            } else {
                waiting.push((forget, changes));
            }
            first = next;
        }
        points.processes().in_turn(sums, |sums| {
            waiting.into_iter().try_for_each(|(tiles, changes)| {
                sums.apply(points, approximation, &changes, progress)?;
                points.forget(tiles);
                Ok(())
            })
        })?;
        Ok(points.processes().gathered(&[changed as u64])?.concat().into_iter().sum::<u64>() as usize)
    }

    /// Assigns all points of this process without sums; returns their squared distances, NaN for others.
    fn measure(&mut self, progress: &Progress) -> Result<Vec<f64>> {
        let Self { points, approximation, centroids, labels, .. } = self;
        let search = Search { points, approximation, centroids };
        centroids.room(points)?;
        let mut squared_distances = build(points.count(), RESULTS, progress, |_| f64::NAN)?;
        let own = points.own();
        points.visit(
            own.tiles.clone(),
            (&mut squared_distances[own.points.clone()], &mut labels[own.points.clone()]),
            Scratch::default,
            |scratch, index, tile, (distances, labels)| {
                let start = tile.points.start;
                labels.fill(UNASSIGNED);
                // Below a limit every nearest centroid is measured.
                search.tile(
                    scratch,
                    index,
                    tile,
                    |_| f64::MAX,
                    |point, nearest| {
                        if let Nearest::Measured(label, distance) = nearest {
                            (labels[point - start], distances[point - start]) = (label, distance);
                        }
                    },
                );
                assigned(points, tile, labels)?;
                progress.advance(1)
            },
        )?;
        Ok(squared_distances)
    }

    /// Gives empty clusters a point; returns how many.
    fn refill_empty(&mut self, tiles: Range<usize>, progress: &Progress) -> Result<usize> {
        let empty = self.sums.empty();
        if empty.is_empty() {
            return Ok(0);
        }
        let mut squared_distances = self.squared_distances(tiles, progress)?;
        let Self { points, approximation, labels, sums, .. } = self;
        let processes = points.processes();
        processes.complete(&mut squared_distances, points.own().points.clone())?;
        processes.complete(labels, points.own().points.clone())?;
        let seen = &labels[..squared_distances.len()];
        let moves = sums.refill(points, &empty, seen, &squared_distances, progress)?;
        // Whose row is added says whose turn it is: as many moves at a time as are in the order of the processes.
        let ends = points.ends();
        let owner = |step: &Move| ends.partition_point(|&end| end <= step.point);
        for turn in moves.chunk_by(|one, next| owner(one) <= owner(next)) {
            processes.in_turn(sums, |sums| {
                turn.iter().filter(|step| points.own().points.contains(&step.point)).try_for_each(|&step| {
                    let change = Changes::new(points, points.tile_of(step.point), vec![step]);
                    sums.apply(points, approximation, &[change], progress)
                })
            })?;
        }
        moves.iter().for_each(|step| labels[step.point] = step.to);
        Ok(moves.len())
    }

    /// Moves the centroids; returns the squared length of each one's way.
    ///
    /// # Errors
    /// If rows are not finite any more, or the memory cannot be had.
    fn update(&mut self, metric: Metric) -> Result<Vec<f64>> {
        let Self { points, approximation, centroids, sums, .. } = self;
        let values = sums.centroids(metric, centroids.vectors(), points.scale())?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            let cluster = (index / points.dim()) as u32;
            let point = self.labels.iter().position(|&label| label == cluster).unwrap_or_default();
            return Err(points.changed(point));
        }
        let moved = Centroids::new(values, points.dim(), points.scale(), approximation)?;
        let measure = Measure::new(points.dim(), points.scale());
        let way = |cluster| measure.between(moved.vectors(), cluster, centroids.vectors(), cluster);
        let shifts = (0..moved.count()).into_par_iter().map(way).collect();
        self.centroids = moved;
        Ok(shifts)
    }

    /// Of each point to its centroid, from the differences; zeros for those of other processes.
    fn squared_distances(&self, tiles: Range<usize>, progress: &Progress) -> Result<Vec<f64>> {
        let Self { points, centroids, labels, .. } = self;
        let end = points.tiles()[tiles.clone()].last().map_or(0, |tile| tile.points.end);
        let mut distances = build(end, RESULTS, progress, |_| 0.0)?;
        let tiles = self.own(&tiles);
        let own = points.own().points.start.min(end)..points.own().points.end.min(end);
        let measure = Measure::new(points.dim(), points.scale());
        let start = || (vec![0.0; points.dim()], vec![0.0; points.dim()]);
        points.visit(tiles, &mut distances[own], start, |(row, values), _, tile, distances| {
            for (point, distance) in tile.points.clone().zip(distances) {
                let centroid = (centroids.vectors(), labels[point] as usize);
                *distance = measure.of_point(points, tile, point, centroid, (row, values));
                if !distance.is_finite() {
                    return Err(points.changed(point));
                }
            }
            progress.advance(1)
        })?;
        Ok(distances)
    }

    fn finish(
        self,
        metric: Metric,
        squared_distances: Vec<f64>,
        mut inertia: Vec<f64>,
        converged: bool,
        progress: &Progress,
    ) -> Result<Clustering> {
        let count = squared_distances.len();
        let iterations = inertia.len();
        let Self { points, mut labels, .. } = self;
        let (processes, own) = (points.processes(), points.own().points.clone());
        let mut sum = 0.0;
        processes.in_turn(&mut sum, |sum| {
            let cost = |point: usize| points.weight(point) * squared_distances[point];
            each(own.len(), progress, |place| *sum += cost(own.start + place))
        })?;
        inertia.push(sum);
        let mut distances = match metric {
            Metric::Euclidean => {
                // Exact, as the scale is a power of two, unless the result itself leaves the range of float32.
                let inverse = f64::from(points.scale()).recip();
                inertia.iter_mut().for_each(|inertia| *inertia *= inverse * inverse);
                build(count, RESULTS, progress, |point| (squared_distances[point].sqrt() * inverse) as f32)?
            }
            // ‖x − c‖² = 2 − 2⟨x, c⟩ for unit vectors.
            Metric::Cosine => {
                inertia.iter_mut().for_each(|inertia| *inertia /= 2.0);
                build(count, RESULTS, progress, |point| (squared_distances[point] / 2.0) as f32)?
            }
        };
        let centroids = self.centroids.into_vectors().into_unscaled();
        processes.complete(&mut distances, own.clone())?;
        processes.complete(&mut labels, own)?;
        let labels = build(count, RESULTS, progress, |point| labels[point].cast_signed())?;
        Ok(Clustering { centroids, labels, distances, inertia, iterations, converged })
    }
}
