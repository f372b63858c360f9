"""Which pairs are kept: one function a strategy, all of one signature."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bpo import _core
from bpo.config import SelectConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.clustering import PairClusters
    from bpo.config import Strategy


@dataclasses.dataclass(frozen=True)
class Candidacy:
    """What a strategy chooses from.

    Attributes:
        prompt_of_pair: (P,) int64.
        score_gaps: (P,) float64, NaN where the data gives no scores.
        eligible: (P,) bool; the others must not be chosen.
        budget: Pairs to choose, at most the eligible ones.
        config: Settings.
        seed: Of random choices.
        clusters: Clusters and scores of the pairs, for strategies that use gradients.
    """

    prompt_of_pair: npt.NDArray[np.int64]
    score_gaps: npt.NDArray[np.float64]
    eligible: npt.NDArray[np.bool_]
    budget: int
    config: SelectConfig
    seed: int
    clusters: PairClusters | None = None


class Choice(Protocol):
    """A strategy: candidates to the chosen pairs and what they were ranked by ((P,) bool and (P,) float64)."""

    def __call__(self, candidacy: Candidacy, /) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
        """Chooses."""


def bpo(candidacy: Candidacy) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Depth by gradient clusters: step 8 of the method (arXiv 2411.10914; the allocation is ours).

    Each prompt's best pair first; the rest of the budget is shared among the clusters, the most useful pairs of each
    first. Usefulness is centrality, put in order by ``SelectConfig.ranking``.
    """
    assert candidacy.clusters is not None
    clusters, config = candidacy.clusters, candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    labels = clusters.labels[index]
    keys = _core.ranking_keys(
        clusters.centrality[index].astype(np.float64),
        config.ranking,
        temperature=config.temperature,
        seed=candidacy.seed,
    )
    weights = None
    if config.cluster_weighting == "informativeness":
        counts = np.bincount(labels, minlength=len(clusters.centroids))
        sums = np.bincount(labels, weights=clusters.informativeness[index], minlength=len(clusters.centroids))
        weights = sums / np.maximum(counts, 1)
    mask = _core.allocate_depth(
        candidacy.prompt_of_pair[index],
        labels,
        keys,
        candidacy.budget,
        max_depth=config.max_depth,
        cluster_weights=weights,
    )
    return _spread(candidacy, index, mask, keys)


def uniform(candidacy: Candidacy) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """The same depth for every prompt: the paper's simple method (arXiv 2411.10914). Pairs are drawn at random.

    Prompts with fewer pairs leave their share to the others; a remainder goes to prompts drawn at random.
    """
    index = np.flatnonzero(candidacy.eligible)
    prompts = candidacy.prompt_of_pair[index]
    generator = np.random.default_rng(candidacy.seed)
    order_of_pair = generator.random(len(index))
    order_of_prompt = generator.random(int(prompts.max()) + 1)
    by_prompt = np.lexsort((order_of_pair, prompts))
    first = np.flatnonzero(np.r_[True, np.diff(prompts[by_prompt]) != 0])
    rank = np.empty(len(index), dtype=np.int64)
    rank[by_prompt] = np.arange(len(index)) - np.repeat(first, np.diff(np.r_[first, len(index)]))
    if candidacy.config.max_depth is not None:
        allowed = rank < candidacy.config.max_depth
        index, rank, prompts = index[allowed], rank[allowed], prompts[allowed]
    # Every prompt's first pair, then every prompt's second, and so on.
    taken = np.lexsort((order_of_prompt[prompts], rank))[: candidacy.budget]
    return _spread(candidacy, index, taken, -rank.astype(np.float64))


def random(candidacy: Candidacy) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Pairs drawn at random from all candidates: the control."""
    index = np.flatnonzero(candidacy.eligible)
    keys = np.random.default_rng(candidacy.seed).random(len(index))
    return _largest(candidacy, index, keys)


def margin(candidacy: Candidacy) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """The largest score gaps overall (the external margin of arXiv 2502.14560); ties go to the earlier pair."""
    index = np.flatnonzero(candidacy.eligible)
    return _largest(candidacy, index, candidacy.score_gaps[index])


STRATEGIES: dict[Strategy, Choice] = {"bpo": bpo, "uniform": uniform, "random": random, "margin": margin}
NEEDS_SCORES: frozenset[Strategy] = frozenset({"margin"})
NEEDS_GRADIENTS: frozenset[Strategy] = frozenset({"bpo"})
KEEPS_EVERY_PROMPT: frozenset[Strategy] = frozenset({"bpo", "uniform"})
"""Strategies that give each kept prompt at least one pair, so their budget is at least the number of prompts."""


def _largest(
    candidacy: Candidacy, index: npt.NDArray[np.int64], keys: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Takes the pairs with the largest keys, at most ``max_depth`` of a prompt."""
    order = np.argsort(-keys, kind="stable")
    if candidacy.config.max_depth is not None:
        taken: dict[int, int] = {}
        allowed = []
        for position in order:
            prompt = int(candidacy.prompt_of_pair[index[position]])
            taken[prompt] = taken.get(prompt, 0) + 1
            if taken[prompt] <= candidacy.config.max_depth:
                allowed.append(position)
        order = np.array(allowed, dtype=np.int64)
    return _spread(candidacy, index, order[: candidacy.budget], keys)


def _spread(
    candidacy: Candidacy,
    index: npt.NDArray[np.int64],
    taken: npt.NDArray[np.bool_] | npt.NDArray[np.int64],
    keys: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Puts the keys of the pairs in ``index``, and which of them are taken, back among all pairs."""
    chosen = np.zeros(len(candidacy.eligible), dtype=bool)
    chosen[index[taken]] = True
    usefulness = np.full(len(candidacy.eligible), np.nan)
    usefulness[index] = keys
    return chosen, usefulness
