"""Programs end when they are told to, at whatever moment, and take their workers and temporary files with them."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import job

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
TORTURE = int(os.environ.get("BPO_TORTURE", "0"))

LOST = '''
import os, signal, sys, threading, time
from bpo.cli.signals import ending_when_told

signum = getattr(signal, sys.argv[1])

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), signum)
        for _ in range(100): pass

def destructor():
    Destroyed()

def bare_except():
    try:
        os.kill(os.getpid(), signum)
        time.sleep(60)
    except: pass

def while_it_waits():
    """The signal is there, and its exception would be raised if the wait ended."""
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signum)).start()
    lock.acquire()

def cleaning():
    try:
        os.kill(os.getpid(), signum)
        time.sleep(60)
    finally:
        time.sleep(2.5)
        print("cleaned")

for moment in (destructor, bare_except, while_it_waits, cleaning):
    try:
        with ending_when_told():
            moment()
            time.sleep(60)
    except BaseException as error:
        print(moment.__name__, type(error).__name__)
'''


def started(code, *arguments, **settings):
    return subprocess.Popen([sys.executable, *code, *map(str, arguments)], text=True, **settings)


@pytest.mark.parametrize(("signum", "error"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Told")])
def test_what_is_lost_is_raised_again_but_not_while_it_is_under_way(signum, error):
    process = started(["-c", LOST], signum, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said, _ = process.communicate(timeout=300)
    assert said.split("\n")[:-1] == [
        f"destructor {error}",
        f"bare_except {error}",
        f"while_it_waits {error}",
        "cleaned",
        f"cleaning {error}",
    ]


def test_what_is_ignored_stays_ignored():
    code = """
import os, signal
from bpo.cli.signals import ending_when_told
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with ending_when_told():
    os.kill(os.getpid(), signal.SIGHUP)
print("went on", signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""
    process = started(["-c", code], stdout=subprocess.PIPE)
    assert process.communicate(timeout=300)[0] == "went on True True\n"


PARENT = """
import sys, time
from bpo.system.processes import Workers

def work(task):
    import os, tempfile
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        with open(f"{sys.argv[1]}/{task}.pid", "w") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(600)

if __name__ == "__main__":
    sys.argv[1:] = sys.argv[1:] or ["."]
    with Workers(work, 1) as workers:
        list(workers.each(["one", "two"]))
"""


def is_there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_with_their_parent(tmp_path):
    """Whatever ends it, and in the middle of a task."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parents = {}
    for name in ("SIGKILL", "SIGTERM", "SIGINT"):
        (tmp_path / name).mkdir()
        parents[name] = started([script], tmp_path / name, stderr=subprocess.DEVNULL)
    for name, parent in parents.items():
        directory = tmp_path / name
        note = directory / "one.pid"
        wait_until(lambda note=note: note.exists() and note.read_text().endswith("\n"))
        worker = int(note.read_text())
        assert is_there(worker)
        parent.send_signal(getattr(signal, name))
        parent.wait(60)
        wait_until(lambda worker=worker: not is_there(worker), 60)
        # A parent that ends by itself ends its workers, which tidy up.
        if name == "SIGINT":
            assert list(directory.iterdir()) == [note]


def select(model_path, data, tmp_path):
    """A selection that keeps no store, in a program of its own whose temporary files are in a place of their own."""
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    command = ["select", model_path, data, "--budget", "0.5", "--output", tmp_path / "out", "--no_store"]
    environment = {"TMPDIR": str(temporary)}
    process = job.command([*command, "--set", "tokens_per_batch=32"], output=tmp_path, environment=environment)
    process.start()
    return process, temporary


@pytest.fixture
def data(tmp_path):
    import datasets

    from tiny import scored_rows

    datasets.Dataset.from_list(scored_rows(400, 5)).to_json(tmp_path / "rows.jsonl")
    return tmp_path / "rows.jsonl"


def test_a_command_that_is_told_to_end_leaves_no_temporary_store(model_path, data, tmp_path):
    process, temporary = select(model_path, data, tmp_path)
    wait_until(lambda: list(temporary.glob("bpo-store-*/rows.*")) or not process.is_alive())
    process.terminate()
    process.join(120)
    errors = (tmp_path / "stderr").read_text()
    assert process.exitcode == 128 + signal.SIGTERM, errors
    assert "bpo: ended by SIGTERM; nothing is kept" in errors and "Traceback" not in errors
    assert list(temporary.glob("bpo-*")) == []


@pytest.mark.skipif(not TORTURE, reason="takes long")
def test_interrupts_at_random_end_a_command(model_path, data, tmp_path):
    generator, statuses = random.Random(0), []
    start = time.perf_counter()
    process, temporary = select(model_path, data, tmp_path)
    process.join()
    seconds = time.perf_counter() - start
    assert process.exitcode == 0
    while len(statuses) < TORTURE:
        process, temporary = select(model_path, data, tmp_path)
        time.sleep(generator.uniform(0.1, seconds))
        os.kill(process.pid, signal.SIGINT)
        process.join(120)
        assert list(temporary.glob("bpo-*")) == []
        if process.exitcode != 0:  # else it was done already
            statuses.append(process.exitcode)
    # Before the command's own code runs, Python ends by the signal itself.
    assert set(statuses) <= {130, -signal.SIGINT, 1}
    print(f"{len(statuses)} interrupts: {statuses.count(130)} of them within the command")
