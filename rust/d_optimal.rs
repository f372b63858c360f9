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
//! O(E d² + (B/b)(d³ + C²d) + B d² + P(d + log P)) time, and 16 d² + O(P + Cd) bytes. E is at least P in the worst case
//! of equal lengths in all directions, and times larger there; far less where lengths differ.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rayon::prelude::*;

use crate::cholesky::{self, CHUNK};
use crate::error::{Error, Result};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::{Depths, Limits};
use crate::simd::dots::{Grid, add_products, dots};
use crate::simd::{add_scaled_float64, to_float64};

/// Dimensions at most: the two matrices then take a gibibyte.
pub const MAX_DIM: usize = 8192;

/// Blocks of tiles: fixed, as in every pass over the pairs.
const BLOCKS: usize = 64;

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
        let expected = format!("(n, d) with d in 1..={MAX_DIM}, for two float64 matrices of d * d * 8 bytes");
        return Err(Error::shape("rows", expected, format!("(n, {dim})")));
    }
    if !(regularization > 0.0 && regularization.is_finite()) {
        return Err(Error::argument("regularization", "finite and above 0", regularization));
    }
    limits.check(points.count())?;
    let budget = budget.min(points.count());
    progress.start(budget);
    let mut pool = Pool::new(points, budget, regularization, limits, progress)?;
    let mut matrix = cholesky::zeros(dim)?;
    let mut factor = cholesky::zeros(dim)?;
    for index in 0..dim {
        matrix[index * (dim + 1)] = regularization;
        factor[index * (dim + 1)] = regularization.sqrt();
    }
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
            factor.copy_from_slice(&matrix);
            cholesky::factor(&mut factor, dim, progress)?;
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
        let dim = points.dim();
        let start = || (Vec::new(), vec![0.0; dim], vec![0.0; dim]);
        let blocks =
            points.fold_blocks(BLOCKS, &Progress::default(), start, |(squares, values, doubles), tile, gathered| {
                for pair in tile.points.clone() {
                    points.write(pair, gathered, values);
                    to_float64(values, doubles);
                    squares.push(dots(doubles, [doubles])[0]);
                }
            })?;
        progress.check()?;
        let squares: Vec<f64> = blocks.into_iter().flat_map(|(squares, ..)| squares).collect();
        if let Some(pair) = squares.iter().position(|square| !square.is_finite()) {
            return Err(points.not_finite(pair));
        }
        let eligible = |pair: &usize| budget > 0 && limits.eligible.is_none_or(|eligible| eligible[*pair]);
        let bound = |pair: usize| (squares[pair] / regularization * (1.0 + ROUNDING)).to_bits();
        let bounds: Vec<_> = (0..points.count()).filter(eligible).map(|pair| (bound(pair), Reverse(pair))).collect();
        Ok(Self {
            bounds: bounds.into(),
            rounds: vec![0; points.count()],
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
        factor: &[f64],
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
                    let rows = solutions_of_chunk(points, factor, pairs);
                    progress.check()?;
                    Ok(rows.chunks_exact(points.dim()).map(|row| dots(row, [row])[0]).collect())
                })
                .collect::<Result<_>>()?;
            points.forget(0..points.tiles().len());
            for (&pair, gain) in stale.iter().zip(gains.into_iter().flatten()) {
                self.rounds[pair] = self.round;
                self.bounds.push((gain.to_bits(), Reverse(pair)));
            }
        }
        Ok(candidates)
    }

    /// Picks the best candidate again and again while it beats every bound inside, `limit` times at most; puts the rest
    /// back. `vectors` holds L⁻¹v of each candidate. Returns how many were picked.
    fn eliminate(
        &mut self,
        vectors: &[f64],
        candidates: &[usize],
        limit: usize,
        design: &mut Design,
        progress: &Progress,
    ) -> Result<usize> {
        let count = candidates.len();
        let dim = vectors.len() / count;
        let mut gram = vec![0.0; count * count];
        let all = Grid::new(vectors, count, dim);
        gram.par_chunks_mut(CHUNK * count).zip(vectors.par_chunks(CHUNK * dim)).try_for_each(|(gram, rows)| {
            add_products(1.0, Grid::new(rows, rows.len() / dim, dim), all, dim, gram, count);
            progress.check()
        })?;
        let before: Vec<f64> = (0..count).map(|index| gram[index * count + index]).collect();
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
            let mut column = gram[best * count..(best + 1) * count].to_vec();
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

/// L⁻¹v of each pair, row by row.
fn solutions(points: &Points<2>, factor: &[f64], pairs: &[usize], progress: &Progress) -> Result<Vec<f64>> {
    let chunks: Vec<Vec<f64>> = pairs
        .par_chunks(CHUNK)
        .map(|pairs| progress.check().map(|()| solutions_of_chunk(points, factor, pairs)))
        .collect::<Result<_>>()?;
    Ok(chunks.concat())
}

fn solutions_of_chunk(points: &Points<2>, factor: &[f64], pairs: &[usize]) -> Vec<f64> {
    let dim = points.dim();
    let mut rows = vec![0.0; pairs.len() * dim];
    let mut values = vec![0.0; dim];
    for (&pair, row) in pairs.iter().zip(rows.chunks_exact_mut(dim)) {
        points.write_float64(pair, &mut values, row);
    }
    cholesky::solve(factor, dim, &mut rows);
    rows
}

/// Adds v vᵀ of each pair to the lower triangle of the matrix.
fn add_squares(points: &Points<2>, pairs: &[usize], matrix: &mut [f64], progress: &Progress) -> Result<()> {
    let dim = points.dim();
    let count = pairs.len();
    let mut columns = vec![0.0; dim * count];
    let mut values = vec![0.0; dim];
    for (index, &pair) in pairs.iter().enumerate() {
        points.write_alone(pair, &mut values);
        for (row, &value) in values.iter().enumerate() {
            columns[row * count + index] = f64::from(value);
        }
    }
    matrix.par_chunks_mut(CHUNK * dim).enumerate().try_for_each(|(chunk, rows)| {
        let (first, end) = (chunk * CHUNK, dim.min((chunk + 1) * CHUNK));
        let left = Grid::new(&columns[first * count..], end - first, count);
        add_products(1.0, left, Grid::new(&columns, end, count), count, rows, dim);
        progress.check()
    })
}
