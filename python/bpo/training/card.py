"""What a model card says of the pairs: the paper, and how they were chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bpo.selection.selection import Selection

_TITLE = "BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment"
PAPER = {
    "title": _TITLE,
    "id": "2411.10914",
    "citation": f"""\
@inproceedings{{wang2025bpo,
    title     = {{{{{_TITLE}}}}},
    author    = {{Wang, Sizhe and Tong, Yongqi and Zhang, Hengyuan and Li, Dawei and Zhang, Xin and Chen, Tianlong}},
    year      = 2025,
    booktitle = {{Proceedings of NAACL 2025 (Volume 1: Long Papers)}},
    pages     = {{8811--8826}},
    doi       = {{10.18653/v1/2025.naacl-long.443}},
}}""",
}
"""As TRL's trainers name the paper of their method."""


def tell_of_pairs(card: Path, selections: Sequence[Selection]) -> None:
    """Adds to a model card how the pairs of each round were chosen."""
    parts = ["\n## Training pairs\n\nChosen before the training by the package `bpo`, a reconstruction of the paper.\n"]
    for number, selection in enumerate(selections):
        if len(selections) > 1:
            parts.append(f"\nRound {number}:\n")
        parts.append(f"\n```text\n{selection.summary()}\n```\n")
    with card.open("a", encoding="utf-8") as file:
        file.write("".join(parts))
