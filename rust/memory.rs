//! Lists whose length grows with the data: had in full or refused with [`Error::Memory`], and filled in pieces between
//! which the cancel token is looked at.
//!
//! What one tile or one piece needs is allocated as usual, since `ROOM` is left for it: such lists are bounded, but for
//! what is as wide as a row or has a number for each cluster, for which [`room`] asks before a pass.

use std::hint::black_box;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::progress::Progress;

/// Values of one piece.
pub const PIECE: usize = 1 << 18;

/// Indices that one step of a search looks at.
const BLOCK: usize = 1 << 12;

/// Bytes that a large list leaves for all that is small. The system maps so many apart and takes them back at once.
const ROOM: usize = 40 << 20;

/// Bytes from which on a list counts as large.
const LARGE: usize = 1 << 20;

/// What memory is for, and what to do where it cannot be had.
pub const POINTS: &str = "the points; use fewer of them at once";
pub const RESULTS: &str = "a result for each point; use fewer points at once";
pub const ARGUMENT: &str = "a copy of an argument; use fewer points at once";
pub const CENTROIDS: &str = "the centroids; lower `k`, or sketch to fewer dimensions";
pub const CACHE: &str = "the points in 8 bits; lower `cache_bytes`";
pub const PICKS: &str = "the pairs that were picked; lower `budget`, or sketch to fewer dimensions";
pub const TILES: &str = "the pieces of work of all threads; lower `threads` or `k`, or sketch to fewer dimensions";
pub const ROWS_OF_STORE: &str = "rows of the store; use fewer of them at once";
pub const WORK: &str = "the work of a call; free some";

/// An empty list with room for `count` values.
///
/// # Errors
/// [`Error::Memory`].
pub fn reserved<T>(count: usize, what: &'static str) -> Result<Vec<T>> {
    let mut values = Vec::new();
    grow(&mut values, count, what)?;
    Ok(values)
}

/// Makes room for `more` values. A list that grows again and again is copied a few times only.
///
/// # Errors
/// [`Error::Memory`].
pub fn grow<T>(values: &mut Vec<T>, more: usize, what: &'static str) -> Result<()> {
    if values.capacity() - values.len() >= more {
        return Ok(());
    }
    let wanted = values.len().saturating_add(more).saturating_mul(size_of::<T>());
    let reserved = if values.is_empty() { values.try_reserve_exact(more) } else { values.try_reserve(more) };
    reserved.map_err(|_| Error::Memory { bytes: wanted, what })?;
    if wanted >= LARGE { room(0, what) } else { Ok(()) }
}

/// Appends a value.
///
/// # Errors
/// [`Error::Memory`].
pub fn push<T>(values: &mut Vec<T>, value: T, what: &'static str) -> Result<()> {
    grow(values, 1, what)?;
    values.push(value);
    Ok(())
}

/// Asks whether so many bytes could be had, beside those for small lists.
///
/// # Errors
/// [`Error::Memory`].
pub fn room(bytes: usize, what: &'static str) -> Result<()> {
    let mut probe: Vec<u8> = Vec::new();
    let had = probe.try_reserve_exact(bytes.saturating_add(ROOM)).is_ok();
    // Else the compiler takes it out, as nothing is written there.
    black_box(&probe);
    if had { Ok(()) } else { Err(Error::Memory { bytes, what }) }
}

/// A list of one value, filled at once: for what does not grow with the points.
///
/// # Errors
/// [`Error::Memory`].
pub fn filled<T: Clone>(count: usize, value: T, what: &'static str) -> Result<Vec<T>> {
    let mut values = reserved(count, what)?;
    values.resize(count, value);
    Ok(values)
}

/// A copy of a list, made at once: for what does not grow with the points.
///
/// # Errors
/// [`Error::Memory`].
pub fn copied<T: Copy>(values: &[T], what: &'static str) -> Result<Vec<T>> {
    let mut copy = reserved(values.len(), what)?;
    copy.extend_from_slice(values);
    Ok(copy)
}

/// The list of `value(0)`, `value(1)` and so on.
///
/// # Errors
/// [`Error::Memory`], or if the computation was cancelled.
pub fn build<T: Send>(
    count: usize,
    what: &'static str,
    progress: &Progress,
    value: impl Fn(usize) -> T + Sync,
) -> Result<Vec<T>> {
    let mut values = reserved(count, what)?;
    for piece in pieces(count) {
        progress.check()?;
        values.par_extend(piece.into_par_iter().map(&value));
    }
    Ok(values)
}

/// Those of `value(0)`, `value(1)` and so on, up to `count` of them, that are some.
///
/// # Errors
/// As [`build`].
pub fn chosen<T: Send>(
    count: usize,
    what: &'static str,
    progress: &Progress,
    value: impl Fn(usize) -> Option<T> + Sync,
) -> Result<Vec<T>> {
    let mut values = Vec::new();
    for piece in pieces(count) {
        progress.check()?;
        let mut some: Vec<T> = piece.into_par_iter().filter_map(&value).collect();
        grow(&mut values, some.len(), what)?;
        values.append(&mut some);
    }
    Ok(values)
}

/// The first index below `count` that `is` true for.
///
/// # Errors
/// If the computation was cancelled.
pub fn first(count: usize, progress: &Progress, is: impl Fn(usize) -> bool + Sync) -> Result<Option<usize>> {
    for piece in pieces(count) {
        progress.check()?;
        // In blocks, as a parallel search looks after each of its steps whether another found something.
        let end = piece.end;
        let found = piece
            .into_par_iter()
            .step_by(BLOCK)
            .find_map_first(|block| (block..end.min(block + BLOCK)).find(|&index| is(index)));
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

/// Shows `visit` the indices below `count`, one after the other.
///
/// # Errors
/// What `visit` gives, or if the computation was cancelled.
pub fn each(count: usize, progress: &Progress, mut visit: impl FnMut(usize)) -> Result<()> {
    for piece in pieces(count) {
        progress.check()?;
        piece.for_each(&mut visit);
    }
    Ok(())
}

fn pieces(count: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count).step_by(PIECE).map(move |first| first..count.min(first + PIECE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_those_of_an_iterator() {
        let progress = Progress::default();
        for count in [0, 1, PIECE, 2 * PIECE + 5] {
            let odd = |index: usize| (index % 3 == 1).then_some(2 * index);
            assert_eq!(
                build(count, POINTS, &progress, |index| 3 * index).unwrap(),
                Vec::from_iter((0..count).map(|index| 3 * index))
            );
            assert_eq!(chosen(count, POINTS, &progress, odd).unwrap(), Vec::from_iter((0..count).filter_map(odd)));
            let last = |index: usize| index + 3 > count;
            assert_eq!(first(count, &progress, last).unwrap(), (0..count).find(|&index| last(index)));
            let mut seen = Vec::new();
            each(count, &progress, |index| seen.push(index)).unwrap();
            assert_eq!(seen, Vec::from_iter(0..count));
        }
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        for bytes in [1 << 60, usize::MAX] {
            assert!(matches!(filled(bytes / 8, 0u64, POINTS), Err(Error::Memory { what: POINTS, .. })));
            assert!(matches!(room(bytes, TILES), Err(Error::Memory { what: TILES, .. })));
        }
        let mut values = vec![1u8];
        assert!(grow(&mut values, usize::MAX, POINTS).is_err());
        assert_eq!(values, [1]);
    }
}
