//! The one table from errors of the core to Python exceptions.

use pyo3::PyErr;
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError, PyValueError};

use crate::error::Error;

create_exception!(bpo._core, StoreError, PyValueError, "A directory is not a gradient store that can be used.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match &error {
            Error::StoreFormat { .. } | Error::StoreLocked { .. } => StoreError::new_err(error.to_string()),
            // With a number, Python picks the subclass, such as FileNotFoundError.
            Error::Io { path, source } => match source.raw_os_error() {
                Some(code) => PyOSError::new_err((code, source.to_string(), path.display().to_string())),
                None => PyOSError::new_err(error.to_string()),
            },
            Error::Memory { .. } => PyMemoryError::new_err(error.to_string()),
            Error::Cancelled => PyKeyboardInterrupt::new_err(()),
            Error::Shape { .. }
            | Error::Argument { .. }
            | Error::TooManyClusters { .. }
            | Error::NonFiniteRow { .. }
            | Error::NotFinite { .. }
            | Error::Overflow { .. }
            | Error::ZeroPoint { .. }
            | Error::RowOutOfRange { .. }
            | Error::ClusterOutOfRange { .. }
            | Error::NotDefinite
            | Error::BudgetBelowPrompts { .. } => PyValueError::new_err(error.to_string()),
        }
    }
}
