//! The one table from errors of the core to Python exceptions.

use pyo3::PyErr;
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};

use crate::error::Error;

create_exception!(bpo._core, StoreError, PyValueError, "A directory is not a gradient store that can be used.");
create_exception!(bpo._core, StoreDamagedError, StoreError, "A file of a store is not as it was written.");
create_exception!(bpo._core, StoreVersionError, StoreError, "A store has a format that this release does not read.");
create_exception!(bpo._core, StoreLockedError, StoreError, "Another process is writing to a store.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match &error {
            Error::StoreFormat { .. } | Error::StoreClosed { .. } => StoreError::new_err(error.to_string()),
            Error::StoreDamaged { .. } => StoreDamagedError::new_err(error.to_string()),
            Error::StoreVersion { .. } => StoreVersionError::new_err(error.to_string()),
            Error::StoreLocked { .. } => StoreLockedError::new_err(error.to_string()),
            // With a number, Python picks the subclass, such as FileNotFoundError.
            Error::Io { path, doing, source } => match source.raw_os_error() {
                Some(code) => {
                    // Python writes the number itself.
                    let text = source.to_string();
                    let text = text.strip_suffix(&format!(" (os error {code})")).unwrap_or(&text);
                    let text = doing.as_ref().map_or(text.to_owned(), |doing| format!("{text} while {doing}"));
                    PyOSError::new_err((code, text, path.display().to_string()))
                }
                None => PyOSError::new_err(error.to_string()),
            },
            Error::Memory { .. } => PyMemoryError::new_err(error.to_string()),
            Error::Fault { .. } => PyRuntimeError::new_err(error.to_string()),
            Error::Cancelled => PyKeyboardInterrupt::new_err(()),
            Error::Shape { .. }
            | Error::Argument { .. }
            | Error::TooManyClusters { .. }
            | Error::NonFiniteRow { .. }
            | Error::NotFinite { .. }
            | Error::Overflow { .. }
            | Error::ZeroPoint { .. }
            | Error::TooShort { .. }
            | Error::Changed { .. }
            | Error::RowOutOfRange { .. }
            | Error::ClusterOutOfRange { .. }
            | Error::NotDefinite
            | Error::BudgetBelowPrompts { .. } => PyValueError::new_err(error.to_string()),
        }
    }
}
