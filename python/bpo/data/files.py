"""The file or directory that was named, and no other, to rows: no pattern, no cache, no chained address."""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import lzma
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from bpo.data.values import packed_rows
from bpo.system.packed import as_table

if TYPE_CHECKING:
    import datasets

Listed = tuple[Sequence[Any], dict[int, str]]
"""Rows, and why some of them are none: index → reason."""

_OPENERS: dict[str, Callable[..., Any]] = {"": open, ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Which Hugging Face's tools write beside data.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
# Rows of Parquet that are decoded at once.
_ROWS_AT_ONCE = 1 << 12
_SPLITS = re.compile(r"(?:^|[-._ ])(train|training|test|testing|eval|evaluation|valid|validation|dev)(?:[-._ ]|$)")


def read_path(name: str, split: str | None = None, config: str | None = None) -> datasets.Dataset | Listed:
    """Reads a file or a directory; a name of the form owner/name that is no path is an id of the hub.

    Args:
        name: The path or id.
        split: Which split is read, of a directory or a data set of the hub; None is that for training.
        config: Which configuration, of a data set of the hub.

    Raises:
        FileNotFoundError: No such path, and not the id of a data set that the hub gives.
        ValueError: A path that is there and cannot be read; the message names it and says why.
    """
    path = Path(name).expanduser()
    if not path.exists():
        return _of_hub(name, split, config)
    try:
        if config is not None:
            raise ValueError(f"only data sets of the hub have configurations such as {config!r}")
        if path.is_dir():
            return _read_directory(path, split)
        if split is not None:
            raise ValueError(f"a file has no splits such as {split!r}")
        return _read_file(path)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{name}: cannot be read: {error or type(error).__name__}") from error


def read_stream(file: IO[bytes]) -> Listed:
    """Reads rows of JSON, one a line or in a list, and why some of them are none.

    Raises:
        ValueError: There is nothing, or no JSON.
    """
    data = io.BytesIO(file.read())
    try:
        return _read_json(data)
    except ValueError as error:
        raise ValueError(
            f"the standard input: {error if data.getvalue().strip() else 'there is nothing in it'}"
        ) from None


def check_named(name: str) -> None:
    """Checks that something is a path that is there, or has the form of a hub id.

    Raises:
        FileNotFoundError: Neither; the message names a path that may be meant.
    """
    path = Path(name).expanduser()
    if path.exists() or (_HUB_ID.fullmatch(name) and not name.startswith(".") and _kind(Path(name)) is None):
        return
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    meant = f" Did you mean {path.with_name(close[0])}?" if close else ""
    raise FileNotFoundError(f"{name}: no such file or directory, and not the form of a hub id (owner/name).{meant}")


def _of_hub(name: str, split: str | None, config: str | None) -> datasets.Dataset:
    import datasets

    check_named(name)
    try:
        return datasets.load_dataset(name, config, split=split or "train")
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(f"{name}: no such file or directory, and the hub does not give it: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # datasets wraps the reason, and not all of its exceptions name the data set.
        raise ValueError(f"{name}: cannot be read: {error.__cause__ or error}") from error


def _kind(path: Path) -> str | None:
    """The ending that says how a file is to be read; None where it cannot be."""
    endings = [suffix.lower() for suffix in path.suffixes]
    if endings and endings[-1] in _OPENERS:
        endings.pop()
    return endings[-1] if endings and endings[-1] in _READERS else None


def _read_file(path: Path) -> datasets.Dataset | Listed:
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"use a file of one of the types {', '.join(_READERS)}")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    opener = _OPENERS.get(path.suffix.lower(), open)
    with opener(path, "rb") as file:
        return _READERS[kind](file)


def _read_json(file: IO[bytes]) -> Listed:
    """Rows of JSON: one a line, a list of them, or one object of columns; lines that are no JSON are named."""
    first, start = file.readline().removeprefix(codecs.BOM_UTF8), 1
    while not first.strip() and (line := file.readline()):
        first, start = line, start + 1
    rest: Iterable[bytes] = file
    if _row_of(first)[1] is not None or first.lstrip().startswith(b"["):
        # Not one row a line, or a broken first line.
        text = first + file.read()
        try:
            document = json.loads(text.decode())
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith(b"["):
                raise ValueError(f"not JSON: {error}") from None
            rest = io.BytesIO(text[len(first) :])
        else:
            return (document, {}) if isinstance(document, list) else (_rows_of_columns(document), {})
    rows = packed_rows()
    broken: dict[int, str] = {}
    for number, line in enumerate(itertools.chain([first], rest), start):
        if not line.strip():
            continue
        row, why = _row_of(line)
        if why is not None:
            broken[len(rows)] = f"line {number} is no JSON: {why}"
        rows.append(row)
    if len(broken) == len(rows):
        raise ValueError(broken[0] if broken else "the file is empty")
    return rows, broken


def _row_of(line: bytes) -> tuple[Any, str | None]:
    """A row of JSON and None, or None and why it is none."""
    try:
        return json.loads(line.decode()), None
    except (ValueError, RecursionError) as error:
        return None, str(error)


def _rows_of_columns(document: Any) -> list[dict[str, Any]]:
    if not isinstance(document, Mapping):
        raise ValueError("expected rows, one a line or in a list")
    if not all(isinstance(values, list) for values in document.values()):
        return [dict(document)]
    if len({len(values) for values in document.values()}) != 1:
        raise ValueError("expected rows, one a line or in a list, or one object of columns of equal length")
    return [dict(zip(document, values, strict=True)) for values in zip(*document.values(), strict=True)]


def _read_csv(file: IO[bytes]) -> Listed:
    """Rows of text, as it stands there: "007" is no number, "None" is not nothing."""
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    rows = packed_rows()
    broken = {}
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise ValueError("the first line names a column more than once")
        for row in reader:
            cells = len(names) + len(row.pop(None, ())) - list(row.values()).count(None)
            if cells != len(names):
                broken[len(rows)] = f"line {reader.line_num} has {cells} cells, the first line {len(names)}"
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise ValueError("no row under the names of the columns")
    return rows, broken


def _read_parquet(file: IO[bytes]) -> datasets.Dataset:
    import datasets
    import pyarrow.parquet

    parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False)  # a buffer keeps all that was read
    return datasets.Dataset(as_table(parquet.schema_arrow, parquet.iter_batches(_ROWS_AT_ONCE)))


_READERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _read_directory(path: Path, split: str | None) -> datasets.Dataset | Listed:
    """What ``save_to_disk`` wrote, or the data files of a directory, in the order of their names."""
    import datasets

    if (path / "state.json").is_file():
        if split is not None:
            raise ValueError(f"it is one data set, without splits such as {split!r}")
        return _read_saved(path)
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        wanted = split or "train"
        if wanted not in splits:
            raise ValueError(f"no split {wanted!r}, only {sorted(splits)}; name one of them as the split")
        return _read_saved(path / wanted)
    files = _files_of(path, split)
    if not files:
        what = "for training" if split is None else f"whose name says {split}"
        raise ValueError(f"no file of one of the types {', '.join(_READERS)} {what}")
    if _kind(files[0]) == ".parquet":
        return datasets.concatenate_datasets([_read_file(file) for file in files])
    rows = packed_rows()
    broken: dict[int, str] = {}
    for file in files:
        more, why = _read_file(file)
        broken |= {len(rows) + index: f"{file.name}: {reason}" for index, reason in why.items()}
        for row in more:
            rows.append(row)
    return rows, broken


def _files_of(path: Path, split: str | None) -> list[Path]:
    """The data files in a directory: of a split, or those for training where names tell splits apart."""
    card = path / "README.md"
    if card.is_file() and re.search(rb"^configs:", card.read_bytes(), re.MULTILINE):
        raise ValueError("its README.md says which files are which ('configs'): name the file that you mean")
    found: dict[str, list[Path]] = {"": [], "train": [], "other": []}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        hidden = any(part.startswith((".", "_")) for part in inside.parts) or file.name in _DESCRIPTIONS
        if hidden or not file.is_file() or _kind(file) is None:
            continue
        if split is not None:
            if any(re.search(rf"(?:^|[-._ ]){re.escape(split)}(?:[-. ]|$)", part) for part in inside.parts):
                found["train"].append(file)
            continue
        splits = [split for part in inside.parts for split in _SPLITS.findall(part.lower())]
        found["" if not splits else "train" if splits[-1].startswith("train") else "other"].append(file)
    files = found["train"] or found[""]
    kinds = sorted({_kind(file) or "" for file in files})
    if len(kinds) > 1:
        raise ValueError(f"it holds files of several types ({', '.join(kinds)}): name the file that you mean")
    return files


def _read_saved(path: Path) -> datasets.Dataset:
    """What ``Dataset.save_to_disk`` wrote, mapped into memory."""
    import datasets

    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    names = [file["filename"] for file in state["_data_files"]]
    if not names:
        raise ValueError("the dataset is empty")
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise ValueError(f"state.json names {strange[0]!r}, which is not in the directory")
    data = datasets.concatenate_datasets([datasets.Dataset.from_file(str(path / name)) for name in names])
    if state.get("_format_columns") is not None:
        data = data.with_format(columns=state["_format_columns"], output_all_columns=state["_output_all_columns"])
    return data
