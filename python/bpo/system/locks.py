"""Directories that one process at a time works in."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_BETWEEN = 0.02


@contextlib.contextmanager
def locked(directory: Path, name: str, busy: str, *, wait: float = 0.0) -> Iterator[None]:
    """Keeps every other process, and thread, out of a directory until the block is done.

    The directory is made where there is none, and taken away again where nothing came into it. The system lets go of
    the lock when the process dies, so what is left of the file then stops nobody.

    Args:
        directory: The directory.
        name: Of the file that is locked, which is there only as long.
        busy: What the error says of the directory.
        wait: Seconds to wait until another one is done.

    Raises:
        BlockingIOError: Another one is not done.
        OSError: The directory cannot be made or written to.
    """
    path, made = directory / name, list[Path]()
    deadline = time.monotonic() + wait
    try:
        while (handle := _take(path, made)) is None:
            if time.monotonic() >= deadline:
                raise BlockingIOError(f"{directory}: {busy}")
            time.sleep(_SECONDS_BETWEEN)
        try:
            yield
        finally:
            if sys.platform != "win32":  # there a file that is open cannot be removed
                path.unlink(missing_ok=True)
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # not empty, as it should be
            for each in reversed(made):
                each.rmdir()


def _take(path: Path, made: list[Path]) -> int | None:
    """Locks a file that is made for it, and notes directories that had to be made, too; None where it is taken."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            made += _make(path.parent)
            continue
        try:
            if not _lock(handle):
                os.close(handle)
                return None
            # Whoever had it may have removed it in between, and then it keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _make(directory: Path) -> list[Path]:
    """Makes a directory and those that it is in; returns the new ones."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()][::-1]
    for each in missing:
        if each.is_symlink():
            raise FileExistsError(f"{each} is a link to nothing; remove it, or name another directory.")
        # Others may make it at the same time, or take away what it is in.
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            each.mkdir()
    return missing


if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import errno
    import fcntl

    # What file systems say that know no locks: there whoever comes goes in.
    _WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

    def _lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        return True
