//! Processes that share the pairs, as a Python object carries what they tell each other.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

use super::run::run;
use crate::error::{Error, Result};
use crate::exchange::{Exchange, Processes};
use crate::progress::Progress;

/// An object with `rank`, `size`, `gather`, `receive` and `hand_on`; what it raised is kept.
#[derive(Debug)]
struct Others {
    object: Py<PyAny>,
    rank: usize,
    size: usize,
    raised: Mutex<Option<PyErr>>,
}

impl Others {
    fn new(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (rank, size) = (object.getattr("rank")?.extract()?, object.getattr("size")?.extract()?);
        Ok(Self { object: object.clone().unbind(), rank, size, raised: Mutex::new(None) })
    }

    /// Calls a method, on whatever thread.
    fn call<T>(&self, name: &str, given: Option<&[u8]>, read: impl Fn(&Bound<'_, PyAny>) -> PyResult<T>) -> Result<T> {
        Python::attach(|py| {
            let given = given.map(|bytes| PyBytes::new(py, bytes));
            let answer = self.object.bind(py).call_method1(name, PyTuple::new(py, [given])?)?;
            read(&answer)
        })
        .map_err(|error| {
            *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            Error::Elsewhere
        })
    }
}

fn bytes(answer: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    Ok(answer.cast::<PyBytes>()?.as_bytes().to_vec())
}

impl Exchange for Others {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.call("gather", Some(own), |answer| answer.try_iter()?.map(|part| bytes(&part?)).collect())
    }

    fn receive(&self, state: &[u8]) -> Result<Vec<u8>> {
        self.call("receive", Some(state), bytes)
    }

    fn hand_on(&self, state: Option<&[u8]>) -> Result<Vec<u8>> {
        self.call("hand_on", state, bytes)
    }
}

/// As [`run`], by all of `processes` together, if any are given.
///
/// # Errors
/// As [`run`], and what a method of `processes` raised.
pub fn run_shared<T: Send>(
    py: Python<'_>,
    threads: Option<usize>,
    callback: Option<&Py<PyAny>>,
    processes: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(Processes, &Progress) -> Result<T> + Send,
) -> PyResult<T> {
    let Some(processes) = processes else {
        return run(py, threads, callback, |progress| work(Processes::default(), progress));
    };
    let others = Others::new(processes)?;
    let found = run(py, threads, callback, |progress| work(Processes::new(&others), progress));
    let raised = others.raised.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (found, raised) {
        (Err(_), Some(raised)) => Err(raised),
        (found, _) => found,
    }
}
