"""The paper's two methods: depth by gradient clusters, and the same depth for every prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.data.pairing import ranks_in_prompts
from bpo.selection.strategies.matching import matched
from bpo.selection.strategies.taking import spread

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.pairs.clustering import PairClusters
    from bpo.selection.strategies.candidacy import Candidacy, Choice


def bpo(candidacy: Candidacy) -> Choice:
    """Depth by gradient clusters: step 8 of the method (arXiv 2411.10914; the allocation is ours).

    With ``min_depth=1`` each prompt's best pair first; the rest of the budget is shared among the clusters, the most
    useful pairs of each first. Useful is what a pair adds to those that are there, as the strategy ``"matching"`` has
    it, or what ``SelectConfig.usefulness`` weighs; then ``ranking`` says in which order pairs are taken.
    """
    assert candidacy.clusters is not None
    clusters, config = candidacy.clusters, candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    labels, weights = clusters.labels[index], _cluster_weights(clusters, index, config)
    min_depth = config.min_depth or 0
    if config.usefulness_terms is None:
        return matched(candidacy, index, min_depth=min_depth, clusters=labels, cluster_weights=weights)
    keys = _core.ranking_keys(
        usefulness(candidacy, index), config.ranking, temperature=config.temperature, seed=candidacy.seed
    )
    mask = _core.allocate_depth(
        candidacy.prompt_of_pair[index],
        labels,
        keys,
        candidacy.budget,
        min_depth=min_depth,
        max_depth=config.max_depth,
        cluster_weights=weights,
    )
    return spread(candidacy, index, mask, keys)


def _cluster_weights(
    clusters: PairClusters, index: npt.NDArray[np.int64], config: SelectConfig
) -> npt.NDArray[np.float64] | None:
    """What the clusters weigh beside their pairs: (k,), the means of what ``SelectConfig.cluster_weighting`` names."""
    if config.cluster_weighting == "size":
        return None
    labels = clusters.labels[index]
    values = getattr(clusters, config.cluster_weighting)[index].astype(np.float64)
    counts = np.bincount(labels, minlength=len(clusters.centroids))
    sums = np.bincount(labels, weights=values, minlength=len(clusters.centroids))
    means: npt.NDArray[np.float64] = np.maximum(sums / np.maximum(counts, 1), 0)
    return means


def usefulness(candidacy: Candidacy, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Returns the usefulness of the pairs in ``index``: the weighted sum of the terms of ``SelectConfig.usefulness``.

    Each term has mean 0 and standard deviation 1 over these pairs, so that the weights compare; of informativeness it
    is the logarithm that counts *(ours)*.
    """
    assert candidacy.clusters is not None and candidacy.config.usefulness_terms is not None
    total = np.zeros(len(index))
    for name, weight in candidacy.config.usefulness_terms.items():
        values = candidacy.score_gaps if name == "score_gap" else getattr(candidacy.clusters, name)
        term = values[index].astype(np.float64)
        if name == "informativeness":
            term = np.log(term)
        spread = term.std()
        total += weight * (term - term.mean()) / (spread if spread > 0 else 1.0)
    return total


def uniform(candidacy: Candidacy) -> Choice:
    """The same depth for every prompt: the paper's simple method (arXiv 2411.10914). Pairs are drawn at random.

    Prompts with fewer pairs leave their share to the others; a remainder goes to prompts drawn at random.
    """
    index = np.flatnonzero(candidacy.eligible)
    prompts = candidacy.prompt_of_pair[index]
    generator = np.random.default_rng(candidacy.seed)
    order_of_pair = generator.random(len(index))
    order_of_prompt = generator.random(int(prompts.max()) + 1)
    rank = ranks_in_prompts(prompts, order_of_pair)
    if candidacy.config.max_depth is not None:
        allowed = rank < candidacy.config.max_depth
        index, rank, prompts = index[allowed], rank[allowed], prompts[allowed]
    # Every prompt's first pair, then every prompt's second, and so on.
    taken = np.lexsort((order_of_prompt[prompts], rank))[: candidacy.budget]
    return spread(candidacy, index, taken, -rank.astype(np.float64))
