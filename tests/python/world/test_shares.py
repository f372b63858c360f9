"""Processes that share pairs, each with the rows of its own, choose to the bit what one process chooses."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest

import bpo
import bpo.pairs.linear
import bpo.world.shares
import job
from bpo import _core
from bpo.pairs.clustering import clustered
from bpo.pairs.direction import prompts_agree
from bpo.pairs.linear import training_direction
from bpo.pairs.pair_gradients import PairGradients, unit_features
from bpo.world.shares import sharing
from bpo.world.world import world
from store_writer import flip
from tiny import scored_rows

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no forkserver")
ROWS = scored_rows(105, 5)
PART = 64


def few_fits():
    """Parts of few rows, so that each process has some, and fewer fits than to find out which penalty is best takes."""
    bpo.pairs.linear._ROWS_AT_ONCE, bpo.pairs.linear._PENALTIES, bpo.pairs.linear._FOLDS = PART, (300.0, 30.0), 2


def gradients():
    """All pairs of prompts with five responses; some of them the same, some of no use."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((130, 5, 64)).astype(np.float32)
    rows[40:70] = rows[40]
    rows = rows.reshape(-1, 64)
    rows[123] = np.nan
    first, second = np.triu_indices(5, 1)
    prompts = np.repeat(np.arange(130), len(first))
    pairs = 5 * prompts[:, None] + np.tile(np.stack([first, second], axis=1), (130, 1))
    weights = generator.uniform(0.2, 1.0, len(pairs)).astype(np.float32)
    weights[[0, 777]] = 0
    return PairGradients(rows, pairs, weights[:, None] * np.array([-1, 1], dtype=np.float32)), prompts


def rows_of(pairs, rank, size):
    """The rows of a process: tiles have at most 252 rows and are dealt out in 64 blocks."""
    tiles, seen = [[]], set()
    for pair in pairs.tolist():
        if len(seen | set(pair)) > 252 or (len(seen) > 250):
            tiles.append([])
            seen = set()
        seen |= set(pair)
        tiles[-1].append(pair)
    own = tiles[rank * len(tiles) // size : (rank + 1) * len(tiles) // size]
    assert len(tiles) <= 64
    return np.unique([row for tile in own for pair in tile for row in pair]).astype(int)


def only(gradients, kept):
    """The same without all rows but some."""
    rows = np.full_like(gradients.rows, np.nan)
    rows[kept] = gradients.rows[kept]
    return gradients._replace(rows=rows)


def stages(shares):
    """What is found of pairs, as bytes, with those rows alone that a process has."""
    whole, prompts = gradients()
    usable = np.isfinite(whole.rows[whole.pairs]).all(axis=(1, 2)) & whole.coefficients.any(axis=1)
    good = np.flatnonzero(usable)
    own = slice(None)
    if shares is not None:
        own = np.union1d(*(rows_of(pairs, shares.rank, shares.size) for pairs in (whole.pairs, whole.pairs[usable])))
    found = {}
    for metric, clusters in (("euclidean", 4), ("cosine", 20), ("euclidean", 170)):
        config = bpo.SelectConfig(n_clusters=clusters, metric=metric, max_iter=5, threads=1)
        clusters_found = clustered(only(whole, own), config, 3, None, shares)
        np.testing.assert_array_equal(clusters_found.usable, usable)
        found[metric, clusters] = dataclasses.astuple(clusters_found)
    features = unit_features(whole, clusters_found.informativeness, usable).take(good)
    limits = {"prompts": prompts[usable], "max_depth": 2, "processes": shares, "threads": 1}
    found["matching"] = _core.matching(*only(features, own), features.rows[5], 25, **limits)
    # Several at once, too.
    limits |= {"min_depth": 1, "clusters": clusters_found.labels[good]}
    found["within clusters"] = _core.matching(*only(features, own), features.rows[5], 200, **limits)
    found["agree"] = prompts_agree(features, np.ones(len(good), dtype=bool), prompts[good], 1, shares)
    # These go by parts of the rows in their order.
    used = np.unique(features.pairs)
    if shares is not None:
        parts = np.split(used, range(PART, len(used), PART))[shares.part(-(-len(used) // PART))]
        own = np.concatenate(parts)
    found["direction"] = training_direction(only(features, own), prompts[good], 2, shares)
    return pickle.dumps({name: _plain(values) for name, values in found.items()})


def _plain(values):
    values = values if isinstance(values, tuple) else (values,)
    return [(np.asarray(each).dtype.str, np.asarray(each).shape, np.asarray(each).tobytes()) for each in values]


ASKED = {
    "bpo": {"evidence": True},
    "matching": {"strategy": "matching"},
    "by length": {"config": {"length_control": "balance", "usefulness": {"alignment": 1.0, "score_gap": 0.5}}},
    "easiest": {"strategy": "easiest", "config": {"order": "easiest_first"}},
    "coreset": {"strategy": "coreset", "config": {"trust": "audit"}},
    "less": {"strategy": "less", "target": ROWS[:9]},
}
# What more or fewer than three processes are asked.
FEW = {2: ["bpo"], 3: list(ASKED), 4: ["matching"]}


def selections(store, output, names):
    """Selections of some kinds, saved."""
    for name in names:
        given = {"evidence": False, **ASKED[name], "config": {"threads": 1, **ASKED[name].get("config", {})}}
        bpo.select(None, ROWS, budget=60, store=store, progress=False, **given).save(output / name)


def everything(rank, store, output, names):
    few_fits()
    with sharing(world(), 600.0) as shares:
        found = stages(shares)
    (output / f"stages-{rank}").write_bytes(found)
    selections(store, output / f"selections-{rank}", names)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A store, and what one process makes of it."""
    path = tmp_path_factory.mktemp("one")
    job.result(prepared, path)
    return path


def prepared(path):
    few_fits()
    job.collect(0, path / "store", ROWS, tokens_per_batch=4096)
    (path / "stages").write_bytes(stages(None))
    selections(path / "store", path / "selections", ASKED)


def assert_same(left, right, names):
    for name in names:
        one, other = (bpo.Selection.load(path / name) for path in (left, right))
        assert one.pairs.equals(other.pairs), name
        assert one.dataset.to_list() == other.dataset.to_list(), name
        for field in ("strategy", "budget", "seed", "config", "skipped", "noted", "evidence"):
            assert json.dumps(getattr(one, field)) == json.dumps(getattr(other, field)), (name, field)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_finds_and_chooses_what_one_does(tmp_path, one, size):
    names = FEW[size]
    job.finish(job.start(size, tmp_path, everything, one / "store", tmp_path, names), tmp_path)
    wanted = pickle.loads((one / "stages").read_bytes())
    for rank in range(size):
        found = pickle.loads((tmp_path / f"stages-{rank}").read_bytes())
        assert [name for name in wanted if found[name] != wanted[name]] == []
        assert_same(tmp_path / f"selections-{rank}", one / "selections", names)


def choosing(rank, store, timeout=600.0):
    config = {"threads": 1, "process_timeout": timeout}
    bpo.select(None, ROWS, budget=60, strategy="matching", store=store, config=config, progress=False)


def at_the_third_turn(rank, store, what, hit=1, timeout=600.0):
    """One process is hit in the middle of k-means, while it has the sums."""
    received, turns = bpo.world.shares.Shares.receive, []

    def receive(self, state):
        turns.append(received(self, state))
        if len(turns) == 3:
            os.kill(os.getpid(), what)
            time.sleep(0.3)  # until the main thread has seen it
        return turns[-1]

    if rank == hit:
        bpo.world.shares.Shares.receive = receive
    choosing(rank, store, timeout)


def test_where_one_is_killed_or_interrupted_the_others_end_and_say_so(tmp_path, one):
    for what, expected in (
        (signal.SIGKILL, r"ConnectionError: Process \d \(.*\) of 3 lost a process of its job"),
        (signal.SIGINT, r"ConnectionError: Process 1 \(.*\) of 3 was ended: KeyboardInterrupt"),
    ):
        output = tmp_path / what.name
        members = job.start(3, output, at_the_third_turn, one / "store", what)
        for member in members:
            member.join(60)
        assert [member.exitcode for member in members] == [1, -9 if what == signal.SIGKILL else 1, 1]
        for rank in (0, 2):
            assert re.search(expected, job.said(output, rank)), job.said(output, rank)


def test_a_row_that_one_finds_damaged_ends_all(tmp_path, one):
    shutil.copytree(one / "store", tmp_path / "store")
    flip(tmp_path / "store" / "rows.f16", (tmp_path / "store" / "rows.f16").stat().st_size - 300)
    members = job.start(2, tmp_path, choosing, tmp_path / "store")
    job.refused(members, tmp_path, "StoreDamagedError")


@pytest.mark.parametrize("hit", [0, 1, 2])
def test_one_that_is_stopped_in_its_turn_is_named_by_all_others(tmp_path, one, hit):
    """The first one also keeps the numbers by which the others would hear of it."""
    members = job.start(3, tmp_path, at_the_third_turn, one / "store", signal.SIGSTOP, hit, 5.0)
    others = [rank for rank in range(3) if rank != hit]
    for rank in others:
        members[rank].join(600)
    members[hit].kill()
    for rank in others:
        expected = (
            rf"TimeoutError: Process {hit} \({members[hit].pid} on .*\).* of 3 hangs: for 5 s \(process_timeout\)"
        )
        assert members[rank].exitcode == 1 and re.search(expected, job.said(tmp_path, rank)), job.said(tmp_path, rank)


def slow(rank, store, how):
    """The first process alone takes longer than one may hang: at work, or asleep."""

    def strategy(candidacy):
        began = time.monotonic()
        while time.monotonic() - began < 8:
            time.sleep(0.0 if how == "at work" else 1.0)
        return np.arange(len(candidacy.eligible)) < candidacy.budget, np.zeros(len(candidacy.eligible))

    bpo.register_strategy("slow", strategy, needs={"gradients"})
    config = {"threads": 1, "process_timeout": 5.0}
    selection = bpo.select(None, ROWS, budget=60, strategy="slow", store=store, config=config, progress=False)
    assert len(selection) == 60


def test_one_that_works_for_longer_than_one_may_hang_is_waited_for(tmp_path, one):
    job.finish(job.start(2, tmp_path / "at work", slow, one / "store", "at work"), tmp_path / "at work")
    members = job.start(2, tmp_path / "asleep", slow, one / "store", "asleep")
    members[1].join(600)
    assert "TimeoutError: Process 0 (" in job.said(tmp_path / "asleep", 1)
    job.kill(members)
