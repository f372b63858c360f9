//! The one table from errors of the core to Python exceptions.
//!
//! A class of its own is for what a caller cannot see beforehand and may want to go on from: what the numbers are, and what
//! became of a store. A wrong shape or setting is a `ValueError` and no more.

use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyTypeInfo, create_exception};

use crate::error::Error;

create_exception!(
    bpo._core,
    NotFiniteError,
    PyValueError,
    "A number is NaN or infinite, or too large for float32.\n\n\
     Attributes:\n    \
         array: Name of the argument that holds it.\n    \
         index: Its place along the first axis, such as the row.\n    \
         column: Its place along the second one; None where there is none, or all of the row is too large.\n    \
         value: The number; inf for one that is too large."
);
create_exception!(
    bpo._core,
    NoDirectionError,
    PyValueError,
    "What has to have a direction is zero, or too short for float32 to bring it to unit length.\n\n\
     Attributes:\n    \
         array: Name of the argument.\n    \
         index: The row of it, or None where it is a single vector."
);
create_exception!(
    bpo._core,
    OutOfRangeError,
    PyValueError,
    "A pair refers to a row, or a label to a cluster, that is not there; or a weight is negative.\n\n\
     Attributes:\n    \
         array: Name of the argument.\n    \
         index: The place in it, such as the pair.\n    \
         value: What is there."
);
create_exception!(
    bpo._core,
    NotDefiniteError,
    PyValueError,
    "A matrix is not positive definite to float64 precision, so the regularization has to be larger."
);
create_exception!(bpo._core, StoreError, PyValueError, "A directory is not a gradient store that can be used.");
create_exception!(bpo._core, StoreDamagedError, StoreError, "A file of a store is not as it was written.");
create_exception!(bpo._core, StoreVersionError, StoreError, "A store has a format that this release does not read.");
create_exception!(bpo._core, StoreLockedError, StoreError, "Another process is writing to a store.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::NonFiniteRow { array, row, column, value } => not_finite(message, array, row, Some(column), value),
            Error::NotFinite { array, index, value } => not_finite(message, array, index, None, value),
            Error::Overflow { array, point } => not_finite(message, array, point, None, f64::INFINITY),
            Error::ZeroPoint { array, point: row }
            | Error::TooShort { array, point: row }
            | Error::ZeroRow { array, row } => no_direction(message, array, Some(row)),
            Error::ZeroVector { array } => no_direction(message, array, None),
            Error::RowOutOfRange { pair, row, .. } => out_of_range(message, "pairs", pair, row),
            Error::ClusterOutOfRange { array, index, label, .. } => out_of_range(message, array, index, label),
            Error::Weight { array, index, value } if value.is_finite() => out_of_range(message, array, index, value),
            Error::Weight { array, index, value } => not_finite(message, array, index, None, value),
            Error::NotDefinite => NotDefiniteError::new_err(message),
            Error::StoreFormat { .. } | Error::StoreClosed { .. } => StoreError::new_err(message),
            Error::StoreDamaged { .. } => StoreDamagedError::new_err(message),
            Error::StoreVersion { .. } => StoreVersionError::new_err(message),
            Error::StoreLocked { .. } => StoreLockedError::new_err(message),
            // With a number, Python picks the subclass, such as FileNotFoundError.
            Error::Io { path, doing, source } => match source.raw_os_error() {
                Some(code) => {
                    // Python writes the number itself.
                    let text = source.to_string();
                    let text = text.strip_suffix(&format!(" (os error {code})")).unwrap_or(&text);
                    let text = doing.map_or(text.to_owned(), |doing| format!("{text} while {doing}"));
                    PyOSError::new_err((code, text, path.display().to_string()))
                }
                None => PyOSError::new_err(message),
            },
            Error::Memory { .. } => PyMemoryError::new_err(message),
            Error::Fault { .. } | Error::Elsewhere => PyRuntimeError::new_err(message),
            Error::Cancelled => PyKeyboardInterrupt::new_err(()),
            Error::Shape { .. }
            | Error::Argument { .. }
            | Error::TooManyClusters { .. }
            | Error::Changed { .. }
            | Error::BudgetBelowPrompts { .. } => PyValueError::new_err(message),
        }
    }
}

fn not_finite(message: String, array: &str, index: usize, column: Option<usize>, value: f64) -> PyErr {
    with_attributes::<NotFiniteError>(message, |raised| {
        raised.setattr("array", array)?;
        raised.setattr("index", index)?;
        raised.setattr("column", column)?;
        raised.setattr("value", value)
    })
}

fn no_direction(message: String, array: &str, index: Option<usize>) -> PyErr {
    with_attributes::<NoDirectionError>(message, |raised| {
        raised.setattr("array", array)?;
        raised.setattr("index", index)
    })
}

fn out_of_range(message: String, array: &str, index: usize, value: impl for<'py> IntoPyObject<'py>) -> PyErr {
    with_attributes::<OutOfRangeError>(message, |raised| {
        raised.setattr("array", array)?;
        raised.setattr("index", index)?;
        raised.setattr("value", value)
    })
}

/// An exception whose instance has attributes: they then come along in a pickle. The stable ABI of the Pythons before 3.12
/// knows no fields of an exception's class.
fn with_attributes<E: PyTypeInfo>(message: String, set: impl FnOnce(&Bound<'_, PyAny>) -> PyResult<()>) -> PyErr {
    Python::attach(|py| {
        let raised = PyErr::new::<E, _>(message);
        set(raised.value(py)).err().unwrap_or(raised)
    })
}
