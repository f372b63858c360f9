"""The processes of a job, over ``torch.distributed``: one that works for all, and settings that all must share."""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import dataclasses
import datetime
import functools
import io
import os
import pickle
import platform
import sys
import uuid
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from bpo.world.launch import launched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bpo.world.heartbeat import Heartbeats
    from bpo.world.telling import Parcel

_Result = TypeVar("_Result")
_Given = ParamSpec("_Given")

# What one process does for all may take days, and while it lives the others wait; that it died they learn at once.
_LONGEST = datetime.timedelta(days=100)

# All that were launched together should come to their first call of bpo within this time.
_MEETING = datetime.timedelta(seconds=1800)

_alone = contextvars.ContextVar("bpo_alone", default=False)


@dataclasses.dataclass(frozen=True)
class World:
    """The processes that call the same functions in the same order.

    Attributes:
        rank: The number of this one, from 0 on.
        size: How many there are.
        local_size: How many of them share this machine.
        group: Of ``torch.distributed``, over which they talk; None for one by itself.
        heartbeats: By which one that hangs is found, where that is asked for.
    """

    rank: int
    size: int
    local_size: int
    group: Any = None
    heartbeats: Heartbeats | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the first process, which prints and saves."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """This process, as messages of others name it."""
        return f"{self.rank} ({os.getpid()} on {platform.node()})"

    def from_main(self, work: Callable[[], _Result]) -> _Result:
        """Has the first process do something, and returns in each what came of it.

        What is large goes in pieces (:mod:`bpo.world.telling`). Tables of Arrow and those of data sets are then on disk
        in the others, in a file of the cache, where they are large.

        Raises:
            Exception: What it raised there, in each; or what one of the others met with while it took that in.
            ConnectionError: A process died.
        """
        if self.size == 1:
            return work()
        from bpo.world.telling import Parcel

        result: Any = None
        parcel: Parcel | None = None
        failed: Exception | None = None
        if self.is_main:
            try:
                with alone():
                    result = work()
                parcel = Parcel(result)
            except Exception as error:
                failed = error
        sent: list[Any] = [failed and _sendable(failed), parcel and parcel.small, parcel and len(parcel.tables)]
        self._broadcast(sent)
        raised, small, n_tables = sent
        if raised is not None:
            raise failed or raised
        if not self.is_main:
            result = self._hear(n_tables) if small is None else pickle.loads(small)
        elif parcel is not None and small is None:
            self._tell(parcel)
        found: _Result = result
        return found

    def _tell(self, parcel: Parcel) -> None:
        """Sends what is large to the others, and waits until all have it."""
        from bpo.world.telling import Chain, Sender

        sender, failed = Sender(Chain(self.rank, self.size, self.group, self.losing)), None
        try:
            parcel.write(sender)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            failed = error
        sender.end(failed=failed is not None)
        self.exchanged(failed or True)

    def _hear(self, n_tables: int) -> Any:
        """Takes in what the first process sends, and hands it on; waits until all have it."""
        from bpo.world.telling import Chain, Receiver, unpacked

        receiver = Receiver(Chain(self.rank, self.size, self.group, self.losing))
        result: Any = None
        failed: Exception | None = None
        try:
            result = unpacked(io.BufferedReader(receiver), n_tables)
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            failed = error
        receiver.drain()  # so that those behind this one get it all, whatever went wrong here
        self.exchanged(True if failed is None or receiver.failed else failed)
        return result

    def to_main(self, value: _Result) -> list[_Result] | None:
        """Sends a value of each process to the first, which gets them in the order of the ranks; others get None.

        Raises:
            ConnectionError: A process died.
        """
        if self.size == 1:
            return [value]
        import torch.distributed

        values: list[Any] | None = [None] * self.size if self.is_main else None
        with self.losing():
            torch.distributed.gather_object(value, values, dst=0, group=self.group)
        return values

    def check_same(self, values: Mapping[str, Any], timeout: float) -> None:
        """Waits for all processes, and checks that they are about to do the same.

        Args:
            values: What must be the same everywhere, by the name that an error gives it.
            timeout: Seconds to wait for the others.

        Raises:
            TimeoutError: One did not come.
            ValueError: One came with something else.
        """
        if self.size == 1:
            return
        self._wait(timeout)
        others = self.exchanged(dict(values))
        for name in values:
            for rank, other in enumerate(others):
                if other.get(name) != others[0].get(name):
                    raise ValueError(
                        f"Process {rank} of {self.size} has another {name} than process 0: {brief(other.get(name))} "
                        f"there, {brief(others[0].get(name))} here. All processes of a job must be given the same."
                    )

    def exchanged(self, value: _Result | Exception) -> list[_Result]:
        """Returns what each process has, by rank, in each.

        Raises:
            Exception: One of them has an error in place of it.
            ConnectionError: One of them died.
        """
        values: list[Any] = [value]
        if self.size > 1:
            import torch.distributed

            values = [None] * self.size
            sent = _sendable(value) if isinstance(value, Exception) else value
            with self.losing():
                torch.distributed.all_gather_object(values, sent, group=self.group)
        for each in (value, *values):
            if isinstance(each, Exception):
                raise each
        return values

    def errors(self, own: Exception | None) -> list[Exception | None]:
        """Returns the error of each process that has one, by rank, in each.

        Raises:
            ConnectionError: One of them died.
        """
        import torch.distributed

        errors: list[Any] = [None] * self.size
        with self.losing():
            torch.distributed.all_gather_object(errors, own and _sendable(own), group=self.group)
        return errors

    @contextlib.contextmanager
    def watched(self, timeout: float) -> Iterator[World]:
        """Yields these processes so that one that hangs, while it should work with the others, is named by them.

        Args:
            timeout: Seconds in which a process must work or wait for others.

        Raises:
            TimeoutError: One did neither.
        """
        from bpo.world.heartbeat import Heartbeats

        told = self.exchanged((self.name, uuid.uuid4().hex))
        heartbeats = Heartbeats(self.rank, self.group, told[0][1], [name for name, _ in told], timeout)
        try:
            yield dataclasses.replace(self, heartbeats=heartbeats)
        finally:
            heartbeats.end()

    def numbers(self, count: int) -> Iterator[int]:
        """Yields numbers below ``count``, each to that process which is the next to ask for one."""
        if self.size == 1:
            yield from range(count)
            return
        from torch.distributed.distributed_c10d import _get_default_store

        counter, store = self.from_main(lambda: f"bpo-{uuid.uuid4().hex}"), _get_default_store()
        while (number := store.add(counter, 1) - 1) < count:
            yield number

    def _wait(self, timeout: float) -> None:
        import torch.distributed

        with _meeting(f"Process {self.name} of {self.size}", timeout, "process_timeout"):
            torch.distributed.monitored_barrier(
                self.group, timeout=datetime.timedelta(seconds=timeout), wait_all_ranks=True
            )

    def _broadcast(self, values: list[Any]) -> None:
        import torch.distributed

        with self.losing():
            torch.distributed.broadcast_object_list(values, src=0, group=self.group)

    @contextlib.contextmanager
    def losing(self) -> Iterator[None]:
        """Says so where one of the others died, or hangs.

        Raises:
            ConnectionError: In place of what torch says.
            TimeoutError: Likewise, where there are heartbeats.
        """
        try:
            with contextlib.nullcontext() if self.heartbeats is None else self.heartbeats.waiting():
                yield
        except RuntimeError as error:
            raise ConnectionError(f"Process {self.name} of {self.size} lost a process of its job: {error}") from None


_BY_ITSELF = World(0, 1, 1)


def world() -> World:
    """Returns the processes of this job: as ``torch.distributed`` knows them where it runs, else as a launcher says.

    Within :func:`alone`, this process by itself.
    """
    if _alone.get():
        return _BY_ITSELF
    launch = launched()
    if launch.size == 1 and not _running():
        return _BY_ITSELF
    return _joined(os.getpid())


@functools.cache
def _joined(pid: int) -> World:
    """Joins the others, once in the life of a process, over a group that serves nothing but this."""
    from accelerate import PartialState

    launch = launched()
    os.environ.update(launch.variables)
    if not _running():
        atexit.register(_leave)
    try:
        PartialState()  # starts torch.distributed, and takes the device that is this process's
    except RuntimeError as error:
        raise ConnectionError(
            f"Process {launch.rank} of {launch.size} could not meet the others of its job at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {error}"
        ) from None
    import torch.distributed

    if not _running():
        return _BY_ITSELF
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with _meeting(f"Process {rank} of {size}", _MEETING.total_seconds(), "the first time"):
        torch.distributed.new_group(backend="gloo", timeout=_MEETING)
    group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST)
    return World(rank, size, min(size, launch.local_size if launch.size == size else size), group)


def _leave() -> None:
    """Ends the threads of torch.distributed, which else may abort a process that is done."""
    if _running():
        import torch.distributed

        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def _meeting(name: str, seconds: float, setting: str) -> Iterator[None]:
    """Says what to do where the others do not come."""
    try:
        yield
    except RuntimeError as error:
        raise TimeoutError(
            f"{name} waited up to {seconds:g} s ({setting}) for all others to get as far: call bpo in every process of "
            f"a job that a launcher started, or in one alone within `with bpo.alone():`. torch says: {error}"
        ) from None


def _running() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lets this process call bpo without the others of its job.

    Every process of a job that ``torchrun``, ``accelerate launch`` or ``srun`` started is otherwise expected to make
    the same calls in the same order.

    Example:
        >>> import bpo
        >>> rows = [{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}]
        >>> with bpo.alone():
        ...     len(bpo.select(None, rows, budget=1, strategy="random").dataset)
        1
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def by_main(work: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Makes a function that all processes of a job call one that the first does, and that returns the same in each."""

    @functools.wraps(work)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        return world().from_main(lambda: work(*args, **kwargs))

    return call


def _sendable(error: Exception) -> Exception:
    """An error as another process can raise it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"Another process of the job failed: {type(error).__name__}: {error}")
    return error


def brief(value: Any) -> str:
    """Returns a value as a message shows it that compares two: of a checksum the first digits."""
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
