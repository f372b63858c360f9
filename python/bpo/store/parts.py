"""A store filled block by block: by one process in order, or by several at once, a block in a store of its own first.

The blocks lie in ``parts/`` within the store until all are whole, and then go into it in their order, so that its bytes
do not depend on how many processes there were. Whoever works at a block holds the lock of its store, which the system
lets go of when the process dies, however it dies: others see that and go on after the last row that was committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bpo._core import StoreError, StoreLockedError
from bpo.store.gradient_store import GradientStore
from bpo.store.writer import GradientWriter
from bpo.world.blocks import Watch, say_worker, take_away, taken_in_turns, tidy, worker_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    import numpy.typing as npt

_PARTS = "parts"
_ORDER = "order"  # what the numbers of the blocks mean

Work = tuple[GradientWriter, "npt.NDArray[np.int64]"]
"""Where rows are to be added, and the sequences, in order, that are lacking there."""


class Parts:
    """The blocks of a store.

    Args:
        writer: The store, which is there.
        blocks: The sequences of each block, in the order in which the store keeps them; together all that it
            is to hold.
        ids: (S, 16) uint8, of all sequences of the data.
    """

    def __init__(
        self, writer: GradientWriter, blocks: Sequence[npt.NDArray[np.int64]], ids: npt.NDArray[np.uint8]
    ) -> None:
        self._writer = writer
        self._blocks = blocks
        self._ids = ids
        self._wanted = ids[np.concatenate(blocks)] if len(blocks) else ids[:0]
        self._directory = writer.path / _PARTS
        self._order = hashlib.sha256(b"".join(ids[block].tobytes() + b"|" for block in blocks)).hexdigest()

    def take_leftovers(self) -> bool:
        """Puts what an interrupted run left into the store, where no more is lacking, or where its blocks are others.

        Returns:
            Whether the store has rows that it had not.

        Raises:
            bpo.StoreLockedError: Another process is writing.
        """
        tidy(self._directory)
        if not self._directory.is_dir():
            return False
        if self._writer.lacks(self._wanted).any():
            if self._order_there() == self._order:
                return False
            self.check_idle()
            self._take_all()
            return True
        with contextlib.suppress(StoreLockedError, OSError):  # which takes nothing from who only reads
            self.check_idle()
            self._take_all()
        return False

    def _take_all(self) -> None:
        """Puts the blocks into the store in their order."""
        with self._writer.again() as writer:
            writer.lock()
            for path in self._there():
                writer.take(GradientStore(path))
            self._remove()

    def check_idle(self) -> None:
        """Checks that no process is at a block.

        Raises:
            bpo.StoreLockedError: One is.
        """
        for path in self._there():
            with self._writer.part(path) as part:
                part.lock()

    def _there(self) -> list[Path]:
        """The blocks that were begun, in their order."""
        return sorted(path.parent for path in self._directory.glob("*/manifest.json"))

    def share(self) -> None:
        """Makes the store, and room in it for blocks, of which several processes may then take one each.

        Raises:
            bpo.StoreLockedError: Another process is writing.
        """
        self.take_leftovers()
        with self._writer.again() as writer:
            if not (writer.path / "manifest.json").exists():
                writer.lock()
            if self._directory.is_dir() or not writer.lacks(self._wanted).any():
                return
        fresh = self._directory.with_name(f"{_PARTS}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        (fresh / _ORDER).write_text(self._order)
        fresh.rename(self._directory)

    def in_order(self) -> Generator[Work, None, None]:
        """Yields what is lacking, block after block, for one process that has the lock and adds it to the store itself.

        Rows of blocks that several processes began go into the store before the rest of their block does.
        """
        for number in range(len(self._blocks)):
            part = self._part(number)
            if (part / "manifest.json").is_file():
                self._writer.take(GradientStore(part))
            lacking = self._lacking(number)
            if len(lacking):
                yield self._writer, lacking
        self._writer.commit()
        self._remove()

    def check_seen(self, name: str) -> None:
        """Checks that a process, as others name it, sees what the first one has made.

        Raises:
            FileNotFoundError: It does not.
        """
        if not self._directory.is_dir() and not (self._writer.path / "manifest.json").exists():
            raise FileNotFoundError(
                f"Process {name} does not see the gradient store {self._writer.path}, which process 0 has just made: "
                "name a directory on a disk that all processes see. On disks of their own each machine fills a share "
                "(bpo collect --shard)."
            )

    def claimed(
        self, start: int, name: str, timeout: float, found: Callable[[npt.NDArray[np.int64]], object]
    ) -> Generator[Work, None, None]:
        """Yields blocks that no other process is at, until all are whole and in the store.

        Args:
            start: The block to look at first, so that processes do not all look at the same.
            name: This process, as others name it.
            timeout: Seconds in which something must come to the blocks that others are at.
            found: Called with the sequences of each block that others made whole.

        Raises:
            TimeoutError: Nothing came; the message says who is at what.
        """
        self.check_seen(name)
        first = start % max(1, len(self._blocks))
        numbers = [*range(first, len(self._blocks)), *range(first)]
        lacking = {number: self._lacking(number) for number in numbers}
        watch = Watch("gradient store", timeout)

        def is_whole(number: int) -> bool:
            whole = self._is_whole(number, lacking[number])
            if whole:
                found(lacking[number])
            return whole

        def look(left: list[int]) -> None:
            watch.look({self._part(number): worker_of(self._part(number)) for number in left})

        def claim(number: int, stack: contextlib.ExitStack) -> GradientWriter | None:
            return self._claim(number, name, stack)

        with contextlib.closing(taken_in_turns(numbers, is_whole, claim, look)) as turns:
            for number, part in turns:
                wanted = lacking[number]
                rest = wanted[part.lacks(self._ids[wanted])]
                found(wanted[~np.isin(wanted, rest)])
                if len(rest):
                    yield part, rest
        while self._directory.is_dir() and not self._gathered():
            watch.look({self._writer.path: "another process"})

    def _is_whole(self, number: int, lacking: npt.NDArray[np.int64]) -> bool:
        """Whether a block needs no more work."""
        if not len(lacking) or not self._directory.is_dir():  # or all went into the store meanwhile
            return True
        with contextlib.suppress(FileNotFoundError):
            return bool((GradientStore(self._part(number)).rows_of(self._ids[lacking]) >= 0).all())
        return False

    def _claim(self, number: int, name: str, stack: contextlib.ExitStack) -> GradientWriter | None:
        """Takes a block until ``stack`` is left; None where another process has it."""
        path = self._part(number)
        made = False
        try:
            path.mkdir(exist_ok=True)  # not what it is in, which is gone once all is done
            made = not (path / "manifest.json").exists()
            part = stack.enter_context(self._writer.part(path))
            part.lock()
            say_worker(path, name)
        except (FileNotFoundError, StoreLockedError):
            return None
        except StoreError:
            if made and (path / "manifest.json").exists():  # another one made it at this moment
                return None
            raise
        return part

    def _gathered(self) -> bool:
        """Puts the blocks into the store; returns False where another process is at it."""
        try:
            self._take_all()
        except StoreLockedError:
            return False
        return True

    def _lacking(self, number: int) -> npt.NDArray[np.int64]:
        """The sequences of a block that the store lacks, as far as its writer knows."""
        block = self._blocks[number]
        return block[self._writer.lacks(self._ids[block])]

    def _part(self, number: int) -> Path:
        return self._directory / f"{number:06d}"

    def _order_there(self) -> str:
        try:
            return (self._directory / _ORDER).read_text()
        except FileNotFoundError:
            return ""

    def _remove(self) -> None:
        if self._directory.is_dir():
            take_away(self._directory)


def check_shared(path: str | os.PathLike[str] | None) -> None:
    """Checks that processes of one job name a store.

    Raises:
        ValueError: They do not.
    """
    if path is None:
        raise ValueError(
            "Several processes that work together need a gradient store: name a directory that all see, or an address "
            "(store). On disks of their own each machine fills a share (bpo collect --shard)."
        )
