"""Tasks in processes of their own, which may die without taking the others with them."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing.connection
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Task = TypeVar("Task")

_PR_SET_PDEATHSIG = 1
_SECONDS_TO_END = 10.0

# By which a launcher tells a process of the others that it started: a worker is none of them.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


class Workers:
    """Processes that do tasks, several at a time; one that dies over a task is replaced.

    They end when the ``with`` block does, and when this process does, whatever ends it.

    Args:
        attempt: Does a task and returns what came of it. It, the tasks and what is returned are pickled.
        jobs: Processes, each with its share of the threads.
    """

    def __init__(self, attempt: Callable[[Any], Any], jobs: int) -> None:
        self._attempt = attempt
        self._jobs = jobs
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.tell_to_end()
        for worker in self._workers:
            worker.end()

    def each(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Attempts tasks, which are begun in their order.

        Yields:
            Each task when it is done, and what came of it, or text that says how its process died.
        """
        waiting = list(reversed(tasks))
        for worker in self._workers[: len(waiting)]:
            worker.give(waiting.pop())
        while waiting and len(self._workers) < self._jobs:
            self._begin(waiting.pop())
        while busy := [worker for worker in self._workers if worker.busy]:
            ready = multiprocessing.connection.wait([worker.connection for worker in busy])
            for worker in (each for each in busy if each.connection in ready):
                task, answer = worker.task, worker.answer()
                if worker.died:
                    self._workers.remove(worker)
                    if waiting:
                        self._begin(waiting.pop())
                elif waiting:
                    worker.give(waiting.pop())
                yield task, answer

    def _begin(self, task: Any) -> None:
        """Begins a task in a new process."""
        worker = _Worker(self._attempt, cores() // self._jobs)
        self._workers.append(worker)
        worker.give(task)


def cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that does one task after the other."""

    def __init__(self, attempt: Callable[[Any], Any], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, attempt, max(1, threads), os.getpid()))
        self.process.start()
        theirs.close()
        self.task: Any = None
        self.busy = self.died = False

    def give(self, task: Any) -> None:
        """Begins a task."""
        self.task, self.busy = task, True
        with contextlib.suppress(OSError):  # a process that died says so when asked for its answer
            self.connection.send(task)

    def answer(self) -> Any:
        """Returns what came of the task."""
        self.busy = False
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.died = True
            self.process.join()
            code = self.process.exitcode
            return f"The process of the run ended with status {code}" + (", killed" if (code or 0) < 0 else "")

    def tell_to_end(self) -> None:
        """Has the process end, in the middle of its task if it has one."""
        if self.busy:
            self.process.terminate()
        self.connection.close()

    def end(self) -> None:
        """Waits until the process has ended, and makes it where it does not."""
        self.process.join(_SECONDS_TO_END)
        self.process.kill()
        self.process.join()


def _serve(connection: Any, attempt: Callable[[Any], Any], threads: int, parent: int) -> None:
    """Works until told to end, or until whoever would tell it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its workers
    for name in ("SIGTERM", "SIGHUP"):
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum is not None and signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, lambda *_: sys.exit(1))  # so that temporary files go
    _end_with(parent)
    for name in _LAUNCHED:
        os.environ.pop(name, None)
    import torch

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(attempt(connection.recv()))


def _end_with(parent: int) -> None:
    """Has this process end when its parent does, even where that is killed in the middle of a task."""
    there = multiprocessing.parent_process()
    assert there is not None
    sentinel = there.sentinel  # the end of a pipe that the parent holds, and that the system closes

    def wait() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=wait, name="bpo-parent", daemon=True).start()
    if sys.platform == "linux":
        # The system itself, even while other code holds the interpreter.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)
