"""Tasks in processes of their own, which may die without taking the others with them."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import signal
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Task = TypeVar("Task")


def in_processes(
    attempt: Callable[[Task], str | None], tasks: Sequence[Task], jobs: int
) -> Iterator[tuple[Task, str | None]]:
    """Attempts tasks, several at a time; a process that dies over one is replaced.

    Args:
        attempt: Does a task and returns what went wrong, or None. It and the tasks are pickled.
        tasks: In the order in which they are begun.
        jobs: Processes, each with its share of the threads.

    Yields:
        Each task when it is done, and what went wrong.
    """
    waiting = list(reversed(tasks))
    workers = [_Worker(attempt, cores() // jobs) for _ in range(min(jobs, len(tasks)))]
    try:
        for worker in workers:
            worker.give(waiting.pop())
        while workers:
            ready = multiprocessing.connection.wait([worker.connection for worker in workers])
            for index, worker in enumerate(workers):
                if worker.connection not in ready:
                    continue
                task, (error, alive) = worker.task, worker.answer()
                if waiting and not alive:
                    workers[index] = worker = _Worker(attempt, cores() // jobs)
                if waiting:
                    worker.give(waiting.pop())
                else:
                    worker.stop()
                yield task, error
            workers = [worker for worker in workers if worker.task is not None]
    finally:
        for worker in workers:
            worker.kill()


def cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that does one task after the other."""

    def __init__(self, attempt: Callable[[Any], str | None], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, attempt, max(1, threads)))
        self.process.start()
        theirs.close()
        self.task: Any = None

    def give(self, task: Any) -> None:
        """Begins a task."""
        self.task = task
        with contextlib.suppress(OSError):  # a process that died says so when asked for its answer
            self.connection.send(task)

    def answer(self) -> tuple[str | None, bool]:
        """Returns what went wrong, or None, and whether the process lives on."""
        try:
            return self.connection.recv(), True
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            return f"The process of the run ended with status {code}" + (", killed" if (code or 0) < 0 else ""), False

    def stop(self) -> None:
        """Lets the process end."""
        self.task = None
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join()

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.terminate()
        self.process.join()


def _serve(connection: Any, attempt: Callable[[Any], str | None], threads: int) -> None:
    """Works until told to end, or until whoever would tell it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends its workers
    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while (task := connection.recv()) is not None:
            connection.send(attempt(task))
