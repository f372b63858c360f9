//! The float32 matrix product, with the same bits on every machine.
//!
//! The right factor is packed once into panels of columns and then meets many left factors. How the product is cut into
//! tiles never shows: see [`crate::simd::tile`].

use std::ops::RangeInclusive;

use crate::simd::tile::{ROWS, multiply_add as multiply_add_tile};

pub use crate::simd::tile::{PANEL, PanelRow, Strided};

// The constants below were chosen on one thread of a Zen 4 at 128 and 256 rows, depths of 384, 512, 1024 and 4096, and 8 to
// 1024 columns, in medians of interleaved runs.

/// Depth that is multiplied before the sums are stored. With 128 it ran at 0.90 to 0.97 of the speed, with 256 at 0.93 to
/// 0.99 and with 1024 no faster.
const DEPTH: usize = 512;

/// Panels that all rows meet before the next ones: at the depth above they fill half of a second-level cache of 1 MiB.
/// With 16 and 32 it ran as fast here, where the third-level cache is near.
const PANELS: usize = 8;

/// Rows that lie a multiple of so many values apart share the sets of the first-level cache and displace one another...
const CONFLICT: usize = 1024;

/// ... so they are copied to where they lie a cache line further apart: 1.1 times as fast at 100 columns, 1.2 times at 50,
/// 1.4 times at 8.
const COPY_STRIDE: usize = DEPTH + 16;

/// Columns that meet each row once, so that copying takes longer than it saves: 1.07 times at 32. Rows without a conflict
/// are always read where they are: copying them took 1.1 times as long at 32 columns.
const UNCOPIED: RangeInclusive<usize> = 17..=PANEL;

/// Values of a cache line.
const LINE: usize = 16;

/// The right factor of products, (depth, columns), in panels of [`PANEL`] columns.
#[derive(Clone, Debug)]
pub struct Packed {
    /// (panels, depth); zero beyond the last column.
    rows: Vec<PanelRow>,
    depth: usize,
    columns: usize,
}

impl Packed {
    /// A factor of zeros.
    pub fn zeros(depth: usize, columns: usize) -> Self {
        Self { rows: vec![PanelRow::ZERO; depth * columns.div_ceil(PANEL)], depth, columns }
    }

    /// Packs `columns`, of `depth` contiguous values each.
    ///
    /// # Panics
    /// If `depth` is zero or does not divide the number of values.
    pub fn from_columns(columns: &[f32], depth: usize) -> Self {
        assert!(columns.len().is_multiple_of(depth));
        let mut packed = Self::zeros(depth, columns.len() / depth);
        for (panel, columns) in packed.rows.chunks_exact_mut(depth).zip(columns.chunks(PANEL * depth)) {
            // A cache line of each column at a time.
            for start in (0..depth).step_by(LINE) {
                let panel = &mut panel[start..depth.min(start + LINE)];
                for (index, column) in columns.chunks_exact(depth).enumerate() {
                    match (panel.first_chunk_mut::<LINE>(), column[start..].first_chunk::<LINE>()) {
                        (Some(panel), Some(column)) => {
                            for step in 0..LINE {
                                panel[step].0[index] = column[step];
                            }
                        }
                        _ => {
                            for (row, value) in panel.iter_mut().zip(&column[start..]) {
                                row.0[index] = *value;
                            }
                        }
                    }
                }
            }
        }
        packed
    }

    pub fn depth(&self) -> usize {
        self.depth
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The columns up to a whole panel: the length of a row of a product.
    pub fn padded_columns(&self) -> usize {
        self.columns.next_multiple_of(PANEL)
    }

    /// Gives the factor another depth and returns its panels, each of `depth` rows, to be filled anew.
    ///
    /// # Panics
    /// If `depth` is zero.
    pub fn refill(&mut self, depth: usize) -> impl Iterator<Item = &mut [PanelRow]> {
        self.depth = depth;
        self.rows.resize(depth * self.columns.div_ceil(PANEL), PanelRow::ZERO);
        self.rows.chunks_exact_mut(depth)
    }
}

/// `out = left * right`, on the calling thread: `left` row-major (rows, depth), `out` row-major (rows, padded columns).
///
/// ```
/// use bpo::gemm::{Packed, multiply};
///
/// let right = Packed::from_columns(&[1.0, 2.0, 3.0, 4.0], 2);
/// let mut product = vec![0.0; right.padded_columns()];
/// multiply(&[5.0, 6.0], &right, &mut product);
/// assert_eq!(product[..right.columns()], [17.0, 39.0]);
/// ```
///
/// # Panics
/// If a slice does not have the size that the right factor implies.
pub fn multiply(left: &[f32], right: &Packed, out: &mut [f32]) {
    assert_eq!(left.len() * right.padded_columns(), out.len() * right.depth);
    out.fill(0.0);
    multiply_add(Strided { values: left, stride: right.depth }, right, out);
}

/// `out += left * right`, on the calling thread, where `left` has at least the depth of `right` in each row. Cutting the
/// depth into several calls, in ascending order, gives the same bits as one.
///
/// # Panics
/// If a slice does not have the size that the right factor and the stride imply.
pub fn multiply_add(left: Strided, right: &Packed, out: &mut [f32]) {
    if out.is_empty() || right.depth == 0 {
        return;
    }
    let out_stride = right.padded_columns();
    let rows = out.len() / out_stride;
    assert_eq!(out.len(), rows * out_stride);
    assert!(right.depth <= left.stride || rows == 1);
    let copy = left.stride.is_multiple_of(CONFLICT) && !UNCOPIED.contains(&right.columns);
    let mut copied = vec![0.0; if copy { ROWS * COPY_STRIDE } else { 0 }];
    // Tiles of nearly the same number of rows, since one of few rows runs slower.
    let tiles = rows.div_ceil(ROWS);
    for start in (0..right.depth).step_by(DEPTH) {
        let depth = DEPTH.min(right.depth - start);
        for (group, panels) in right.rows.chunks(PANELS * right.depth).enumerate() {
            for tile in 0..tiles {
                let (first, end) = (tile * rows / tiles, (tile + 1) * rows / tiles);
                let mut left = Strided { values: &left.values[first * left.stride + start..], stride: left.stride };
                if copy {
                    for (row, copied) in copied.chunks_exact_mut(COPY_STRIDE).take(end - first).enumerate() {
                        copied[..depth].copy_from_slice(&left.values[row * left.stride..][..depth]);
                    }
                    left = Strided { values: &copied, stride: COPY_STRIDE };
                }
                for (panel, values) in panels.chunks_exact(right.depth).enumerate() {
                    let column = (group * PANELS + panel) * PANEL;
                    let out = &mut out[first * out_stride + column..];
                    let columns = PANEL.min(right.columns - column);
                    multiply_add_tile(left, end - first, &values[start..start + depth], columns, out, out_stride);
                }
            }
        }
    }
}
