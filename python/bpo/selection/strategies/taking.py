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
