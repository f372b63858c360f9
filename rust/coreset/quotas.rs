//! The pairs that each cluster may use, how many of them it gets, and what a cap on prompts kept others from using.

use super::pursuit::Pursuit;
use crate::error::Result;
use crate::memory::{POINTS, build, filled, push};
use crate::points::Points;
use crate::progress::Progress;
use crate::prompts::{Depths, Limits, Prompts};
use crate::shares::largest_remainder;

/// The pairs of each cluster that may be picked, in ascending order of the clusters; those that have none are left out.
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn members(clusters: &[i32], limits: Limits, progress: &Progress) -> Result<Vec<Vec<usize>>> {
    let names = build(clusters.len(), POINTS, progress, |pair| i64::from(clusters[pair]))?;
    let numbered = Prompts::number(&names, progress)?;
    let mut members: Vec<Vec<usize>> = filled(numbered.count(), Vec::new(), POINTS)?;
    for (pair, &cluster) in numbered.numbers.iter().enumerate() {
        if limits.eligible.is_none_or(|eligible| eligible[pair]) {
            push(&mut members[cluster as usize], pair, POINTS)?;
        }
    }
    members.retain(|members| !members.is_empty());
    Ok(members)
}

/// The share of each cluster in the budget, in proportion to its pairs, of which there are some.
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn quotas(members: &[Vec<usize>], budget: usize, progress: &Progress) -> Result<Vec<usize>> {
    let sizes: Vec<f64> = members.iter().map(|members| members.len() as f64).collect();
    largest_remainder(&sizes, budget, progress)
}

/// Shares among the clusters, in proportion to the pairs that they may still use, what the cap kept others from using.
///
/// # Errors
/// If the memory cannot be had, or the computation was cancelled.
pub fn share_rest(
    points: &Points<2>,
    members: &[Vec<usize>],
    budget: usize,
    pursuits: &mut [Pursuit],
    cap: &mut Depths,
    progress: &Progress,
) -> Result<()> {
    let mut picked = filled(points.count(), false, POINTS)?;
    pursuits.iter().flat_map(|pursuit| &pursuit.picks).for_each(|&pair| picked[pair] = true);
    loop {
        let left = budget - pursuits.iter().map(|pursuit| pursuit.picks.len()).sum::<usize>();
        let usable = |members: &Vec<usize>| -> Result<Vec<usize>> {
            let mut usable = Vec::new();
            for &pair in members.iter().filter(|&&pair| !picked[pair] && !cap.full(pair)) {
                push(&mut usable, pair, POINTS)?;
            }
            Ok(usable)
        };
        let usable = members.iter().map(usable).collect::<Result<Vec<_>>>()?;
        if left == 0 || usable.iter().all(Vec::is_empty) {
            return Ok(());
        }
        for ((pursuit, pairs), quota) in pursuits.iter_mut().zip(&usable).zip(quotas(&usable, left, progress)?) {
            let before = pursuit.picks.len();
            pursuit.fill(points, pairs, quota, Some(cap), progress)?;
            pursuit.picks[before..].iter().for_each(|&pair| picked[pair] = true);
        }
    }
}
