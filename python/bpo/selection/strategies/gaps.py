"""Rules that read scores alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.selection.strategies.taking import largest, middle, one_a_prompt, ranks

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.selection.strategies.candidacy import Candidacy, Choice


def margin(candidacy: Candidacy) -> Choice:
    """The largest score gaps overall (the external margin of arXiv 2502.14560); ties go to the earlier pair."""
    index = np.flatnonzero(candidacy.eligible)
    return largest(candidacy, index, candidacy.score_gaps[index])


def two_sigma(candidacy: Candidacy) -> Choice:
    """One pair a prompt: the best response against the one whose score is nearest to μ − 2σ (arXiv 2502.16825).

    μ and σ are mean and standard deviation of all scores of the prompt. The paper samples up to 400 responses; of ten
    or fewer the lowest score is within 3σ at most, so this is ``"best_worst"`` for most prompts then. Where the best
    response is in no eligible pair, the best that is in one takes its place *(ours)*; budgets below the number of
    prompts, ties and what is ranked are as those of ``"best_worst"``, by closeness in units of σ.
    """
    index = np.flatnonzero(candidacy.eligible)
    prompts, scores = candidacy.prompt_of_pair[index], candidacy.pair_scores[index]
    mean, deviation = _by_prompt(candidacy)
    best = np.full(len(mean), -np.inf)
    np.maximum.at(best, prompts, scores[:, 0])
    distance = np.abs(scores[:, 1] - (mean - 2 * deviation)[prompts])
    # Stated pairs may give a response another score than before, so that no spread is left of those of its prompt.
    distance /= np.where(deviation > 0, deviation, 1)[prompts]
    return one_a_prompt(candidacy, index, -distance, allowed=scores[:, 0] == best[prompts])


def air(candidacy: Candidacy) -> Choice:
    """Prompts whose responses score alike, pairs of a moderate gap and of high scores (AIR, arXiv 2504.03612).

    The paper filters thrice, by thresholds for a judge of its own: instructions of low variance of the scores over
    models, pairs of a moderate margin, responses of high absolute score. Ours takes no thresholds, so that any scores
    and any budget will do: each pair has a rank from 0 to 1 by the variance of its prompt's scores, the smaller the
    better, by how close its gap is to the median gap, and by the mean of its two scores; the largest sums are taken.
    """
    index = np.flatnonzero(candidacy.eligible)
    deviation = _by_prompt(candidacy)[1][candidacy.prompt_of_pair[index]]
    moderate = middle(candidacy.score_gaps[index])
    keys = ranks(-deviation) + ranks(moderate) + ranks(candidacy.pair_scores[index].mean(axis=1))
    return largest(candidacy, index, keys)


def _by_prompt(candidacy: Candidacy) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of the scores of each prompt's responses, (n,) each."""
    known = np.isfinite(candidacy.scores)
    scores, prompts = candidacy.scores[known], candidacy.prompt_of_response[known]
    counts = np.bincount(prompts, minlength=int(candidacy.prompt_of_response.max()) + 1)
    mean = np.bincount(prompts, scores, len(counts)) / np.maximum(counts, 1)
    square = np.bincount(prompts, (scores - mean[prompts]) ** 2, len(counts))
    return mean, np.sqrt(square / np.maximum(counts, 1))
