"""The page of a preview: which strategy is worth its pairs on this data, before training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpo.report.charts import reach
from bpo.report.page import write_page

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def write_preview_page(
    path: Path, records: Sequence[Mapping[str, Any]], budgets: Sequence[int], baseline: str, **values: Any
) -> Path:
    """Writes the page: for each budget what is said of it, and every arm against the baseline.

    Args:
        path: File to write; replaced whole or not at all.
        records: As :meth:`bpo.Preview.table` returns them.
        budgets: Pairs to train on.
        baseline: Name of the arm that the others are compared with.
        values: What else the template names.

    Returns:
        The path.
    """
    known = [row for row in records if row["difference"] is not None]
    limit = reach(known)
    return write_page(
        "preview.html",
        path,
        panels=[(budget, [_drawn(row, limit) for row in records if row["budget"] == budget]) for budget in budgets],
        baseline=baseline,
        limit=limit,
        **values,
    )


def _drawn(row: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """A record with where its interval lies in a picture of 200 by 20, zero in the middle."""
    told = row["difference"] is not None and row["low"] == row["low"]
    places = {}
    if told:
        places = {name: 100 + 100 * max(-1.0, min(1.0, row[name] / limit)) for name in ("low", "difference", "high")}
    return {**row, "places": places}
