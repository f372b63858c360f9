"""Pairs whose gradients add up to the direction of training *(ours)*."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.pairs.linear import training_direction
from bpo.pairs.size import ChoiceSize
from bpo.selection.strategies.taking import picked

if TYPE_CHECKING:
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def matching(candidacy: Candidacy) -> Choice:
    """The pairs whose sum points where training on all candidates leads, taken one after another *(ours)*.

    A pair is worth what it adds to those that are there: at each turn the one comes that most raises the cosine between
    the sum of unit gradients and the direction of training (:func:`bpo.pairs.linear.training_direction`); with a
    target, that of training on the target's pairs. Pairs are ranked by their turn: 0, −1, −2 and so on.
    """
    assert candidacy.features is not None
    config = candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    features, prompts = candidacy.features.take(index), candidacy.prompt_of_pair[index]
    if candidacy.target is None:
        direction = training_direction(features, prompts, candidacy.seed, candidacy.shares)
    else:
        wanted = candidacy.target
        direction = training_direction(wanted, np.arange(len(wanted.pairs)), candidacy.seed)
    picks, _ = _core.matching(
        *features,
        (-direction).astype(np.float32),
        candidacy.budget,
        prompts=prompts,
        max_depth=config.max_depth,
        cache_bytes=ChoiceSize.of(candidacy.features, config, candidacy.shares, strategy="matching").cache_bytes,
        threads=config.threads,
        processes=candidacy.shares,
    )
    return picked(candidacy, index[picks], -np.arange(len(picks), dtype=np.float64))
