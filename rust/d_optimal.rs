//! Greedy D-optimal design: the pairs that most enlarge the determinant of A = λI + Σ v vᵀ.
//!
//! The choice of ADPO (arXiv 2503.01076) and ActiveDPO (arXiv 2505.19241): each step picks the pair with the largest
//! gain log(1 + vᵀA⁻¹v), the growth of log det A. A gain only ever falls, so one that was computed earlier is an upper
//! bound: Minoux, "Accelerated greedy algorithms for maximizing submodular set functions" (1978). The picks are those of
//! the plain greedy algorithm.
//!
//! Picks are made in rounds, whose work is matrix products. A round has the Cholesky factor L of A. It computes the gains
//! with the largest bounds anew, as ‖L⁻¹v‖² without any cancellation, until enough of the largest are exact. Among these
//! candidates it runs a pivoted Cholesky elimination of their Gram matrix vᵀA⁻¹v', which is the Sherman–Morrison update
//! restricted to them, for as long as the best of them beats every bound outside. Then the picks are added to A, and L is
//! computed from A anew, so errors do not pile up over rounds.
//!
//! For E gains computed, B picks in rounds of b out of C candidates, and P pairs of dimension d it takes
//! O(E d² + (B/b)(d³ + C²d) + B d² + P(d + log P)) time, and 8 d² + O(P + Cd) bytes. E is at least P in the worst case
//! of equal lengths in all directions, and times larger there; far less where lengths differ.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;

use crate::cholesky::{Triangle, zeros};
use crate::error::{Error, Result};
use crate::memory::{POINTS, chosen, filled};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::{Depths, Limits};
use crate::simd::block::{Lanes, SIDE, squared_norms};
use crate::simd::dots::dots;
use crate::simd::{add_scaled_float64, to_float64};

/// Dimensions at most: the two triangles then take half a gibibyte.
pub const MAX_DIM: usize = 8192;

/// Pairs that are solved for together: their solutions, of up to 1024 values, fill a second-level cache of 512 KiB.
const CHUNK: usize = 4 * SIDE;

/// Candidates of a round. Few make the factorization dominate, many the Gram matrix; between them a round takes as many
/// as let about a third be picked.
const CANDIDATES: (usize, usize) = (64, 1024);

/// Candidates for each pair that the round before picked.
const CANDIDATES_PER_PICK: usize = 3;

/// Rounding that the elimination of a round may leave in a gain, relative to the gain before the round.
const ROUNDING: f64 = 1e-12;

/// The pairs picked, in order.
#[derive(Clone, Debug)]
pub struct Design {
    pub picks: Vec<usize>,
    /// log(1 + vᵀA⁻¹v) of each pick, A being the matrix before it.
    pub gains: Vec<f64>,
}

/// Picks at most `budget` pairs, fewer only if the limits leave fewer. A is `regularization` times the identity first;
/// ties go to the lower pair.
///
/// ```
/// use bpo::d_optimal::d_optimal;
/// use bpo::matrix::{Rows, Values};
/// use bpo::points::Points;
/// use bpo::progress::Progress;
/// use bpo::prompts::Limits;
///
/// let rows = Rows::new(Values::F32(&[1.0, 0.0, 2.0, 0.0, 0.0, 1.0]), 3, 2)?;
/// let pairs = Points::from_pairs(rows, &[[0, 0], [1, 1], [2, 2]], &[[1.0, 0.0]; 3], &Progress::default())?;
/// let found = d_optimal(&pairs, 2, 1.0, Limits::default(), &Progress::default())?;
/// assert_eq!(found.picks, [1, 2]); // the longest, then the one that goes elsewhere
/// assert!((found.gains[0] - 5f64.ln()).abs() < 1e-12 && (found.gains[1] - 2f64.ln()).abs() < 1e-12);
/// # Ok::<(), bpo::Error>(())
/// ```
///
/// # Errors
/// If shapes do not fit, the dimension is above [`MAX_DIM`] or its matrices do not fit into memory, the regularization is
/// not positive, a row is not finite, or the computation was cancelled.
pub fn d_optimal(
    points: &Points<2>,
    budget: usize,
    regularization: f64,
    limits: Limits,
    progress: &Progress,
) -> Result<Design> {
    let dim = points.dim();
    if dim == 0 || dim > MAX_DIM {
        let expected = format!("(n, d) with d in 1..={MAX_DIM}, for two float64 triangles of d * d * 4 bytes");
        return Err(Error::shape("rows", expected, format!("(n, {dim})")));
    }
    if !(regularization > 0.0 && regularization.is_finite()) {
        return Err(Error::argument("regularization", "finite and above 0", regularization));
    }
    limits.check(points.count())?;
    let budget = budget.min(points.count());
    progress.start(budget);
    let mut pool = Pool::new(points, budget, regularization, limits, progress)?;
    let mut matrix = Triangle::zeros(dim)?;
    let mut factor = Triangle::zeros(dim)?;
    matrix.set_diagonal(regularization);
    factor.set_diagonal(regularization.sqrt());
    let mut design = Design { picks: Vec::new(), gains: Vec::new() };
    let mut wanted = CANDIDATES.0;
    while design.picks.len() < budget {
        let left = budget - design.picks.len();
        let candidates = pool.candidates(points, &factor, wanted.min(2 * left), progress)?;
        if candidates.is_empty() {
            break;
        }
        let vectors = solutions(points, &factor, &candidates, progress)?;
        let picked = pool.eliminate(&vectors, &candidates, left, &mut design, progress)?;
        wanted = (CANDIDATES_PER_PICK * picked).clamp(CANDIDATES.0, CANDIDATES.1);
        if design.picks.len() < budget {
            let picks = &design.picks[design.picks.len() - picked..];
            add_squares(points, picks, &mut matrix, progress)?;
            factor.copy_from(&matrix);
            factor.factor(progress)?;
        }
    }
    progress.finish();
    Ok(design)
}

/// The bits of a number that is not negative: they order as the numbers do.
type Bound = u64;

/// Pairs that may still be picked.
struct Pool {
    /// Upper bounds of vᵀA⁻¹v; ties go to the lower pair.
    bounds: BinaryHeap<(Bound, Reverse<usize>)>,
    /// The round whose A a bound is exact for.
    rounds: Vec<u32>,
    round: u32,
    depths: Option<Depths>,
}

impl Pool {
    fn new(
        points: &Points<2>,
        budget: usize,
        regularization: f64,
        limits: Limits,
        progress: &Progress,
    ) -> Result<Self> {
        let mut squares = filled(points.count(), 0.0, POINTS)?;
        let start = || (Vec::new(), vec![0.0; points.dim()], vec![0.0; points.dim()]);
        points.visit(
            0..points.tiles().len(),
            squares.as_mut_slice(),
            start,
            |(gathered, values, doubles), _, tile, squares| {
                let gathered = points.gather_or_borrow(tile, None, gathered);
                for (pair, square) in tile.points.clone().zip(squares) {
                    points.write(pair, gathered, values);
                    to_float64(values, doubles);
                    *square = dots(doubles, [doubles])[0];
                }
                progress.check()
            },
        )?;
        if let Some(pair) = squares.iter().position(|square| !square.is_finite()) {
            return Err(points.not_finite(pair));
        }
        let eligible = |pair: usize| budget > 0 && limits.eligible.is_none_or(|eligible| eligible[pair]);
        let bound = |pair: usize| (squares[pair] / regularization * (1.0 + ROUNDING)).to_bits();
        let entry = |pair: usize| eligible(pair).then(|| (bound(pair), Reverse(pair)));
        let bounds = chosen(points.count(), POINTS, progress, entry)?;
        Ok(Self {
            bounds: bounds.into(),
            rounds: filled(points.count(), 0, POINTS)?,
            round: 0,
            depths: Depths::new(limits, progress)?,
        })
    }

    fn full(&self, pair: usize) -> bool {
        self.depths.as_ref().is_some_and(|depths| depths.full(pair))
    }

    /// Takes out pairs with exact gains, at least `wanted` of them if there are as many, such that no gain of a pair left
    /// inside is above all of theirs. Begins a round.
    fn candidates(
        &mut self,
        points: &Points<2>,
        factor: &Triangle,
        wanted: usize,
        progress: &Progress,
    ) -> Result<Vec<usize>> {
        self.round += 1;
        let mut candidates = Vec::new();
        let mut stale = Vec::new();
        // Of the candidates; a stale bound popped before may turn out to be above.
        let mut best = None;
        while !self.bounds.is_empty() && (candidates.len() < wanted || self.bounds.peek() > best.as_ref()) {
            stale.clear();
            while stale.len() < CANDIDATES.1
                && (candidates.len() < wanted || self.bounds.peek() > best.as_ref())
                && let Some(top) = self.bounds.pop()
            {
                let Reverse(pair) = top.1;
                if self.full(pair) {
                    continue;
                }
                if self.rounds[pair] == self.round {
                    best = best.max(Some(top));
                    candidates.push(pair);
                } else {
                    stale.push(pair);
                }
            }
            let gains: Vec<Vec<f64>> = stale
                .par_chunks(CHUNK)
                .map(|pairs| {
                    let groups = solutions_of_chunk(points, factor, pairs)?;
                    progress.check()?;
                    Ok(groups.chunks_exact(factor.rows()).flat_map(squared_norms).collect())
                })
                .collect::<Result<_>>()?;
            points.forget(0..points.tiles().len());
            for (&pair, gain) in stale.chunks(CHUNK).zip(&gains).flat_map(|(pairs, gains)| pairs.iter().zip(gains)) {
                self.rounds[pair] = self.round;
                self.bounds.push((gain.to_bits(), Reverse(pair)));
            }
        }
        Ok(candidates)
    }

    /// Picks the best candidate again and again while it beats every bound inside, `limit` times at most; puts the rest
    /// back. `vectors` holds L⁻¹v of the candidates in groups of 16. Returns how many were picked.
    fn eliminate(
        &mut self,
        vectors: &[Lanes],
        candidates: &[usize],
        limit: usize,
        design: &mut Design,
        progress: &Progress,
    ) -> Result<usize> {
        let count = candidates.len();
        let mut gram = Triangle::zeros(count)?;
        gram.add_products(vectors, vectors.len() / count.div_ceil(SIDE), progress)?;
        let before: Vec<f64> = (0..count).map(|index| gram.get(index, index)).collect();
        let mut gains = before.clone();
        let mut open: Vec<usize> = (0..count).collect();
        let mut columns: Vec<Vec<f64>> = Vec::new();
        while columns.len() < limit {
            open.retain(|&candidate| !self.full(candidates[candidate]));
            let rank = |&candidate: &usize| (gains[candidate].to_bits(), Reverse(candidates[candidate]));
            let Some((place, best)) = open.iter().copied().enumerate().max_by_key(|(_, candidate)| rank(candidate))
            else {
                break;
            };
            // The first pick left the heap before all that is inside.
            if !columns.is_empty() && self.bounds.peek().is_some_and(|outside| *outside > rank(&best)) {
                break;
            }
            open.swap_remove(place);
            let pair = candidates[best];
            if let Some(depths) = &mut self.depths {
                depths.count(pair);
            }
            design.picks.push(pair);
            design.gains.push(gains[best].ln_1p());
            let mut column: Vec<f64> = (0..count)
                .map(|other| if other < best { gram.get(best, other) } else { gram.get(other, best) })
                .collect();
            for earlier in &columns {
                add_scaled_float64(&mut column, -earlier[best], earlier);
            }
            let scale = (1.0 + gains[best]).sqrt().recip();
            for (gain, value) in gains.iter_mut().zip(&mut column) {
                *value *= scale;
                *gain = (*gain - *value * *value).max(0.0);
            }
            columns.push(column);
            progress.advance(1)?;
        }
        let rest = open.into_iter().map(|candidate| {
            let bound = gains[candidate] + ROUNDING * before[candidate];
            (bound.to_bits(), Reverse(candidates[candidate]))
        });
        self.bounds.extend(rest);
        Ok(columns.len())
    }
}

/// L⁻¹v of each pair, in groups of 16.
fn solutions(points: &Points<2>, factor: &Triangle, pairs: &[usize], progress: &Progress) -> Result<Vec<Lanes>> {
    let mut groups = zeros(pairs.len().div_ceil(SIDE) * factor.rows())?;
    groups.par_chunks_mut(CHUNK / SIDE * factor.rows()).zip(pairs.par_chunks(CHUNK)).try_for_each(
        |(groups, pairs)| {
            write(points, pairs, groups, factor.rows());
            factor.solve(groups);
            progress.check()
        },
    )?;
    Ok(groups)
}

fn solutions_of_chunk(points: &Points<2>, factor: &Triangle, pairs: &[usize]) -> Result<Vec<Lanes>> {
    let mut groups = zeros(pairs.len().div_ceil(SIDE) * factor.rows())?;
    write(points, pairs, &mut groups, factor.rows());
    factor.solve(&mut groups);
    Ok(groups)
}

/// Writes pairs in groups of 16, of `rows` rows each, of which the first are written.
fn write(points: &Points<2>, pairs: &[usize], groups: &mut [Lanes], rows: usize) {
    let (mut row, mut values) = (vec![0.0; points.dim()], vec![0.0; points.dim()]);
    for (pairs, group) in pairs.chunks(SIDE).zip(groups.chunks_exact_mut(rows)) {
        for (lane, &pair) in pairs.iter().enumerate() {
            if let Some(&next) = pairs.get(lane + 1) {
                points.prefetch(points.tile_of(next), next);
            }
            let values = points.read_unscaled(points.tile_of(pair), pair, &mut row, &mut values);
            for (row, &value) in group.iter_mut().zip(values) {
                row.0[lane] = f64::from(value);
            }
        }
    }
}

/// Adds v vᵀ of each pair to the matrix.
fn add_squares(points: &Points<2>, pairs: &[usize], matrix: &mut Triangle, progress: &Progress) -> Result<()> {
    let mut columns = zeros(matrix.rows() / SIDE * pairs.len())?;
    let mut values = vec![0.0; points.dim()];
    for (index, &pair) in pairs.iter().enumerate() {
        points.write_alone(pair, &mut values);
        for (group, values) in values.chunks(SIDE).enumerate() {
            for (out, &value) in columns[group * pairs.len() + index].0.iter_mut().zip(values) {
                *out = f64::from(value);
            }
        }
    }
    matrix.add_products(&columns, pairs.len(), progress)
}
