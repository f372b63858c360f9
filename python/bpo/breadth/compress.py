"""Embeddings of prompts to the representative prompts that are kept: step 1 of the method."""

from __future__ import annotations

import dataclasses
import heapq
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from tqdm.auto import tqdm

from bpo import _core
from bpo.breadth.vectors import on_grid, unit_vectors
from bpo.choices import SEED, BreadthMethod

if TYPE_CHECKING:
    import numpy.typing as npt

_MAX_CLUSTERS = 100
_MOST_AT_ONCE = 4096
"""Prompts whose similarities to one another are held at once (128 MiB)."""

_BATCH = 512
_TILE = 4096


@dataclasses.dataclass(frozen=True)
class Breadth:
    """Which prompts are kept.

    Attributes:
        kept: (n,) bool.
        labels: (n,) int32. With ``"quota"`` the k-means cluster of each prompt; with the other methods the kept prompt
            that is most similar to it, counted among the kept ones.
        distances: (n,) float32, between unit vectors, from the centroid of its cluster, or from that kept prompt.
    """

    kept: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int32]
    distances: npt.NDArray[np.float32]


def compress_breadth(
    embeddings: npt.NDArray[np.floating[Any]],
    n_prompts: int,
    *,
    method: BreadthMethod = "quota",
    seed: int = SEED,
    threads: int | None = None,
    progress: bool = False,
) -> Breadth:
    """Keeps ``n_prompts`` representative prompts.

    Clustering and keeping representatives is the paper's (arXiv 2411.10914); which, and how many of each cluster, it
    does not say. Embeddings count at unit length, and similarity is their cosine *(ours)*. By ``method``:

    - ``"quota"`` *(ours)*: k-means with k = min(100, n_prompts); a quota for each cluster in proportion to its size
      (largest remainder, at least one), of those nearest to its centroid. Dense regions keep many prompts, and these
      are alike.
    - ``"representative"``: greedy facility location (Nemhauser et al. 1978; for training data, Wei et al. 2015 and
      CRAIG, arXiv 1906.01827). Each next prompt is the one that most raises the sum, over all prompts, of the
      similarity to the most similar kept one, so that every prompt has a kept one near. Exact up to 4,096 prompts;
      beyond, the prompts are first parted by k-means and each part gets its quota, as in GreeDi (arXiv 1411.0541).
    - ``"diverse"``: farthest first, or greedy k-center (Gonzalez 1985; for training data, arXiv 1708.00489). First the
      prompt nearest to the mean, then always the one least similar to those kept. Exact for any number of prompts. It
      keeps what is unlike everything else, so odd and broken prompts, too.

    Args:
        embeddings: (n, e) one row a prompt (:func:`bpo.embed_prompts`, or your own).
        n_prompts: How many to keep, 1 to n.
        method: ``"quota"``, ``"representative"`` or ``"diverse"``.
        seed: Of the k-means++ seeding.
        threads: Threads of the Rust core. The result does not depend on it, nor on the threads of NumPy.
        progress: Whether to show a progress bar, for ``"representative"`` and ``"diverse"``.

    Returns:
        ``kept``, (n,) bool, which prompts are kept; and what each prompt is near, ``labels`` and ``distances``: its
        k-means cluster with ``"quota"``, else the most similar of the kept prompts.

    Raises:
        ValueError: ``n_prompts`` out of range, an unknown method, or embeddings that are zero or not finite.

    Example:
        >>> points = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0, 0.9]])
        >>> compress_breadth(points, 2).kept.sum()
        np.int64(2)
        >>> compress_breadth(points, 2, method="diverse").kept
        array([ True, False, False,  True, False])
    """
    if method not in get_args(BreadthMethod):
        raise ValueError(f"method must be one of {list(get_args(BreadthMethod))}, got {method!r}.")
    unit = unit_vectors(embeddings)
    if not 1 <= n_prompts <= len(unit):
        raise ValueError(f"n_prompts must be between 1 and the {len(unit)} prompts, got {n_prompts}.")
    kept = np.zeros(len(unit), dtype=bool)
    if method == "quota":
        result = _core.kmeans(unit, min(_MAX_CLUSTERS, n_prompts), seed=seed, threads=threads)
        quotas = _quotas(np.bincount(result.labels, minlength=len(result.centroids)), n_prompts)
        for cluster, quota in enumerate(quotas):
            members = np.flatnonzero(result.labels == cluster)
            nearest = members[np.argsort(result.distances[members], kind="stable")]
            kept[nearest[:quota]] = True
        return Breadth(kept, result.labels, result.distances)
    with tqdm(total=n_prompts, desc="Breadth", unit="prompt", disable=not progress) as bar:
        if method == "representative":
            kept[_representatives(unit, n_prompts, seed, threads, bar)] = True
        else:
            kept[_farthest_first(unit, n_prompts, bar)] = True
    labels, distances = _core.assign(unit, np.ascontiguousarray(unit[kept]), threads=threads)
    return Breadth(kept, labels, distances)


def _representatives(
    unit: npt.NDArray[np.float32], n_prompts: int, seed: int, threads: int | None, bar: Any
) -> npt.NDArray[np.int64]:
    """Greedy facility location; in parts, where there are more prompts than can be compared at once."""
    weights = np.ones(len(unit))
    if len(unit) <= _MOST_AT_ONCE:
        return _facility_location(on_grid(unit), weights, n_prompts, bar)
    parts = _parts(unit, seed, threads)
    # Fewer are kept of all the parts together: each gives more than its share, of which the final ones are kept.
    wanted = max(n_prompts, min(_MOST_AT_ONCE, len(unit)), len(parts))
    final = wanted == n_prompts
    quotas = _quotas(np.array([len(part) for part in parts]), wanted)
    found = []
    for part, quota in zip(parts, quotas, strict=True):
        grid = on_grid(unit[part])
        chosen = _facility_location(grid, weights[part], int(quota), bar if final else None)
        if not final:
            nearest = (grid @ grid[chosen].T).argmax(axis=1)
            weights[part[chosen]] = np.bincount(nearest, minlength=len(chosen))
        found.append(part[chosen])
    shortlist = np.sort(np.concatenate(found))
    if final:
        return shortlist
    return shortlist[_facility_location(on_grid(unit[shortlist]), weights[shortlist], n_prompts, bar)]


def _parts(unit: npt.NDArray[np.float32], seed: int, threads: int | None) -> list[npt.NDArray[np.int64]]:
    """Parts prompts by k-means into groups of at most ``_MOST_AT_ONCE``."""
    parts: list[npt.NDArray[np.int64]] = []
    waiting = [np.arange(len(unit))]
    while waiting:
        members = waiting.pop()
        if len(members) <= _MOST_AT_ONCE:
            parts.append(members)
            continue
        k = 2 * -(-len(members) // _MOST_AT_ONCE)
        labels = _core.kmeans(np.ascontiguousarray(unit[members]), k, seed=seed, threads=threads).labels
        groups = [members[labels == label] for label in range(k) if (labels == label).any()]
        # Many equal embeddings cannot be told apart, and need not be.
        waiting += groups if len(groups) > 1 else np.array_split(members, k)
    return parts


def _facility_location(
    grid: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], n: int, bar: Any
) -> npt.NDArray[np.int64]:
    """Greedy facility location with lazy gains (Minoux 1978): gains only fall, so an old one is an upper bound.

    Args:
        grid: (m, e) unit vectors of :func:`on_grid`.
        weights: (m,) of each row in the sum, whole numbers.
        n: How many to choose.
        bar: Progress bar or None.

    Returns:
        (n,) rows in the order chosen; of equal gains the lower row first.
    """
    # Two prompts that are like one another and no other gain the same, which must not be left to rounding: coarser
    # still, so that sums are exact, too.
    similarity = np.rint(grid @ grid.T * 2.0**26) / 2.0**26
    np.fill_diagonal(similarity, 1.0)
    covered = np.full(len(grid), -1.0)  # the least that a cosine can be
    gains = weights @ (similarity + 1.0)
    queue = [(-gain, row, 0) for row, gain in enumerate(gains.tolist())]
    heapq.heapify(queue)
    chosen: list[int] = []
    while len(chosen) < n:
        _, row, when = queue[0]
        if when == len(chosen) + 1:  # reckoned with all that are chosen
            heapq.heappop(queue)
            chosen.append(row)
            np.maximum(covered, similarity[row], out=covered)
            if bar is not None:
                bar.update()
            continue
        gain = float(weights @ np.maximum(similarity[row] - covered, 0))
        heapq.heapreplace(queue, (-gain, row, len(chosen) + 1))
    return np.array(chosen, dtype=np.int64)


def _farthest_first(unit: npt.NDArray[np.float32], n: int, bar: Any) -> npt.NDArray[np.int64]:
    """Greedy k-center, exactly, but with matrix products of many picks at once.

    The ``_BATCH`` prompts that are farthest from the kept ones are taken aside. As long as the farthest of them is
    farther than any other prompt was, which can only come nearer, it is the farthest of all.

    Args:
        unit: (m, e) unit vectors.
        n: How many to choose.
        bar: Progress bar.

    Returns:
        (n,) rows in the order chosen; of equally far ones the lower row first.
    """
    grid = on_grid(unit)
    mean = unit.mean(axis=0, dtype=np.float64)
    centre = on_grid(mean / max(float(np.linalg.norm(mean)), 1e-30))
    picked = [int(np.argmax(grid @ centre))]
    chosen: list[int] = []
    nearest = np.full(len(unit), -np.inf)  # cosine with the most similar kept one
    while True:
        chosen += picked
        bar.update(len(picked))
        if len(chosen) == n:
            return np.array(chosen, dtype=np.int64)
        kept = grid[picked].T
        for start in range(0, len(grid), _TILE):
            block = slice(start, start + _TILE)
            np.maximum(nearest[block], (grid[block] @ kept).max(axis=1), out=nearest[block])
        nearest[picked] = np.inf
        order = np.argsort(nearest, kind="stable")
        batch = np.sort(order[:_BATCH])
        # The first of the others in the same order: by cosine, then by row.
        others = (nearest[order[_BATCH]], order[_BATCH]) if len(order) > _BATCH else (np.inf, 0)
        cosines, within = nearest[batch], grid[batch] @ grid[batch].T
        picked = []
        while len(chosen) + len(picked) < n:
            row = int(np.argmin(cosines))
            if cosines[row] == np.inf or (cosines[row], batch[row]) > others:
                break
            picked.append(int(batch[row]))
            np.maximum(cosines, within[row], out=cosines)
            cosines[row] = np.inf


def _quotas(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Shares ``total`` in proportion to ``sizes``: largest remainder, at least 1 and at most its size for each."""
    ideal = total * sizes / sizes.sum()
    quotas: npt.NDArray[np.int64] = np.minimum(np.maximum(np.floor(ideal).astype(np.int64), 1), sizes)
    while quotas.sum() != total:
        # One at a time, where the quota is farthest from its ideal; ties go to the lower cluster.
        if quotas.sum() < total:
            quotas[np.argmax(np.where(quotas < sizes, ideal - quotas, -np.inf))] += 1
        else:
            quotas[np.argmax(np.where(quotas > 1, quotas - ideal, -np.inf))] -= 1
    return quotas
