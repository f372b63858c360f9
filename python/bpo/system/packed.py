"""What is too long for memory: values and tables in files of the cache that have no name."""

from __future__ import annotations

import array
import itertools
import operator
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from bpo.system.files import ArrowFile, cache, naming_file

if TYPE_CHECKING:
    import numpy.typing as npt

IN_MEMORY = 64 << 20
"""Bytes of a column of the data that are kept in memory; what is longer is on disk."""
_WRITTEN_AT_ONCE = 1 << 20
_READ_AT_ONCE = 256  # records

_Item = TypeVar("_Item")


class Packed(Sequence[_Item], Generic[_Item]):
    """Values as bytes, one after another: in memory while they are few, else in a file of the cache without a name.

    Reads as a list does, and equals one. A value costs 8 bytes of memory beside its own, and 8 more in a selection.

    Args:
        pack: Value to bytes.
        unpack: Bytes to value.
        items: The first values.

    Example:
        >>> texts = Packed(str.encode, bytes.decode, ["a", "bc", ""])
        >>> texts[1], texts[1:], texts.take(np.array([2, 0])) == ["", "a"], texts.sizes().tolist()
        ('bc', ['bc', ''], True, [1, 2, 0])
    """

    def __init__(
        self, pack: Callable[[_Item], bytes], unpack: Callable[[bytes], _Item], items: Iterable[_Item] = ()
    ) -> None:
        self._pack = pack
        self._unpack = unpack
        self._bytes = _Bytes()
        self._ends = array.array("q", [0])
        self._chosen: npt.NDArray[np.int64] | None = None
        for item in items:
            self.append(item)

    def append(self, item: _Item) -> None:
        """Adds a value at the end; not to what :meth:`take` gave.

        Raises:
            OSError: The disk of the cache has no room.
        """
        assert self._chosen is None
        self._ends.append(self._bytes.write(self._pack(item)))

    def take(self, index: npt.NDArray[np.int64]) -> Packed[_Item]:
        """Returns some values, in the order given, without copying them."""
        taken = Packed(self._pack, self._unpack)
        taken._bytes, taken._ends = self._bytes, self._ends
        taken._chosen = index if self._chosen is None else self._chosen[index]
        return taken

    def sizes(self) -> npt.NDArray[np.int64]:
        """Returns how many bytes each value has, (n,) int64."""
        ends = np.array(self._ends, dtype=np.int64)
        sizes: npt.NDArray[np.int64] = ends[1:] - ends[:-1]
        return sizes if self._chosen is None else sizes[self._chosen]

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> _Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...

    def __getitem__(self, index: int | slice) -> _Item | list[_Item]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = operator.index(index)
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"{index} of {len(self)} values")
        record = place if self._chosen is None else int(self._chosen[place])
        return self._unpack(self._bytes.read(self._ends[record], self._ends[record + 1]))

    def __iter__(self) -> Iterator[_Item]:
        for first in range(0, len(self), _READ_AT_ONCE):
            if self._chosen is None:
                ends = self._ends[first : first + _READ_AT_ONCE + 1]
                places = list(itertools.pairwise(ends))
            else:
                records = self._chosen[first : first + _READ_AT_ONCE].tolist()
                places = [(self._ends[record], self._ends[record + 1]) for record in records]
            begin, last = min(start for start, _ in places), max(end for _, end in places)
            if last - begin > 4 * sum(end - start for start, end in places) + _WRITTEN_AT_ONCE:
                # Far from one another.
                yield from (self._unpack(self._bytes.read(start, end)) for start, end in places)
                continue
            data = self._bytes.read(begin, last)
            for start, end in places:
                yield self._unpack(data[start - begin : end - begin])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self[:3]!r}" if len(self) <= 3 else f"[{', '.join(map(repr, self[:3]))}, … ({len(self):,})]"

    def __reduce__(self) -> tuple[Any, ...]:
        return Packed, (self._pack, self._unpack, list(self))


class _Bytes:
    """Bytes that grow at their end."""

    def __init__(self) -> None:
        self._end = bytearray()  # what is not in the file
        self._in_file = 0
        self._file: Any = None

    def write(self, data: bytes) -> int:
        """Adds bytes and returns where they end."""
        self._end += data
        if len(self._end) >= (IN_MEMORY if self._file is None else _WRITTEN_AT_ONCE):
            self._put_down()
        return self._in_file + len(self._end)

    def _put_down(self) -> None:
        directory = scratch()
        with naming_file(directory):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - open as long as this
            left = memoryview(self._end)
            try:
                while left:
                    left = left[self._file.write(left) :]
            finally:
                left.release()
        self._in_file += len(self._end)
        self._end = bytearray()

    def read(self, start: int, end: int) -> bytes:
        """Returns the bytes from one place to another; processes that were forked may do so at the same time."""
        if start >= self._in_file:
            return bytes(self._end[start - self._in_file : end - self._in_file])
        data = b""
        while len(data) < min(end, self._in_file) - start:
            data += _read_at(self._file, min(end, self._in_file) - start - len(data), start + len(data))
        return data if end <= self._in_file else data + self._end[: end - self._in_file]


def _read_at(file: Any, count: int, place: int) -> bytes:
    """Reads at most so many bytes at a place."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), count, place)
    file.seek(place)  # on Windows, where nothing is forked; whoever writes does so at the end
    data: bytes = file.read(count)
    file.seek(0, os.SEEK_END)
    return data


def scratch() -> Any:
    """Returns the directory for what does not fit into memory: ``scratch`` in the cache, which is made."""
    directory = cache() / "scratch"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def as_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """Returns a table of batches: in memory where they are few, else mapped from a file of the cache without a name.

    Raises:
        OSError: The disk of the cache has no room.
    """
    kept, size, rest = [], 0, iter(batches)
    for batch in rest:
        kept.append(batch)
        size += batch.nbytes
        if size >= IN_MEMORY:
            break
    else:
        return pa.Table.from_batches(kept, schema).combine_chunks()
    # Windows takes no mapped file away.
    with tempfile.TemporaryDirectory(dir=scratch(), ignore_cleanup_errors=True) as directory:
        file = ArrowFile(scratch() / directory / "table")
        try:
            with pa.ipc.new_stream(file, schema) as writer:
                for batch in itertools.chain(kept, rest):
                    writer.write_batch(batch)
                    file.check()
        finally:
            file.close()
        return pa.ipc.open_stream(pa.memory_map(str(scratch() / directory / "table"))).read_all()
