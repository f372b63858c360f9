//! The matrix product, and the only file that names the crate behind it.
//!
//! Measured at the tiles of k-means (256 or 512 rows of 512 values, one thread of a Zen 4): `gemm` runs as fast as
//! `matrixmultiply` at 256 columns, 1.2 to 1.4 times as fast at 64 and 2.7 times at 8. With the right factor stored so
//! that its rows are contiguous it runs 1.4 to 1.6 times as fast (64 to 256 columns) as with the transposed one, which
//! it would have to pack anew for each tile.

use gemm::{Parallelism, gemm};

/// `product = left * right`, all row-major: `left` (n, `inner`), `right` (`inner`, m), `product` (n, m); on the calling
/// thread.
///
/// # Panics
/// If a slice does not have the size that `inner` and the others imply.
pub fn multiply(left: &[f32], right: &[f32], inner: usize, product: &mut [f32]) {
    let rows = left.len() / inner;
    let columns = right.len() / inner;
    assert_eq!(left.len(), rows * inner);
    assert_eq!(right.len(), inner * columns);
    assert_eq!(product.len(), rows * columns);
    // SAFETY: the pointers and strides (column stride first) describe exactly the three slices, whose sizes were checked
    // above; `product` is borrowed mutably, so it overlaps neither factor.
    unsafe {
        gemm(
            rows,
            columns,
            inner,
            product.as_mut_ptr(),
            1,
            columns as isize,
            false,
            left.as_ptr(),
            1,
            inner as isize,
            right.as_ptr(),
            1,
            columns as isize,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
