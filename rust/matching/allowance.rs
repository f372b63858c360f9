//! Which pairs may be picked next: each prompt's first before any other, then those of clusters that have some of their share left.

use super::Sharing;
use crate::error::{Error, Result};
use crate::memory::{self, POINTS, build, filled};
use crate::progress::Progress;
use crate::prompts::{Depths, Limits, Prompts};
use crate::shares::{check_clusters, largest_remainder, weighted};

pub struct Allowance<'a> {
    eligible: Option<&'a [bool]>,
    depths: Option<Depths>,
    /// Prompts that are still to get their first pair; nothing else is picked before.
    without: usize,
    clusters: Option<Clusters>,
}

struct Clusters {
    /// The cluster of each pair, as numbers from zero on.
    of_pair: Vec<u32>,
    weights: Vec<f64>,
    /// How many pairs of each cluster may still be picked.
    quotas: Vec<usize>,
    picked: Vec<bool>,
}

impl<'a> Allowance<'a> {
    /// # Errors
    /// If shapes do not fit, a cluster is negative or without weight, a weight is negative or not finite, the budget is below
    /// the prompts that each get a pair, the memory cannot be had, or the computation was cancelled.
    pub fn new(
        pairs: usize,
        budget: usize,
        limits: Limits<'a>,
        sharing: Sharing<'a>,
        progress: &Progress,
    ) -> Result<Self> {
        limits.check(pairs)?;
        let depths = Depths::new(limits, progress)?;
        let clusters =
            sharing.clusters.map(|(names, weights)| Clusters::new(names, weights, pairs, progress)).transpose()?;
        let without = match &depths {
            Some(depths) if sharing.every_prompt => depths.with_pair(limits.eligible, progress)?,
            None if sharing.every_prompt => return Err(Error::argument("every_prompt", "false without prompts", true)),
            _ => 0,
        };
        if budget < without {
            return Err(Error::BudgetBelowPrompts { budget, prompts: without });
        }
        Ok(Self { eligible: limits.eligible, depths, without, clusters })
    }

    /// Whether a pair may not be picked now, though it was not picked before.
    pub fn shuts_out(&self, pair: usize) -> bool {
        let depth = self.depths.as_ref();
        if self.without > 0 {
            return depth.is_some_and(|depths| depths.depth(pair) > 0);
        }
        depth.is_some_and(|depths| depths.full(pair))
            || self.clusters.as_ref().is_some_and(|clusters| clusters.full(pair))
    }

    pub fn count(&mut self, pair: usize) {
        if let Some(clusters) = &mut self.clusters {
            clusters.picked[pair] = true;
        }
        if let Some(depths) = &mut self.depths {
            depths.count(pair);
        }
        if self.without > 0 {
            self.without -= 1;
        } else if let Some(clusters) = &mut self.clusters {
            clusters.quotas[clusters.of_pair[pair] as usize] -= 1;
        }
    }

    /// Shares what is left of the budget among the clusters, in proportion to the pairs of each that may still be picked times its
    /// weight; false if there is none.
    ///
    /// # Errors
    /// If the memory cannot be had, or the computation was cancelled.
    pub fn share(&mut self, left: usize, progress: &Progress) -> Result<bool> {
        let Some(clusters) = &mut self.clusters else { return Ok(false) };
        let (eligible, depths) = (self.eligible, self.depths.as_ref());
        let mut sizes = filled(clusters.quotas.len(), 0.0, POINTS)?;
        memory::each(clusters.of_pair.len(), progress, |pair| {
            let open = !clusters.picked[pair] && eligible.is_none_or(|eligible| eligible[pair]);
            if open && depths.is_none_or(|depths| !depths.full(pair)) {
                sizes[clusters.of_pair[pair] as usize] += 1.0;
            }
        })?;
        if sizes.iter().all(|&size| size == 0.0) {
            return Ok(false);
        }
        let masses = weighted(sizes, |cluster| clusters.weights[cluster], progress)?;
        clusters.quotas = largest_remainder(&masses, left, progress)?;
        Ok(true)
    }
}

impl Clusters {
    fn new(names: &[i32], weights: Option<&[f64]>, pairs: usize, progress: &Progress) -> Result<Self> {
        if names.len() != pairs {
            return Err(Error::shape(
                "clusters",
                format!("({pairs},), one for each pair"),
                format!("({},)", names.len()),
            ));
        }
        check_clusters(names, weights, progress)?;
        let wide = build(pairs, POINTS, progress, |pair| i64::from(names[pair]))?;
        let Prompts { numbers: of_pair, sizes } = Prompts::number(&wide, progress)?;
        let mut of_cluster = filled(sizes.len(), 1.0, POINTS)?;
        if let Some(weights) = weights {
            memory::each(pairs, progress, |pair| of_cluster[of_pair[pair] as usize] = weights[names[pair] as usize])?;
        }
        let quotas = filled(sizes.len(), 0, POINTS)?;
        Ok(Self { of_pair, weights: of_cluster, quotas, picked: build(pairs, POINTS, progress, |_| false)? })
    }

    fn full(&self, pair: usize) -> bool {
        self.quotas[self.of_pair[pair] as usize] == 0
    }
}
