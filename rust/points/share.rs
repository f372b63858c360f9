//! Which of the points each of several processes has.

use std::ops::Range;

use super::{Points, Tile};
use crate::exchange::Processes;

/// Blocks of tiles: fixed, so that sums fold alike on any number of threads and of processes, each of which has whole ones.
pub const BLOCKS: usize = 64;

/// What one process has of the points.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    pub blocks: Range<usize>,
    pub tiles: Range<usize>,
    pub points: Range<usize>,
}

impl Share {
    /// Of one of `size` processes. Beyond as many as there are blocks, some have nothing.
    pub fn of(tiles: &[Tile], rank: usize, size: usize) -> Self {
        let blocks = BLOCKS.min(tiles.len());
        let blocks = rank * blocks / size..(rank + 1) * blocks / size;
        let first = |block: usize| Self::block(tiles.len(), block).start;
        let tile_range = first(blocks.start)..first(blocks.end);
        let point = |tile: usize| match tiles.get(tile) {
            Some(tile) => tile.points.start,
            None => tiles.last().map_or(0, |tile| tile.points.end),
        };
        Self { points: point(tile_range.start)..point(tile_range.end), tiles: tile_range, blocks }
    }

    /// The tiles of a block; from the last one on, the end.
    pub(super) fn block(tiles: usize, block: usize) -> Range<usize> {
        let blocks = BLOCKS.min(tiles).max(1);
        block * tiles / blocks..(block + 1) * tiles / blocks
    }
}

impl<'a, const TERMS: usize> Points<'a, TERMS> {
    /// Shares the points with other processes, which were given the same ones: this one reads the rows of its own only.
    #[must_use]
    pub fn shared(mut self, processes: Processes<'a>) -> Self {
        self.own = Share::of(&self.tiles, processes.rank(), processes.size());
        self.processes = processes;
        self
    }

    pub fn processes(&self) -> Processes<'a> {
        self.processes
    }

    /// What of the points is this process's.
    pub fn own(&self) -> &Share {
        &self.own
    }

    /// The points after the last one of each process.
    pub fn ends(&self) -> Vec<usize> {
        let size = self.processes.size();
        (0..size).map(|rank| Share::of(&self.tiles, rank, size).points.end).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_all_points_one_after_the_other() {
        for count in (0..200).step_by(7).chain([1, 63, 64, 65, 129]) {
            let tiles: Vec<Tile> = (0..count).map(|tile| Tile { points: 3 * tile..3 * tile + 3, rows: 0..0 }).collect();
            for size in [1, 2, 3, 5, 64, 70] {
                let shares: Vec<Share> = (0..size).map(|rank| Share::of(&tiles, rank, size)).collect();
                let (mut tile, mut block) = (0, 0);
                for share in &shares {
                    assert_eq!((share.tiles.start, share.blocks.start), (tile, block));
                    assert_eq!(share.points, 3 * share.tiles.start..3 * share.tiles.end);
                    let blocks = share.blocks.clone().map(|block| Share::block(count, block));
                    assert_eq!(blocks.map(|tiles| tiles.len()).sum::<usize>(), share.tiles.len());
                    (tile, block) = (share.tiles.end, share.blocks.end);
                }
                assert_eq!((tile, block), (count, BLOCKS.min(count)));
            }
        }
    }
}
