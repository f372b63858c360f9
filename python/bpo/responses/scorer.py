"""What gives scores to responses: the interface of a scorer, and a function as one."""

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

if TYPE_CHECKING:
    from bpo.data.values import Text
    from bpo.responses.prompts import PromptResponses


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a response, as a :class:`bpo.Scorer` yields it.

    Attributes:
        value: The score; None where there is none.
        error: Why there is none.
    """

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
        >>> class Shortest(bpo.Scorer):
        ...     def describe(self):
        ...         return {"scorer": "shortest"}
        ...     def scores(self, rows):
        ...         for index, row in enumerate(rows):
        ...             yield index, [bpo.Score(-float(len(text))) for text in row.responses]
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
        """Yields the index of a row with the scores of its responses, in any order, each as soon as it is there.

        Args:
            rows: Each with its ``prompt`` (text or messages) and the ``responses`` to be scored (text; messages where
                one is more than a plain answer).

        Yields:
            Index, and of each response what has a ``value``, a number or None, and as ``error`` the reason for None.
        """


class FunctionScorer(Scorer):
    """A Python function, one response a call or a list of them."""

    def __init__(self, function: Callable[..., Any], batch_size: int | None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
        self.function = function
        self.batch_size = batch_size

    def describe(self) -> dict[str, Any]:
        """Returns the name of the function and a hash of its source, None where there is none."""
        function = inspect.unwrap(self.function)
        name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"
        try:
            source = hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
        except (OSError, TypeError):
            source = None
        return {"function": name, "source": source}

    def scores(self, rows: Sequence[PromptResponses]) -> Iterator[tuple[int, list[Score]]]:
        """Yields the scores of each row; what the function raises is why there is none."""
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
