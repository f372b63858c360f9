"""Embeddings as unit vectors, also on a grid on which their dot products are exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_GRID = 2.0**25


def unit_vectors(embeddings: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Checks embeddings and scales them to unit length."""
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have two dimensions (prompts, features), got {embeddings.ndim}.")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise ValueError(f"The embedding of prompt {bad[0]} is zero or not finite ({len(bad)} such in all).")
    return np.ascontiguousarray(embeddings / norms)


def on_grid(unit: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Rounds unit vectors to multiples of 2⁻²⁵, so that their dot products are exact in float64.

    Products are multiples of 2⁻⁵⁰ and partial sums are at most about 1, so no sum rounds: a matrix product is the same
    to the bit in any order, and so for any number of threads.
    """
    grid: npt.NDArray[np.float64] = np.rint(unit.astype(np.float64) * _GRID) / _GRID
    return grid
