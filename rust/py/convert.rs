//! NumPy arrays to slices and back. Arrays are borrowed as they are, memory maps included. Only lists of indices and masks
//! are copied, so that nothing changes them between their check and their use; and that after the interpreter was let go,
//! in pieces between which the cancel token is looked at.

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use numpy::ndarray::{Dimension, Ix1, Ix2};
use numpy::prelude::*;
use numpy::{Element, PyArray, PyArray2, PyReadonlyArray, PyReadwriteArray2, PyUntypedArray};
use pyo3::PyTypeInfo;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::{Error, Result};
use crate::matrix::{Rows, Values};
use crate::memory::{ARGUMENT, RESULTS, build, first};
use crate::points::Points;
use crate::progress::Progress;

/// A C-contiguous array of one type and number of dimensions, borrowed for reading.
pub struct Borrowed<'py, T: Element, D: Dimension>(PyReadonlyArray<'py, T, D>);

pub type Vector<'py, T> = Borrowed<'py, T, Ix1>;
pub type Matrix<'py, T> = Borrowed<'py, T, Ix2>;

impl<'py, T: Element, D: Dimension> Borrowed<'py, T, D> {
    /// # Errors
    /// `TypeError` for another type than an array of `T`, `ValueError` for another shape, layout or alignment.
    pub fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let typed = Self::check(name, array)?;
        let borrowed = typed
            .try_readonly()
            .map_err(|_| PyValueError::new_err(format!("`{name}` is the output of another call that still runs")))?;
        if borrowed.as_slice().is_err() {
            return Err(unaligned(name));
        }
        Ok(Self(borrowed))
    }

    /// The array, if it is one of `T` in the layout that is borrowed.
    fn check<'a>(name: &str, array: &'a Bound<'py, PyAny>) -> PyResult<&'a Bound<'py, PyArray<T, D>>> {
        let untyped = untyped(name, array, D::NDIM.unwrap_or_default())?;
        array.cast::<PyArray<T, D>>().map_err(|_| {
            let expected = T::get_dtype(array.py());
            wrong_dtype(name, &expected.to_string(), untyped)
        })
    }

    pub fn slice(&self) -> &[T] {
        self.0.as_slice().expect("the layout and the alignment were checked")
    }

    pub fn shape(&self) -> &[usize] {
        self.0.shape()
    }
}

/// An array of bool. It is read as bytes, since NumPy lets one hold any: all but zero are true.
pub struct Mask<'py>(Vector<'py, u8>);

impl<'py> Mask<'py> {
    /// # Errors
    /// As [`Borrowed::new`].
    pub fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        // Never read as such.
        Borrowed::<bool, Ix1>::check(name, array)?;
        Ok(Self(Vector::new(name, &array.call_method1("view", ("uint8",))?)?))
    }

    pub fn bytes(&self) -> &[u8] {
        self.0.slice()
    }
}

/// What the bytes of a mask say.
///
/// # Errors
/// As [`build`].
pub fn bools(bytes: &[u8], progress: &Progress) -> Result<Vec<bool>> {
    build(bytes.len(), ARGUMENT, progress, |index| bytes[index] != 0)
}

/// A copy of a list of indices.
///
/// # Errors
/// As [`build`].
pub fn indices<T: Copy + Send + Sync>(values: &[T], progress: &Progress) -> Result<Vec<T>> {
    build(values.len(), ARGUMENT, progress, |index| values[index])
}

/// Indices as NumPy has them.
///
/// # Errors
/// As [`build`].
pub fn numbers<T: Copy + Sync + TryInto<i64>>(indices: &[T], progress: &Progress) -> Result<Vec<i64>> {
    // No list is long enough for other indices.
    build(indices.len(), RESULTS, progress, |index| indices[index].try_into().unwrap_or(i64::MAX))
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
pub struct RowsArray<'py> {
    values: RowsValues<'py>,
    /// Whether they lie in a file that is mapped for all to share.
    mapped: bool,
}

enum RowsValues<'py> {
    F32(Matrix<'py, f32>),
    F16(Matrix<'py, f16>),
    /// bfloat16, for which NumPy has no type, crosses as its bits.
    Bits(Matrix<'py, u16>),
    I8(Matrix<'py, i8>, Option<Vector<'py, f32>>),
}

impl<'py> RowsArray<'py> {
    /// # Errors
    /// As [`Borrowed::new`].
    pub fn new(name: &str, array: &Bound<'py, PyAny>) -> PyResult<Self> {
        let untyped = untyped(name, array, 2)?;
        let py = array.py();
        let dtype = untyped.dtype();
        let values = if dtype.is_equiv_to(&f32::get_dtype(py)) {
            RowsValues::F32(Borrowed::new(name, array)?)
        } else if dtype.is_equiv_to(&f16::get_dtype(py)) {
            RowsValues::F16(Borrowed::new(name, array)?)
        } else if dtype.is_equiv_to(&u16::get_dtype(py)) {
            RowsValues::Bits(Borrowed::new(name, array)?)
        } else {
            return Err(wrong_dtype(name, "float32, float16 or uint16 (the bits of bfloat16)", untyped));
        };
        Ok(Self { values, mapped: is_mapped(array)? })
    }

    /// As [`RowsArray::new`], and of int8 with a factor for each row.
    ///
    /// # Errors
    /// As [`Borrowed::new`], and `ValueError` unless there are scales exactly where the rows are int8.
    pub fn with_scales(name: &str, array: &Bound<'py, PyAny>, scales: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        let is_int8 = untyped(name, array, 2)?.dtype().is_equiv_to(&i8::get_dtype(array.py()));
        match scales {
            Some(scales) if is_int8 => {
                let scales = Vector::<f32>::new("scales", scales)?;
                Ok(Self { values: RowsValues::I8(Matrix::new(name, array)?, Some(scales)), mapped: is_mapped(array)? })
            }
            Some(_) => Err(PyValueError::new_err(format!("`scales` belong to int8 `{name}` alone; leave them out"))),
            None if is_int8 => Err(PyValueError::new_err(format!("int8 `{name}` need `scales`, one for each row"))),
            None => Self::new(name, array),
        }
    }

    /// The rows of pairs: as [`RowsArray::with_scales`], and of int8 whose factors are in the coefficients of the pairs.
    ///
    /// # Errors
    /// As [`RowsArray::with_scales`].
    pub fn of_pairs(array: &Bound<'py, PyAny>, scales: Option<&Bound<'py, PyAny>>) -> PyResult<Self> {
        let name = "rows";
        if scales.is_none() && untyped(name, array, 2)?.dtype().is_equiv_to(&i8::get_dtype(array.py())) {
            return Ok(Self { values: RowsValues::I8(Matrix::new(name, array)?, None), mapped: is_mapped(array)? });
        }
        Self::with_scales(name, array, scales)
    }

    pub fn rows(&self) -> Result<Rows<'_>> {
        let (values, shape) = match &self.values {
            RowsValues::F32(array) => (Values::F32(array.slice()), array.shape()),
            RowsValues::F16(array) => (Values::F16(array.slice()), array.shape()),
            RowsValues::I8(array, scales) => {
                (Values::I8(array.slice(), scales.as_ref().map(Vector::slice)), array.shape())
            }
            RowsValues::Bits(array) => (Values::Bf16(array.slice().reinterpret_cast::<bf16>()), array.shape()),
        };
        let mut rows = Rows::new(values, shape[0], shape[1])?;
        if self.mapped {
            // SAFETY: `is_mapped` saw that NumPy mapped a file, and not for private changes.
            unsafe { rows.set_mapped() };
        }
        Ok(rows)
    }
}

/// Checks the factors of rows.
///
/// # Errors
/// If one is not finite, or the computation was cancelled.
pub fn check_scales(rows: Rows, progress: &Progress) -> Result<()> {
    let Values::I8(_, Some(scales)) = rows.values() else { return Ok(()) };
    match first(scales.len(), progress, |index| !scales[index].is_finite())? {
        Some(index) => Err(Error::NotFinite { array: "scales", index, value: f64::from(scales[index]) }),
        None => Ok(()),
    }
}

impl RowsArray<'_> {
    /// Rows that are points each.
    ///
    /// # Errors
    /// If they have no columns: of such rows there may be more than memory has room for labels.
    pub fn points(&self) -> Result<Rows<'_>> {
        let rows = self.rows()?;
        if rows.dim() == 0 {
            return Err(Error::shape("rows", "(n, d) with d >= 1", format!("({}, 0)", rows.count())));
        }
        Ok(rows)
    }
}

/// The three arrays that describe pairs.
pub struct PairArrays<'py> {
    rows: RowsArray<'py>,
    pairs: Matrix<'py, i64>,
    coefficients: Matrix<'py, f32>,
}

/// Pairs as the core reads them.
#[derive(Clone, Copy)]
pub struct Pairs<'a> {
    pub rows: Rows<'a>,
    indices: &'a [[i64; 2]],
    coefficients: &'a [[f32; 2]],
}

impl<'py> PairArrays<'py> {
    /// # Errors
    /// As [`Borrowed::new`].
    pub fn new(rows: RowsArray<'py>, pairs: &Bound<'py, PyAny>, coefficients: &Bound<'py, PyAny>) -> PyResult<Self> {
        Ok(Self { rows, pairs: Matrix::new("pairs", pairs)?, coefficients: Matrix::new("coefficients", coefficients)? })
    }

    /// # Errors
    /// As [`Borrowed::couples`].
    pub fn pairs(&self) -> PyResult<Pairs<'_>> {
        Ok(Pairs {
            rows: self.rows.rows()?,
            indices: self.pairs.couples("pairs")?,
            coefficients: self.coefficients.couples("coefficients")?,
        })
    }
}

impl<'a> Pairs<'a> {
    /// # Errors
    /// As [`Points::from_pairs`] and [`check_scales`].
    pub fn points(&self, progress: &Progress) -> Result<Points<'a, 2>> {
        check_scales(self.rows, progress)?;
        Points::from_pairs(self.rows, self.indices, self.coefficients, progress)
    }
}

/// Whether an array is, or is a view of, a `numpy.memmap` whose changes go to the file.
fn is_mapped(array: &Bound<'_, PyAny>) -> PyResult<bool> {
    let memmap = array.py().import("numpy")?.getattr("memmap")?;
    let mut owner = array.clone();
    while !owner.is_none() {
        if owner.is_instance(&memmap)? {
            // Arithmetic gives a memmap that has no map of its own.
            let shared =
                matches!(owner.getattr("mode")?.extract::<Option<String>>()?.as_deref(), Some("r" | "r+" | "w+"));
            return Ok(shared && !owner.getattr("_mmap")?.is_none());
        }
        owner = owner.getattr_opt("base")?.unwrap_or_else(|| array.py().None().into_bound(array.py()));
    }
    Ok(false)
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
    if borrowed.as_slice().is_err() {
        return Err(unaligned(name));
    }
    Ok((typed.clone(), borrowed))
}

/// A float32 matrix of zeros.
///
/// # Errors
/// `MemoryError` or `ValueError` if there cannot be one of this shape.
pub fn zeros<'py>(py: Python<'py>, shape: [usize; 2]) -> PyResult<Bound<'py, PyAny>> {
    py.import("numpy")?.call_method1("zeros", (shape, "float32"))
}

/// A float32 matrix for Python, from its values in row-major order.
pub fn matrix(py: Python<'_>, values: Vec<f32>, columns: usize) -> PyResult<Py<PyArray2<f32>>> {
    let rows = values.len() / columns.max(1);
    Ok(values.into_pyarray(py).reshape([rows, columns])?.unbind())
}

fn untyped<'a, 'py>(
    name: &str,
    array: &'a Bound<'py, PyAny>,
    dimensions: usize,
) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    let untyped = unmasked(name, array)?;
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

/// An array of any type, if nothing of it is masked.
///
/// # Errors
/// `TypeError` for anything else than an array, and for a masked one, whose mask would be passed over.
pub fn unmasked<'a, 'py>(name: &str, array: &'a Bound<'py, PyAny>) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    let Ok(untyped) = array.cast::<PyUntypedArray>() else {
        let found = array.get_type().name()?;
        return Err(PyTypeError::new_err(format!("`{name}` must be a NumPy array, but is {found}")));
    };
    // Subclasses alone, so that `numpy.ma` is imported for those that may be its own.
    if !array.is_exact_instance(&PyUntypedArray::type_object(array.py()))
        && array.is_instance(&array.py().import("numpy.ma")?.getattr("MaskedArray")?)?
    {
        return Err(PyTypeError::new_err(format!(
            "`{name}` is a masked array, and the mask would be passed over; leave the masked entries out, or pass \
             {name}.filled(...)"
        )));
    }
    Ok(untyped)
}

fn unaligned(name: &str) -> PyErr {
    PyValueError::new_err(format!(
        "`{name}` must be aligned in memory, each number at an address that is a multiple of its size; copy it with \
         {name}.copy()"
    ))
}

fn wrong_dtype(name: &str, expected: &str, array: &Bound<'_, PyUntypedArray>) -> PyErr {
    PyTypeError::new_err(format!("`{name}` must have dtype {expected}, but has {}", array.dtype()))
}
