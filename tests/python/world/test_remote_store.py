"""Several processes that fill a store at an address: the first of them fetches and sends for all."""

import os
import signal
import sys

import pytest

import bpo
import job
from bpo.store import snapshot
from bpo.store.objects import Objects
from store_writer import contents

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


def collect_at(rank, url, caches):
    """Fills a store, sends it often, and looks at it at last."""
    from bpo.store import upload

    os.environ["BPO_CACHE"] = str(caches[rank])
    upload._SECONDS_BETWEEN_UPLOADS = 0.01
    store = job.collect(rank, url)
    print(f"{len(store)} rows", flush=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("one")
    job.finish(job.start(1, path, job.collect, path / "store"), path)
    return contents(path / "store")


def test_processes_fill_a_store_at_an_address_and_one_goes_on_elsewhere(tmp_path, whole, monkeypatch):
    url, there = f"file://{tmp_path}/remote", Objects(f"file://{tmp_path}/remote")
    members = job.start(2, tmp_path / "killed", collect_at, url, [tmp_path / "cache"] * 2)
    while (sent := snapshot.latest(there)) is None or sum(files.count for files in sent.stores.values()) < 10:
        assert any(member.is_alive() for member in members)
    for member in members:
        os.kill(member.pid, signal.SIGKILL)
        member.join()
    sent = snapshot.latest(there)
    count = sum(files.count for files in sent.stores.values())
    assert any(name.startswith("parts/") for name in sent.stores)
    # On a machine that has nothing, by one process.
    job.finish(job.start(1, tmp_path / "one", collect_at, url, [tmp_path / "other"]), tmp_path / "one")
    monkeypatch.setenv("BPO_CACHE", str(tmp_path / "reader"))
    assert contents(bpo.GradientStore(url).path) == whole
    assert list(snapshot.latest(there).stores) == [""]
    assert 0 < count < len(bpo.GradientStore(url))


def test_two_processes_send_what_one_does(tmp_path, whole, monkeypatch):
    url = f"file://{tmp_path}/remote"
    members = job.start(2, tmp_path / "out", collect_at, url, [tmp_path / "cache"] * 2)
    job.finish(members, tmp_path / "out")
    monkeypatch.setenv("BPO_CACHE", str(tmp_path / "reader"))
    assert contents(bpo.GradientStore(url).path) == whole
    assert list(snapshot.latest(Objects(url)).stores) == [""]


def test_processes_that_do_not_see_the_same_copy_are_told_so(tmp_path):
    """As on two machines whose caches are disks of their own."""
    members = job.start(2, tmp_path / "out", blind, f"file://{tmp_path}/remote", tmp_path)
    for member in members:
        member.join()
    for rank in range(2):
        assert "BPO_CACHE must name a directory on a disk that all processes see" in job.said(tmp_path / "out", rank)


def blind(rank, url, path):
    os.environ["BPO_CACHE"] = str(path / "cache")
    if rank == 1:
        from bpo.store import upload

        upload._text = lambda place: ""  # what another machine reads there
    job.collect(rank, url)
