"""Rows that state a chosen and a rejected response."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bpo.data.columns import require_columns
from bpo.data.groups import OTHER_COLUMNS, OTHER_WEIGHT, Pair
from bpo.data.values import as_number, as_text, is_messages, is_score

if TYPE_CHECKING:
    from bpo.data.groups import Groups
    from bpo.data.values import Text

_REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits two responses that carry their prompt into prompt, chosen and rejected: the common prefix is the prompt.

    As in TRL, a space before the point where texts part stays with the responses, and so does the last character (the
    last message) of one that is the beginning of the other.
    """
    shared = next(
        (index for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right), None
    )
    if shared is None:
        shared = max(min(len(chosen), len(rejected)) - 1, 0)
    elif shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def preference_texts(row: Mapping[str, Any], index: int, *, has_prompt: bool) -> tuple[Text, Text, Text] | str:
    """Returns prompt, chosen and rejected of a preference row; the reason where the row cannot be used.

    Raises:
        ValueError: Values of the wrong type.
    """
    if row["chosen"] in (None, []) or row["rejected"] in (None, []):
        return "chosen or rejected is missing"
    prompt = row["prompt"] if has_prompt else None
    wrap = "assistant" if is_messages(prompt) else None
    chosen = as_text(row["chosen"], index, "chosen", wrap)
    rejected = as_text(row["rejected"], index, "rejected", wrap)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"Row {index}: chosen and rejected must both be text or both be messages.")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # Some sets repeat the prompt as text beside conversations that contain it; else it is the user's turn.
        contained = bool(extract_prompt(chosen, rejected)[0])
        prompt = None if contained else [{"role": "user", "content": prompt}]
    if prompt is None:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        if chosen == rejected:
            return "chosen equals rejected"
        if not prompt:
            return "chosen and rejected share no prompt"
    prompt = as_text(prompt, index, "prompt")
    if isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen or not rejected:
        return "empty response"
    if chosen == rejected:
        return "chosen equals rejected"
    return prompt, chosen, rejected


class PreferenceReader:
    """Rows that state a chosen and a rejected response."""

    def __init__(self, columns: list[str], token_weights: str | None, ref_logps: bool) -> None:
        self.has_prompt = "prompt" in columns
        self.token_weights = token_weights
        self.ref_logps = ref_logps
        if token_weights is not None:
            require_columns(columns, (f"{token_weights}_chosen", f"{token_weights}_rejected"), f"{token_weights=}")
        if ref_logps:
            require_columns(columns, _REF_COLUMNS, 'ref_model="columns"')
        scores = [column for column in ("score_chosen", "score_rejected") if column in columns]
        if len(scores) == 1:
            raise ValueError(f"The dataset has the column '{scores[0]}' but not its counterpart; give both or none.")
        self.has_scores = bool(scores)

    def read(self, index: int, row: Mapping[str, Any], template_kwargs: dict[str, Any], groups: Groups) -> None:
        """Adds what a row says to the groups, or names it among what is set aside."""
        skipped, place = groups.skipped, f"row {index}"
        texts = preference_texts(row, index, has_prompt=self.has_prompt)
        if isinstance(texts, str):
            skipped.add(texts, place)
            return
        prompt, chosen, rejected = texts
        group = groups.group(index, prompt, template_kwargs)
        scores = self._scores(index, row)
        if isinstance(scores, str):
            groups.set_aside(group, (chosen, rejected), scores, place)
            return
        ref_logps = self._ref_logps(index, row)
        if isinstance(ref_logps, str):
            groups.set_aside(group, (chosen, rejected), ref_logps, place)
            return
        weights = self._weights(index, row, groups)
        first = group.add(chosen, scores[0], index)[0]
        second = group.add(rejected, scores[1], index)[0]
        pair = Pair(first, second, *scores, index, weights, ref_logps)
        if (first, second) in group.stated:
            earlier = group.stated[first, second]
            reason = "duplicate of an earlier pair" + OTHER_COLUMNS * (not pair.same_columns(earlier))
            skipped.add(reason + OTHER_WEIGHT * (not groups.weigh_alike(index, earlier.row)), place)
        elif (second, first) in group.stated:
            skipped.add("contradicts an earlier pair", f"{place}, against row {group.stated[second, first].row}")
        else:
            group.stated[first, second] = pair

    def _scores(self, index: int, row: Mapping[str, Any]) -> tuple[float, float] | str:
        """Returns both scores, NaN where there are none; the reason where they do not go with the preference."""
        if not self.has_scores:
            return math.nan, math.nan
        chosen = as_number(row["score_chosen"], index, "score_chosen")
        rejected = as_number(row["score_rejected"], index, "score_rejected")
        if not (is_score(chosen) and is_score(rejected)):
            return "score missing, NaN or infinite"
        if chosen == rejected:
            return "chosen and rejected have equal scores"
        if chosen < rejected:
            return "chosen has a lower score than rejected"
        return chosen, rejected

    def _ref_logps(self, index: int, row: Mapping[str, Any]) -> tuple[float, float] | str:
        """Returns both reference log-probabilities, NaN where none are read; the reason where they cannot be used."""
        if not self.ref_logps:
            return math.nan, math.nan
        chosen, rejected = (as_number(row[column], index, column) for column in _REF_COLUMNS)
        if not (math.isfinite(chosen) and math.isfinite(rejected)):
            return "reference log-probability missing, NaN or infinite"
        return chosen, rejected

    def _weights(self, index: int, row: Mapping[str, Any], groups: Groups) -> tuple[int, int]:
        """Returns which token weights both responses have, −1 where none are read."""
        if self.token_weights is None:
            return -1, -1
        return (
            groups.weights_index(row[f"{self.token_weights}_chosen"], f"Row {index}, chosen"),
            groups.weights_index(row[f"{self.token_weights}_rejected"], f"Row {index}, rejected"),
        )
