"""Embeddings to the prompts that are nearly the same as an earlier one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bpo.breadth.vectors import on_grid, unit_vectors

if TYPE_CHECKING:
    import numpy.typing as npt

_TILE = 4096


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Prompts that are nearly the same as an earlier one.

    Attributes:
        earlier: (n,) int64, the most similar earlier prompt of each; −1 where none reaches the threshold.
        similarity: (n,) float64, the cosine with it; NaN where there is none.
    """

    earlier: npt.NDArray[np.int64]
    similarity: npt.NDArray[np.float64]


def near_duplicates(
    embeddings: npt.NDArray[np.floating[Any]], threshold: float = 0.95, *, progress: bool = False
) -> NearDuplicates:
    """Finds the prompts that are nearly the same as an earlier one.

    Exact: all pairs of prompts are compared, a tile at a time, so that time grows with n² and memory does not (100,000
    prompts of 384 numbers: under two minutes on two busy cores). What "nearly" means depends on the encoder: by
    all-MiniLM-L6-v2, exercises with other numbers reach 0.9.

    Args:
        embeddings: (n, e) one row a prompt.
        threshold: Least cosine, in (0, 1]; 1 finds equal embeddings only, up to rounding.
        progress: Whether to show a progress bar.

    Returns:
        ``earlier``, (n,) int64, the earlier prompt that each is most like, −1 where there is none, and ``similarity``,
        (n,) float64, the cosine with it.

    Raises:
        ValueError: A threshold out of range, or embeddings that are zero or not finite.

    Example:
        >>> near_duplicates(np.array([[1.0, 0.0], [0.0, 1.0], [0.99, 0.01]])).earlier.tolist()
        [-1, -1, 0]
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}.")
    unit = unit_vectors(embeddings)
    exact = on_grid(unit)
    earlier = np.full(len(unit), -1, dtype=np.int64)
    similarity = np.full(len(unit), -np.inf)
    least = threshold - 1e-6
    for start in tqdm(range(0, len(unit), _TILE), desc="Near-duplicates", disable=not progress):
        block = slice(start, start + _TILE)
        for other in range(0, start + 1, _TILE):
            columns = slice(other, min(other + _TILE, len(unit)))
            # In float32, which rounds, to find the few rows that are then compared exactly.
            rough = unit[block] @ unit[columns].T
            if other == start:
                rough[~np.tri(len(rough), k=-1, dtype=bool)] = -np.inf
            rows = np.flatnonzero(rough.max(axis=1) >= least - 1e-4)
            if len(rows) == 0:
                continue
            cosines = exact[start + rows] @ exact[columns].T
            cosines[np.arange(columns.start, columns.stop) >= (start + rows)[:, None]] = -np.inf
            best = cosines.argmax(axis=1)
            highest = cosines[np.arange(len(rows)), best]
            better = (highest >= least) & (highest > similarity[start + rows])
            earlier[start + rows[better]] = other + best[better]
            similarity[start + rows[better]] = highest[better]
    similarity[earlier < 0] = np.nan
    return NearDuplicates(earlier, np.minimum(similarity, 1.0))
