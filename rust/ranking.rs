//! The order in which pairs are to be kept, from their scores.

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::memory::{RESULTS, build, first};
use crate::progress::Progress;
use crate::rng::{Purpose, Stream};

/// Keys that a thread makes between two looks at the cancel token.
const RANKED_AT_ONCE: usize = 1 << 14;

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
/// ```
/// use bpo::progress::Progress;
/// use bpo::ranking::{Ranking, ranking_keys};
///
/// let scores = [0.1, 0.7, 0.4];
/// let keys = ranking_keys(&scores, Ranking::Farthest, 0, &Progress::default())?;
/// assert_eq!(keys, [-0.1, -0.7, -0.4]);
/// // So cold that the draw follows the scores.
/// let keys = ranking_keys(&scores, Ranking::Softmax { temperature: 1e-3 }, 0, &Progress::default())?;
/// assert!(keys[1] > keys[2] && keys[2] > keys[0]);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If a score is not finite, the temperature is not positive, the memory cannot be had, or the computation was cancelled.
pub fn ranking_keys(scores: &[f64], ranking: Ranking, seed: u64, progress: &Progress) -> Result<Vec<f64>> {
    if let Some(index) = first(scores.len(), progress, |pair| !scores[pair].is_finite())? {
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
    let mut keys = build(scores.len(), RESULTS, progress, |_| 0.0)?;
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
