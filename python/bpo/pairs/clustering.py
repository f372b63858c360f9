"""Pairs to clusters of gradients, and to the scores by which pairs are ranked."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core
from bpo.config import SelectConfig
from bpo.pairs.pair_gradients import PairGradients, pair_norms

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


# What the stages after the gradients take at most, in bytes: measured as growth of the resident memory over selections
# of 160,000 and 320,000 responses with 560,000 and 1,120,000 pairs, and over clusterings of up to 1,000,000 responses
# mapped from 2 GB, with 125,000 to 3,500,000 pairs.
_FIXED_BYTES = 160 << 20  # rows of the map that are in hand, and slack
_BYTES_A_ROW = 250
_BYTES_A_PAIR = 500
# Beside these, stages that follow one another take so many for each number of a sketch.
_BYTES_A_THREAD = 252 * 12  # clustering: rows that a thread works on
_BYTES_A_CENTROID = 40
# Where processes share the pairs: numbers on their way to others, and what waits for a turn; the sums, sent and heard.
_BYTES_A_SHARED_PAIR = 100
_BYTES_A_SHARED_CENTROID = 32
_BYTES_A_PROMPT = 8  # whether prompts agree: the sum of each of 1,000 prompts
# The core's default of what it keeps from pass to pass.
_CACHE_BYTES = 1 << 30
# Covariances of pairs with those that they are to tell about, in float32.
INFORMATION_BYTES = 64 << 20
# Candidates of a round of the D-optimal design, and copies of their vectors.
_CANDIDATES, _COPIES = 1024, 4


def memory_needed(
    n_rows: int,
    n_pairs: int,
    dim: int,
    config: SelectConfig,
    *,
    strategy: str = "bpo",
    budget: int | None = None,
    n_processes: int = 1,
) -> int:
    """Returns the bytes that choosing among pairs takes, beside the data and whatever is kept from pass to pass.

    Args:
        n_rows: Responses.
        n_pairs: Their pairs.
        dim: Numbers of a sketch.
        config: Uses ``n_clusters`` and ``threads``.
        strategy: What chooses; that of a strategy of the user's own is not known.
        budget: Pairs to choose; all if None.
        n_processes: How many share the pairs; the bytes are those of each.
    """
    threads = config.threads or os.cpu_count() or 1
    n_clusters = _n_clusters(n_pairs, config)
    shared = n_processes > 1
    of_centroid = _BYTES_A_CENTROID + _BYTES_A_SHARED_CENTROID * shared
    clustering = (of_centroid * n_clusters + _BYTES_A_THREAD * threads) * dim
    agreement = _BYTES_A_PROMPT * min(n_pairs, 1000) * dim
    choice = 0
    if strategy == "coreset":
        # float64 vectors of the pairs with weight, and their products; about twice as many as a sketch has numbers span
        # all that a cluster's mean can be made of.
        of_cluster = min(2 * dim, n_pairs if budget is None else budget)
        vectors = min(of_cluster * min(threads, n_clusters), n_pairs if budget is None else budget)
        choice = 8 * vectors * (dim + of_cluster)
    elif strategy in ("d_optimal", "bald"):
        choice = 16 * dim**2 + 8 * _COPIES * _CANDIDATES * (dim + _CANDIDATES)
    elif strategy == "epig":
        # Once as they are computed and once as they are kept; and a vector for each pair that is taken.
        choice = 2 * INFORMATION_BYTES + 8 * dim * (n_pairs if budget is None else budget)
    of_pair = _BYTES_A_PAIR + _BYTES_A_SHARED_PAIR * shared
    return _FIXED_BYTES + _BYTES_A_ROW * n_rows + of_pair * n_pairs + max(clustering, agreement, choice)


def cache_bytes(
    n_rows: int,
    n_pairs: int,
    dim: int,
    config: SelectConfig,
    *,
    strategy: str = "bpo",
    budget: int | None = None,
    n_processes: int = 1,
) -> int:
    """Returns the bytes that may be kept from pass to pass: what :func:`memory_needed` leaves of ``max_memory``."""
    if config.memory_limit is None:
        return _CACHE_BYTES
    needed = memory_needed(n_rows, n_pairs, dim, config, strategy=strategy, budget=budget, n_processes=n_processes)
    return max(0, config.memory_limit - needed)


def check_memory(
    n_rows: int,
    n_pairs: int,
    dim: int,
    config: SelectConfig,
    *,
    strategy: str = "bpo",
    budget: int | None = None,
    n_processes: int = 1,
) -> None:
    """Checks that ``SelectConfig.max_memory`` suffices.

    Raises:
        ValueError: It does not; the message says what would.
    """
    needed = memory_needed(n_rows, n_pairs, dim, config, strategy=strategy, budget=budget, n_processes=n_processes)
    if config.memory_limit is not None and needed > config.memory_limit:
        raise ValueError(
            f"SelectConfig.max_memory is {config.memory_limit / 2**20:,.0f} MiB, and choosing among {n_pairs} pairs of "
            f"{n_rows} responses takes {math.ceil(needed / 2**20):,} MiB with strategy={strategy!r}. Allow as much, or "
            "keep fewer prompts (breadth), pairs (max_pairs_per_prompt), clusters (n_clusters) or numbers of a sketch "
            "(sketch_dim)."
        )


def cluster_pairs(
    rows: npt.NDArray[Any],
    pairs: npt.NDArray[np.int64],
    coefficients: npt.NDArray[np.float32],
    *,
    config: SelectConfig | None = None,
    seed: int = 0,
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
        _n_clusters(len(index), config),
        metric=config.metric,
        max_iter=config.max_iter,
        seed=seed,
        cache_bytes=cache_bytes(
            len(rows), len(pairs), rows.shape[1], config, n_processes=1 if shares is None else shares.size
        ),
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


def _n_clusters(n_pairs: int, config: SelectConfig) -> int:
    return default_n_clusters(n_pairs) if config.n_clusters is None else max(1, min(config.n_clusters, n_pairs))


def default_n_clusters(n_pairs: int) -> int:
    """Returns √(pairs), at most 256: about as many clusters as pairs in each *(ours)*."""
    return max(1, min(256, math.isqrt(n_pairs)))
