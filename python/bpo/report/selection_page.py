"""The page of a selection: what was chosen, to look at and to read."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.values import prompt_text
from bpo.report.page import write_page

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy.typing as npt
    import pyarrow as pa

_MOST_POINTS = 4000
_MOST_PROMPTS = 60
_NAMED_PLACES = 5


def write_selection_page(
    path: Path,
    pairs: pa.Table,
    dataset: Iterable[Mapping[str, Any]],
    selected: npt.NDArray[np.bool_],
    depth: npt.NDArray[np.int64],
    *,
    skipped: Mapping[str, list[str]],
    noted: Mapping[str, list[str]],
    **values: Any,
) -> Path:
    """Writes the page: numbers, depths, clusters, usefulness against score gap, and the chosen pairs to read.

    Args:
        path: File to write; replaced whole or not at all.
        pairs: One row a candidate pair, as :attr:`bpo.Selection.pairs`.
        dataset: The training set, as :attr:`bpo.Selection.dataset`.
        selected: (P,) bool, which of them are kept.
        depth: (n,) int64, pairs kept of each prompt.
        skipped: What of the data could not be used: reason → places.
        noted: What is worth a look, likewise.
        values: What else the template names.

    Returns:
        The path.
    """
    return write_page(
        "selection.html",
        path,
        n_pairs=pairs.num_rows,
        n_prompts=len(depth),
        kept_prompts=int((depth > 0).sum()),
        depths=_depths(depth),
        clusters=_clusters(pairs, selected),
        scatter=_scatter(pairs, selected),
        prompts=_prompts(pairs, dataset),
        skipped=_named(skipped),
        noted=_named(noted),
        **values,
    )


def _named(reasons: Mapping[str, list[str]]) -> dict[str, tuple[int, list[str]]]:
    """The count and the first few places of each reason."""
    return {reason: (len(places), places[:_NAMED_PLACES]) for reason, places in reasons.items()}


def _depths(depth: npt.NDArray[np.int64]) -> list[dict[str, float]]:
    """How many prompts have each depth, from 1 to the deepest."""
    counts = np.bincount(depth)[1:]
    most = max(int(counts.max()), 1)
    return [
        {"depth": pairs, "prompts": int(count), "share": count / most} for pairs, count in enumerate(counts, start=1)
    ]


def _clusters(pairs: pa.Table, selected: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Candidates and selected pairs of each cluster, largest first."""
    labels = pairs["cluster"].to_pylist()
    candidates = Counter(label for label in labels if label is not None)
    chosen = Counter(label for label, kept in zip(labels, selected, strict=True) if kept)
    most = max(candidates.values(), default=1)
    return [
        {
            "label": label,
            "candidates": count,
            "selected": chosen[label],
            "share": count / most,
            "selected_share": chosen[label] / most,
        }
        for label, count in sorted(candidates.items(), key=lambda item: (-item[1], item[0]))
    ]


def _scatter(pairs: pa.Table, selected: npt.NDArray[np.bool_]) -> dict[str, Any] | None:
    """Centrality against score gap of every pair, in the unit square, thinned evenly where there are many."""
    centrality = pairs["centrality"].to_numpy().astype(np.float64)
    gap = pairs["score_gap"].to_numpy().astype(np.float64)
    shown = np.flatnonzero(np.isfinite(centrality) & np.isfinite(gap))
    if len(shown) == 0:
        return None
    ranges = {"gap": _range(gap[shown]), "centrality": _range(centrality[shown])}
    shown = shown[:: max(1, len(shown) // _MOST_POINTS)]
    # Selected pairs are drawn last, on top of the others.
    shown = shown[np.argsort(selected[shown], kind="stable")]
    points = [
        {
            "x": round((gap[i] - ranges["gap"][0]) / (ranges["gap"][1] - ranges["gap"][0]), 4),
            "y": round((centrality[i] - ranges["centrality"][0]) / np.ptp(ranges["centrality"]), 4),
            "selected": bool(selected[i]),
        }
        for i in shown
    ]
    return {"points": points, **ranges}


def _range(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.5 * max(1.0, abs(low))
    return (low, high) if high > low else (low - pad, high + pad)


def _most_useful_first(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    """Order of a prompt's pairs; those that the strategy did not rank, as length control may add some, come last."""
    usefulness = row.get("bpo_usefulness")
    return usefulness is None, 0.0 if usefulness is None else -usefulness, row["bpo_pair"]


def _prompts(pairs: pa.Table, dataset: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The deepest prompts with their chosen pairs."""
    candidates = Counter(pairs["prompt"].to_pylist())
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in dataset:
        groups.setdefault(row["bpo_prompt"], []).append(row)
    deepest = sorted(groups, key=lambda prompt: (-len(groups[prompt]), prompt))[:_MOST_PROMPTS]
    return [
        {
            "text": prompt_text(groups[prompt][0]["prompt"]),
            "depth": len(groups[prompt]),
            "candidates": candidates[prompt],
            "pairs": [
                {
                    "chosen": prompt_text(row["chosen"]),
                    "rejected": prompt_text(row["rejected"]),
                    "cluster": row.get("bpo_cluster"),
                    "centrality": row.get("bpo_centrality"),
                    "gap": row.get("bpo_score_gap"),
                }
                for row in sorted(groups[prompt], key=_most_useful_first)
            ],
        }
        for prompt in deepest
    ]
