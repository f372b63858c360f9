"""Shares of a store on disks of their own, and what puts them together."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import bpo
import job
from bpo.cli.main import main
from store_writer import contents, flip


def same(store, whole):
    """Whether two stores are the same, whenever they were committed, and have nothing beside their rows."""
    (left, right) = (contents(path) for path in (store, whole))
    left["records.bin"], right["records.bin"] = left["records.bin"][72:], right["records.bin"][72:]
    return left == right


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The store of one process, and three shares of it."""
    path = tmp_path_factory.mktemp("shards")
    job.collect(0, path / "whole")
    for number in (1, 2, 3):
        job.collect(0, path / f"{number}", shard=(number, 3))
    return path


def test_shares_make_the_store_of_one_process(tmp_path, made, capsys):
    whole = bpo.GradientStore.open(made / "whole")
    shares = [bpo.GradientStore.open(made / f"{number}") for number in (1, 2, 3)]
    assert sum(map(len, shares)) == len(whole) and min(map(len, shares)) > 0
    arguments = ["store", "gather", str(tmp_path / "all"), *(str(made / name) for name in ("3", "1", "2"))]
    assert main(arguments) == 0
    assert "70 responses" in capsys.readouterr().out
    assert same(tmp_path / "all", made / "whole")
    before = contents(tmp_path / "all")
    assert main(arguments) == 0 and contents(tmp_path / "all") == before
    assert len(job.collect(0, tmp_path / "all")) == 70, "and it is that of any run"
    assert contents(tmp_path / "all") == before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no forkserver")
def test_a_share_is_filled_by_several_processes_and_goes_on(tmp_path, made):
    store = tmp_path / "2"
    begun(store, made / "2", 3)
    job.finish(job.start(2, tmp_path / "out", sharing, store), tmp_path / "out")
    assert same(store, made / "2")


def sharing(rank, store):
    job.collect(rank, store, shard="2/3")


def test_what_is_missing_unfinished_or_given_twice_is_named(tmp_path, made):
    output = tmp_path / "all"
    with pytest.raises(ValueError, match=r"Of 3 shares 2 are missing: 1, 3\."):
        bpo.gather_stores(output, [made / "2"])
    with pytest.raises(ValueError, match=r"are both share 1 of 3; give each once"):
        shutil.copytree(made / "1", tmp_path / "again")
        bpo.gather_stores(output, [made / "1", tmp_path / "again"])
    begun(tmp_path / "begun", made / "2", 5)
    expected = r"begun, share 2 of 3, has 5 of its \d+ responses: run bpo collect --shard 2/3"
    with pytest.raises(ValueError, match=expected):
        bpo.gather_stores(output, [made / "1", tmp_path / "begun", made / "3"])
    with pytest.raises(ValueError, match="whole is no share of a store"):
        bpo.gather_stores(output, [made / "whole"])
    assert not output.exists()


def begun(path, store, n_rows):
    """A store of the first rows of another."""
    there = bpo.GradientStore.open(store)
    dtype = there.fingerprint["sketch"]["dtype"]
    with bpo._core.StoreWriter.create(path, there.rows.shape[1], json.dumps(there.fingerprint), dtype=dtype) as writer:
        writer.copy_from(there.reader, np.arange(len(there)) < n_rows)


def test_shares_of_other_things_are_refused_by_name(tmp_path, made):
    output = tmp_path / "all"
    for name, settings, expected in (
        ("sketch", {"sketch_dim": 32}, "was made with another sketch"),
        ("data", {"rows": job.ROWS[1:]}, "shares of other data, or of another tokens_per_batch"),
        ("batches", {"tokens_per_batch": 32}, "shares of other data, or of another tokens_per_batch"),
    ):
        job.collect(0, tmp_path / name, shard=(2, 3), **settings)
        with pytest.raises((ValueError, bpo.StoreError), match=expected):
            bpo.gather_stores(output, [made / "1", tmp_path / name, made / "3"])
    job.collect(0, tmp_path / "half", shard=(2, 2))
    with pytest.raises(bpo.StoreMismatchError, match=r"share 2 of 2, and .* is share 1 of 3"):
        bpo.gather_stores(output, [made / "1", tmp_path / "half"])
    assert not output.exists()


@pytest.mark.parametrize(
    ("shard", "expected"),
    [
        (None, r"is share 2 of 3; put all shares together with bpo store gather"),
        ((1, 3), r"is share 2 of 3, not 1 of 3"),
        ((2, 3), r"is share 2 of 3 of other data"),
    ],
)
def test_a_share_is_not_taken_for_another_store(made, shard, expected):
    rows = job.ROWS[1:] if shard == (2, 3) else job.ROWS
    before = contents(made / "2")
    with pytest.raises(bpo.StoreMismatchError, match=expected):
        job.collect(0, made / "2", rows, shard=shard)
    assert contents(made / "2") == before


@pytest.mark.parametrize("value", [(0, 2), (3, 2), "2", "a/b", (1, 2, 3), 1, (True, 2)])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match="shard must be a share of how many"):
        job.collect(0, None, shard=value)


def test_more_shares_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"makes 7 blocks, too few for 8 shares"):
        job.collect(0, None, shard=(1, 8))


def test_a_gathering_that_ends_anywhere_goes_on_to_the_same_bytes(tmp_path, made):
    shares = [made / f"{number}" for number in (1, 2, 3)]
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "2", damaged)
    flip(damaged / "rows.f16", 300)
    with pytest.raises(bpo.StoreDamagedError):
        bpo.gather_stores(tmp_path / "all", [shares[0], damaged, shares[2]])
    assert len(bpo.GradientStore.open(tmp_path / "all")) >= len(bpo.GradientStore.open(shares[0]))
    bpo.gather_stores(tmp_path / "all", shares)
    assert same(tmp_path / "all", made / "whole")


GATHER = """
import sys, bpo, bpo.store.shards
print("ready", flush=True)
sys.stdin.readline()
bpo.gather_stores(sys.argv[1], sys.argv[2:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_gatherings_go_on_to_the_same_bytes(tmp_path, made):
    shares, output = [str(made / f"{number}") for number in (3, 2, 1)], tmp_path / "all"
    generator = np.random.default_rng(0)
    for _ in range(int(os.environ.get("BPO_TORTURE", "0")) or 2):
        process = subprocess.Popen(
            [sys.executable, "-c", GATHER, str(output), *shares], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        process.stdin.write(b"\n")
        process.stdin.flush()
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.communicate()
    bpo.gather_stores(output, shares)
    assert same(output, made / "whole")
