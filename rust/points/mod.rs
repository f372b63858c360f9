//! Points that are sums of scaled rows, visited tile by tile.
//!
//! A dense point is one row; a preference pair is two, `a * h_chosen + b * h_rejected`. Pairs are never stored as
//! vectors: the 28 pairs of a prompt with 8 responses need 8 rows, which a tile gathers once.

mod residency;
mod share;
mod visit;

use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::exchange::Processes;
use crate::matrix::Rows;
use crate::memory::{self, PIECE, POINTS};
use crate::progress::Progress;
use crate::simd;
pub use share::{BLOCKS, Share};

/// Distinct rows of a tile: 18 times the 14 rows that the largest matrix kernel takes at once. It fills the registers and
/// caches of a product; more gained nothing.
const TILE_ROWS: usize = 252;

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
    /// What every point is multiplied by; a power of two.
    scale: f32,
    /// Where the terms of a point lie among the rows gathered for its tile.
    slots: Vec<[u16; TERMS]>,
    tiles: Vec<Tile>,
    tile_rows: Vec<usize>,
    /// How much each point counts; one for each if none.
    weights: Option<Vec<f32>>,
    /// Who shares them, and what of them this process has.
    processes: Processes<'a>,
    own: Share,
}

impl<'a> Points<'a, 1> {
    /// Every row is a point.
    ///
    /// # Errors
    /// As [`memory::build`].
    pub fn from_rows(rows: Rows<'a>, progress: &Progress) -> Result<Self> {
        Self::from_order(rows, memory::build(rows.count(), POINTS, progress, |row| row)?, progress)
    }

    /// Point i is row `order[i]`.
    ///
    /// # Errors
    /// As [`memory::build`].
    pub fn from_order(rows: Rows<'a>, order: Vec<usize>, progress: &Progress) -> Result<Self> {
        let count = order.len();
        let tile = |tile: usize| {
            let points = tile * TILE_ROWS..((tile + 1) * TILE_ROWS).min(count);
            Tile { rows: points.clone(), points }
        };
        let slot = |point: usize| [(point % TILE_ROWS) as u16];
        let tiles = memory::build(count.div_ceil(TILE_ROWS), POINTS, progress, tile)?;
        Ok(Self {
            rows,
            coefficients: memory::build(count, POINTS, progress, |_| [1.0])?,
            scale: 1.0,
            slots: memory::build(count, POINTS, progress, slot)?,
            own: Share::of(&tiles, 0, 1),
            tiles,
            tile_rows: order,
            weights: None,
            processes: Processes::default(),
        })
    }

    /// Lets the point of row i count as much as `weights[i]` points.
    ///
    /// # Errors
    /// If there is not one weight for each row, or one is negative or not finite, or all are zero; or as
    /// [`memory::build`].
    pub fn set_weights(&mut self, weights: &[f32], progress: &Progress) -> Result<()> {
        let count = self.rows.count();
        if weights.len() != count {
            return Err(Error::shape("sample_weight", format!("({count},)"), format!("({},)", weights.len())));
        }
        let wrong = |row: usize| !(weights[row].is_finite() && weights[row] >= 0.0);
        if let Some(index) = memory::first(count, progress, wrong)? {
            return Err(Error::Weight { array: "sample_weight", index, value: f64::from(weights[index]) });
        }
        if memory::first(count, progress, |row| weights[row] > 0.0)?.is_none() {
            return Err(Error::argument("sample_weight", "positive somewhere", "zero everywhere"));
        }
        self.weights = Some(memory::build(count, POINTS, progress, |point| weights[self.tile_rows[point]])?);
        Ok(())
    }
}

impl<'a> Points<'a, 2> {
    /// Pair `p` is `coefficients[p][0] * rows[pairs[p][0]] + coefficients[p][1] * rows[pairs[p][1]]`.
    ///
    /// # Errors
    /// If the two lists differ in length, or a pair refers to a row that is not there, or a coefficient is not finite; or
    /// as [`memory::build`].
    pub fn from_pairs(
        rows: Rows<'a>,
        pairs: &[[i64; 2]],
        coefficients: &[[f32; 2]],
        progress: &Progress,
    ) -> Result<Self> {
        if rows.dim() == 0 {
            return Err(Error::shape("rows", "(n, d) with d >= 1", format!("({}, 0)", rows.count())));
        }
        if pairs.len() != coefficients.len() {
            let expected = format!("({}, 2), as `pairs` has", pairs.len());
            return Err(Error::shape("coefficients", expected, format!("({}, 2)", coefficients.len())));
        }
        let count = rows.count();
        let terms = |pair: usize| {
            let there = |row: i64| row >= 0 && (row as u64) < count as u64;
            let [chosen, rejected] = pairs[pair];
            (there(chosen) && there(rejected)).then_some([chosen as usize, rejected as usize])
        };
        let outside = |pair: usize| {
            let row = pairs[pair].into_iter().find(|&row| row < 0 || row as u64 >= count as u64).unwrap_or(-1);
            Error::RowOutOfRange { pair, row, rows: count }
        };
        if let Some(pair) = memory::first(pairs.len(), progress, |pair| terms(pair).is_none())? {
            return Err(outside(pair));
        }
        let values = memory::build(pairs.len(), POINTS, progress, |pair| coefficients[pair])?;
        let infinite = |pair: usize| values[pair].iter().position(|value| !value.is_finite());
        if let Some(row) = memory::first(pairs.len(), progress, |pair| infinite(pair).is_some())? {
            let column = infinite(row).unwrap_or_default();
            let value = f64::from(values[row][column]);
            return Err(Error::NonFiniteRow { array: "coefficients", row, column, value });
        }
        // They are checked once more where they are used: another thread may have changed them.
        Self::new(rows, values, terms, progress).map_err(|error| match error {
            Error::Changed { point } => outside(point),
            other => other,
        })
    }
}

impl<'a, const TERMS: usize> Points<'a, TERMS> {
    /// The array whose rows are the points.
    pub const ARRAY: &'static str = if TERMS == 1 { "rows" } else { "pairs" };

    /// Cuts the points into tiles. The cuts depend on the points alone. `terms` has none for a point that changed.
    fn new(
        rows: Rows<'a>,
        coefficients: Vec<[f32; TERMS]>,
        mut terms: impl FnMut(usize) -> Option<[usize; TERMS]>,
        progress: &Progress,
    ) -> Result<Self> {
        let count = coefficients.len();
        let mut slots = memory::reserved(count, POINTS)?;
        let mut tiles = memory::reserved(1, POINTS)?;
        let mut tile_rows = memory::reserved(TILE_ROWS, POINTS)?;
        // The tile that last listed a row, counted from one, and where. A table is ten times as fast as hashing.
        let mut listed: Vec<(u32, u16)> = memory::build(rows.count(), POINTS, progress, |_| (0, 0))?;
        let (mut first_point, mut first_row) = (0, 0);
        for point in 0..count {
            let full = tile_rows.len() - first_row + TERMS > TILE_ROWS || point - first_point == TILE_POINTS;
            if full {
                sort_slots(&mut slots[first_point..], &mut tile_rows[first_row..]);
                tiles.push(Tile { points: first_point..point, rows: first_row..tile_rows.len() });
                (first_point, first_row) = (point, tile_rows.len());
                memory::grow(&mut tiles, 1, POINTS)?;
                memory::grow(&mut tile_rows, TILE_ROWS, POINTS)?;
                progress.check()?;
            }
            let tile = tiles.len() as u32 + 1;
            slots.push(terms(point).ok_or(Error::Changed { point })?.map(|row| {
                if listed[row].0 != tile {
                    listed[row] = (tile, (tile_rows.len() - first_row) as u16);
                    tile_rows.push(row);
                }
                listed[row].1
            }));
        }
        if first_point < count {
            sort_slots(&mut slots[first_point..], &mut tile_rows[first_row..]);
            tiles.push(Tile { points: first_point..count, rows: first_row..tile_rows.len() });
        }
        let (processes, own) = (Processes::default(), Share::of(&tiles, 0, 1));
        Ok(Self { rows, coefficients, scale: 1.0, slots, tiles, tile_rows, weights: None, processes, own })
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

    /// What the rows of a point are multiplied by.
    pub fn coefficients(&self, point: usize) -> [f32; TERMS] {
        self.coefficients[point].map(|coefficient| self.scale * coefficient)
    }

    /// The same where float32 cannot hold it.
    pub fn coefficients_float64(&self, point: usize) -> [f64; TERMS] {
        self.coefficients[point].map(|coefficient| f64::from(self.scale) * f64::from(coefficient))
    }

    pub fn slots(&self, point: usize) -> [usize; TERMS] {
        self.slots[point].map(usize::from)
    }

    /// Multiplies each point by its factor.
    ///
    /// # Errors
    /// If a coefficient leaves the range of float32, or the computation was cancelled.
    pub fn multiply(&mut self, factors: &[f32], progress: &Progress) -> Result<()> {
        self.coefficients.par_chunks_mut(PIECE).zip(factors.par_chunks(PIECE)).try_for_each(
            |(coefficients, factors)| {
                for (coefficients, factor) in coefficients.iter_mut().zip(factors) {
                    *coefficients = coefficients.map(|coefficient| coefficient * factor);
                }
                progress.check()
            },
        )?;
        let infinite = |point: usize| !self.coefficients[point].iter().all(|coefficient| coefficient.is_finite());
        match memory::first(self.count(), progress, infinite)? {
            Some(point) => Err(Error::TooShort { array: Self::ARRAY, point: self.number(point) }),
            None => Ok(()),
        }
    }

    /// What every point is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Multiplies every point by a power of two, which takes nothing from what it is where float32 still holds it.
    pub fn set_scale(&mut self, scale: f32) {
        self.scale = scale;
    }

    pub fn weighted(&self) -> bool {
        self.weights.is_some()
    }

    /// Some of the points, given in ascending order. Weights are left behind, and so are other processes.
    ///
    /// # Errors
    /// As [`memory::build`].
    pub fn subset(&self, chosen: &[usize], progress: &Progress) -> Result<Self> {
        let coefficients = memory::build(chosen.len(), POINTS, progress, |index| self.coefficients[chosen[index]])?;
        let mut tile = 0;
        let terms = |index: usize| {
            let point = chosen[index];
            while self.tiles[tile].points.end <= point {
                tile += 1;
            }
            let rows = self.rows_of(&self.tiles[tile]);
            Some(self.slots(point).map(|slot| rows[slot]))
        };
        Ok(Self { scale: self.scale, ..Self::new(self.rows, coefficients, terms, progress)? })
    }

    pub fn weight(&self, point: usize) -> f64 {
        self.weights.as_ref().map_or(1.0, |weights| f64::from(weights[point]))
    }

    pub fn rows(&self) -> &Rows<'a> {
        &self.rows
    }

    /// The distinct rows that a tile needs, in the order of their slots.
    pub fn rows_of(&self, tile: &Tile) -> &[usize] {
        &self.tile_rows[tile.rows.clone()]
    }

    /// The rows of any one point.
    pub fn rows_of_point(&self, point: usize) -> [usize; TERMS] {
        let rows = self.rows_of(self.tile_of(point));
        self.slots(point).map(|slot| rows[slot])
    }

    /// Writes the distinct rows of a tile one after the other.
    pub fn gather(&self, tile: &Tile, gathered: &mut Vec<f32>) {
        gathered.resize(tile.rows.len() * self.dim(), 0.0);
        for (&row, out) in self.rows_of(tile).iter().zip(gathered.chunks_exact_mut(self.dim())) {
            self.rows.copy_row(row, out);
        }
    }

    /// The distinct rows of a tile one after the other, measured from `origin`: where they lie already so, or gathered.
    pub fn gather_or_borrow<'g>(
        &'g self,
        tile: &Tile,
        origin: Option<&[f32]>,
        gathered: &'g mut Vec<f32>,
    ) -> &'g [f32] {
        let rows = self.rows_of(tile);
        if origin.is_none()
            && rows.windows(2).all(|rows| rows[1] == rows[0] + 1)
            && let Some(rows) = self.rows.adjacent(rows[0], rows.len())
        {
            return rows;
        }
        self.gather(tile, gathered);
        if let Some(origin) = origin {
            gathered.chunks_exact_mut(origin.len()).for_each(|row| simd::subtract(row, origin));
        }
        gathered
    }

    /// The rows of a point among those gathered for its tile.
    pub fn terms<'g>(&self, point: usize, gathered: &'g [f32]) -> [&'g [f32]; TERMS] {
        self.slots(point).map(|slot| &gathered[slot * self.dim()..(slot + 1) * self.dim()])
    }

    /// Writes a point of the tile whose rows were gathered.
    pub fn write(&self, point: usize, gathered: &[f32], out: &mut [f32]) {
        simd::combine(out, self.coefficients[point], self.terms(point, gathered));
        if self.scale != 1.0 {
            simd::multiply(out, self.scale);
        }
    }

    /// A point of `tile`: the row itself where it is one in float32, else written to `values`. `scratch` holds a row.
    pub fn read<'v>(&'v self, tile: &Tile, point: usize, scratch: &'v mut [f32], values: &'v mut [f32]) -> &'v [f32] {
        self.read_times(self.scale, tile, point, scratch, values)
    }

    /// As [`Points::read`], without [`Points::scale`].
    pub fn read_unscaled<'v>(
        &'v self,
        tile: &Tile,
        point: usize,
        scratch: &'v mut [f32],
        values: &'v mut [f32],
    ) -> &'v [f32] {
        self.read_times(1.0, tile, point, scratch, values)
    }

    /// The sum is made first, and then scaled: so what a point is does not depend on the scale.
    fn read_times<'v>(
        &'v self,
        scale: f32,
        tile: &Tile,
        point: usize,
        scratch: &'v mut [f32],
        values: &'v mut [f32],
    ) -> &'v [f32] {
        let rows = self.rows_of(tile);
        let mut terms = self.slots(point).into_iter().map(|slot| rows[slot]).zip(self.coefficients[point]);
        let (row, coefficient) = terms.next().expect("a point has a term");
        if TERMS == 1 && coefficient == 1.0 {
            if scale == 1.0 {
                return self.rows.row(row, values);
            }
            simd::scale(values, scale, self.rows.row(row, scratch));
            return values;
        }
        simd::scale(values, coefficient, self.rows.row(row, scratch));
        for (row, coefficient) in terms {
            simd::add_scaled(values, coefficient, self.rows.row(row, scratch));
        }
        if scale != 1.0 {
            simd::multiply(values, scale);
        }
        values
    }

    /// Asks for the rows of a point, which will be read soon.
    pub fn prefetch(&self, tile: &Tile, point: usize) {
        let rows = self.rows_of(tile);
        self.slots(point).into_iter().for_each(|slot| self.rows.prefetch(rows[slot]));
    }

    /// What a caller knows a point by: its row where it is one, else its place among the pairs.
    pub fn number(&self, point: usize) -> usize {
        if TERMS == 1 { self.rows_of(self.tile_of(point))[self.slots(point)[0]] } else { point }
    }

    /// The tile of a point.
    pub fn tile_of(&self, point: usize) -> &Tile {
        &self.tiles[self.tiles.partition_point(|tile| tile.points.end <= point)]
    }

    /// Writes any one point, without [`Points::scale`].
    pub fn write_alone(&self, point: usize, out: &mut [f32]) {
        let (mut scratch, mut values) = (vec![0.0; self.dim()], vec![0.0; self.dim()]);
        out.copy_from_slice(self.read_unscaled(self.tile_of(point), point, &mut scratch, &mut values));
    }

    /// Writes any one point in float64; `values` is where it is added up, in float32.
    pub fn write_float64(&self, point: usize, values: &mut [f32], out: &mut [f64]) {
        self.write_alone(point, values);
        simd::to_float64(values, out);
    }

    /// The error for a point whose norm is not finite or too large: the first of its rows that is not finite, else an
    /// overflow.
    pub fn not_finite(&self, point: usize) -> Error {
        let rows = self.rows_of(self.tile_of(point));
        let mut values = vec![0.0; self.dim()];
        for slot in self.slots(point) {
            let row = rows[slot];
            self.rows.copy_row(row, &mut values);
            if let Some(column) = values.iter().position(|value| !value.is_finite()) {
                return Error::NonFiniteRow { array: "rows", row, column, value: f64::from(values[column]) };
            }
        }
        Error::Overflow { array: Self::ARRAY, point: self.number(point) }
    }

    /// The error for a point that was looked at before and is another one now: what is wrong with it, if anything is.
    pub fn changed(&self, point: usize) -> Error {
        match self.not_finite(point) {
            Error::Overflow { .. } => Error::Changed { point: self.number(point) },
            error => error,
        }
    }
}

/// Puts the rows of a tile in ascending order, and the slots of its points with them: rows that follow one another in
/// memory, as those of whole prompts do, need not be gathered.
fn sort_slots<const TERMS: usize>(slots: &mut [[u16; TERMS]], rows: &mut [usize]) {
    if rows.is_sorted() {
        return;
    }
    let mut order: Vec<(usize, u16)> = rows.iter().copied().zip(0..).collect();
    order.sort_unstable();
    let mut moved = vec![0; rows.len()];
    for (slot, (row, (sorted, old))) in (0..).zip(rows.iter_mut().zip(order)) {
        *row = sorted;
        moved[usize::from(old)] = slot;
    }
    slots.as_flattened_mut().iter_mut().for_each(|slot| *slot = moved[usize::from(*slot)]);
}
