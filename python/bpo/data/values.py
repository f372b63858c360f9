"""Single values of the data, checked: texts, messages, numbers, and the hashes that tell texts apart."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.system.packed import Packed

if TYPE_CHECKING:
    import numpy.typing as npt

Text = str | list[dict[str, Any]]
"""A prompt or a response: plain text, or a list of chat messages."""

_LARGEST_SCORE = 1e300

_PLAIN = {"role", "content"}
_PICKLE = 5  # the protocol
_PICKLED = b"\x80"
_quoted = json.encoder.encode_basestring
_encode_messages = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode


class UnusableError(ValueError):
    """A value of the data that cannot be used; whoever reads the row counts it under its reason and names the place.

    Attributes:
        reason: Why, in words that are the same for all such values.
        got: What was there instead, where that helps to find it.
    """

    def __init__(self, reason: str, got: str = "") -> None:
        super().__init__(f"{reason}: {got}" if got else reason)
        self.reason = reason
        self.got = got

    def at(self, place: str) -> str:
        """Returns a place, with what was there."""
        return f"{place}: {self.got}" if self.got else place


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, or what pandas writes into one."""
    if value is None or isinstance(value, (str, list)):
        return value is None
    if isinstance(value, (float, np.floating)):
        return math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def is_blank(value: Any) -> bool:
    """Whether there is nothing in a cell: it is empty, or holds empty text or an empty list."""
    return len(value) == 0 if isinstance(value, (str, list, tuple, np.ndarray)) else is_missing(value)


def as_list(value: Any) -> list[Any] | None:
    """Returns a list, a tuple or an array (which pandas makes of a list) as a list; None for anything else."""
    if isinstance(value, list):
        return value
    if isinstance(value, tuple) or (isinstance(value, np.ndarray) and value.ndim):
        return list(value)
    return None


def is_messages(value: Any) -> bool:
    """Whether something is a conversation: a list of messages, each with a role."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def check_json(value: Any, column: str) -> None:
    """Raises :class:`UnusableError` where JSON, or UTF-8, has no form for a value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UnusableError(_HALF_A_CHARACTER, f"column '{column}'") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UnusableError(f"column '{column}': JSON has no form for the value", f"{error}") from None


def canonical(text: Text) -> bytes:
    """Returns the bytes by which a text is known, the same for equal ones."""
    if isinstance(text, str):
        written = _quoted(text)
    elif is_messages(text) and all(m.keys() == _PLAIN and isinstance(m["content"], str) for m in text):
        # What follows would write the same, ten times slower.
        plain = (f'{{"content":{_quoted(m["content"])},"role":{_quoted(m["role"])}}}' for m in text)
        written = f"[{','.join(plain)}]"
    else:
        written = _encode_messages(text)
    return written.encode(errors="surrogatepass")


def content_hash(*texts: Text) -> hashlib._Hash:
    """Returns the SHA-256 of texts one after the other, which can go on with :func:`add_text`."""
    digest = hashlib.sha256()
    for text in texts:
        add_text(digest, text)
    return digest


def add_text(digest: hashlib._Hash, text: Text) -> hashlib._Hash:
    """Goes on with one more text, and returns the digest."""
    data = canonical(text)
    digest.update(len(data).to_bytes(8, "little") + data)
    return digest


def pack_text(text: Text) -> bytes:
    """Returns a text as bytes: UTF-8, or messages pickled, which no UTF-8 begins as."""
    return text.encode(errors="surrogatepass") if isinstance(text, str) else pickle.dumps(text, _PICKLE)


def unpack_text(data: bytes) -> Text:
    """Returns what :func:`pack_text` was given."""
    if data[:1] == _PICKLED:
        messages: list[dict[str, Any]] = pickle.loads(data)
        return messages
    return data.decode(errors="surrogatepass")


def packed_rows(rows: Iterable[Any] = ()) -> Packed[Any]:
    """Returns rows that can be gone through once only as ones that can be read again.

    Raises:
        TypeError: A row holds what has no form on disk; the message shows its beginning.
    """
    return Packed(_pack_row, pickle.loads, rows)


def _pack_row(row: Any) -> bytes:
    # Other mappings may hold on to what they are a row of.
    plain = dict(row) if isinstance(row, Mapping) and type(row) is not dict else row
    try:
        return pickle.dumps(plain, _PICKLE)
    except (pickle.PicklingError, AttributeError, NotImplementedError, RecursionError, TypeError) as error:
        raise TypeError(
            f"A row holds more than plain values, so that it cannot be kept to be read again: {shorten(row)}: {error}"
        ) from None


def content_id(*texts: Text) -> bytes:
    """Returns the 16-byte content hash by which a prompt, or a prompt and its response, is known in a store."""
    return content_hash(*texts).digest()[:16]


_HALF_A_CHARACTER = "the text holds half a character (a lone surrogate)"


def _check_characters(text: str, column: str) -> None:
    """Raises :class:`UnusableError` where a text has no UTF-8, which tokenizers and files need."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UnusableError(_HALF_A_CHARACTER, f"column '{column}', character {error.start}") from None


def as_text(value: Any, column: str, role: str | None = None) -> Text:
    """Checks one prompt or response; ``role`` wraps plain text into a message of a conversational row.

    Raises:
        UnusableError: Neither text nor messages, a message that says nothing, or half a character.
    """
    if isinstance(value, str):
        _check_characters(value, column)
        return [{"role": role, "content": value}] if role else value
    messages = as_list(value)
    if messages is None or not is_messages(messages):
        raise UnusableError(f"column '{column}': expected text or a list of {{role, content}} messages", shorten(value))
    return [_message(message, column) for message in messages]


def _message(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    """Returns a message without the keys that only others have; one that calls tools may say nothing beside."""
    role, content = message["role"], message.get("content")
    content = None if is_missing(content) else content
    calls = as_list(message.get("tool_calls"))
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        raise UnusableError(f"column '{column}': a message has no text content; bpo reads text only", shorten(message))
    # Arrow fills keys that other messages have with None, which chat templates never see.
    kept = {key: item for key, item in message.items() if item is not None and key not in _PLAIN}
    if calls:
        kept["tool_calls"] = calls
    # One text for each role, not one a message.
    kept = {"role": sys.intern(str(role)), "content": content, **kept}
    if all(isinstance(item, str) for item in kept.values()):
        for item in kept.values():
            _check_characters(item, column)
        return kept
    import datasets

    check_json(kept, column)
    if not hasattr(datasets, "Json"):
        raise ValueError(
            f"Column '{column}': tool calls need a newer version of datasets, with columns of JSON; this is "
            f"{datasets.__version__}."
        )
    return kept


def most_are_messages(messages: Sequence[bool] | npt.NDArray[np.bool_]) -> bool:
    """Whether most prompts are messages, of which each is told; as many of both are what the first one is."""
    twice = 2 * int(np.count_nonzero(messages))
    return twice > len(messages) or (twice == len(messages) > 0 and bool(messages[0]))


def says_nothing(text: Text) -> bool:
    """Whether a response is empty: no text, no message, or messages without content or tool calls."""
    if isinstance(text, str):
        return not text
    return not any(message["content"] or message.get("tool_calls") for message in text)


def shorten(value: Any) -> str:
    """Returns type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def as_score(value: Any) -> float:
    """Returns a score, from a number or from text that is one.

    Raises:
        UnusableError: No number, or one of which differences are not finite.
    """
    try:
        score = math.nan if is_blank(value) else as_number(value)
    except UnusableError as error:
        raise UnusableError("score is not a number", error.got) from None
    if not is_score(score):
        raise UnusableError("score missing, NaN or infinite")
    return score


def as_number(value: Any) -> float:
    """Returns a number, or text that is one, as a float.

    Raises:
        UnusableError: Neither.
    """
    try:
        # An array of one number is none: float() would take it.
        if not isinstance(value, (np.ndarray, bytes, bytearray)):
            return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        pass
    raise UnusableError("not a number", shorten(value))


def as_ref_logp(value: Any) -> float:
    """Returns a reference log-probability.

    Raises:
        UnusableError: No finite number.
    """
    try:
        number = math.nan if is_missing(value) else as_number(value)
    except UnusableError as error:
        raise UnusableError("reference log-probability is not a number", error.got) from None
    if not math.isfinite(number):
        raise UnusableError("reference log-probability missing, NaN or infinite")
    return number


def as_weights(value: Any) -> npt.NDArray[np.float32]:
    """Returns token weights as an array.

    Raises:
        UnusableError: No list of finite numbers.
    """
    try:
        with np.errstate(over="ignore"):
            weights = np.asarray(value, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError):
        weights = np.zeros((0, 0), dtype=np.float32)
    if weights.ndim != 1:
        raise UnusableError("expected a list of token weights", shorten(value))
    bad = np.flatnonzero(~np.isfinite(weights))
    if len(bad):
        raise UnusableError("token weights must be finite", f"that of token {bad[0]} is {value[bad[0]]}")
    return weights


def is_score(value: float) -> bool:
    """Whether differences of such scores are finite."""
    return abs(value) <= _LARGEST_SCORE


def one_each(values: Any, items: Sequence[Any], column: str) -> list[Any]:
    """Checks that a column holds a list of one value a response.

    Raises:
        UnusableError: It does not.
    """
    listed = as_list(values)
    if listed is None:
        raise UnusableError(f"column '{column}': expected a list of one value a response", shorten(values))
    if len(listed) != len(items):
        raise UnusableError(
            f"column '{column}': not one value a response", f"{len(items)} responses, {len(listed)} values"
        )
    return listed


def prompt_text(prompt: Text) -> str:
    """Returns a prompt as plain text; the messages of a conversation are joined by line breaks."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] or "" for message in prompt)
