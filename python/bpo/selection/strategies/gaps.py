"""Rules that read scores alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.selection.strategies.taking import largest

if TYPE_CHECKING:
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def margin(candidacy: Candidacy) -> Choice:
    """The largest score gaps overall (the external margin of arXiv 2502.14560); ties go to the earlier pair."""
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, candidacy.score_gaps[index])
