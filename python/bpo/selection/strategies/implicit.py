"""Rules that read the log-probabilities of policy and reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.selection.strategies.taking import largest, middle
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.selection.strategies.candidacy import Candidacy, Choice


def fused_margin(candidacy: Candidacy) -> Choice:
    """The largest score gaps and implicit margins of the policy together *(ours, after arXiv 2502.14560)*.

    The probabilities p of the preference by the scores and q by the policy are fused to pq / (pq + (1−p)(1−q)), that is
    σ(logit p + logit q), with p = σ(gap / standard deviation of the gaps) and q = σ(Δ). So a policy that is its own
    reference, with Δ = 0, adds nothing to ``"margin"``, and this says so; the paper's rule is ``"bees"``.
    """
    assert candidacy.margins is not None
    index = np.flatnonzero(candidacy.eligible)
    gaps, margins = candidacy.score_gaps[index], candidacy.margins[index]
    if not margins.any():
        warn(
            "strategy='fused_margin' chooses as 'margin' does: the policy is its own reference, so all implicit "
            "margins are 0. Give ref_model, or take 'bees', whose margins are those of training on the other prompts."
        )
    return largest(candidacy, index, gaps / _positive(gaps.std()) + margins)


def alignment_potential(candidacy: Candidacy) -> Choice:
    """The largest z(score gap) − z(|length-normalised margin of the policy|) (arXiv 2503.01864).

    What the scores say of a pair and the policy does not know yet: its own margin is that of log π(y|x) / |y|, without
    a reference, and its sign does not count. z is taken over the pairs to choose from. As in the authors' code.
    """
    assert candidacy.logps is not None
    index = np.flatnonzero(candidacy.eligible)
    each = candidacy.logps[index] / candidacy.lengths[index]
    return largest(candidacy, index, _z(candidacy.score_gaps[index]) - _z(np.abs(each[:, 0] - each[:, 1])))


def irm(candidacy: Candidacy) -> Choice:
    """The middle by implicit reward margin Δ (IRM of arXiv 2510.13212): the ranks closest to the median's.

    The paper takes the policy after an epoch of DPO on all pairs, and a band of a half to two thirds of them between
    percentiles that it tunes; ours is the policy as given, and a band about the median as wide as the budget.
    """
    assert candidacy.margins is not None
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, middle(candidacy.margins[index]))


def _z(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Less their mean, in units of their standard deviation."""
    standardised: npt.NDArray[np.float64] = (values - values.mean()) / _positive(values.std())
    return standardised


def _positive(spread: np.floating) -> float:
    """A standard deviation to divide by: 1 where all values are the same."""
    return float(spread) if spread > 0 else 1.0
