//! How the tiles are visited in parallel.

use std::ops::Range;

use rayon::prelude::*;

use super::{Points, Share, Tile};
use crate::error::Result;
use crate::memory::{self, POINTS};
use crate::progress::Progress;

/// Something for each of consecutive points.
pub trait Entries: Send + Sized {
    /// Those of the first `count` points, and the rest.
    fn cut(self, count: usize) -> (Self, Self);
}

impl Entries for () {
    fn cut(self, _: usize) -> ((), ()) {
        ((), ())
    }
}

impl<T: Send> Entries for &mut [T] {
    fn cut(self, count: usize) -> (Self, Self) {
        self.split_at_mut(count)
    }
}

impl<One: Entries, Other: Entries> Entries for (One, Other) {
    fn cut(self, count: usize) -> (Self, Self) {
        let (one, other) = (self.0.cut(count), self.1.cut(count));
        ((one.0, other.0), (one.1, other.1))
    }
}

impl<const TERMS: usize> Points<'_, TERMS> {
    /// Shows `visit` every tile of a range with the entries of `data` that belong to its points, in parallel; the
    /// results come in the order of the tiles. `data` begins with the first point of the range.
    pub fn visit<State, Data: Entries, Output: Send>(
        &self,
        tiles: Range<usize>,
        mut data: Data,
        start: impl Fn() -> State + Sync + Send,
        visit: impl Fn(&mut State, usize, &Tile, Data) -> Result<Output> + Sync + Send,
    ) -> Result<Vec<Output>> {
        self.room(0)?;
        let mut tasks = memory::reserved(tiles.len(), POINTS)?;
        for index in tiles {
            let tile = &self.tiles[index];
            let (entries, rest) = data.cut(tile.points.len());
            tasks.push((index, tile, entries));
            data = rest;
        }
        let visit = |state: &mut State, (index, tile, entries): (usize, &Tile, Data)| {
            let output = visit(state, index, tile, entries);
            self.forget(index..index + 1);
            output
        };
        tasks.into_par_iter().with_max_len(1).map_init(start, visit).collect()
    }

    /// Gives each block of tiles of this process a state, and shows it the block's tiles in order. Returns the states in the
    /// order of the blocks.
    ///
    /// Blocks run in parallel; as neither the cuts nor the order within a block depend on the number of threads or of
    /// processes, neither does any result that is folded in block order.
    pub fn fold_blocks<State: Send>(
        &self,
        progress: &Progress,
        start: impl Fn() -> State + Sync,
        visit: impl Fn(&mut State, &Tile) + Sync,
    ) -> Result<Vec<State>> {
        self.fill_blocks((), progress, start, |state, tile, ()| visit(state, tile))
    }

    /// As [`Points::fold_blocks`], and shows a tile the entries of `data` that belong to its points. `data` begins with the
    /// first point of this process.
    pub fn fill_blocks<State: Send, Data: Entries>(
        &self,
        mut data: Data,
        progress: &Progress,
        start: impl Fn() -> State + Sync,
        visit: impl Fn(&mut State, &Tile, Data) + Sync,
    ) -> Result<Vec<State>> {
        self.room(0)?;
        let mut tasks = Vec::with_capacity(self.own.blocks.len());
        for block in self.own.blocks.clone() {
            let tiles = Share::block(self.tiles.len(), block);
            let (own, rest) = data.cut(self.tiles[tiles.clone()].iter().map(|tile| tile.points.len()).sum());
            tasks.push((tiles, own));
            data = rest;
        }
        let run = |(tiles, mut data): (Range<usize>, Data)| {
            let mut state = start();
            for index in tiles {
                let tile = &self.tiles[index];
                let (own, rest) = data.cut(tile.points.len());
                visit(&mut state, tile, own);
                data = rest;
                self.forget(index..index + 1);
                progress.advance(1)?;
            }
            Ok(state)
        };
        tasks.into_par_iter().map(run).collect()
    }
}
