"""What a strategy chooses from, what it returns, and what it says of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.pairs.clustering import PairClusters
    from bpo.pairs.pair_gradients import PairGradients
    from bpo.world.shares import Shares


Need = Literal["scores", "gradients", "clusters", "heldout", "logps", "reference", "differences", "target"]
"""What a strategy reads of a candidacy beyond prompts and budget; all but ``"scores"`` need the model or its store."""


class UnsuitedError(ValueError):
    """What a strategy reads says nothing on this data; the message names the strategy and what would help."""


@dataclasses.dataclass(frozen=True)
class Candidacy:
    """What a strategy chooses from: P candidate pairs.

    Attributes:
        prompt_of_pair: (P,) int64.
        score_gaps: (P,) float64, NaN where the data gives no scores.
        pair_scores: (P, 2) float64, scores of the preferred and of the other response, likewise.
        lengths: (P, 2) int64, at least 1: their lengths in tokens, or in characters where there is no model.
        scores: (R,) float64, scores of all responses of the data to these prompts, in a pair or not; NaN likewise.
        prompt_of_response: (R,) int64, their prompts, numbered as in ``prompt_of_pair``.
        eligible: (P,) bool; the others must not be chosen.
        budget: Pairs to choose, at most the eligible ones.
        config: Settings.
        seed: Of random choices.
        clusters: Clusters and scores of the pairs, for strategies that need ``"gradients"``, ``"clusters"`` (else all
            pairs are one cluster) or a ``"target"`` (``alignment`` is then the influence on it).
        features: The gradients of the pairs at unit length, likewise; side by side where there are several checkpoints.
        target: Those of the pairs of the target, where there is one.
        heldout_margins: (P,) float64, for strategies that need ``"heldout"``: what training on the pairs of the other
            prompts, in the linear regime, would make of each pair's margin, above 0 where it agrees with the label.
        differences: h_w − h_l of the pairs, for strategies that need ``"differences"``; of one model, not of several
            checkpoints.
        logps: (P, 2) float64, log π of the preferred and of the other response, for strategies that need ``"logps"``,
            ``"reference"`` or ``"differences"``; of one model, too.
        margins: (P,) float64, likewise: Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)), the implicit margins.
            All are 0 while the policy is its own reference, which strategies that need ``"reference"`` are spared.
        shares: The processes of a job that share the rows, for strategies of bpo's own that know how to; else None.
    """

    prompt_of_pair: npt.NDArray[np.int64]
    score_gaps: npt.NDArray[np.float64]
    pair_scores: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    prompt_of_response: npt.NDArray[np.int64]
    eligible: npt.NDArray[np.bool_]
    budget: int
    config: SelectConfig
    seed: int
    clusters: PairClusters | None = None
    features: PairGradients | None = None
    target: PairGradients | None = None
    heldout_margins: npt.NDArray[np.float64] | None = None
    differences: PairGradients | None = None
    logps: npt.NDArray[np.float64] | None = None
    margins: npt.NDArray[np.float64] | None = None
    shares: Shares | None = None


Choice = tuple[Any, Any]
"""What a strategy returns: which pairs are chosen, (P,) bool, and what they were ranked by, (P,) float64."""


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A strategy and what it needs.

    Attributes:
        choose: From a :class:`Candidacy` to a :data:`Choice`.
        needs: What it reads.
        keeps_every_prompt: Whether each prompt gets ``SelectConfig.min_depth`` pairs at least, so that the budget must
            be that many times the number of prompts.
        weighs_usefulness: Whether it weighs what ``SelectConfig.usefulness`` names.
        shares_rows: Whether the processes of a job run it together, each with the rows of its own pairs; else the first
            runs it.
    """

    choose: Callable[[Candidacy], Choice]
    needs: frozenset[Need] = frozenset()
    keeps_every_prompt: bool = False
    weighs_usefulness: bool = False
    shares_rows: bool = False

    def needs_of(self, config: SelectConfig) -> frozenset[Need]:
        """What it reads under some settings: usefulness may weigh score gaps, and an order be by held-out margins."""
        needs = set(self.needs)
        if self.weighs_usefulness and "score_gap" in (config.usefulness_terms or {}):
            needs.add("scores")
        if config.order == "easiest_first":
            needs |= {"gradients", "heldout"}
        return frozenset(needs)
