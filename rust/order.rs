//! Sorting that uses all threads, can be cancelled, and depends on the keys alone.

use rayon::prelude::*;

use crate::error::Result;
use crate::memory::{PIECE, RESULTS, build};
use crate::progress::Progress;

/// Keys that one thread sorts at a time: a mebibyte of those of 16 bytes. Under Miri so few that it can merge.
const RUN: usize = if cfg!(miri) { 1 << 4 } else { 1 << 16 };

/// Sorts keys of which no two are equal, in ascending order: runs of a fixed size first, which are then merged two by
/// two. Looks at the cancel token between runs and between pieces of a merge, of which the last is one walk over all keys.
///
/// O(n log n) time and one more list of the keys.
///
/// # Errors
/// If the memory for the second list cannot be had, or the computation was cancelled.
pub fn sort<Key: Copy + Ord + Send + Sync>(mut keys: Vec<Key>, progress: &Progress) -> Result<Vec<Key>> {
    keys.par_chunks_mut(RUN).try_for_each(|run| {
        progress.check()?;
        run.sort_unstable();
        Ok(())
    })?;
    let mut merged = build(keys.len(), RESULTS, progress, |index| keys[index])?;
    let mut width = RUN;
    while width < keys.len() {
        merged.par_chunks_mut(2 * width).zip(keys.par_chunks(2 * width)).try_for_each(|(out, runs)| {
            let (left, right) = runs.split_at(width.min(runs.len()));
            merge(left, right, out, progress)
        })?;
        (keys, merged) = (merged, keys);
        width *= 2;
    }
    Ok(keys)
}

fn merge<Key: Copy + Ord>(left: &[Key], right: &[Key], out: &mut [Key], progress: &Progress) -> Result<()> {
    let (mut next_left, mut next_right) = (0, 0);
    for out in out.chunks_mut(PIECE) {
        progress.check()?;
        for out in out {
            let from_left = next_right == right.len() || next_left < left.len() && left[next_left] < right[next_right];
            let (source, next) = if from_left { (left, &mut next_left) } else { (right, &mut next_right) };
            *out = source[*next];
            *next += 1;
        }
    }
    Ok(())
}

/// A number whose unsigned order is the descending order of `value`, which is not NaN; zeros of either sign are equal.
pub fn descending(value: f64) -> u64 {
    let bits = (value + 0.0).to_bits();
    // Positive numbers order as their bits, negative ones against theirs.
    if bits >> 63 == 0 { !bits & !(1 << 63) } else { bits }
}

#[cfg(test)]
mod tests {
    use super::{RUN, descending, sort};
    use crate::progress::Progress;
    use crate::rng::{Purpose, Stream};

    #[test]
    fn keys_come_out_in_order() {
        let stream = Stream::new(0, Purpose::Shuffle, 0);
        for count in [0, 1, RUN, RUN + 1, 5 * RUN - 7] {
            let keys: Vec<u64> =
                (0..count as u64).map(|index| u64::from(stream.words(index)[0]) << 32 | index).collect();
            let mut expected = keys.clone();
            expected.sort_unstable();
            assert_eq!(sort(keys, &Progress::default()).unwrap(), expected);
        }
    }

    #[test]
    fn larger_values_come_first() {
        let values = [f64::INFINITY, 2.0, 1.0, 5e-324, 0.0, -5e-324, -1.0, f64::NEG_INFINITY];
        assert!(values.map(descending).is_sorted_by(|left, right| left < right));
        assert_eq!(descending(0.0), descending(-0.0));
    }
}
