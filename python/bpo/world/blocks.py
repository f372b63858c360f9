"""Work in numbered blocks, of which each process takes one that no other is at, until all are whole."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping

_Claimed = TypeVar("_Claimed")

_SECONDS_BETWEEN_LOOKS = 0.2


def taken_in_turns(
    numbers: Iterable[int],
    is_whole: Callable[[int], bool],
    claim: Callable[[int, contextlib.ExitStack], _Claimed | None],
    look: Callable[[list[int]], None],
) -> Generator[tuple[int, _Claimed], None, None]:
    """Yields blocks that no other process is at, until all are whole.

    Args:
        numbers: The blocks, in the order in which to try them.
        is_whole: Whether a block needs no more work.
        claim: Takes a block until the stack is left, which is when the next one is asked for; returns what is yielded
            with its number, or None where another process has it.
        look: Waits a moment for others, given the blocks that they are at.
    """
    todo = list(numbers)
    while todo:
        left = []
        for number in todo:
            if is_whole(number):
                continue
            with contextlib.ExitStack() as stack:
                claimed = claim(number, stack)
                if claimed is None:
                    left.append(number)
                else:
                    yield number, claimed
        if len(left) == len(todo):
            look(left)
        todo = left


class Watch:
    """Whether anything comes to files that other processes write to.

    Args:
        what: What is written, as an error names it.
        timeout: Seconds in which something must come.
    """

    def __init__(self, what: str, timeout: float) -> None:
        self._what = what
        self._timeout = timeout
        self._seen: dict[Path, list[int]] = {}
        self._since = time.monotonic()

    def look(self, workers: Mapping[Path, str]) -> None:
        """Waits a moment; files and directories that grew, or are others than before, start the time anew.

        Args:
            workers: Who is at each, as an error names it.

        Raises:
            TimeoutError: Nothing came for too long.
        """
        seen = {path: _sizes(path) for path in workers}
        if seen != self._seen:
            self._seen, self._since = seen, time.monotonic()
        if time.monotonic() - self._since > self._timeout:
            places = "; ".join(f"{worker} is at {path}" for path, worker in list(workers.items())[:4])
            raise TimeoutError(
                f"Nothing came to the {self._what} for {self._timeout:g} s (process_timeout): {places}. What was "
                "finished is kept; end that process, and run again to go on from there."
            )
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _sizes(path: Path) -> list[int]:
    """Bytes of a file, or of the files of a directory."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [file.stat().st_size for file in files]
    except OSError:
        return []


def worker_of(block: Path) -> str:
    """Who said last that it works at a block, in the file ``<name>.by`` beside it."""
    try:
        return f"process {block.with_suffix('.by').read_text()}"
    except OSError:
        return "another process"


def say_worker(block: Path, name: str) -> None:
    """Says who works at a block."""
    block.with_suffix(".by").write_text(name)


def take_away(directory: Path) -> None:
    """Takes the blocks in a directory away at once, so that nobody takes half of them for what is to be done."""
    directory.rename(directory.with_name(f"{directory.name}.done-{os.getpid()}"))
    tidy(directory)


def tidy(directory: Path) -> None:
    """Deletes what was taken away, also by a process that died over it."""
    for done in directory.parent.glob(f"{glob.escape(directory.name)}.done-*"):
        shutil.rmtree(done, ignore_errors=True)
