"""How many pairs and prompts are asked for, and whether that can be."""

from __future__ import annotations

from typing import Any

import numpy as np


def count_of(value: int | float, total: int) -> int:
    """Returns a whole number as it is, and a fraction (a float) of a total as a count of at least 1."""
    if isinstance(value, int):
        return value
    # A product such as 0.29 * 100 must not lose one to rounding.
    return max(1, int(value * total + 1e-9))


def counted(name: str, value: Any, total: int) -> int:
    """Returns a count given as a whole number or as a fraction (a float in (0, 1])."""
    of = {"breadth": "usable prompts", "budget": "candidate pairs of the prompts that can be kept"}[name]
    if isinstance(value, (float, np.floating)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} is neither a whole number nor a fraction above 0 and at most 1.")
        return count_of(float(value), total)
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number or a fraction, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > total:
        raise ValueError(f"{name}={value} is above the {total} {of}; give at most {total}.")
    return int(value)


def check_budget(budget: Any, n_pairs: int, n_prompts: int, strategy: str) -> None:
    """Checks that each of so many prompts can have a pair."""
    if n_pairs < n_prompts:
        given = f"budget={budget}" + (f", which makes {n_pairs}," if isinstance(budget, float) else "")
        fewer = "breadth" if isinstance(budget, float) else f"breadth={n_pairs}"
        raise ValueError(
            f"{given} is below the {n_prompts} prompts: strategy={strategy!r} keeps at least one pair of each. Give a "
            f"budget of at least {n_prompts} pairs, keep fewer prompts with {fewer}, or let prompts go with "
            "SelectConfig.min_depth=0."
        )
