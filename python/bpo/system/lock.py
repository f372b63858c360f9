"""A file that one process at a time may write, by a lock that the system lets go of when its holder dies."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import sys
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class FileLock:
    """The right to write a file, until :meth:`release` or the end of the process, however it ends.

    It is the lock of ``.<name>.lock`` beside the file, since a file that is replaced takes its own lock along. Two
    threads of a process exclude each other, too; a forked child has no part in it.

    Args:
        path: The file, which need not be there; its directory must.

    Raises:
        BlockingIOError: Someone else is writing it; says who.
        OSError: The lock cannot be made, or the file system knows no locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(f".{path.name}.lock")
        # A file object, so that a lock that is dropped unreleased is let go of, too.
        self._file = self._open(path)
        with contextlib.suppress(OSError):  # on a full disk nobody hears who holds it
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} on {platform.node()}".encode())
        _HELD.add(self)

    def _open(self, path: Path) -> io.FileIO:
        while True:
            file = io.FileIO(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
            try:
                free = _try_lock(file.fileno())
            except OSError as error:
                file.close()
                raise OSError(
                    error.errno, f"{error.strerror}; choose a place whose file system has locks", str(self.path)
                ) from None
            if not free:
                holder = file.read(1000).decode(errors="replace") or "another"
                file.close()
                raise BlockingIOError(
                    f"{path}: process {holder} is writing to this file; wait for it to finish, or choose another."
                )
            # The holder before may have removed what was opened here.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    return file
            file.close()

    def release(self) -> None:
        """Lets others write; releasing again does nothing."""
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
