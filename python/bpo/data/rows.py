"""Whatever the user holds, a file, a hub id, a list or a data set, to rows with columns."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from bpo.data.files import read_path
from bpo.data.values import as_list, packed_rows, shorten
from bpo.system.packed import Packed, as_table
from bpo.system.warn import warn

if TYPE_CHECKING:
    import datasets

READ_COLUMNS = (
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
"""Columns that the accepted formats are told by."""

# Rows that are taken out of Arrow at once: one by one costs ten times as much.
_BATCH = 1000
# Rows of which columns in Arrow are made at once.
_PIECE = 1 << 14
_NO_ARROW = (pa.ArrowException, OverflowError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where rows come from, as far as they tell.

    Attributes:
        name: Path, id of the hub, or what they are.
        split: Which split of it; None where it has none.
        license: Of the data; None where it does not say.
        readable: Whether ``name`` is a path or an id, by which they can be read again.
    """

    name: str
    split: str | None = None
    license: str | None = None
    readable: bool = False


class Rows(Protocol):
    """Rows with named columns."""

    @property
    def column_names(self) -> list[str]:
        """The names, in the order of the data."""

    @property
    def broken(self) -> Mapping[int, str]:
        """Index → why a row is none; it has None in every column."""

    origin: Origin

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def column(self, name: str) -> Iterable[Any]:
        """Returns the values of a column, None for each row where there is no such column."""

    def take(self, index: Sequence[int], name: str) -> Iterable[Any]:
        """Returns the values of a column in some rows, ascending."""

    def table(self, names: Sequence[str]) -> datasets.Dataset:
        """Returns some columns of all rows in Arrow, but for those that hold nothing."""


class ListRows:
    """A list of rows as it is: Arrow would refuse to mix what the readers can tell apart, or name no row.

    What can be gone through once only is packed, and on disk where it is long.
    """

    def __init__(
        self, rows: Iterable[Any], broken: Mapping[int, str] | None = None, origin: Origin | None = None
    ) -> None:
        rows = rows if isinstance(rows, Sequence) else packed_rows(rows)
        self.origin = origin or Origin("a list of rows")
        self.broken = dict(broken or {})
        names: dict[str, None] = {}
        for index, row in enumerate(rows):
            if not isinstance(row, Mapping):
                self.broken.setdefault(index, f"{shorten(row)} is no mapping of columns to values")
            elif strange := next((column for column in row if not isinstance(column, str)), None):
                self.broken.setdefault(index, f"the column {strange!r} has no text for a name")
            else:
                names |= dict.fromkeys(row)
        if len(self.broken) == len(rows):
            raise ValueError(f"Row 0: {self.broken[0]}; each row must be a mapping of columns to values.")
        self.column_names = list(names)
        self._rows = rows
        self._names: Mapping[str, str] = {}  # where columns have other names than in the rows: theirs by ours

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        empty = dict.fromkeys(self.column_names)
        if self._names:
            theirs = [(name, self._names[name]) for name in self.column_names]
            return (
                empty if index in self.broken else {name: row.get(their) for name, their in theirs}
                for index, row in enumerate(self._rows)
            )
        return (empty if index in self.broken else {**empty, **row} for index, row in enumerate(self._rows))

    def column(self, name: str) -> Iterable[Any]:
        """Returns the values of a column, None for each row without it."""
        their = self._names.get(name, None if self._names else name)
        return (None if index in self.broken else row.get(their) for index, row in enumerate(self._rows))

    def take(self, index: Sequence[int], name: str) -> Iterable[Any]:
        """Returns the values of a column in some rows."""
        their = self._names.get(name, None if self._names else name)
        return (self._rows[row].get(their) for row in index)

    def renamed(self, names: Mapping[str, str]) -> ListRows:
        """Returns the columns that are keys here, under other names."""
        renamed = copy.copy(self)
        renamed.column_names = [names[name] for name in self.column_names if name in names]
        renamed._names = {ours: self._names.get(name, name) for name, ours in names.items()}
        return renamed

    def table(self, names: Sequence[str]) -> datasets.Dataset:
        """Returns some columns in Arrow, without those that hold nothing; warns of one that Arrow has no form for."""
        import datasets

        # Piece by piece, with types that are known once all are there.
        pieces = Packed(_pack_batch, _unpack_batch)
        schema: dict[str, pa.DataType] = {}
        odd: list[str] = []  # columns of which not all pieces are of one type
        names = list(names)
        rows = iter(self) if names else iter(())
        while piece := list(itertools.islice(rows, _PIECE)):
            columns = {}
            for name in names:
                try:
                    columns[name] = column = pa.array([row[name] for row in piece])
                except _NO_ARROW:
                    odd.append(name)
                    continue
                if schema.setdefault(name, column.type) != column.type and not pa.types.is_null(column.type):
                    if pa.types.is_null(schema[name]):
                        schema[name] = column.type
                    else:
                        odd.append(name)
            names = [name for name in names if name not in odd]
            pieces.append(pa.record_batch({name: columns[name] for name in names}))
        return datasets.Dataset(self._joined(pieces, schema, names, odd))

    def _joined(
        self,
        pieces: Iterable[pa.RecordBatch],
        schema: Mapping[str, pa.DataType],
        names: Sequence[str],
        odd: Sequence[str],
    ) -> pa.Table:
        """Columns from pieces, and those from all rows at once of which Arrow may find a type then, but for null."""
        fields = pa.schema([(name, schema[name]) for name in names if not pa.types.is_null(schema[name])])
        cast = (
            pa.record_batch([_of_type(piece[name], fields.field(name).type) for name in fields.names], schema=fields)
            for piece in pieces
        )
        table = as_table(fields, cast)
        for name in odd:
            try:
                column = pa.array(self.column(name))
            except _NO_ARROW as error:
                warn(f"The column {name!r} does not go along into what is selected, for Arrow cannot hold it: {error}")
                continue
            table = table.append_column(name, column)
        return table


def _of_type(column: pa.Array, wanted: pa.DataType) -> pa.Array:
    """A column that is of a type, or of null; pyarrow damages lists of nulls that it casts to what they are."""
    return column if column.type == wanted else column.cast(wanted)


def _pack_batch(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _unpack_batch(data: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(data).read_next_batch()


class TableRows:
    """A data set in Arrow, read many rows at a time."""

    def __init__(self, table: datasets.Dataset, origin: Origin) -> None:
        self.origin = origin
        self.column_names = list(table.column_names)
        self.broken: Mapping[int, str] = {}
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._table.iter(_BATCH):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def column(self, name: str) -> Iterable[Any]:
        """Returns the values of a column, None for each row where there is no such column."""
        if name not in self.column_names:
            return (None for _ in range(len(self)))
        return (value for batch in self._table.select_columns(name).iter(_BATCH) for value in batch[name])

    def take(self, index: Sequence[int], name: str) -> Iterable[Any]:
        """Returns the values of a column in some rows."""
        return (row[name] for row in self._table.select_columns(name).select(index))

    def table(self, names: Sequence[str]) -> datasets.Dataset:
        """Returns some columns as they are, without those that hold nothing."""
        features = self._table.features
        return self._table.select_columns([name for name in names if getattr(features[name], "dtype", None) != "null"])

    def renamed(self, names: Mapping[str, str]) -> TableRows:
        """Returns the columns that are keys here, under other names."""
        return TableRows(self._table.select_columns(list(names)).rename_columns(dict(names)), self.origin)


def load_rows(
    dataset: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Turns whatever the user holds into rows with ``column_names``; what can be read once only is read here.

    Args:
        dataset: What the user holds.
        split: Which split of it, where it has several; None is that for training.
        name: Which configuration, of a data set of the hub.
        columns: What some columns are to be called → what they are called in the data.

    Raises:
        FileNotFoundError: A path that does not exist, or a hub id that the hub does not give.
        ValueError: A dataset without that split, configuration or column, no rows, or a file that is damaged.
        TypeError: Anything else.
    """
    import datasets

    if columns:
        return _renamed(load_rows(dataset, split=split, name=name), columns)
    if isinstance(dataset, (str, Path)):
        found = read_path(str(dataset), split, name)
        origin = dataclasses.replace(_origin(found), name=str(dataset), split=split, readable=True)
        return ListRows(found[0], found[1], origin) if isinstance(found, tuple) else _as_shown(found, origin)
    if _has_splits(dataset):
        rows = load_rows(_one_of(dataset, split))
        rows.origin = dataclasses.replace(rows.origin, split=split or "train")
        return rows
    if split is not None or name is not None:
        raise ValueError(f"Only a path, an id of the hub or a DatasetDict has parts such as {split or name!r}.")
    if isinstance(dataset, (ListRows, TableRows)):
        return dataset
    if isinstance(dataset, datasets.Dataset):
        return _as_shown(dataset, _origin(dataset))
    if isinstance(dataset, datasets.IterableDataset):
        return _listed(dataset.with_format(None), _origin(dataset))
    frame = _frame(dataset)
    if frame is not None:
        return frame
    if isinstance(dataset, Mapping):
        return _of_columns(dataset)
    if isinstance(dataset, Iterable) and not isinstance(dataset, (bytes, bytearray)):
        kind = "a list of rows" if isinstance(dataset, Sequence) else f"what a {type(dataset).__name__} gave"
        return _listed(dataset, Origin(kind))
    raise TypeError(
        "dataset must be a datasets.Dataset, a pandas or Polars frame, an Arrow table, rows as a list or any other "
        f"iterable, or a path, not {type(dataset).__name__}."
    )


def load_alike(dataset: Any, columns: Mapping[str, str] | None) -> Rows:
    """As :func:`load_rows`, of data that goes with other data: of its column mapping, what there is to map."""
    rows = load_rows(dataset)
    there = rows.column_names
    return _renamed(rows, {name: theirs for name, theirs in (columns or {}).items() if theirs in there})


def _origin(dataset: Any) -> Origin:
    """Where a data set says that it comes from."""
    import datasets

    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return Origin("a list of rows")
    info = dataset.info
    sources = (re.match(r"hf://datasets/([^@]+)@", source) for source in info.download_checksums or {})
    found = next((source[1] for source in sources if source), None)
    split = None if dataset.split is None else str(dataset.split)
    name = found or info.dataset_name or f"a datasets.{type(dataset).__name__}"
    return Origin(name, split, info.license or None, readable=found is not None)


def _has_splits(dataset: Any) -> bool:
    """Whether something is a mapping of splits to data sets."""
    import datasets

    return isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)) or (
        isinstance(dataset, Mapping)
        and len(dataset) > 0
        and all(isinstance(part, (datasets.Dataset, datasets.IterableDataset)) for part in dataset.values())
    )


def _one_of(splits: Mapping[str, Any], split: str | None) -> Any:
    """The split that was asked for, or that for training."""
    wanted = split or "train"
    if wanted not in splits:
        close = difflib.get_close_matches(wanted, map(str, splits), n=1)
        meant = close[0] if close else next(iter(splits), "NAME")
        raise ValueError(
            f"The data has no split {wanted!r}, only {', '.join(map(repr, splits))}; name one, as in split={meant!r}."
        )
    return splits[wanted]


def _listed(rows: Iterable[Any], origin: Origin) -> ListRows:
    """All rows of something that is gone through once."""
    listed = rows if isinstance(rows, Sequence) else packed_rows(rows)
    if not len(listed):
        raise ValueError("The dataset is empty: it gave no rows.")
    return ListRows(listed, origin=origin)


def _frame(dataset: Any) -> Rows | None:
    """The rows of a frame of pandas or Polars, or of anything else that gives itself as an Arrow table."""
    kinds = {kind.__module__.partition(".")[0] for kind in type(dataset).__mro__}
    if "pandas" in kinds and hasattr(dataset, "columns"):
        return _of_pandas(dataset)
    if "polars" in kinds and hasattr(dataset, "collect_schema"):
        import polars

        frame = dataset.collect() if hasattr(dataset, "collect") else dataset
        return _of_arrow(frame.to_arrow(compat_level=polars.CompatLevel.oldest()), Origin("a Polars frame"))
    if hasattr(dataset, "__arrow_c_stream__") or isinstance(dataset, pa.RecordBatch):
        try:
            table = dataset if isinstance(dataset, pa.Table) else _table_of(dataset)
        except pa.ArrowInvalid as error:
            raise TypeError(
                f"dataset must have rows and columns, which this {type(dataset).__name__} has not: {error}"
            ) from None
        return _of_arrow(table, Origin("an Arrow table"))
    return None


def _table_of(dataset: Any) -> pa.Table:
    """What gives itself as batches of Arrow, which may be more than memory holds."""
    if isinstance(dataset, pa.RecordBatch):
        return pa.Table.from_batches([dataset])
    reader = pa.RecordBatchReader.from_stream(dataset)
    return as_table(reader.schema, reader)


def _of_pandas(frame: Any) -> ListRows:
    """Rows of the very objects in the cells: Arrow would fill what only some dictionaries have with None."""
    if all(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    names = _checked_names(frame.columns)
    if len(frame) == 0:
        raise ValueError("The dataset is empty: it has no rows.")
    cells = [frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in names]
    return _zipped(names, cells, Origin("a pandas DataFrame"))


def _of_arrow(table: pa.Table, origin: Origin) -> TableRows:
    """A table, whose dictionaries, which pandas and Polars call categories, data sets read as what they stand for."""
    import datasets

    _checked_names(table.column_names)
    for field in table.schema:
        _check_type(field)
    return TableRows(datasets.Dataset(table), origin)


def _check_type(field: pa.Field) -> None:
    """Checks that data sets have a form for a column."""
    import datasets

    try:
        datasets.Features.from_arrow_schema(pa.schema([field]))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"The column {field.name!r} is of the Arrow type {field.type}, which data sets have no form for: cast "
            f"it, or drop it ({error})."
        ) from None


def _checked_names(names: Iterable[Any]) -> list[str]:
    """Names of columns: text, each once."""
    listed = list(names)
    for index, name in enumerate(listed):
        if not isinstance(name, str):
            raise ValueError(f"The column {name!r} has no text for a name; rename it.")
        if name in listed[:index]:
            raise ValueError(f"Two columns are called {name!r}; rename one.")
    return listed


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The rows with some columns under the names that they are to have; one that had such a name gives way."""
    there = list(rows.column_names)
    if not isinstance(columns, Mapping) or not all(isinstance(word, str) for word in (*columns, *columns.values())):
        raise ValueError(f"columns must be a mapping such as {{'prompt': 'question'}}, got {columns!r}.")
    for wanted, theirs in columns.items():
        if theirs not in there:
            close = difflib.get_close_matches(theirs, there, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            if theirs in READ_COLUMNS and wanted in there:
                meant = f": the name that is wanted comes first, {{{theirs!r}: {wanted!r}}}."
            raise ValueError(f"The data has no column {theirs!r} for {wanted!r}, only {there}{meant}")
    names = {theirs: wanted for wanted, theirs in columns.items()}
    if len(names) < len(columns):
        raise ValueError(f"columns has one column of the data for several names: {dict(columns)}.")
    dropped = set(columns) - set(names)
    kept = {column: names.get(column, column) for column in there if column not in dropped}
    if isinstance(rows, TableRows):
        return rows.renamed(kept)
    assert isinstance(rows, ListRows)
    return rows.renamed(kept)


def _as_shown(dataset: datasets.Dataset, origin: Origin) -> Rows:
    """The rows as the data set shows them: through its transform, without the columns that its format hides."""
    shown = dataset.format
    if shown["type"] == "custom":
        return ListRows(packed_rows(dataset), origin=origin)
    # A format such as "torch" would turn lists of scores into tensors, and float64 into float32.
    plain = dataset.with_format(None)
    hidden = [] if shown["output_all_columns"] else sorted(set(plain.column_names) - set(shown["columns"]))
    needed = [name for name in hidden if name in READ_COLUMNS]
    if needed:
        raise ValueError(
            f"The format of the dataset hides the columns {needed}: show them with dataset.reset_format(), or take "
            f"them out with dataset.remove_columns({needed})."
        )
    return TableRows(plain.remove_columns(hidden) if hidden else plain, origin)


def _of_columns(columns: Mapping[str, Any]) -> ListRows:
    """The rows of a mapping of columns to lists of equal length."""
    listed = {name: as_list(values) for name, values in columns.items()}
    lengths = {name: None if values is None else len(values) for name, values in listed.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"A mapping must be one of columns to lists of equal length; the lengths are {lengths}.")
    cells = [values for values in listed.values() if values is not None]
    return _zipped(list(listed), cells, Origin("a mapping of columns"))


def _zipped(names: Sequence[str], cells: Iterable[Sequence[Any]], origin: Origin) -> ListRows:
    """The rows of columns of equal length."""
    return ListRows([dict(zip(names, values, strict=True)) for values in zip(*cells, strict=True)], origin=origin)
