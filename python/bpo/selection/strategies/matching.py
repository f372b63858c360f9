"""Pairs whose gradients add up to the direction of training *(ours)*."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.pairs.linear import PairRegression, training_direction
from bpo.pairs.size import ChoiceSize
from bpo.selection.strategies.taking import spread

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.pairs.pair_gradients import PairGradients
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def matching(candidacy: Candidacy) -> Choice:
    """The pairs whose sum points where training on all candidates leads, taken one after another *(ours)*.

    A pair is worth what it adds to those that are there: at each turn the one comes that most raises the cosine between
    the sum of unit gradients and the direction of training (:func:`bpo.pairs.linear.training_direction`); with a
    target, that of training on the target's pairs. Beyond 128 pairs a turn brings several, a 64th of those that are
    there. Pairs are ranked by their place: 0, −1, −2 and so on; behind them those that are not taken, by how far they
    agree with the direction.
    """
    index = np.flatnonzero(candidacy.eligible)
    return matched(candidacy, index)


def matched(
    candidacy: Candidacy,
    index: npt.NDArray[np.int64],
    *,
    min_depth: int = 0,
    clusters: npt.NDArray[np.int32] | None = None,
    cluster_weights: npt.NDArray[np.float64] | None = None,
) -> Choice:
    """Matches the pairs in ``index`` to the direction of training, within depths of prompts and shares of clusters.

    Args:
        candidacy: What is chosen from.
        index: (n,) int64, the eligible pairs.
        min_depth: Pairs that each prompt gets before any other pair is taken, 0 or 1.
        clusters: (n,) int32, the cluster of each, among which the rest of the budget is shared; None for no shares.
        cluster_weights: (k,) float64, what shares are in proportion to beside the pairs of a cluster.
    """
    assert candidacy.features is not None
    config = candidacy.config
    features, prompts = candidacy.features.take(index), candidacy.prompt_of_pair[index]
    if candidacy.target is None:
        direction = training_direction(features, prompts, candidacy.seed, candidacy.shares, config.threads)
    else:
        direction = direction_of_target(candidacy.target, candidacy)
    picks, _ = _core.matching(
        *features,
        (-direction).astype(np.float32),
        candidacy.budget,
        prompts=prompts,
        min_depth=min_depth,
        max_depth=config.max_depth,
        clusters=clusters,
        cluster_weights=cluster_weights,
        cache_bytes=ChoiceSize.of(candidacy.features, config, candidacy.shares, strategy="matching").cache_bytes,
        threads=config.threads,
        processes=candidacy.shares,
    )
    agreement = PairRegression(features, candidacy.shares, config.threads).margins(direction)
    agreement[picks] = np.inf
    keys = np.empty(len(index))
    keys[np.argsort(-agreement, kind="stable")] = -np.arange(len(index), dtype=np.float64)
    keys[picks] = -np.arange(len(picks), dtype=np.float64)
    return spread(candidacy, index, picks, keys)


def direction_of_target(target: PairGradients, candidacy: Candidacy) -> npt.NDArray[np.float64]:
    """Returns where training on a target's pairs leads, each of them a prompt of its own: (d,)."""
    return training_direction(target, np.arange(len(target.pairs)), candidacy.seed, None, candidacy.config.threads)
