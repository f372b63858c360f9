"""Objects behind an address that fsspec knows, such as a bucket: put and got whole, and listed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.system.files import sync
from bpo.system.optional import DISTRIBUTION
from bpo.system.secrets import without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_INSTALL = f"For s3:// that is pip install '{DISTRIBUTION}[remote]'."
_CREDENTIALS = "Give credentials as its client expects them, for s3:// in the environment or in ~/.aws."

_WORKERS = 8


class Objects:
    """What lies below an address.

    Args:
        url: The address, such as ``s3://bucket/prefix``. How it is reached, and as whom, the client of its protocol
            reads from its own settings and from those of fsspec.

    Attributes:
        shown: The address without secrets.

    Raises:
        ValueError: No such protocol.
        ImportError: The package of the protocol is not installed.
    """

    def __init__(self, url: str) -> None:
        self.shown: str = without_secrets(url.rstrip("/"))[0]
        with self._told():
            import fsspec

            self._files, root = fsspec.core.url_to_fs(url)
        self._root = str(root).rstrip("/")
        self._local = "file" in _protocols(self._files)

    def names(self, folder: str = "") -> list[str]:
        """Returns the names in a folder, sorted; none where there is no such folder.

        Raises:
            FileNotFoundError: There is no such bucket.
            OSError: It cannot be asked.
        """
        with self._told(folder):
            self._files.invalidate_cache()
            try:
                found = self._files.ls(self._place(folder), detail=False)
            except FileNotFoundError:
                self._check_bucket()
                return []
        names = {str(name).rstrip("/").rpartition("/")[2] for name in found}
        return sorted(names - {"", self._place(folder).rpartition("/")[2]})

    def read(self, name: str, most: int) -> bytes:
        """Returns an object of up to so many bytes.

        Raises:
            FileNotFoundError: There is none.
            OSError: It is larger, or cannot be read.
        """
        with self._told(name):
            data: bytes = self._files.cat_file(self._place(name), start=0, end=most + 1)
            if len(data) > most:
                raise OSError(f"it has more than the {most} bytes that it should have at most")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Puts an object, whole or not at all, in the place of one that was there.

        Raises:
            OSError: It cannot be written.
        """
        with self._told(name):
            if self._local:
                with self._scratch(name, data) as scratch:
                    scratch.replace(self._place(name))
            else:
                self._files.pipe_file(self._place(name), data)

    def put(self, name: str, path: Path) -> None:
        """Puts a file, whole or not at all, in the place of an object that was there.

        Raises:
            OSError: It cannot be read or written.
        """
        with self._told(name):
            if self._local:
                with self._scratch(name, path) as scratch:
                    scratch.replace(self._place(name))
            else:
                self._files.put_file(str(path), self._place(name))

    def get(self, names: Sequence[str], directory: Path) -> None:
        """Puts objects into a directory, under their names there.

        Raises:
            FileNotFoundError: There is none of such a name.
            OSError: One cannot be read, or there is no room for all.
        """
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            check_room(sum(self._files.size(self._place(name)) or 0 for name in names), directory, self.shown)
        for name in names:
            with self._told(name):
                self._files.get_file(self._place(name), str(directory / name))

    def create(self, name: str, data: bytes) -> None:
        """Puts an object where there is none, by a conditional put where the protocol has it.

        Raises:
            FileExistsError: There is one.
            OSError: It cannot be written.
        """
        with self._told(name):
            if self._local:
                with self._scratch(name, data) as scratch:
                    os.link(scratch, self._place(name))
            else:
                self._files.pipe_file(self._place(name), data, mode="create")

    def remove(self, names: Iterable[str]) -> None:
        """Takes objects away, as far as that is allowed: what stays takes room and nothing else."""

        def remove(name: str) -> None:
            with contextlib.suppress(Exception):
                self._files.rm_file(self._place(name))

        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(remove, names))

    @contextlib.contextmanager
    def _scratch(self, name: str, content: bytes | Path) -> Iterator[Path]:
        """A file beside an object on a disk, which writes no file whole."""
        place = Path(self._place(name))
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f".{os.getpid()}-{threading.get_native_id()}-{place.name}")
        try:
            if isinstance(content, Path):
                shutil.copyfile(content, scratch)
            else:
                scratch.write_bytes(content)
            sync(scratch)
            yield scratch
            sync(place.parent)
        finally:
            scratch.unlink(missing_ok=True)

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _check_bucket(self) -> None:
        bucket = self._root.partition("/")[0]
        if bucket and not self._files.exists(bucket):
            raise FileNotFoundError(f"there is no bucket {bucket}, or these credentials do not show it")

    @contextlib.contextmanager
    def _told(self, name: str = "") -> Iterator[None]:
        """Says of what an error is, and what to do; clients have classes of their own."""
        place = f"{self.shown}/{name}" if name else self.shown
        try:
            yield
        except NoRoomError:
            raise
        except FileExistsError as error:
            raise FileExistsError(f"{place} is there already.") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{place}: {self._said(error) or 'there is no such object'}") from error
        except ImportError as error:
            raise ImportError(f"{place} needs a package that is not installed: {error}. {_INSTALL}") from error
        except PermissionError as error:
            raise PermissionError(f"{place}: not allowed: {self._said(error)}. {_CREDENTIALS}") from error
        except ValueError as error:
            raise ValueError(f"{place}: {self._said(error)}") from error
        except Exception as error:
            if "Credential" in type(error).__name__:
                raise PermissionError(f"{place}: {self._said(error)}. {_CREDENTIALS}") from error
            raise ConnectionError(f"{place}: {type(error).__name__}: {self._said(error)}") from error

    def _said(self, error: BaseException) -> str:
        said: str = without_secrets(str(error))[0]
        return said.rstrip(".")


class NoRoomError(OSError):
    """What is to be fetched is more than is free."""


def check_room(n_bytes: int, directory: Path, what: str) -> None:
    """Checks before anything is fetched that it fits.

    Raises:
        OSError: It does not; says how much is lacking (ENOSPC).
    """
    free = shutil.disk_usage(directory).free
    if n_bytes > free:
        raise NoRoomError(
            errno.ENOSPC, f"{n_bytes:,} bytes of {what} are to be fetched, and {free:,} are free", str(directory)
        )


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
