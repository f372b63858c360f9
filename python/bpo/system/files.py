"""Files that are there whole or not at all, and the settings in them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


def cache() -> Path:
    """The directory of local copies and of what does not fit into memory: ``$BPO_CACHE``, or ``bpo`` in the user's."""
    given = os.environ.get("BPO_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bpo"


def write_whole(path: Path, text: str) -> Path:
    """Writes or replaces a text file; whoever reads it, or whatever interrupts this, finds the old text or the new.

    Lone surrogates, which have no UTF-8, are written as JSON and Python spell them.

    Raises:
        OSError: The file cannot be written; the error names it, and what was there is kept.
    """
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside ``path``, with the same ending; what is written there replaces it when the block is done.

    Raises:
        OSError: The file cannot be written; the error names ``path``, and what was there is kept.
    """
    scratch = path.with_name(f".{os.getpid()}-{threading.get_native_id()}-{path.name}")
    try:
        with naming_file(path, scratch):
            yield scratch
            sync(scratch)
            scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_file(path: Path, scratch: Path | None = None) -> Iterator[None]:
    """Has errors of the system name a file where they name none, or only what it is called until it is whole."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, scratch, str(scratch)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class ArrowFile(io.RawIOBase):
    """A new file for Arrow to write to, which ends the whole process where a file fails.

    So no write fails: what could not be written is raised when the block ends, or by :meth:`check`. An interrupt while
    Arrow writes is kept until then, too.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._error: BaseException | None = None

    def writable(self) -> bool:
        """As of any file that is written."""
        return True

    def write(self, data: Any) -> int:
        """Writes all of some bytes, or drops them once something went wrong."""
        try:
            if self._error is None:
                self._file.write(data)
        except BaseException as error:
            self._error = error
        return memoryview(data).nbytes

    def tell(self) -> int:
        """Returns how much was written."""
        return self._file.tell()

    def check(self) -> None:
        """Raises what went wrong.

        Raises:
            OSError: The file cannot be written.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Closes the file, which is on disk then.

        Raises:
            OSError: The file cannot be written.
        """
        if self.closed:
            return
        super().close()
        try:
            if self._error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self._error = error
        finally:
            with contextlib.suppress(OSError):  # the bytes that are left over fail again
                self._file.close()
        with naming_file(self._path):
            self.check()


def read_json(text: str | bytes, name: object) -> Any:
    """Reads JSON; ``name`` says of what in the error.

    Raises:
        ValueError: It is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings within settings under dotted names such as ``scorer.mode``, tuples as the lists of JSON."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update({f"{name}.{inner}": item for inner, item in flattened(value).items()})
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns the names whose values differ, or that one of the two lacks where the other's value is not None."""
    return [name for name in {**there, **here} if there.get(name) != here.get(name)]
