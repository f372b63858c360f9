"""Saved selections: full disks, two at once, readers meanwhile, kills at random, and what is in the way."""

import errno
import itertools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bpo
from bpo import Selection
from bpo.selection import saved
from bpo.selection.saved import SelectionError, _checksum
from bpo.store.objects import Objects
from bpo.system.files import ArrowFile
from bpo.system.locks import locked

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def selection_of(n, name="prompt"):
    """A selection of n pairs, with texts that do not compress."""
    noise = np.random.default_rng(n)
    rows = [
        {"prompt": f"{name} {i}", "responses": [noise.bytes(400).hex(), "b"], "scores": [1.0, 0.0]} for i in range(n)
    ]
    return bpo.select(None, rows, budget=n, strategy="random", progress=False)


def in_child(work, *arguments):
    """Starts work in a process of its own; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def ended_well(child):
    return os.waitpid(child, 0)[1] == 0


def is_whole(directory, *those):
    """Which of some selections is there, whole."""
    loaded = Selection.load(directory)
    [which] = [each for each in those if len(each) == len(loaded)]
    assert loaded.pairs.equals(which.pairs) and loaded.dataset.to_list() == which.dataset.to_list()
    return which


def test_a_full_disk_is_an_error_that_names_the_file(mount):
    """Arrow ends the process where a file fails under it, be it in the first page, a later one or the footer."""
    disk = mount("-t", "tmpfs", "-o", "size=256k", "tmpfs")
    earlier, later = selection_of(10), selection_of(4000)
    earlier.save(disk / "s")
    named = set()

    def save(note):
        with pytest.raises(OSError) as caught:
            later.save(disk / "s")
        assert caught.value.errno == errno.ENOSPC
        assert Path(caught.value.filename).is_relative_to(disk / "s") and ".saving" not in caught.value.filename
        note.write_text(caught.value.filename)

    for kept_free in (12, 40, 100, 160):
        (disk / "filler").write_bytes(b"")
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(bytes(max(0, free - kept_free * 1024)))
        before = sorted(disk.rglob("*"))

        assert ended_well(in_child(save, disk.parent / "named"))
        assert sorted(disk.rglob("*")) == before
        named.add((disk.parent / "named").read_text())
        assert is_whole(disk / "s", earlier, later) is earlier
    assert str(disk / "s" / "dataset" / "train.parquet") in named


def test_what_is_written_for_arrow_is_an_error_afterwards(tmp_path):
    """Whatever goes wrong while Arrow writes, an interrupt too, is raised once it is done."""
    table = pa.table({"x": np.random.default_rng(0).random(50_000)})
    for raised in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        file, failing = ArrowFile(tmp_path / "x"), iter([None, None, raised])

        class Failing:
            def __init__(self, inner, answers):
                self.inner, self.answers = inner, answers

            def write(self, data):
                answer = next(self.answers)
                if answer is not None:
                    raise answer
                return self.inner.write(data)

            def __getattr__(self, name):
                return getattr(self.inner, name)

        file._file = Failing(file._file, failing)
        with pytest.raises(type(raised)), file:
            pq.write_table(table, file)
    with ArrowFile(tmp_path / "x") as file:
        pq.write_table(table, file)
    assert pq.read_table(tmp_path / "x").equals(table)


def test_two_saves_at_once_leave_one_of_them_whole(tmp_path):
    old, first, second = selection_of(3), selection_of(20), selection_of(30)
    found = set()
    for attempt in range(TORTURE or 4):
        directory = tmp_path / "s" / "deeper"
        if attempt % 2:
            old.save(directory)
        children = [in_child(each.save, directory) for each in (first, second)]
        assert [ended_well(child) for child in children] == [True, True]
        found.add(len(is_whole(directory, first, second)))
        assert sorted(path.name for path in directory.iterdir()) == ["dataset", "pairs.parquet", "selection.json"]
        shutil.rmtree(tmp_path / "s")
    assert found <= {20, 30}


def test_threads_save_one_after_the_other(tmp_path):
    each = [selection_of(3), selection_of(5)]
    errors = []

    def save(selection):
        try:
            for _ in range(5):
                selection.save(tmp_path / "s")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(selection,)) for selection in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    is_whole(tmp_path / "s", *each)


def test_a_directory_that_is_being_saved_to_for_the_first_time_is_no_stranger(tmp_path):
    directory = tmp_path / "s"
    with locked(directory, saved._LOCK, "is saving"):
        (directory / saved._PAIRS).write_text("half of what there will be")
        saved.check_directory(directory)
    with pytest.raises(FileExistsError, match="holds no selection"):
        saved.check_directory(directory)
    with pytest.raises(FileExistsError, match="holds no selection"):
        selection_of(3).save(directory)
    assert [path.name for path in directory.iterdir()] == [saved._PAIRS]


def test_what_is_loaded_while_another_saves_is_whole(tmp_path):
    first, second = selection_of(3), selection_of(5)
    first.save(tmp_path / "s")

    def save():
        for each in itertools.chain.from_iterable([(second, first)] * 8):
            each.save(tmp_path / "s")

    child = in_child(save)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        is_whole(tmp_path / "s", first, second)
    assert ended[1] == 0


def test_a_save_that_is_killed_at_random_leaves_one_whole_and_can_be_repeated(tmp_path):
    """The earlier or the later selection is whole after every kill, and the next save tidies up."""
    first, second = selection_of(20), selection_of(30)
    directory = tmp_path / "s"
    start = time.perf_counter()
    first.save(directory)
    seconds = time.perf_counter() - start
    generator = np.random.default_rng(0)
    here, kills, found = first, 0, set()
    while kills < (TORTURE or 8):
        other = second if here is first else first
        child = in_child(other.save, directory)
        time.sleep(generator.uniform(0, 1.2) * seconds)
        os.kill(child, signal.SIGKILL)
        kills += not ended_well(child)
        here = is_whole(directory, first, second)
        found.add(here is other)
        if generator.random() < 0.3:  # else the next one goes on from what the kill left
            here.save(directory)
            assert sorted(path.name for path in directory.iterdir()) == ["dataset", "pairs.parquet", "selection.json"]
    first.save(directory)
    assert is_whole(directory, first, second) is first
    assert sorted(path.name for path in directory.iterdir()) == ["dataset", "pairs.parquet", "selection.json"]
    print(f"{kills} kills, after which {found} the new selection was there")


def test_what_is_not_a_selection_is_not_replaced(tmp_path):
    """Not even a data set of the same name, or files where directories should be."""
    selection = selection_of(3)
    data = tmp_path / "mine" / "dataset"
    data.mkdir(parents=True)
    (data / "train.parquet").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="mine is not empty and holds no selection"):
        selection.save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["dataset"]
    assert (data / "train.parquet").read_bytes() == b"mine"
    for name in ("dataset", "pairs.parquet", "selection.json"):
        directory = selection.save(tmp_path / f"without-{name}")
        if name == "dataset":
            shutil.rmtree(directory / name)
            (directory / name).touch()
        else:
            (directory / name).unlink()
            (directory / name).mkdir()
        with pytest.raises(FileExistsError, match=f"{name} is in the way"):
            selection.save(directory)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "selection.json").write_text("[" * 100_000)
    with pytest.raises(FileExistsError, match=r"selection\.json is not bpo's"):
        selection.save(tmp_path / "deep")
    with pytest.raises(SelectionError, match=r"deep.selection\.json is nested too deeply"):
        Selection.load(tmp_path / "deep")


def test_a_save_that_fails_leaves_no_directory(tmp_path, monkeypatch):
    selection = selection_of(3)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match=r"broken.*train"):
        selection.save(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pairs.parquet", b"PAR1 no more", "cannot be read as Parquet"),
        ("pairs.parquet", pa.table({"pair": [1]}), "has no column fate"),
        ("dataset/train.parquet", pa.table({"prompt": ["x"], "chosen": ["y"], "rejected": ["z"]}), "does not belong"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, name, change, message):
    """Edited with care: the checksums are right, and still it is no selection."""
    import hashlib
    import json

    directory = selection_of(3).save(tmp_path / "s")
    if isinstance(change, bytes):
        (directory / name).write_bytes(change)
    else:
        pq.write_table(change, directory / name)
    manifest = json.loads((directory / "selection.json").read_text())
    manifest.pop("checksum")
    manifest["sha256"][name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    (directory / "selection.json").write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    with pytest.raises(SelectionError, match=message) as caught:
        Selection.load(directory)
    assert str(directory) in str(caught.value)


def test_a_selection_at_an_address_is_the_earlier_or_the_new_one(tmp_path, monkeypatch):
    url = f"memory://{tmp_path}/selection"
    first, second = selection_of(6), selection_of(9)
    with pytest.raises(FileNotFoundError, match=f"{url} holds no saved selection"):
        bpo.Selection.load(url)
    assert first.save(url) == url
    loaded = bpo.Selection.load(url)
    assert loaded.dataset.to_list() == first.dataset.to_list()
    assert loaded.pairs.equals(first.pairs)
    # Interrupted before what says which one counts is put.
    with monkeypatch.context() as patched:
        patched.setattr(Objects, "write", lambda *given: (_ for _ in ()).throw(ConnectionError("gone")))
        with pytest.raises(ConnectionError):
            second.save(url)
    assert len(bpo.Selection.load(url)) == 6
    second.save(url)
    assert len(bpo.Selection.load(url)) == 9
    there = Objects(url)
    files = sorted(name for save in there.names("saves") for name in there.names(f"saves/{save}"))
    assert files.count("selection.json") <= 2  # what was interrupted, and what counts
    save = json.loads(there.read("selection.json", 1 << 20))["save"]
    there.write(f"saves/{save}/pairs.parquet", b"other")
    with pytest.raises(bpo.SelectionError, match=f"{url}/saves/{save}/pairs.parquet was changed after it was saved"):
        bpo.Selection.load(url)
    Objects(f"memory://{tmp_path}/other").write("mine.txt", b"text")
    with pytest.raises(FileExistsError, match="is not empty and holds no selection"):
        first.save(f"memory://{tmp_path}/other")
