//! The arguments that limit a choice of pairs.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::convert::{bools, indices};
use crate::prompts::Limits;

pub struct LimitArrays {
    eligible: Option<Vec<bool>>,
    depth: Option<(Vec<i64>, usize)>,
}

impl LimitArrays {
    /// # Errors
    /// As for any vector, and `TypeError` for a depth without prompts.
    pub fn new(
        eligible: Option<&Bound<'_, PyAny>>,
        prompts: Option<&Bound<'_, PyAny>>,
        max_depth: Option<usize>,
    ) -> PyResult<Self> {
        let eligible = eligible.map(|eligible| bools("eligible", eligible)).transpose()?;
        let prompts = prompts.map(|prompts| indices("prompts", prompts)).transpose()?;
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
            eligible: self.eligible.as_deref(),
            depth: self.depth.as_ref().map(|(prompts, max_depth)| (prompts.as_slice(), *max_depth)),
        }
    }
}
