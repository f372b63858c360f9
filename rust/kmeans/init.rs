//! The first centroids: k-means‖ of Bahmani, Moseley, Vattani, Kumar and Vassilvitskii, "Scalable k-means++" (VLDB 2012),
//! ended by greedy k-means++ of Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (SODA 2007),
//! with the several trials for each centroid that scikit-learn makes.
//!
//! Greedy k-means++ alone looks at all points once for each centroid. k-means‖ looks a few times, draws many points at
//! each look, and leaves the choice among them to the greedy algorithm, each with the weight of the points that are
//! nearest to it. Neither needs all of many points.

use std::ops::Range;

use rayon::prelude::*;

use super::approximate::Approximation;
use super::assign::{Nearest, Scratch, Search};
use super::centroids::Centroids;
use super::measure::{Measure, Vectors};
use super::params::Params;
use crate::error::Result;
use crate::exchange::Processes;
use crate::memory::{CENTROIDS, POINTS, build, chosen, each, filled, grow, reserved};
use crate::points::Points;
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};
use crate::simd::dots::each_squared_distance;

/// Looks at the points after the first draw, each of which draws about as many points as there are centroids to be. Half
/// as many left one of ten planted clusters without a drawn point (20,000 × 512, k = 256).
const ROUNDS: usize = 4;

/// Points for each centroid that are looked at, if none has more weight than others, in runs of neighbours: those of a
/// mapped file share their pages, and pairs of a prompt its rows.
const SAMPLED_RUNS: usize = 16;
const RUN: usize = 8;

/// Drawn points that are written at once: where they lie scattered over a mapped file, each may bring 2 MiB of it along.
const WRITTEN: usize = 32;

/// Looks at all points at most, for the progress.
pub const PASSES: usize = ROUNDS + 1;

/// Points for each centroid up to which greedy k-means++ sees all of them.
const GREEDY_POINTS: usize = 8;

/// Costs of a draw that one thread looks at.
const RACE_BLOCK: usize = 1 << 10;

/// Trials for each centroid after the first: 2 + ln k, as in scikit-learn.
fn trials(clusters: usize) -> usize {
    2 + (clusters as f64).ln() as usize
}

/// Picks the first centroids among the points; row-major, and as they are before [`Points::scale`].
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn seed<const TERMS: usize>(
    points: &Points<TERMS>,
    approximation: &Approximation,
    params: &Params,
    progress: &Progress,
) -> Result<Vec<f32>> {
    let Params { clusters, seed, cache_bytes, .. } = *params;
    let runs = SAMPLED_RUNS * clusters;
    let ends = points.ends();
    if points.count() > 2 * RUN * runs && !points.weighted() {
        // A run in each of as many equal parts, so that data in any order are seen evenly.
        let stream = Stream::new(seed, Purpose::SeedingSample, 0);
        let part = |run: usize| run * points.count() / runs;
        let first = |run: usize| part(run) + stream.below(run as u64, part(run + 1) - part(run) - RUN);
        let place = |index: usize| first(index / RUN) + index % RUN;
        let places = build(RUN * runs, POINTS, progress, place)?;
        let sample = points.subset(&places, progress)?;
        let ends: Vec<usize> = ends.iter().map(|&end| places.partition_point(|&point| point < end)).collect();
        let own = range(&ends, points.processes().rank());
        // Tiles of its own points alone, where there are others: no result depends on tiles but the order of sums.
        let mine = if own.len() < places.len() { Some(points.subset(&places[own], progress)?) } else { None };
        let mine = mine.as_ref().unwrap_or(&sample);
        let of_sample = Approximation::new(mine, approximation.origin.is_some(), cache_bytes, progress)?;
        let seen = Seen {
            points: mine,
            first: 0,
            approximation: &of_sample,
            all: &sample,
            processes: points.processes(),
            ends,
        };
        return seen.seed(clusters, seed, progress);
    }
    let seen = Seen {
        points,
        first: points.own().points.start,
        approximation,
        all: points,
        processes: points.processes(),
        ends,
    };
    seen.seed(clusters, seed, progress)
}

/// The points of a process, given those after the last one of each.
fn range(ends: &[usize], rank: usize) -> Range<usize> {
    rank.checked_sub(1).map_or(0, |before| ends[before])..ends[rank]
}

/// The points among which centroids are sought.
struct Seen<'s, 'a, const TERMS: usize> {
    /// Those that this process reads, of which its own begin with the first.
    points: &'s Points<'a, TERMS>,
    first: usize,
    approximation: &'s Approximation,
    /// Those of all processes, by which they are numbered.
    all: &'s Points<'a, TERMS>,
    processes: Processes<'a>,
    /// The points after the last one of each process.
    ends: Vec<usize>,
}

impl<const TERMS: usize> Seen<'_, '_, TERMS> {
    fn own(&self) -> Range<usize> {
        range(&self.ends, self.processes.rank())
    }

    fn count(&self) -> usize {
        self.all.count()
    }

    fn weight(&self, point: usize) -> f64 {
        self.all.weight(point)
    }

    fn weights(&self, progress: &Progress) -> Result<Vec<f64>> {
        build(self.count(), POINTS, progress, |point| self.weight(point))
    }

    fn seed(&self, clusters: usize, seed: u64, progress: &Progress) -> Result<Vec<f32>> {
        let (drawn, weights) = if self.count() <= GREEDY_POINTS * clusters {
            (build(self.count(), POINTS, progress, |point| point)?, self.weights(progress)?)
        } else {
            self.oversample(clusters, seed, progress)?
        };
        let (dim, scale) = (self.points.dim(), self.points.scale());
        let drawn = Vectors::new(self.write(&drawn, progress)?, dim, scale)?;
        let picks = greedy(&drawn, Measure::new(dim, scale), &weights, clusters, seed, progress)?;
        let mut values = reserved(clusters.saturating_mul(dim), CENTROIDS)?;
        picks.into_iter().for_each(|pick| values.extend_from_slice(drawn.unscaled_row(pick)));
        Ok(values)
    }

    /// More points than clusters, drawn in proportion to their squared distance to those drawn before, each with the weight
    /// of the points that are nearest to it.
    fn oversample(&self, clusters: usize, seed: u64, progress: &Progress) -> Result<(Vec<usize>, Vec<f64>)> {
        let mut closest = build(self.count(), POINTS, progress, |_| Closest { distance: f64::MAX, drawn: 0 })?;
        let mut drawn = vec![race(&self.weights(progress)?, &Stream::new(seed, Purpose::Seeding, 0), 0, progress)?];
        let mut first = 0;
        for round in 1.. {
            let potential = self.measure(&drawn, first, &mut closest, progress)?;
            // One cluster needs no choice, and points that all coincide with a drawn one leave none.
            if (round > ROUNDS && drawn.len() >= clusters) || clusters == 1 || potential <= 0.0 {
                break;
            }
            first = drawn.len();
            let stream = Stream::new(seed, Purpose::Oversampling, round as u32);
            let expected = clusters as f64;
            let cost = |point: usize| self.weight(point) * closest[point].distance;
            let is_drawn = |point: usize| stream.uniform(point as u64) < expected * (cost(point) / potential);
            let more = chosen(self.count(), POINTS, progress, |point| is_drawn(point).then_some(point))?;
            grow(&mut drawn, more.len(), POINTS)?;
            drawn.extend(more);
            if drawn.len() == first {
                // Nothing was drawn, which happens with few clusters: draw one point.
                drawn.push(race(&build(self.count(), POINTS, progress, cost)?, &stream, 1, progress)?);
            }
        }
        let mut weights = filled(drawn.len(), 0.0, POINTS)?;
        each(self.count(), progress, |point| weights[closest[point].drawn as usize] += self.weight(point))?;
        Ok((drawn, weights))
    }

    /// Compares every point with those drawn from `first` on; returns the potential.
    fn measure(&self, drawn: &[usize], first: usize, closest: &mut [Closest], progress: &Progress) -> Result<f64> {
        let Self { points, approximation, .. } = *self;
        let values = self.write(&drawn[first..], progress)?;
        let centroids = Centroids::new(values, points.dim(), points.scale(), approximation)?;
        let search = Search { points, approximation, centroids: &centroids };
        centroids.room(points)?;
        let seen = &mut closest[self.own()];
        points.visit(points.own().tiles.clone(), seen, Scratch::default, |scratch, index, tile, closest| {
            let start = tile.points.start;
            let limits: Vec<f64> = closest.iter().map(|closest| closest.distance).collect();
            search.tile(
                scratch,
                index,
                tile,
                |point| limits[point - start],
                |point, nearest| {
                    if let Nearest::Measured(cluster, distance) = nearest {
                        closest[point - start] = Closest { distance, drawn: first as u32 + cluster };
                    }
                },
            );
            progress.advance(1)
        })?;
        self.complete(closest)?;
        let cost = |point: usize| self.weight(point) * closest[point].distance;
        let costs: Vec<f64> = self.all.tiles().par_iter().map(|tile| tile.points.clone().map(cost).sum()).collect();
        Ok(costs.into_iter().sum())
    }

    /// Tells the others of the points of this process, and learns of theirs.
    fn complete(&self, closest: &mut [Closest]) -> Result<()> {
        if self.processes.size() == 1 {
            return Ok(());
        }
        let own = &closest[self.own()];
        let distances: Vec<f64> = own.iter().map(|closest| closest.distance).collect();
        let drawn: Vec<u32> = own.iter().map(|closest| closest.drawn).collect();
        let distances = self.processes.gathered(&distances)?.concat();
        let drawn = self.processes.gathered(&drawn)?.concat();
        let every = distances.into_iter().zip(drawn);
        closest.iter_mut().zip(every).for_each(|(closest, (distance, drawn))| *closest = Closest { distance, drawn });
        Ok(())
    }

    /// The drawn points before they are scaled, row-major; each process writes its own.
    fn write(&self, drawn: &[usize], progress: &Progress) -> Result<Vec<f32>> {
        let dim = self.points.dim();
        let own = self.own();
        let mine: Vec<usize> = drawn.iter().copied().filter(|point| own.contains(point)).collect();
        let mut values = filled(mine.len().saturating_mul(dim), 0.0, CENTROIDS)?;
        for (values, drawn) in values.chunks_mut(WRITTEN * dim).zip(mine.chunks(WRITTEN)) {
            progress.check()?;
            let place = |point: usize| point - own.start + self.first;
            values
                .par_chunks_exact_mut(dim)
                .zip(drawn)
                .for_each(|(out, &point)| self.points.write_alone(place(point), out));
            self.points.forget(self.points.own().tiles.clone());
        }
        if self.processes.size() == 1 {
            return Ok(values);
        }
        let parts = self.processes.gathered(&values)?;
        let mut parts: Vec<_> = parts.iter().map(|part| part.chunks_exact(dim)).collect();
        let mut values = reserved(drawn.len().saturating_mul(dim), CENTROIDS)?;
        for &point in drawn {
            let owner = self.ends.partition_point(|&end| end <= point);
            values.extend_from_slice(parts[owner].next().expect("a process wrote its own points"));
        }
        Ok(values)
    }
}

/// The nearest drawn point of each point, and the squared distance to it.
#[derive(Clone, Copy)]
struct Closest {
    distance: f64,
    drawn: u32,
}

/// Greedy k-means++ over vectors; returns the picks.
fn greedy(
    vectors: &Vectors,
    measure: Measure,
    weights: &[f64],
    clusters: usize,
    seed: u64,
    progress: &Progress,
) -> Result<Vec<usize>> {
    let trials = trials(clusters);
    let mut closest = filled(weights.len(), f64::INFINITY, POINTS)?;
    let mut picks = reserved(clusters, CENTROIDS)?;
    for cluster in 0..clusters {
        progress.check()?;
        let stream = Stream::new(seed, Purpose::Seeding, cluster as u32 + 1);
        let cost = |index: usize| if cluster == 0 { weights[index] } else { closest[index] * weights[index] };
        let costs: Vec<f64> = build(weights.len(), POINTS, progress, cost)?;
        let trials = 0..if cluster == 0 { 1 } else { trials } as u64;
        // Where every point coincides with a centroid, any will do.
        let drawn: Vec<usize> = if costs.iter().any(|&cost| cost > 0.0) {
            trials.map(|trial| race(&costs, &stream, trial, progress)).collect::<Result<_>>()?
        } else {
            trials.map(|trial| stream.below(trial, weights.len())).collect()
        };
        // min(closest so far, distance to the trial), trial after trial for each point.
        let mut distances = filled(weights.len() * drawn.len(), 0.0, POINTS)?;
        let of_points = distances.par_chunks_exact_mut(drawn.len()).with_min_len(64).enumerate();
        of_points.try_for_each(|(point, distances)| {
            each_squared_distance(
                vectors.row(point),
                drawn.len(),
                |trial| vectors.row(drawn[trial]),
                |trial, distance| {
                    let exact = if measure.vanishes(distance) {
                        measure.in_float64(vectors.unscaled_row(point), vectors.unscaled_row(drawn[trial]))
                    } else {
                        f64::from(distance)
                    };
                    distances[trial] = exact.min(closest[point]);
                },
            );
            progress.check()
        })?;
        let potential = |trial: usize| -> f64 {
            let of_trial = distances.iter().skip(trial).step_by(drawn.len());
            of_trial.zip(weights).map(|(distance, weight)| distance * weight).sum()
        };
        let potentials: Vec<f64> = (0..drawn.len()).map(potential).collect();
        let best =
            (1..drawn.len()).fold(0, |best, trial| if potentials[trial] < potentials[best] { trial } else { best });
        for (closest, distances) in closest.iter_mut().zip(distances.chunks_exact(drawn.len())) {
            *closest = distances[best];
        }
        picks.push(drawn[best]);
    }
    Ok(picks)
}

/// An index, drawn in proportion to `costs`: the first to arrive where each takes an exponential time at the rate of its
/// cost. A draw from the running sum would be as likely, but another one as soon as any cost before it changed; this one
/// changes only where two arrive at the same time to within the change. Measured on 3,324 pairs of real gradients and
/// the same rounded to float16 and to int8: of the pairs that a budget of a tenth selects, .92 and .61 were the same
/// before (means of 12 seeds), .99 and .77 are now.
///
/// # Errors
/// If the computation was cancelled.
fn race(costs: &[f64], stream: &Stream, trial: u64, progress: &Progress) -> Result<usize> {
    let place = trial * costs.len().div_ceil(2) as u64;
    let first = |(block, costs): (usize, &[f64])| {
        progress.check()?;
        let mut first = (f64::INFINITY, usize::MAX);
        for (couple, costs) in costs.chunks(2).enumerate() {
            let couple = block * RACE_BLOCK / 2 + couple;
            for (lane, (&cost, uniform)) in costs.iter().zip(stream.uniforms(place + couple as u64)).enumerate() {
                // −ln(1 − u) ≥ u, which spares most logarithms. A cost of zero never arrives.
                if cost > 0.0 && uniform < first.0 * cost {
                    let time = -(-uniform).ln_1p() / cost;
                    if time < first.0 {
                        first = (time, 2 * couple + lane);
                    }
                }
            }
        }
        Ok(first)
    };
    let earlier = |one: (f64, usize), other: (f64, usize)| Ok(if other < one { other } else { one });
    let blocks = costs.par_chunks(RACE_BLOCK).enumerate().map(first);
    Ok(blocks.try_reduce(|| (f64::INFINITY, usize::MAX), earlier)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matrix::{Rows, Values};
    use crate::simd;

    const DRAWS: u64 = 10_000;

    fn race(costs: &[f64], trial: u64) -> usize {
        super::race(costs, &Stream::new(7, Purpose::Seeding, 3), trial, &Progress::default()).unwrap()
    }

    #[test]
    fn draws_are_in_proportion_to_costs() {
        let costs: Vec<f64> = (0..250).map(|index| if index % 50 == 0 { f64::from(index) } else { 0.0 }).collect();
        let total: f64 = costs.iter().sum();
        let mut counts = vec![0.0; costs.len()];
        (0..DRAWS).for_each(|trial| counts[race(&costs, trial)] += 1.0);
        for (count, cost) in counts.into_iter().zip(&costs) {
            let share = cost / total;
            let deviation = (DRAWS as f64 * share * (1.0 - share)).sqrt();
            assert!((count - DRAWS as f64 * share).abs() <= 4.5 * deviation, "{count} draws at a share of {share}");
        }
    }

    /// Of two looks, each at the points drawn since the one before.
    #[test]
    fn closest_draws_are_the_closest() {
        let (count, dim) = (2000, 64);
        let stream = Stream::new(7, Purpose::Shuffle, 3);
        let values: Vec<f32> = (0..count * dim).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect();
        let progress = Progress::default();
        let points = Points::from_rows(Rows::new(Values::F32(&values), count, dim).unwrap(), &progress).unwrap();
        let approximation = Approximation::new(&points, false, 0, &progress).unwrap();
        let drawn: Vec<usize> = (0..40).map(|draw| 37 * draw).collect();
        let mut closest = vec![Closest { distance: f64::MAX, drawn: 0 }; count];
        let seen = Seen {
            points: &points,
            first: 0,
            approximation: &approximation,
            all: &points,
            processes: Processes::default(),
            ends: points.ends(),
        };
        for (known, first) in [(10, 0), (40, 10)] {
            let potential = seen.measure(&drawn[..known], first, &mut closest, &progress).unwrap();
            let sum: f64 = closest.iter().map(|closest| closest.distance).sum();
            assert!((potential - sum).abs() <= 1e-9 * sum);
        }
        let row = |point: usize| &values[point * dim..(point + 1) * dim];
        for (point, closest) in closest.iter().enumerate() {
            let distances = drawn.iter().map(|&drawn| f64::from(simd::squared_distance(row(point), row(drawn))));
            let (nearest, distance) = distances.enumerate().min_by(|left, right| left.1.total_cmp(&right.1)).unwrap();
            assert_eq!((closest.drawn as usize, closest.distance), (nearest, distance));
        }
    }

    #[test]
    fn rounding_hardly_changes_a_draw() {
        let costs: Vec<f64> = (0..1000).map(|index| 1.0 + f64::from(index % 17)).collect();
        let rounded: Vec<f64> =
            costs.iter().enumerate().map(|(index, cost)| cost * (1.0 + 1e-4 * (index as f64).sin())).collect();
        let changed = (0..DRAWS / 5).filter(|&trial| race(&costs, trial) != race(&rounded, trial));
        assert!(changed.count() <= 4); // of the running sum, a draw in twenty or so
    }
}
