//! What is known of each pair, and which is the best.

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

/// All pairs.
pub struct Pairs<'a> {
    points: &'a Points<'a, 2>,
    target: &'a [f64],
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
        let fixed = fixed(points, target, progress)?;
        let (rows, places) = places(points, progress)?;
        let rows = Copies::new(points, rows, bytes, progress)?;
        let eligible = |pair: usize| limits.eligible.is_none_or(|eligible| eligible[pair]);
        Ok(Self {
            products: filled(rows.count(), Product::default(), POINTS)?,
            open: build(points.count(), POINTS, progress, eligible)?,
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

    /// Takes out the pair with the largest cosine of S + z and the target, of those that are open and not `full`.
    pub fn best(
        &mut self,
        sum: &[f64],
        full: impl Fn(usize) -> bool + Sync,
        progress: &Progress,
    ) -> Result<Option<usize>> {
        let state = State::new(sum, self.target);
        let rest: Vec<f64> = sum.iter().zip(self.target).map(|(sum, target)| sum - state.product * target).collect();
        self.rows.multiply(&rest, &mut self.products, progress)?;
        let possible: Vec<Possible> = (0..self.open.len().div_ceil(PIECE))
            .into_par_iter()
            .map(|piece| {
                let pairs = piece * PIECE..self.open.len().min((piece + 1) * PIECE);
                let possible = self.possible(state, pairs.filter(|&pair| self.open[pair] && !full(pair)));
                progress.check().map(|()| possible)
            })
            .collect::<Result<_>>()?;
        let lowest = possible.iter().map(|piece| piece.lowest).fold(f64::NEG_INFINITY, f64::max);
        let candidates = possible.iter().flat_map(|piece| &piece.uppers).filter(|(_, upper)| *upper >= lowest);
        let candidates: Vec<usize> = candidates.map(|&(pair, _)| pair).collect();
        let cosines: Vec<f64> = candidates
            .par_iter()
            .with_min_len(8)
            .map_init(
                || vec![0.0; sum.len()],
                |both, &pair| {
                    self.write(pair, both);
                    both.iter_mut().zip(sum).for_each(|(value, sum)| *value += sum);
                    progress.check().map(|()| State::new(both, self.target).cosine().unwrap_or(f64::NEG_INFINITY))
                },
            )
            .collect::<Result<_>>()?;
        self.points.forget(0..self.points.tiles().len());
        let mut best: Option<(usize, f64)> = None;
        for (&pair, &cosine) in candidates.iter().zip(&cosines) {
            if best.is_none_or(|(_, best)| cosine > best) {
                best = Some((pair, cosine));
            }
        }
        if let Some((pair, _)) = best {
            self.open[pair] = false;
        }
        Ok(best.map(|(pair, _)| pair))
    }

    /// The pairs that may be the best as far as the others among them tell.
    fn possible(&self, state: State, pairs: impl Iterator<Item = usize>) -> Possible {
        let mut possible = Possible { lowest: f64::NEG_INFINITY, uppers: Vec::new() };
        let length = state.square.sqrt();
        for pair in pairs {
            let [a, b] = self.points.coefficients_float64(pair);
            let [chosen, rejected] = self.places[pair].map(|place| self.products[place]);
            let fixed = self.fixed[pair];
            let product = Product {
                value: state.product * fixed.product + a * chosen.value + b * rejected.value,
                error: a.abs() * chosen.error + b.abs() * rejected.error + ROUNDING * length * fixed.square.sqrt(),
            };
            let [lower, upper] = state.bounds(fixed, product, possible.lowest);
            possible.lowest = possible.lowest.max(lower);
            if upper >= possible.lowest {
                possible.uppers.push((pair, upper));
            }
        }
        possible
    }
}

/// Pairs that may be the best.
struct Possible {
    /// What the largest cosine is at least.
    lowest: f64,
    /// The pairs, ascending, and what their cosines are at most.
    uppers: Vec<(usize, f64)>,
}

/// ⟨z, u⟩ and ‖z‖² of each pair, without any cancellation.
fn fixed(points: &Points<2>, target: &[f64], progress: &Progress) -> Result<Vec<Fixed>> {
    let mut fixed = filled(points.count(), Fixed::default(), POINTS)?;
    points.visit(0..points.tiles().len(), fixed.as_mut_slice(), Vec::new, |gathered, _, tile, fixed| {
        let gathered = points.gather_or_borrow(tile, None, gathered);
        for (pair, fixed) in tile.points.clone().zip(fixed) {
            let terms = points.terms(pair, gathered);
            let [product, square] = pair_products(points.coefficients_float64(pair), terms, target);
            *fixed = Fixed { product, square };
        }
        progress.check()
    })?;
    match fixed.par_iter().position_first(|fixed| !fixed.square.is_finite()) {
        Some(pair) => Err(points.not_finite(pair)),
        None => Ok(fixed),
    }
}

/// The rows of pairs in ascending order, and where among these those of each pair are.
fn places(points: &Points<2>, progress: &Progress) -> Result<(Vec<usize>, Vec<[usize; 2]>)> {
    let mut place = filled(points.rows().count(), usize::MAX, POINTS)?;
    for tile in points.tiles() {
        points.rows_of(tile).iter().for_each(|&row| place[row] = 0);
    }
    progress.check()?;
    let rows = chosen(place.len(), POINTS, progress, |row| (place[row] == 0).then_some(row))?;
    rows.iter().enumerate().for_each(|(index, &row)| place[row] = index);
    let mut places = reserved(points.count(), POINTS)?;
    for tile in points.tiles() {
        progress.check()?;
        let rows = points.rows_of(tile);
        places.extend(tile.points.clone().map(|pair| points.slots(pair).map(|slot| place[rows[slot]])));
    }
    Ok((rows, places))
}
