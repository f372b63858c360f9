"""Responses that a policy in training gives anew, scored, in place of those of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.rows import load_rows
from bpo.policy.models import model_fingerprint
from bpo.responses.sampling import sample_responses
from bpo.responses.scoring import score_responses

if TYPE_CHECKING:
    from pathlib import Path

    from bpo.selection.selection import Selection

RESAMPLING = {"temperature", "top_p", "max_new_tokens", "keep", "keep_existing", "batch_size"}
"""What a training may say about responses that it samples anew, beside how many."""


def kept_rows(dataset: Any, selection: Selection) -> list[dict[str, Any]]:
    """Returns the rows of the data with pairs of prompts that breadth compression kept."""
    kept = np.array(selection.pairs["fate"]) != "breadth"
    wanted = set(selection.pairs["row"].to_numpy()[kept].tolist())
    return [dict(row) for index, row in enumerate(load_rows(dataset)) if index in wanted]


def resample(
    model: Any, rows: list[dict[str, Any]], scorer: Any, *, file: Path, progress: bool, **settings: Any
) -> list[dict[str, Any]]:
    """Samples responses to the prompts of some rows from a policy and scores them.

    Args:
        model: The policy.
        rows: Rows with prompts.
        scorer: What scores.
        file: Beginning of the names of two files that an interrupted round goes on from. They have the weights of the
            policy in their names, since responses of others are of no use.
        progress: Whether to show progress bars.
        **settings: Of :func:`bpo.sample_responses`.

    Returns:
        Rows of prompts, responses and scores.
    """
    name = f"{file.name}-{model_fingerprint(model)[:8]}"
    sampled = sample_responses(
        model, rows, output=file.with_name(f"{name}-responses.jsonl"), progress=progress, **settings
    )
    scored = score_responses(sampled, scorer, output=file.with_name(f"{name}-scores.jsonl"), progress=progress)
    listed: list[dict[str, Any]] = scored.to_list()
    return listed
