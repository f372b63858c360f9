"""What is at the address of a remote store: which objects, one after the other, are the files of a store.

A store grows, and objects do not. So its rows and records are put as segments, objects that never change, and a
manifest with a number, put last, says which segments count. The next manifest has the next number, and is put only
where there is none: of two writers the one that comes second learns that it did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import zlib
from typing import TYPE_CHECKING, Any

from bpo._core import StoreDamagedError, StoreError, StoreLockedError, StoreVersionError
from bpo.system.files import read_json

if TYPE_CHECKING:
    from bpo.store.objects import Objects

RECORD_BYTES = 72
HEADER_BYTES = 72
_FIXED_HEADER_BYTES = 24  # before the two counts of rows

ROWS = {"float32": ("rows.f32", 4), "float16": ("rows.f16", 2), "bfloat16": ("rows.bf16", 2), "int8": ("rows.i8", 1)}
"""Name of the file of sketches, and bytes of a number, of each type."""

SEGMENT_BYTES = 16 << 20
"""Most bytes of a segment, unless a row has more."""

_FORMAT = "bpo-remote-store"
_FORMAT_VERSION = 1
MANIFESTS = "manifests"
SEGMENTS = "segments"
_MOST_MANIFEST_BYTES = 256 << 20
_TRIES = 5

_NUMBER = re.compile(r"(\d{8})\.json")
_NAME = re.compile(r"[0-9a-f]{16}-\d{8}")
_STORE = re.compile(r"(parts/\d{6})?")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Some bytes of a file: the name of their object, how many, and their SHA-256 (hex)."""

    name: str
    n_bytes: int
    sha256: str

    @property
    def object(self) -> str:
        """Where it lies below the address."""
        return f"{SEGMENTS}/{self.name}"


@dataclasses.dataclass(frozen=True)
class StoreFiles:
    """The files of a store, or of a block of one that several processes fill.

    Attributes:
        manifest: The text of its manifest.json.
        header: The beginning of its records.bin, before the counts (hex).
        count: Its rows.
        rows: The segments of its sketches.
        records: The segments of its records, without the header.
    """

    manifest: str
    header: str
    count: int
    rows: tuple[Segment, ...]
    records: tuple[Segment, ...]

    @property
    def rows_name(self) -> str:
        """Name of the file of sketches."""
        return ROWS[json.loads(self.manifest)["dtype"]][0]

    @property
    def whole_header(self) -> bytes:
        """The header of records.bin of a store that was closed with so many rows."""
        return bytes.fromhex(self.header) + 2 * slot(self.count) + bytes(16)

    def check(self) -> None:
        """Checks that sizes agree and that names are such.

        Raises:
            ValueError: They do not.
        """
        described = json.loads(self.manifest)
        row_bytes = ROWS[described["dtype"]][1] * described["dim"]
        most = max(SEGMENT_BYTES, row_bytes)
        for segments, each in ((self.rows, row_bytes), (self.records, RECORD_BYTES)):
            if sum(segment.n_bytes for segment in segments) != each * self.count:
                raise ValueError("the sizes of its segments do not agree with its rows")
            for segment in segments:
                if not _NAME.fullmatch(segment.name) or not 0 < segment.n_bytes <= most:
                    raise ValueError(f"{segment.name!r} of {segment.n_bytes} bytes is no segment")
        if len(bytes.fromhex(self.header)) != _FIXED_HEADER_BYTES:
            raise ValueError("the header of its records is cut short")


def slot(count: int) -> bytes:
    """A count of rows as it stands in the header of records.bin."""
    number = count.to_bytes(8, "little")
    return number + zlib.crc32(number).to_bytes(4, "little") + bytes(4)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What counts at an address.

    Attributes:
        number: Of this manifest, from 1 on.
        writer: The process that put it.
        stores: The store by the name ``""``, and the blocks that are being filled by theirs, ``parts/000000``.
        order: What the numbers of the blocks mean; None without blocks.
    """

    number: int
    writer: str
    stores: dict[str, StoreFiles]
    order: str | None = None

    def segments(self) -> set[str]:
        """The objects that it needs."""
        return {part.object for files in self.stores.values() for part in (*files.rows, *files.records)}

    @property
    def checksum(self) -> str:
        """SHA-256 of all of it (hex)."""
        return _checksum(self._values())

    def to_bytes(self) -> bytes:
        """As it is put."""
        return json.dumps({**self._values(), "checksum": self.checksum}, indent=1).encode()

    def _values(self) -> dict[str, Any]:
        return {"format": _FORMAT, "format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def of(cls, data: bytes, place: str) -> Snapshot:
        """Reads what was put, and checks it.

        Raises:
            bpo.StoreError: It is damaged, or of another version.
        """
        try:
            values = read_json(data, place)
            if values["format"] != _FORMAT or values["format_version"] != _FORMAT_VERSION:
                raise StoreVersionError(
                    f"{place}: format {values['format']!r} version {values['format_version']!r} is not {_FORMAT!r} "
                    f"version {_FORMAT_VERSION}, which this bpo reads."
                )
            if values.pop("checksum") != _checksum(values):
                raise ValueError("its checksum differs")
            stores = {}
            for name, files in values["stores"].items():
                if not _STORE.fullmatch(name):
                    raise ValueError(f"{name!r} is no store")
                segments = {
                    kind: tuple(Segment(str(each["name"]), int(each["n_bytes"]), str(each["sha256"])) for each in given)
                    for kind, given in ((kind, files[kind]) for kind in ("rows", "records"))
                }
                stores[name] = StoreFiles(str(files["manifest"]), str(files["header"]), int(files["count"]), **segments)
                stores[name].check()
            order = values["order"]
            return cls(int(values["number"]), str(values["writer"]), stores, None if order is None else str(order))
        except StoreError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise StoreDamagedError(f"{place} is not as it was written: {error}") from None


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def latest(objects: Objects) -> Snapshot | None:
    """Returns what counts at an address; None where there is nothing.

    Raises:
        bpo.StoreError: It is damaged, or of another version.
        OSError: It cannot be read.
    """
    for _ in range(_TRIES):
        number = _latest_number(objects)
        if number == 0:
            if "manifest.json" in objects.names():
                raise StoreError(
                    f"{objects.shown} holds the files of a local store (manifest.json). Copy them to a directory, and "
                    "put that at another address by `bpo store merge ADDRESS DIRECTORY`."
                )
            return None
        with contextlib.suppress(FileNotFoundError):  # a later one has taken its place just now
            return _read(objects, number)
    raise StoreDamagedError(f"{objects.shown}/{_place(number)} is listed, and is not there.")


def publish(objects: Objects, snapshot: Snapshot) -> None:
    """Puts what counts from now on, if nobody else did since the one before.

    Raises:
        bpo.StoreLockedError: Somebody did.
        OSError: It cannot be written.
    """
    data = snapshot.to_bytes()
    if _latest_number(objects) == snapshot.number - 1:
        with contextlib.suppress(FileExistsError):
            objects.create(_place(snapshot.number), data)
    # Who has no conditional put, or is late by two, finds another one's here.
    numbers = _numbers(objects)
    there = _read(objects, max(numbers)) if numbers else None
    if there != snapshot:
        raise StoreLockedError(
            f"{objects.shown}: {'nothing is there any more' if there is None else f'process {there.writer}'} "
            f"{'' if there is None else 'has put rows there since this process did'}. What this one has is kept."
        )
    objects.remove(_place(number) for number in numbers if number < snapshot.number)


def segments_there(objects: Objects) -> set[str]:
    """Returns all segments at an address, whether they count or not."""
    return {f"{SEGMENTS}/{name}" for name in objects.names(SEGMENTS)}


def _read(objects: Objects, number: int) -> Snapshot:
    name = _place(number)
    return Snapshot.of(objects.read(name, _MOST_MANIFEST_BYTES), f"{objects.shown}/{name}")


def _numbers(objects: Objects) -> list[int]:
    return [int(found[1]) for name in objects.names(MANIFESTS) if (found := _NUMBER.fullmatch(name))]


def _latest_number(objects: Objects) -> int:
    return max(_numbers(objects), default=0)


def _place(number: int) -> str:
    return f"{MANIFESTS}/{number:08d}.json"
