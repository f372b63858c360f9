"""Rows that state a chosen and a rejected response."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bpo.data.columns import check_prompt_is_named, require_columns
from bpo.data.values import UnusableError, as_ref_logp, as_score, as_text, is_blank, is_missing, says_nothing

if TYPE_CHECKING:
    from bpo.data.groups import Groups
    from bpo.data.values import Text

_REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_SYSTEM = ("system", "developer")
_NOT_ASKING = (*_SYSTEM, "assistant", "tool", "function")


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


def preference_texts(row: Mapping[str, Any], *, has_prompt: bool) -> tuple[Text, Text, Text]:
    """Returns prompt, chosen and rejected of a preference row.

    A prompt that the row gives is never replaced: what responses in the form of messages have in common is the prompt
    only where there is no column of prompts, or where it holds the prompt that the row gives as text.

    Raises:
        UnusableError: The row cannot be used.
    """
    if is_missing(row["chosen"]) or is_missing(row["rejected"]):
        raise UnusableError("chosen or rejected is missing")
    given = read_prompt(row["prompt"], "prompt") if has_prompt else None
    role = "assistant" if isinstance(given, list) else None
    chosen, rejected = (_response(row[column], column, role) for column in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UnusableError("chosen and rejected must both be text or both be messages")
    if given is None:
        prompt, chosen, rejected = _implicit(chosen, rejected)
    elif isinstance(given, str) and not isinstance(chosen, str):
        prompt, chosen, rejected = _asked_in_text(given, chosen, rejected)
    elif isinstance(given, list):
        prompt, chosen, rejected = _asked_in_messages(given, chosen, rejected)
    else:
        prompt = given
    if says_nothing(chosen) or says_nothing(rejected):
        raise UnusableError("empty response")
    if chosen == rejected:
        raise UnusableError("chosen equals rejected")
    return prompt, chosen, rejected


def read_prompt(value: Any, column: str) -> Text:
    """Returns the prompt of a row.

    Raises:
        UnusableError: There is none, or it is neither text nor messages.
    """
    # As for TRL, empty text is a prompt: what is said first of all.
    if is_blank(value) and not isinstance(value, str):
        raise UnusableError("prompt is missing")
    return as_text(value, column)


def _response(value: Any, column: str, role: str | None) -> Text:
    # An empty list of messages says as little as empty text.
    return as_text("" if is_blank(value) else value, column, role)


def _implicit(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Takes the prompt out of two responses that carry it."""
    if chosen == rejected:
        raise UnusableError("chosen equals rejected")
    prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if not prompt:
        raise UnusableError("chosen and rejected share no prompt")
    if isinstance(prompt, list) and all(message["role"] in _NOT_ASKING for message in prompt):
        raise UnusableError("what chosen and rejected share is no prompt: nobody asks in it")
    return prompt, chosen, rejected


def _asked_in_text(given: str, chosen: Any, rejected: Any) -> tuple[Text, Text, Text]:
    """Puts a prompt that is text before responses that are messages.

    Some sets repeat the prompt as text beside conversations that contain it. Else it is the user's turn, after the
    system message if both responses begin with the same one.
    """
    if not given:
        raise UnusableError("prompt is missing")
    shared: Any
    shared, rest, other = extract_prompt(chosen, rejected)
    if any(_says(message, given) for message in shared):
        return shared, rest, other
    system = len(list(itertools.takewhile(lambda message: message["role"] in _SYSTEM, shared)))
    prompt = [*chosen[:system], {"role": "user", "content": given}]
    chosen, rejected = chosen[system:], rejected[system:]
    if any(response[:1] and response[0]["role"] in (*_SYSTEM, "user") for response in (chosen, rejected)):
        raise UnusableError("a response begins with a message of the system or the user that is not the prompt")
    return prompt, chosen, rejected


def _asked_in_messages(given: list[dict[str, Any]], chosen: Any, rejected: Any) -> tuple[Text, Text, Text]:
    """Takes a prompt of messages out of responses that repeat it."""
    repeated = [response[: len(given)] == given for response in (chosen, rejected)]
    if repeated[0] != repeated[1]:
        raise UnusableError("only one of chosen and rejected repeats the prompt")
    skip = len(given) if repeated[0] else 0
    return given, chosen[skip:], rejected[skip:]


def _says(message: dict[str, Any], text: str) -> bool:
    return message["role"] == "user" and (message["content"] or "").strip() == text.strip()


class PreferenceReader:
    """Rows that state a chosen and a rejected response."""

    scored = False

    def __init__(self, columns: list[str], token_weights: str | None, ref_logps: bool) -> None:
        check_prompt_is_named(columns)
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
        """Adds the pair that a row states to the groups.

        Raises:
            UnusableError: The row states none.
        """
        prompt, chosen, rejected = preference_texts(row, has_prompt=self.has_prompt)
        group = groups.group(index, prompt, template_kwargs)
        try:
            scores = self._scores(row)
            ref_logps = self._ref_logps(row)
            weights = self._weights(row, groups)
        except UnusableError:
            groups.keep_known(group, (chosen, rejected))
            raise
        for side, response in enumerate((chosen, rejected)):
            groups.add(group, response, scores[side], index, -1, weights[side], ref_logps[side])

    def _scores(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Returns both scores, NaN where there are none."""
        if not self.has_scores:
            return math.nan, math.nan
        chosen, rejected = as_score(row["score_chosen"]), as_score(row["score_rejected"])
        if chosen == rejected:
            raise UnusableError("chosen and rejected have equal scores")
        if chosen < rejected:
            raise UnusableError("chosen has a lower score than rejected")
        return chosen, rejected

    def _ref_logps(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Returns both reference log-probabilities, NaN where none are read."""
        if not self.ref_logps:
            return math.nan, math.nan
        chosen, rejected = (as_ref_logp(row[column]) for column in _REF_COLUMNS)
        return chosen, rejected

    def _weights(self, row: Mapping[str, Any], groups: Groups) -> tuple[int, int]:
        """Returns which token weights both responses have, −1 where none are read."""
        if self.token_weights is None:
            return -1, -1
        chosen, rejected = (
            groups.weights_index(row[column], column)
            for column in (f"{self.token_weights}_chosen", f"{self.token_weights}_rejected")
        )
        return chosen, rejected
