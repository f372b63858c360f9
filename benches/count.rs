//! One run of one kernel on fixed data, for tools that count instructions: `make count`.
//!
//! Counts do not move with the load of the machine, so they show what a change of a few per cent did. They know nothing of
//! memory, and valgrind has no AVX-512, so they are those of the AVX2 kernels.

use bpo::coreset::{CACHE_BYTES, coreset};
use bpo::d_optimal::d_optimal;
use bpo::depth::{Candidates, allocate_depth};
use bpo::kmeans::{Init, Params, fit, fit_rows};
use bpo::matrix::{Rows, Values};
use bpo::points::Points;
use bpo::progress::Progress;
use bpo::prompts::Limits;
use bpo::rng::{Purpose, Stream};
use bpo::sketch::{Kind, Sketcher};
use bpo::usefulness::score_pairs;

/// The first does nothing: what it counts is the making of the data, to be taken off the others.
const KERNELS: [&str; 9] =
    ["none", "sparse", "rademacher", "kmeans", "pair_kmeans", "scores", "depth", "coreset", "d_optimal"];
const DIM: usize = 512;
const CLUSTERS: usize = 64;
const RESPONSES: usize = 8;
const PROMPTS: usize = 250;

fn main() {
    // `cargo bench` passes flags of its own.
    let kernel = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let Some(kernel) = kernel else { return println!("{}", KERNELS.join(" ")) };
    let stream = Stream::new(0, Purpose::Shuffle, 0);
    let values: Vec<f32> =
        (0..PROMPTS * RESPONSES * DIM).map(|index| stream.uniform(index as u64) as f32 - 0.5).collect();
    let rows = Rows::new(Values::F32(&values), PROMPTS * RESPONSES, DIM).unwrap();
    let long = Rows::new(Values::F32(&values), 16, values.len() / 16).unwrap();
    let mut pairs = Vec::new();
    for prompt in 0..PROMPTS {
        for first in 0..RESPONSES {
            pairs.extend((first + 1..RESPONSES).map(|second| [first, second].map(|r| (prompt * RESPONSES + r) as i64)));
        }
    }
    let coefficients = vec![[1.0, -1.0]; pairs.len()];
    let points = Points::from_pairs(rows, &pairs, &coefficients, &Progress::default()).unwrap();
    let centroids = &values[..CLUSTERS * DIM];
    let params = Params {
        init: Init::Centroids(centroids.to_vec()),
        max_iterations: 3,
        tolerance: 0.0,
        ..Params::new(CLUSTERS)
    };
    let labels: Vec<i32> = (0..pairs.len()).map(|pair| (pair % CLUSTERS) as i32).collect();
    let progress = Progress::default();
    // One thread, as callgrind lets one run at a time.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| match kernel.as_str() {
        "none" => {}
        "sparse" | "rademacher" => {
            let kind = if kernel == "sparse" { Kind::Sparse } else { Kind::Rademacher };
            let mut out = vec![0.0; 16 * DIM];
            Sketcher::new(DIM, 0, kind, 1).unwrap().sketch(long, 0, &mut out, &progress).unwrap();
        }
        "kmeans" => drop(fit_rows(rows, None, &params, &progress).unwrap()),
        "pair_kmeans" => drop(fit(points, &params, &progress).unwrap()),
        "scores" => drop(score_pairs(&points, centroids, &labels, Some(&values[..DIM]), &progress).unwrap()),
        "depth" => {
            let prompts: Vec<i64> = pairs.iter().map(|pair| pair[0] / RESPONSES as i64).collect();
            let usefulness: Vec<f64> = (0..pairs.len()).map(|pair| stream.uniform(pair as u64)).collect();
            let candidates = Candidates { prompts: &prompts, clusters: &labels, usefulness: &usefulness };
            drop(allocate_depth(candidates, 2 * PROMPTS, true, Some(4), None, &progress).unwrap());
        }
        "coreset" => drop(coreset(&points, &labels, PROMPTS, Limits::default(), CACHE_BYTES, &progress).unwrap()),
        "d_optimal" => drop(d_optimal(&points, PROMPTS / 5, 1.0, Limits::default(), &progress).unwrap()),
        other => panic!("unknown kernel {other}; choose one of {KERNELS:?}"),
    });
}
