"""Calls of every function of the core with as many rows or pairs as asked for, in a process of their own:
``python core_calls.py NAME COUNT FOLDER interrupts`` (or ``limits``).
"""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np

from bpo import _core

D = 4
RECORD = np.dtype((np.void, 72))
CALLS = {}
# Megabytes of memory between one try and the next, where a call takes long.
STEPS = {"coreset_picks": 12}


def removing(path, function):
    """A call before which a directory is removed, which takes its time and cannot be interrupted."""
    function.prepare = lambda: shutil.rmtree(path, ignore_errors=True)
    return function


def call(function):
    CALLS[function.__name__] = function
    return function


def _rows(n, d=D, dtype=np.float16):
    return np.random.default_rng(0).standard_normal((n, d), dtype=np.float32).astype(dtype)


def _pairs(n, d=D, scattered=False):
    """Rows, pairs and coefficients: those of prompts with eight responses, or of any two rows."""
    if scattered:
        rows = _rows(n // 4, d)
        pairs = np.random.default_rng(1).integers(0, len(rows), (n, 2))
    else:
        prompts = -(-n // 28)
        rows = _rows(8 * prompts, d)
        own = np.array([(i, j) for i in range(8) for j in range(i)])
        pairs = (8 * np.arange(prompts)[:, None, None] + own).reshape(-1, 2)[:n]
    return rows, pairs, np.tile(np.float32([1, -1]), (n, 1))


def _clusters(n):
    return (np.arange(n) // 28 % 50).astype(np.int32)


def _kmeans(n, d=D, dtype=np.float16, **settings):
    rows = _rows(n, d) if dtype != np.int8 else np.random.default_rng(0).integers(-99, 99, (n, d), dtype=np.int8)
    return lambda: _core.kmeans(rows, 8, max_iter=2, **settings)


@call
def kmeans(n, folder):
    return _kmeans(n)


@call
def kmeans_given(n, folder):
    return _kmeans(n, init=_rows(8, dtype=np.float32))


@call
def kmeans_batches(n, folder):
    return _kmeans(n, batch_size=n // 3)


@call
def kmeans_weights(n, folder):
    return _kmeans(n, sample_weight=np.ones(n, dtype=np.float32), metric="cosine")


@call
def kmeans_int8(n, folder):
    n //= 4
    return _kmeans(n, 48, np.int8, scales=np.ones(n, dtype=np.float32))


@call
def kmeans_empty(n, folder):
    """Centroids far from all points, each of which takes one."""
    init = 1000 + _rows(8, dtype=np.float32)
    init[0] = 0
    return _kmeans(n, init=init)


@call
def assign(n, folder):
    rows, centroids = _rows(n), _rows(16, dtype=np.float32)
    return lambda: _core.assign(rows, centroids)


def _pair_kmeans(n, scattered=False, **settings):
    arrays = _pairs(n, scattered=scattered)
    return lambda: _core.pair_kmeans(*arrays, 8, max_iter=2, **settings)


@call
def pair_kmeans(n, folder):
    return _pair_kmeans(n)


@call
def pair_kmeans_scattered(n, folder):
    return _pair_kmeans(n, scattered=True, init=_rows(8, dtype=np.float32))


@call
def pair_kmeans_cosine(n, folder):
    return _pair_kmeans(n, metric="cosine")


@call
def pair_norms(n, folder):
    arrays = _pairs(n)
    return lambda: _core.pair_norms(*arrays)


@call
def score_pairs(n, folder):
    arrays, centroids, labels = _pairs(n), _rows(50, dtype=np.float32), _clusters(n)
    return lambda: _core.score_pairs(*arrays, centroids, labels)


@call
def coreset(n, folder):
    arrays, clusters = _pairs(n), _clusters(n)
    return lambda: _core.coreset(*arrays, clusters, n // 200)


@call
def coreset_limits(n, folder):
    arrays, clusters, prompts = _pairs(n), _clusters(n), np.arange(n) // 28
    eligible = np.ones(n, dtype=bool)
    return lambda: _core.coreset(*arrays, clusters, n // 200, eligible=eligible, prompts=prompts, max_depth=3)


@call
def coreset_picks(n, folder):
    """Few long pairs, all of which are picked and stay in float64."""
    rows, pairs = _rows(48, 300_000), np.arange(48).reshape(24, 2)
    coefficients, clusters = np.ones((24, 2), dtype=np.float32), np.zeros(24, dtype=np.int32)
    return lambda: _core.coreset(rows, pairs, coefficients, clusters, 24)


@call
def d_optimal(n, folder):
    arrays, prompts = _pairs(n), np.arange(n) // 28
    return lambda: _core.d_optimal(*arrays, n // 1000, prompts=prompts, max_depth=3)


@call
def matching(n, folder):
    arrays, prompts = _pairs(n), np.arange(n) // 28
    target = np.ones(arrays[0].shape[1], dtype=np.float32)
    return lambda: _core.matching(*arrays, target, n // 1000, prompts=prompts, max_depth=3)


@call
def matching_of_clusters(n, folder):
    arrays, prompts = _pairs(n), np.arange(n) // 28
    target = np.ones(arrays[0].shape[1], dtype=np.float32)
    each = {"prompts": prompts, "min_depth": 1, "clusters": _clusters(n), "cluster_weights": np.ones(50)}
    return lambda: _core.matching(*arrays, target, n // 20, **each)


@call
def row_products(n, folder):
    rows, index = _rows(n // 4), np.arange(n) % (n // 4)
    return lambda: _core.row_products(rows, index, np.ones(rows.shape[1]))


@call
def row_sum(n, folder):
    rows, index = _rows(n // 4), np.arange(n) % (n // 4)
    return lambda: _core.row_sum(rows, index, np.ones(n))


def _allocate_depth(n, prompts, clusters):
    usefulness = np.random.default_rng(2).standard_normal(n)
    return lambda: _core.allocate_depth(prompts, clusters, usefulness, n // 2)


@call
def allocate_depth(n, folder):
    return _allocate_depth(n, np.arange(n) // 28, _clusters(n))


@call
def allocate_depth_scattered(n, folder):
    return _allocate_depth(n, np.arange(n) // 28 * 10**9, np.zeros(n, dtype=np.int32))


@call
def allocate_depth_clusters(n, folder):
    """As many clusters as pairs."""
    return _allocate_depth(n, np.arange(n) // 28, np.arange(n, dtype=np.int32))


def _ranking_keys(n, ranking, dtype):
    scores = np.random.default_rng(2).standard_normal(n).astype(dtype)
    return lambda: _core.ranking_keys(scores, ranking)


@call
def ranking_keys(n, folder):
    return _ranking_keys(n, "softmax", np.float64)


@call
def ranking_keys_float32(n, folder):
    return _ranking_keys(n, "random", np.float32)


def _sketch(rows, width, dim, **settings):
    gradients = np.ones((rows, width), dtype=np.float16)
    sketcher = _core.Sketcher(dim, **settings)
    return lambda: sketcher.sketch(gradients)


@call
def sketch_short(n, folder):
    return _sketch(n, 8, 8)


@call
def sketch_long(n, folder):
    return _sketch(64, n // 2, 1024)


@call
def sketch_repeated(n, folder):
    return _sketch(8, n // 20, 256, nnz=256)


@call
def sketch_dense(n, folder):
    return _sketch(n, 8, 64, kind="rademacher")


def _store(n, folder, name="store"):
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    with _core.StoreWriter.create(path, D, "{}", dtype="float16") as writer:
        for first in range(0, n, 1 << 18):
            count = min(n - first, 1 << 18)
            writer.append(_rows(count, dtype=np.float32), np.zeros(count, dtype=RECORD))
    return path


@call
def store_append(n, folder):
    sketches, records = _rows(n, dtype=np.float32), np.zeros(n, dtype=RECORD)
    shutil.rmtree(folder / "store", ignore_errors=True)
    writer = _core.StoreWriter.create(folder / "store", D, "{}", dtype="int8")
    return lambda: writer.append(sketches, records)


@call
def store_commit(n, folder):
    """Of wide rows: at 8 million, half a gigabyte of them."""
    n //= 64
    sketches, records = _rows(n, 1024, np.float32), np.zeros(n, dtype=RECORD)

    def append_and_commit():
        writer = _core.StoreWriter.create(folder / "store", 1024, "{}")
        writer.append(sketches, records)
        writer.commit()

    return removing(folder / "store", append_and_commit)


@call
def store_append_to(n, folder):
    path = _store(n, folder)
    return lambda: _core.StoreWriter.append_to(path).close()


@call
def store_open(n, folder):
    path = _store(n, folder)
    return lambda: _core.StoreReader(path)


@call
def store_records(n, folder):
    return _core.StoreReader(_store(n, folder)).records


@call
def store_verify(n, folder):
    return _core.StoreReader(_store(n, folder)).verify


@call
def store_check(n, folder):
    reader = _core.StoreReader(_store(n, folder))
    return lambda: reader.check(np.ones(n, dtype=bool))


@call
def store_copy(n, folder):
    reader = _core.StoreReader(_store(n, folder))

    def copy():
        with _core.StoreWriter.create(folder / "copy", D, "{}", dtype="float32") as writer:
            writer.copy_from(reader, np.ones(n, dtype=bool))

    return removing(folder / "copy", copy)


@call
def store_repair(n, folder):
    path = _store(n, folder)

    def damage_and_repair():
        with (path / "rows.f16").open("r+b") as file:
            file.write(os.urandom(8))
        _core.repair_store(path)

    return damage_and_repair


def serve_interrupts(call):
    """For each line that comes in, calls; says when it began, and how and when that ended."""
    calls = False

    def interrupt(*_):
        if calls:  # else it came too late
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    prepare = getattr(call, "prepare", lambda: None)
    for _ in sys.stdin:
        said = "interrupted"
        prepare()
        try:
            calls = True
            print("began", time.monotonic(), flush=True)
            call()
            said = "ended"
        except KeyboardInterrupt:
            pass
        calls = False
        print(said, time.monotonic(), flush=True)


def serve_limits(call, step):
    """Calls with no more memory than there is, and then more and more; says what came of it."""
    import resource

    prepare = getattr(call, "prepare", lambda: None)
    prepare()
    call()
    outcomes = []
    for megabytes in range(0, 600, step):
        size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
        prepare()
        resource.setrlimit(resource.RLIMIT_AS, (size + (megabytes << 20), resource.RLIM_INFINITY))
        try:
            call()
        except (MemoryError, RuntimeError) as error:
            outcomes.append(str(error))  # the latter where there is no room for a thread
        else:
            outcomes.append("")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if outcomes[-3:] == [""] * 3:
            break
    print("\n".join(outcomes))


if __name__ == "__main__":
    name, count, folder, serve = sys.argv[1:]
    called = CALLS[name](int(count), Path(folder))
    if serve == "limits":
        serve_limits(called, STEPS.get(name, 4))
    else:
        serve_interrupts(called)
