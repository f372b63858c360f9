"""What the first process tells the others, of any size: in pieces, which each process hands on to the next."""

from __future__ import annotations

import io
import pickle
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.system.packed import as_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

PIECE = 8 << 20
"""Bytes that are on their way at once, from each process to the next."""
AT_ONCE = 1 << 16
"""Bytes of a value that need no pieces."""
_WORD = 8
_FAILED = -1


class Parcel:
    """A value as bytes: tables of Arrow, those of data sets included, apart from the pickle of the rest.

    Tables of any size are sent batch by batch, where a pickle would be whole in memory, here and there; and that of a
    data set may say no more than where its file is, on the machine of the first process.

    Args:
        value: What to send.

    Raises:
        Exception: It cannot be pickled.
    """

    def __init__(self, value: Any) -> None:
        self._value = value
        counted = _Counted()
        pickler = _Pickler(counted)
        pickler.dump(value)
        self.tables = pickler.tables
        self.small = bytes(counted.start) if counted.size <= AT_ONCE and not self.tables else None

    def write(self, file: Any) -> None:
        """Writes tables and pickle."""
        for table in self.tables:
            for batches in ([], *([batch] for batch in _batches(table))):
                stream = _stream(table.schema, batches)
                file.write(len(stream).to_bytes(_WORD, "little"))
                file.write(stream)
            file.write(bytes(_WORD))
        _Pickler(file).dump(self._value)


def unpacked(file: Any, n_tables: int) -> Any:
    """Returns what :meth:`Parcel.write` wrote; tables that are large are on disk, mapped."""
    tables = []
    for _ in range(n_tables):
        streams = _streams(file)
        schema = next(streams).schema
        tables.append(as_table(schema, (batch for stream in streams for batch in stream)))
    return _Unpickler(file, tables).load()


def _stream(schema: pa.Schema, batches: list[pa.RecordBatch]) -> pa.Buffer:
    # In memory: where Arrow writes to a file of Python's that fails, it ends the process.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue()


def _streams(file: Any) -> Iterator[pa.RecordBatchStreamReader]:
    while size := int.from_bytes(file.read(_WORD), "little"):
        yield pa.ipc.open_stream(file.read(size))


class Chain:
    """Bytes from the first process to all, each of which hands them on: so each sends and gets them once.

    Args:
        rank: The number of this process.
        size: How many there are.
        group: Of ``torch.distributed``.
        connected: Within which they talk.
    """

    def __init__(self, rank: int, size: int, group: Any, connected: Callable[[], AbstractContextManager[None]]) -> None:
        self._rank, self._group, self._connected = rank, group, connected
        self._last = rank + 1 == size
        self._sending: list[tuple[Any, Any]] = []

    def put(self, count: int, piece: Any = None) -> None:
        """Begins to send a piece to the next process, once the piece before is gone."""
        import torch

        if self._last:
            return
        with self._connected():
            self.settle()
            for tensor in (torch.tensor([count]), piece):
                if tensor is not None:
                    work = torch.distributed.isend(tensor, self._rank + 1, group=self._group)
                    self._sending.append((work, tensor))  # which must live until it is gone

    def settle(self) -> None:
        """Waits until all is sent."""
        with self._connected():
            while self._sending:
                self._sending.pop(0)[0].wait()

    def take(self) -> tuple[int, Any]:
        """Waits for a piece of the process before, and hands it on; its number of bytes is 0 or less at the end."""
        import torch

        before, group = self._rank - 1, self._group
        with self._connected():
            count = torch.tensor([0])
            torch.distributed.recv(count, before, group=group)
            piece = None
            if count > 0:
                piece = torch.empty(int(count), dtype=torch.uint8)
                torch.distributed.recv(piece, before, group=group)
        self.put(int(count), piece)
        return int(count), piece


class Sender:
    """A file of the first process, which the others read as :class:`Receiver`."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._piece = bytearray()

    def write(self, data: Any) -> int:
        """Adds bytes; sends as many pieces as are full."""
        with memoryview(data).cast("B") as left:
            for first in range(0, len(left), PIECE):
                self._piece += left[first : first + PIECE]
                while len(self._piece) >= PIECE:
                    self._put()
            return len(left)

    def _put(self) -> None:
        import torch

        piece = torch.empty(min(len(self._piece), PIECE), dtype=torch.uint8)
        piece.numpy()[:] = np.frombuffer(self._piece, np.uint8, len(piece))
        del self._piece[: len(piece)]
        self._chain.put(len(piece), piece)

    def end(self, *, failed: bool) -> None:
        """Sends what is left, and that it is all, or that there will be no more."""
        if self._piece and not failed:
            self._put()
        self._chain.put(_FAILED if failed else 0)
        self._chain.settle()


class Receiver(io.RawIOBase):
    """What the first process writes, as a file."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._left: Any = np.empty(0, np.uint8)
        self._count: int | None = None

    @property
    def failed(self) -> bool:
        """Whether the first process came to no end."""
        return self._count == _FAILED

    def readable(self) -> bool:
        """Whether it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads some bytes; 0 at the end."""
        if not len(self._left) and not self._take():
            return 0
        count = min(len(buffer), len(self._left))
        buffer[:count] = memoryview(self._left[:count])
        self._left = self._left[count:]
        return count

    def _take(self) -> bool:
        if self._count is not None:
            return False
        count, piece = self._chain.take()
        if count <= 0:
            self._count = count
            self._chain.settle()
            return False
        self._left = piece.numpy()
        return True

    def drain(self) -> None:
        """Hands on all that is left, read or not."""
        while self._take():
            pass


class _Counted:
    """Where a pickle goes of which only the size counts, and the start."""

    def __init__(self) -> None:
        self.size, self.start = 0, bytearray()

    def write(self, data: Any) -> int:
        with memoryview(data).cast("B") as view:
            self.start += view[: AT_ONCE - len(self.start)]
            self.size += len(view)
            return len(view)


class _Pickler(pickle.Pickler):
    """Leaves the tables out."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=5)
        self.tables: list[pa.Table] = []
        self._numbers: dict[int, int] = {}
        datasets = sys.modules.get("datasets")
        self._of_data_sets: Any = () if datasets is None else datasets.table.Table

    def persistent_id(self, value: Any) -> tuple[int, bool] | None:
        """A number for a table, and whether it is that of a data set."""
        wrapped = isinstance(value, self._of_data_sets)
        if not wrapped and not isinstance(value, pa.Table):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tables)
            self.tables.append(value.table if wrapped else value)
        return self._numbers[id(value)], wrapped


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, tables: list[pa.Table]) -> None:
        super().__init__(file)
        self._tables = tables

    def persistent_load(self, place: tuple[int, bool]) -> Any:
        """The table of a number."""
        number, wrapped = place
        if not wrapped:
            return self._tables[number]
        from datasets.table import InMemoryTable

        return InMemoryTable(self._tables[number])


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """The rows of a table, as many at a time as are a piece."""
    for batch in table.to_batches():
        rows = max(batch.num_rows // max(-(-batch.nbytes // PIECE), 1), 1)
        for first in range(0, batch.num_rows, rows):
            yield batch.slice(first, rows)
