"""Sending what comes to the local copy of a store to its address, while it is filled and at the end."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo._core import StoreDamagedError, StoreError
from bpo.store.mirror import Mirror, stores_in
from bpo.store.snapshot import (
    HEADER_BYTES,
    RECORD_BYTES,
    ROWS,
    SEGMENT_BYTES,
    Segment,
    Snapshot,
    StoreFiles,
    publish,
    segments_there,
)
from bpo.system.files import write_whole
from bpo.system.paths import is_url
from bpo.system.warn import warn
from bpo.world.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Rows that are lost where a machine is lost with its disk.
_SECONDS_BETWEEN_UPLOADS = 30.0

# Sent before a manifest says so, so that an upload that is interrupted goes on from there.
_STEP_BYTES = 256 << 20

_WORKERS = 8  # each has a segment in memory

_BY_ITSELF = World(0, 1, 1)


class Upload:
    """Sends the rows that come to a copy, at times and when it is finished.

    Args:
        mirror: The copy, as it was fetched.
        snapshot: What was at the address then; None where nothing was.
        anew: Whether to send everything, all before it counts, since rows that are there change.
    """

    def __init__(self, mirror: Mirror, snapshot: Snapshot | None, *, anew: bool = False) -> None:
        self._mirror = mirror
        self._last = snapshot
        self._anew = anew
        self._token = secrets.token_hex(8)  # in the name of each of its objects, which so has no other's
        self._n_objects = 0
        self._seen: set[str] | None = None  # segments that nothing may need any more once this has sent all
        self._finished = threading.Event()
        self._failed: Exception | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="bpo-upload", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises what no later try will mend.

        Raises:
            bpo.StoreLockedError: Another process writes to the address.
            bpo.StoreError, PermissionError: Rows are damaged, or may not be sent.
        """
        if self._failed is not None:
            raise self._failed

    def stop(self) -> None:
        """Ends the thread, once it has sent what it is at."""
        self._finished.set()
        self._thread.join()

    def finish(self) -> None:
        """Sends the rest, and takes away what nothing needs any more.

        Raises:
            bpo.StoreLockedError: Another process writes to the address.
            OSError: Something cannot be sent; what was sent before is kept, and the next run goes on from there.
        """
        self.stop()
        self.check()
        self._send()
        if self._last is not None:
            self._mirror.objects.remove((self._seen or set()) - self._last.segments())
            self._mirror.note(self._last, blocks=True)

    def _run(self) -> None:
        while self._failed is None and not self._finished.wait(_SECONDS_BETWEEN_UPLOADS):
            self._try()

    def _try(self) -> None:
        try:
            self._send()
        except (StoreError, PermissionError) as error:
            self._failed = error
        except Exception as error:
            if not self._told:
                warn(f"What was computed cannot be sent now, and is tried again: {error}")
                self._told = True

    def _send(self) -> None:
        """Sends what is not there yet, step by step."""
        while (snapshot := self._step()) is not None:
            if self._seen is None:
                # Whoever puts more of them before the next manifest is late; who goes on from that has others.
                self._seen = segments_there(self._mirror.objects)
            publish(self._mirror.objects, snapshot)
            self._anew = False
            self._seen |= snapshot.segments()
            self._last = snapshot

    def _step(self) -> Snapshot | None:
        """Sends some of what is lacking; returns what then counts, or None where nothing is lacking."""
        there = {} if self._last is None or self._anew else self._last.stores
        room = 1 << 62 if self._anew else _STEP_BYTES
        found: dict[str, StoreFiles] = {}
        # Blocks are listed before the store is looked at, which has all of their rows before the first of them goes.
        stores = stores_in(self._mirror.store)[::-1]
        order = None
        try:
            if any(name for name, _ in stores):
                order = (self._mirror.store / "parts" / "order").read_text(encoding="utf-8")
            for name, path in stores:
                found[name] = files = self._sent(path, there.get(name), room)
                room -= _added(files, there.get(name))
        except FileNotFoundError:
            return None  # the blocks go into the store at this moment
        if found == there or not found:
            return None
        number = 1 if self._last is None else self._last.number + 1
        return Snapshot(number, f"{os.getpid()} on {platform.node()}", found, order)

    def _sent(self, path: Path, there: StoreFiles | None, room: int) -> StoreFiles:
        """Sends the next rows of a store, of up to so many bytes; returns what then is there of it."""
        reader = _core.StoreReader(path)
        manifest = (path / "manifest.json").read_text(encoding="utf-8")
        with (path / "records.bin").open("rb") as file:
            header = file.read(HEADER_BYTES)[:24].hex()
        if there is None or there.manifest != manifest or there.count > len(reader):
            there = StoreFiles(manifest, header, 0, (), ())
        row_bytes = ROWS[reader.dtype][1] * reader.dim
        count = min(len(reader), there.count + max(0, room) // (row_bytes + RECORD_BYTES))
        if count == there.count:
            return there
        wanted = np.zeros(len(reader), dtype=bool)
        wanted[there.count : count] = True
        if len(damaged := reader.verify(wanted)):
            raise StoreDamagedError(
                f"{path}: row {damaged[0]} and {len(damaged) - 1} more are damaged, so they are not sent to "
                f"{self._mirror.objects.shown}. Mend them with `bpo store repair {path}`."
            )
        rows = self._put(reader.rows_path, there.count * row_bytes, count * row_bytes, row_bytes)
        begin, end = (HEADER_BYTES + RECORD_BYTES * each for each in (there.count, count))
        records = self._put(path / "records.bin", begin, end, RECORD_BYTES)
        return StoreFiles(manifest, header, count, there.rows + rows, there.records + records)

    def _put(self, file: Path, begin: int, end: int, unit: int) -> tuple[Segment, ...]:
        """Sends some bytes of a file as segments of whole units."""
        step = max(1, SEGMENT_BYTES // unit) * unit
        jobs = []
        for offset in range(begin, end, step):
            self._n_objects += 1
            jobs.append((f"{self._token}-{self._n_objects:08d}", offset, min(step, end - offset)))

        def put(job: tuple[str, int, int]) -> Segment:
            name, offset, n_bytes = job
            with file.open("rb") as opened:
                opened.seek(offset)
                data = opened.read(n_bytes)
            segment = Segment(name, n_bytes, hashlib.sha256(data).hexdigest())
            self._mirror.objects.write(segment.object, data)
            return segment

        with ThreadPoolExecutor(_WORKERS) as pool:
            return tuple(pool.map(put, jobs))


def _added(files: StoreFiles, there: StoreFiles | None) -> int:
    before = 0 if there is None else sum(part.n_bytes for part in (*there.rows, *there.records))
    return max(0, sum(part.n_bytes for part in (*files.rows, *files.records)) - before)


@contextlib.contextmanager
def writing(
    store: str | os.PathLike[str] | None,
    processes: World = _BY_ITSELF,
    timeout: float = 0.0,
    *,
    anew: bool = False,
) -> Iterator[tuple[Path | None, Callable[[], None]]]:
    """Gives the directory in which a store can be filled: of one at an address the local copy, which is then sent.

    Of the processes of a job the first fetches and sends; all must see its copy.

    Args:
        store: Directory or address; None where there is to be none.
        processes: Those that fill it together, all of which call this.
        timeout: Seconds to wait for them.
        anew: Whether to mend what is at the address: what is damaged there is left out, and all is sent again.

    Yields:
        The directory, and what is to be called now and then: it raises what makes all further work vain.

    Raises:
        ValueError: The processes name different addresses, or do not see the same copy.
        bpo.StoreError, OSError: As :meth:`bpo.store.mirror.Mirror.fetch`.
    """
    if store is None or not is_url(store):
        yield None if store is None else Path(store), lambda: None
        return
    processes.check_same({"store": os.fspath(store)}, timeout)
    uploads: list[Upload] = []

    def begin() -> tuple[Path, str]:
        mirror = Mirror(os.fspath(store), give_up=anew)
        uploads.append(Upload(mirror, mirror.fetch(to_write=True), anew=anew))
        mirror.directory.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(8)
        write_whole(mirror.directory / "job", token)
        return mirror.store, token

    try:
        path, token = processes.from_main(begin)
        sight = f"sight of {path.parent} (BPO_CACHE must name a directory on a disk that all processes see)"
        processes.check_same({sight: _text(path.parent / "job") == token}, timeout)
        yield path, uploads[0].check if uploads else lambda: None
    except BaseException as error:
        for upload in uploads:
            upload.stop()
            # What is there already is worth its while to a run on another machine, but not to who pressed Ctrl-C.
            if not isinstance(error, KeyboardInterrupt):
                with contextlib.suppress(Exception):
                    upload.finish()
        raise
    processes.from_main(lambda: uploads[0].finish())


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8")
    return ""
