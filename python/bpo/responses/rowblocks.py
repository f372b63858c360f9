"""Rows of a file that one process makes, or several at once: a block in a file of its own first."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.system.files import flattened
from bpo.system.identity import NOT_COMPARED
from bpo.world.blocks import Watch, say_worker, take_away, taken_in_turns, tidy, worker_of
from bpo.world.world import alone

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from bpo.responses.prompts import PromptResponses
    from bpo.responses.rowfile import RowFile
    from bpo.world.world import World

# Each is a few files for as long as others are not whole.
_MOST_BLOCKS = 1000


@dataclasses.dataclass(frozen=True)
class Work:
    """Rows to be made for a file.

    Attributes:
        blocks: The rows of the data, by index, that a process of a job takes at a time; together all.
        known: Lays the rows out that the file has already; returns the indices of those that are to be made.
        make: Yields rows that are asked for by index, each with its index as soon as it is finished.
        found: Is told of rows that other processes made.
        settings_now: Returns the settings of the file as they are now, where the work may change them.
    """

    blocks: Sequence[Sequence[int]]
    known: Callable[[], list[int]]
    make: Callable[[Sequence[int]], Generator[tuple[int, Mapping[str, Any]], None, None]]
    found: Callable[[Sequence[int]], object]
    settings_now: Callable[[], Mapping[str, Any]] | None = None


def check_same_rows(
    job: World,
    rows: Sequence[PromptResponses],
    ids: Sequence[str],
    settings: Mapping[str, Any],
    output: str | os.PathLike[str] | None,
    timeout: float,
) -> None:
    """Waits for all processes of a job, and checks that they are about to make the same rows.

    Raises:
        TimeoutError: One did not come.
        ValueError: One came with something else; the message names it.
    """
    if job.size == 1:
        return
    columns = [row.columns for row in rows]
    data = hashlib.sha256(json.dumps([list(ids), columns], sort_keys=True).encode()).hexdigest()
    same = {
        "version of bpo": bpo.__version__,
        "data set": data,
        "output": None if output is None else Path(output).name,
        **{name: value for name, value in flattened(settings).items() if not str(value).startswith(NOT_COMPARED)},
    }
    job.check_same(same, timeout)


def fill(file: RowFile, work: Work, job: World, timeout: float) -> list[dict[str, Any]]:
    """Makes the rows that a file lacks, alone or with the other processes of a job, and finishes the file.

    Of several processes each takes a block that no other is at, and writes its rows to a file of the block in
    ``<name>.parts/`` beside the other one, which anybody goes on with if it dies. Once all blocks are whole, one of
    them puts them together. Without a file each takes the next block, and all exchange what they made.

    Args:
        file: Where the rows go.
        work: What there is to do.
        job: The processes, which have been found to be given the same.
        timeout: Seconds in which something must come to the blocks that others are at.

    Returns:
        All rows in the order of the data, without their ids, in each process.

    Raises:
        BlockingIOError: A process of no job, or of another, is at the file.
        TimeoutError: Nothing came from the others; the message says who is at what.
        FileNotFoundError: One of them does not see the file.
        ConnectionError: One of them died where all are needed.
    """
    if file.path is None:
        _fill_in_memory(file, work, job)
        return file.finish()
    blocks = _Blocks(file, file.path, work)
    if job.size == 1:
        with file:
            blocks.take_leftovers()
            _make(file, work.known(), work)
            return file.finish()
    blocks.share(job)
    watch = Watch(f"file {file.path}", timeout)
    with contextlib.closing(blocks.claimed(job, watch)) as claimed:
        for block, lacking in claimed:
            with alone():
                _make(block, lacking, work)
    while blocks.are_there() and not blocks.put_together():
        watch.look({file.path: "another process"})
    file.read()
    work.known()
    if any(row_id not in file.rows for row_id in file.ids):
        raise BlockingIOError(f"{file.path}: another run took what was finished; run again to go on from there.")
    return file.in_order()


def in_blocks(pieces: Sequence[Sequence[int]]) -> list[list[int]]:
    """Joins pieces of work to at most a thousand blocks, each of as many pieces, as the data and the settings say.

    Example:
        >>> in_blocks([[0, 1], [2]])
        [[0, 1], [2]]
        >>> len(in_blocks([[index] for index in range(2500)]))
        834
    """
    size = max(1, -(-len(pieces) // _MOST_BLOCKS))
    return [list(itertools.chain(*pieces[start : start + size])) for start in range(0, len(pieces), size)]


def _make(file: RowFile, indices: Sequence[int], work: Work) -> None:
    try:
        with contextlib.closing(work.make(indices)) as made:
            for index, row in made:
                file.add(file.ids[index], row)
    finally:
        if work.settings_now is not None:
            file.allow_changes(work.settings_now())


def _fill_in_memory(file: RowFile, work: Work, job: World) -> None:
    todo = work.known()
    if job.size == 1:
        _make(file, todo, work)
        return
    wanted = set(todo)
    made: dict[int, Mapping[str, Any]] = {}
    failed: Exception | None = None
    try:
        for number in job.numbers(len(work.blocks)):
            with alone():
                made.update(work.make([index for index in work.blocks[number] if index in wanted]))
    except Exception as error:
        failed = error
    for rows in job.exchanged(failed or made):
        for index, row in rows.items():
            file.add(file.ids[index], row)


class _Blocks:
    """The blocks of a file, in a directory that is there until all are whole and in the file."""

    def __init__(self, file: RowFile, path: Path, work: Work) -> None:
        self._file = file
        self._path = path
        self._work = work
        self._directory = path.with_suffix(".parts")
        self._shares: dict[int, list[int]] = {}

    def are_there(self) -> bool:
        return self._directory.is_dir()

    def share(self, job: World) -> None:
        """Makes room for blocks if anything is lacking, and finds out what.

        Raises:
            FileNotFoundError: One of the processes does not see the file.
        """
        job.from_main(self._make_room)
        self._file.read()
        todo = set(self._work.known())
        failed = None
        if todo and not self.are_there():
            failed = FileNotFoundError(
                f"Process {job.name} does not see {self._directory}, which process 0 has just made: name a file on a "
                "disk that all processes see."
            )
        job.exchanged(failed or True)  # nobody begins before all have read, and so know of the same rows
        shares = ([index for index in block if index in todo] for block in self._work.blocks)
        self._shares = {number: share for number, share in enumerate(shares) if share}

    def _make_room(self) -> None:
        with self._file:
            self.take_leftovers()
            if self._work.known():
                self._directory.mkdir()

    def claimed(self, job: World, watch: Watch) -> Generator[tuple[RowFile, list[int]], None, None]:
        """Yields the files of blocks that no other process is at, with what they lack, until all are whole.

        Args:
            job: The processes.
            watch: What sees whether the others do anything.
        """

        def claim(number: int, stack: contextlib.ExitStack) -> RowFile | None:
            return self._claim(number, job.name, stack)

        def look(left: list[int]) -> None:
            watch.look({self._block(number): worker_of(self._block(number)) for number in left})

        numbers = list(self._shares)
        first = job.rank * len(numbers) // job.size
        numbers = [*numbers[first:], *numbers[:first]]
        with contextlib.closing(taken_in_turns(numbers, self._is_whole, claim, look)) as turns:
            for number, block in turns:
                lacking = self._lacking(number, block)
                self._work.found(sorted({*self._shares[number]}.difference(lacking)))
                if lacking:
                    yield block, lacking

    def _block(self, number: int) -> Path:
        return self._directory / f"{number:06d}.jsonl"

    def _lacking(self, number: int, block: RowFile) -> list[int]:
        return [index for index in self._shares[number] if self._file.ids[index] not in block.rows]

    def _is_whole(self, number: int) -> bool:
        block = self._file.block(self._block(number))
        with self._unless_gone():
            block.read()
        whole = not self._lacking(number, block) or not self.are_there()
        if whole:
            self._work.found(self._shares[number])
        return whole

    def _claim(self, number: int, name: str, stack: contextlib.ExitStack) -> RowFile | None:
        """Takes a block until ``stack`` is left; None where another process has it."""
        block = self._file.block(self._block(number))
        with contextlib.suppress(BlockingIOError), self._unless_gone():
            stack.enter_context(block)
            say_worker(self._block(number), name)
            if self.are_there():  # so what was read was all that there is
                return block
        return None

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Suppresses what is said of files that are gone, since all are whole and in the file."""
        try:
            yield
        except (FileNotFoundError, FileExistsError):
            if self.are_there():
                raise

    def put_together(self) -> bool:
        """Puts the rows of all blocks into the file; returns False where another process is at it."""
        with contextlib.suppress(BlockingIOError), self._file:
            if self.are_there():
                changes = self._read_all()
                self._work.known()
                self._file.note_changes(changes)
                self._file.finish()
                take_away(self._directory)
            return True
        return False

    def take_leftovers(self) -> None:
        """Takes the rows of blocks that an interrupted run left.

        Raises:
            BlockingIOError: A process is at one.
        """
        tidy(self._directory)
        if self.are_there():
            changes = self._read_all()
            self._file.note_changes(changes)
            if self._file.rows:
                self._file.write_anew()
            take_away(self._directory)

    def _read_all(self) -> list[str]:
        """Adds the rows of all blocks to those of the file; returns which settings have changed over them."""
        changes: dict[str, None] = {}
        rows = {path.name for path in self._directory.glob("[0-9]*.jsonl")}
        # Of a block that has no row yet, but a process at work.
        locks = {path.name[1:].removesuffix(".lock") for path in self._directory.glob(".[0-9]*.jsonl.lock")}
        for name in sorted(rows | locks):
            with self._file.block(self._directory / name) as block:
                self._file.rows.update(block.rows)
                changes.update(dict.fromkeys(block.changes))
        return list(changes)
