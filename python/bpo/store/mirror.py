"""The local copy of a store that lies at an address: fetched as far as it is lacking or differs.

Everything that reads or fills a store works on the copy, which is a store like any other. It lies below the cache, and
whatever of it was at the address when it was fetched or sent may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo import _core
from bpo._core import StoreDamagedError, StoreError, StoreLockedError
from bpo.store.objects import Objects, check_room
from bpo.store.snapshot import (
    HEADER_BYTES,
    MANIFESTS,
    RECORD_BYTES,
    SEGMENTS,
    Segment,
    Snapshot,
    StoreFiles,
    latest,
)
from bpo.system.files import cache, replacing, sync, write_whole
from bpo.system.locks import holding, locked
from bpo.system.paths import is_url

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_TO_WAIT = 1e6  # for another process that fetches the same, which may take hours
_TRIES = 3
_WORKERS = 8  # each has a segment in memory

_STATE = "state.json"

Lacking = tuple[Path, int, Segment]
"""A file, from which byte on, and what belongs there."""


def local(path: str | os.PathLike[str]) -> Path:
    """Returns the directory of a store: of one at an address the local copy, which is brought up to it.

    Raises:
        FileNotFoundError: Nothing is at the address.
        bpo.StoreError: What is there is damaged, or of another version.
        ImportError: The package of the protocol is not installed.
        OSError: It cannot be fetched, such as for want of room.
    """
    if not is_url(path):
        return Path(path)
    mirror = Mirror(os.fspath(path))
    snapshot = mirror.fetch()
    if snapshot is None or "" not in snapshot.stores:
        raise FileNotFoundError(f"{mirror.objects.shown} holds no gradient store.")
    return mirror.store


def holds_store(path: str | os.PathLike[str]) -> bool:
    """Whether a gradient store is in a directory or at an address.

    Raises:
        OSError: The address cannot be asked.
    """
    if is_url(path):
        return latest(Objects(os.fspath(path))) is not None
    return (Path(path) / "manifest.json").is_file()


def remove_store(path: str | os.PathLike[str]) -> None:
    """Removes a store from a directory, or from an address with its local copy."""
    if not is_url(path):
        shutil.rmtree(path)
        return
    mirror = Mirror(os.fspath(path))
    for folder in (MANIFESTS, SEGMENTS):  # in this order, so that at no moment half of it counts
        mirror.objects.remove(f"{folder}/{name}" for name in mirror.objects.names(folder))
    shutil.rmtree(mirror.directory, ignore_errors=True)


@contextlib.contextmanager
def described(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a directory with the records of a store: of one at an address without its sketches, which read as zeros.

    Raises:
        FileNotFoundError, bpo.StoreError, ImportError, OSError: As :func:`local`.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="bpo-store-") as directory:
        mirror = Mirror(os.fspath(path))
        mirror.store = Path(directory)
        if not mirror.fetch_records():
            raise FileNotFoundError(f"{mirror.objects.shown} holds no gradient store.")
        yield mirror.store


class Mirror:
    """The local copy of what is at an address.

    Args:
        url: The address.
        give_up: Whether objects that are damaged or missing are left out, for a repair of what then is lacking.

    Attributes:
        objects: What is at the address.
        directory: Where the copy and what is known of it lie.
        store: The copy.
    """

    def __init__(self, url: str, *, give_up: bool = False) -> None:
        self.objects = Objects(url)
        self._give_up = give_up
        slug = re.sub(r"[^\w.-]+", "-", self.objects.shown)[-60:].strip("-")
        mark = hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:12]
        self.directory = cache() / "stores" / f"{slug}-{mark}"
        self.store = self.directory / "store"

    def fetch(self, *, to_write: bool = False) -> Snapshot | None:
        """Brings the copy up to what is at the address; rows that were not sent yet stay.

        Args:
            to_write: Whether blocks that are being filled are fetched, too, and a writer on this machine is in the way.

        Returns:
            What is at the address; None where nothing is.

        Raises:
            bpo.StoreLockedError: Another process on this machine is writing.
            bpo.StoreDamagedError: An object is not as it was written.
            bpo.StoreError: The copy has rows that were never sent and differ from those at the address.
            OSError: It cannot be fetched, such as for want of room.
        """
        with locked(self.directory, ".fetch.lock", "is fetching the same", wait=_SECONDS_TO_WAIT):
            for attempt in range(_TRIES):
                snapshot = latest(self.objects)
                if snapshot is None:
                    return None
                try:
                    self._bring(snapshot, to_write)
                except StoreDamagedError:
                    # Whoever finished the store took away what nothing needs any more.
                    if attempt + 1 == _TRIES or latest(self.objects) == snapshot:
                        raise
                    continue
                return snapshot
        raise AssertionError

    def _bring(self, snapshot: Snapshot, to_write: bool) -> None:
        known = self._known()
        if known.get("snapshot") == snapshot.checksum and self._is_sent() and (known.get("blocks") or not to_write):
            return
        wanted = {name: files for name, files in snapshot.stores.items() if to_write or not name}
        with ThreadPoolExecutor(_WORKERS) as pool, contextlib.ExitStack() as stack:
            for name in wanted:
                path = self.store / name
                path.mkdir(parents=True, exist_ok=True)
                busy = f"{self.objects.shown}: another process on this machine is writing to it, by way of {path}."
                try:
                    stack.enter_context(holding(path / "lock", busy))
                except BlockingIOError:
                    if to_write:
                        raise StoreLockedError(busy) from None
                    return  # what it writes to has what was at the address
            if self._is_sent() and not self._begins_like(wanted):
                _clear(self.store)
            fetches = {name: self._plan(self.store / name, files, pool) for name, files in wanted.items()}
            lacking = [each for plan in fetches.values() for each in plan]
            n_bytes = sum(segment.n_bytes for _, _, segment in lacking)
            check_room(n_bytes, self.directory, self.objects.shown)
            from tqdm.auto import tqdm  # not before the command has read whether it is to be quiet

            with tqdm(total=n_bytes, desc="Fetching", unit="B", unit_scale=True, delay=5.0, leave=False) as bar:
                for done in pool.map(self._get, lacking):
                    bar.update(done)
            for name, files in wanted.items():
                self._complete(self.store / name, files, bool(fetches[name]))
            if snapshot.order is not None and to_write:
                write_whole(self.store / "parts" / "order", snapshot.order)
        if not self._give_up:
            self.note(snapshot, blocks=to_write)

    def fetch_records(self) -> bool:
        """Fetches all of the store but its sketches; returns whether one is there."""
        snapshot = latest(self.objects)
        if snapshot is None or "" not in snapshot.stores:
            return False
        files = snapshot.stores[""]
        for place in _places(self.store, files):
            if place[0].name == "records.bin":
                self._get(place)
        self._complete(self.store, files, True)
        return True

    def note(self, snapshot: Snapshot, *, blocks: bool) -> None:
        """Notes that the copy and what is at the address are the same, unless the copy has more."""
        sent = all(
            name in snapshot.stores and (blocks or not name) and (_count(path) or 0) <= snapshot.stores[name].count
            for name, path in stores_in(self.store)
        )
        values = {"snapshot": snapshot.checksum, "blocks": blocks, "files": _stats(self.store) if sent else None}
        write_whole(self.directory / _STATE, json.dumps(values))

    def _known(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads((self.directory / _STATE).read_text(encoding="utf-8"))
            if isinstance(known, dict):
                return known
        return {}

    def _is_sent(self) -> bool:
        """Whether nothing changed since the copy was the same as what was at the address."""
        files = self._known().get("files")
        return files is not None and files == _stats(self.store)

    def _begins_like(self, wanted: dict[str, StoreFiles]) -> bool:
        """Whether the copy is of the store at the address, and no longer."""
        for name, files in wanted.items():
            path = self.store / name
            with contextlib.suppress(OSError):
                if (path / "manifest.json").read_text(encoding="utf-8") != files.manifest:
                    return False
            if (_count(path) or 0) > files.count:
                return False
        return True

    def _plan(self, path: Path, files: StoreFiles, pool: ThreadPoolExecutor) -> list[Lacking]:
        """What of a store is lacking, or is not as at the address.

        Raises:
            bpo.StoreError: Rows that were never sent differ.
        """
        places = list(_places(path, files))
        agree = list(pool.map(_agrees, places))
        count = 0 if self._is_sent() else _count(path) or 0
        if count:
            self._check_unsent(
                path, files, count, [place for place, same in zip(places, agree, strict=True) if not same]
            )
        return [place for place, same in zip(places, agree, strict=True) if not same]

    def _check_unsent(self, path: Path, files: StoreFiles, count: int, differing: list[Lacking]) -> None:
        """Checks that the rows of a copy are those at the address, as far as both go, before any is replaced."""
        other = (path / "manifest.json").read_text(encoding="utf-8") != files.manifest
        for file, begin, segment in differing:
            end = _bytes_of(path, file, files, min(count, files.count))
            with file.open("rb") as opened:
                opened.seek(begin)
                there = opened.read(max(0, min(end - begin, segment.n_bytes)))
            with contextlib.suppress(*self._left_out):
                other |= bool(there) and self._read(segment)[: len(there)] != there
        if other and len(_core.StoreReader(path).verify()) == 0:
            raise StoreError(
                f"{self.objects.shown} and its local copy {path} hold other rows, and those of the copy were never "
                "sent. Remove that directory to go on with what is at the address, or name another address."
            )

    def _get(self, lacking: Lacking) -> int:
        file, begin, segment = lacking
        try:
            data = self._read(segment)
        except self._left_out:
            return 0
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "r+b") as opened:
            opened.seek(begin)
            return opened.write(data)

    @property
    def _left_out(self) -> tuple[type[Exception], ...]:
        return (StoreDamagedError,) if self._give_up else ()

    def _read(self, segment: Segment) -> bytes:
        """Reads an object.

        Raises:
            bpo.StoreDamagedError: It is not as it was written.
        """
        place = f"{self.objects.shown}/{segment.object}"
        try:
            data = self.objects.read(segment.object, segment.n_bytes)
        except FileNotFoundError:
            raise StoreDamagedError(f"{place} is missing, and rows of the store are in it.") from None
        if len(data) != segment.n_bytes or hashlib.sha256(data).hexdigest() != segment.sha256:
            raise StoreDamagedError(f"{place} is not as it was written (its SHA-256 differs).")
        return data

    def damaged(self, snapshot: Snapshot) -> Iterator[str]:
        """Reads every object that counts, and yields what is wrong with each that is not as it was written."""

        def problem(segment: Segment) -> str | None:
            try:
                self._read(segment)
            except StoreDamagedError as error:
                return str(error)
            return None

        with ThreadPoolExecutor(_WORKERS) as pool:
            segments = [part for files in snapshot.stores.values() for part in (*files.rows, *files.records)]
            yield from filter(None, pool.map(problem, segments))

    def _complete(self, path: Path, files: StoreFiles, fetched: bool) -> None:
        """Makes a store of what was fetched: the counts of its rows come last, and the manifest of a new one."""
        rows, records = path / files.rows_name, path / "records.bin"
        if (_count(path) or 0) < files.count or fetched or not (path / "manifest.json").exists():
            for file in (rows, records):
                with file.open("ab"):
                    pass
                sync(file)
            if (_count(path) or 0) <= files.count:
                os.truncate(rows, _bytes_of(path, rows, files, files.count))
                with records.open("r+b") as opened:
                    opened.write(files.whole_header)
                os.truncate(records, _bytes_of(path, records, files, files.count))
                sync(records)
        for name in ("manifest.copy.json", "manifest.json"):
            if not (path / name).exists() or (path / name).read_text(encoding="utf-8") != files.manifest:
                with replacing(path / name) as scratch:
                    scratch.write_bytes(files.manifest.encode())


def stores_in(directory: Path) -> list[tuple[str, Path]]:
    """The store in a directory and its blocks that are being filled, by their names in a snapshot."""
    blocks = [found.parent for found in sorted(directory.glob("parts/*/manifest.json"))]
    whole = [("", directory)] if (directory / "manifest.json").exists() else []
    return [*whole, *((f"parts/{path.name}", path) for path in blocks)]


def _places(path: Path, files: StoreFiles) -> Iterator[Lacking]:
    for file, segments, begin in (
        (path / files.rows_name, files.rows, 0),
        (path / "records.bin", files.records, HEADER_BYTES),
    ):
        for segment in segments:
            yield file, begin, segment
            begin += segment.n_bytes


def _bytes_of(path: Path, file: Path, files: StoreFiles, count: int) -> int:
    """Where the first so many rows of a file end."""
    if file == path / "records.bin":
        return HEADER_BYTES + RECORD_BYTES * count
    return sum(segment.n_bytes for segment in files.rows) // max(1, files.count) * count


def _agrees(place: Lacking) -> bool:
    """Whether a file has already what belongs there."""
    file, begin, segment = place
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        opened.seek(begin)
        data = opened.read(segment.n_bytes)
        return len(data) == segment.n_bytes and hashlib.sha256(data).hexdigest() == segment.sha256
    return False


def _count(path: Path) -> int | None:
    """The rows of a store; None where there is none that is sound."""
    with contextlib.suppress(StoreError, OSError):
        return len(_core.StoreReader(path))
    return None


def _clear(directory: Path) -> None:
    """Removes the files of a store, but for the locks that are held."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if path.is_file() and path.name != "lock":
            path.unlink()


def _stats(directory: Path) -> list[list[Any]]:
    """What changes when a file does; all of the files of a directory but locks."""
    found = []
    for path in sorted(directory.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and path.name not in ("lock",):
                stat = path.stat()
                found.append([str(path.relative_to(directory)), stat.st_ino, stat.st_size, stat.st_mtime_ns])
    return found
