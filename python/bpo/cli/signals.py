"""Programs that end when they are told to: Ctrl-C, a supervisor, or a terminal that closes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECONDS_BETWEEN = 1.0


class Told(SystemExit):
    """Raised in the main thread where another signal than that of Ctrl-C asks the program to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signal.Signals(signum)


@contextlib.contextmanager
def ending_when_told() -> Iterator[None]:
    """Ends a block with KeyboardInterrupt or :class:`Told`, so that temporary files go, whatever the moment.

    Python raises them once. That is lost where it falls into a destructor, a callback, or an ``except:`` of some
    library while it is imported; and it waits where the main thread is just about to wait for a lock. So a thread,
    which the system wakes at the moment of the signal, reminds the main thread until the exception is under way.

    Signals that are ignored, as under ``nohup``, or that someone else handles stay as they are.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    reminder = _Reminder()
    known: dict[signal.Signals, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ours = {signum for signum, usual in known.items() if signal.getsignal(signum) == usual}
    try:
        reminder.start(ours)
        yield
    finally:
        reminder.stop()
        for signum in ours:
            signal.signal(signum, known[signum])


class _Reminder:
    """Raises what a signal asks for, and has it raised again where it was lost."""

    def __init__(self) -> None:
        self._raised: list[BaseException] = []
        self._reminding = False
        self._stopped = False
        self._lock = threading.Condition()
        self._main = threading.get_ident()
        self._ours: set[signal.Signals] = set()

    def start(self, ours: set[signal.Signals]) -> None:
        """Takes over some signals."""
        self._ours = ours
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # The system writes there at the moment of a signal, whatever the main thread is doing.
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._remind, args=(reader,), name="bpo-signals", daemon=True).start()
        for signum in ours:
            signal.signal(signum, self._end)

    def stop(self) -> None:
        """Sends no more reminders."""
        self._stopped = True  # first, so that from here on nothing is raised
        with self._lock:
            self._lock.notify()
        signal.set_wakeup_fd(self._before)
        os.close(self._writer)

    def _end(self, signum: int, _: Any) -> None:
        reminded, self._reminding = self._reminding, False
        if self._stopped or (reminded and self._under_way()):
            return
        self._raised.append(KeyboardInterrupt() if signum == signal.SIGINT else Told(signum))
        raise self._raised[-1]

    def _under_way(self) -> bool:
        """Whether what runs now runs because of it: an ``except``, a ``finally``, the end of a ``with``."""
        error = sys.exc_info()[1]
        while error is not None and not any(error is each for each in self._raised):
            error = error.__context__
        return error is not None

    def _remind(self, reader: int) -> None:
        while signum := os.read(reader, 1):
            while signum[0] in self._ours:
                with self._lock:
                    if self._lock.wait_for(lambda: self._stopped, _SECONDS_BETWEEN):
                        break
                    self._reminding = True
                    signal.pthread_kill(self._main, signum[0])
        os.close(reader)
