"""Work on pairs that the processes of a job share, each with the rows of its own, with the result of one process."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bpo.world.world import alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt
    import torch

    from bpo.world.world import World

_Result = TypeVar("_Result")

# Bytes that go with the word of each process, as a second answer would take as long again; more are sent one after the
# other.
_WITH_A_WORD = 1 << 12
_WORD = 8
# What a process says in place of a number of bytes.
_FAILED = -1
WORD_BYTES = _WORD + _WITH_A_WORD
"""Bytes that a process sends to each other whenever they agree."""


class Shares:
    """What processes tell each other that make the same calls in the same order, each about rows of its own.

    The core takes it as ``processes``. Nothing is added up on the way: what is folded in an order is folded in turn, so
    results are those of one process to the bit. Before anything is sent each says that it is well; so where one fails,
    all hear of it there and end with its error, and nobody waits for what will not come.

    Attributes:
        rank: The number of this process, from 0 on.
        size: How many there are.
    """

    def __init__(self, processes: World) -> None:
        self.rank, self.size = processes.rank, processes.size
        self._processes = processes
        self._ended = False

    def part(self, count: int) -> slice:
        """Which of so many things are this process's."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def gather(self, own: bytes) -> list[bytes]:
        """Returns what each process has, in their order.

        Raises:
            Exception: What another process failed with.
            ConnectionError: One of them died.
            TimeoutError: One of them hangs.
        """
        found = self._meet(own)
        if max(size for size, _ in found) <= _WITH_A_WORD:
            return [part for _, part in found]
        with self._connected():
            return [self._broadcast(own, rank, size) for rank, (size, _) in enumerate(found)]

    def receive(self, state: bytes) -> bytes:
        """Waits for its turn; returns a state as the process before left it, which is the one given for the first.

        Raises:
            Exception: As :meth:`gather`.
        """
        self._meet()
        if self.rank == 0:
            return state
        before = self._take(self.rank - 1)
        if before is None:
            self.hand_on(None)
            self._meet()  # which says what failed
        assert before is not None
        return before

    def hand_on(self, state: bytes | None) -> bytes:
        """Ends its turn; returns the state as the last process left it.

        Args:
            state: None where this process failed, which has to say so then.

        Raises:
            Exception: As :meth:`gather`.
        """
        import torch

        with self._connected():
            if self.rank + 1 < self.size:
                self._give(state, self.rank + 1)
            last = self.size - 1
            count = torch.tensor([_FAILED if state is None else len(state)])
            torch.distributed.broadcast(count, last, group=self._processes.group)
            after = None if count < 0 else self._broadcast(state or b"", last, int(count))
        if after is None and state is not None:
            self._meet()
        return after or b""

    def concatenated(self, own: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the arrays of all processes, one after the other along the first axis."""
        parts = self.gather(np.ascontiguousarray(own).tobytes())
        found: npt.NDArray[Any] = np.frombuffer(b"".join(parts), dtype=own.dtype).copy()
        return found.reshape(-1, *own.shape[1:])

    def from_main(self, work: Callable[[], _Result]) -> _Result:
        """Has the first process do something, and returns in each what came of it.

        Raises:
            Exception: As :meth:`gather`.
        """
        done: list[_Result] = []
        if self.rank == 0:
            with alone():
                done.append(work())
        self._meet()
        try:
            with self._connected():
                return self._processes.from_main(lambda: done[0])
        except Exception:
            raise
        except BaseException:  # within what the others wait for, which no words can be put into
            self._ended = True
            raise

    def led(
        self,
        search: Callable[[Callable[[npt.NDArray[np.float64]], _Result]], npt.NDArray[np.float64]],
        evaluate: Callable[[npt.NDArray[np.float64]], _Result],
    ) -> npt.NDArray[np.float64]:
        """Has the first process search, with a function that all evaluate together; returns what it found in each."""

        def together(point: npt.NDArray[np.float64]) -> _Result:
            self.gather(point.tobytes())
            return evaluate(point)

        if self.rank == 0:
            found = search(together)
            self.gather(b"")
        else:
            found = np.empty(0)
            while point := self.gather(b"")[0]:
                evaluate(np.frombuffer(point))
        return self.concatenated(found)

    def end(self, error: BaseException | None) -> None:
        """Waits until all have done their work, or tells them why this process cannot."""
        if self._ended:
            return
        if error is None:
            self._meet()
            self._ended = True
            return
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._words(_FAILED, b"")
            self._failures(error)

    def _meet(self, own: bytes = b"") -> list[tuple[int, bytes]]:
        """Learns that all are well, how many bytes each has, and these if they are few."""
        words = self._words(len(own), own)
        if any(count == _FAILED for count, _ in words):
            raise next(error for error in self._failures(None) if error is not None)
        return words

    def _words(self, count: int, own: bytes) -> list[tuple[int, bytes]]:
        import torch

        if self._ended:
            raise RuntimeError("The processes of this job share no work any more.")
        word = count.to_bytes(_WORD, "little", signed=True) + own[:_WITH_A_WORD]
        sent = _tensor(word.ljust(WORD_BYTES, b"\0"))
        heard = [torch.empty_like(sent) for _ in range(self.size)]
        with self._connected():
            torch.distributed.all_gather(heard, sent, group=self._processes.group)
        words = []
        for word in map(_bytes, heard):
            count = int.from_bytes(word[:_WORD], "little", signed=True)
            words.append((count, word[_WORD : _WORD + max(count, 0)]))
        return words

    def _failures(self, error: BaseException | None) -> list[Exception | None]:
        self._ended = True
        if error is not None and not isinstance(error, Exception):
            error = ConnectionError(f"Process {self._processes.name} of {self.size} was ended: {type(error).__name__}")
        return self._processes.errors(error)

    def _give(self, state: bytes | None, rank: int) -> None:
        import torch

        group = self._processes.group
        torch.distributed.send(torch.tensor([_FAILED if state is None else len(state)]), rank, group=group)
        if state:
            torch.distributed.send(_tensor(state), rank, group=group)

    def _take(self, rank: int) -> bytes | None:
        import torch

        group, count = self._processes.group, torch.tensor([0])
        with self._connected():
            torch.distributed.recv(count, rank, group=group)
            if count < 0:
                return None
            state = torch.empty(int(count), dtype=torch.uint8)
            if len(state):
                torch.distributed.recv(state, rank, group=group)
        return _bytes(state)

    def _broadcast(self, own: bytes, rank: int, count: int) -> bytes:
        import torch

        tensor = _tensor(own) if rank == self.rank else torch.empty(count, dtype=torch.uint8)
        if count:
            torch.distributed.broadcast(tensor, rank, group=self._processes.group)
        return own if rank == self.rank else _bytes(tensor)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Says so where one of the others died or hangs; nothing can be told to anybody then."""
        try:
            with self._processes.losing():
                yield
        except (ConnectionError, TimeoutError):
            self._ended = True
            raise


def _tensor(values: bytes) -> torch.Tensor:
    import torch

    # A copy: what lies in memory of Python's may have to be let go by a thread of torch's while the interpreter ends.
    tensor = torch.empty(len(values), dtype=torch.uint8)
    tensor.numpy()[:] = np.frombuffer(values, dtype=np.uint8)
    return tensor


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@contextlib.contextmanager
def sharing(processes: World, timeout: float) -> Iterator[Shares | None]:
    """Lets the processes of a job share work on pairs; None for one by itself.

    Where one of them fails, all leave with its error. The first one warns for all.

    Args:
        processes: Of the job.
        timeout: Seconds after which the others name one that neither works nor waits for others.
    """
    if processes.size == 1:
        yield None
        return
    with processes.watched(timeout) as watched, warnings.catch_warnings():
        shares = Shares(watched)
        if not processes.is_main:
            warnings.simplefilter("ignore")
        try:
            yield shares
        except BaseException as error:
            shares.end(error)
            raise
        shares.end(None)
