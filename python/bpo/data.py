"""Any TRL preference format, or scored responses, to one form: prompts, their responses, scores and candidate pairs."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import datasets
    import numpy.typing as npt

    from bpo.config import OnInvalid, SelectConfig

Text = str | list[dict[str, Any]]
"""A prompt or a response: plain text, or a list of chat messages."""

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
_REF_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_OTHER_COLUMNS = " with other token weights or reference log-probabilities"
_OTHER_WEIGHT = " with another weight"
WEIGHT_COLUMN = "weight"
"""Where pairs carry weights unless the settings say otherwise; the only such column that need not be there."""
_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_NAMED_ROWS = 5
_LARGEST_SCORE = 1e300


class InvalidDataWarning(UserWarning):
    """Some rows of the data cannot be used; the message counts and names them."""


@dataclasses.dataclass
class Skipped:
    """What of the data is not used, and why: reason → places, such as ``"row 3"`` or ``"row 3, response 1"``."""

    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Records one place under its reason."""
        self.places.setdefault(reason, []).append(place)

    def merge(self, other: Skipped) -> None:
        """Takes over everything that ``other`` recorded."""
        for reason, places in other.places.items():
            self.places.setdefault(reason, []).extend(places)

    def counts(self) -> dict[str, int]:
        """Returns how many places each reason has."""
        return {reason: len(places) for reason, places in self.places.items()}

    def describe(self) -> str:
        """Returns one line a reason: the count and the first few places."""
        lines = []
        for reason, places in self.places.items():
            named = "; ".join(places[:_NAMED_ROWS]) + ("; …" if len(places) > _NAMED_ROWS else "")
            lines.append(f"{len(places)} × {reason} ({named})")
        return "\n".join(lines)

    def __bool__(self) -> bool:
        return bool(self.places)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The one form in which the rest of ``bpo`` sees preference data.

    Responses are grouped by prompt; a *row* is the index of a response in that order. Pairs are grouped by prompt, too.

    Attributes:
        prompts: (n,) the distinct prompts with at least one candidate pair.
        prompt_rows: (n,) int64, the first row of the data that holds the prompt.
        prompt_ids: (n, 16) uint8, content hash of each prompt.
        template_kwargs: (n,) what the chat template gets beside the messages: ``tools``, and what the data gives as
            ``chat_template_kwargs``. Empty for plain text.
        responses: (R,) the distinct responses, grouped by prompt.
        response_ids: (R, 16) uint8, content hash of prompt and response.
        prompt_of_response: (R,) int64.
        response_places: (R, 2) int64, the first row of the data that holds the response and its position there, counted
            from 0; −1 where it is the row's ``chosen`` or ``rejected``.
        scores: (R,) float64, NaN where the data gives none.
        pairs: (P, 2) int64, rows of the preferred and of the other response.
        prompt_of_pair: (P,) int64.
        pair_rows: (P,) int64, the row of the data that states the pair, or that holds its preferred response.
        pair_scores: (P, 2) float64, scores of the preferred and of the other response, NaN where the data gives none.
        token_weights: Distinct float32 arrays of token weights, in the order of the data; empty where none are read.
        pair_weights: (P, 2) int64, which of ``token_weights`` the preferred and the other response have in the pair.
        pair_ref_logps: (P, 2) float64, log π_ref of the preferred and of the other response, as the data gives them;
            NaN where none are read.
        weights: (P,) float64, by how much the loss of each pair counts, above 0; None where the data does not say.
        known_ids: (·, 16) uint8, content hash of every response of the data, usable or not.
        skipped: What was set aside.
    """

    prompts: list[Text]
    prompt_rows: npt.NDArray[np.int64]
    prompt_ids: npt.NDArray[np.uint8]
    template_kwargs: list[dict[str, Any]]
    responses: list[Text]
    response_ids: npt.NDArray[np.uint8]
    prompt_of_response: npt.NDArray[np.int64]
    response_places: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    prompt_of_pair: npt.NDArray[np.int64]
    pair_rows: npt.NDArray[np.int64]
    pair_scores: npt.NDArray[np.float64]
    token_weights: list[npt.NDArray[np.float32]]
    pair_weights: npt.NDArray[np.int64]
    pair_ref_logps: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64] | None
    known_ids: npt.NDArray[np.uint8]
    skipped: Skipped

    @property
    def score_gaps(self) -> npt.NDArray[np.float64]:
        """(P,) float64, how much higher the preferred response scored; NaN where the data gives no scores."""
        return self.pair_scores[:, 0] - self.pair_scores[:, 1]

    @property
    def conversational(self) -> bool:
        """Whether prompts and responses are chat messages."""
        return isinstance(self.prompts[0], list)

    def place(self, side: int) -> str:
        """Says where in the data the response stands that is entry ``side`` of ``pairs``, read row by row."""
        row, position = self.response_places[self.pairs.flat[side]]
        if position < 0:
            return f"Row {self.pair_rows[side // 2]}, {('chosen', 'rejected')[side % 2]}"
        return f"Row {row}, response {position}"

    def keep_prompts(
        self, kept: npt.NDArray[np.bool_]
    ) -> tuple[Candidates, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Restricts the candidates to some prompts ((n,) bool) with all their pairs; else as :meth:`keep_pairs`."""
        return self.keep_pairs(kept[self.prompt_of_pair])

    def keep_pairs(
        self, kept_pairs: npt.NDArray[np.bool_]
    ) -> tuple[Candidates, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Restricts the candidates to some pairs, and to their prompts with all of their responses.

        Args:
            kept_pairs: (P,) bool.

        Returns:
            The restricted candidates, and the index in ``self`` of each of its pairs and of each of its responses
            (int64).
        """
        pair_index = np.flatnonzero(kept_pairs)
        kept = np.zeros(len(self.prompts), dtype=bool)
        kept[self.prompt_of_pair[pair_index]] = True
        new_prompt = np.cumsum(kept) - 1
        used = kept[self.prompt_of_response]
        new_response = np.cumsum(used) - 1
        return (
            Candidates(
                prompts=[self.prompts[i] for i in np.flatnonzero(kept)],
                prompt_rows=self.prompt_rows[kept],
                prompt_ids=self.prompt_ids[kept],
                template_kwargs=[self.template_kwargs[i] for i in np.flatnonzero(kept)],
                responses=[self.responses[i] for i in np.flatnonzero(used)],
                response_ids=self.response_ids[used],
                prompt_of_response=new_prompt[self.prompt_of_response[used]],
                response_places=self.response_places[used],
                scores=self.scores[used],
                pairs=new_response[self.pairs[pair_index]],
                prompt_of_pair=new_prompt[self.prompt_of_pair[pair_index]],
                pair_rows=self.pair_rows[pair_index],
                pair_scores=self.pair_scores[pair_index],
                token_weights=self.token_weights,
                pair_weights=self.pair_weights[pair_index],
                pair_ref_logps=self.pair_ref_logps[pair_index],
                weights=None if self.weights is None else self.weights[pair_index],
                known_ids=self.known_ids,
                skipped=self.skipped,
            ),
            pair_index,
            np.flatnonzero(used),
        )


def read_candidates(
    dataset: Any,
    *,
    max_pairs_per_prompt: int | None = None,
    on_invalid: OnInvalid = "skip",
    token_weights: str | None = None,
    ref_logps: bool = False,
    weight_column: str | None = None,
) -> Candidates:
    """Reads preference data of any accepted format.

    Rows are grouped by the exact prompt: text or messages, with what the columns ``tools`` and ``chat_template_kwargs``
    give to the chat template, as in TRL. Rows with scored responses give every pair of unequal scores; preference rows
    give the pairs that they state.

    Args:
        dataset: A ``datasets.Dataset``, a list of rows, a ``DatasetDict`` with a ``train`` split, or what
            ``datasets.load_dataset`` takes: a directory, a .jsonl, .json, .parquet or .csv file, a hub id.
        max_pairs_per_prompt: Cap on the pairs of a prompt; the largest score gaps are kept, ties in data order.
        on_invalid: ``"skip"`` warns once with the counts and the places; ``"raise"`` makes that an error.
        token_weights: Name under which the data gives a weight for each token of a response: as lists in the columns
            ``<name>_chosen`` and ``<name>_rejected`` of preference rows; of scored responses as a column with a list of
            lists, or, where responses are records, as an item of each record.
        ref_logps: Whether to read log π_ref of the responses: the columns ``ref_chosen_logps`` and
            ``ref_rejected_logps`` of preference rows, as TRL calls them; a list ``ref_logps`` of scored responses.
        weight_column: Column of numbers of at least 0, by how much the loss of a pair counts (see
            :class:`bpo.WeightedDPOTrainer`); None reads none. A row of scored responses has one number for all pairs
            whose preferred response it holds. Pairs of weight 0 are set aside. ``"weight"`` need not be there.

    Returns:
        The candidates.

    Raises:
        ValueError: Missing or misnamed columns, an empty dataset, a value of the wrong type, or no usable pair.
        FileNotFoundError: A path that does not exist.

    Example:
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "5", "four"], "scores": [1.0, 0.0, 0.5]}]
        >>> candidates = read_candidates(rows)
        >>> candidates.pairs.tolist(), candidates.score_gaps.tolist()
        ([[0, 1], [0, 2], [2, 1]], [1.0, 0.5, 0.5])
    """
    rows = load_rows(dataset)
    columns = list(rows.column_names)
    reader: _PreferenceReader | _ScoredReader
    if {"chosen", "rejected"} <= set(columns):
        reader = _PreferenceReader(columns, token_weights, ref_logps)
    elif "responses" in columns and "prompt" in columns:
        reader = _ScoredReader(columns, token_weights, ref_logps, prompt="prompt", responses="responses")
    elif "completions" in columns and ("instruction" in columns or "prompt" in columns):
        prompt = "prompt" if "prompt" in columns else "instruction"
        reader = _ScoredReader(columns, token_weights, ref_logps, prompt=prompt, responses="completions")
    else:
        raise ValueError(column_error(columns))
    for column in ("images", "image"):
        if column in columns:
            raise ValueError(
                f"The column '{column}' is not supported: bpo reads prompts and responses of text alone. Remove it "
                f"with dataset.remove_columns('{column}') if the responses do not depend on it."
            )
    if len(rows) == 0:
        raise ValueError("The dataset is empty: it has the right columns but no rows.")
    groups = _Groups(_row_weights(rows, weight_column))
    template_kwargs = read_template_kwargs(rows)
    for index, row in enumerate(rows):
        reader.read(index, row, template_kwargs[index] if template_kwargs else {}, groups)
    candidates = groups.build(max_pairs_per_prompt)
    report_skipped(candidates.skipped, on_invalid)
    return candidates


def read_configured(dataset: Any, config: SelectConfig) -> Candidates:
    """Reads what a configuration asks for, with the weights and reference log-probabilities of the data."""
    return read_candidates(
        dataset,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        on_invalid=config.on_invalid,
        token_weights=config.token_weights if isinstance(config.token_weights, str) else None,
        ref_logps=config.reads_ref_logps,
        weight_column=config.weight_column,
    )


def report_skipped(skipped: Skipped, on_invalid: OnInvalid) -> None:
    """Warns about what was set aside, or raises where the user asked for that."""
    if not skipped:
        return
    message = f"Some of the data cannot be used:\n{skipped.describe()}"
    if on_invalid == "raise":
        raise ValueError(message)
    warn(message, InvalidDataWarning)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the user's code that called into bpo."""
    here = str(Path(__file__).parent) + os.sep
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class _ListRows:
    """A list of rows as it is: Arrow would refuse to mix what the readers can tell apart, or name no row."""

    def __init__(self, rows: Sequence[Any]) -> None:
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"Row {index} is {shorten(row)}; each row must be a mapping of columns to values.")
            for column in row:
                if not isinstance(column, str):
                    raise ValueError(f"Row {index}: the column {column!r} has no text for a name.")
        self.column_names = list(dict.fromkeys(column for row in rows for column in row))
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        empty = dict.fromkeys(self.column_names)
        return ({**empty, **row} for row in self._rows)


def load_rows(dataset: Any) -> datasets.Dataset | _ListRows:
    """Turns whatever the user holds into rows with ``column_names``.

    Raises:
        FileNotFoundError: A path that does not exist, or a hub id that the hub does not give.
        ValueError: A dataset without a train split, a streaming dataset, an empty list, or a file that is damaged.
        TypeError: Anything else.
    """
    import datasets

    if isinstance(dataset, _ListRows):
        return dataset
    if isinstance(dataset, datasets.Dataset):
        # A format such as "torch" would turn lists of scores into tensors and hide columns.
        return dataset.with_format(None)
    if isinstance(dataset, datasets.DatasetDict):
        if "train" not in dataset:
            raise ValueError(f"The DatasetDict has no 'train' split, only {sorted(dataset)}; pass dataset['<split>'].")
        return dataset["train"].with_format(None)
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ValueError(
            "A streaming dataset cannot be selected from, since every pair is compared with every other. Load it "
            "without streaming=True."
        )
    if isinstance(dataset, (str, Path)):
        return _load_path(str(dataset))
    if isinstance(dataset, Mapping):
        return datasets.Dataset.from_dict(dict(dataset))
    if isinstance(dataset, Sequence):
        if not dataset:
            raise ValueError("The dataset is empty: a list of no rows.")
        return _ListRows(dataset)
    raise TypeError(f"dataset must be a datasets.Dataset, a list of rows or a path, not {type(dataset).__name__}.")


def _load_path(name: str) -> datasets.Dataset | _ListRows:
    import datasets

    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1 or path.suffix in _FILE_KINDS):
        raise FileNotFoundError(f"{name}: no such file or directory, and not the form of a hub id (owner/name).")
    try:
        if path.is_file():
            kinds = [_FILE_KINDS[suffix.lower()] for suffix in path.suffixes if suffix.lower() in _FILE_KINDS]
            if not kinds:
                raise ValueError(f"use a file of one of the types {', '.join(_FILE_KINDS)}")
            if path.stat().st_size == 0:
                raise ValueError("the file is empty")
            return datasets.load_dataset(kinds[-1], data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
        else:
            saved = datasets.load_dataset(str(path) if path.exists() else name, split="train")
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{name}: no such file or directory, and the hub does not give it: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # datasets wraps the reason, and not all of its exceptions name the file.
        raise ValueError(f"{name}: cannot be read: {error.__cause__ or error}") from error
    return load_rows(saved)


def column_error(columns: list[str]) -> str:
    """Says which formats are accepted, and which column may be misnamed."""
    hints = []
    for column in columns:
        close = difflib.get_close_matches(column, _KNOWN_COLUMNS, n=1, cutoff=0.75)
        if close and close[0] != column and close[0] not in columns:
            hints.append(f"'{column}' looks like '{close[0]}': dataset.rename_column('{column}', '{close[0]}')")
    hint = f" Perhaps {'; '.join(hints)}." if hints else ""
    return f"The columns {columns} are none of the accepted formats: {ACCEPTED_FORMATS}.{hint}"


def is_messages(value: Any) -> bool:
    """Whether something is a conversation: a list of messages with role and content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and "role" in message and "content" in message for message in value)
    )


def read_template_kwargs(rows: datasets.Dataset | _ListRows) -> list[dict[str, Any]]:
    """Returns what each row gives to the chat template beside the messages; an empty list where none gives anything.

    TRL passes ``tools``, which may be JSON, and every item of ``chat_template_kwargs``.

    Raises:
        ValueError: Values that TRL or Arrow cannot take.
    """
    if not {"tools", "chat_template_kwargs"} & set(rows.column_names):
        return []
    tools = [_tools(value, index) for index, value in enumerate(_column(rows, "tools"))]
    given = [_kwargs(value, index) for index, value in enumerate(_column(rows, "chat_template_kwargs"))]
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


def _column(rows: datasets.Dataset | _ListRows, name: str) -> list[Any]:
    if name not in rows.column_names:
        return [None] * len(rows)
    return [row[name] for row in rows] if isinstance(rows, _ListRows) else list(rows[name])


def _row_weights(rows: datasets.Dataset | _ListRows, column: str | None) -> npt.NDArray[np.float64] | None:
    """Returns the weight of each row, None where there is no such column."""
    if column is None or (column == WEIGHT_COLUMN and column not in rows.column_names):
        return None
    _require(list(rows.column_names), (column,), f"weight_column={column!r}")
    return np.array([pair_weight(value, f"Row {index}", column) for index, value in enumerate(_column(rows, column))])


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


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Splits two responses that carry their prompt into prompt, chosen and rejected: the common prefix is the prompt.

    As in TRL, a space before the point where texts part stays with the responses, and so does the last character (the
    last message) of one that is the beginning of the other.
    """
    shared = next(
        (index for index, (left, right) in enumerate(zip(chosen, rejected, strict=False)) if left != right), None
    )
    if shared is None:
        shared = max(min(len(chosen), len(rejected)) - 1, 0)
    elif shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


class _Groups:
    """Collects responses and pairs by exact prompt."""

    def __init__(self, row_weights: npt.NDArray[np.float64] | None = None) -> None:
        self.row_weights = row_weights
        self.prompts: dict[bytes, _Group] = {}
        self.skipped = Skipped()
        self.conversational: bool | None = None
        self.weights: dict[bytes, int] = {}

    def group(self, index: int, prompt: Text, template_kwargs: dict[str, Any]) -> _Group:
        """Returns the group of a prompt, whose identity the settings of its chat template are part of."""
        conversational = isinstance(prompt, list)
        if self.conversational is None:
            self.conversational = conversational
        elif self.conversational != conversational:
            kinds = ("chat messages", "plain text")
            raise ValueError(
                f"Row {index}: the prompt is {kinds[not conversational]}, but earlier rows hold {kinds[conversational]}"
                ". Bring all rows into one form."
            )
        # As JSON in the order given, in which a template renders it.
        settings = [json.dumps(template_kwargs)] if conversational and template_kwargs else []
        key = content_id(prompt, *settings)
        if key not in self.prompts:
            self.prompts[key] = _Group(prompt, settings, index, key)
        return self.prompts[key]

    def weights_index(self, value: Any, place: str) -> int:
        """Returns the index of an array of token weights among the distinct ones."""
        return self.weights.setdefault(as_weights(value, place).tobytes(), len(self.weights))

    def weigh_alike(self, row: int, other: int) -> bool:
        """Whether two rows have the same weight."""
        return self.row_weights is None or bool(self.row_weights[row] == self.row_weights[other])

    def _weighing(self, pairs: list[_Pair]) -> list[_Pair]:
        """Sets pairs of weight 0 aside, which would teach nothing."""
        if self.row_weights is None:
            return pairs
        for pair in pairs:
            if self.row_weights[pair.row] == 0:
                self.skipped.add("pair of weight 0", f"row {pair.row}")
        return [pair for pair in pairs if self.row_weights[pair.row] > 0]

    def build(self, max_pairs_per_prompt: int | None) -> Candidates:
        groups: list[_Group] = []
        kept_pairs: list[list[_Pair]] = []
        for group in self.prompts.values():
            pairs = self._weighing(group.candidate_pairs(self.skipped))
            if max_pairs_per_prompt is not None and len(pairs) > max_pairs_per_prompt:
                # NaN gaps (no scores) keep the order of the data: the sort is stable.
                order = sorted(range(len(pairs)), key=lambda index: -gap if (gap := pairs[index].gap) == gap else 0.0)
                pairs = [pairs[index] for index in sorted(order[:max_pairs_per_prompt])]
            if pairs:
                groups.append(group)
                kept_pairs.append(pairs)
        if not groups:
            raise ValueError(
                "No prompt has two responses of which one is preferred, so there is nothing to select.\n"
                + self.skipped.describe()
            )
        offsets = np.cumsum([0] + [len(group.responses) for group in groups])
        flat = [pair for pairs in kept_pairs for pair in pairs]
        prompt_of_pair = np.repeat(np.arange(len(groups)), [len(pairs) for pairs in kept_pairs]).astype(np.int64)
        pairs_in_prompt = np.array([(pair.chosen, pair.rejected) for pair in flat], dtype=np.int64)
        pair_rows = np.array([pair.row for pair in flat], dtype=np.int64)
        known = [key for group in self.prompts.values() for key in (*group.keys, *group.set_aside)]
        return Candidates(
            prompts=[group.prompt for group in groups],
            prompt_rows=np.array([group.row for group in groups], dtype=np.int64),
            prompt_ids=_id_array([group.key for group in groups]),
            template_kwargs=[json.loads(group.settings[0]) if group.settings else {} for group in groups],
            responses=[response for group in groups for response in group.responses],
            response_ids=_id_array([key for group in groups for key in group.keys]),
            prompt_of_response=np.repeat(np.arange(len(groups)), np.diff(offsets)).astype(np.int64),
            response_places=np.array([place for group in groups for place in group.places], dtype=np.int64),
            scores=np.array([score for group in groups for score in group.scores], dtype=np.float64),
            pairs=pairs_in_prompt + offsets[prompt_of_pair, None],
            prompt_of_pair=prompt_of_pair,
            pair_rows=pair_rows,
            pair_scores=np.array([(pair.score_chosen, pair.score_rejected) for pair in flat], dtype=np.float64),
            token_weights=[np.frombuffer(data, dtype=np.float32) for data in self.weights],
            pair_weights=np.array([pair.weights for pair in flat], dtype=np.int64),
            pair_ref_logps=np.array([pair.ref_logps for pair in flat], dtype=np.float64),
            weights=None if self.row_weights is None else self.row_weights[pair_rows],
            known_ids=_id_array(known),
            skipped=self.skipped,
        )


def _id_array(ids: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """Positions of two responses among those of the prompt, their scores (NaN if unknown), and the row of the data.

    ``weights`` and ``ref_logps`` are −1 and NaN where none are read.
    """

    chosen: int
    rejected: int
    score_chosen: float
    score_rejected: float
    row: int
    weights: tuple[int, int]
    ref_logps: tuple[float, float]

    def same_columns(self, other: _Pair) -> bool:
        """Whether token weights and reference log-probabilities are the same."""
        return self.weights == other.weights and np.array_equal(self.ref_logps, other.ref_logps, equal_nan=True)

    @property
    def gap(self) -> float:
        return self.score_chosen - self.score_rejected


class _Group:
    """One prompt: its distinct responses and, where the data states them, its pairs."""

    def __init__(self, prompt: Text, settings: list[str], row: int, key: bytes) -> None:
        self.prompt = prompt
        self.settings = settings
        self.row = row
        self.key = key
        self.responses: list[Text] = []
        self.keys: list[bytes] = []
        self.scores: list[float] = []
        self.places: list[tuple[int, int]] = []
        self.weights: list[int] = []
        self.ref_logps: list[float] = []
        self.stated: dict[tuple[int, int], _Pair] = {}
        self.scored = False
        self.set_aside: list[bytes] = []
        self._index: dict[bytes, int] = {}

    def add(
        self,
        response: Text,
        score: float,
        row: int,
        position: int = -1,
        weights: int = -1,
        ref_logp: float = math.nan,
    ) -> tuple[int, bool]:
        """Returns the index of the response in the group and whether it is new."""
        key = self.response_id(response)
        if key in self._index:
            return self._index[key], False
        self._index[key] = len(self.responses)
        self.responses.append(response)
        self.keys.append(key)
        self.scores.append(score)
        self.places.append((row, position))
        self.weights.append(weights)
        self.ref_logps.append(ref_logp)
        return self._index[key], True

    def response_id(self, response: Text) -> bytes:
        return content_id(self.prompt, *self.settings, response)

    def candidate_pairs(self, skipped: Skipped) -> list[_Pair]:
        if not self.scored:
            return list(self.stated.values())
        place = f"row {self.row}"
        if len(self.responses) < 2:
            skipped.add("prompt with fewer than two usable responses", place)
            return []
        pairs = [
            _Pair(
                chosen,
                rejected,
                self.scores[chosen],
                self.scores[rejected],
                self.places[chosen][0],
                (self.weights[chosen], self.weights[rejected]),
                (self.ref_logps[chosen], self.ref_logps[rejected]),
            )
            for chosen in range(len(self.responses))
            for rejected in range(len(self.responses))
            if self.scores[chosen] > self.scores[rejected]
        ]
        if not pairs:
            skipped.add("prompt whose responses all have equal scores", place)
        return pairs


def _require(columns: list[str], wanted: Sequence[str], setting: str) -> None:
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(
            f"SelectConfig.{setting} needs the columns {', '.join(missing)}, but the columns are {columns}."
        )


def preference_texts(row: Mapping[str, Any], index: int, *, has_prompt: bool) -> tuple[Text, Text, Text] | str:
    """Returns prompt, chosen and rejected of a preference row; the reason where the row cannot be used.

    Raises:
        ValueError: Values of the wrong type.
    """
    if row["chosen"] in (None, []) or row["rejected"] in (None, []):
        return "chosen or rejected is missing"
    prompt = row["prompt"] if has_prompt else None
    wrap = "assistant" if is_messages(prompt) else None
    chosen = as_text(row["chosen"], index, "chosen", wrap)
    rejected = as_text(row["rejected"], index, "rejected", wrap)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"Row {index}: chosen and rejected must both be text or both be messages.")
    if isinstance(prompt, str) and isinstance(chosen, list):
        # Some sets repeat the prompt as text beside conversations that contain it; else it is the user's turn.
        contained = bool(extract_prompt(chosen, rejected)[0])
        prompt = None if contained else [{"role": "user", "content": prompt}]
    if prompt is None:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
        if chosen == rejected:
            return "chosen equals rejected"
        if not prompt:
            return "chosen and rejected share no prompt"
    prompt = as_text(prompt, index, "prompt")
    if isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen or not rejected:
        return "empty response"
    if chosen == rejected:
        return "chosen equals rejected"
    return prompt, chosen, rejected


class _PreferenceReader:
    """Rows that state a chosen and a rejected response."""

    def __init__(self, columns: list[str], token_weights: str | None, ref_logps: bool) -> None:
        self.has_prompt = "prompt" in columns
        self.token_weights = token_weights
        self.ref_logps = ref_logps
        if token_weights is not None:
            _require(columns, (f"{token_weights}_chosen", f"{token_weights}_rejected"), f"{token_weights=}")
        if ref_logps:
            _require(columns, _REF_COLUMNS, 'ref_model="columns"')
        scores = [column for column in ("score_chosen", "score_rejected") if column in columns]
        if len(scores) == 1:
            raise ValueError(f"The dataset has the column '{scores[0]}' but not its counterpart; give both or none.")
        self.has_scores = bool(scores)

    def read(self, index: int, row: Mapping[str, Any], template_kwargs: dict[str, Any], groups: _Groups) -> None:
        skipped, place = groups.skipped, f"row {index}"
        texts = preference_texts(row, index, has_prompt=self.has_prompt)
        if isinstance(texts, str):
            skipped.add(texts, place)
            return
        prompt, chosen, rejected = texts
        group = groups.group(index, prompt, template_kwargs)
        score_chosen = score_rejected = math.nan
        if self.has_scores:
            score_chosen = as_number(row["score_chosen"], index, "score_chosen")
            score_rejected = as_number(row["score_rejected"], index, "score_rejected")
            reason = None
            if not (is_score(score_chosen) and is_score(score_rejected)):
                reason = "score missing, NaN or infinite"
            elif score_chosen == score_rejected:
                reason = "chosen and rejected have equal scores"
            elif score_chosen < score_rejected:
                reason = "chosen has a lower score than rejected"
            if reason is not None:
                skipped.add(reason, place)
                group.set_aside += [group.response_id(chosen), group.response_id(rejected)]
                return
        ref_logps = (math.nan, math.nan)
        if self.ref_logps:
            ref_chosen, ref_rejected = (as_number(row[column], index, column) for column in _REF_COLUMNS)
            if not (math.isfinite(ref_chosen) and math.isfinite(ref_rejected)):
                skipped.add("reference log-probability missing, NaN or infinite", place)
                group.set_aside += [group.response_id(chosen), group.response_id(rejected)]
                return
            ref_logps = (ref_chosen, ref_rejected)
        weights = (-1, -1)
        if self.token_weights is not None:
            weights = (
                groups.weights_index(row[f"{self.token_weights}_chosen"], f"Row {index}, chosen"),
                groups.weights_index(row[f"{self.token_weights}_rejected"], f"Row {index}, rejected"),
            )
        first = group.add(chosen, score_chosen, index)[0]
        second = group.add(rejected, score_rejected, index)[0]
        pair = _Pair(first, second, score_chosen, score_rejected, index, weights, ref_logps)
        if (first, second) in group.stated:
            earlier = group.stated[first, second]
            reason = "duplicate of an earlier pair" + _OTHER_COLUMNS * (not pair.same_columns(earlier))
            skipped.add(reason + _OTHER_WEIGHT * (not groups.weigh_alike(index, earlier.row)), place)
        elif (second, first) in group.stated:
            skipped.add("contradicts an earlier pair", f"{place}, against row {group.stated[second, first].row}")
        else:
            group.stated[first, second] = pair


class _ScoredReader:
    """Rows that hold one prompt and several scored responses."""

    def __init__(
        self, columns: list[str], token_weights: str | None, ref_logps: bool, *, prompt: str, responses: str
    ) -> None:
        self.prompt = prompt
        self.responses = responses
        self.has_scores = "scores" in columns
        self.token_weights = token_weights
        self.ref_logps = ref_logps
        if token_weights is not None and self.has_scores:
            _require(columns, [token_weights], f"{token_weights=}")
        if ref_logps:
            _require(columns, ["ref_logps"], 'ref_model="columns"')

    def read(self, index: int, row: Mapping[str, Any], template_kwargs: dict[str, Any], groups: _Groups) -> None:
        skipped = groups.skipped
        items = row[self.responses]
        if items is None or (self.has_scores and row["scores"] is None):
            skipped.add("responses or scores are missing", f"row {index}")
            return
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"Row {index}, column '{self.responses}': expected a list, got {shorten(items)}.")
        if row[self.prompt] is None:
            skipped.add("prompt is missing", f"row {index}")
            return
        prompt = as_text(row[self.prompt], index, self.prompt)
        texts, scores = self._texts_and_scores(index, row, items)
        weights = self._weights(index, row, items)
        ref_logps = self._ref_logps(index, row, items)
        group = groups.group(index, prompt, template_kwargs)
        group.scored = True
        role = "assistant" if isinstance(prompt, list) else None
        for position, (text, score) in enumerate(zip(texts, scores, strict=True)):
            place = f"row {index}, response {position}"
            if text is None or text in ("", []):
                skipped.add("empty response", place)
                continue
            response = as_text(text, index, self.responses, role)
            if isinstance(response, list) and role is None:
                raise ValueError(
                    f"Row {index}: the prompt is plain text but response {position} holds chat messages. "
                    "Give the prompt as messages, too."
                )
            if not is_score(score):
                skipped.add("score missing, NaN or infinite", place)
                group.set_aside.append(group.response_id(response))
                continue
            if self.ref_logps and not math.isfinite(ref_logps[position]):
                skipped.add("reference log-probability missing, NaN or infinite", place)
                group.set_aside.append(group.response_id(response))
                continue
            weight, ref_logp = -1, ref_logps[position]
            if self.token_weights is not None:
                weight = groups.weights_index(weights[position], place.capitalize())
            earlier, new = group.add(response, score, index, position, weight, ref_logp)
            if not new and group.scores[earlier] != score:
                skipped.add("duplicate response with another score than before", place)
            elif not new:
                differs = group.weights[earlier] != weight or (self.ref_logps and group.ref_logps[earlier] != ref_logp)
                skipped.add("duplicate response of the same prompt" + _OTHER_COLUMNS * differs, place)

    def _texts_and_scores(
        self, index: int, row: Mapping[str, Any], items: Sequence[Any]
    ) -> tuple[list[Any], list[float]]:
        if self.has_scores:
            scores = one_each(row["scores"], items, index, "scores")
            return list(items), [as_number(score, index, "scores") for score in scores]
        texts, values = [], []
        for item in items:
            if not isinstance(item, dict):
                raise ValueError(
                    f"Row {index}, column '{self.responses}': without a 'scores' column each response must be a "
                    f"{{text, score}} record, got {shorten(item)}."
                )
            text_key = next((key for key in ("text", "response", "content") if key in item), None)
            score_key = next((key for key in ("score", "overall_score") if key in item), None)
            if text_key is None or score_key is None:
                raise ValueError(
                    f"Row {index}, column '{self.responses}': a response needs 'text' (or 'response') and 'score' "
                    f"(or 'overall_score'), got the keys {sorted(item)}."
                )
            texts.append(item[text_key])
            values.append(as_number(item[score_key], index, f"{self.responses}.{score_key}"))
        return texts, values

    def _weights(self, index: int, row: Mapping[str, Any], items: Sequence[Any]) -> list[Any]:
        if self.token_weights is None:
            return []
        if not self.has_scores:
            return [item.get(self.token_weights) for item in items]
        return one_each(row[self.token_weights], items, index, self.token_weights)

    def _ref_logps(self, index: int, row: Mapping[str, Any], items: Sequence[Any]) -> list[float]:
        if not self.ref_logps:
            return [math.nan] * len(items)
        return [as_number(value, index, "ref_logps") for value in one_each(row["ref_logps"], items, index, "ref_logps")]


def one_each(values: Any, items: Sequence[Any], index: int, column: str) -> list[Any]:
    """Checks that a column holds a list of one value a response."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(
            f"Row {index}, column '{column}': expected a list of one value a response, got {shorten(values)}."
        )
    if len(values) != len(items):
        raise ValueError(f"Row {index}: {len(items)} responses but {len(values)} {column}.")
    return list(values)
