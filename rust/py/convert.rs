//! NumPy arrays to slices and back. Arrays are borrowed as they are, memory maps included, and never copied.

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::ndarray::{Dimension, Ix1, Ix2};
use numpy::prelude::*;
use numpy::{Element, PyArray, PyArray2, PyReadonlyArray, PyReadwriteArray2, PyUntypedArray};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Result;
use crate::matrix::{Rows, Values};

/// A C-contiguous array of one type and number of dimensions, borrowed for reading.
pub struct Borrowed<'py, T: Element, D: Dimension>(PyReadonlyArray<'py, T, D>);

pub type Vector<'py, T> = Borrowed<'py, T, Ix1>;
pub type Matrix<'py, T> = Borrowed<'py, T, Ix2>;

impl<'py, T: Element, D: Dimension> Borrowed<'py, T, D> {
    /// # Errors
    /// `TypeError` for another type than an array of `T`, `ValueError` for another shape or layout.
    pub fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let untyped = untyped(name, array, D::NDIM.unwrap_or_default())?;
        let Ok(typed) = array.cast::<PyArray<T, D>>() else {
            let expected = T::get_dtype(array.py());
            return Err(wrong_dtype(name, &expected.to_string(), untyped));
        };
        let borrowed = typed
            .try_readonly()
            .map_err(|_| PyValueError::new_err(format!("`{name}` is the output of another call that still runs")))?;
        Ok(Self(borrowed))
    }

    pub fn slice(&self) -> &[T] {
        self.0.as_slice().expect("the layout was checked")
    }

    pub fn shape(&self) -> &[usize] {
        self.0.shape()
    }
}

impl<T: Element> Matrix<'_, T> {
    /// The rows of an array of two columns.
    ///
    /// # Errors
    /// `ValueError` for another number of columns.
    pub fn couples(&self, name: &str) -> PyResult<&[[T; 2]]> {
        match self.shape() {
            [_, 2] => Ok(self.slice().as_chunks::<2>().0),
            shape => Err(PyValueError::new_err(format!("`{name}` must have shape (P, 2), but has shape {shape:?}"))),
        }
    }
}

/// Rows of any type that the core widens.
pub enum RowsArray<'py> {
    F32(Matrix<'py, f32>),
    F16(Matrix<'py, f16>),
    /// bfloat16, for which NumPy has no type, crosses as its bits.
    Bits(Matrix<'py, u16>),
}

impl<'py> RowsArray<'py> {
    /// # Errors
    /// As [`Borrowed::new`].
    pub fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let untyped = untyped(name, array, 2)?;
        let py = array.py();
        let dtype = untyped.dtype();
        if dtype.is_equiv_to(&f32::get_dtype(py)) {
            Borrowed::new(name, array).map(Self::F32)
        } else if dtype.is_equiv_to(&f16::get_dtype(py)) {
            Borrowed::new(name, array).map(Self::F16)
        } else if dtype.is_equiv_to(&u16::get_dtype(py)) {
            Borrowed::new(name, array).map(Self::Bits)
        } else {
            Err(wrong_dtype(name, "float32, float16 or uint16 (the bits of bfloat16)", untyped))
        }
    }

    pub fn rows(&self) -> Result<Rows<'_>> {
        let (values, shape) = match self {
            Self::F32(array) => (Values::F32(array.slice()), array.shape()),
            Self::F16(array) => (Values::F16(array.slice()), array.shape()),
            Self::Bits(array) => (Values::Bf16(array.slice().reinterpret_cast::<bf16>()), array.shape()),
        };
        Rows::new(values, shape[0], shape[1])
    }
}

/// Borrows a float32 array of the given shape for writing.
///
/// # Errors
/// As [`Borrowed::new`], and `ValueError` for an array that is read-only or borrowed already.
pub fn output<'py>(
    name: &str,
    array: &Bound<'py, PyAny>,
    shape: [usize; 2],
) -> PyResult<(Bound<'py, PyArray2<f32>>, PyReadwriteArray2<'py, f32>)> {
    let untyped = untyped(name, array, 2)?;
    if untyped.shape() != shape {
        let found = untyped.shape();
        return Err(PyValueError::new_err(format!("`{name}` must have shape {shape:?}, but has shape {found:?}")));
    }
    let Ok(typed) = array.cast::<PyArray2<f32>>() else {
        return Err(wrong_dtype(name, "float32", untyped));
    };
    let borrowed = typed
        .try_readwrite()
        .map_err(|error| PyValueError::new_err(format!("`{name}` cannot be written to: {error}")))?;
    Ok((typed.clone(), borrowed))
}

/// A float32 matrix for Python, from its values in row-major order.
pub fn matrix(py: Python<'_>, values: Vec<f32>, columns: usize) -> PyResult<Py<PyArray2<f32>>> {
    let rows = values.len() / columns;
    Ok(values.into_pyarray(py).reshape([rows, columns])?.unbind())
}

fn untyped<'a, 'py>(
    name: &str,
    array: &'a Bound<'py, PyAny>,
    dimensions: usize,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    let Ok(untyped) = array.cast::<PyUntypedArray>() else {
        let found = array.get_type().name()?;
        return Err(PyTypeError::new_err(format!("`{name}` must be a NumPy array, but is {found}")));
    };
    if untyped.ndim() != dimensions {
        let found = untyped.shape();
        return Err(PyValueError::new_err(format!(
            "`{name}` must have {dimensions} dimension(s), but has shape {found:?}"
        )));
    }
    if !untyped.is_c_contiguous() {
        return Err(PyValueError::new_err(format!(
            "`{name}` must be C-contiguous; copy it with np.ascontiguousarray({name})"
        )));
    }
    Ok(untyped)
}

fn wrong_dtype(name: &str, expected: &str, array: &Bound<'_, PyUntypedArray>) -> PyErr {
    PyTypeError::new_err(format!("`{name}` must have dtype {expected}, but has {}", array.dtype()))
}
