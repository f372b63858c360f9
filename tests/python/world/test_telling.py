"""What the first process tells the others arrives to the bit, in pieces of which none holds many, or not at all."""

import errno
import hashlib
import pickle
import sys
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import bpo.system.packed
import bpo.world.telling
import job
from bpo.world.world import world

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no forkserver")


def small_pieces():
    """So that little data takes many pieces, and lies on disk."""
    bpo.world.telling.PIECE, bpo.world.telling.AT_ONCE = 1000, 100
    bpo.system.packed.IN_MEMORY = 5000


def value():
    """All kinds of things that are told; tables in memory and mapped, with nulls, lists and words by number."""
    generator = np.random.default_rng(0)
    table = pa.table(
        {
            "number": generator.standard_normal(700),
            "maybe": pa.array([None if i % 3 else i for i in range(700)]),
            "text": ["é" * (i % 60) for i in range(700)],
            "lists": [[str(i)] * (i % 4) for i in range(700)],
            "words": pa.array(["red", None, "blue", "green"] * 175).dictionary_encode(),
        }
    )
    mapped = bpo.system.packed.as_table(table.schema, table.slice(3).to_batches(max_chunksize=50))
    texts = datasets.Dataset.from_dict(
        {"prompt": [f"{i}" * 9 for i in range(300)], "label": [i % 2 for i in range(300)]}
    )
    texts = texts.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    joined = datasets.concatenate_datasets(
        [texts, datasets.Dataset.from_dict({"more": [[i] for i in range(300)]})], axis=1
    )
    return {
        "tables": [table, mapped, table.slice(0, 0), mapped],
        "sets": [texts, joined, joined.shuffle(seed=0)],
        "arrays": [generator.standard_normal((400, 3)), np.arange(0), np.arange(60).reshape(6, 10).T],
        "texts": ["x" * 5000, ""],
        "nothing": None,
    }


def content(told):
    """All of it as bytes, whatever the pieces it lies in."""
    tables = [*told["tables"], *(each.with_format("arrow")[:] for each in told["sets"])]
    streams = []
    for table in tables:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.unify_dictionaries().combine_chunks())
        streams.append(hashlib.sha256(sink.getvalue()).hexdigest())
    sets = [(each.features, each._fingerprint, len(each)) for each in told["sets"]]
    arrays = [(each.dtype.str, each.shape, each.tobytes()) for each in told["arrays"]]
    return streams, sets, arrays, told["texts"], told["nothing"], told["tables"][1] is told["tables"][3]


def telling(rank, output):
    small_pieces()
    made = []

    def make():
        made.append(rank)
        return value()

    for _ in range(2):
        told = world().from_main(make)
    assert made == ([0, 0] if rank == 0 else [])
    assert world().from_main(lambda: 5) == 5
    (output / f"told-{rank}").write_bytes(pickle.dumps(content(told)))


@pytest.mark.parametrize("size", [2, 4])
def test_all_have_what_the_first_one_has(tmp_path, size):
    job.finish(job.start(size, tmp_path, telling, tmp_path), tmp_path)
    expected = content(value())
    for rank in range(size):
        assert pickle.loads((tmp_path / f"told-{rank}").read_bytes()) == expected


def used():
    """Bytes of memory of this process that are no file's."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def telling_much(rank, output):
    bpo.system.packed.IN_MEMORY = 4 << 20
    value = None
    if rank == 0:  # 256 MB in two tables, the one of a data set, on disk
        batch = pa.record_batch({"number": np.arange(1 << 16)})
        table = bpo.system.packed.as_table(batch.schema, (batch for _ in range(256)))
        value = [table, datasets.Dataset(table, fingerprint="of all")]
    most, ended = [used()], threading.Event()

    def look():
        while not ended.wait(0.002):
            most[0] = max(most[0], used())

    world().from_main(lambda: None)
    before = used()
    threading.Thread(target=look, daemon=True).start()
    told = world().from_main(lambda: value)
    ended.set()
    assert [told[0].num_rows, told[1].num_rows] == [256 << 16] * 2
    assert told[0]["number"].slice(99 << 16, 1 << 16).combine_chunks().equals(pa.array(np.arange(1 << 16)))
    print(f"{(most[0] - before) >> 20} MiB")
    assert most[0] - before < 128 << 20, f"{(most[0] - before) >> 20} MiB"  # 54 to 105 were seen


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_large_tables_take_little_memory_anywhere(tmp_path):
    job.finish(job.start(3, tmp_path, telling_much, tmp_path), tmp_path)


def failing(rank, how):
    small_pieces()
    work = value
    if how == "pickle":
        work = lambda: {**value(), "file": sys.stdout}  # noqa: E731
    elif how == "disk" and rank == 1:

        def full(schema, batches):
            next(iter(batches))
            raise OSError(errno.ENOSPC, "the disk of the second is full")

        bpo.world.telling.as_table = full
    elif how == "reading" and rank == 0:
        parts = bpo.world.telling._batches

        def damaged(table):
            yield next(parts(table))
            raise OSError(errno.EIO, "the disk of the first is damaged")

        bpo.world.telling._batches = damaged
    begin = time.monotonic()
    try:
        world().from_main(work)
    finally:
        assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("pickle", "cannot pickle"),
        ("disk", "the disk of the second is full"),
        ("reading", "the disk of the first is damaged"),
    ],
)
def test_what_goes_wrong_in_one_all_hear_of(tmp_path, how, expected):
    job.refused(job.start(3, tmp_path, failing, how), tmp_path, expected)
