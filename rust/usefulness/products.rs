//! The inner products that the scores of the pairs of a tile are made of, each computed once.

use std::ops::{Range, RangeInclusive};

use crate::error::Result;
use crate::matrix::AlignedRows;
use crate::memory::{CENTROIDS, TILES, reserved, room};
use crate::points::{Points, Tile};
use crate::simd;
use crate::simd::dots::dots;

/// Smallest share of its own terms at which an expanded square is trusted. A share of 1/16 costs a length at most a factor
/// of 16 over the rounding of one inner product (measured: 1.2e-6 relative at 1024 values, 1.7e-6 at 8192); pairs of rows
/// whose cosine is up to 0.94 stay on the fast path.
const TRUSTED_SHARE: f64 = 1.0 / 16.0;

/// Squared norms whose products neither overflow nor lose digits to subnormal numbers.
pub const TRUSTED_SQUARES: RangeInclusive<f32> = 7.9e-31..=1.2e30;

/// Vectors that a row is multiplied with at once: a load of the row serves four products. With two a product took 1.1
/// times as long, with eight 1.2 times.
const BATCH: usize = 4;

/// What pairs are scored against.
pub struct Target<'a> {
    pub centroids: &'a Centroids,
    pub labels: &'a [i32],
    pub direction: &'a [f32],
}

pub struct Centroids {
    rows: AlignedRows,
    pub squares: Vec<f32>,
    pub inverse_norms: Vec<f64>,
}

impl Centroids {
    /// # Errors
    /// If the memory cannot be had: that of [`Products`] of all threads is asked for here.
    pub fn new(values: &[f32], dim: usize) -> Result<Self> {
        let count = values.len() / dim;
        room(size_of_val(values), CENTROIDS)?;
        let mut rows = AlignedRows::default();
        rows.resize(count, dim);
        values
            .chunks_exact(dim)
            .enumerate()
            .for_each(|(index, centroid)| rows.row_mut(index).copy_from_slice(centroid));
        let mut squares: Vec<f32> = reserved(count, CENTROIDS)?;
        squares.extend(values.chunks_exact(dim).map(|centroid| simd::dot(centroid, centroid)));
        let inverse = |(centroid, &square): (&[f32], &f32)| {
            let exact = TRUSTED_SQUARES.contains(&square);
            let square = if exact { f64::from(square) } else { simd::squared_norm_float64(centroid) };
            if square > 0.0 { square.sqrt().recip() } else { 0.0 }
        };
        let mut inverse_norms = reserved(count, CENTROIDS)?;
        inverse_norms.extend(values.chunks_exact(dim).zip(&squares).map(inverse));
        room((count * size_of::<Known>()).saturating_mul(rayon::current_num_threads()), TILES)?;
        Ok(Self { rows, squares, inverse_norms })
    }

    pub fn row(&self, cluster: usize) -> &[f32] {
        self.rows.row(cluster)
    }
}

/// A product that a row of the tile is needed for, and where it goes.
#[derive(Clone, Copy, Debug, Default)]
struct Request {
    /// A slot of the tile for the partner of a pair, else a cluster.
    with: u32,
    /// The pair within the tile.
    index: u32,
    place: Place,
}

/// Which of the products of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Place {
    #[default]
    Partner = 0,
    ChosenCentroid = 1,
    RejectedCentroid = 2,
}

/// A row, and the place of a product among its own.
type Known = (usize, u32);

/// The products of a tile's rows that its pairs need, each computed once; reused from tile to tile.
pub struct Products {
    /// Requests of the slots, one slot after the other, and where those of a slot end.
    requests: Vec<Request>,
    ends: Vec<usize>,
    /// For each slot the last one that it shares a pair with, or an earlier one.
    last_partners: Vec<usize>,
    /// The rows of consecutive slots that no pair leaves, as those of a prompt, which meet in a first-level cache.
    group: AlignedRows,
    /// For each cluster the last row that was multiplied with it, and the product's place among those of the row.
    memo: Vec<Known>,
    /// Rows looked at so far.
    rows: usize,
    /// Of the last of them, and where among these each request finds its own.
    products: Vec<f32>,
    sources: Vec<u32>,
    /// Of each slot: ‖h‖² and ⟨h, u⟩.
    squares: Vec<f32>,
    alignments: Vec<f32>,
    /// Of each pair, by [`Place`].
    pairs: Vec<[f32; 3]>,
}

impl Products {
    pub fn new(clusters: usize) -> Self {
        Self {
            requests: Vec::new(),
            ends: Vec::new(),
            last_partners: Vec::new(),
            group: AlignedRows::default(),
            products: Vec::new(),
            sources: Vec::new(),
            memo: vec![(0, 0); clusters],
            rows: 0,
            squares: Vec::new(),
            alignments: Vec::new(),
            pairs: Vec::new(),
        }
    }

    /// Computes what the pairs of a tile need.
    pub fn compute(&mut self, points: &Points<2>, tile: &Tile, target: Option<&Target>) {
        let rows = points.rows_of(tile);
        self.request(points, tile, rows.len(), target.map(|target| target.labels));
        self.squares.resize(rows.len(), 0.0);
        self.alignments.resize(rows.len(), 0.0);
        self.pairs.resize(tile.points.len(), [0.0; 3]);
        // Rows of float32 are read where they lie: copying them took more than it saved.
        let widened = points.rows().adjacent(rows[0], 1).is_none();
        let mut first = 0;
        while first < rows.len() {
            let end = if widened { self.group_end(first) } else { rows.len() };
            if widened {
                self.group.resize(end - first, points.dim());
                for (index, &row) in rows[first..end].iter().enumerate() {
                    points.rows().copy_row(row, self.group.row_mut(index));
                }
            }
            self.multiply(points, rows, first..end, target);
            first = end;
        }
    }

    /// The slot after those that the pairs of `first` lead to, and theirs in turn.
    fn group_end(&self, first: usize) -> usize {
        let (mut last, mut end) = (first, first);
        while end <= last {
            last = last.max(self.last_partners[end]);
            end += 1;
        }
        end
    }

    /// Computes what the slots of a group need.
    fn multiply(&mut self, points: &Points<2>, rows: &[usize], slots: Range<usize>, target: Option<&Target>) {
        let (first, own) = (slots.start, points.rows());
        let row = |slot: usize| own.adjacent(rows[slot], 1).unwrap_or_else(|| self.group.row(slot - first));
        let mut others = Vec::new();
        for slot in slots {
            let requests = &self.requests[if slot == 0 { 0 } else { self.ends[slot - 1] }..self.ends[slot]];
            self.rows += 1;
            others.clear();
            others.push(row(slot));
            others.extend(target.map(|target| target.direction));
            self.sources.clear();
            for request in requests {
                let mut source = others.len() as u32;
                match target {
                    Some(target) if request.place != Place::Partner => {
                        let known = &mut self.memo[request.with as usize];
                        if known.0 == self.rows {
                            source = known.1;
                        } else {
                            *known = (self.rows, source);
                            others.push(target.centroids.row(request.with as usize));
                        }
                    }
                    _ => others.push(row(request.with as usize)),
                }
                self.sources.push(source);
            }
            multiply(row(slot), &others, &mut self.products);
            self.squares[slot] = self.products[0];
            if target.is_some() {
                self.alignments[slot] = self.products[1];
            }
            for (request, &source) in requests.iter().zip(&self.sources) {
                self.pairs[request.index as usize][request.place as usize] = self.products[source as usize];
            }
        }
    }

    /// Sorts what the pairs need by the row that it is computed with.
    fn request(&mut self, points: &Points<2>, tile: &Tile, slots: usize, labels: Option<&[i32]>) {
        self.ends.clear();
        self.ends.resize(slots + 1, 0);
        self.last_partners.clear();
        self.last_partners.resize(slots, 0);
        let each = if labels.is_some() { [2, 1] } else { [1, 0] };
        for pair in tile.points.clone() {
            let [chosen, rejected] = points.slots(pair);
            self.ends[chosen + 1] += each[0];
            self.ends[rejected + 1] += each[1];
            let first = &mut self.last_partners[chosen.min(rejected)];
            *first = chosen.max(rejected).max(*first);
        }
        for slot in 0..slots {
            self.ends[slot + 1] += self.ends[slot];
        }
        self.requests.resize(self.ends[slots], Request::default());
        let mut put = |slot: usize, request: Request| {
            self.requests[self.ends[slot]] = request;
            self.ends[slot] += 1;
        };
        for (index, pair) in tile.points.clone().enumerate() {
            let [chosen, rejected] = points.slots(pair);
            let index = index as u32;
            put(chosen, Request { with: rejected as u32, index, place: Place::Partner });
            if let Some(labels) = labels {
                let with = labels[pair] as u32;
                put(chosen, Request { with, index, place: Place::ChosenCentroid });
                put(rejected, Request { with, index, place: Place::RejectedCentroid });
            }
        }
    }

    /// ‖z‖² of the pair that is `index`-th in the tile.
    pub fn expand(&self, points: &Points<2>, pair: usize, index: usize) -> Expanded {
        let [chosen, rejected] = points.slots(pair).map(|slot| self.squares[slot]);
        let [a, b] = points.coefficients(pair).map(f64::from);
        let terms = a * a * f64::from(chosen) + b * b * f64::from(rejected);
        let square = terms + 2.0 * a * b * f64::from(self.pairs[index][Place::Partner as usize]);
        let regular = TRUSTED_SQUARES.contains(&chosen) && TRUSTED_SQUARES.contains(&rejected);
        Expanded { square, terms, regular }
    }

    /// ⟨z, c⟩, ‖z − c‖ and ⟨z, u⟩ of a pair whose centroid has the given ‖c‖²; none if rounding may have spoiled them.
    pub fn score(&self, points: &Points<2>, pair: usize, index: usize, centroid_square: f32) -> Option<[f64; 3]> {
        let length = self.expand(points, pair, index);
        let [a, b] = points.coefficients(pair).map(f64::from);
        let combine = |[chosen, rejected]: [f32; 2]| a * f64::from(chosen) + b * f64::from(rejected);
        let [_, chosen, rejected] = self.pairs[index];
        let product = combine([chosen, rejected]);
        let centroid_square_term = f64::from(centroid_square);
        let distance = Expanded {
            square: length.square - 2.0 * product + centroid_square_term,
            terms: length.terms + centroid_square_term,
            regular: length.regular && TRUSTED_SQUARES.contains(&centroid_square),
        };
        let trusted = length.trusted() && distance.trusted();
        let alignment = combine(points.slots(pair).map(|slot| self.alignments[slot]));
        trusted.then(|| [product, distance.square.sqrt(), alignment])
    }
}

/// A square as the sum of its terms.
pub struct Expanded {
    pub square: f64,
    /// The sum of the terms that are squares themselves.
    terms: f64,
    /// Whether float32 holds the terms with all their digits.
    regular: bool,
}

impl Expanded {
    /// Whether rounding left enough digits of the square.
    pub fn trusted(&self) -> bool {
        self.regular && self.square >= TRUSTED_SHARE * self.terms
    }
}

/// The inner products of a row with others.
fn multiply(row: &[f32], others: &[&[f32]], products: &mut Vec<f32>) {
    products.clear();
    let (batches, rest) = others.as_chunks::<BATCH>();
    for batch in batches {
        products.extend(dots(row, *batch));
    }
    match *rest {
        [first, second, third] => products.extend(dots(row, [first, second, third])),
        [first, second] => products.extend(dots(row, [first, second])),
        [first] => products.extend(dots(row, [first])),
        _ => {}
    }
}
