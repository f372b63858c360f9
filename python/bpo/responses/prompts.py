"""Prompts and their responses in any accepted format, before there are scores for them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    if isinstance(dataset, Sequence) and len(dataset) and (isinstance(dataset[0], str) or is_messages(dataset[0])):
        dataset = dataset if isinstance(dataset, str) else [{"prompt": prompt} for prompt in dataset]
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
        texts: Sequence[Any] = ()
        scores: list[float | None] = []
        if pairs:
            split = preference_texts(row, index, has_prompt="prompt" in names)
            if isinstance(split, str):
                skipped.add(split, f"row {index}")
                continue
            prompt, *texts = split
            scores = [_score(row.get(name), index, name) for name in ("score_chosen", "score_rejected")]
        else:
            if row[prompt_column] in (None, "", []):
                skipped.add("prompt is missing", f"row {index}")
                continue
            prompt = as_text(row[prompt_column], index, prompt_column)
            if column is not None:
                texts, scores = texts_and_scores(row, index, column)
        columns = {name: _plain(row[name]) for name in extra}
        for name, value in columns.items():
            check_json(value, index, name)
        this = PromptResponses(prompt, template_kwargs[index] if template_kwargs else {}, [], [], columns, index)
        this = found.setdefault(this.key, this)
        if isinstance(prompt, str) != isinstance(next(iter(found.values())).prompt, str):
            raise ValueError(f"Row {index}: some prompts are text and some are messages. Bring all into one form.")
        if not prompts_only:
            _add(this, texts, scores, index, skipped)
    report_skipped(skipped, "skip")
    if not found:
        raise ValueError(f"No row has a usable prompt.\n{skipped.describe()}")
    return list(found.values())


def _plain(value: Any) -> Any:
    """Returns None for NaN, which readers of JSON do not take."""
    return None if isinstance(value, float) and math.isnan(value) else value


def texts_and_scores(row: Mapping[str, Any], index: int, column: str) -> tuple[list[Any], list[float | None]]:
    """Returns the responses of a row, unchecked, and the score of each, None where there is none."""
    items = row[column]
    if items is None:
        return [], []
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"Row {index}, column '{column}': expected a list, got {shorten(items)}.")
    if row.get("scores") is not None:
        return list(items), [
            _score(value, index, "scores") for value in one_each(row["scores"], items, index, "scores")
        ]
    texts, scores = [], []
    for item in items:
        record = item if isinstance(item, Mapping) and "role" not in item else {"text": item}
        texts.append(next((record[name] for name in ("text", "response", "content") if name in record), None))
        name = next((name for name in ("score", "overall_score") if name in record), "score")
        scores.append(_score(record.get(name), index, f"{column}.{name}"))
    return texts, scores


def _score(value: Any, index: int, column: str) -> float | None:
    number = as_number(value, index, column)
    return number if is_score(number) else None


def _add(
    this: PromptResponses, texts: Sequence[Any], scores: Sequence[float | None], index: int, skipped: Skipped
) -> None:
    """Adds the responses that are new, and the first score of each."""
    for position, (text, score) in enumerate(zip(texts, scores, strict=True)):
        place = f"row {index}, response {position}"
        if text in (None, "", []):
            skipped.add("empty response", place)
            continue
        response = as_text(text, index, "responses")
        if isinstance(response, list):
            if isinstance(this.prompt, str):
                raise ValueError(
                    f"Row {index}: the prompt is plain text but response {position} holds chat messages. "
                    "Give the prompt as messages, too."
                )
            response = plain_answer(response)
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
    """Turns rows into a data set whose scores are numbers even where all are null."""
    import datasets

    dataset = datasets.Dataset.from_list(list(rows))
    for name, kind in (("scores", "float64"), ("score_errors", "string")):
        if name in dataset.column_names:
            dataset = dataset.cast_column(name, datasets.List(datasets.Value(kind)))
    return dataset
