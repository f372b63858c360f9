//! Prompts as numbers from zero on, and what limits a choice of pairs.

use crate::error::{Error, Result};
use crate::memory::{PIECE, RESULTS, build, each, filled, grow};
use crate::order::sort;
use crate::progress::Progress;

/// Entries of the table of numbers for each pair, at most: past that the prompts are sorted instead.
const TABLE_SHARE: u64 = 4;

/// The prompts of pairs, numbered in ascending order.
#[derive(Clone, Debug)]
pub struct Prompts {
    /// The number of each pair's prompt.
    pub numbers: Vec<u32>,
    /// The pairs of each prompt.
    pub sizes: Vec<usize>,
}

impl Prompts {
    /// Numbers prompts of any names: by a table where the names lie close together, else by sorting. O(P) or
    /// O(P log P).
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn number(names: &[i64], progress: &Progress) -> Result<Self> {
        let (mut low, mut high) = (i64::MAX, i64::MIN);
        each(names.len(), progress, |pair| (low, high) = (low.min(names[pair]), high.max(names[pair])))?;
        if names.is_empty() || low.abs_diff(high) >= TABLE_SHARE * names.len() as u64 {
            return Self::by_sorting(names, progress);
        }
        let mut sizes = Vec::new();
        let mut table = build(low.abs_diff(high) as usize + 1, RESULTS, progress, |_| 0)?;
        let place = |name: i64| low.abs_diff(name) as usize;
        each(names.len(), progress, |pair| table[place(names[pair])] += 1)?;
        for entries in table.chunks_mut(PIECE) {
            progress.check()?;
            grow(&mut sizes, entries.len(), RESULTS)?;
            for entry in entries.iter_mut().filter(|entry| **entry > 0) {
                sizes.push(*entry);
                *entry = sizes.len() - 1;
            }
        }
        let numbers = build(names.len(), RESULTS, progress, |pair| table[place(names[pair])] as u32)?;
        Ok(Self { numbers, sizes })
    }

    fn by_sorting(names: &[i64], progress: &Progress) -> Result<Self> {
        let keys = sort(build(names.len(), RESULTS, progress, |pair| (names[pair], pair))?, progress)?;
        let mut numbers = build(names.len(), RESULTS, progress, |_| 0)?;
        let mut sizes: Vec<usize> = Vec::new();
        for (piece, part) in keys.chunks(PIECE).enumerate() {
            progress.check()?;
            grow(&mut sizes, part.len(), RESULTS)?;
            for (index, &(name, pair)) in (piece * PIECE..).zip(part) {
                if index == 0 || keys[index - 1].0 != name {
                    sizes.push(0);
                }
                let number = sizes.len() - 1;
                sizes[number] += 1;
                numbers[pair] = number as u32;
            }
        }
        Ok(Self { numbers, sizes })
    }

    pub fn count(&self) -> usize {
        self.sizes.len()
    }
}

/// What limits a choice of pairs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Limits<'a> {
    /// Pairs that may be picked; all if none are given.
    pub eligible: Option<&'a [bool]>,
    /// The prompt of each pair, any numbers, and the pairs of one prompt at most.
    pub depth: Option<(&'a [i64], usize)>,
}

impl Limits<'_> {
    /// # Errors
    /// If a length is not `pairs`, or the depth is zero.
    pub fn check(&self, pairs: usize) -> Result<()> {
        let expected = || format!("({pairs},), one for each pair");
        match (self.eligible, self.depth) {
            (Some(eligible), _) if eligible.len() != pairs => {
                Err(Error::shape("eligible", expected(), format!("({},)", eligible.len())))
            }
            (_, Some((prompts, _))) if prompts.len() != pairs => {
                Err(Error::shape("prompts", expected(), format!("({},)", prompts.len())))
            }
            (_, Some((_, 0))) => Err(Error::argument("max_depth", "at least 1", 0)),
            _ => Ok(()),
        }
    }
}

/// How many pairs of each prompt were picked, and how many may be.
#[derive(Clone, Debug)]
pub struct Depths {
    prompts: Prompts,
    depths: Vec<usize>,
    max_depth: usize,
}

impl Depths {
    /// None if the limits say nothing of prompts.
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn new(limits: Limits, progress: &Progress) -> Result<Option<Self>> {
        let Some((names, max_depth)) = limits.depth else { return Ok(None) };
        let prompts = Prompts::number(names, progress)?;
        Ok(Some(Self { depths: filled(prompts.count(), 0, RESULTS)?, prompts, max_depth }))
    }

    pub fn full(&self, pair: usize) -> bool {
        self.depth(pair) >= self.max_depth
    }

    /// The pairs that were picked of the prompt of a pair.
    pub fn depth(&self, pair: usize) -> usize {
        self.depths[self.prompts.numbers[pair] as usize]
    }

    /// How many prompts have a pair that may be picked.
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn with_pair(&self, eligible: Option<&[bool]>, progress: &Progress) -> Result<usize> {
        let numbers = &self.prompts.numbers;
        let mut found = filled(self.prompts.count(), eligible.is_none(), RESULTS)?;
        if let Some(eligible) = eligible {
            each(numbers.len(), progress, |pair| found[numbers[pair] as usize] |= eligible[pair])?;
        }
        Ok(found.into_iter().filter(|&found| found).count())
    }

    pub fn count(&mut self, pair: usize) {
        self.depths[self.prompts.numbers[pair] as usize] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::Prompts;
    use crate::progress::Progress;

    #[test]
    fn close_and_scattered_names_are_numbered_alike() {
        for scale in [1, 1 << 40, i64::MAX / 4] {
            let names = [3, -4, 3, 0, 0, 3].map(|name| name * scale);
            let prompts = Prompts::number(&names, &Progress::default()).unwrap();
            assert_eq!(prompts.numbers, [2, 0, 2, 1, 1, 2]);
            assert_eq!(prompts.sizes, [1, 2, 3]);
        }
        assert_eq!(Prompts::number(&[], &Progress::default()).unwrap().count(), 0);
    }
}
