"""Prompts and their responses in any accepted format, before there are scores for them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.data.candidates import Skipped, report_skipped
from bpo.data.columns import column_error, read_template_kwargs
from bpo.data.preferences import preference_texts
from bpo.data.rows import load_rows
from bpo.data.values import as_number, as_text, check_json, content_id, is_messages, is_score, one_each, shorten

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


def read_responses(dataset: Any, *, prompts_only: bool = False) -> list[PromptResponses]:
    """Reads prompts with their responses, scored or not.

    Args:
        dataset: Any format of :func:`bpo.read_candidates`; rows of ``prompt`` and ``responses`` without scores; rows of
            a ``prompt`` alone; a list of prompts.
        prompts_only: Whether the responses are left out.

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
    listed = isinstance(dataset, Sequence) and not isinstance(dataset, str)
    if listed and any(isinstance(prompt, str) or is_messages(prompt) for prompt in dataset):
        dataset = [prompt if isinstance(prompt, Mapping) else {"prompt": prompt} for prompt in dataset]
    rows = load_rows(dataset)
    names = list(rows.column_names)
    pairs = {"chosen", "rejected"} <= set(names)
    prompt_column = "prompt" if "prompt" in names else "instruction"
    column = None if pairs else next((name for name in ("responses", "completions") if name in names), None)
    if not pairs and prompt_column not in names:
        raise ValueError(column_error(names))
    if not pairs and column is None and not prompts_only:
        raise ValueError(f"The columns {names} hold no responses: {column_error(names)}")
    if len(rows) == 0:
        raise ValueError("The dataset is empty: it has the right columns but no rows.")
    template_kwargs = read_template_kwargs(rows)
    extra = [name for name in names if name not in _RESPONSE_COLUMNS]
    found: dict[bytes, PromptResponses] = {}
    skipped = Skipped()
    for index, row in enumerate(rows):
        try:
            given = _pair(row, index, names) if pairs else _prompt(row, index, prompt_column)
            columns = {name: _plain(row[name], index, name) for name in extra}
        except ValueError as error:  # about this row
            skipped.add("row that cannot be read", str(error))
            continue
        if isinstance(given, str):
            skipped.add(given, f"row {index}")
            continue
        prompt, *responses = given
        this = PromptResponses(prompt, template_kwargs[index] if template_kwargs else {}, [], [], columns, index)
        first = found.setdefault(this.key, this)
        if isinstance(prompt, str) != isinstance(next(iter(found.values())).prompt, str):
            raise ValueError(f"Row {index}: some prompts are text and some are messages. Bring all into one form.")
        for name in [name for name in extra if first.columns[name] != columns[name]]:
            skipped.add(f"another '{name}' than that of the same prompt before", f"row {index}, before {first.row}")
        if not prompts_only:
            items = _scored_pair(row, responses) if pairs else _items(row, index, column, skipped)
            _add(first, items, index, skipped)
    report_skipped(skipped, "skip")
    if not found:
        raise ValueError(f"No row has a usable prompt.\n{skipped.describe()}")
    return list(found.values())


def _prompt(row: Mapping[str, Any], index: int, column: str) -> tuple[Text] | str:
    """Returns the prompt of a row, or why it has none."""
    if row[column] in (None, "", []):
        return "prompt is missing"
    return (_encodable(as_text(row[column], index, column), index, column),)


def _pair(row: Mapping[str, Any], index: int, names: Sequence[str]) -> tuple[Text, Text, Text] | str:
    """Returns prompt, chosen and rejected of a preference row, or why it cannot be used."""
    split = preference_texts(row, index, has_prompt="prompt" in names)
    return split if isinstance(split, str) else _encodable(split, index, "prompt, chosen or rejected")


def _scored_pair(row: Mapping[str, Any], responses: Sequence[Any]) -> list[tuple[Any, Any]]:
    return list(zip(responses, (row.get("score_chosen"), row.get("score_rejected")), strict=True))


def _items(row: Mapping[str, Any], index: int, column: str | None, skipped: Skipped) -> list[tuple[Any, Any]]:
    """Returns the responses of a row with their scores, both unchecked; none where they cannot be told apart."""
    if column is None:
        return []
    try:
        return texts_and_scores(row, index, column)
    except ValueError as error:
        skipped.add("responses or scores that cannot be read", str(error))
        # Scores can be made anew, responses cannot.
        return _items({**row, "scores": None}, index, column, Skipped()) if row.get("scores") is not None else []


def _encodable(value: Any, index: int, column: str) -> Any:
    """Returns a value of JSON unless it holds half a character, which neither files nor Arrow can.

    Raises:
        ValueError: It does; names the row and the column.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"Row {index}, column '{column}': half a character (a lone surrogate).") from None
    return value


def _plain(value: Any, index: int, column: str) -> Any:
    """Returns what JSON has a form for: None for NaN, which readers of JSON do not take, and lists for arrays.

    Raises:
        ValueError: It has none; names the row and the column.
    """

    def plain(value: Any) -> Any:
        value = value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value
        if isinstance(value, float) and math.isnan(value):
            return None
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    try:
        made = plain(value)
    except RecursionError:
        raise ValueError(f"Row {index}, column '{column}': lists within lists, too deep to read.") from None
    check_json(made, index, column)
    return _encodable(made, index, column)


def texts_and_scores(row: Mapping[str, Any], index: int, column: str) -> list[tuple[Any, Any]]:
    """Returns the responses of a row and the score of each, None where there is none; both unchecked.

    Raises:
        ValueError: No list, or not one score a response.
    """
    items = row[column]
    if items is None:
        return []
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"Row {index}, column '{column}': expected a list, got {shorten(items)}.")
    if row.get("scores") is not None:
        return list(zip(items, one_each(row["scores"], items, index, "scores"), strict=True))
    pairs = []
    for item in items:
        record = item if isinstance(item, Mapping) and "role" not in item else {"text": item}
        pairs.append((_first(record, "text", "response", "content"), _first(record, "score", "overall_score")))
    return pairs


def _first(record: Mapping[str, Any], *names: str) -> Any:
    """Returns what stands under the first name that holds something: a table has the keys of every form in all rows."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def score_or_none(value: Any) -> float | None:
    """Returns a score of the data, None where there is none that can be used.

    Raises:
        ValueError: What is there is no number.
    """
    number = as_number(value, 0, "scores")
    return number if is_score(number) else None


def _add(this: PromptResponses, items: Sequence[tuple[Any, Any]], index: int, skipped: Skipped) -> None:
    """Adds the responses that are new, and the first score of each."""
    for position, (text, given) in enumerate(items):
        place = f"row {index}, response {position}"
        if text in (None, "", []):
            skipped.add("empty response", place)
            continue
        try:
            response = _encodable(plain_answer(as_text(text, index, "responses")), index, "responses")
        except ValueError as error:
            skipped.add("response that cannot be read", f"{place}: {error}")
            continue
        if isinstance(text, list) and isinstance(this.prompt, str):
            skipped.add("response of chat messages to a prompt of plain text; give it as messages, too", place)
            continue
        try:
            score = score_or_none(given)
        except ValueError:
            skipped.add("score that is no number", f"{place}: {shorten(given)}")
            score = None
        if response not in this.responses:
            this.responses.append(response)
            this.scores.append(score)
        elif this.scores[this.responses.index(response)] is None:
            this.scores[this.responses.index(response)] = score


def lay_out(prompt: PromptResponses, responses: Sequence[Text], *, as_messages: bool, **columns: Any) -> dict[str, Any]:
    """Returns a row of the result: ``prompt``, ``responses`` (text, or all as messages), and the columns given."""
    laid: list[Text] = [prompt.messages(response) if as_messages else response for response in responses]
    return {"prompt": prompt.prompt, "responses": laid, **columns, **_others(prompt.columns, columns)}


def lay_out_again(prompt: PromptResponses, earlier: Mapping[str, Any], *, as_messages: bool) -> dict[str, Any]:
    """Returns a row that was laid out by an earlier run, with the other columns as the data has them now."""
    responses = [plain_answer(response) for response in earlier["responses"]]
    made = {name: earlier[name] for name in ("scores", "dropped") if name in earlier}
    return lay_out(prompt, responses, as_messages=as_messages, **made)


def plain_answer(response: Text) -> Text:
    """Returns the text of a response that is one plain message of the assistant, any other as it is."""
    only = response[0] if isinstance(response, list) and len(response) == 1 else {}
    if only.get("role") == "assistant" and set(only) == {"role", "content"} and only["content"] is not None:
        text: str = only["content"]
        return text
    return response


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
