"""Pairs that stand for the others: coresets and designs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.pairs.size import ChoiceSize
from bpo.selection.strategies.taking import picked

if TYPE_CHECKING:
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def coreset(candidacy: Candidacy) -> Choice:
    """The pairs of each cluster whose weighted sum comes closest to its mean (TAGCOS, arXiv 2407.15235).

    Orthogonal matching pursuit with non-negative weights over unit gradients; the budget is shared among the clusters
    in proportion to their sizes. Pairs are ranked by their weights.
    """
    assert candidacy.clusters is not None and candidacy.features is not None
    index = np.flatnonzero(candidacy.eligible)
    rows, pairs, coefficients = candidacy.features
    picks, weights = _core.coreset(
        rows,
        pairs[index],
        coefficients[index],
        candidacy.clusters.labels[index],
        candidacy.budget,
        prompts=candidacy.prompt_of_pair[index],
        max_depth=candidacy.config.max_depth,
        cache_bytes=ChoiceSize.of(
            candidacy.features, candidacy.config, strategy="coreset", budget=candidacy.budget
        ).cache_bytes,
        threads=candidacy.config.threads,
    )
    return picked(candidacy, index[picks], weights)


def d_optimal(candidacy: Candidacy) -> Choice:
    """The pairs that most enlarge log det(λI + Σ v vᵀ), v = β√(μ(1−μ))·(h_w − h_l), one after another.

    The greedy choice of ADPO (arXiv 2503.01076) and ActiveDPO (arXiv 2505.19241), μ = σ(Δ) being the policy's own
    probability of the preference. λ is ``SelectConfig.regularization`` times mean ‖v‖² / d *(ours)*. Pairs are ranked
    by the growth at their turn.
    """
    assert candidacy.differences is not None and candidacy.margins is not None
    config = candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    rows, pairs, differences = candidacy.differences
    pairs = pairs[index]
    # μ(1−μ) = 1 / (2 cosh(Δ/2))²; cosh stays in float64 up to 700.
    spread = 0.5 / np.cosh(np.minimum(np.abs(candidacy.margins[index]) / 2, 700))
    coefficients = (differences[index] * (config.beta * spread)[:, None]).astype(np.float32)
    norms = _core.pair_norms(rows, pairs, coefficients, threads=config.threads).astype(np.float64)
    picks, gains = _core.d_optimal(
        rows,
        pairs,
        coefficients,
        candidacy.budget,
        regularization=config.regularization * float((norms**2).mean()) / rows.shape[1],
        prompts=candidacy.prompt_of_pair[index],
        max_depth=config.max_depth,
        threads=config.threads,
    )
    return picked(candidacy, index[picks], gains)
