//! What a pickle or a copy of an object holds: the arguments that make the same one, by name. So another release refuses
//! by name what it does not know, and nothing but arrays, numbers and text is ever read.

use pyo3::IntoPyObjectExt;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict, PyTuple};

/// One argument.
///
/// # Errors
/// If it cannot be made.
pub fn entry<'py>(
    py: Python<'py>,
    name: &'static str,
    value: impl IntoPyObject<'py>,
) -> PyResult<(&'static str, Bound<'py, PyAny>)> {
    Ok((name, value.into_bound_py_any(py)?))
}

/// What `__getnewargs_ex__` returns.
///
/// # Errors
/// If memory is short.
pub fn fields<'py, const COUNT: usize>(
    py: Python<'py>,
    entries: [(&'static str, Bound<'py, PyAny>); COUNT],
) -> PyResult<(Bound<'py, PyTuple>, Bound<'py, PyDict>)> {
    Ok((PyTuple::empty(py), entries.into_py_dict(py)?))
}
