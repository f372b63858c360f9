"""Several real processes that fill one store, select together, die and hang.

A few times on every run; ``make torture`` sets BPO_TORTURE for many kills.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest

import bpo
import bpo._core
import job
from store_writer import contents

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The store that one process made."""
    path = tmp_path_factory.mktemp("one")
    job.finish(job.start(1, path, job.collect, path / "store"), path)
    return path / "store"


def same(store, whole):
    """Whether two stores are the same, whenever they were committed, and have nothing beside their rows."""
    (left, right) = (contents(path) for path in (store, whole))
    left["records.bin"], right["records.bin"] = left["records.bin"][72:], right["records.bin"][72:]
    return left == right


def parts_of(store):
    return sorted(path for path in (store / "parts").glob("*") if path.is_dir())


def rows_in(store):
    """How many rows of a store and of its blocks are committed."""
    found = 0
    for path in (store, *parts_of(store)):
        with contextlib.suppress(FileNotFoundError, bpo.StoreError):  # it goes into the store at this moment
            found += len(bpo.GradientStore.open(path))
    return found


def until(condition, members):
    """Waits for something that comes if the processes live."""
    while not condition():
        assert any(member.is_alive() for member in members)
        time.sleep(0.01)


def adding(change):
    """Has the rows of a block added by ``change``, which is given the function that adds them, and its arguments."""
    import bpo.gradients.collect

    add = bpo.gradients.collect.add_rows
    bpo.gradients.collect.add_rows = lambda *arguments: change(add, arguments)


def for_ever():
    while True:
        time.sleep(1)


def meeting(rank, store, stops=-1):
    """As job.collect, but nobody goes on before everybody is at some block, and one never does."""
    met, size = set(), int(os.environ["WORLD_SIZE"])

    def change(add, arguments):
        while len(met) < size:
            met.update(path.read_text() for path in store.glob("parts/*.by"))
            time.sleep(0.01)
        with (store.parent / f"took-{rank}").open("a") as file:
            file.write("x")
        if rank == stops:
            for_ever()
        add(*arguments)

    adding(change)
    job.collect(rank, store)


def hanging(rank, store):
    """As job.collect, but the second process never comes to an end of its first block, which the first soon minds."""
    from bpo.store.parts import Parts

    claimed = Parts.claimed
    if rank == 0:
        Parts.claimed = lambda self, start, name, timeout, found: claimed(self, start, name, 2.0, found)
    meeting(rank, store, stops=1)


def stopping(rank, store, rows, blocks):
    """As job.collect, but each process stops once it has filled so many blocks."""
    filled = []

    def change(add, arguments):
        if len(filled) == blocks:
            (store.parent / f"stopped-{rank}").touch()
            for_ever()
        add(*arguments)
        filled.append(arguments)

    adding(change)
    job.collect(rank, store, rows)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_store_does_not_depend_on_the_number_of_processes(tmp_path, whole, size):
    store = tmp_path / "store"
    job.finish(job.start(size, tmp_path, meeting, store), tmp_path)
    assert contents(store) == contents(whole)
    taken = [len((tmp_path / f"took-{rank}").read_text()) for rank in range(size)]
    assert sum(taken) == 7 and min(taken) >= 1, taken


def test_all_processes_return_the_selection_of_one(tmp_path):
    for size in (1, 3):
        job.finish(job.start(size, tmp_path, job.select, tmp_path / f"store-{size}", tmp_path / f"of-{size}"), tmp_path)
    one = bpo.Selection.load(tmp_path / "of-1" / "selection-0")
    for rank in range(3):
        other = bpo.Selection.load(tmp_path / "of-3" / f"selection-{rank}")
        assert other.pairs.equals(one.pairs) and other.dataset.to_list() == one.dataset.to_list()
        assert (other.config, other.seed, other.budget) == (one.config, one.seed, one.budget)
    assert contents(tmp_path / "store-1") == contents(tmp_path / "store-3")


def test_killed_processes_lose_nothing_and_any_number_goes_on_to_the_same_bytes(tmp_path, whole):
    generator = np.random.default_rng(0)
    kills = stores = 0
    while kills < (TORTURE or 5):
        store, finished = tmp_path / f"store-{stores}", False
        while not finished:
            size = int(generator.integers(1, 5))
            before = rows_in(store) if (store / "manifest.json").exists() else 0
            members = job.start(size, tmp_path / "out", job.collect, store)
            victims = generator.permutation(size)[: generator.integers(1, size + 1)]
            wanted = before + int(generator.integers(1, 40))
            while any(member.is_alive() for member in members) and rows_in(store) < wanted:
                time.sleep(0.01)
            for victim in victims:
                members[victim].kill()
                kills += 1
            for member in members:
                member.join(600)
                assert member.exitcode is not None
            # Those that live go on without the others, and finish; unless the first was killed while they prepared.
            finished = any(member.exitcode == 0 for member in members)
            assert rows_in(store) >= min(before, 70)
        job.collect(0, store)  # finds all there, and tidies up after those that were killed when they did
        assert same(store, whole)
        stores += 1
    print(f"{kills} kills of {stores} stores")


def test_a_block_of_which_nothing_was_committed_is_computed(tmp_path, whole):
    """One that was killed before its first row leaves a store of none."""
    store, written = tmp_path / "store", bpo.GradientStore.open(whole)
    members = job.start(2, tmp_path, stopping, store, job.ROWS, 0)
    until(lambda: len(list(tmp_path.glob("stopped-*"))) == 2, members)
    job.kill(members)
    fingerprint = json.dumps(written.fingerprint)
    for number in range(7):
        part = store / "parts" / f"{number:06d}"
        if not (part / "manifest.json").exists():
            bpo._core.StoreWriter.create(str(part), 64, fingerprint, dtype="float16").close()
    job.finish(job.start(1, tmp_path, job.collect, store), tmp_path)
    assert same(store, whole)


def test_what_was_whole_already_is_tidied_up(tmp_path, whole):
    """One that was killed when all was in the store leaves the blocks beside it."""
    for size in (1, 2):
        store = tmp_path / f"store-{size}"
        shutil.copytree(whole, store)
        order = hashlib.sha256(b"").hexdigest()
        for left in (store / "parts", store / "parts.done-1"):
            left.mkdir()
            (left / "order").write_text(order)
        job.finish(job.start(size, tmp_path, job.collect, store), tmp_path)
        assert contents(store) == contents(whole)


def test_one_that_dies_is_replaced_by_those_that_live(tmp_path, whole):
    store = tmp_path / "store"
    members = job.start(3, tmp_path, meeting, store, 1)
    until(lambda: (tmp_path / "took-1").exists(), members)
    members[1].kill()
    for member in members:
        member.join(600)
    assert [member.exitcode for member in members] == [0, -signal.SIGKILL, 0], job.said(tmp_path, 0)
    assert same(store, whole)


def test_one_process_by_itself_stays_out_while_several_are_at_work(tmp_path, whole):
    store = tmp_path / "store"
    members = job.start(2, tmp_path, hanging, store)
    until(lambda: len(parts_of(store)) >= 2, members)
    with pytest.raises(bpo.StoreLockedError, match="parts"):
        job.collect(0, store)
    job.kill(members)
    job.finish(job.start(1, tmp_path, job.collect, store), tmp_path)
    assert same(store, whole)


def test_one_that_hangs_is_named(tmp_path):
    store = tmp_path / "store"
    members = job.start(2, tmp_path, hanging, store)
    members[0].join(600)
    assert members[0].exitcode == 1
    said = job.said(tmp_path, 0)
    assert "TimeoutError: Nothing came to the gradient store for 2 s" in said
    assert f"process 1 ({members[1].pid} on " in said
    job.kill(members)


def test_what_an_interrupted_run_over_less_data_left_is_not_computed_again(tmp_path):
    store, rows = tmp_path / "store", job.ROWS
    members = job.start(2, tmp_path, stopping, store, rows[:8], 1)
    until(lambda: len(list(tmp_path.glob("stopped-*"))) == 2, members)
    job.kill(members)
    there = rows_in(store)
    assert parts_of(store) and 10 <= there < 40
    made = job.collect(0, store, rows)
    assert len(made) == 70 and not parts_of(store)
    assert len({bytes(one) for one in made.records["response_id"]}) == 70
    again = job.collect(0, tmp_path / "again", rows)
    order = again.rows_of(made.records["response_id"])
    assert np.allclose(made.sketches(), again.sketches(order), rtol=1e-3, atol=1e-5)
