//! How pairs are picked within limits: what all functions that do so have in common.

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::convert::{Mask, PairArrays, Vector, bools, indices, numbers};
use super::processes::run_shared;
use crate::error::{Error, Result};
use crate::exchange::Processes;
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::Limits;

/// The arguments that limit a choice of pairs.
pub struct LimitArguments<'a, 'py> {
    pub eligible: Option<&'a Bound<'py, PyAny>>,
    pub prompts: Option<&'a Bound<'py, PyAny>>,
    pub min_depth: usize,
    pub max_depth: Option<usize>,
}

/// Picks, and a number of each.
pub type Picks<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>);

/// Runs `choose` on the pairs, which `processes` share if any are given, and on copies of their limits.
///
/// # Errors
/// As for any array, `TypeError` for a depth without prompts, and as [`run_shared`].
pub fn pick<'py>(
    py: Python<'py>,
    pairs: &PairArrays,
    limits: &LimitArguments,
    threads: Option<usize>,
    progress: Option<&Py<PyAny>>,
    processes: Option<&Bound<'_, PyAny>>,
    choose: impl FnOnce(&Points<2>, Limits, &Progress) -> Result<(Vec<usize>, Vec<f64>)> + Send,
) -> PyResult<Picks<'py>> {
    let pairs = pairs.pairs()?;
    let LimitArguments { eligible, prompts, min_depth, max_depth } = *limits;
    if min_depth > 1 {
        return Err(Error::argument("min_depth", "0 or 1", min_depth).into());
    }
    let deepest = max_depth.or((min_depth == 1).then_some(usize::MAX));
    let eligible = eligible.map(|eligible| Mask::new("eligible", eligible)).transpose()?;
    let prompts = prompts.map(|prompts| Vector::<i64>::new("prompts", prompts)).transpose()?;
    if deepest.is_some() && prompts.is_none() {
        let asked = if max_depth.is_some() { "max_depth" } else { "min_depth" };
        return Err(PyTypeError::new_err(format!("`{asked}` needs `prompts`, the prompt of each pair")));
    }
    let eligible = eligible.as_ref().map(Mask::bytes);
    let prompts = prompts.as_ref().map(Vector::slice).filter(|_| deepest.is_some());
    let work = |processes: Processes, progress: &Progress| {
        let eligible = eligible.map(|bytes| bools(bytes, progress)).transpose()?;
        let prompts = prompts.map(|prompts| indices(prompts, progress)).transpose()?;
        let limits = Limits { eligible: eligible.as_deref(), depth: prompts.as_deref().zip(deepest) };
        let (picks, values) = choose(&pairs.points(progress)?.shared(processes), limits, progress)?;
        Ok((numbers(&picks, progress)?, values))
    };
    let (picks, values) = run_shared(py, threads, progress, processes, work)?;
    Ok((picks.into_pyarray(py), values.into_pyarray(py)))
}
