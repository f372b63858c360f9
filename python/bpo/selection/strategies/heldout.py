"""Rules that their papers train models for: what training on the other prompts makes of a pair.

All read cross-fitted margins m in the place of trained models *(ours)*: ⟨w, −ẑ⟩ with w fitted, in the linear regime, to
the pairs of the prompts outside the pair's fold. The loss of a held-out pair is log(1 + exp(−m)).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.pairs.linear import PairRegression
from bpo.selection.strategies.matching import direction_of_target
from bpo.selection.strategies.taking import largest, middle

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.selection.strategies.candidacy import Candidacy, Choice

# Margins of a source beyond the absolute value that one in a hundred exceeds count as that.
_CLIPPED = 0.01


def easiest(candidacy: Candidacy) -> Choice:
    """The smallest held-out losses (SelectiveDPO, arXiv 2502.09650).

    The paper averages the losses of six models, each trained by DPO on one of two halves of the pairs; ours is one
    regression for each of five folds. It then trains from easy to hard: ``SelectConfig.order="easiest_first"``.
    """
    assert candidacy.heldout_margins is not None
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, candidacy.heldout_margins[index])


def smallest_margin(candidacy: Candidacy) -> Choice:
    """The smallest signed held-out margins: the hardest pairs (arXiv 2508.04149).

    The paper's margin is the implicit one of a model trained by DPO on other data. Pairs whose label is wrong have
    margins below 0, so this collects them first: a control where labels are noisy.
    """
    assert candidacy.heldout_margins is not None
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, -candidacy.heldout_margins[index])


def bees(candidacy: Candidacy) -> Choice:
    """The most probable preferences by scores and by training together (BeeS, arXiv 2502.14560).

    Each source gives p = (clip(m, L, U) − L) / (U − L), and these are fused to Π p / (Π p + Π (1 − p)). The sources are
    the score gap and, for the implicit margin of a model trained by DPO on a few pairs, the held-out margin *(ours)*.
    Ours, too, is −L = U, the absolute value that one margin of the source in a hundred exceeds, so that a margin of 0
    says nothing; ties of clipped margins go to the earlier pair.
    """
    assert candidacy.heldout_margins is not None
    index = np.flatnonzero(candidacy.eligible)
    one, other = (_probability(margins[index]) for margins in (candidacy.score_gaps, candidacy.heldout_margins))
    agree, differ = one * other, (1 - one) * (1 - other)
    # A source that is sure of the one and another that is sure of the other say nothing together.
    said = agree + differ > 0
    return largest(candidacy, index, np.where(said, agree, 0.5) / np.where(said, agree + differ, 1.0))


def lossdiff(candidacy: Candidacy) -> Choice:
    """The middle by difference of losses, before and after training (LossDiff of arXiv 2510.13212).

    LossDiff is the loss of the policy less that of a model trained on a validation set: here of the policy as given,
    and of what the linear regime makes of it by training on the ``target``'s pairs, or, without a target, on the pairs
    of other prompts *(ours)*. Bands are those of ``"irm"``.
    """
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, middle(_loss_differences(candidacy, index)))


def lossdiff_irm(candidacy: Candidacy) -> Choice:
    """The middle by both ``"lossdiff"`` and ``"irm"`` (LossDiff-IRM, arXiv 2510.13212).

    The paper takes the intersection of two bands between percentiles; here both are about the median, and as wide as
    it takes to hold the budget *(ours)*.
    """
    assert candidacy.margins is not None
    index = np.flatnonzero(candidacy.eligible)
    both = middle(_loss_differences(candidacy, index)), middle(candidacy.margins[index])
    return largest(candidacy, index, np.minimum(*both))


def _loss_differences(candidacy: Candidacy, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Loss of pairs under the policy less their loss after training, (n,)."""
    assert candidacy.margins is not None and candidacy.heldout_margins is not None and candidacy.features is not None
    before, trained = candidacy.margins[index], candidacy.heldout_margins[index]
    wanted = candidacy.target
    if wanted is not None:
        direction = direction_of_target(wanted, candidacy)
        trained = PairRegression(candidacy.features.take(index), None, candidacy.config.threads).margins(direction)
    difference: npt.NDArray[np.float64] = np.logaddexp(0, -before) - np.logaddexp(0, -before - trained)
    return difference


def _probability(margins: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The probability of the preference by one source: margins cut to [−U, U] and put on a line from 0 to 1."""
    most = float(np.quantile(np.abs(margins), 1 - _CLIPPED))
    if most == 0:
        return np.full(len(margins), 0.5)
    probability: npt.NDArray[np.float64] = (np.clip(margins, -most, most) + most) / (2 * most)
    return probability
