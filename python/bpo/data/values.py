"""Single values of the data, checked: texts, messages, numbers, and the hashes that tell texts apart."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Text = str | list[dict[str, Any]]
"""A prompt or a response: plain text, or a list of chat messages."""

_LARGEST_SCORE = 1e300


def is_messages(value: Any) -> bool:
    """Whether something is a conversation: a list of messages with role and content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in value)
    )


def check_json(value: Any, index: int, column: str) -> None:
    """Raises a ValueError that names row and column where JSON has no form for a value."""
    try:
        json.dumps(value)
    except TypeError as error:
        raise ValueError(f"Row {index}, column '{column}': {error}.") from None


def _canonical(text: Text) -> bytes:
    return json.dumps(text, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode(errors="surrogatepass")


def content_id(*texts: Text) -> bytes:
    """Returns the 16-byte content hash by which a prompt, or a prompt and its response, is known in a store."""
    digest = hashlib.sha256()
    for text in texts:
        data = _canonical(text)
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()[:16]


def as_text(value: Any, index: int, column: str, role: str | None = None) -> Text:
    """Checks one prompt or response; ``role`` wraps plain text into a message of a conversational row."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if role else value
    if is_messages(value):
        for message in value:
            calls_tools = message["content"] is None and message.get("tool_calls")
            if not isinstance(message["role"], str) or not (isinstance(message["content"], str) or calls_tools):
                raise ValueError(f"Row {index}, column '{column}': a message has no text content; bpo reads text only.")
        # Arrow fills keys that other messages have with None, which chat templates never see.
        messages = [
            {key: item for key, item in message.items() if item is not None or key == "content"} for message in value
        ]
        if not all(isinstance(item, str) for message in messages for item in message.values()):
            import datasets

            check_json(messages, index, column)
            if not hasattr(datasets, "Json"):
                raise ValueError(
                    f"Row {index}, column '{column}': tool calls need a newer version of datasets, with columns of "
                    f"JSON; this is {datasets.__version__}."
                )
        return messages
    raise ValueError(
        f"Row {index}, column '{column}': expected text or a list of {{role, content}} messages, got {shorten(value)}."
    )


def shorten(value: Any) -> str:
    """Returns type and beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def as_number(value: Any, index: int, column: str) -> float:
    """Returns a number as a float, NaN where there is none."""
    if value is None:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise ValueError(f"Row {index}, column '{column}': {shorten(value)} is not a number.") from None


def as_weights(value: Any, place: str) -> npt.NDArray[np.float32]:
    """Returns token weights as an array.

    Raises:
        ValueError: No list of finite numbers; the message names the place.
    """
    try:
        with np.errstate(over="ignore"):
            weights = np.asarray(value, dtype=np.float64).astype(np.float32)
    except (TypeError, ValueError):
        weights = np.zeros((0, 0), dtype=np.float32)
    if weights.ndim != 1:
        raise ValueError(f"{place}: expected a list of token weights, got {shorten(value)}.")
    bad = np.flatnonzero(~np.isfinite(weights))
    if len(bad):
        raise ValueError(f"{place}: token weight {bad[0]}, counted from 0, is {value[bad[0]]}; weights must be finite.")
    return weights


def is_score(value: float) -> bool:
    """Whether differences of such scores are finite."""
    return abs(value) <= _LARGEST_SCORE


def one_each(values: Any, items: Sequence[Any], index: int, column: str) -> list[Any]:
    """Checks that a column holds a list of one value a response."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(
            f"Row {index}, column '{column}': expected a list of one value a response, got {shorten(values)}."
        )
    if len(values) != len(items):
        raise ValueError(f"Row {index}: {len(items)} responses but {len(values)} {column}.")
    return list(values)


def prompt_text(prompt: Text) -> str:
    """Returns a prompt as plain text; the messages of a conversation are joined by line breaks."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] or "" for message in prompt)
