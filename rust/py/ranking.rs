//! Binding of the ranking.

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::convert::Vector;
use super::run::run;
use crate::memory::{ARGUMENT, build};
use crate::ranking::{self, Ranking};

/// Keys to rank pairs by: the larger, the sooner a pair is kept.
///
/// Args:
///     scores: (P,) float64 or float32.
///     ranking: "nearest" (highest score first), "farthest" (lowest first), "softmax" (drawn without replacement in
///         proportion to exp(score / temperature), by the Gumbel-top-k trick) or "random".
///     temperature: Temperature of "softmax".
///     seed: Seed of "softmax" and "random"; a pair's draw depends on the seed and its index alone.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///     progress: Called with (done, total) at most ten times a second, and at the end.
///
/// Returns:
///     (P,) float64.
///
/// Raises:
///     TypeError: If scores has another dtype.
///     NotFiniteError: If a score is not finite.
///     ValueError: If scores has another shape or layout, or an argument is out of its range.
#[pyfunction]
#[pyo3(signature = (scores, ranking = "nearest", *, temperature = 1.0, seed = 0, threads = None, progress = None))]
pub fn ranking_keys<'py>(
    py: Python<'py>,
    scores: &Bound<'_, PyAny>,
    ranking: &str,
    temperature: f64,
    seed: u64,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let ranking = match ranking {
        "nearest" => Ranking::Nearest,
        "farthest" => Ranking::Farthest,
        "softmax" => Ranking::Softmax { temperature },
        "random" => Ranking::Random,
        _ => {
            return Err(PyValueError::new_err(format!(
                "`ranking` must be \"nearest\", \"farthest\", \"softmax\" or \"random\", but is {ranking:?}"
            )));
        }
    };
    let keys = if scores.cast::<PyArray1<f32>>().is_ok() {
        let scores = Vector::<f32>::new("scores", scores)?;
        let scores = scores.slice();
        run(py, threads, progress.as_ref(), |progress| {
            let scores = build(scores.len(), ARGUMENT, progress, |pair| f64::from(scores[pair]))?;
            ranking::ranking_keys(&scores, ranking, seed, progress)
        })?
    } else {
        let scores = Vector::<f64>::new("scores", scores)?;
        let scores = scores.slice();
        run(py, threads, progress.as_ref(), |progress| ranking::ranking_keys(scores, ranking, seed, progress))?
    };
    Ok(keys.into_pyarray(py))
}
