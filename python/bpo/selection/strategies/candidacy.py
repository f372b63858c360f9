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


Need = Literal["scores", "gradients", "clusters", "differences", "target"]
"""What a strategy reads of a candidacy beyond prompts and budget; all but ``"scores"`` need the model or its store."""


@dataclasses.dataclass(frozen=True)
class Candidacy:
    """What a strategy chooses from: P candidate pairs.

    Attributes:
        prompt_of_pair: (P,) int64.
        score_gaps: (P,) float64, NaN where the data gives no scores.
        eligible: (P,) bool; the others must not be chosen.
        budget: Pairs to choose, at most the eligible ones.
        config: Settings.
        seed: Of random choices.
        clusters: Clusters and scores of the pairs, for strategies that need ``"gradients"``, ``"clusters"`` (else all
            pairs are one cluster) or a ``"target"`` (``alignment`` is then the influence on it).
        features: The gradients of the pairs at unit length, likewise; side by side where there are several checkpoints.
        target: Those of the pairs of the target, where there is one.
        differences: h_w − h_l of the pairs, for strategies that need ``"differences"``.
        margins: (P,) float64, likewise: Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)), the implicit margins.
    """

    prompt_of_pair: npt.NDArray[np.int64]
    score_gaps: npt.NDArray[np.float64]
    eligible: npt.NDArray[np.bool_]
    budget: int
    config: SelectConfig
    seed: int
    clusters: PairClusters | None = None
    features: PairGradients | None = None
    target: PairGradients | None = None
    differences: PairGradients | None = None
    margins: npt.NDArray[np.float64] | None = None


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
    """

    choose: Callable[[Candidacy], Choice]
    needs: frozenset[Need] = frozenset()
    keeps_every_prompt: bool = False
    weighs_usefulness: bool = False

    def needs_of(self, config: SelectConfig) -> frozenset[Need]:
        """What it reads under some settings: usefulness may weigh score gaps."""
        if self.weighs_usefulness and "score_gap" in config.usefulness:
            return self.needs | {"scores"}
        return self.needs
