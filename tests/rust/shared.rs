//! Processes that share the points, here threads each with a copy of the rows in which those of others are NaN, find to the bit
//! what one finds.

use std::sync::{Barrier, Mutex};

use bpo::Result;
use bpo::exchange::{Exchange, Processes};
use bpo::kmeans::{Clustering, Metric, Params, fit};
use bpo::matching::{Sharing, matching};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::prompts::Limits;
use bpo::rng::{Purpose, Stream};
use bpo::usefulness::{pair_norms, score_pairs};

/// What the threads have in common.
#[derive(Debug)]
struct Hub {
    meeting: Barrier,
    said: Mutex<Vec<Vec<u8>>>,
}

#[derive(Debug)]
struct Member<'h> {
    hub: &'h Hub,
    rank: usize,
    size: usize,
}

impl Member<'_> {
    fn everything(&self) -> Vec<Vec<u8>> {
        self.hub.meeting.wait();
        let said = self.hub.said.lock().unwrap().clone();
        self.hub.meeting.wait();
        said
    }

    fn say(&self, bytes: &[u8]) {
        self.hub.said.lock().unwrap()[self.rank] = bytes.to_vec();
    }
}

impl Exchange for Member<'_> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.say(own);
        Ok(self.everything())
    }

    fn receive(&self, state: &[u8]) -> Result<Vec<u8>> {
        let mut before = state.to_vec();
        for rank in 0..self.rank {
            before = self.everything().swap_remove(rank);
        }
        Ok(before)
    }

    fn hand_on(&self, state: Option<&[u8]>) -> Result<Vec<u8>> {
        let mut after = state.unwrap().to_vec();
        self.say(&after);
        for rank in self.rank..self.size {
            after = self.everything().swap_remove(rank);
        }
        Ok(after)
    }
}

/// What `work` finds in each of so many processes.
fn in_each<T: Send>(size: usize, work: impl Fn(Processes) -> T + Sync) -> Vec<T> {
    let hub = Hub { meeting: Barrier::new(size), said: Mutex::new(vec![Vec::new(); size]) };
    let (hub, work) = (&hub, &work);
    std::thread::scope(|scope| {
        let start = |rank| scope.spawn(move || work(Processes::new(&Member { hub, rank, size })));
        let members: Vec<_> = (0..size).map(start).collect();
        members.into_iter().map(|member| member.join().unwrap()).collect()
    })
}

const DIM: usize = 48;

/// Rows of prompts with four responses each, and all pairs of them.
struct Data {
    rows: Vec<f32>,
    pairs: Vec<[i64; 2]>,
    coefficients: Vec<[f32; 2]>,
}

impl Data {
    /// With so many `levels` of a number, and as many numbers that are not zero: few of each make many points the same.
    fn new(prompts: usize, levels: usize, numbers: usize, seed: u64) -> Self {
        let stream = Stream::new(seed, Purpose::Shuffle, 0);
        let value = |index: usize| {
            let uniform = stream.uniform(index as u64);
            if index % DIM < numbers {
                (uniform * levels as f64).floor() as f32 + 0.5 - levels as f32 / 2.0
            } else {
                0.0
            }
        };
        let rows = (0..prompts * 4 * DIM).map(value).collect();
        let of_prompt = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]];
        let pairs: Vec<_> = (0..prompts as i64)
            .flat_map(|prompt| of_prompt.map(|[chosen, rejected]| [4 * prompt + chosen, 4 * prompt + rejected]))
            .collect();
        let coefficient = |pair: usize| [-1.0, 1.0].map(|sign: f32| sign / (1.0 + (pair % 5) as f32));
        let coefficients = (0..pairs.len()).map(coefficient).collect();
        Self { rows, pairs, coefficients }
    }

    fn points<'a>(&self, rows: &'a [f32]) -> Points<'a, 2> {
        let rows = Rows::new(Values::F32(rows), rows.len() / DIM, DIM).unwrap();
        Points::from_pairs(rows, &self.pairs, &self.coefficients, &Progress::default()).unwrap()
    }

    /// Without pairs of two rows that are the same.
    fn with_directions(mut self) -> Self {
        let row = |row: i64| &self.rows[row as usize * DIM..][..DIM];
        let kept: Vec<bool> = self.pairs.iter().map(|pair| row(pair[0]) != row(pair[1])).collect();
        let mut keep = kept.iter();
        self.pairs.retain(|_| *keep.next().unwrap());
        let mut keep = kept.iter();
        self.coefficients.retain(|_| *keep.next().unwrap());
        self
    }

    /// The rows of a process, and NaN for others.
    fn own(&self, processes: Processes) -> Vec<f32> {
        let points = self.points(&self.rows).shared(processes);
        let mut rows = vec![f32::NAN; self.rows.len()];
        for tile in &points.tiles()[points.own().tiles.clone()] {
            for &row in points.rows_of(tile) {
                rows[row * DIM..][..DIM].copy_from_slice(&self.rows[row * DIM..][..DIM]);
            }
        }
        rows
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn doubles(values: &[f64]) -> Vec<u64> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// All that there is to tell of a clustering.
fn told(found: &Clustering) -> String {
    let numbers = (bits(&found.centroids), bits(&found.distances), doubles(&found.inertia));
    format!("{:?}", (&found.labels, numbers, found.iterations, found.converged))
}

/// The stages of a selection.
fn stages(data: &Data, processes: Processes, metric: Metric, clusters: usize) -> String {
    let progress = Progress::default();
    let rows = data.own(processes);
    let points = || data.points(&rows).shared(processes);
    let norms = pair_norms(&points(), &progress).unwrap();
    let params = Params { metric, max_iterations: 6, ..Params::new(clusters) };
    let found = fit(points(), &params, &progress).unwrap();
    let scores = score_pairs(&points(), &found.centroids, &found.labels, None, &progress).unwrap();
    let target: Vec<f32> = (0..DIM).map(|index| 1.0 - index as f32 / 40.0).collect();
    let prompts: Vec<i64> = data.pairs.iter().map(|pair| pair[0] / 4).collect();
    let limits = Limits { eligible: None, depth: Some((&prompts, 2)) };
    let sharing = Sharing { every_prompt: true, clusters: Some((&found.labels, None)) };
    let [picked, spread] = [(8, Sharing::default()), (prompts.len() / 2, sharing)]
        .map(|(budget, sharing)| matching(&points(), &target, budget, limits, sharing, 1 << 20, &progress).unwrap());
    let scores = [scores.centrality, scores.distance, scores.alignment, scores.direction].map(|scores| bits(&scores));
    format!(
        "{:?}",
        (
            bits(&norms),
            told(&found),
            scores,
            picked.picks,
            doubles(&picked.cosines),
            spread.picks,
            doubles(&spread.cosines)
        )
    )
}

fn assert_same(data: &Data, metric: Metric, clusters: usize) {
    let alone = stages(data, Processes::default(), metric, clusters);
    for size in 2..=4 {
        for (rank, found) in in_each(size, |processes| stages(data, processes, metric, clusters)).iter().enumerate() {
            assert!(*found == alone, "process {rank} of {size}, {metric:?}, {clusters} clusters");
        }
    }
}

/// Seeded from a sample, from draws among all points, and from all.
#[test]
fn selections_are_those_of_one_process() {
    let data = Data::new(250, 1000, DIM, 1);
    for metric in [Metric::Euclidean, Metric::Cosine] {
        for clusters in [5, 20, 200] {
            assert_same(&data, metric, clusters);
        }
    }
}

/// More clusters than points that differ, so that some are empty again and again.
#[test]
fn ties_and_empty_clusters_are_those_of_one_process() {
    let data = Data::new(150, 2, 3, 2).with_directions();
    assert_same(&data, Metric::Euclidean, 150);
    assert_same(&data, Metric::Cosine, 60);
    assert_same(&Data::new(150, 3, DIM, 3), Metric::Euclidean, 20);
}

/// So few tiles that some processes have nothing; and points whose squares float32 cannot hold.
#[test]
fn few_and_long_points_are_those_of_one_process() {
    let mut data = Data::new(70, 1000, DIM, 4);
    assert_same(&data, Metric::Euclidean, 7);
    data.coefficients.iter_mut().flatten().for_each(|coefficient| *coefficient *= 1e20);
    assert_same(&data, Metric::Euclidean, 7);
    assert_same(&data, Metric::Cosine, 7);
}

/// Rows far from the origin, whose weights differ.
#[test]
fn weighted_rows_are_those_of_one_process() {
    let progress = Progress::default();
    let mut data = Data::new(200, 4, 6, 5);
    data.rows.iter_mut().for_each(|value| *value += 30.0);
    let count = data.rows.len() / DIM;
    let weights: Vec<f32> = (0..count).map(|row| (row % 4) as f32).collect();
    let cluster = |processes: Processes| {
        let points = |rows| Points::from_rows(Rows::new(Values::F32(rows), count, DIM).unwrap(), &progress).unwrap();
        let mut rows = data.rows.clone();
        let own = points(&data.rows).shared(processes).own().points.clone();
        (0..count).filter(|row| !own.contains(row)).for_each(|row| rows[row * DIM..][..DIM].fill(f32::NAN));
        let mut points = points(&rows);
        points.set_weights(&weights, &progress).unwrap();
        told(&fit(points.shared(processes), &Params::new(40), &progress).unwrap())
    };
    let alone = cluster(Processes::default());
    for size in 2..=4 {
        in_each(size, cluster).iter().for_each(|found| assert!(*found == alone, "{size} processes"));
    }
}

/// Sums of which the last term takes away the first, so that float32 shows in which order the others were added.
#[test]
fn sums_that_cancel_are_those_of_one_process() {
    let mut data = Data::new(250, 1000, DIM, 6);
    let last = data.rows.len() - 4 * DIM;
    data.rows.copy_within(..4 * DIM, last);
    let pair = data.pairs.len() - 6;
    (data.coefficients[0], data.coefficients[pair]) = ([-1e12, 1e12], [1e12, -1e12]);
    let progress = Progress::default();
    let find = |processes: Processes| {
        let rows = data.own(processes);
        let points = || data.points(&rows).shared(processes);
        let found = fit(points(), &Params { max_iterations: 2, ..Params::new(1) }, &progress).unwrap();
        let scores = score_pairs(&points(), &found.centroids, &found.labels, None, &progress).unwrap();
        (told(&found), bits(&scores.direction))
    };
    let alone = find(Processes::default());
    for size in 2..=4 {
        in_each(size, find).iter().for_each(|found| assert!(*found == alone, "{size} processes"));
    }
}
