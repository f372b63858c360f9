//! The nearest centroid of each point.

use crate::gemm::{PANEL, Packed, multiply};
use crate::points::{Points, Tile};
use crate::simd;

/// Centroids, row-major, with what the expanded distance needs of them.
#[derive(Debug)]
pub struct Centroids {
    pub values: Vec<f32>,
    packed: Packed,
    /// ‖c‖²/2.
    half_norms: Vec<f32>,
    dim: usize,
}

impl Centroids {
    pub fn new(values: Vec<f32>, dim: usize) -> Self {
        let half_norms: Vec<f32> =
            values.chunks_exact(dim).map(|centroid| simd::dot(centroid, centroid) / 2.0).collect();
        Self { packed: Packed::from_columns(&values, dim), values, half_norms, dim }
    }

    pub fn count(&self) -> usize {
        self.half_norms.len()
    }

    pub fn row(&self, cluster: usize) -> &[f32] {
        &self.values[cluster * self.dim..(cluster + 1) * self.dim]
    }
}

/// The products of a tile's distinct rows with the centroids; reused from tile to tile.
#[derive(Debug, Default)]
pub struct Products {
    values: Vec<f32>,
}

impl Products {
    pub fn compute(&mut self, gathered: &[f32], centroids: &Centroids) {
        self.values.resize(gathered.len() / centroids.dim * centroids.packed.padded_columns(), 0.0);
        multiply(gathered, &centroids.packed, &mut self.values);
    }

    /// ⟨hₜ, c⟩ with every centroid c, for each term of a point.
    fn terms<const TERMS: usize>(&self, slots: [usize; TERMS], clusters: usize) -> [&[f32]; TERMS] {
        slots.map(|slot| &self.values[slot * clusters.next_multiple_of(PANEL)..][..clusters])
    }
}

/// The nearest centroid of each point of a tile and the squared distance to it, in point order; ties go to the lower
/// cluster.
///
/// The expanded form can come out below zero when a point lies on its centroid, so it is clamped.
pub fn assign_tile<const TERMS: usize>(
    points: &Points<TERMS>,
    tile: &Tile,
    squared_norms: &[f32],
    products: &Products,
    centroids: &Centroids,
) -> impl Iterator<Item = (usize, f32)> {
    tile.points.clone().map(move |point| {
        let terms = products.terms(points.slots(point), centroids.count());
        let (cluster, lowest) = simd::lowest(&centroids.half_norms, points.coefficients(point), terms);
        (cluster, (squared_norms[point] + 2.0 * lowest).max(0.0))
    })
}

/// The squared distances of one point to every centroid, in the expanded form.
pub fn squared_distances<const TERMS: usize>(
    points: &Points<TERMS>,
    point: usize,
    squared_norm: f32,
    products: &Products,
    centroids: &Centroids,
    distances: &mut [f32],
) {
    let coefficients = points.coefficients(point);
    let terms = products.terms(points.slots(point), centroids.count());
    for (cluster, distance) in distances.iter_mut().enumerate() {
        let product: f32 = (0..TERMS).map(|term| coefficients[term] * terms[term][cluster]).sum();
        *distance = (squared_norm + 2.0 * (centroids.half_norms[cluster] - product)).max(0.0);
    }
}
