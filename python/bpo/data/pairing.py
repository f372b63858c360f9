"""Pairs within prompts: which there are among scored responses, and which of them have the largest score gaps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

# Comparisons of two responses that are held at once: 8 MiB of float64.
_AT_ONCE = 1 << 20


def pairs_of_scores(
    scores: npt.NDArray[np.float64],
    prompts: npt.NDArray[np.int64],
    most: int | None = None,
    *,
    barred: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    """Returns the pairs of responses to one prompt whose scores differ, the higher one first.

    Args:
        scores: (R,) finite.
        prompts: (R,) the prompt of each response, ascending.
        most: At most so many pairs of each prompt, those with the largest gaps, ties in order; no others are built.
        barred: (R,) responses that may not be the preferred one.

    Returns:
        (P, 2) int64, in the order of the first response, then of the second.

    Example:
        >>> pairs_of_scores(np.array([0.0, 3.0, 1.0, 2.0, 1.0]), np.array([0, 0, 0, 1, 1])).tolist()
        [[1, 0], [1, 2], [2, 0], [3, 4]]
        >>> pairs_of_scores(np.array([0.0, 3.0, 1.0, 2.0, 1.0]), np.array([0, 0, 0, 1, 1]), most=1).tolist()
        [[1, 0], [3, 4]]
    """
    able = np.ones(len(scores), dtype=bool) if barred is None else ~barred
    starts = np.flatnonzero(np.diff(prompts, prepend=-1)) if len(prompts) else np.zeros(0, dtype=np.int64)
    sizes = np.diff(starts, append=len(prompts))
    found = []
    # Prompts of as many responses are compared together.
    for size in np.unique(sizes[sizes > 1]):
        alike = starts[sizes == size]
        step = max(1, _AT_ONCE // int(size) ** 2)
        for first in range(0, len(alike), step):
            responses = alike[first : first + step, None] + np.arange(size)
            found.append(_pairs_within(scores[responses], able[responses], responses, most))
    if not found:
        return np.zeros((0, 2), dtype=np.int64)
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _pairs_within(
    scores: npt.NDArray[np.float64],
    able: npt.NDArray[np.bool_],
    responses: npt.NDArray[np.int64],
    most: int | None,
) -> npt.NDArray[np.int64]:
    """The pairs of G prompts with m responses each; scores, responses and which may be preferred are (G, m)."""
    size = scores.shape[1]
    kept = np.zeros((0, 3), dtype=np.int64)
    gaps = np.zeros(0)
    # One prompt can have so many responses that only some of them can be compared with all at once.
    step = max(1, _AT_ONCE // (len(scores) * size))
    for first in range(0, size, step):
        block = scores[:, first : first + step, None] - scores[:, None, :]
        # Once there are as many as wanted, an equal gap comes too late.
        floor = gaps.min() if most is not None and 0 < most <= len(gaps) and first else 0
        higher = np.stack(np.nonzero((block > floor) & able[:, first : first + step, None]), axis=1)
        gaps = np.concatenate([gaps, block[tuple(higher.T)]])
        kept = np.concatenate([kept, higher + np.array([0, first, 0])])
        if most is not None:
            largest = largest_gaps(kept[:, 0], gaps, most)
            kept, gaps = kept[largest], gaps[largest]
    return np.stack([responses[kept[:, 0], kept[:, 1]], responses[kept[:, 0], kept[:, 2]]], axis=1)


def ranks_in_prompts(prompts: npt.NDArray[np.int64], order_by: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Returns which place each pair has among those of its prompt.

    Args:
        prompts: (P,) the prompt of each pair, in any order.
        order_by: (P,) the smaller, the sooner; ties in the order given, NaN last.

    Returns:
        (P,) int64, from 0.

    Example:
        >>> ranks_in_prompts(np.array([7, 7, 3, 7]), np.array([0.2, 0.1, 0.5, 0.2])).tolist()
        [1, 0, 0, 2]
    """
    order = np.lexsort((order_by, prompts))
    first = np.searchsorted(prompts[order], prompts[order])
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order)) - first
    return ranks


def largest_gaps(
    prompts: npt.NDArray[np.int64], score_gaps: npt.NDArray[np.float64], most: int
) -> npt.NDArray[np.bool_]:
    """Which pairs are among the ``most`` of their prompt with the largest score gap, ties in order; (P,) bool."""
    return ranks_in_prompts(prompts, -score_gaps) < most
