"""What sampling and scoring came to."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from bpo.data.rows import load_rows
from bpo.data.scored import row_items
from bpo.data.values import UnusableError, is_missing, shorten
from bpo.responses.prompts import score_or_none

_NAMED_REASONS = 5


@dataclasses.dataclass(frozen=True)
class ResponseSummary:
    """What sampling and scoring came to; as text, a few lines to read.

    Attributes:
        n_prompts: Distinct prompts.
        n_responses: Responses that were kept.
        n_single: Prompts with fewer than two responses, which form no pair.
        dropped: Responses that were not kept, by reason: ``empty``, ``truncated``, ``refusal``, ``duplicate``,
            ``failed``.
        n_scored: Responses with a score; None where nothing was scored.
        n_tied: Prompts with two or more scored responses, all of the same score, which form no pair.
        errors: Why scores are missing: reason → responses.
    """

    n_prompts: int
    n_responses: int
    n_single: int
    dropped: dict[str, int]
    n_scored: int | None
    n_tied: int
    errors: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.n_responses} responses to {self.n_prompts} prompts"]
        dropped = [f"{count} {reason}" for reason, count in self.dropped.items() if count]
        if dropped:
            lines.append(f"dropped: {', '.join(dropped)}")
        if self.n_single:
            lines.append(f"{self.n_single} prompts have fewer than two responses, so no pair")
        if self.n_scored is not None:
            lines.append(f"{self.n_scored} scored, {self.n_responses - self.n_scored} without a score")
            reasons = list(self.errors.items())
            lines += [f"  {count} × {reason}" for reason, count in reasons[:_NAMED_REASONS]]
            if len(reasons) > _NAMED_REASONS:
                lines.append(f"  … and {len(reasons) - _NAMED_REASONS} other reasons")
            if self.n_tied:
                lines.append(f"{self.n_tied} prompts whose scores are all equal, so no pair")
        return "\n".join(lines)


def describe_responses(dataset: Any) -> ResponseSummary:
    """Counts what :func:`bpo.sample_responses` dropped and what :func:`bpo.score_responses` could not score.

    Args:
        dataset: What either returned, or the file that it wrote.

    Returns:
        The counts.

    Raises:
        ValueError: A row that neither of them makes; names it.

    Example:
        >>> row = {"prompt": "2+2?", "responses": ["4", "5"], "scores": [1.0, None], "score_errors": [None, "timeout"]}
        >>> print(describe_responses([row]))
        2 responses to 1 prompts
        1 scored, 1 without a score
          1 × timeout
    """
    rows = load_rows(dataset)
    if "responses" not in rows.column_names:
        raise ValueError(
            f"The columns {list(rows.column_names)} hold no 'responses', as what bpo samples or scores does."
        )
    dropped: collections.Counter[str] = collections.Counter()
    errors: collections.Counter[str] = collections.Counter()
    n_responses = n_single = n_scored = n_tied = 0
    for index, row in enumerate(rows):
        try:
            items = row_items(row, "responses", has_scores=not is_missing(row.get("scores")))
        except UnusableError as error:
            raise ValueError(f"{error.at(f'Row {index}, {error.reason}')}.") from None
        dropped.update(_dropped(row.get("dropped"), index))
        errors.update(reason for reason in _reasons(row.get("score_errors"), index) if reason is not None)
        present = [score for score in map(score_or_none, (item.score for item in items)) if score is not None]
        n_responses += len(items)
        n_single += len(items) < 2
        n_scored += len(present)
        n_tied += len(present) > 1 and len(set(present)) == 1
    return ResponseSummary(
        n_prompts=len(rows),
        n_responses=n_responses,
        n_single=n_single,
        dropped=dict(dropped),
        n_scored=n_scored if "scores" in rows.column_names else None,
        n_tied=n_tied,
        errors=dict(errors.most_common()),
    )


def _dropped(value: Any, index: int) -> dict[str, int]:
    counts = {} if value is None else value
    if not isinstance(counts, Mapping) or not all(isinstance(count, (int, type(None))) for count in counts.values()):
        raise ValueError(f"Row {index}, column 'dropped': expected counts by reason, got {shorten(value)}.")
    return {str(reason): count or 0 for reason, count in counts.items()}


def _reasons(value: Any, index: int) -> list[str | None]:
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"Row {index}, column 'score_errors': expected a list of reasons, got {shorten(value)}.")
    return value or []
