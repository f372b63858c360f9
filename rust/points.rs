//! Points that are sums of scaled rows, visited tile by tile.
//!
//! A dense point is one row; a preference pair is two, `a * h_chosen + b * h_rejected`. Pairs are never stored as
//! vectors: the 28 pairs of a prompt with 8 responses need 8 rows, which a tile gathers once.

use std::collections::HashMap;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::matrix::Rows;
use crate::progress::Progress;
use crate::simd;

/// Distinct rows of a tile. 256 rows fill the registers and caches of a matrix product; more gained nothing.
const TILE_ROWS: usize = 256;

/// Points of a tile: bounds the work between two looks at the cancel token.
const TILE_POINTS: usize = 4096;

/// Consecutive points, and where the distinct rows that they need are listed.
#[derive(Debug)]
pub struct Tile {
    pub points: Range<usize>,
    rows: Range<usize>,
}

/// Points, each the sum of `TERMS` scaled rows.
#[derive(Debug)]
pub struct Points<'a, const TERMS: usize> {
    rows: Rows<'a>,
    coefficients: Vec<[f32; TERMS]>,
    /// Where the terms of a point lie among the rows gathered for its tile.
    slots: Vec<[u16; TERMS]>,
    tiles: Vec<Tile>,
    tile_rows: Vec<usize>,
    /// Subtracted from every gathered row.
    origin: Option<Vec<f32>>,
}

impl<'a> Points<'a, 1> {
    /// Every row is a point.
    pub fn from_rows(rows: Rows<'a>) -> Self {
        Self::new(rows, vec![[1.0]; rows.count()], |point| [point])
    }
}

impl<'a> Points<'a, 2> {
    /// Pair `p` is `coefficients[p][0] * rows[pairs[p][0]] + coefficients[p][1] * rows[pairs[p][1]]`.
    ///
    /// # Errors
    /// If the two lists differ in length, or a pair refers to a row that is not there, or a coefficient is not finite.
    pub fn from_pairs(rows: Rows<'a>, pairs: &[[i64; 2]], coefficients: &[[f32; 2]]) -> Result<Self> {
        if pairs.len() != coefficients.len() {
            let expected = format!("({}, 2), as `pairs` has", pairs.len());
            return Err(Error::shape("coefficients", expected, format!("({}, 2)", coefficients.len())));
        }
        for (pair, indices) in pairs.iter().enumerate() {
            if let Some(&row) = indices.iter().find(|&&row| row < 0 || row as u64 >= rows.count() as u64) {
                return Err(Error::RowOutOfRange { pair, row, rows: rows.count() });
            }
        }
        if let Some(index) = coefficients.as_flattened().iter().position(|value| !value.is_finite()) {
            let value = f64::from(coefficients.as_flattened()[index]);
            return Err(Error::NotFinite { array: "coefficients", index: index / 2, value });
        }
        Ok(Self::new(rows, coefficients.to_vec(), |pair| pairs[pair].map(|row| row as usize)))
    }
}

impl<'a, const TERMS: usize> Points<'a, TERMS> {
    /// Cuts the points into tiles. The cuts depend on the points alone.
    fn new(rows: Rows<'a>, coefficients: Vec<[f32; TERMS]>, terms: impl Fn(usize) -> [usize; TERMS]) -> Self {
        let count = coefficients.len();
        let mut slots = Vec::with_capacity(count);
        let mut tiles = Vec::new();
        let mut tile_rows = Vec::new();
        let mut slot_of_row = HashMap::with_capacity(TILE_ROWS + TERMS);
        let (mut first_point, mut first_row) = (0, 0);
        for point in 0..count {
            let full = tile_rows.len() - first_row + TERMS > TILE_ROWS || point - first_point == TILE_POINTS;
            if full {
                tiles.push(Tile { points: first_point..point, rows: first_row..tile_rows.len() });
                (first_point, first_row) = (point, tile_rows.len());
                slot_of_row.clear();
            }
            slots.push(terms(point).map(|row| {
                *slot_of_row.entry(row).or_insert_with(|| {
                    tile_rows.push(row);
                    (tile_rows.len() - 1 - first_row) as u16
                })
            }));
        }
        if first_point < count {
            tiles.push(Tile { points: first_point..count, rows: first_row..tile_rows.len() });
        }
        Self { rows, coefficients, slots, tiles, tile_rows, origin: None }
    }

    pub fn count(&self) -> usize {
        self.coefficients.len()
    }

    pub fn dim(&self) -> usize {
        self.rows.dim()
    }

    pub fn tiles(&self) -> &[Tile] {
        &self.tiles
    }

    pub fn coefficients(&self, point: usize) -> [f32; TERMS] {
        self.coefficients[point]
    }

    pub fn slots(&self, point: usize) -> [usize; TERMS] {
        self.slots[point].map(usize::from)
    }

    /// Multiplies each point by its factor.
    pub fn scale(&mut self, factors: &[f32]) {
        for (coefficients, factor) in self.coefficients.iter_mut().zip(factors) {
            *coefficients = coefficients.map(|coefficient| coefficient * factor);
        }
    }

    /// Measures rows from `origin` on. It moves the points alike only if the coefficients of each sum to one.
    pub fn set_origin(&mut self, origin: Vec<f32>) {
        self.origin = Some(origin);
    }

    /// Writes the distinct rows of a tile, less the origin, one after the other.
    pub fn gather(&self, tile: &Tile, gathered: &mut Vec<f32>) {
        gathered.resize(tile.rows.len() * self.dim(), 0.0);
        for (&row, out) in self.tile_rows[tile.rows.clone()].iter().zip(gathered.chunks_exact_mut(self.dim())) {
            self.rows.copy_row(row, out);
            if let Some(origin) = &self.origin {
                simd::subtract(out, origin);
            }
        }
    }

    /// The rows of a point among those gathered for its tile.
    pub fn terms<'g>(&self, point: usize, gathered: &'g [f32]) -> [&'g [f32]; TERMS] {
        self.slots(point).map(|slot| &gathered[slot * self.dim()..(slot + 1) * self.dim()])
    }

    /// Writes a point of the tile whose rows were gathered.
    pub fn write(&self, point: usize, gathered: &[f32], out: &mut [f32]) {
        simd::combine(out, self.coefficients[point], self.terms(point, gathered));
    }

    /// Writes any one point.
    pub fn write_alone(&self, point: usize, out: &mut [f32]) {
        let tile = &self.tiles[self.tiles.partition_point(|tile| tile.points.end <= point)];
        let rows = &self.tile_rows[tile.rows.clone()];
        let mut gathered = vec![0.0; TERMS * self.dim()];
        for (slot, row) in self.slots(point).into_iter().zip(gathered.chunks_exact_mut(self.dim())) {
            self.rows.copy_row(rows[slot], row);
            if let Some(origin) = &self.origin {
                simd::subtract(row, origin);
            }
        }
        let mut terms = gathered.chunks_exact(self.dim());
        simd::combine(out, self.coefficients[point], std::array::from_fn(|_| terms.next().expect("one for each term")));
    }

    /// Cuts the tiles into at most `limit` blocks, gives each block a state, and shows it the block's tiles in order
    /// together with their gathered rows. Returns the states in the order of the blocks.
    ///
    /// Blocks run in parallel; as neither the cuts nor the order within a block depend on the number of threads,
    /// neither does any result that is folded in block order.
    pub fn fold_blocks<State: Send>(
        &self,
        limit: usize,
        progress: &Progress,
        start: impl Fn() -> State + Sync,
        visit: impl Fn(&mut State, &Tile, &[f32]) + Sync,
    ) -> Result<Vec<State>> {
        let blocks = limit.min(self.tiles.len());
        (0..blocks)
            .into_par_iter()
            .map(|block| {
                let tiles = &self.tiles[block * self.tiles.len() / blocks..(block + 1) * self.tiles.len() / blocks];
                let mut state = start();
                let mut gathered = Vec::new();
                for tile in tiles {
                    self.gather(tile, &mut gathered);
                    visit(&mut state, tile, &gathered);
                    progress.advance(1)?;
                }
                Ok(state)
            })
            .collect()
    }

    /// The error for a point whose norm is not finite or too large: the first of its rows that is not finite, else an
    /// overflow.
    pub fn not_finite(&self, point: usize) -> Error {
        let tile = &self.tiles[self.tiles.partition_point(|tile| tile.points.end <= point)];
        let mut values = vec![0.0; self.dim()];
        for slot in self.slots(point) {
            let row = self.tile_rows[tile.rows.clone()][slot];
            self.rows.copy_row(row, &mut values);
            if values.iter().any(|value| !value.is_finite()) {
                return Error::NonFiniteRow { array: "rows", row };
            }
        }
        Error::Overflow { point }
    }
}
