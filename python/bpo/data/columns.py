"""Which columns the accepted formats have, and those that hold settings of a row: its weight, its chat template's."""

from __future__ import annotations

import difflib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from bpo.data.rows import READ_COLUMNS
from bpo.data.values import UnusableError, as_list, as_number, check_json, is_missing, shorten
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.rows import Rows

_T = TypeVar("_T")

ACCEPTED_FORMATS = (
    "preference rows (`chosen`, `rejected`, with or without `prompt`, `score_chosen`, `score_rejected`), "
    "scored responses (`prompt`, `responses` and `scores`, or `responses` as a list of {text, score}), "
    "or UltraFeedback-like rows (`instruction` or `prompt`, and `completions` as a list of {response, overall_score})"
)
# Names under which data sets keep what here is the prompt.
_PROMPT_NAMES = ("prompts", "instruction", "question", "query", "input", "problem", "user")

# What TRL gives to apply_chat_template itself.
_RESERVED_KWARGS = {"conversation", "tokenize", "return_dict", "add_generation_prompt"}
WEIGHT_COLUMN = "weight"
"""Where pairs carry weights unless the settings say otherwise; the only such column that need not be there."""

# What TRL's trainers take for something of their own where it is there.
_OF_TRL = (
    "messages",
    "completion",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "ref_chosen_logps",
    "ref_rejected_logps",
)
OURS = "bpo_"
"""What the names of the columns begin with that say how a pair was selected."""


def column_error(columns: list[str]) -> str:
    """Says which formats are accepted, and which column may be misnamed."""
    hints = []
    for column in columns:
        close = difflib.get_close_matches(column, READ_COLUMNS, n=1, cutoff=0.75)
        if column in _PROMPT_NAMES and column != "instruction":
            close = ["prompt"]
        if close and close[0] != column and close[0] not in columns:
            hints.append(f"'{column}' looks like '{close[0]}': dataset.rename_column('{column}', '{close[0]}')")
    hint = f" Perhaps {'; '.join(hints)}." if hints else ""
    return f"The columns {columns} are none of the accepted formats: {ACCEPTED_FORMATS}.{hint}"


def check_prompt_is_named(columns: list[str]) -> None:
    """Raises a ValueError where pairs have no ``prompt``, but a column that looks like it under another name."""
    found = [column for column in columns if column.lower() in _PROMPT_NAMES]
    if found and "prompt" not in columns:
        raise ValueError(
            f"The data has no column 'prompt', but '{found[0]}' looks like one. If it is, "
            f"dataset.rename_column('{found[0]}', 'prompt'); if chosen and rejected carry their prompt, "
            f"dataset.remove_columns('{found[0]}'): a prompt is not guessed from what the two have in common while "
            "the data may give it."
        )


def read_template_kwargs(rows: Rows, wrong: dict[int, UnusableError]) -> list[dict[str, Any]]:
    """Returns what each row gives to the chat template beside the messages; an empty list where none gives anything.

    TRL passes ``tools``, which may be JSON, and every item of ``chat_template_kwargs``.

    Args:
        rows: The data.
        wrong: Row → why it cannot be used; rows with values that TRL cannot take are added.

    Raises:
        ValueError: Values of which Arrow, and so TRL, cannot make one column.
    """
    if not {"tools", "chat_template_kwargs"} & set(rows.column_names):
        return []
    tools = list(_checked(_tools, rows.column("tools"), wrong))
    given = list(_checked(_kwargs, rows.column("chat_template_kwargs"), wrong))
    # TRL reads rows from Arrow, where an item that only some rows have is None in all the others; a template can tell
    # None from nothing.
    try:
        filled = pa.array(given)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"Arrow cannot hold the column 'chat_template_kwargs': {error}") from None
    unset = dict.fromkeys(field.name for field in filled.type) if pa.types.is_struct(filled.type) else {}
    return [
        {**({} if tool is None else {"tools": tool}), **(kwargs or unset)}
        for tool, kwargs in zip(tools, filled.to_pylist(), strict=True)
    ]


def template_columns(template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row that give these to the chat template; see :func:`read_template_kwargs`."""
    kwargs = dict(template_kwargs)
    columns: dict[str, Any] = {}
    if kwargs.get("tools") is not None:
        columns["tools"] = kwargs.pop("tools")
    if kwargs:
        columns["chat_template_kwargs"] = kwargs
    return columns


def other_columns(names: Sequence[str], config: SelectConfig) -> list[str]:
    """Returns the columns that belong to the user alone: neither bpo nor TRL's trainers read them.

    It warns of those that an earlier selection wrote, in whose place come those of the next.
    """
    weights = config.token_weights
    read = {*READ_COLUMNS, *_OF_TRL, "tools", "chat_template_kwargs", "ref_logps", WEIGHT_COLUMN, config.weight_column}
    if isinstance(weights, str):
        read |= {weights, f"{weights}_chosen", f"{weights}_rejected"}
    if isinstance(config.prompt_embeddings, str):
        read.add(config.prompt_embeddings)
    earlier = [name for name in names if name.startswith(OURS)]
    if earlier:
        warn(
            f"The columns {', '.join(earlier)} of the data have names of those that say how a pair was selected, which "
            "take their places; rename them to keep them."
        )
    return [name for name in names if name not in read and name not in earlier]


def row_weights(rows: Rows, column: str | None, wrong: dict[int, UnusableError]) -> npt.NDArray[np.float64] | None:
    """Returns the weight of each row, NaN where it has none, which ``wrong`` then says; None without such a column."""
    if column is None or (column == WEIGHT_COLUMN and column not in rows.column_names):
        return None
    require_columns(list(rows.column_names), (column,), f"weight_column={column!r}")
    weights = _checked(functools.partial(_weight, column=column), rows.column(column), wrong)
    return np.fromiter((math.nan if weight is None else weight for weight in weights), dtype=np.float64)


def row_trust(rows: Rows, column: str | None, wrong: dict[int, UnusableError]) -> npt.NDArray[np.float64] | None:
    """Returns how far the labels of each row are trusted, NaN where ``wrong`` says why not; None without a column."""
    if column is None:
        return None
    require_columns(list(rows.column_names), (column,), f"trust={column!r}")
    trust = _checked(functools.partial(_probability, column=column), rows.column(column), wrong)
    return np.fromiter((math.nan if value is None else value for value in trust), dtype=np.float64)


def pair_weight(value: Any, place: str, column: str) -> float:
    """Returns the weight of a pair as a float.

    Raises:
        ValueError: Not a finite number of at least 0; the message names the place.
    """
    try:
        return _weight(value, column)
    except UnusableError as error:
        raise ValueError(f"{place}, {error}. If the column means something else, set weight_column.") from None


def _weight(value: Any, column: str) -> float:
    weight = math.nan if isinstance(value, bool) or is_missing(value) else _or_nan(value)
    if not 0 <= weight < math.inf:
        raise UnusableError(
            f"column '{column}': the weight of a pair must be a finite number of at least 0", shorten(value)
        )
    return weight


def _probability(value: Any, column: str) -> float:
    probability = math.nan if isinstance(value, bool) or is_missing(value) else _or_nan(value)
    if not 0 <= probability <= 1:
        raise UnusableError(f"column '{column}': the trust in a label must be a number from 0 to 1", shorten(value))
    return probability


def _or_nan(value: Any) -> float:
    try:
        return as_number(value)
    except UnusableError:
        return math.nan


def _checked(read: Callable[[Any], _T], values: Iterable[Any], wrong: dict[int, UnusableError]) -> Iterator[_T | None]:
    """Reads the values of a column; what cannot be used is None, and ``wrong`` says why."""

    def reason(index: int, value: Any) -> _T | None:
        try:
            return read(value)
        except UnusableError as error:
            wrong.setdefault(index, error)
            return None

    return (reason(index, value) for index, value in enumerate(values))


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UnusableError("column 'tools': not JSON", str(error)) from None
    tools = as_list(value)
    if tools is None and not is_missing(value):
        raise UnusableError("column 'tools': expected a list of tools", shorten(value))
    check_json(tools, "tools")
    return tools


def _kwargs(value: Any) -> dict[str, Any] | None:
    if is_missing(value):
        return None
    if not isinstance(value, Mapping):
        raise UnusableError("column 'chat_template_kwargs': expected a mapping", shorten(value))
    taken = sorted(_RESERVED_KWARGS & set(value))
    if taken:
        raise UnusableError(f"column 'chat_template_kwargs': {', '.join(taken)} is set by the trainer")
    kwargs = dict(value)
    check_json(kwargs, "chat_template_kwargs")
    return kwargs


def require_columns(columns: list[str], wanted: Sequence[str], setting: str) -> None:
    """Raises a ValueError that names the setting where the data lacks a column that it needs."""
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(
            f"SelectConfig.{setting} needs the columns {', '.join(missing)}, but the columns are {columns}."
        )
