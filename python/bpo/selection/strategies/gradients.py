"""Rules that read the gradient of each pair by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.selection.strategies.taking import largest

if TYPE_CHECKING:
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def less(candidacy: Candidacy) -> Choice:
    """The largest influence on a target set (LESS, arXiv 2402.04333), with gradients of pairs in place of SFT losses.

    The influence of a pair on a subtask of the target is the mean of the cosines between its gradient and those of the
    subtask's pairs, averaged over the checkpoints with their learning rates as weights; that on the target is the
    largest over its subtasks.
    """
    assert candidacy.clusters is not None
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, candidacy.clusters.alignment[index].astype(np.float64))
