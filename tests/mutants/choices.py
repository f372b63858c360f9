"""Faults of what chooses pairs: the pursuit, the design, scores, rankings, shares and depths."""

from kmeans import proofs
from planted import Fault


def matches(names):
    return f"test_core_matching_hard.py -k '{names}'"


CHOICES = [
    # The pursuit
    Fault(
        "coreset-bound-halved",
        "coreset/search.rs",
        "(own.lost * residual.length + own.length * residual.lost) * (1.0 + 1e-9)",
        "(own.lost * residual.length + own.length * residual.lost) * 0.5",
        python=proofs("rounding_of_copies"),
    ),
    Fault(
        "coreset-copies-lose-nothing",
        "coreset/search.rs",
        "(own.lost * residual.length + own.length",
        "(0.0 * residual.length + own.length",
        python=proofs("rounding_of_copies"),
    ),
    Fault(
        "coreset-residual-loses-nothing",
        "coreset/search.rs",
        "own.length * residual.lost)",
        "own.length * 0.0)",
        python=proofs("rounding_of_the_residual"),
    ),
    Fault(
        "coreset-copies-summed-in-float32",
        "coreset/search.rs",
        "simd::squared_norm_float64(values).sqrt()",
        "f64::from(dots(values, [values])[0]).sqrt()",
        rust="--lib a_wide_copy",
    ),
    Fault(
        "coreset-sums-beyond-32-bits",
        "codes.rs",
        "(i8::MAX as usize * vector.len())",
        "i8::MAX as usize",
        python=proofs("largest_codes"),
    ),
    Fault(
        "coreset-pairs-do-not-round",
        "coreset/search.rs",
        "2.0 * f64::from(f32::EPSILON) * spread",
        "0.0 * f64::from(f32::EPSILON) * spread",
        python=proofs("without_copies"),
    ),
    Fault(
        "coreset-ties-to-the-higher",
        "coreset/search.rs",
        "|(_, best)| product > best)",
        "|(_, best)| product >= best)",
        rust="--test coreset each_pick",
    ),
    Fault(
        "coreset-fill-in-any-order",
        "coreset/pursuit.rs",
        ".then(left.1.cmp(&right.1))",
        ".then(right.1.cmp(&left.1))",
        rust="--test coreset each_pick",
    ),
    Fault(
        "coreset-negative-weights",
        "coreset/least_squares.rs",
        "free.iter().any(|&weight| weight <= 0.0)",
        "free.iter().any(|&weight| weight <= -1.0)",
        rust="--test coreset each_pick",
    ),
    Fault(
        "coreset-refuses-the-independent",
        "coreset/least_squares.rs",
        "DEPENDENT: f64 = 1e-12",
        "DEPENDENT: f64 = 0.5",
        python="test_core_coreset.py -k picks_and_weights",
    ),
    Fault(
        "coreset-quotas-of-one",
        "coreset/quotas.rs",
        "members.len() as f64).collect()",
        "members.len().min(1) as f64).collect()",
        python="test_core_coreset.py -k picks_and_weights",
    ),
    # The design
    Fault(
        "design-bounds-too-low",
        "d_optimal.rs",
        "squares[pair] / regularization * (1.0 + ROUNDING)",
        "squares[pair] / regularization * 0.5",
        python=proofs("lazy_bounds"),
    ),
    Fault(
        "design-bounds-left-too-low",
        "d_optimal.rs",
        "gains[candidate] + ROUNDING * before[candidate]",
        "0.5 * gains[candidate]",
        python=proofs("lazy_bounds"),
    ),
    Fault(
        "design-looks-at-candidates-alone",
        "d_optimal.rs",
        "|outside| *outside > rank(&best)",
        "|outside| *outside > rank(&best) && false",
        python=proofs("lazy_bounds"),
    ),
    Fault(
        "design-first-pick-unchecked",
        "d_optimal.rs",
        "while !self.bounds.is_empty() && (candidates.len() < wanted || self.bounds.peek() > best.as_ref())",
        "while !self.bounds.is_empty() && candidates.len() < wanted",
        python=proofs("lazy_bounds"),
    ),
    Fault(
        "design-gains-stay",
        "d_optimal.rs",
        "*gain = (*gain - *value * *value).max(0.0);",
        "*gain = (*gain - 0.999 * *value * *value).max(0.0);",
        rust="--test d_optimal picks_are",
    ),
    # The matching
    Fault(
        "matching-rows-lose-nothing",
        "matching/rows.rs",
        "own.lost * rounded.length + own.length * rounded.lost",
        "own.length * rounded.lost",
        python=matches("rounding_of_rows"),
    ),
    Fault(
        "matching-rest-loses-nothing",
        "matching/rows.rs",
        "own.lost * rounded.length + own.length * rounded.lost",
        "own.lost * rounded.length",
        python=matches("rounding_of_the_rest"),
    ),
    Fault(
        "matching-sums-beyond-32-bits",
        "codes.rs",
        "(i8::MAX as usize * vector.len())",
        "i8::MAX as usize",
        python=matches("largest_codes"),
    ),
    Fault(
        "matching-trusts-what-cancelled",
        "matching/measure.rs",
        "if least <= TRUSTED_SHARE * terms {",
        "if least <= 0.0 {",
        python=matches("across_the_target"),
    ),
    Fault(
        "matching-ties-to-the-higher",
        "matching/measure.rs",
        "|(_, best)| cosine > best",
        "|(_, best)| cosine >= best",
        python="test_core_matching.py",
    ),
    Fault(
        "matching-roots-of-the-middle",
        "matching/measure.rs",
        "let (least, most) = (middle - error, middle + error);",
        "let (least, most) = (middle, middle);",
        python="test_core_matching.py",
    ),
    # Scores
    Fault(
        "scores-trust-what-cancelled",
        "usefulness/products.rs",
        "TRUSTED_SHARE: f64 = 1.0 / 16.0",
        "TRUSTED_SHARE: f64 = 1.0 / 4096.0",
        python=proofs("squares_that_cancel"),
    ),
    Fault(
        "scores-trust-every-square",
        "usefulness/products.rs",
        "RangeInclusive<f32> = 7.9e-31..=1.2e30",
        "RangeInclusive<f32> = 0.0..=f32::MAX",
        python="test_core_kmeans_ranges.py -k pairs_of_rows",
    ),
    Fault(
        "scores-distances-trusted-by-length",
        "usefulness/products.rs",
        "length.trusted() && distance.trusted()",
        "length.trusted()",
        python=proofs("squares_that_cancel"),
    ),
    # Rankings, shares and depths
    Fault(
        "ranking-noise-of-the-wrong-sign",
        "ranking.rs",
        "score / temperature + gumbel(pair)",
        "score / temperature - gumbel(pair)",
        python=proofs("softmax_of_many"),
    ),
    Fault(
        "ranking-by-the-place-in-a-chunk",
        "ranking.rs",
        "key(chunk * RANKED_AT_ONCE + index, score)",
        "key(index, score)",
        python=proofs("noise_of_its_own"),
    ),
    Fault(
        "order-of-negative-numbers",
        "order.rs",
        "if bits >> 63 == 0 { !bits & !(1 << 63) } else { bits }",
        "!bits",
        rust="--lib order::tests::larger",
    ),
    Fault(
        "order-merges-the-wrong-way",
        "order.rs",
        "left[next_left] < right[next_right]",
        "left[next_left] > right[next_right]",
        rust="--lib order::tests::keys",
    ),
    Fault(
        "shares-by-the-smallest-fraction",
        "shares.rs",
        "descending(share(index).fract())",
        "descending(-share(index).fract())",
        python="test_core_depth.py -k 'promises or shares'",
    ),
    Fault(
        "depth-one-above-the-most",
        "depth.rs",
        "let eligible = *depth < cap;",
        "let eligible = *depth <= cap;",
        python="test_core_depth.py -k promises",
    ),
    Fault(
        "depth-ties-to-the-higher",
        "depth.rs",
        "candidates.usefulness[pair] > candidates.usefulness[*best]",
        "candidates.usefulness[pair] >= candidates.usefulness[*best]",
        python="test_core_depth.py -k promises",
    ),
    Fault(
        "prompts-hold-one-too-many",
        "prompts.rs",
        ">= self.max_depth",
        "> self.max_depth",
        python="test_core_coreset.py -k limits",
    ),
    Fault(
        "prompts-numbered-in-any-order",
        "prompts.rs",
        "sizes.push(*entry);\n                *entry = sizes.len() - 1;",
        "sizes.push(*entry);\n                *entry = 0;",
        rust="--lib prompts::tests",
    ),
]
