"""Processes of a job that do not come, were given other things, or are refused."""

import datetime
import sys
import time

import pytest

import bpo
import bpo.world.world
import job
from tiny import build_tokenizer, tiny_llama

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no forkserver")


def absent(rank, store):
    bpo.world.world.world()
    if rank == 1:
        time.sleep(1000)
    job.collect(rank, store, process_timeout=2.0)


def test_one_that_does_not_come_is_waited_for_no_longer_than_said(tmp_path):
    members = job.start(2, tmp_path, absent, tmp_path / "store")
    members[0].join(600)
    said = job.said(tmp_path, 0)
    assert "TimeoutError" in said and "waited up to 2 s (process_timeout) for all others" in said
    assert "bpo.alone()" in said
    assert not (tmp_path / "store").exists()
    job.kill(members)


def elsewhere_at_work(rank, store):
    from accelerate import PartialState

    PartialState()
    if rank == 1:
        time.sleep(1000)
    bpo.world.world._MEETING = datetime.timedelta(seconds=2)
    job.collect(rank, store)


def test_one_that_calls_bpo_never_is_waited_for_no_longer_either(tmp_path):
    members = job.start(2, tmp_path, elsewhere_at_work, tmp_path / "store")
    members[0].join(600)
    said = job.said(tmp_path, 0)
    assert "TimeoutError" in said and "waited up to 2 s (the first time)" in said and "bpo.alone()" in said
    job.kill(members)


def unlike(rank, store, what):
    if what == "data set":
        job.collect(rank, store, rows=job.ROWS[rank:])
    elif what == "sketch":
        job.collect(rank, store, sketch_dim=64 + 64 * rank)
    else:
        job.collect(rank, store, tokens_per_batch=24 + rank)


@pytest.mark.parametrize("what", ["data set", "sketch", "tokens_per_batch"])
def test_processes_that_were_given_other_things_are_refused_by_name(tmp_path, what):
    members = job.start(2, tmp_path, unlike, tmp_path / "store", what)
    job.refused(members, tmp_path, f"ValueError: Process 1 of 2 has another {what} than process 0")
    assert not (tmp_path / "store").exists()


def selecting_unlike(rank, store, what):
    asked = {"rows": job.ROWS, "seed": 0, "breadth": 9}
    asked[what] = {"rows": job.ROWS[rank:], "seed": rank, "breadth": 9 + rank}[what]
    tokenizer = build_tokenizer()
    rows = asked.pop("rows")
    bpo.select(tiny_llama(tokenizer), rows, budget=20, processing_class=tokenizer, store=store, **asked)


@pytest.mark.parametrize("what", ["rows", "seed", "breadth"])
def test_processes_that_were_asked_for_other_selections_are_refused_by_name(tmp_path, what):
    members = job.start(2, tmp_path, selecting_unlike, tmp_path / "store", what)
    name = {"rows": "data set"}.get(what, what)
    job.refused(members, tmp_path, f"ValueError: Process 1 of 2 has another {name} than process 0")
    assert not (tmp_path / "store").exists()


def elsewhere(rank, store):
    job.collect(rank, store if rank == 0 else store.with_name("elsewhere"), process_timeout=600.0)


def test_a_store_that_not_all_see_is_refused(tmp_path):
    members = job.start(2, tmp_path, elsewhere, tmp_path / "store")
    for member in members:
        member.join(600)
    assert members[1].exitcode == 1
    assert "name a directory on a disk that all processes see" in job.said(tmp_path, 1)
    assert not (tmp_path / "elsewhere").exists()


def without(rank):
    job.collect(rank, None)


def failing(rank, store):
    store.mkdir(exist_ok=True)
    (store / "else").write_text("")
    job.collect(rank, store)


def test_what_the_first_process_refuses_all_refuse(tmp_path):
    for work, arguments, expected in (
        (without, (), "ValueError: Several processes that work together need a gradient store"),
        (failing, (tmp_path / "store",), "StoreError: "),
    ):
        job.refused(job.start(2, tmp_path / "out", work, *arguments), tmp_path / "out", expected)
