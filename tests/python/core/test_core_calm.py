"""The core answers Ctrl-C whatever it does, refuses what memory it cannot have, and makes no thread wait for another.

With BPO_TORTURE=N, of 8 million rows or pairs, each call is interrupted at N moments of its run, 12 at most, and has to
end within 0.2 s; the machine should have nothing else to do then. Without, nothing depends on the clock.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bpo import _core
from core_calls import CALLS, RECORD

TORTURE = int(os.environ.get("BPO_TORTURE", 0))
COUNT = 8_000_000 if TORTURE else 400_000
LONGEST = 0.2
SCRIPT = Path(__file__).parents[1] / "helpers" / "core_calls.py"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")


# The allocator of glibc then keeps nothing for later, so that a limit is one.
NOTHING_KEPT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def started(name, count, folder, serve, **environment):
    command = [sys.executable, SCRIPT, name, str(count), folder, serve]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes)


def called(process, wait=None):
    """Lets a process call once, sends it SIGINT after so many seconds; says how and when it began and ended."""
    process.stdin.write("\n")
    process.stdin.flush()
    _, began = process.stdout.readline().split()
    sent = None
    if wait is not None:
        time.sleep(wait)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
    said, ended = process.stdout.readline().split()
    return said, float(began), sent, float(ended)


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_ends_a_call(name, tmp_path):
    moments = np.linspace(0, 0.95, min(TORTURE, 12) or 2)
    with started(name, COUNT, tmp_path, "interrupts") as process:
        said, began, _, ended = called(process)
        seconds = ended - began
        assert said == "ended"
        answers = []
        for moment in moments:
            said, began, sent, ended = called(process, moment * seconds)
            answers.append(ended - sent)
            # Interrupted at once, it does not go on to its end where that takes a while.
            assert said == "interrupted" or moment > 0 or seconds < 2, (said, ended - began, seconds)
        process.stdin.close()
        assert process.wait() == 0
    if TORTURE:
        print(f"{name:26} {seconds:6.2f} s, interrupts answered within", *(f"{answer:.3f}" for answer in answers))
        assert max(answers) <= LONGEST


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("name", CALLS)
def test_memory_that_cannot_be_had_is_an_error(name, tmp_path):
    with started(name, 150_000, tmp_path, "limits", **NOTHING_KEPT) as process:
        said = process.communicate()[0].split("\n")[:-1]
    assert process.returncode == 0  # an abort is a signal
    assert said[-1] == "", said
    # What the core refused says what for, and what to do.
    assert any("bytes of memory cannot be had for" in refusal for refusal in said), said


def test_a_store_says_what_it_holds_while_it_is_written(tmp_path):
    """Even to the thread that a call waits for."""
    n = 1 << 19
    with _core.StoreWriter.create(tmp_path / "store", 4, "{}") as writer:
        writer.append(np.ones((n, 4), dtype=np.float32), np.zeros(n, dtype=RECORD))
    reader = _core.StoreReader(tmp_path / "store")
    seen = []
    with _core.StoreWriter.create(tmp_path / "copy", 4, "{}", dtype="int8") as writer:
        writer.copy_from(
            reader,
            np.ones(n, dtype=bool),
            progress=lambda done, total: seen.append((done < total, len(writer), writer.committed)),
        )
        assert len(writer) == writer.committed == n
    assert {(count, committed) for before_the_end, count, committed in seen if before_the_end} == {(0, 0)}
    with pytest.raises(ValueError, match="closed"):
        len(writer)
    with pytest.raises(ValueError, match="closed"):
        writer.committed  # noqa: B018


def test_work_ends_with_an_error_of_the_callback(tmp_path):
    """It does not go on behind the exception, as what it leaves undone shows."""
    n = 1 << 20
    with _core.StoreWriter.create(tmp_path / "store", 4, "{}") as writer:
        writer.append(np.ones((n, 4), dtype=np.float32), np.zeros(n, dtype=RECORD))
    reader = _core.StoreReader(tmp_path / "store")

    def fail(done, total):
        assert done < total, "it was done before the first look"
        raise LookupError

    with _core.StoreWriter.create(tmp_path / "copy", 4, "{}", dtype="int8") as writer:
        with pytest.raises(LookupError):
            writer.copy_from(reader, np.ones(n, dtype=bool), progress=fail)
        assert len(writer) < n


def test_a_store_whose_append_was_interrupted_goes_on(tmp_path):
    """As if it had not been asked for, or had come through."""
    n = 1 << 19
    some, many = np.ones((3, 64), dtype=np.float32), np.ones((n, 64), dtype=np.float32)
    with _core.StoreWriter.create(tmp_path / "store", 64, "{}") as writer:
        for append in range(6):
            before = len(writer)
            timer = threading.Timer(0.02 * append, os.kill, (os.getpid(), signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                timer.start()
                writer.append(many, np.zeros(n, dtype=RECORD))
                timer.join()
                time.sleep(1)
            assert len(writer) in (before, before + n)
            writer.append(some, np.zeros(3, dtype=RECORD))
            if append == 3:
                writer.commit()
        count = len(writer)
    reader = _core.StoreReader(tmp_path / "store")
    assert len(reader) == count and len(reader.verify()) == 0
    assert count % n == 3 * 6


def test_masks_of_masked_arrays_are_not_passed_over():
    rows = np.ones((9, 4), dtype=np.float32)
    masked = np.ma.masked_array(rows, mask=rows > 0)
    pairs, coefficients = np.zeros((5, 2), dtype=np.int64), np.ones((5, 2), dtype=np.float32)
    for name, refused in {
        "rows": lambda: _core.kmeans(masked, 2),
        "sample_weight": lambda: _core.kmeans(rows, 2, sample_weight=masked[:, 0].copy()),
        "pairs": lambda: _core.pair_norms(rows, np.ma.masked_array(pairs), coefficients),
        "eligible": lambda: _core.coreset(
            rows, pairs, coefficients, np.zeros(5, np.int32), 2, eligible=np.ma.masked_array(np.ones(5, bool))
        ),
        "scores": lambda: _core.ranking_keys(np.ma.masked_array(np.ones(5))),
        "out": lambda: _core.Sketcher(4).sketch(rows, 0, masked),
    }.items():
        with pytest.raises(TypeError, match=rf"`{name}` is a masked array.* {name}\.filled\("):
            refused()


def test_sketches_of_many_entries_are_refused():
    with pytest.raises(ValueError, match="`nnz` must be a divisor of dim = 16777216, at most 256"):
        _core.Sketcher(1 << 24, nnz=1 << 24)
