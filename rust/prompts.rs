//! Prompts as numbers from zero on, and what limits a choice of pairs.

use rayon::prelude::*;

use crate::error::{Error, Result};
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
    /// If the computation was cancelled.
    pub fn number(names: &[i64], progress: &Progress) -> Result<Self> {
        let (Some(&low), Some(&high)) = (names.par_iter().min(), names.par_iter().max()) else {
            return Ok(Self { numbers: Vec::new(), sizes: Vec::new() });
        };
        progress.check()?;
        let span = low.abs_diff(high);
        let mut numbers = vec![0; names.len()];
        let mut sizes = Vec::new();
        if span < TABLE_SHARE * names.len() as u64 {
            let mut table = vec![0usize; span as usize + 1];
            let place = |name: i64| low.abs_diff(name) as usize;
            names.iter().for_each(|&name| table[place(name)] += 1);
            for entry in table.iter_mut().filter(|entry| **entry > 0) {
                sizes.push(*entry);
                *entry = sizes.len() - 1;
            }
            progress.check()?;
            numbers.par_iter_mut().zip(names).for_each(|(number, &name)| *number = table[place(name)] as u32);
        } else {
            let keys = names.par_iter().enumerate().map(|(pair, &name)| (name, pair)).collect();
            for same in sort(keys, progress)?.chunk_by(|left, right| left.0 == right.0) {
                same.iter().for_each(|&(_, pair)| numbers[pair] = sizes.len() as u32);
                sizes.push(same.len());
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
    /// If the computation was cancelled.
    pub fn new(limits: Limits, progress: &Progress) -> Result<Option<Self>> {
        let Some((names, max_depth)) = limits.depth else { return Ok(None) };
        let prompts = Prompts::number(names, progress)?;
        Ok(Some(Self { depths: vec![0; prompts.count()], prompts, max_depth }))
    }

    pub fn full(&self, pair: usize) -> bool {
        self.depths[self.prompts.numbers[pair] as usize] >= self.max_depth
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
