"""Which columns the accepted formats have, and those that hold settings of a row: its weight, its chat template's."""

from __future__ import annotations

import difflib
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.data.rows import values_of
from bpo.data.values import check_json, shorten

if TYPE_CHECKING:
    import datasets
    import numpy.typing as npt

    from bpo.data.rows import ListRows

ACCEPTED_FORMATS = (
    "preference rows (`chosen`, `rejected`, with or without `prompt`, `score_chosen`, `score_rejected`), "
    "scored responses (`prompt`, `responses` and `scores`, or `responses` as a list of {text, score}), "
    "or UltraFeedback-like rows (`instruction` or `prompt`, and `completions` as a list of {response, overall_score})"
)
_KNOWN_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "score_chosen",
    "score_rejected",
    "responses",
    "scores",
    "instruction",
    "completions",
)

# What TRL gives to apply_chat_template itself.
_RESERVED_KWARGS = {"conversation", "tokenize", "return_dict", "add_generation_prompt"}
WEIGHT_COLUMN = "weight"
"""Where pairs carry weights unless the settings say otherwise; the only such column that need not be there."""


def column_error(columns: list[str]) -> str:
    """Says which formats are accepted, and which column may be misnamed."""
    hints = []
    for column in columns:
        close = difflib.get_close_matches(column, _KNOWN_COLUMNS, n=1, cutoff=0.75)
        if close and close[0] != column and close[0] not in columns:
            hints.append(f"'{column}' looks like '{close[0]}': dataset.rename_column('{column}', '{close[0]}')")
    hint = f" Perhaps {'; '.join(hints)}." if hints else ""
    return f"The columns {columns} are none of the accepted formats: {ACCEPTED_FORMATS}.{hint}"


def read_template_kwargs(rows: datasets.Dataset | ListRows) -> list[dict[str, Any]]:
    """Returns what each row gives to the chat template beside the messages; an empty list where none gives anything.

    TRL passes ``tools``, which may be JSON, and every item of ``chat_template_kwargs``.

    Raises:
        ValueError: Values that TRL or Arrow cannot take.
    """
    if not {"tools", "chat_template_kwargs"} & set(rows.column_names):
        return []
    tools = [_tools(value, index) for index, value in enumerate(values_of(rows, "tools"))]
    given = [_kwargs(value, index) for index, value in enumerate(values_of(rows, "chat_template_kwargs"))]
    # TRL reads rows from Arrow, where an item that only some rows have is None in all the others; a template can tell
    # None from nothing.
    try:
        filled = pa.array(given)
    except pa.ArrowException as error:
        raise ValueError(f"Arrow cannot hold the column 'chat_template_kwargs': {error}") from None
    unset = dict.fromkeys(field.name for field in filled.type) if pa.types.is_struct(filled.type) else {}
    merged = [
        {**({} if tool is None else {"tools": tool}), **(kwargs or unset)}
        for tool, kwargs in zip(tools, filled.to_pylist(), strict=True)
    ]
    for index, kwargs in enumerate(merged):
        check_json(kwargs, index, "tools' or 'chat_template_kwargs")
    return merged


def template_columns(template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row that give these to the chat template; see :func:`read_template_kwargs`."""
    kwargs = dict(template_kwargs)
    columns: dict[str, Any] = {}
    if kwargs.get("tools") is not None:
        columns["tools"] = kwargs.pop("tools")
    if kwargs:
        columns["chat_template_kwargs"] = kwargs
    return columns


def row_weights(rows: datasets.Dataset | ListRows, column: str | None) -> npt.NDArray[np.float64] | None:
    """Returns the weight of each row, None where there is no such column."""
    if column is None or (column == WEIGHT_COLUMN and column not in rows.column_names):
        return None
    require_columns(list(rows.column_names), (column,), f"weight_column={column!r}")
    return np.array([pair_weight(value, f"Row {index}", column) for index, value in enumerate(values_of(rows, column))])


def pair_weight(value: Any, place: str, column: str) -> float:
    """Returns the weight of a pair as a float.

    Raises:
        ValueError: Not a finite number of at least 0; the message names the place.
    """
    number = isinstance(value, (numbers.Real, np.number)) and not isinstance(value, bool)
    if not number or not 0 <= (weight := float(value)) < math.inf:
        raise ValueError(
            f"{place}, column '{column}': the weight of a pair must be a finite number of at least 0, got "
            f"{shorten(value)}. If the column means something else, set weight_column."
        )
    return weight


def _tools(value: Any, index: int) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"Row {index}, column 'tools': not JSON: {error}") from None
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"Row {index}, column 'tools': expected a list of tools, got {shorten(value)}.")
    return value


def _kwargs(value: Any, index: int) -> dict[str, Any] | None:
    if not isinstance(value, (Mapping, type(None))):
        raise ValueError(f"Row {index}, column 'chat_template_kwargs': expected a mapping, got {shorten(value)}.")
    taken = sorted(_RESERVED_KWARGS & set(value or {}))
    if taken:
        raise ValueError(f"Row {index}, column 'chat_template_kwargs': {', '.join(taken)} is set by the trainer.")
    return None if value is None else dict(value)


def require_columns(columns: list[str], wanted: Sequence[str], setting: str) -> None:
    """Raises a ValueError that names the setting where the data lacks a column that it needs."""
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(
            f"SelectConfig.{setting} needs the columns {', '.join(missing)}, but the columns are {columns}."
        )
