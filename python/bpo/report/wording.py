"""How measures and estimates are called and said."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MEASURES = {
    "accuracy": "held-out accuracy",
    "length_controlled_accuracy": "length-controlled accuracy",
    "margin": "reward margin",
    "likelihood_accuracy": "likelihood accuracy",
    "linearised_accuracy": "linearised accuracy",
    "win_rate": "win rate",
    "length_controlled_win_rate": "length-controlled win rate",
}
"""What is measured, and what a report calls it."""

STAGES = ("selection", "training", "evaluation", "sampling")


def pairs_at(budget: float) -> str:
    """Returns a budget, a count or a share, as text."""
    return f"{budget} pairs" if isinstance(budget, int) else f"{100 * budget:g} % of the pairs"


def interval(estimate: Mapping[str, Any], kind: str = ".3f") -> str:
    """Returns a mean and its interval as text."""
    mean = format(estimate["mean"], kind)
    if estimate["low"] is None:
        return f"{mean} (spread unknown)"
    return f"{mean} ({format(estimate['low'], kind)} to {format(estimate['high'], kind)})"


def duration(seconds: float) -> str:
    """Returns a time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def byte_size(count: float) -> str:
    """Returns a number of bytes in the largest unit of which there is one, up to TiB.

    Example:
        >>> [byte_size(count) for count in (0, 1023, 3 << 20, 2.5 * 2**30, 5 << 50)]
        ['0 B', '1,023 B', '3.0 MiB', '2.5 GiB', '5,120.0 TiB']
    """
    if count < 1024:
        return f"{count:,.0f} B"
    power = min(int(math.log2(count) // 10), 4)
    return f"{count / 2 ** (10 * power):,.1f} {'KMGT'[power - 1]}iB"


def p_value(value: float | None) -> str:
    """Returns a p-value as text."""
    if value is None:
        return "p unknown"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def power(estimate: Mapping[str, Any]) -> str:
    """Says how large a difference could have been found, and what the observed one would take."""
    if estimate["detectable"] is None:
        return "too few seeds to tell chance"
    said = f"{estimate['detectable']:.3f} would be found with 80 % power"
    if estimate["needed"] is None:
        return f"{said}, a difference as observed with no number of seeds on this data"
    return f"{said}, a difference as observed with {estimate['needed']} seeds"


def agreement(entry: Mapping[str, Any]) -> str:
    """Says how the preview of the linearised regime agrees with training."""
    found = [
        f"{'unknown' if entry[name] is None else format(entry[name], '+.2f')} over {count} {what}"
        for name, count, what in (
            ("correlation_of_arms", entry["n_arms"], "arms"),
            ("correlation_of_runs", len(entry["runs"]), "runs within their seeds"),
        )
    ]
    return (
        f"{entry['budget']!s:>6} pairs: rank correlation of the accuracy after training with the linearised one: "
        f"{'; '.join(found)}"
    )
