//! The arguments that limit a choice of pairs.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::convert::Vector;
use crate::prompts::Limits;

pub struct LimitArrays<'py> {
    eligible: Option<Vector<'py, bool>>,
    depth: Option<(Vector<'py, i64>, usize)>,
}

impl<'py> LimitArrays<'py> {
    /// # Errors
    /// As for any vector, and `TypeError` for a depth without prompts.
    pub fn new(
        eligible: Option<&Bound<'py, PyAny>>,
        prompts: Option<&Bound<'py, PyAny>>,
        max_depth: Option<usize>,
    ) -> PyResult<Self> {
        let eligible = eligible.map(|eligible| Vector::new("eligible", eligible)).transpose()?;
        let prompts = prompts.map(|prompts| Vector::new("prompts", prompts)).transpose()?;
        let depth = match (prompts, max_depth) {
            (Some(prompts), Some(max_depth)) => Some((prompts, max_depth)),
            (None, Some(_)) => {
                return Err(PyTypeError::new_err("`max_depth` needs `prompts`, the prompt of each pair"));
            }
            (_, None) => None,
        };
        Ok(Self { eligible, depth })
    }

    pub fn limits(&self) -> Limits<'_> {
        Limits {
            eligible: self.eligible.as_ref().map(|eligible| eligible.slice()),
            depth: self.depth.as_ref().map(|(prompts, max_depth)| (prompts.slice(), *max_depth)),
        }
    }
}
