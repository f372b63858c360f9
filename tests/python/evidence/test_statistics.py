"""Tests and intervals against SciPy, against their definitions, and against simulation."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from bpo.evidence.statistics import clustered_bootstrap, holm, paired


def test_without_a_share_it_is_the_paired_t_test():
    generator = np.random.default_rng(0)
    first, second = generator.normal(0.02, 0.05, size=(2, 9))
    expected = scipy.stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.9)
    estimate = paired(first - second, confidence=0.9)
    assert estimate.p_value == pytest.approx(expected.pvalue)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.n == 9


def test_the_correction_is_that_of_nadeau_and_bengio():
    differences = np.array([0.02, 0.05, -0.01, 0.03, 0.04])
    plain, corrected = paired(differences), paired(differences, heldout_share=0.2)
    # n_heldout / n_train = 0.2 / 0.8
    expected = differences.std(ddof=1) * math.sqrt(1 / 5 + 0.25)
    assert corrected.standard_error == pytest.approx(expected)
    assert corrected.p_value == pytest.approx(2 * scipy.stats.t.sf(0.026 / expected, 4))
    assert corrected.mean == plain.mean == pytest.approx(0.026)
    assert corrected.p_value > plain.p_value
    assert corrected.detectable > plain.detectable


def test_the_corrected_interval_covers_where_the_plain_one_does_not():
    """Re-splits of one set, each the mean over its held-out prompts; the true difference is that of the population."""
    generator = np.random.default_rng(1)
    plain = corrected = 0
    trials = 400
    for _ in range(trials):
        prompts = generator.normal(0.03, 0.1, 80)
        splits = [prompts[generator.permutation(80)[:20]].mean() for _ in range(10)]
        for share in (None, 0.25):
            estimate = paired(splits, share)
            covered = estimate.low <= 0.03 <= estimate.high
            if share is None:
                plain += covered
            else:
                corrected += covered
    assert corrected / trials > 0.92
    assert plain / trials < 0.8


@pytest.mark.parametrize("share", [None, 0.1])
def test_power_is_what_it_says(share):
    """Of many experiments whose true mean is the detectable one, four in five reject."""
    generator = np.random.default_rng(2)
    n, deviation = 8, 0.05
    ratio = 0 if share is None else share / (1 - share)
    unit = np.array([-1.0, 1.0] * (n // 2))
    detectable = paired(unit * deviation / unit.std(ddof=1), share).detectable
    # Correlated as the correction assumes: a part that all seeds share, and one of their own.
    shared = generator.normal(0, deviation * math.sqrt(ratio), 20_000)
    samples = detectable + shared[:, None] + generator.normal(0, deviation, (20_000, n))
    error = samples.std(axis=1, ddof=1) * math.sqrt(1 / n + ratio)
    rejected = np.abs(samples.mean(axis=1) / error) > scipy.stats.t.ppf(0.975, n - 1)
    assert rejected.mean() == pytest.approx(0.8, abs=0.02)


def test_needed_agrees_with_detectable():
    generator = np.random.default_rng(3)
    differences = generator.normal(0.02, 0.05, 12)
    estimate = paired(differences)
    # The same spread with as many seeds as are needed finds what was observed, with one less it does not.
    spread = differences.std(ddof=1)

    def detectable(n):
        values = np.linspace(-1, 1, n)
        return paired(values * spread / values.std(ddof=1)).detectable

    assert detectable(estimate.needed) <= abs(estimate.mean) < detectable(estimate.needed - 1)
    # Re-splits of one set: the shared prompts alone may hide a small difference for ever.
    assert paired(differences - differences.mean() + 0.005, 0.25).needed is None


def test_degenerate_differences():
    one = paired([0.1], 0.2)
    assert one.mean == 0.1
    assert math.isnan(one.standard_error)
    assert math.isnan(one.p_value)
    same = paired([0.0, 0.0, 0.0])
    assert (same.mean, same.low, same.high, same.p_value, same.needed) == (0, 0, 0, 1, None)
    equal = paired([0.1] * 3)
    assert (equal.mean, equal.standard_error) == pytest.approx((0.1, 0))
    assert math.isnan(equal.p_value)
    assert math.isnan(equal.low)
    for bad in ([], [0.1, float("nan")], [[0.1]]):
        with pytest.raises(ValueError, match="differences"):
            paired(bad)
    with pytest.raises(ValueError, match="heldout_share"):
        paired([0.1, 0.2], 1.0)
    with pytest.raises(ValueError, match="confidence"):
        paired([0.1, 0.2], confidence=95)


def test_bootstrap_interval_covers_with_clusters():
    """Pairs of a prompt that agree entirely: an interval that took them for independent would be far too short."""
    generator = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        values = np.repeat(generator.normal(0, 1, 40), 6)
        low, high = clustered_bootstrap(values, np.repeat(np.arange(40), 6), n_resamples=500, seed=trial)
        covered += low <= 0 <= high
    assert 0.88 < covered / 200 < 0.99


def test_bootstrap_agrees_with_scipy():
    generator = np.random.default_rng(5)
    values = generator.normal(0.1, 1, 60)
    expected = scipy.stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000).confidence_interval
    found = clustered_bootstrap(values, generator.permutation(60), n_resamples=20_000)
    assert found == pytest.approx(expected, abs=0.02)
    with pytest.raises(ValueError, match="one length"):
        clustered_bootstrap([1.0], [0, 1])


def test_holm_is_the_closed_test_by_bonferroni():
    """An adjusted p-value is the largest Bonferroni p-value of any set of hypotheses with the one in it (Holm 1979)."""
    generator = np.random.default_rng(6)
    for _ in range(20):
        values = generator.random(5) ** 3
        subsets = [s for size in range(1, 6) for s in itertools.combinations(range(5), size)]
        expected = [max(min(1.0, len(s) * min(values[j] for j in s)) for s in subsets if i in s) for i in range(5)]
        assert holm(values) == pytest.approx(expected)
    assert holm([0.02, float("nan"), 0.5])[0] == pytest.approx(0.04)
    assert math.isnan(holm([0.02, float("nan")])[1])
    assert holm([]) == []
