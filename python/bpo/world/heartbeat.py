"""Whether the processes that share work are alive: each counts a number up that the others look at."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LOOKS = 10  # within the time after which a process hangs
_SECONDS_BETWEEN_LOOKS = 30.0  # at most
# The part of its time in which a process that works uses a processor, at least: reading from a slow disk is work, too.
_WORKING = 0.01
_TAG = 97  # of a message that nobody sends


class Heartbeats:
    """Ends the wait of this process for one that hangs: that neither works, nor waits for others itself.

    A thread counts a number up in the store of ``torch.distributed`` while this process waits, or uses a processor; it
    looks at those of the others as often. What a process does may take any time so. Looks are counted, not seconds, so
    that a machine that was suspended blames nobody when it wakes. Another thread watches the first: where the store
    does not answer, its keeper hangs.

    Args:
        rank: The number of this process.
        group: Of ``torch.distributed``, over which the processes talk.
        name: Of what they are about, the same in all and for nothing else.
        names: The processes, as an error names them.
        timeout: Seconds after which one hangs.
    """

    def __init__(self, rank: int, group: Any, name: str, names: Sequence[str], timeout: float) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        self._rank, self._group, self._name, self._names, self._timeout = rank, group, name, names, timeout
        self._store = _get_default_store()
        self._seconds = min(timeout / _LOOKS, _SECONDS_BETWEEN_LOOKS)
        self._most = round(timeout / self._seconds)
        self._silent = [0] * len(names)  # looks since a number was another
        self._looks = self._unanswered = 0
        self._waits = False
        self._ended = threading.Event()
        for run in (self._look, self._judge):
            threading.Thread(target=run, daemon=True).start()

    def end(self) -> None:
        """Ends the watch."""
        self._ended.set()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within which this process waits for others.

        Raises:
            TimeoutError: In place of what torch says, where one of them hangs.
        """
        before, self._waits = self._waits, True
        try:
            yield
        except RuntimeError as error:
            # Who looks first closes the connections of all; the others are at most a few looks behind.
            hanging = self._hanging(self._most - 3)
            if hanging is None:
                raise
            raise TimeoutError(
                f"Process {hanging} of {len(self._names)} hangs: for {self._timeout:g} s (process_timeout) it neither "
                "worked nor waited, while pairs were chosen. End it, and start again: gradients that are in a store "
                f"are not computed anew. torch says: {error}"
            ) from None
        finally:
            self._waits = before

    def _hanging(self, looks: int) -> str | None:
        """The process that was silent longest, if for so many looks; none where all are well."""
        if self._unanswered >= looks:
            return f"{self._names[0]}, or the launcher on its machine,"
        longest = max(self._silent)
        return self._names[self._silent.index(longest)] if longest >= looks else None

    def _look(self) -> None:
        beats, used, before = [-1] * len(self._names), 0.0, time.monotonic()
        # The store may end with the process that keeps it, of which the connections tell.
        with contextlib.suppress(RuntimeError):
            while True:
                now, others = time.monotonic(), time.process_time() - time.thread_time()
                if self._waits or others - used >= _WORKING * (now - before):
                    self._store.add(f"{self._name}/{self._rank}", 1)
                used, before = others, now
                for rank, seen in enumerate(beats):
                    beats[rank] = self._store.add(f"{self._name}/{rank}", 0) if rank != self._rank else seen
                    self._silent[rank] = self._silent[rank] + 1 if beats[rank] == seen and rank != self._rank else 0
                self._looks += 1
                if self._ended.wait(self._seconds):
                    return

    def _judge(self) -> None:
        looks = 0
        while not self._ended.wait(self._seconds):
            self._unanswered = self._unanswered + 1 if self._looks == looks else 0
            looks = self._looks
            if self._waits and self._hanging(self._most) is not None:
                self._close()
                return

    def _close(self) -> None:
        """Closes the connections of the group, upon which whatever waits in it fails: gloo does where a wait ends.

        That needs one to wait for; those to processes that have ended already end no wait of another.
        """
        import torch

        for other in range(len(self._names)):
            with contextlib.suppress(RuntimeError):
                if other != self._rank:
                    never = torch.distributed.irecv(torch.zeros(1), other, group=self._group, tag=_TAG)
                    if never is not None:
                        never.wait(datetime.timedelta(milliseconds=1))
