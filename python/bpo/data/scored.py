"""Rows that hold one prompt and several scored responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bpo.data.columns import require_columns
from bpo.data.groups import OTHER_COLUMNS
from bpo.data.values import as_number, as_text, is_score, one_each, shorten

if TYPE_CHECKING:
    from bpo.data.groups import Groups


class ScoredReader:
    """Rows that hold one prompt and several scored responses."""

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
        """Adds what a row says to the groups, or names it among what is set aside."""
        skipped = groups.skipped
        items = row[self.responses]
        if items is None or (self.has_scores and row["scores"] is None):
            skipped.add("responses or scores are missing", f"row {index}")
            return
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"Row {index}, column '{self.responses}': expected a list, got {shorten(items)}.")
        if row[self.prompt] is None:
            skipped.add("prompt is missing", f"row {index}")
            return
        prompt = as_text(row[self.prompt], index, self.prompt)
        texts, scores = self._texts_and_scores(index, row, items)
        weights = self._weights(index, row, items)
        ref_logps = self._ref_logps(index, row, items)
        group = groups.group(index, prompt, template_kwargs)
        group.scored = True
        role = "assistant" if isinstance(prompt, list) else None
        for position, (text, score) in enumerate(zip(texts, scores, strict=True)):
            place = f"row {index}, response {position}"
            if text is None or text in ("", []):
                skipped.add("empty response", place)
                continue
            response = as_text(text, index, self.responses, role)
            if isinstance(response, list) and role is None:
                raise ValueError(
                    f"Row {index}: the prompt is plain text but response {position} holds chat messages. "
                    "Give the prompt as messages, too."
                )
            if not is_score(score):
                groups.set_aside(group, [response], "score missing, NaN or infinite", place)
                continue
            if self.ref_logps and not math.isfinite(ref_logps[position]):
                groups.set_aside(group, [response], "reference log-probability missing, NaN or infinite", place)
                continue
            weight, ref_logp = -1, ref_logps[position]
            if self.token_weights is not None:
                weight = groups.weights_index(weights[position], place.capitalize())
            earlier, new = group.add(response, score, index, position, weight, ref_logp)
            if not new and group.scores[earlier] != score:
                skipped.add("duplicate response with another score than before", place)
            elif not new:
                differs = group.weights[earlier] != weight or (self.ref_logps and group.ref_logps[earlier] != ref_logp)
                skipped.add("duplicate response of the same prompt" + OTHER_COLUMNS * differs, place)

    def _texts_and_scores(
        self, index: int, row: Mapping[str, Any], items: Sequence[Any]
    ) -> tuple[list[Any], list[float]]:
        if self.has_scores:
            scores = one_each(row["scores"], items, index, "scores")
            return list(items), [as_number(score, index, "scores") for score in scores]
        texts, values = [], []
        for item in items:
            if not isinstance(item, dict):
                raise ValueError(
                    f"Row {index}, column '{self.responses}': without a 'scores' column each response must be a "
                    f"{{text, score}} record, got {shorten(item)}."
                )
            text_key = next((key for key in ("text", "response", "content") if key in item), None)
            score_key = next((key for key in ("score", "overall_score") if key in item), None)
            if text_key is None or score_key is None:
                raise ValueError(
                    f"Row {index}, column '{self.responses}': a response needs 'text' (or 'response') and 'score' "
                    f"(or 'overall_score'), got the keys {sorted(item)}."
                )
            texts.append(item[text_key])
            values.append(as_number(item[score_key], index, f"{self.responses}.{score_key}"))
        return texts, values

    def _weights(self, index: int, row: Mapping[str, Any], items: Sequence[Any]) -> list[Any]:
        if self.token_weights is None:
            return []
        if not self.has_scores:
            return [item.get(self.token_weights) for item in items]
        return one_each(row[self.token_weights], items, index, self.token_weights)

    def _ref_logps(self, index: int, row: Mapping[str, Any], items: Sequence[Any]) -> list[float]:
        if not self.ref_logps:
            return [math.nan] * len(items)
        return [as_number(value, index, "ref_logps") for value in one_each(row["ref_logps"], items, index, "ref_logps")]
