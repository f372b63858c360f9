//! Non-negative least squares that grow by a vector at a time, by the active set method of Lawson and Hanson.

use crate::error::Result;
use crate::memory::{PICKS, copied, push, reserved};
use crate::simd::add_scaled_float64;
use crate::simd::dots::dots;

/// Squared distance from the span of the others, relative to its squared length, below which a vector adds nothing.
const DEPENDENT: f64 = 1e-12;

/// Weights, none of them negative, of vectors whose weighted sum is closest to a target.
#[derive(Default)]
pub struct Fit {
    /// Inner products of each vector with those before it and itself, and with the target.
    products: Vec<Vec<f64>>,
    targets: Vec<f64>,
    /// Vectors with a positive weight, in the order of the factor's rows, and the weights.
    pub active: Vec<usize>,
    pub weights: Vec<f64>,
    /// The Cholesky factor of the active vectors' Gram matrix, row by row, and the target's solution with it.
    factor: Vec<Vec<f64>>,
    solution: Vec<f64>,
}

impl Fit {
    /// Adds a vector and fits the weights anew. Gradients up to `smallest` count as zero.
    ///
    /// # Errors
    /// If the memory cannot be had; then the fit is of no use any more.
    pub fn add(&mut self, products: Vec<f64>, target: f64, smallest: f64) -> Result<()> {
        push(&mut self.products, products, PICKS)?;
        push(&mut self.targets, target, PICKS)?;
        let mut entering = Some(self.targets.len() - 1);
        // Each turn lowers the distance, so none repeats; the limit only guards against rounding.
        for _ in 0..3 * self.targets.len() {
            let Some(vector) = entering else { break };
            if !self.enter(vector)? {
                break;
            }
            self.leave_negative()?;
            let gradient = |&vector: &usize| {
                let reached = |(&other, weight): (&usize, &f64)| self.product(vector, other) * weight;
                self.targets[vector] - self.active.iter().zip(&self.weights).map(reached).sum::<f64>()
            };
            let idle = (0..self.targets.len()).filter(|vector| !self.active.contains(vector));
            let best = idle.map(|vector| (gradient(&vector), vector)).max_by(|left, right| left.0.total_cmp(&right.0));
            entering = best
                .filter(|(gradient, vector)| *gradient > smallest && *vector != entering.unwrap_or(usize::MAX))
                .map(|(_, vector)| vector);
        }
        Ok(())
    }

    fn product(&self, left: usize, right: usize) -> f64 {
        self.products[left.max(right)][left.min(right)]
    }

    /// Appends a vector to the factor; returns whether it is independent of the active ones.
    fn enter(&mut self, vector: usize) -> Result<bool> {
        let mut row: Vec<f64> = reserved(self.active.len() + 1, PICKS)?;
        for (other, earlier) in self.active.iter().zip(&self.factor) {
            let rank = row.len();
            let [reached] = dots(&earlier[..rank], [&row]);
            row.push((self.product(vector, *other) - reached) / earlier[rank]);
        }
        let square = self.product(vector, vector);
        let rest = square - dots(&row, [&row])[0];
        if rest.is_nan() || rest <= DEPENDENT * square {
            return Ok(false);
        }
        let solved = (self.targets[vector] - dots(&row, [&self.solution])[0]) / rest.sqrt();
        row.push(rest.sqrt());
        push(&mut self.solution, solved, PICKS)?;
        push(&mut self.factor, row, PICKS)?;
        push(&mut self.active, vector, PICKS)?;
        push(&mut self.weights, 0.0, PICKS)?;
        Ok(true)
    }

    /// Goes from the weights towards those of least squares, and drops the vectors whose weights reach zero on the way.
    fn leave_negative(&mut self) -> Result<()> {
        loop {
            let free = self.least_squares()?;
            let reach = |(&from, &to): (&f64, &f64)| match to {
                ..=0.0 if from > 0.0 => from / (from - to),
                ..=0.0 => 0.0,
                _ => 1.0,
            };
            let blocking =
                self.weights.iter().zip(&free).map(reach).enumerate().min_by(|left, right| left.1.total_cmp(&right.1));
            let Some((vector, part)) = blocking.filter(|_| free.iter().any(|&weight| weight <= 0.0)) else {
                self.weights = free;
                return Ok(());
            };
            for (weight, free) in self.weights.iter_mut().zip(&free) {
                *weight += part * (free - *weight);
            }
            self.drop(vector)?;
        }
    }

    fn least_squares(&self) -> Result<Vec<f64>> {
        let mut weights = copied(&self.solution, PICKS)?;
        for (rank, row) in self.factor.iter().enumerate().rev() {
            weights[rank] /= row[rank];
            let (before, weight) = weights.split_at_mut(rank);
            add_scaled_float64(before, -weight[0], row);
        }
        Ok(weights)
    }

    /// Takes a row out of the factor and rotates the columns of those below it until they are triangular again.
    fn drop(&mut self, rank: usize) -> Result<()> {
        self.active.remove(rank);
        self.weights.remove(rank);
        self.factor.remove(rank);
        let mut rotations: Vec<[f64; 2]> = reserved(self.factor.len() - rank, PICKS)?;
        let rotate = |row: &mut [f64], rotations: &[[f64; 2]]| {
            for (column, [cosine, sine]) in (rank..).zip(rotations) {
                let (left, right) = (row[column], row[column + 1]);
                row[column] = cosine * left + sine * right;
                row[column + 1] = cosine * right - sine * left;
            }
        };
        for row in &mut self.factor[rank..] {
            rotate(row, &rotations);
            let column = row.len() - 2;
            let length = row[column].hypot(row[column + 1]);
            rotations.push([row[column] / length, row[column + 1] / length]);
            row.truncate(column + 1);
            row[column] = length;
        }
        rotate(&mut self.solution, &rotations);
        self.solution.pop();
        Ok(())
    }
}
