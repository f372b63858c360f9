"""Positions of pairs within their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


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
