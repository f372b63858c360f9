//! Bindings of the passes of a linear model.

use numpy::PyArray1;
use numpy::prelude::*;
use pyo3::prelude::*;

use super::convert::{RowsArray, Vector, indices};
use super::run::run;
use crate::error::Result;
use crate::linear;
use crate::memory::{ARGUMENT, build};
use crate::progress::Progress;

/// The products of some rows with a vector.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, taken as it is; memory maps are fine.
///     index: (m,) int64: the rows.
///     vector: (d,) float64.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///
/// Returns:
///     (m,) float64.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     ValueError: If an array has another shape or layout, or a row is not there.
#[pyfunction]
#[pyo3(signature = (rows, index, vector, *, threads = None))]
pub fn row_products<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    index: &Bound<'_, PyAny>,
    vector: &Bound<'_, PyAny>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    passed(py, rows, index, ("vector", vector), threads, linear::products)
}

/// The sum of some rows, each times its weight. What is added up is so in an order of its own.
///
/// Args:
///     rows: (n, d) C-contiguous float32, float16, uint16 (the bits of bfloat16) or int8, taken as it is; memory maps are fine.
///     index: (m,) int64: the rows.
///     weights: (m,) float64.
///     threads: Threads to use; all cores if None. Does not change any bit of the result.
///
/// Returns:
///     (d,) float64.
///
/// Raises:
///     TypeError: If an array has another dtype.
///     ValueError: If an array has another shape or layout, or a row is not there.
#[pyfunction]
#[pyo3(signature = (rows, index, weights, *, threads = None))]
pub fn row_sum<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    index: &Bound<'_, PyAny>,
    weights: &Bound<'_, PyAny>,
    threads: Option<usize>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    passed(py, rows, index, ("weights", weights), threads, linear::weighted_sum)
}

fn passed<'py>(
    py: Python<'py>,
    rows: &Bound<'_, PyAny>,
    index: &Bound<'_, PyAny>,
    (name, numbers): (&'static str, &Bound<'_, PyAny>),
    threads: Option<usize>,
    pass: impl FnOnce(crate::matrix::Rows, &[usize], &[f64], &Progress) -> Result<Vec<f64>> + Send,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let rows = RowsArray::of_pairs(rows, None)?;
    let rows = rows.rows()?;
    let index = Vector::<i64>::new("index", index)?;
    let index = index.slice();
    let numbers = Vector::<f64>::new(name, numbers)?;
    let numbers = numbers.slice();
    let work = |progress: &Progress| {
        let place = |place: usize| usize::try_from(index[place]).unwrap_or(usize::MAX);
        let index = build(index.len(), ARGUMENT, progress, place)?;
        pass(rows, &index, &indices(numbers, progress)?, progress)
    };
    Ok(run(py, threads, None, work)?.into_pyarray(py))
}
