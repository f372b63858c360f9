"""What gives scores to responses: the interface of a scorer, and a function as one."""

from __future__ import annotations

import abc
import copy
import dataclasses
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.data.values import is_score, shorten
from bpo.system.identity import identity_of

if TYPE_CHECKING:
    from bpo.data.values import Text
    from bpo.responses.prompts import PromptResponses


# Characters of a reason that are kept: what a server says may be a page.
_LONGEST_REASON = 500


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
        """Reads what a scorer gave: a number in whatever form it comes, else why it is none.

        Args:
            value: A number of Python, NumPy or another library; a tensor or an array of one number, on any device, or
                a list of one; a ``Score``, whose value is read likewise.
        """
        try:
            if hasattr(value, "value") and hasattr(value, "error"):
                given = cls.of(value.value)
                return given if given.value is not None or value.error is None else cls(None, _text(value.error))
            number = _number(value)
        except Exception as error:  # values of other libraries may fail in their own ways
            return cls(None, f"the scorer gave {_shown(value)}: {reason_of(error)}")
        if number is None:
            what = "none" if value is None else f"{_shown(value)}, which is no number"
            return cls(None, f"the scorer gave {what}")
        return cls(number) if is_score(number) else cls(None, f"the scorer gave {number}")


def _number(value: Any) -> float | None:
    """Returns a number out of whatever holds a single one; None where there is none or several."""
    value = _listed(value)
    while isinstance(value, (list, tuple)) and len(value) == 1:
        value = _listed(value[0])
    # Text has no __float__, and neither have lists, complex numbers and arrays of several numbers.
    if value is None or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _listed(value: Any) -> Any:
    """Returns what an array or a tensor of one number holds, in lists within lists or alone; None for several."""
    if not hasattr(value, "tolist"):
        return value
    count = value.numel() if hasattr(value, "numel") else getattr(value, "size", 1)
    return value.tolist() if count == 1 else None


def scores_of(values: Any, count: int) -> list[Score]:
    """Reads what a scorer gave for several responses; where it is not one value each, no response has a score."""
    try:
        if isinstance(values, (str, bytes, Mapping, Set)):
            raise TypeError
        values = list(values)
    except Exception:
        return [Score(None, f"the scorer gave {_shown(values)}, not a list of scores")] * count
    if len(values) != count:
        return [Score(None, f"the scorer returned {len(values)} scores for {count} responses")] * count
    return [Score.of(value) for value in values]


def reason_of(error: BaseException) -> str:
    """Returns why there is no score, from what was raised: one line that JSON and Arrow can hold."""
    try:
        said = str(error)
    except Exception:  # its own message may be what is broken
        said = "it cannot say why"
    return f"{type(error).__name__}: {_text(said)}"


def _text(value: Any) -> str:
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"


def _shown(value: Any) -> str:
    try:
        return _text(shorten(value))
    except Exception:  # an object that cannot be shown
        return type(value).__name__


class Scorer(abc.ABC):
    """What gives scores to the responses of prompts: :class:`bpo.RewardModel`, :class:`bpo.Judge`, or your own.

    Attributes:
        relative: Whether a score compares a response with the others of its prompt, so that all of them are scored
            together.
        reads_columns: Whether scores depend on the other columns of a row (its ``columns``), as they may unless you say
            otherwise: then a file of scores of other columns is refused, else the columns are brought up to date.
        share: Prompts that each of several processes of a job scores at a time; 0 has the first process score all, as
            where a server is asked that counts requests.

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
    reads_columns = True
    share = 16

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
            What is no number, and a row that is not yielded or with another count, is a failure of its responses.

        Raises:
            Exception: Whatever stops it. An ``OSError`` or a ``MemoryError`` ends the run; of any other the rows that
                are left are given one by one, and what stops it again is a failure of that row.
        """

    def pieces(self, rows: Sequence[PromptResponses]) -> list[list[int]]:
        """Cuts rows, by index, into pieces that one process scores."""
        size = self.share or len(rows)
        return [list(range(start, min(len(rows), start + size))) for start in range(0, len(rows), size)]


class FunctionScorer(Scorer):
    """A Python function, one response a call or a list of them.

    Raises:
        ValueError: A ``batch_size`` out of range.
        TypeError: A function that cannot be called with a prompt and a response.
    """

    reads_columns = False

    def __init__(self, function: Callable[..., Any], batch_size: int | None) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size!r}.")
        _check_signature(function, "prompt, response" if batch_size is None else "prompts, responses")
        self.function = function
        self.batch_size = batch_size
        self.first_error: Exception | None = None

    def describe(self) -> dict[str, Any]:
        """Returns what the function's own ``describe()`` returns, else the names and hashes of all it is made of."""
        describe = getattr(self.function, "describe", None)
        of_function = describe() if callable(describe) else identity_of(self.function)
        return {**of_function, **({} if self.batch_size is None else {"lists": True})}

    def scores(self, rows: Sequence[PromptResponses]) -> Iterator[tuple[int, list[Score]]]:
        """Yields the scores of each row; what the function raises is why there is none."""
        for chunk in _chunks(rows, self.batch_size or 1):
            items = [(rows[index].prompt, response) for index in chunk for response in rows[index].responses]
            given = iter(self._list(items) if self.batch_size else [self._one(*item) for item in items])
            for index in chunk:
                yield index, [next(given) for _ in rows[index].responses]

    def pieces(self, rows: Sequence[PromptResponses]) -> list[list[int]]:
        """Cuts rows as the function gets them."""
        return list(_chunks(rows, self.batch_size or 1))

    def _one(self, prompt: Text, response: Text) -> Score:
        try:
            # Copies, so that the data stays as it is whatever the function does to what it is given.
            return Score.of(self.function(copy.deepcopy(prompt), copy.deepcopy(response)))
        except Exception as error:  # whatever the function raises is about this response
            return self._failed(error)

    def _list(self, items: Sequence[tuple[Text, Text]]) -> list[Score]:
        prompts, responses = (copy.deepcopy([item[side] for item in items]) for side in (0, 1))
        try:
            values = self.function(prompts, responses)
            values = list(values) if isinstance(values, Iterator) else values  # what it raises is of the function
        except Exception as error:
            if len(items) > 1:  # one of them may be what it cannot score
                return [score for item in items for score in self._list([item])]
            return [self._failed(error)]
        return scores_of(values, len(items))

    def _failed(self, error: Exception) -> Score:
        self.first_error = self.first_error or error
        return Score(None, reason_of(error))


def _check_signature(function: Callable[..., Any], arguments: str) -> None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # what is built in may not say what it takes
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError as error:
        raise TypeError(f"The scorer is called with ({arguments}), but takes {signature}: {error}.") from None


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
    if not callable(function) and not isinstance(function, Scorer):
        raise ValueError(f"{field}: {name} is {function!r}, which cannot be called")
    return function
