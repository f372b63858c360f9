"""Rows that hold one prompt and several scored responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bpo.data.columns import require_columns
from bpo.data.preferences import read_prompt
from bpo.data.values import (
    UnusableError,
    as_list,
    as_ref_logp,
    as_score,
    as_text,
    is_blank,
    is_missing,
    one_each,
    says_nothing,
    shorten,
)

if TYPE_CHECKING:
    from bpo.data.groups import Groups
    from bpo.data.values import Text

_TEXT_KEYS = ("text", "response", "content")
_SCORE_KEYS = ("score", "overall_score")


class Item(NamedTuple):
    """A response and its score as the data has them, unchecked; None where there is none."""

    text: Any
    score: Any
    record: Mapping[str, Any]


def row_items(row: Mapping[str, Any], column: str, *, has_scores: bool) -> list[Item]:
    """Returns the responses of a row: of a column ``scores`` beside them, or of records of text and score.

    Records of several forms, of which a table has the keys in all rows, are read by the first key that is not null.

    Raises:
        UnusableError: No list, or not one score a response.
    """
    items = as_list(row[column])
    if is_missing(row[column]) or (has_scores and is_missing(row["scores"])):
        raise UnusableError("responses or scores are missing")
    if items is None:
        raise UnusableError(f"column '{column}': expected a list", shorten(row[column]))
    if has_scores:
        scores = one_each(row["scores"], items, "scores")
        return [Item(text, score, {}) for text, score in zip(items, scores, strict=True)]
    return [
        Item(_first(item, _TEXT_KEYS), _first(item, _SCORE_KEYS), item)
        if isinstance(item, Mapping) and "role" not in item
        else Item(item, None, {})
        for item in items
    ]


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if not is_missing(record.get(name))), None)


def as_response(value: Any, prompt: Text, column: str) -> Text:
    """Returns a response in the form of its prompt.

    Raises:
        UnusableError: An empty response, or one of another form.
    """
    if is_blank(value):
        raise UnusableError("empty response")
    response = as_text(value, column, "assistant" if isinstance(prompt, list) else None)
    if says_nothing(response):
        raise UnusableError("empty response")
    if isinstance(response, list) and isinstance(prompt, str):
        raise UnusableError("the response holds chat messages but the prompt is plain text: give it as messages, too")
    return response


class ScoredReader:
    """Rows that hold one prompt and several scored responses."""

    scored = True

    def __init__(
        self, columns: list[str], token_weights: str | None, ref_logps: bool, *, prompt: str, responses: str
    ) -> None:
        self.prompt = prompt
        self.responses = responses
        self.has_scores = "scores" in columns
        self.token_weights = token_weights
        self.ref_logps = ref_logps
        if token_weights is not None and self.has_scores:
            require_columns(columns, [token_weights], f"{token_weights=}")
        if ref_logps:
            require_columns(columns, ["ref_logps"], 'ref_model="columns"')

    def read(self, index: int, row: Mapping[str, Any], template_kwargs: dict[str, Any], groups: Groups) -> None:
        """Adds the responses of a row to the groups, and names those that cannot be used.

        Raises:
            UnusableError: The row as a whole cannot be used.
        """
        items = row_items(row, self.responses, has_scores=self.has_scores)
        prompt = read_prompt(row[self.prompt], self.prompt)
        weights = self._weights(row, items)
        ref_logps = one_each(row["ref_logps"], items, "ref_logps") if self.ref_logps else []
        group = groups.group(index, prompt, template_kwargs)
        for position, item in enumerate(items):
            place = f"row {index}, response {position}"
            try:
                response = as_response(self._text(item), prompt, self.responses)
            except UnusableError as error:
                groups.skipped.add(error.reason, error.at(place))
                continue
            try:
                score = as_score(item.score)
                ref_logp = as_ref_logp(ref_logps[position]) if self.ref_logps else math.nan
                weight = groups.weights_index(weights[position], self.token_weights or "") if weights else -1
            except UnusableError as error:
                groups.keep_known(group, [response])
                groups.skipped.add(error.reason, error.at(place))
                continue
            groups.add(group, response, score, index, position, weight, ref_logp)

    def _text(self, item: Item) -> Any:
        if not self.has_scores and not (set(_TEXT_KEYS) & set(item.record) and set(_SCORE_KEYS) & set(item.record)):
            raise UnusableError(
                f"column '{self.responses}': without a column 'scores' a response must be a record with 'text' (or "
                "'response') and 'score' (or 'overall_score')",
                shorten(item.record or item.text),
            )
        return item.text

    def _weights(self, row: Mapping[str, Any], items: Sequence[Item]) -> list[Any]:
        if self.token_weights is None:
            return []
        if not self.has_scores:
            return [item.record.get(self.token_weights) for item in items]
        return one_each(row[self.token_weights], items, self.token_weights)
