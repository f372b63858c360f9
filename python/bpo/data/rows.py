"""Whatever the user holds, a file, a hub id, a list or a data set, to rows with columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.data.values import shorten

if TYPE_CHECKING:
    import datasets

_FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class ListRows:
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


def load_rows(dataset: Any) -> datasets.Dataset | ListRows:
    """Turns whatever the user holds into rows with ``column_names``.

    Raises:
        FileNotFoundError: A path that does not exist, or a hub id that the hub does not give.
        ValueError: A dataset without a train split, a streaming dataset, an empty list, or a file that is damaged.
        TypeError: Anything else.
    """
    import datasets

    if isinstance(dataset, ListRows):
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
        return ListRows(dataset)
    raise TypeError(f"dataset must be a datasets.Dataset, a list of rows or a path, not {type(dataset).__name__}.")


def _load_path(name: str) -> datasets.Dataset | ListRows:
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


def values_of(rows: datasets.Dataset | ListRows, name: str) -> list[Any]:
    """Returns a column as a list, None for each row where there is no such column."""
    if name not in rows.column_names:
        return [None] * len(rows)
    return [row[name] for row in rows] if isinstance(rows, ListRows) else list(rows[name])
