//! How much of a mapped file stays in memory while its rows are worked on, and whether there is room for the work.

use std::ops::Range;

use super::{Points, TILE_ROWS};
use crate::error::Result;
use crate::memory::{self, TILES};

/// Bytes of a mapped file that are held before they are forgotten.
const WINDOW_BYTES: usize = 64 << 20;

/// Tiles for each thread that are worked on at least before that.
const WINDOW_TILES: usize = 4;

impl<const TERMS: usize> Points<'_, TERMS> {
    /// Asks whether every thread can have the rows of a tile twice, and `more` bytes for each row, at the same time.
    ///
    /// # Errors
    /// [`crate::Error::Memory`].
    pub fn room(&self, more: usize) -> Result<()> {
        let row = (2 * size_of::<f32>()).saturating_mul(self.dim()).saturating_add(more);
        let rows = TILE_ROWS.min(TERMS * self.count()) * rayon::current_num_threads().min(self.tiles.len());
        memory::room(row.saturating_mul(rows), TILES)
    }

    /// Lets rows of a mapped file that belong to some tiles leave the memory of this process, with those between them.
    pub fn forget(&self, tiles: Range<usize>) {
        if self.rows.mapped() {
            self.rows.forget(self.span(tiles));
        }
    }

    /// How many rows may be read before those of a mapped file are forgotten.
    pub fn rows_at_once(&self) -> usize {
        (WINDOW_BYTES / self.rows.row_bytes()).max(1)
    }

    /// From the least to the greatest row of some tiles.
    fn span(&self, tiles: Range<usize>) -> Range<usize> {
        let rows = self.tiles[tiles].iter().flat_map(|tile| self.rows_of(tile));
        let (least, most) = rows.fold((usize::MAX, 0), |(least, most), &row| (least.min(row), most.max(row + 1)));
        least..most
    }

    /// How many tiles from `first` on can be worked on before their rows are forgotten: `most`, but of a mapped file no
    /// more than lie within some megabytes, and at least a few for each thread.
    pub fn window(&self, first: usize, most: usize) -> usize {
        let most = most.min(self.tiles.len() - first);
        if !self.rows.mapped() {
            return most;
        }
        let least = (WINDOW_TILES * rayon::current_num_threads()).min(most);
        let mut window = self.span(first..first + least);
        (least..most)
            .find(|&count| {
                let tile = self.span(first + count..first + count + 1);
                window = window.start.min(tile.start)..window.end.max(tile.end);
                window.len() * self.rows.row_bytes() > WINDOW_BYTES
            })
            .unwrap_or(most)
    }
}
