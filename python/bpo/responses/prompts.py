"""Prompts and their responses in any accepted format, before there are scores for them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.data.candidates import Skipped, report_skipped
from bpo.data.columns import check_prompt_is_named, column_error, read_template_kwargs
from bpo.data.preferences import preference_texts
from bpo.data.rows import load_rows
from bpo.data.scored import Item, as_response, row_items
from bpo.data.values import (
    UnusableError,
    as_score,
    as_text,
    check_json,
    content_id,
    is_blank,
    is_messages,
    is_missing,
    most_are_messages,
    shorten,
)

if TYPE_CHECKING:
    import datasets

    from bpo.data.values import Text


# Columns that hold responses, or are written here.
_RESPONSE_COLUMNS = (
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "instruction",
    "completions",
    "prompt",
    "responses",
    "scores",
    "score_errors",
    "bpo_id",
)


@dataclasses.dataclass
class PromptResponses:
    """A prompt with the responses that there are.

    Attributes:
        prompt: Text or messages.
        template_kwargs: What the chat template gets beside the messages.
        responses: The distinct responses. In a conversation, text where it is one plain message of the assistant.
        scores: The score of each, None where there is none.
        columns: What else the first row with the prompt holds.
        row: The first row of the data with the prompt.
    """

    prompt: Text
    template_kwargs: dict[str, Any]
    responses: list[Text]
    scores: list[float | None]
    columns: dict[str, Any]
    row: int

    @property
    def key(self) -> bytes:
        """The content hash by which the prompt is known."""
        return content_id(self.prompt, *([json.dumps(self.template_kwargs)] if self.template_kwargs else []))

    def messages(self, response: Text) -> list[dict[str, Any]]:
        """Returns a response of a conversation as messages."""
        return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def read_responses(
    dataset: Any,
    *,
    prompts_only: bool = False,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[PromptResponses]:
    """Reads prompts with their responses, scored or not.

    Args:
        dataset: Any format of :func:`bpo.read_candidates`; rows of ``prompt`` and ``responses`` without scores; rows of
            a ``prompt`` alone; a list of prompts.
        prompts_only: Whether the responses are left out.
        split: As of :func:`bpo.read_candidates`.
        columns: Likewise.

    Returns:
        The distinct prompts, in the order of the data.

    Raises:
        ValueError: Missing columns, no usable row, or a value of the wrong type.
        FileNotFoundError: A path that does not exist.

    Example:
        >>> [row] = read_responses([{"prompt": "2+2?", "responses": ["4", "5", "4"]}])
        >>> row.responses, row.scores
        (['4', '5'], [None, None])
        >>> [row.prompt for row in read_responses(["2+2?", "3+3?"], prompts_only=True)]
        ['2+2?', '3+3?']
    """
    if isinstance(dataset, Iterator):
        dataset = list(dataset)
    listed = isinstance(dataset, Sequence) and not isinstance(dataset, str)
    if listed and any(isinstance(prompt, str) or is_messages(prompt) for prompt in dataset):
        dataset = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in dataset]
    rows = load_rows(dataset, split=split, columns=columns)
    names = list(rows.column_names)
    pairs = {"chosen", "rejected"} <= set(names)
    prompt_column = "prompt" if "prompt" in names else "instruction"
    column = None if pairs else next((name for name in ("responses", "completions") if name in names), None)
    if pairs:
        check_prompt_is_named(names)
    elif prompt_column not in names:
        raise ValueError(column_error(names))
    if not pairs and column is None and not prompts_only:
        raise ValueError(f"The columns {names} hold no responses: {column_error(names)}")
    if len(rows) == 0:
        raise ValueError("The dataset is empty: it has the right columns but no rows.")
    wrong = {index: UnusableError("not a row", why) for index, why in rows.broken.items()}
    template_kwargs = read_template_kwargs(rows, wrong)
    extra = [name for name in names if name not in _RESPONSE_COLUMNS]
    found: dict[bytes, PromptResponses] = {}
    skipped = Skipped()
    for index, row in enumerate(rows):
        kwargs = template_kwargs[index] if template_kwargs else {}
        try:
            if index in wrong:
                raise wrong[index]
            prompt, items = (
                _pair(row, names) if pairs else _prompt_and_items(row, index, prompt_column, column, skipped)
            )
            columns = {name: _plain(row[name], name) for name in extra}
        except UnusableError as error:
            skipped.add(error.reason, error.at(f"row {index}"))
            continue
        this = PromptResponses(prompt, kwargs, [], [], columns, index)
        this = found.setdefault(this.key, this)
        for name in [name for name in extra if this.columns[name] != columns[name]]:
            skipped.add(f"another '{name}' than that of the same prompt before", f"row {index}, before {this.row}")
        if not prompts_only:
            _add(this, items, index, skipped)
    found = _of_one_form(found, skipped)
    report_skipped(skipped, "skip")
    if not found:
        raise ValueError(f"No row has a usable prompt.\n{skipped.describe()}")
    return list(found.values())


def _pair(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Text, list[Item]]:
    """Returns the prompt and both responses of a preference row."""
    prompt, *texts = preference_texts(row, has_prompt="prompt" in names)
    scores = (row.get(name) for name in ("score_chosen", "score_rejected"))
    return prompt, [Item(text, score, {}) for text, score in zip(texts, scores, strict=True)]


def _prompt_and_items(
    row: Mapping[str, Any], index: int, prompt: str, column: str | None, skipped: Skipped
) -> tuple[Text, list[Item]]:
    """Returns the prompt and the responses of a row, scored or not."""
    if is_blank(row[prompt]):
        raise UnusableError("prompt is missing")
    text = as_text(row[prompt], prompt)
    if column is None or is_missing(row[column]):
        return text, []
    try:
        return text, row_items(row, column, has_scores=not is_missing(row.get("scores")))
    except UnusableError as error:
        if is_missing(row.get("scores")):
            raise
        # Scores can be made anew, responses cannot.
        items = row_items({**row, "scores": None}, column, has_scores=False)
        skipped.add(error.reason, error.at(f"row {index}"))
        return text, items


def _of_one_form(found: dict[bytes, PromptResponses], skipped: Skipped) -> dict[bytes, PromptResponses]:
    """Keeps the prompts of the form that most have, text or messages, and names the others."""
    chat = {key: isinstance(prompt.prompt, list) for key, prompt in found.items()}
    most = most_are_messages(list(chat.values()))
    for key, other in chat.items():
        if other != most:
            skipped.add("some prompts are text and some are messages: this is not as most are", f"row {found[key].row}")
    return {key: prompt for key, prompt in found.items() if chat[key] == most}


def _plain(value: Any, column: str) -> Any:
    """Returns what JSON has a form for: None for NaN, which readers of JSON do not take, and lists for arrays.

    Raises:
        UnusableError: It has none.
    """
    try:
        value = _without_arrays(value)
    except RecursionError:
        raise UnusableError(f"column '{column}': lists within lists, too deep to read") from None
    check_json(value, column)
    return value


def _without_arrays(value: Any) -> Any:
    value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_without_arrays(item) for item in value]
    return {key: _without_arrays(item) for key, item in value.items()} if isinstance(value, dict) else value


def score_or_none(value: Any) -> float | None:
    """Returns a score of the data, None where there is none that can be used."""
    try:
        return as_score(value)
    except UnusableError:
        return None


def _add(this: PromptResponses, items: Sequence[Item], index: int, skipped: Skipped) -> None:
    """Adds the responses that are new, and the first score of each."""
    for position, item in enumerate(items):
        try:
            response = plain_answer(as_response(item.text, this.prompt, "responses"))
        except UnusableError as error:
            skipped.add(error.reason, error.at(f"row {index}, response {position}"))
            continue
        score = score_or_none(item.score)
        if score is None and isinstance(item.score, str) and item.score:
            skipped.add("score is not a number", f"row {index}, response {position}: {shorten(item.score)}")
        if response not in this.responses:
            this.responses.append(response)
            this.scores.append(score)
        elif this.scores[this.responses.index(response)] is None:
            this.scores[this.responses.index(response)] = score


def plain_answer(response: Text) -> Text:
    """Returns the text of a response that is one plain message of the assistant, any other as it is."""
    only = response[0] if isinstance(response, list) and len(response) == 1 else {}
    if only.get("role") == "assistant" and set(only) == {"role", "content"} and only["content"] is not None:
        text: str = only["content"]
        return text
    return response


def lay_out(prompt: PromptResponses, responses: Sequence[Text], *, as_messages: bool, **columns: Any) -> dict[str, Any]:
    """Returns a row of the result: ``prompt``, ``responses`` (text, or all as messages), and the columns given."""
    laid: list[Text] = [prompt.messages(response) if as_messages else response for response in responses]
    return {"prompt": prompt.prompt, "responses": laid, **columns, **_others(prompt.columns, columns)}


def lay_out_again(prompt: PromptResponses, earlier: Mapping[str, Any], *, as_messages: bool) -> dict[str, Any]:
    """Returns a row that was laid out by an earlier run, with the other columns as the data has them now."""
    responses = [plain_answer(response) for response in earlier["responses"]]
    made = {name: earlier[name] for name in ("scores", "dropped") if name in earlier}
    return lay_out(prompt, responses, as_messages=as_messages, **made)


def _others(columns: Mapping[str, Any], but: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in columns.items() if name not in but}


def need_messages(prompts: Sequence[PromptResponses]) -> bool:
    """Whether some response is more than one plain message, so that a column of responses must hold messages."""
    return any(isinstance(response, list) for prompt in prompts for response in prompt.responses)


def to_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Turns rows into a data set whose scores are numbers even where all are null; the other columns stay as they are.

    What Arrow would not keep as it is, such as mappings of unlike keys, which it fills with null, becomes JSON.
    """
    import datasets

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    known = {
        "scores": datasets.List(datasets.Value("float64")),
        "score_errors": datasets.List(datasets.Value("string")),
    }
    features = {name: kind for name, kind in known.items() if name in columns}
    if hasattr(datasets, "Json"):
        for name, values in columns.items():
            if name not in features and _is_changed_by_arrow(values):
                lists = all(isinstance(value, (list, type(None))) for value in values)
                features[name] = datasets.List(datasets.Json()) if lists else datasets.Json()
    rest = datasets.Dataset.from_dict({name: values for name, values in columns.items() if name not in features})
    features |= rest.features
    return datasets.Dataset.from_dict(columns, features=datasets.Features({name: features[name] for name in columns}))


def _is_changed_by_arrow(values: list[Any]) -> bool:
    """Whether a column of Arrow cannot hold values, or would give others back."""
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError):
        return True
    # Only mappings change; where all have the same keys, these are the names of its fields.
    return "struct" in str(array.type) and _without_nulls(array.to_pylist()) != _without_nulls(values)


def _without_nulls(values: list[Any]) -> list[Any]:
    """Leaves out what messages hold of null, which is read as nothing."""
    return [
        [{key: item for key, item in message.items() if item is not None} for message in value]
        if is_messages(value)
        else value
        for value in values
    ]
