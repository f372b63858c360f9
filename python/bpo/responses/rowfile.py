"""Rows of JSON that are appended as they are finished: a run that is interrupted goes on from them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.system.files import differing, flattened, write_whole
from bpo.system.identity import CHANGES, NOT_COMPARED
from bpo.system.locks import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

ROW_ID = "bpo_id"
"""The column by which a row of the file is known: a hash of everything that it was made from."""

_FORMAT_VERSION = 1


class RowFile:
    """A JSONL file of one row a prompt, with a manifest of the settings beside it.

    A row is written as one line as soon as it is finished, so that a run that is killed loses no other. The file ends
    up in the order of the data whatever the order of the work. As a context, the file is this process's alone until the
    end of it; otherwise for as long as a row is added.

    Args:
        path: The file, ending in .jsonl; its manifest is ``<name>.manifest.json`` beside it. ``None`` keeps the rows in
            memory alone.
        kind: What the rows are, such as ``"responses"``.
        settings: What the rows depend on beside the data (JSON). A file of others is refused.
        ids: (n,) the ids of the rows that the data asks for, in its order.
        valid: Whether a row that was read has what it must have.

    Raises:
        ValueError: A file of other settings, of other data, or one that is damaged.
        FileExistsError: A file without a manifest, so not one of ours.
        BlockingIOError: As a context: someone else is writing the file.
        OSError: A file that cannot be read or written; names it.
    """

    def __init__(
        self,
        path: Any,
        kind: str,
        settings: Mapping[str, Any],
        ids: Sequence[str],
        valid: Callable[[dict[str, Any]], bool] = lambda _: True,
    ) -> None:
        self.ids = list(ids)
        self.rows: dict[str, dict[str, Any]] = {}
        self.path = check_output(path)
        self._wanted = set(self.ids)
        self._valid = valid
        self._block = False  # whether it is one of a file that several processes fill
        self._lock: FileLock | None = None
        self._read_digest = b""
        # Bytes of the file that are whole rows.
        self._whole = 0
        if self.path is not None:
            self._manifest = {"format_version": _FORMAT_VERSION, "kind": kind, "settings": _as_json(settings)}
            self._read(self.path)

    @property
    def _manifest_path(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".manifest.json")

    def __enter__(self) -> RowFile:
        if self.path is None:
            return self
        if not self._block:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock.beside(self.path)
        try:
            self._read(self.path)  # what others have written until now
            if not self._written(self.path):
                self._write_manifest(self._manifest["settings"])
            elif self.path.stat().st_size > self._whole:
                os.truncate(self.path, self._whole)  # a line that an interrupted run left unfinished
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _held(self) -> contextlib.AbstractContextManager[Any]:
        return self if self._lock is None else contextlib.nullcontext()

    def _write_manifest(self, settings: Mapping[str, Any]) -> None:
        manifest = {**self._manifest, "settings": settings}
        write_whole(self._manifest_path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")

    @staticmethod
    def _written(path: Path) -> bool:
        return path.exists() and path.stat().st_size > 0

    def _read(self, path: Path) -> None:
        if not self._written(path):
            self.rows, self._whole, self._read_digest = {}, 0, b""
            return
        self._check_manifest(path)
        data = path.read_bytes()
        digest = hashlib.sha256(data).digest()
        if digest == self._read_digest:
            return
        rows: dict[str, dict[str, Any]] = {}
        whole = data.rfind(b"\n") + 1
        strangers: list[int] = []
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            row = _row(line)
            if row is None or not self._valid(row):
                raise ValueError(
                    f"{path}, line {number}: no row that bpo wrote. Remove the line, and it is made again."
                )
            rows[row[ROW_ID]] = row
            if row[ROW_ID] not in self._wanted:
                strangers.append(number)
        if strangers:
            raise ValueError(
                f"{path} holds {len(strangers)} rows that were made from other prompts or responses, or from other "
                f"scores of them, than the {len(self._wanted)} given; the first is line {strangers[0]}. Give those "
                "again, or choose another output."
            )
        self.rows, self._whole, self._read_digest = rows, whole, digest

    def _check_manifest(self, path: Path) -> None:
        beside = self._manifest_path
        if not beside.exists():
            raise FileExistsError(f"{path} is there already, without {beside.name}; choose another output.")
        try:
            earlier = json.loads(beside.read_text(encoding="utf-8"), parse_constant=str)
            settings = dict(earlier["settings"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{beside} is damaged ({error}); choose another output.") from None
        for name in ("format_version", "kind"):
            if earlier.get(name) != self._manifest[name]:
                raise ValueError(
                    f"{beside}: {name} is {earlier.get(name)!r}, not {self._manifest[name]!r}; choose another output."
                )
        there, now = flattened(settings), flattened(self._manifest["settings"])
        changed = [
            f"{name} ({_short(there.get(name))} there, {_short(now.get(name))} now)"
            for name in differing(there, now)
            if there.get(name) != CHANGES
        ]
        if changed:
            raise ValueError(
                f"{path} was written with other settings: {', '.join(changed)}. Give those again, or choose "
                "another output."
            )

    def not_compared(self) -> list[str]:
        """Returns the settings of which nobody can say whether they are those that the file was begun with."""
        if self.path is None:
            return []
        settings = flattened(self._manifest["settings"])
        return [name for name, value in settings.items() if str(value).startswith(NOT_COMPARED)]

    def allow_changes(self, settings: Mapping[str, Any]) -> None:
        """Takes note of settings that have changed while rows were made: the same work changes them, not the user.

        Args:
            settings: As they are now.
        """
        if self.path is None or self._lock is None or not self._written(self.path):
            return
        began, now = flattened(self._manifest["settings"]), flattened(_as_json(settings))
        self.note_changes(differing(began, now))

    @property
    def changes(self) -> list[str]:
        """The settings that have changed while rows were made, as the manifest says."""
        return [name for name, value in self._settings_there().items() if value == CHANGES]

    def note_changes(self, names: Iterable[str]) -> None:
        """Takes note of such settings."""
        changed = dict.fromkeys(names, CHANGES)
        if changed:
            self._write_manifest({**self._settings_there(), **changed})

    def _settings_there(self) -> dict[str, Any]:
        return flattened(json.loads(self._manifest_path.read_text(encoding="utf-8"))["settings"])

    def add(self, row_id: str, row: Mapping[str, Any]) -> None:
        """Keeps a finished row; one of the same id is replaced.

        Raises:
            OSError: It cannot be written; the file is then as it was before.
        """
        row = {**row, ROW_ID: row_id}
        if self.path is not None:
            line = _line(row)
            with self._held():
                self._append(self.path, line)
        self.rows[row_id] = row

    def replace(self, row_id: str, row: Mapping[str, Any]) -> None:
        """Brings a row that is there up to date; the file follows with :meth:`finish`."""
        self.rows[row_id] = {**row, ROW_ID: row_id}

    def _append(self, path: Path, line: bytes) -> None:
        if (path.stat().st_size if path.exists() else 0) != self._whole:
            # Removed, cut or written to by something else, or a row that could not be taken back.
            self.write_anew()
        with _naming(path), path.open("ab", buffering=0) as file:
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except BaseException:
                file.truncate(self._whole)
                raise
        self._whole += len(line)

    def write_anew(self) -> None:
        """Writes the file as the rows are now."""
        assert self.path is not None
        write_whole(self.path, b"".join(map(_line, self.rows.values())).decode())
        self._whole = self.path.stat().st_size

    def block(self, path: Path) -> RowFile:
        """Returns another file for some of the rows, in a directory that is there."""
        block = copy.copy(self)
        block.path, block.rows, block._block = path, {}, True
        block._lock, block._whole, block._read_digest = None, 0, b""
        return block

    def read(self) -> None:
        """Reads what is in the file now."""
        if self.path is not None:
            self._read(self.path)

    def in_order(self) -> list[dict[str, Any]]:
        """Returns the rows in the order of the data, without their ids."""
        rows = (self.rows[row_id] for row_id in self.ids)
        return [{name: value for name, value in row.items() if name != ROW_ID} for row in rows]

    def finish(self) -> list[dict[str, Any]]:
        """Brings the file into the order of the data and returns the rows in it, without their ids."""
        rows = [self.rows[row_id] for row_id in self.ids]
        if self.path is not None:
            text = b"".join(map(_line, rows))
            with self._held(), _naming(self.path):
                if not self.path.exists() or self.path.read_bytes() != text:
                    write_whole(self.path, text.decode())
            self._whole = len(text)
        return self.in_order()


def check_output(path: Any) -> Path | None:
    """Checks the name of a file before any work for it; returns the file that is meant, behind links and ``~``.

    Raises:
        ValueError: It does not end in .jsonl, or begins with the home of nobody.
    """
    if path is None:
        return None
    given = Path(path)
    if given.suffix != ".jsonl":
        raise ValueError(f"{path}: output must be a file that ends in .jsonl.")
    try:
        return given.expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Names the file in the errors of a file that is open, which do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, f"{error.strerror}; rows finished so far are kept", str(path)) from error


def _as_json(settings: Mapping[str, Any]) -> Any:
    """Returns settings as they come back from a file; what is no number equals nothing, so it becomes a word."""
    try:
        return json.loads(json.dumps(settings), parse_constant=str)
    except (TypeError, ValueError) as error:
        raise ValueError(f"What describes the work for an output must be JSON: {error}.") from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get(ROW_ID), str) else None


def _line(row: Mapping[str, Any]) -> bytes:
    # Lone surrogates, which some tokenizers produce, have no UTF-8.
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(row) + "\n").encode()
