//! The arguments that limit a choice of pairs.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use super::convert::{Mask, Vector, bools, indices};
use crate::error::Result;
use crate::progress::Progress;
use crate::prompts::Limits;

pub struct LimitArrays<'py> {
    eligible: Option<Mask<'py>>,
    depth: Option<(Vector<'py, i64>, usize)>,
}

/// The same as the core reads them.
#[derive(Clone, Copy)]
pub struct Borrowed<'a> {
    eligible: Option<&'a [u8]>,
    depth: Option<(&'a [i64], usize)>,
}

/// Copies of them.
pub struct Owned {
    eligible: Option<Vec<bool>>,
    depth: Option<(Vec<i64>, usize)>,
}

impl<'py> LimitArrays<'py> {
    /// # Errors
    /// As for any vector, and `TypeError` for a depth without prompts.
    pub fn new(
        eligible: Option<&Bound<'py, PyAny>>,
        prompts: Option<&Bound<'py, PyAny>>,
        max_depth: Option<usize>,
    ) -> PyResult<Self> {
        let eligible = eligible.map(|eligible| Mask::new("eligible", eligible)).transpose()?;
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

    pub fn borrow(&self) -> Borrowed<'_> {
        Borrowed {
            eligible: self.eligible.as_ref().map(Mask::bytes),
            depth: self.depth.as_ref().map(|(prompts, max_depth)| (prompts.slice(), *max_depth)),
        }
    }
}

impl Borrowed<'_> {
    /// # Errors
    /// If the memory for the copies cannot be had, or the computation was cancelled.
    pub fn copy(&self, progress: &Progress) -> Result<Owned> {
        let eligible = self.eligible.map(|bytes| bools(bytes, progress)).transpose()?;
        let depth = match self.depth {
            Some((prompts, max_depth)) => Some((indices(prompts, progress)?, max_depth)),
            None => None,
        };
        Ok(Owned { eligible, depth })
    }
}

impl Owned {
    pub fn limits(&self) -> Limits<'_> {
        Limits {
            eligible: self.eligible.as_deref(),
            depth: self.depth.as_ref().map(|(prompts, max_depth)| (prompts.as_slice(), *max_depth)),
        }
    }
}
