//! How pairs are picked within limits: what all functions that do so have in common.

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::convert::{Mask, PairArrays, Vector, bools, indices, numbers};
use super::processes::run_shared;
use crate::error::Result;
use crate::exchange::Processes;
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::Limits;

/// The arguments that limit a choice of pairs.
pub struct LimitArguments<'a, 'py> {
    pub eligible: Option<&'a Bound<'py, PyAny>>,
    pub prompts: Option<&'a Bound<'py, PyAny>>,
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
    let LimitArguments { eligible, prompts, max_depth } = *limits;
    let eligible = eligible.map(|eligible| Mask::new("eligible", eligible)).transpose()?;
    let prompts = prompts.map(|prompts| Vector::<i64>::new("prompts", prompts)).transpose()?;
    if max_depth.is_some() && prompts.is_none() {
        return Err(PyTypeError::new_err("`max_depth` needs `prompts`, the prompt of each pair"));
    }
    let eligible = eligible.as_ref().map(Mask::bytes);
    let prompts = prompts.as_ref().map(Vector::slice).filter(|_| max_depth.is_some());
    let work = |processes: Processes, progress: &Progress| {
        let eligible = eligible.map(|bytes| bools(bytes, progress)).transpose()?;
        let prompts = prompts.map(|prompts| indices(prompts, progress)).transpose()?;
        let limits = Limits { eligible: eligible.as_deref(), depth: prompts.as_deref().zip(max_depth) };
        let (picks, values) = choose(&pairs.points(progress)?.shared(processes), limits, progress)?;
        Ok((numbers(&picks, progress)?, values))
    };
    let (picks, values) = run_shared(py, threads, progress, processes, work)?;
    Ok((picks.into_pyarray(py), values.into_pyarray(py)))
}
