//! Random numbers addressed by (seed, stream, position), so that any part of a sequence can be drawn alone.
//!
//! Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A counter
//! goes through ten keyed rounds and comes out as four uniform words; nothing is carried from one counter to the next.

use crate::simd::dispatch;

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The lower half of a lane.
const LOW: u64 = 0xFFFF_FFFF;

/// What a stream is used for. No two uses share a stream, so they are independent under one seed.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum Purpose {
    /// Signs of a sparse sketch; the index is the repetition, a position draws 128 signs.
    SketchSigns = 1,
    /// Rotations of a sparse sketch; the index is the repetition, a position is a block.
    SketchRotations = 2,
    /// Entries of a dense sketch; the index is a panel of 32 columns, whose coordinates come one after the other.
    SketchEntries = 3,
    /// Draws of the k-means seeding; the index is the centroid, a position is a trial.
    Seeding = 4,
    /// Draws of the oversampling before it; the index is the round, a position is a point.
    Oversampling = 7,
    /// The order of rows in mini-batches; a position is a rank.
    Batches = 8,
    /// The points that the seeding looks at; a position is a part of the points.
    SeedingSample = 9,
    /// Noise of the softmax ranking; a position is a pair.
    Gumbel = 5,
    /// Keys of the random ranking; a position is a pair.
    Shuffle = 6,
}

/// One stream of random words.
///
/// ```
/// use bpo::rng::{Purpose, Stream};
///
/// let stream = Stream::new(7, Purpose::Shuffle, 0);
/// let mut words = [[0; 4]; 3];
/// stream.fill(100, &mut words);
/// assert_eq!(words[2], stream.words(102)); // any part alone
/// assert_ne!(words[2], Stream::new(8, Purpose::Shuffle, 0).words(102));
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
    /// The upper half of the counter.
    stream: [u32; 2],
}

impl Stream {
    pub fn new(seed: u64, purpose: Purpose, index: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], stream: [index, purpose as u32] }
    }

    /// The four words at `position`.
    pub fn words(&self, position: u64) -> [u32; 4] {
        philox([position as u32, (position >> 32) as u32, self.stream[0], self.stream[1]], self.key)
    }

    /// The four words of each position from `first` on.
    pub fn fill(&self, first: u64, out: &mut [[u32; 4]]) {
        fill(out, first, self.stream, self.key);
    }

    /// A number in `[0, 1)` with 53 random bits.
    pub fn uniform(&self, position: u64) -> f64 {
        self.uniforms(position)[0]
    }

    /// Two such numbers, of which the first is [`Stream::uniform`].
    pub fn uniforms(&self, position: u64) -> [f64; 2] {
        let words = self.words(position);
        [join(words[0], words[1]), join(words[2], words[3])].map(|word| (word >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// An integer in `[0, bound)`; see [`below`].
    pub fn below(&self, position: u64, bound: usize) -> usize {
        below(self.words(position), bound)
    }
}

/// An integer in `[0, bound)` from the words of a position: the upper half of a 64-bit word times `bound`, so that no
/// value is likelier than another by more than a factor of `1 + bound / 2^64`.
pub fn below(words: [u32; 4], bound: usize) -> usize {
    ((u128::from(join(words[0], words[1])) * bound as u128) >> 64) as usize
}

fn join(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

/// Four uniform words of one counter.
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    // Only the lower half of each word counts. In as many bits as the products, the words of several counters need no
    // shuffling between the rounds where the compiler works on them side by side.
    let mut counter = counter.map(u64::from);
    let mut key = key;
    for _ in 0..ROUNDS {
        let even = u64::from(MULTIPLIERS[0]) * (counter[0] & LOW);
        let odd = u64::from(MULTIPLIERS[1]) * (counter[2] & LOW);
        counter = [odd >> 32 ^ counter[1] ^ u64::from(key[0]), odd, even >> 32 ^ counter[3] ^ u64::from(key[1]), even];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter.map(|word| word as u32)
}

dispatch! {
    fn fill(out: &mut [[u32; 4]], first: u64, stream: [u32; 2], key: [u32; 2]) {
        for (index, words) in out.iter_mut().enumerate() {
            let position = first.wrapping_add(index as u64);
            *words = philox([position as u32, (position >> 32) as u32, stream[0], stream[1]], key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Purpose, Stream, philox};

    #[test]
    fn no_two_uses_share_a_stream() {
        let uses = [Purpose::SketchSigns, Purpose::Seeding, Purpose::Gumbel, Purpose::Shuffle];
        let streams = uses.map(|purpose| [0, 1].map(|index| Stream::new(3, purpose, index).words(5)));
        let streams = streams.as_flattened();
        assert!((0..streams.len()).all(|one| streams[one + 1..].iter().all(|other| *other != streams[one])));
        assert!(!streams.contains(&Stream::new(4, Purpose::Seeding, 0).words(5)));
    }

    /// The known answers published with Random123 (`kat_vectors`).
    #[test]
    fn known_answers() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, key), expected);
        }
    }
}
