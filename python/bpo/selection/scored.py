"""Measured pairs to clusters, scores and features: steps 6 and 7 of the method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpo.pairs.checkpoints import cluster_checkpoints
from bpo.pairs.clustering import PairClusters, cluster_pairs
from bpo.pairs.pair_gradients import PairGradients, unit_features
from bpo.system.progress import core_progress

if TYPE_CHECKING:
    import os

    from bpo.config import SelectConfig
    from bpo.pairs.measured import MeasuredPairs


def clustered(
    pairs: MeasuredPairs,
    config: SelectConfig,
    *,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[PairClusters, PairGradients]:
    """Clusters and scores pairs; returns their features, too: the gradients at unit length (NaN where unusable).

    Args:
        pairs: The pairs.
        config: As for :func:`bpo.cluster_pairs`.
        seed: Of the k-means++ seeding.
        store: Directory in which the features of several checkpoints are kept for as long.
        progress: Whether to show a progress bar.
    """
    with core_progress("Clusters", progress) as report:
        if config.checkpoints is not None:
            rates = list(config.checkpoints.values())
            return cluster_checkpoints(pairs.gradients, rates, config=config, store=store, seed=seed, progress=report)
        clusters = cluster_pairs(*pairs.gradients[0], config=config, seed=seed, progress=report)
    return clusters, unit_features(pairs.gradients[0], clusters.informativeness, clusters.usable)
