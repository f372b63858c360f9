"""What the model card and the logs of a training say of its pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bpo.selection.selection import Selection


def figures(selection: Selection) -> dict[str, float]:
    """Returns the figures of a selection that are logged, by the names they have there; of those that are known."""
    depth, lengths = selection.depth[selection.depth > 0], selection.lengths()
    kept = selection.pairs.filter(pc.equal(selection.pairs["fate"], "selected"))
    found = {
        "pairs": len(selection),
        "prompts": len(depth),
        "mean_depth": float(depth.mean()),
        "clusters": pc.count_distinct(kept["cluster"]).as_py() or np.nan,
        "centrality": pc.mean(kept["centrality"]).as_py(),
        "score_gap": pc.mean(kept["score_gap"]).as_py(),
        "longer_share": np.nan if lengths is None else lengths["kept"]["longer_share"],
    }
    return {f"selection/{name}": value for name, value in found.items() if value is not None and not np.isnan(value)}


def tell_of_pairs(card: Path, selections: Sequence[Selection]) -> None:
    """Adds to a model card how the pairs of each round were chosen."""
    parts = ["\n## Training pairs\n\nChosen before the training by the package `bpo`, a reconstruction of the paper.\n"]
    for number, selection in enumerate(selections):
        if len(selections) > 1:
            parts.append(f"\nRound {number}:\n")
        parts.append(f"\n```text\n{selection.summary()}\n```\n")
    with card.open("a", encoding="utf-8") as file:
        file.write("".join(parts))
