"""What others are compared with: a random choice, and what most pipelines do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.selection.strategies.taking import largest, one_a_prompt

if TYPE_CHECKING:
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def random(candidacy: Candidacy) -> Choice:
    """Pairs drawn at random from all candidates: the control."""
    index = np.flatnonzero(candidacy.eligible)
    keys = np.random.default_rng(candidacy.seed).random(len(index))
    return largest(candidacy, index, keys)


def best_worst(candidacy: Candidacy) -> Choice:
    """One pair a prompt, that of the largest score gap: the best response against the worst, as most pipelines do.

    With fewer pairs than prompts, of prompts drawn at random; a budget above the number of prompts is not used up. Ties
    go to the earlier pair.
    """
    index = np.flatnonzero(candidacy.eligible)
    return one_a_prompt(candidacy, index, candidacy.score_gaps[index])
