"""From keys or picks of some pairs to a choice among all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.data.pairing import ranks_in_prompts

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.selection.strategies.candidacy import Candidacy, Choice


def largest(candidacy: Candidacy, index: npt.NDArray[np.int64], keys: npt.NDArray[np.float64]) -> Choice:
    """Takes the pairs with the largest keys, at most ``max_depth`` of a prompt."""
    order = np.argsort(-keys, kind="stable")
    if candidacy.config.max_depth is not None:
        rank = ranks_in_prompts(candidacy.prompt_of_pair[index], -keys)
        order = order[rank[order] < candidacy.config.max_depth]
    return spread(candidacy, index, order[: candidacy.budget], keys)


def ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The place of each value in the order of all, from 0 for the smallest to 1 for the largest; ties share the mean.

    Example:
        >>> ranks(np.array([7.0, 1.0, 7.0])).tolist()
        [0.75, 0.0, 0.75]
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - (counts + 1) / 2
    shares: npt.NDArray[np.float64] = middles[place] / max(1, len(values) - 1)
    return shares


def middle(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Keys that are the larger the closer a value is to the median by rank: 0 at best, −½ at worst."""
    keys: npt.NDArray[np.float64] = -np.abs(ranks(values) - 0.5)
    return keys


def one_a_prompt(
    candidacy: Candidacy,
    index: npt.NDArray[np.int64],
    keys: npt.NDArray[np.float64],
    allowed: npt.NDArray[np.bool_] | None = None,
) -> Choice:
    """Takes the allowed pair with the largest key of each prompt, which has one; of few pairs, of prompts at random."""
    if allowed is not None:
        keys = np.where(allowed, keys, np.nan)
    best = np.flatnonzero(ranks_in_prompts(candidacy.prompt_of_pair[index], -keys) == 0)
    order = np.random.default_rng(candidacy.seed).permutation(len(best))
    return spread(candidacy, index, best[order[: candidacy.budget]], keys)


def spread(
    candidacy: Candidacy,
    index: npt.NDArray[np.int64],
    taken: npt.NDArray[np.bool_] | npt.NDArray[np.int64],
    keys: npt.NDArray[np.float64],
) -> Choice:
    """Puts the keys of the pairs in ``index``, and which of them are taken, back among all pairs."""
    chosen = np.zeros(len(candidacy.eligible), dtype=bool)
    chosen[index[taken]] = True
    ranked_by = np.full(len(candidacy.eligible), np.nan)
    ranked_by[index] = keys
    return chosen, ranked_by


def picked(candidacy: Candidacy, picks: npt.NDArray[np.int64], keys: npt.NDArray[np.float64]) -> Choice:
    """Picks of the core, with the key of each."""
    chosen = np.zeros(len(candidacy.eligible), dtype=bool)
    chosen[picks] = True
    ranked_by = np.full(len(candidacy.eligible), np.nan)
    ranked_by[picks] = keys
    return chosen, ranked_by
