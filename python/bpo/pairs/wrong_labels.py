"""From margins to the probability that a label is wrong, and where margins cannot tell."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.pairs.left_out import LeftOut

    Floats = npt.NDArray[np.float64]

# Margins are told apart no finer.
_BINS = 1024
_SHARES = np.linspace(0.0, 0.5, 51)[:-1] + 0.005
_SLOPES = np.geomspace(0.02, 50.0, 70)
# Of the test whether labels agree with the rest at all. The penalties were chosen by agreement, so it is strict.
_LEVEL = 0.01
_CONFIDENCE = 0.9


@dataclasses.dataclass(frozen=True)
class WrongLabels:
    """What margins say of labels.

    Attributes:
        probability: (P,) float64, that the label is wrong.
        share: Expected share of wrong labels.
        low: Lower end of its interval of 90 %; as ``high`` the share itself where it was given.
        high: Upper end.
        agreement: Share of labels that the rest of the data agrees with.
        p_value: One-sided, of that being ½ or less, over prompts.
        tells: Whether it is more; else every probability is ``share``.
    """

    probability: Floats
    share: float
    low: float
    high: float
    agreement: float
    p_value: float
    tells: bool


def wrong_labels(
    left_out: LeftOut, prompt_of_pair: npt.NDArray[np.int64], wrong_share: float | None = None
) -> WrongLabels:
    """Returns the probability that each label is wrong *(ours)*.

    A wrong label turns the margin round: if those of right labels are spread as f(m), those of wrong ones are as f(−m).
    Where f(m)/f(−m) = exp(a·m), as for a normal f, a label agrees with the sign of its margin m with probability
    (1 − π) σ(a|m|) + π σ(−a|m|), π being the share of wrong labels. So π shows in what agreement comes to where margins
    are large, and a in how soon. Where margins are weak only a·(1 − 2π) shows; therefore both are integrated out, under
    a prior that falls from π = 0 to ½ (mean ⅙) and is flat in log a. Pairs of a prompt are not independent: the
    likelihood counts for as many pairs as the spread of agreement over prompts is worth. Where labels were given one by
    one, of three that form no circle in truth π(1 − π) do, which tells π without any gradient.

    Args:
        left_out: What the rest of the data says of each pair.
        prompt_of_pair: (P,) int64.
        wrong_share: π below ½ where it is known, as from labels that were given twice; None integrates it out.
    """
    margins = left_out.margins
    agreement, error = _agreement(margins, prompt_of_pair)
    p_value = 0.5 * math.erfc((agreement - 0.5) / max(error, 1e-9) / math.sqrt(2))
    shares = _SHARES if wrong_share is None else np.array([wrong_share])
    log_prior = np.log(0.5 - shares)
    if left_out.one_by_one and wrong_share is None:
        error_of_circles = max(left_out.circles_error, 1e-3)
        log_prior = log_prior - 0.5 * ((shares * (1 - shares) - left_out.circles) / error_of_circles) ** 2
    if p_value >= _LEVEL:
        share, low, high = _summed(shares, _weights(log_prior))
        return WrongLabels(np.full(len(margins), share), share, low, high, agreement, p_value, False)
    scale = float(np.sqrt((margins**2).mean()))
    sizes, right, wrong = _binned(np.abs(margins) / scale, margins)
    sure = 1 / (1 + np.exp(-np.minimum(np.outer(_SLOPES, sizes), 500)))
    agrees = (1 - shares)[:, None, None] * sure + shares[:, None, None] * (1 - sure)
    likelihood = np.log(agrees) @ right + np.log(np.maximum(1 - agrees, 1e-300)) @ wrong
    # The variance of the agreement of independent pairs, against what it is.
    independent = agreement * (1 - agreement) / len(margins)
    worth = min(1.0, independent / error**2) if error > 0 else 1.0
    weights = _weights(worth * likelihood + log_prior[:, None])
    share, low, high = _summed(shares, weights.sum(axis=1))
    knots = np.concatenate([-sizes[::-1], sizes])
    odds = np.exp(-np.clip(np.outer(_SLOPES, knots), -500, 500))
    at_knots = np.zeros(len(knots))
    for each, of_slopes in zip(shares, weights, strict=True):
        at_knots += of_slopes @ (each * odds / (each * odds + (1 - each)))
    probability = np.interp(margins / scale, knots, at_knots)
    return WrongLabels(probability, share, low, high, agreement, p_value, True)


def _weights(log_weights: Floats) -> Floats:
    """The weights of a posterior, which add up to 1."""
    weights = np.exp(log_weights - log_weights.max())
    found: Floats = weights / weights.sum()
    return found


def _agreement(margins: Floats, prompt_of_pair: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The share of pairs of positive margin, a tie counting one half, and its standard error over prompts."""
    right = (np.sign(margins) + 1) / 2
    _, prompts = np.unique(prompt_of_pair, return_inverse=True)
    residuals = np.bincount(prompts, weights=right - right.mean())
    n = len(residuals)
    return float(right.mean()), float(np.sqrt((residuals**2).sum() * n / max(n - 1, 1)) / len(right))


def _binned(sizes: Floats, margins: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean |m| of as many bins of equal counts at most, and how many pairs of each agree and do not."""
    order = np.argsort(sizes, kind="stable")
    right = (np.sign(margins[order]) + 1) / 2
    edges = np.unique(np.linspace(0, len(sizes), min(_BINS, len(sizes)) + 1).astype(np.int64))[:-1]
    counts = np.diff(edges, append=len(sizes))
    agreeing = np.add.reduceat(right, edges)
    return np.add.reduceat(sizes[order], edges) / counts, agreeing, counts - agreeing


def _summed(shares: Floats, weight: Floats) -> tuple[float, float, float]:
    """Mean and central interval of a share."""
    cumulated = np.cumsum(weight)
    low, high = (
        float(shares[min(int(np.searchsorted(cumulated, at)), len(shares) - 1)])
        for at in ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2)
    )
    return float(shares @ weight), low, high
