"""Pairs to clusters of gradients, and to the scores by which pairs are ranked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core
from bpo.choices import SEED
from bpo.config import SelectConfig
from bpo.pairs.pair_gradients import PairGradients, pair_norms
from bpo.pairs.size import ChoiceSize, n_clusters

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.system.progress import Progress
    from bpo.world.shares import Shares


@dataclasses.dataclass(frozen=True)
class PairClusters:
    """Clusters and scores of P pairs. The entries of unusable pairs are NaN, and −1 in ``labels``.

    Attributes:
        usable: (P,) bool, false where the gradient of the pair is zero or not finite.
        labels: (P,) int32 cluster of each pair.
        centroids: (k, d) float32.
        informativeness: (P,) float32, norm of the pair's gradient in the sketch.
        centrality: (P,) float32, cosine between the pair's gradient and the centre of its cluster.
        distance: (P,) float32, distance of the unit gradient from the centroid.
        alignment: (P,) float32, cosine between the pair's gradient and the mean direction of all.
        inertia: (iterations,) float64, sum of squared distances.
    """

    usable: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int32]
    centroids: npt.NDArray[np.float32]
    informativeness: npt.NDArray[np.float32]
    centrality: npt.NDArray[np.float32]
    distance: npt.NDArray[np.float32]
    alignment: npt.NDArray[np.float32]
    inertia: npt.NDArray[np.float64]


def cluster_pairs(
    rows: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    *,
    config: SelectConfig | None = None,
    seed: int = SEED,
    progress: Progress | None = None,
) -> PairClusters:
    """Clusters the gradients z = a·h_w + b·h_l of pairs at unit length, and scores each pair, without forming any z.

    Steps 6 and 7 of the method (arXiv 2411.10914); number of clusters, metric and the formulas of the scores are ours.

    Args:
        rows: (R, d), the sketch h of each response, possibly memory-mapped, as in :class:`PairGradients`.
        pairs: (P, 2) int64, rows of the preferred and of the other response.
        coefficients: (P, 2) float32, a and b of each pair (:func:`bpo.pair_coefficients`); a pair whose are not finite,
            or one of whose rows is not, is not usable.
        config: Uses ``n_clusters``, ``metric``, ``max_iter``, ``max_memory`` and ``threads``.
        seed: Of the k-means++ seeding.
        progress: Called with (done, total) now and then.

    Returns:
        Labels, centroids and scores.

    Raises:
        bpo.OutOfRangeError: A pair that names no row.
        ValueError: Shapes that do not fit, or no usable pair.

    Example:
        >>> rows = np.array([[1, 0], [0, 1], [0, 0.9]], dtype=np.float32)
        >>> pairs = np.array([[0, 1], [0, 2], [1, 0]])
        >>> weights = np.tile(np.float32([-1, 1]), (3, 1))
        >>> clusters = cluster_pairs(rows, pairs, weights, config=SelectConfig(n_clusters=2))
        >>> bool(clusters.labels[0] == clusters.labels[1] != clusters.labels[2])
        True
    """
    return clustered(PairGradients(rows, pairs, coefficients), SelectConfig.of(config), seed, progress)


def clustered(
    gradients: PairGradients,
    config: SelectConfig,
    seed: int,
    progress: Progress | None = None,
    shares: Shares | None = None,
) -> PairClusters:
    """As :func:`cluster_pairs`; with ``shares`` by several processes, each of which reads the rows of its own pairs."""
    rows, pairs, coefficients = gradients
    norms = pair_norms(gradients, config.threads, progress, shares)
    usable = np.isfinite(norms) & (norms > 0)
    index = np.flatnonzero(usable)
    if len(index) == 0:
        raise ValueError("The gradient of every pair is zero or not finite, so there is nothing to cluster.")
    unit = np.ascontiguousarray(coefficients[index] / norms[index, None], dtype=np.float32)
    used = np.ascontiguousarray(pairs[index], dtype=np.int64)
    result = _core.pair_kmeans(
        rows,
        used,
        unit,
        n_clusters(len(index), config),
        metric=config.metric,
        max_iter=config.max_iter,
        seed=seed,
        cache_bytes=ChoiceSize.of(gradients, config, shares).cache_bytes,
        threads=config.threads,
        progress=progress,
        processes=shares,
    )
    scores = _core.score_pairs(
        rows,
        used,
        unit,
        result.centroids,
        result.labels,
        threads=config.threads,
        progress=progress,
        processes=shares,
    )

    def spread(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        full = np.full(len(pairs), np.nan, dtype=np.float32)
        full[index] = values
        return full

    labels = np.full(len(pairs), -1, dtype=np.int32)
    labels[index] = result.labels
    return PairClusters(
        usable=usable,
        labels=labels,
        centroids=result.centroids,
        informativeness=norms,
        centrality=spread(scores.centrality),
        distance=spread(scores.distance),
        alignment=spread(scores.alignment),
        inertia=result.inertia,
    )
