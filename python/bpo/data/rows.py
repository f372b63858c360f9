"""Whatever the user holds, a file, a hub id, a list or a data set, to rows with columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bpo.data.files import read_path
from bpo.data.values import as_list, shorten

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


class Rows(Protocol):
    """Rows with named columns."""

    @property
    def column_names(self) -> list[str]:
        """The names, in the order of the data."""

    @property
    def broken(self) -> Mapping[int, str]:
        """Index → why a row is none; it has None in every column."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def column(self, name: str) -> Iterable[Any]:
        """Returns the values of a column, None for each row where there is no such column."""

    def take(self, index: Sequence[int], name: str) -> Iterable[Any]:
        """Returns the values of a column in some rows, ascending."""


class ListRows:
    """A list of rows as it is: Arrow would refuse to mix what the readers can tell apart, or name no row."""

    def __init__(self, rows: Sequence[Any], broken: Mapping[int, str] | None = None) -> None:
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

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        empty = dict.fromkeys(self.column_names)
        return (empty if index in self.broken else {**empty, **row} for index, row in enumerate(self._rows))

    def column(self, name: str) -> Iterable[Any]:
        """Returns the values of a column, None for each row without it."""
        return (None if index in self.broken else row.get(name) for index, row in enumerate(self._rows))

    def take(self, index: Sequence[int], name: str) -> Iterable[Any]:
        """Returns the values of a column in some rows."""
        return (self._rows[row].get(name) for row in index)

    def renamed(self, names: Mapping[str, str]) -> ListRows:
        """Returns the columns that are keys here, under other names."""
        rows = [
            row if index in self.broken else {names[name]: value for name, value in row.items() if name in names}
            for index, row in enumerate(self._rows)
        ]
        return ListRows(rows, self.broken)


class TableRows:
    """A data set in Arrow, read many rows at a time."""

    def __init__(self, table: datasets.Dataset) -> None:
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

    def renamed(self, names: Mapping[str, str]) -> TableRows:
        """Returns the columns that are keys here, under other names."""
        return TableRows(self._table.select_columns(list(names)).rename_columns(dict(names)))


def load_rows(
    dataset: Any,
    *,
    split: str | None = None,
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Rows:
    """Turns whatever the user holds into rows with ``column_names``.

    Args:
        dataset: What the user holds.
        split: Which split of it, where it has several; None is that for training.
        name: Which configuration, of a data set of the hub.
        columns: What some columns are to be called → what they are called in the data.

    Raises:
        FileNotFoundError: A path that does not exist, or a hub id that the hub does not give.
        ValueError: A dataset without that split, configuration or column, a streaming dataset, an empty list, or a file
            that is damaged.
        TypeError: Anything else.
    """
    import datasets

    if columns:
        return _renamed(load_rows(dataset, split=split, name=name), columns)
    if isinstance(dataset, (str, Path)):
        found = read_path(str(dataset), split, name)
        return load_rows(found) if not isinstance(found, tuple) else ListRows(*found)
    if isinstance(dataset, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in dataset:
            raise ValueError(
                f"The DatasetDict has no {wanted!r} split, only {sorted(dataset)}; pass dataset['<split>']."
            )
        return _as_shown(dataset[wanted])
    if split is not None or name is not None:
        raise ValueError(f"Only a path, an id of the hub or a DatasetDict has parts such as {split or name!r}.")
    if isinstance(dataset, (ListRows, TableRows)):
        return dataset
    if isinstance(dataset, datasets.Dataset):
        return _as_shown(dataset)
    if isinstance(dataset, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ValueError(
            "A streaming dataset cannot be selected from, since every pair is compared with every other. Load it "
            "without streaming=True."
        )
    if isinstance(dataset, Mapping):
        return _of_columns(dataset)
    if isinstance(dataset, Sequence):
        if not dataset:
            raise ValueError("The dataset is empty: a list of no rows.")
        return ListRows(dataset)
    raise TypeError(f"dataset must be a datasets.Dataset, a list of rows or a path, not {type(dataset).__name__}.")


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The rows with some columns under the names that they are to have; one that had such a name gives way."""
    there = list(rows.column_names)
    for wanted, theirs in columns.items():
        if theirs not in there:
            close = difflib.get_close_matches(theirs, there, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"The data has no column {theirs!r} for {wanted!r}, only {there}{meant}")
    names = {theirs: wanted for wanted, theirs in columns.items()}
    dropped = set(columns) - set(names)
    kept = {column: names.get(column, column) for column in there if column not in dropped}
    if isinstance(rows, TableRows):
        return rows.renamed(kept)
    assert isinstance(rows, ListRows)
    return rows.renamed(kept)


def _as_shown(dataset: datasets.Dataset) -> Rows:
    """The rows as the data set shows them: through its transform, without the columns that its format hides."""
    shown = dataset.format
    if shown["type"] == "custom":
        return ListRows(list(dataset))
    # A format such as "torch" would turn lists of scores into tensors, and float64 into float32.
    plain = dataset.with_format(None)
    hidden = [] if shown["output_all_columns"] else sorted(set(plain.column_names) - set(shown["columns"]))
    needed = [name for name in hidden if name in READ_COLUMNS]
    if needed:
        raise ValueError(
            f"The format of the dataset hides the columns {needed}: show them with dataset.reset_format(), or take "
            f"them out with dataset.remove_columns({needed})."
        )
    return TableRows(plain.remove_columns(hidden) if hidden else plain)


def _of_columns(columns: Mapping[str, Any]) -> ListRows:
    """The rows of a mapping of columns to lists of equal length."""
    listed = {name: as_list(values) for name, values in columns.items()}
    lengths = {name: None if values is None else len(values) for name, values in listed.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"A mapping must be one of columns to lists of equal length; the lengths are {lengths}.")
    cells = [values for values in listed.values() if values is not None]
    return ListRows([dict(zip(listed, values, strict=True)) for values in zip(*cells, strict=True)])
