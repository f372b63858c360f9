//! What is known of each pair, and which is the best.

use std::ops::Range;

use rayon::prelude::*;

use super::rows::{Copies, Product};
use crate::error::Result;
use crate::memory::{POINTS, build, chosen, filled, reserved};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::Limits;
use crate::simd::dots::dots;
use crate::simd::{add_scaled_to_float64, pair_products};

/// Pairs of one piece of work.
const PIECE: usize = 1 << 13;

/// Share of its own terms from which on the square of a sum is trusted: what is left of rounding is then below 1e-13 of it.
const TRUSTED_SHARE: f64 = 1e-3;

/// What rounding in float64 takes from a cosine, or from a product relative to the lengths, with room to spare.
const ROUNDING: f64 = 1e-12;

/// ⟨z, u⟩ and ‖z‖² of a pair.
#[derive(Clone, Copy, Debug, Default)]
struct Fixed {
    product: f64,
    square: f64,
}

/// ⟨S, u⟩ and ‖S‖² of a sum.
#[derive(Clone, Copy, Debug)]
pub struct State {
    product: f64,
    square: f64,
}

impl State {
    pub fn new(sum: &[f64], target: &[f64]) -> Self {
        let [product, square] = dots(sum, [target, sum]);
        Self { product, square }
    }

    /// The cosine of the sum and the target; none where the sum is zero.
    pub fn cosine(&self) -> Option<f64> {
        (self.square > 0.0).then(|| self.product / self.square.sqrt())
    }

    /// What the cosine of S + z and the target is at least and at most, given ⟨S, z⟩ but for its error; what is at most
    /// below `limit` may be anything below.
    fn bounds(&self, pair: Fixed, product: Product, limit: f64) -> [f64; 2] {
        let terms = self.square + pair.square;
        let middle = terms + 2.0 * product.value;
        let error = 2.0 * product.error + ROUNDING * terms;
        let (least, most) = (middle - error, middle + error);
        let numerator = self.product + pair.product;
        if least <= TRUSTED_SHARE * terms {
            return [f64::NEG_INFINITY, f64::INFINITY];
        }
        // Roots take time, and nearly all pairs are far below.
        if limit > 0.0 && (numerator <= 0.0 || numerator * numerator < limit * limit * least * (1.0 - ROUNDING)) {
            return [f64::NEG_INFINITY; 2];
        }
        let (short, long) = (numerator / least.sqrt(), numerator / most.sqrt());
        [short.min(long) - ROUNDING, short.max(long) + ROUNDING]
    }
}

/// The pairs of this process, which are all unless others share them.
pub struct Pairs<'a> {
    points: &'a Points<'a, 2>,
    target: &'a [f64],
    /// Which they are; what follows has an entry for each.
    own: Range<usize>,
    /// The rows that pairs are made of.
    rows: Copies<'a>,
    /// Where among these those of a pair are.
    places: Vec<[usize; 2]>,
    fixed: Vec<Fixed>,
    /// ⟨R, h⟩ of each row.
    products: Vec<Product>,
    /// Pairs that were not picked and may be, unless their prompts are full.
    open: Vec<bool>,
}

impl<'a> Pairs<'a> {
    pub fn new(
        points: &'a Points<'a, 2>,
        target: &'a [f64],
        limits: Limits,
        bytes: usize,
        progress: &Progress,
    ) -> Result<Self> {
        let own = points.own().points.clone();
        let fixed = fixed(points, target, progress)?;
        let (rows, places) = places(points, progress)?;
        let rows = Copies::new(points, rows, bytes, progress)?;
        let eligible = |place: usize| limits.eligible.is_none_or(|eligible| eligible[own.start + place]);
        Ok(Self {
            products: filled(rows.count(), Product::default(), POINTS)?,
            open: build(own.len(), POINTS, progress, eligible)?,
            own,
            points,
            target,
            rows,
            places,
            fixed,
        })
    }

    /// Writes a pair.
    pub fn write(&self, pair: usize, out: &mut [f64]) {
        let mut values = vec![0.0; out.len()];
        out.fill(0.0);
        let rows = self.points.rows_of_point(pair);
        for (row, coefficient) in rows.into_iter().zip(self.points.coefficients_float64(pair)) {
            add_scaled_to_float64(out, coefficient, self.points.rows().row(row, &mut values));
        }
    }

    /// Returns the pairs with the largest cosines of S + z and the target, `most` at most, of those that are open and not shut out,
    /// in order, and their vectors.
    pub fn best(
        &mut self,
        sum: &[f64],
        most: usize,
        shut_out: impl Fn(usize) -> bool + Sync,
        progress: &Progress,
    ) -> Result<Vec<(usize, Vec<f64>)>> {
        let state = State::new(sum, self.target);
        let rest: Vec<f64> = sum.iter().zip(self.target).map(|(sum, target)| sum - state.product * target).collect();
        self.rows.multiply(&rest, &mut self.products, progress)?;
        let pieces: Vec<Possible> = (0..self.open.len().div_ceil(PIECE))
            .into_par_iter()
            .map(|piece| {
                let places = piece * PIECE..self.open.len().min((piece + 1) * PIECE);
                let places = places.filter(|&place| self.open[place] && !shut_out(self.own.start + place));
                let possible = self.possible(state, most, places);
                progress.check().map(|()| possible)
            })
            .collect::<Result<_>>()?;
        let mut lowest = Lowest::new(most);
        pieces.iter().flat_map(|piece| &piece.lowest.values).for_each(|&value| lowest.add(value));
        lowest.settle();
        let candidates = pieces.iter().flat_map(|piece| &piece.uppers).filter(|(_, upper)| *upper >= lowest.limit);
        let candidates: Vec<usize> = candidates.map(|&(place, _)| self.own.start + place).collect();
        let mut cosines: Vec<(usize, f64)> = candidates
            .par_iter()
            .with_min_len(8)
            .map_init(
                || vec![0.0; sum.len()],
                |both, &pair| {
                    self.write(pair, both);
                    both.iter_mut().zip(sum).for_each(|(value, sum)| *value += sum);
                    let cosine = State::new(both, self.target).cosine().unwrap_or(f64::NEG_INFINITY);
                    progress.check().map(|()| (pair, cosine))
                },
            )
            .collect::<Result<_>>()?;
        // Ties: the lower pair, as the order of equals stays.
        cosines.sort_by(|left, right| right.1.total_cmp(&left.1));
        cosines.truncate(most);
        let best = self.of_all(&cosines, most)?;
        self.points.forget(self.points.own().tiles.clone());
        Ok(best)
    }

    /// Keeps a pair, which may be another process's, from being picked again.
    pub fn close(&mut self, pair: usize) {
        if self.own.contains(&pair) {
            self.open[pair - self.own.start] = false;
        }
    }

    /// The best pairs of all processes and their vectors, given those of this one and their cosines. Ties: the lower pair, which is
    /// that of the lower process. First all tell what they have, then those whose pairs are the best how these look.
    fn of_all(&self, own: &[(usize, f64)], most: usize) -> Result<Vec<(usize, Vec<f64>)>> {
        let dim = self.target.len();
        let said: Vec<f64> = own.iter().flat_map(|&(pair, cosine)| [pair as f64, cosine]).collect();
        let said = self.points.processes().gathered(&said)?;
        let of_process = said.iter().enumerate();
        let mut best: Vec<(usize, &[f64])> =
            of_process.flat_map(|(process, said)| said.chunks_exact(2).map(move |said| (process, said))).collect();
        best.sort_by(|left, right| right.1[1].total_cmp(&left.1[1]));
        best.truncate(most);
        let best: Vec<(usize, usize)> = best.into_iter().map(|(process, said)| (process, said[0] as usize)).collect();
        let mine = best.iter().filter(|(_, pair)| self.own.contains(pair)).count();
        let mut vectors = vec![0.0; mine * dim];
        let of_mine = best.iter().filter(|(_, pair)| self.own.contains(pair));
        vectors.chunks_exact_mut(dim).zip(of_mine).for_each(|(vector, &(_, pair))| self.write(pair, vector));
        let vectors = self.points.processes().gathered(&vectors)?;
        let mut next: Vec<_> = vectors.iter().map(|vectors| vectors.chunks_exact(dim)).collect();
        let vector = |(process, pair): (usize, usize)| next[process].next().map(|vector| (pair, vector.to_vec()));
        Ok(best.into_iter().filter_map(vector).collect())
    }

    /// The pairs, given by their places among those of this process, that may be among the best as far as the others among them
    /// tell.
    fn possible(&self, state: State, most: usize, places: impl Iterator<Item = usize>) -> Possible {
        let mut possible = Possible { lowest: Lowest::new(most), uppers: Vec::new() };
        let length = state.square.sqrt();
        for place in places {
            let [a, b] = self.points.coefficients_float64(self.own.start + place);
            let [chosen, rejected] = self.places[place].map(|row| self.products[row]);
            let fixed = self.fixed[place];
            let product = Product {
                value: state.product * fixed.product + a * chosen.value + b * rejected.value,
                error: a.abs() * chosen.error + b.abs() * rejected.error + ROUNDING * length * fixed.square.sqrt(),
            };
            let [lower, upper] = state.bounds(fixed, product, possible.lowest.limit);
            possible.lowest.add(lower);
            if upper >= possible.lowest.limit {
                possible.uppers.push((place, upper));
            }
        }
        possible
    }
}

/// Pairs that may be among the best.
struct Possible {
    lowest: Lowest,
    /// Their places, ascending, and what their cosines are at most.
    uppers: Vec<(usize, f64)>,
}

/// What the largest cosines are at least.
struct Lowest {
    most: usize,
    values: Vec<f64>,
    /// What the smallest of them is at least.
    limit: f64,
}

impl Lowest {
    fn new(most: usize) -> Self {
        Self { most, values: Vec::new(), limit: f64::NEG_INFINITY }
    }

    fn add(&mut self, value: f64) {
        if value > self.limit {
            self.values.push(value);
            if self.values.len() >= self.most + self.most / 2 {
                self.settle();
            }
        }
    }

    /// Keeps the largest ones, and tells the limit from them.
    fn settle(&mut self) {
        if self.values.len() >= self.most {
            let (_, limit, _) = self.values.select_nth_unstable_by(self.most - 1, |left, right| right.total_cmp(left));
            self.limit = *limit;
            self.values.truncate(self.most);
        }
    }
}

/// ⟨z, u⟩ and ‖z‖² of each pair of this process, without any cancellation.
fn fixed(points: &Points<2>, target: &[f64], progress: &Progress) -> Result<Vec<Fixed>> {
    let own = points.own();
    let mut fixed = filled(own.points.len(), Fixed::default(), POINTS)?;
    points.visit(own.tiles.clone(), fixed.as_mut_slice(), Vec::new, |gathered, _, tile, fixed| {
        let gathered = points.gather_or_borrow(tile, None, gathered);
        for (pair, fixed) in tile.points.clone().zip(fixed) {
            let terms = points.terms(pair, gathered);
            let [product, square] = pair_products(points.coefficients_float64(pair), terms, target);
            *fixed = Fixed { product, square };
        }
        progress.check()
    })?;
    match fixed.par_iter().position_first(|fixed| !fixed.square.is_finite()) {
        Some(place) => Err(points.not_finite(own.points.start + place)),
        None => Ok(fixed),
    }
}

/// The rows of the pairs of this process in ascending order, and where among these those of each pair are.
fn places(points: &Points<2>, progress: &Progress) -> Result<(Vec<usize>, Vec<[usize; 2]>)> {
    let mut place = filled(points.rows().count(), usize::MAX, POINTS)?;
    let tiles = &points.tiles()[points.own().tiles.clone()];
    for tile in tiles {
        points.rows_of(tile).iter().for_each(|&row| place[row] = 0);
    }
    progress.check()?;
    let rows = chosen(place.len(), POINTS, progress, |row| (place[row] == 0).then_some(row))?;
    rows.iter().enumerate().for_each(|(index, &row)| place[row] = index);
    let mut places = reserved(points.own().points.len(), POINTS)?;
    for tile in tiles {
        progress.check()?;
        let rows = points.rows_of(tile);
        places.extend(tile.points.clone().map(|pair| points.slots(pair).map(|slot| place[rows[slot]])));
    }
    Ok((rows, places))
}
