"""What is worth a look: gradients of no use or far too long, prompts that are nearly the same, no common direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.breadth.compress import near_duplicates
from bpo.data.candidates import Skipped, report_skipped
from bpo.pairs.direction import prompts_agree

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.pairs.clustering import PairClusters
    from bpo.pairs.pair_gradients import PairGradients


# A p-value above which gradients are said to have no direction in common.
_DISAGREEING = 0.05


def report_unusable(kept: Candidates, clusters: PairClusters, config: SelectConfig) -> None:
    """Names the pairs whose gradient is zero or not finite."""
    skipped = Skipped()
    for pair in np.flatnonzero(~clusters.usable):
        zero = clusters.informativeness[pair] == 0
        reason = "pair whose gradient is zero" if zero else "pair whose gradient is NaN or infinite"
        skipped.add(reason, f"row {kept.pair_rows[pair]}")
    report_skipped(skipped, config.on_invalid)
    kept.skipped.merge(skipped)


def note_near_duplicates(
    candidates: Candidates, embeddings: npt.NDArray[np.float32], config: SelectConfig, progress: bool
) -> Skipped:
    """Names the prompts that are nearly the same as an earlier one; breadth compression may keep both."""
    noted = Skipped()
    if config.duplicate_threshold is None:
        return noted
    found = near_duplicates(embeddings, config.duplicate_threshold, progress=progress)
    for prompt in np.flatnonzero(found.earlier >= 0):
        row, earlier = candidates.prompt_rows[[prompt, found.earlier[prompt]]]
        noted.add(
            f"prompt nearly the same as an earlier one (cosine ≥ {config.duplicate_threshold:g})",
            f"row {row}, like row {earlier}: {found.similarity[prompt]:.3f}",
        )
    return noted


def note_disagreement(kept: Candidates, features: PairGradients, eligible: npt.NDArray[np.bool_], seed: int) -> Skipped:
    """Says where the gradients of different prompts have no direction in common."""
    noted = Skipped()
    agree = prompts_agree(features, eligible, kept.prompt_of_pair, seed)
    if agree > _DISAGREEING:
        noted.add(
            f"selection by gradients that may be no better than a random one: those of different prompts have no "
            f"direction in common (p = {agree:.2f})",
            f"all {len(kept.prompts)} prompts",
        )
    return noted


def note_outliers(kept: Candidates, clusters: PairClusters) -> Skipped:
    """Names the pairs whose gradient is far longer than those of the others; they are kept *(ours)*.

    Far is six robust standard deviations (1.4826 times the median absolute deviation) of the logarithm of the norm.
    """
    noted = Skipped()
    index = np.flatnonzero(clusters.usable)
    logs = np.log(clusters.informativeness[index].astype(np.float64))
    distance = logs - np.median(logs)
    spread = 1.4826 * np.median(np.abs(distance))
    for pair, far in zip(index, distance, strict=True):
        if far > 6 * max(spread, 0.1):
            noted.add("pair whose gradient is far longer than the others", f"row {kept.pair_rows[pair]}")
    return noted
