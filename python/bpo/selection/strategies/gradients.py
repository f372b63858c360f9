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


def largest_norm(candidacy: Candidacy) -> Choice:
    """The longest gradients: those that pull hardest (the context pruning of GradNCP, arXiv 2302.00617).

    The paper keeps, anew at each step of a meta-learning, the samples of largest gradient norm, as a cheap score tells
    it; ours is the norm of the pair's gradient in the sketch, of all that is differentiated, once.
    """
    assert candidacy.clusters is not None
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, candidacy.clusters.informativeness[index].astype(np.float64))


def smallest_norm(candidacy: Candidacy) -> Choice:
    """The shortest gradients: the control of ``"largest_norm"``, and what pruning of outliers keeps *(ours)*."""
    assert candidacy.clusters is not None
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, -candidacy.clusters.informativeness[index].astype(np.float64))
