//! Shares of a total, by the method of the largest remainder.

/// Splits `total` in proportion to `masses`, of which one at least is positive: the whole parts first, then one more to
/// those with the largest fractions (ties: the lower index).
pub fn largest_remainder(masses: &[f64], total: usize) -> Vec<usize> {
    let sum: f64 = masses.iter().sum();
    let shares: Vec<f64> = masses.iter().map(|mass| total as f64 * mass / sum).collect();
    let mut quotas: Vec<usize> = shares.iter().map(|share| share.floor() as usize).collect();
    let mut order: Vec<usize> = (0..masses.len()).filter(|&index| masses[index] > 0.0).collect();
    order.sort_by(|&left, &right| shares[right].fract().total_cmp(&shares[left].fract()));
    let rest = total.saturating_sub(quotas.iter().sum());
    for index in order.into_iter().cycle().take(rest) {
        quotas[index] += 1;
    }
    quotas
}
