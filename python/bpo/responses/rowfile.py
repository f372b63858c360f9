"""Rows of JSON that are appended as they are finished: a run that is interrupted goes on from them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.system.files import differing, flattened, write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROW_ID = "bpo_id"
"""The column by which a row of the file is known: a hash of everything that it was made from."""

_FORMAT_VERSION = 1


class RowFile:
    """A JSONL file of one row a prompt, with a manifest of the settings beside it.

    A row is written as one line as soon as it is finished, so that a run that is killed loses no other. The file ends
    up in the order of the data whatever the order of the work.

    Args:
        path: The file, ending in .jsonl; its manifest is ``<name>.manifest.json`` beside it. ``None`` keeps the rows in
            memory alone.
        kind: What the rows are, such as ``"responses"``.
        settings: What the rows depend on beside the data (JSON). A file of others is refused.
        ids: (n,) the ids of the rows that the data asks for, in its order.

    Raises:
        ValueError: A file of other settings, of other data, or one that is damaged.
        FileExistsError: A file without a manifest, so not one of ours.
    """

    def __init__(self, path: Any, kind: str, settings: Mapping[str, Any], ids: Sequence[str]) -> None:
        self.ids = list(ids)
        self.rows: dict[str, dict[str, Any]] = {}
        self.path = None if path is None else Path(path).expanduser()
        if self.path is None:
            return
        check_output(path)
        manifest = {"format_version": _FORMAT_VERSION, "kind": kind, "settings": json.loads(json.dumps(settings))}
        self._check_manifest(self.path.with_suffix(".manifest.json"), manifest)
        if self.path.exists():
            self._read(self.path)
            strangers = self.rows.keys() - set(self.ids)
            if strangers:
                raise ValueError(
                    f"{self.path} holds {len(strangers)} rows that were made from other prompts or responses than the "
                    f"{len(self.ids)} given; give those again, or choose another output."
                )

    def _check_manifest(self, path: Path, manifest: dict[str, Any]) -> None:
        assert self.path is not None
        written = self.path.exists() and self.path.stat().st_size > 0
        if not path.exists() or not written:
            if written:
                raise FileExistsError(f"{self.path} is there already, without {path.name}; choose another output.")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
            return
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            settings = dict(earlier["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); choose another output.") from None
        for name in ("format_version", "kind"):
            if earlier.get(name) != manifest[name]:
                raise ValueError(
                    f"{path}: {name} is {earlier.get(name)!r}, not {manifest[name]!r}; choose another output."
                )
        there, now = flattened(settings), flattened(manifest["settings"])
        changed = [
            f"{name} ({_short(there.get(name))} there, {_short(now.get(name))} now)" for name in differing(there, now)
        ]
        if changed:
            raise ValueError(
                f"{self.path} was written with other settings: {', '.join(changed)}. Give those again, or choose "
                "another output."
            )

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            row = _row(line)
            if row is None:
                raise ValueError(
                    f"{path}, line {number}: no row that bpo wrote. Remove the line, and it is made again."
                )
            self.rows[row[ROW_ID]] = row
        if whole < len(data):
            os.truncate(path, whole)  # a line that an interrupted run left unfinished

    def add(self, row_id: str, row: Mapping[str, Any]) -> None:
        """Keeps a finished row; one of the same id is replaced."""
        self.rows[row_id] = {**row, ROW_ID: row_id}
        if self.path is not None:
            with self.path.open("ab", buffering=0) as file:
                file.write(_line(self.rows[row_id]))

    def finish(self) -> list[dict[str, Any]]:
        """Brings the file into the order of the data and returns the rows in it, without their ids."""
        rows = [self.rows[row_id] for row_id in self.ids]
        if self.path is not None:
            text = b"".join(map(_line, rows))
            if not self.path.exists() or self.path.read_bytes() != text:
                write_whole(self.path, text.decode())
        return [{name: value for name, value in row.items() if name != ROW_ID} for row in rows]


def check_output(path: Any) -> None:
    """Checks the name of a file before any work for it.

    Raises:
        ValueError: It does not end in .jsonl.
    """
    if path is not None and Path(path).suffix != ".jsonl":
        raise ValueError(f"{path}: output must be a file that ends in .jsonl.")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and ROW_ID in row else None


def _line(row: Mapping[str, Any]) -> bytes:
    # Lone surrogates, which some tokenizers produce, have no UTF-8.
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()
