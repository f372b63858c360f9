"""Is a difference between two arms more than chance: paired tests, intervals and their power."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

POWER = 0.8
"""Probability with which a detectable difference is found."""

_MOST_REPEATS = 100_000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and how well it is known.

    Attributes:
        mean: The mean.
        standard_error: Of the mean; NaN for one seed.
        low: Lower end of the confidence interval.
        high: Upper end.
        p_value: Two-sided, of the mean being zero.
        n: Seeds.
        detectable: Smallest true mean, in absolute value, that as many seeds would find different from zero with a
            probability of 80 %, if the variance is as observed.
        needed: Seeds that would find a true mean as large as the observed one with that probability. None if it is not
            known, or if no number would: re-splits of one data set share its prompts, which bounds what they can tell.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p_value: float
    n: int
    detectable: float
    needed: int | None = None


def paired(differences: npt.ArrayLike, heldout_share: float | None = None, confidence: float = 0.95) -> Estimate:
    """Tests whether a difference that was observed with several seeds is zero.

    With ``heldout_share`` the seeds are random re-splits of one data set into training and held-out prompts. These
    overlap, so their results are correlated and the t-test finds differences where none are. The corrected resampled
    t-test (Nadeau & Bengio 2003, eq. 6 to 8) takes the correlation to be the expected overlap ρ of two held-out sets
    and widens the variance of the mean from s²/S to (1/S + ρ/(1 − ρ)) s²; where a split uses every prompt, ρ/(1 − ρ) is
    their n_heldout/n_train. Without it the data is the same for every seed and this is the paired t-test.

    Args:
        differences: (S,) one a seed: arm minus baseline on the same split.
        heldout_share: Held-out prompts of a split as a share, in (0, 1), of all prompts that splits are drawn from.
            None if all seeds have the same data.
        confidence: Of the interval; 1 − confidence is the size of the test whose power is given.

    Returns:
        The estimate. Of one seed only the mean is known; the others are NaN. So are they where all differences are the
        same and not zero, which happens to a few seeds by chance and says nothing of the spread.

    Raises:
        ValueError: No difference, one that is not finite, or a share or confidence out of range.

    Example:
        >>> estimate = paired([0.03, 0.01, 0.02, 0.04], heldout_share=0.25)
        >>> round(estimate.mean, 3), round(estimate.p_value, 3)
        (0.025, 0.085)
        >>> round(paired([0.03, 0.01, 0.02, 0.04]).p_value, 3)
        0.03
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"differences must be a list of finite numbers, got {differences!r}")
    if heldout_share is not None and not 0 < heldout_share < 1:
        raise ValueError(f"heldout_share must be above 0 and below 1, got {heldout_share!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be above 0 and below 1, got {confidence!r}")
    from scipy import stats as scipy_stats

    n, mean = len(values), float(values.mean())
    if n == 1:
        nan = math.nan
        return Estimate(mean, nan, nan, nan, nan, 1, nan)
    deviation = float(values.std(ddof=1))
    ratio = 0.0 if heldout_share is None else heldout_share / (1 - heldout_share)

    def error(seeds: int) -> float:
        return deviation * math.sqrt(1 / seeds + ratio)

    if deviation <= 1e-12 * abs(mean):  # all the same, but for the rounding of their mean
        if mean == 0:
            return Estimate(0.0, 0.0, 0.0, 0.0, 1.0, n, 0.0)
        return Estimate(mean, 0.0, math.nan, math.nan, math.nan, n, math.nan)
    half = float(scipy_stats.t.ppf((1 + confidence) / 2, n - 1)) * error(n)
    return Estimate(
        mean=mean,
        standard_error=error(n),
        low=mean - half,
        high=mean + half,
        p_value=float(2 * scipy_stats.t.sf(abs(mean) / error(n), n - 1)),
        n=n,
        detectable=_detectable(error, n, confidence),
        needed=_needed(error, abs(mean), confidence),
    )


def _power(noncentrality: float, degrees: int, confidence: float) -> float:
    """Probability that the two-sided t-test rejects."""
    from scipy import stats as scipy_stats

    critical = scipy_stats.t.ppf((1 + confidence) / 2, degrees)
    # The other tail adds nothing that matters once the power is near 80 %.
    return float(scipy_stats.nct.sf(critical, degrees, noncentrality))


def _detectable(error: Callable[[int], float], n: int, confidence: float) -> float:
    from scipy import stats as scipy_stats
    from scipy.optimize import brentq

    critical = float(scipy_stats.t.ppf((1 + confidence) / 2, n - 1))
    root = brentq(lambda effect: _power(effect, n - 1, confidence) - POWER, 0.0, 3 * critical + 3)
    return float(root) * error(n)


def _needed(error: Callable[[int], float], effect: float, confidence: float) -> int | None:
    """Fewest repeats whose power is enough, by bisection: it grows with their number."""

    def enough(n: int) -> bool:
        return _power(effect / error(n), n - 1, confidence) >= POWER

    if not enough(_MOST_REPEATS):
        return None
    low, high = 1, 2
    while not enough(high):
        low, high = high, min(2 * high, _MOST_REPEATS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def clustered_bootstrap(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns a percentile interval for the mean of held-out pairs, of which those of one prompt belong together.

    Whole prompts are drawn with replacement (Davison & Hinkley 1997, section 3.8). It says how the result depends on
    which prompts happened to be held out, which seeds on the same data cannot.

    Args:
        values: (P,) one a pair, such as the difference of two policies' correctness, averaged over seeds.
        clusters: (P,) the prompt of each pair, whole numbers.
        confidence: Of the interval.
        n_resamples: Draws.
        seed: Of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: Arrays of different lengths, or empty ones.

    Example:
        >>> low, high = clustered_bootstrap([1, 0, 1, 1, 0, 1], [0, 0, 1, 1, 2, 2])
        >>> 0.5 <= low < high <= 1
        True
    """
    values, clusters = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if values.ndim != 1 or values.shape != clusters.shape or len(values) == 0:
        raise ValueError(f"values and clusters must be two lists of one length, got {values.shape}, {clusters.shape}")
    _, index = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    generator = np.random.default_rng(seed)
    means = np.empty(n_resamples)
    for start in range(0, n_resamples, 1000):  # a bounded memory for any number of prompts
        part = means[start : start + 1000]
        draws = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=len(part))
        part[:] = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for testing several hypotheses at once (Holm 1979); NaN stays and does not count.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(len(values), np.nan)
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return [float(value) for value in adjusted]


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Returns Spearman's rank correlation of two lists, NaN where it is not defined.

    Example:
        >>> round(rank_correlation([0.5, 0.6, 0.7, 0.65], [0.52, 0.55, 0.61, 0.66]), 2)
        0.8
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return math.nan
    from scipy.stats import spearmanr

    return float(spearmanr(left, right).statistic)


def clustered_standard_error(values: npt.NDArray[np.float64], clusters: npt.NDArray[np.int64]) -> float:
    """Standard error of a mean whose observations are independent between clusters only (Liang & Zeger 1986)."""
    residuals = np.bincount(clusters, weights=values - values.mean())
    return float(np.sqrt((residuals**2).sum()) / len(values))
