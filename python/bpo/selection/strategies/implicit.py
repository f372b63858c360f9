"""Rules that read the log-probabilities of policy and reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.selection.strategies.taking import largest

if TYPE_CHECKING:
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def fused_margin(candidacy: Candidacy) -> Choice:
    """The largest score gaps and implicit margins together (arXiv 2502.14560).

    The probabilities p of the preference by the scores and q by the policy are fused to pq / (pq + (1−p)(1−q)), that is
    σ(logit p + logit q). Ours is p = σ(gap / standard deviation of the gaps); q = σ(Δ), so a policy that is its own
    reference, with Δ = 0, adds nothing to ``"margin"``.
    """
    assert candidacy.margins is not None
    index = np.flatnonzero(candidacy.eligible)
    gaps = candidacy.score_gaps[index]
    spread = gaps.std()
    return largest(candidacy, index, gaps / (spread if spread > 0 else 1.0) + candidacy.margins[index])
