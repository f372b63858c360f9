"""Files and directories that one process at a time works in, by locks that the system lets go of when it dies."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import sys
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_BETWEEN = 0.02

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # beyond what is read: a locked byte cannot be
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        return True

else:
    import errno
    import fcntl

    # What file systems say that know no locks: there whoever comes goes in.
    _WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
        return True


class FileLock:
    """The right to work at something, until :meth:`release` or the end of the process, however it ends.

    It is the lock of a file that is made for it. Two threads of a process exclude each other, too; a forked child has
    no part in it.

    Args:
        path: Of the file that is locked; its directory must be there.
        busy: What the error says after the place and the process that has the lock.
        place: What the error says is being worked at; the path itself by default.

    Raises:
        BlockingIOError: Someone else has it; says who.
        OSError: The lock cannot be made.
    """

    def __init__(self, path: Path, busy: str, *, place: Path | None = None) -> None:
        self.path = path
        # A file object, so that a lock that is dropped unreleased is let go of, too.
        self._file = self._open(busy, place or path)
        with contextlib.suppress(OSError):  # on a full disk nobody hears who holds it
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} on {platform.node()}".encode())
        _HELD.add(self)

    @classmethod
    def beside(cls, path: Path) -> FileLock:
        """Returns the right to write a file, which need not be there.

        It is the lock of ``.<name>.lock`` beside it, since a file that is replaced takes its own lock along.
        """
        busy = "is writing to this file; wait for it to finish, or choose another."
        return cls(path.with_name(f".{path.name}.lock"), busy, place=path)

    def _open(self, busy: str, place: Path) -> io.FileIO:
        while True:
            file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
            try:
                if not _try_lock(file.fileno()):
                    holder = file.read(1000).decode(errors="replace") or "another"
                    raise BlockingIOError(f"{place}: process {holder} {busy}")
                # The holder before may have removed what was opened here, and then it keeps nobody out.
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            except FileNotFoundError:
                pass
            except BaseException:
                file.close()
                raise
            file.close()

    def release(self) -> None:
        """Lets others in; releasing again does nothing."""
        if not self._file.closed:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                self.path.unlink()
            self._file.close()

    def leave(self) -> None:
        """Gives up the part of a forked child, which would hold the lock beyond the end of its parent."""
        self._file.close()


_HELD: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _leave_all() -> None:
    for lock in list(_HELD):
        lock.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)


@contextlib.contextmanager
def locked(directory: Path, name: str, busy: str, *, wait: float = 0.0) -> Iterator[None]:
    """Keeps every other process, and thread, out of a directory until the block is done.

    The directory is made where there is none, and taken away again where nothing came into it.

    Args:
        directory: The directory.
        name: Of the file that is locked, which is there only as long.
        busy: What the error says after the directory and the process that is in it.
        wait: Seconds to wait until another one is done.

    Raises:
        BlockingIOError: Another one is not done.
        OSError: The directory cannot be made or written to.
    """
    made = list[Path]()
    deadline = time.monotonic() + wait
    try:
        while (lock := _entered(directory, name, busy, made, last=time.monotonic() >= deadline)) is None:
            time.sleep(_SECONDS_BETWEEN)
        try:
            yield
        finally:
            lock.release()
    finally:
        with contextlib.suppress(OSError):  # not empty, as it should be
            for each in reversed(made):
                each.rmdir()


def _entered(directory: Path, name: str, busy: str, made: list[Path], *, last: bool) -> FileLock | None:
    """Locks a directory, and notes those that had to be made; None where it is busy, unless this is the last try."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            try:
                return FileLock(directory / name, busy, place=directory)
            except BlockingIOError:
                if last:
                    raise
                return None
        made += _make(directory)


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


@contextlib.contextmanager
def holding(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a file that stays, as the core does with that of a store.

    Raises:
        BlockingIOError: Someone else has it; with ``busy`` as the message.
        OSError: The lock cannot be made.
    """
    with io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+") as file:
        if not _try_lock(file.fileno()):
            raise BlockingIOError(busy)
        yield
