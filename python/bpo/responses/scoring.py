"""Scoring responses: step 3 of the method, with a function, a reward model or a judge."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from bpo.data.values import content_id
from bpo.responses.prompts import lay_out, need_messages, read_responses, to_dataset
from bpo.responses.rowfile import RowFile
from bpo.system.warn import warn

if TYPE_CHECKING:
    import os

    import datasets

    from bpo.data.values import Text
    from bpo.responses.prompts import PromptResponses


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a response; None with the reason where there is none."""

    value: float | None
    error: str | None = None

    @classmethod
    def of(cls, value: Any) -> Score:
        """Reads what a scorer returned."""
        if value is None:
            return cls(None, "the scorer gave none")
        if hasattr(value, "item") and getattr(value, "size", 1) in (1, ()):
            value = value.item()  # a NumPy scalar
        if not isinstance(value, numbers.Real):
            return cls(None, f"the scorer gave {type(value).__name__}, which is no number")
        number = float(value)
        return cls(number) if math.isfinite(number) else cls(None, f"the scorer gave {number}")


class Scorer(abc.ABC):
    """What gives scores to the responses of prompts: :class:`bpo.RewardModel`, :class:`bpo.Judge`, or your own.

    Attributes:
        relative: Whether a score compares a response with the others of its prompt, so that all of them are scored
            together.

    Example:
        >>> import bpo
        >>> from bpo.responses.scoring import Score
        >>> class Shortest(bpo.Scorer):
        ...     def describe(self):
        ...         return {"scorer": "shortest"}
        ...     def scores(self, rows):
        ...         for index, row in enumerate(rows):
        ...             yield index, [Score(-float(len(text))) for text in row.responses]
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "four"]}]
        >>> bpo.score_responses(rows, Shortest(), progress=False)["scores"][:]
        [[-1.0, -4.0]]
    """

    relative = False

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Returns what the scores depend on, as JSON; a file of other scores is refused by it."""

    @abc.abstractmethod
    def scores(self, rows: Sequence[PromptResponses]) -> Iterator[tuple[int, list[Score]]]:
        """Yields the index of a row with the scores of its responses, in any order, each as soon as it is there."""


def score_responses(
    dataset: Any,
    scorer: Callable[..., Any] | Scorer,
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """Gives every response a score.

    A failure is kept as what it is, a score that is null, with its reason; :func:`bpo.select` sets such responses
    aside. Equal scores stay equal: no pair is made of them.

    Args:
        dataset: What :func:`bpo.sample_responses` returned, its file, or any format of :func:`bpo.select`, with or
            without scores. Equal prompts are brought together.
        scorer: A :class:`bpo.RewardModel`; a :class:`bpo.Judge`; or a function of (prompt, response) that returns a
            number, or None where it has none. It gets both as the data has them, and of a plain answer in a
            conversation the text. What it raises is a failure of that response.
        output: A .jsonl file to which each prompt goes as soon as it is finished. The same call goes on from there,
            and tries again what failed; one with other settings, which stand in a manifest beside it, is refused.
        overwrite: Whether scores that the data has are replaced; by default they stay. A judge that compares gives new
            ones to all responses of a prompt as soon as one has none.
        batch_size: Lets a function take lists of about so many prompts and responses and return a list of scores.
        progress: Whether to show a progress bar.

    Returns:
        Rows of ``prompt``, ``responses``, ``scores`` and ``score_errors`` (null where there is a score), and the other
        columns of the data.

    Raises:
        ValueError: Unusable data, other settings than those of ``output``, or not one score.
        TypeError: Something that does not score.

    Example:
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "It is 4", "5"]}]
        >>> scored = score_responses(rows, lambda prompt, response: float("4" in response), progress=False)
        >>> scored["scores"][0]
        [1.0, 1.0, 0.0]
    """
    if isinstance(scorer, Scorer):
        if batch_size is not None:
            raise ValueError("batch_size is for functions; a reward model has config['tokens_per_batch'].")
        judge = scorer
    elif callable(scorer):
        judge = _FunctionScorer(scorer, batch_size)
    else:
        raise TypeError(f"scorer must be a function, a bpo.RewardModel or a bpo.Judge, not {type(scorer).__name__}.")
    rows = read_responses(dataset)
    ids = [content_id(row.key.hex(), [*row.responses, *map(str, row.scores)]).hex() for row in rows]  # type: ignore[list-item]
    settings = {} if output is None else {"scorer": judge.describe(), "overwrite": overwrite}
    file = RowFile(output, "scores", settings, ids)
    todo: list[int] = []
    for index, (row, row_id) in enumerate(zip(rows, ids, strict=True)):
        if row_id in file.rows:
            if any(score is None for score in file.rows[row_id]["scores"]):
                todo.append(index)  # what failed is tried again
        elif overwrite or any(score is None for score in row.scores):
            todo.append(index)
        else:
            file.add(row_id, _laid_out(row, [Score(score) for score in row.scores], need_messages(rows)))
    # Which responses of a row are scored: those without a score, or all.
    wanted = [
        [
            place
            for place, score in enumerate(_present(rows[index], file.rows.get(ids[index]), overwrite))
            if judge.relative or score is None
        ]
        for index in todo
    ]
    parts = [
        dataclasses.replace(rows[index], responses=[rows[index].responses[place] for place in places])
        for index, places in zip(todo, wanted, strict=True)
    ]
    as_messages = need_messages(rows)
    with tqdm(total=sum(map(len, wanted)), desc="Scoring", unit="response", disable=not progress) as bar:
        for part, given in judge.scores(parts):
            index = todo[part]
            present = _present(rows[index], file.rows.get(ids[index]), overwrite)
            scores = [Score(score, None) for score in present]
            for place, score in zip(wanted[part], given, strict=True):
                scores[place] = score
            file.add(ids[index], _laid_out(rows[index], scores, as_messages))
            bar.update(len(given))
    finished = file.finish()
    _report(finished)
    return to_dataset(finished)


def _present(row: PromptResponses, earlier: dict[str, Any] | None, overwrite: bool) -> list[float | None]:
    """Returns the scores that stay: those of an earlier run, else those of the data."""
    if earlier is not None:
        return list(earlier["scores"])
    return [None] * len(row.responses) if overwrite else row.scores


def _laid_out(row: PromptResponses, scores: Sequence[Score], as_messages: bool) -> dict[str, Any]:
    return lay_out(
        row,
        row.responses,
        as_messages=as_messages,
        scores=[score.value for score in scores],
        score_errors=[score.error for score in scores],
    )


def _report(rows: Sequence[dict[str, Any]]) -> None:
    """Warns of failures; refuses a result of nothing else."""
    errors = [error for row in rows for error in row["score_errors"] if error is not None]
    total = sum(len(row["scores"]) for row in rows)
    if total and len(errors) == total:
        raise ValueError(f"Not one of the {total} responses could be scored; the first: {errors[0]}.")
    if errors:
        warn(
            f"{len(errors)} of {total} responses have no score, and bpo.select sets them aside; the first: {errors[0]}."
        )


class _FunctionScorer(Scorer):
    """A Python function, one response a call or a list of them."""

    def __init__(self, function: Callable[..., Any], batch_size: int | None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
        self.function = function
        self.batch_size = batch_size

    def describe(self) -> dict[str, Any]:
        function = inspect.unwrap(self.function)
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
        try:
            source = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
        except (OSError, TypeError):
            source = None
        return {"function": name, "source": source}

    def scores(self, rows: Sequence[PromptResponses]) -> Iterator[tuple[int, list[Score]]]:
        for chunk in _chunks(rows, self.batch_size or 1):
            items = [(rows[index].prompt, response) for index in chunk for response in rows[index].responses]
            given = iter(self._list(items) if self.batch_size else [self._one(*item) for item in items])
            for index in chunk:
                yield index, [next(given) for _ in rows[index].responses]

    def _one(self, prompt: Text, response: Text) -> Score:
        try:
            return Score.of(self.function(prompt, response))
        except Exception as error:  # whatever the function raises is about this response
            return Score(None, f"{type(error).__name__}: {error}")

    def _list(self, items: Sequence[tuple[Text, Text]]) -> list[Score]:
        try:
            values = list(self.function([prompt for prompt, _ in items], [response for _, response in items]))
        except Exception as error:
            return [Score(None, f"{type(error).__name__}: {error}")] * len(items)
        if len(values) != len(items):
            raise ValueError(f"The function returned {len(values)} scores for {len(items)} responses.")
        return [Score.of(value) for value in values]


def _chunks(rows: Sequence[PromptResponses], n_responses: int) -> Iterator[list[int]]:
    """Cuts rows into groups of at least ``n_responses`` responses."""
    chunk: list[int] = []
    count = 0
    for index, row in enumerate(rows):
        chunk.append(index)
        count += len(row.responses)
        if count >= n_responses:
            yield chunk
            chunk, count = [], 0
    if chunk:
        yield chunk


def load_function(name: str, field: str) -> Any:
    """Imports ``MODULE:NAME``, of the working directory or of what is installed.

    Args:
        name: As the user wrote it.
        field: Where the user wrote it, for messages.

    Raises:
        ValueError: It is not written so, not there, or cannot be called.
    """
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"{field} must be MODULE:NAME, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}: {name} is not there: {error}") from None
    finally:
        sys.path.pop(0)
    if not callable(function):
        raise ValueError(f"{field}: {name} is {function!r}, which cannot be called")
    return function
