"""Every function of the core with arguments drawn at random: a result that holds, or an error that says what is wrong.

BPO_TORTURE=N draws N times as many.
"""

import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from bpo import _core

DRAWS = 250 * int(os.environ.get("BPO_TORTURE", 1))
REFUSALS = (TypeError, ValueError, MemoryError, OverflowError)


class Draw:
    """Arguments of one call, most of them right."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.wrong = self.generator.integers(0, 3)

    def one_of(self, *choices):
        return choices[self.generator.integers(len(choices))]

    def chance(self, probability):
        return self.generator.random() < probability

    def array(self, values, *, optional=False):
        """An array as it is, or spoiled, if there is something wrong left to do."""
        if optional and self.chance(0.4):
            return None
        if self.wrong == 0 or not self.chance(0.35):
            return values
        self.wrong -= 1
        spoiled = self.one_of(*SPOILED)(self, values)
        return values if spoiled is None else spoiled

    def number(self, *right):
        """A number that is right, or one that is not."""
        if self.wrong == 0 or not self.chance(0.3):
            return self.one_of(*right)
        self.wrong -= 1
        return self.one_of(
            -1, 0, 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, np.nan, None, "1", []
        )

    def rows(self, n=None, d=None):
        """Rows of any type, and their scales."""
        n, d = n or self.one_of(1, 2, 40, 300), d or self.one_of(1, 3, 20, 64)
        values = self.generator.standard_normal((n, d)) * 10.0 ** self.one_of(0, 0, 0, -30, 30)
        kind = self.one_of("float32", "float32", "float16", "bfloat16", "int8")
        if kind == "int8":
            return self.generator.integers(-128, 128, (n, d)).astype(np.int8), np.ones(n, dtype=np.float32)
        if kind == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), None
        with np.errstate(over="ignore"):
            return values.astype(kind), None

    def pairs(self):
        """Rows, pairs and coefficients."""
        rows, _ = self.rows()
        n = self.one_of(1, 7, 60, 400)
        pairs = self.generator.integers(0, len(rows), (n, 2))
        return rows, pairs, self.generator.standard_normal((n, 2)).astype(np.float32)

    def threads(self):
        return self.number(1, 2, None)


def _unaligned(draw, values):
    values = np.ascontiguousarray(values)
    buffer = bytearray(values.nbytes + 1)
    buffer[1:] = values.tobytes()
    return np.frombuffer(buffer, dtype=values.dtype, offset=1).reshape(values.shape)


def _any_bytes(draw, values):
    if values.dtype != bool:
        return None
    return draw.generator.integers(0, 256, values.shape).astype(np.uint8).view(bool)


def _with(value):
    def place(draw, values):
        if values.size == 0 or values.dtype.kind not in "fiu":
            return None
        values = values.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            values.flat[draw.generator.integers(values.size)] = np.array(value).astype(values.dtype)
        return values

    return place


def _frozen(draw, values):
    values = values.copy()
    values.flags.writeable = False
    return values


SPOILED = [
    _unaligned,
    _any_bytes,
    _frozen,
    *map(_with, [np.nan, np.inf, -np.inf, 0, -1, 3e38, 1e-45, 2**62]),
    lambda draw, values: np.asfortranarray(values),
    lambda draw, values: values[::-1],
    lambda draw, values: np.repeat(values, 2, axis=0)[::2],
    lambda draw, values: values[:-1],
    lambda draw, values: values[:0],
    lambda draw, values: values[..., :0],
    lambda draw, values: np.zeros((2**40, 0), dtype=values.dtype),
    lambda draw, values: values[None],
    lambda draw, values: values.ravel(),
    lambda draw, values: np.float64(1.5),
    lambda draw, values: np.array(1.5, dtype=np.float32),
    lambda draw, values: values.astype(draw.one_of(np.float64, np.float16, np.int64, np.int32, np.uint8, bool, object)),
    lambda draw, values: values.astype(values.dtype.newbyteorder()),
    lambda draw, values: values.tolist(),
    lambda draw, values: draw.one_of(None, "rows", 7, {}, np.datetime64("now"), np.array(["a"])),
    lambda draw, values: np.ma.masked_array(values),
]


def assert_labels(labels, n, k):
    assert labels.shape == (n,) and labels.dtype == np.int32
    assert n == 0 or 0 <= labels.min() <= labels.max() < k


def assert_clustering(result, n, k, d):
    assert_labels(result.labels, n, k)
    assert result.centroids.shape == (k, d) and np.isfinite(result.centroids).all()
    assert result.distances.shape == (n,) and not np.isnan(result.distances).any()
    assert len(result.inertia) == result.n_iter + 1 and not np.isnan(result.inertia).any()


def draw_kmeans(draw):
    rows, scales = draw.rows()
    n, d = rows.shape
    k = draw.number(1, min(n, 3), min(n, 17))
    start = draw.generator.standard_normal((k if isinstance(k, int) and 0 < k <= n else 1, d)).astype(np.float32)
    rows = draw.array(rows)
    result = _core.kmeans(
        rows,
        k,
        scales=None if scales is None else draw.array(scales),
        sample_weight=draw.array(draw.generator.random(n).astype(np.float32), optional=True),
        init=draw.one_of("k-means++", draw.array(start), draw.one_of("random", "k-means++")),
        metric=draw.one_of("euclidean", "cosine", "euclidean", "l1"),
        max_iter=draw.one_of(1, 3, draw.number(5)),
        tol=draw.number(0, 1e-4),
        seed=draw.number(0, 2**64 - 1),
        batch_size=draw.one_of(None, 1, 100, draw.number(50)),
        cache_bytes=draw.number(0, 100, 2**30),
        threads=draw.threads(),
    )
    assert_clustering(result, len(rows), k, d)


def draw_assign(draw):
    rows, scales = draw.rows()
    centroids = draw.generator.standard_normal((draw.one_of(1, 5, 40), rows.shape[1])).astype(np.float32)
    rows, centroids = draw.array(rows), draw.array(centroids)
    scales = None if scales is None else draw.array(scales)
    metric = draw.one_of("euclidean", "cosine")
    labels, distances = _core.assign(rows, centroids, scales=scales, metric=metric, threads=draw.threads())
    assert_labels(labels, len(rows), len(centroids))
    assert distances.shape == labels.shape and not np.isnan(distances).any()


def draw_pair_kmeans(draw):
    rows, pairs, coefficients = draw.pairs()
    k = draw.number(1, min(len(pairs), 6))
    pairs = draw.array(pairs)
    result = _core.pair_kmeans(
        draw.array(rows),
        pairs,
        draw.array(coefficients),
        k,
        metric=draw.one_of("euclidean", "cosine"),
        max_iter=draw.number(1, 4),
        seed=draw.number(3),
        cache_bytes=draw.number(0, 2**30),
        threads=draw.threads(),
    )
    assert_clustering(result, len(pairs), k, rows.shape[1])


def draw_pair_norms(draw):
    rows, pairs, coefficients = map(draw.array, draw.pairs())
    finite = draw.one_of(True, False)
    norms = _core.pair_norms(rows, pairs, coefficients, finite=finite, threads=draw.threads())
    assert norms.shape == (len(pairs),)
    assert np.isfinite(norms).all() or not finite


def draw_score_pairs(draw):
    rows, pairs, coefficients = draw.pairs()
    centroids = draw.generator.standard_normal((4, rows.shape[1])).astype(np.float32)
    labels = draw.generator.integers(0, 4, len(pairs)).astype(np.int32)
    pairs = draw.array(pairs)
    scores = _core.score_pairs(
        draw.array(rows),
        pairs,
        draw.array(coefficients),
        draw.array(centroids),
        draw.array(labels),
        direction=draw.array(centroids[0], optional=True),
        threads=draw.threads(),
    )
    for score in (scores.centrality, scores.distance, scores.alignment):
        assert score.shape == (len(pairs),) and np.isfinite(score).all()
    assert np.isfinite(scores.direction).all()


def limits(draw, n):
    """Eligible pairs, prompts and depth."""
    eligible = draw.array(draw.generator.random(n) < 0.7, optional=True)
    prompts = draw.array(draw.generator.integers(-3, 9, n) * draw.one_of(1, 2**59), optional=True)
    return {"eligible": eligible, "prompts": prompts, "max_depth": draw.one_of(None, 1, draw.number(3))}


def assert_picks(picks, values, budget, n, limited):
    assert picks.shape == values.shape and len(picks) <= min(budget, n)
    assert len(np.unique(picks)) == len(picks) and (len(picks) == 0 or 0 <= picks.min() <= picks.max() < n)
    assert not np.isnan(values).any()
    if limited["eligible"] is not None:
        assert limited["eligible"].view(np.uint8)[picks].all()
    if limited["max_depth"] is not None:
        assert (
            len(picks) == 0 or np.unique(limited["prompts"][picks], return_counts=True)[1].max() <= limited["max_depth"]
        )
    elif limited["eligible"] is None:
        assert len(picks) == min(budget, n)


def draw_coreset(draw):
    rows, pairs, coefficients = draw.pairs()
    clusters = draw.array(draw.generator.integers(0, 3, len(pairs)).astype(np.int32))
    budget, limited, pairs = draw.number(1, 20, 2**63), limits(draw, len(pairs)), draw.array(pairs)
    picks, weights = _core.coreset(
        draw.array(rows),
        pairs,
        draw.array(coefficients),
        clusters,
        budget,
        **limited,
        cache_bytes=draw.number(0, 1000, 2**30),
        threads=draw.threads(),
    )
    assert_picks(picks, weights, budget, len(pairs), limited)
    assert (weights >= 0).all()


def draw_d_optimal(draw):
    rows, pairs, coefficients = draw.pairs()
    budget, limited, pairs = draw.number(1, 20, 2**63), limits(draw, len(pairs)), draw.array(pairs)
    regularization = draw.number(1, 1e-3, 1e30)
    picks, gains = _core.d_optimal(
        draw.array(rows),
        pairs,
        draw.array(coefficients),
        budget,
        regularization=regularization,
        **limited,
        threads=draw.threads(),
    )
    assert_picks(picks, gains, budget, len(pairs), limited)


def draw_matching(draw):
    rows, pairs, coefficients = draw.pairs()
    target = draw.generator.standard_normal(rows.shape[1]).astype(np.float32)
    budget, limited = draw.number(1, 20, 2**63), limits(draw, len(pairs))
    clusters = draw.array(draw.generator.integers(0, 4, len(pairs)).astype(np.int32), optional=True)
    weights = draw.array(draw.generator.random(4), optional=True) if clusters is not None else None
    pairs = draw.array(pairs)
    picks, cosines = _core.matching(
        draw.array(rows),
        pairs,
        draw.array(coefficients),
        draw.array(target),
        budget,
        **limited,
        min_depth=draw.number(0, 1),
        clusters=clusters,
        cluster_weights=weights,
        cache_bytes=draw.number(0, 1000, 2**30),
        threads=draw.threads(),
    )
    assert_picks(picks, cosines, budget, len(pairs), limited)
    assert (abs(cosines) <= 1 + 1e-9).all()


def draw_row_products(draw):
    rows, vector = draw_pass(draw)
    index = draw.array(draw.generator.integers(0, len(rows), draw.one_of(0, 1, 500)))
    products = _core.row_products(draw.array(rows), index, draw.array(vector), threads=draw.threads())
    assert products.shape == index.shape and products.dtype == np.float64


def draw_row_sum(draw):
    rows, vector = draw_pass(draw)
    index = draw.generator.integers(0, len(rows), draw.one_of(0, 1, 500))
    weights = draw.array(draw.generator.random(len(index)))
    total = _core.row_sum(draw.array(rows), draw.array(index), weights, threads=draw.threads())
    assert total.ndim == 1 and len(total) in (0, len(vector)) and total.dtype == np.float64


def draw_pass(draw):
    rows = draw.pairs()[0]
    return rows, draw.generator.random(rows.shape[1])


def draw_allocate_depth(draw):
    n = draw.one_of(1, 30, 500)
    prompts = draw.array(draw.generator.integers(-3, 9, n) * draw.one_of(1, 2**59))
    clusters = draw.array(draw.generator.integers(0, 4, n).astype(np.int32))
    usefulness = draw.array(draw.generator.standard_normal(n))
    budget, max_depth = draw.number(9, 12, 2**63), draw.one_of(None, 2, draw.number(4))
    kept = _core.allocate_depth(
        prompts,
        clusters,
        usefulness,
        budget,
        min_depth=draw.number(0, 1),
        max_depth=max_depth,
        cluster_weights=draw.array(draw.generator.random(4), optional=True),
        threads=draw.threads(),
    )
    sizes = np.unique(prompts, return_counts=True)[1]
    allowed = sizes.sum() if max_depth is None else sum(min(int(size), max_depth) for size in sizes)
    assert kept.dtype == bool and kept.shape == prompts.shape and kept.sum() == min(budget, allowed)


def draw_ranking_keys(draw):
    scores = draw.array(draw.generator.standard_normal(draw.one_of(0, 1, 500)).astype(draw.one_of("f4", "f8")))
    ranking = draw.one_of("nearest", "farthest", "softmax", "random", "softmax", "best")
    temperature, seed = draw.number(1.0, 1e-300), draw.number(0, 2**64 - 1)
    keys = _core.ranking_keys(scores, ranking, temperature=temperature, seed=seed, threads=draw.threads())
    assert keys.shape == scores.shape and keys.dtype == np.float64 and not np.isnan(keys).any()


def draw_sketch(draw):
    kind = draw.one_of("sparse", "rademacher", "normal", "dense")
    sketcher = _core.Sketcher(draw.number(8, 64, 1), seed=draw.number(0, 5), kind=kind, nnz=draw.number(1, 2))
    gradients, _ = draw.rows(n=draw.one_of(1, 5))
    gradients, n = draw.array(gradients), len(gradients)
    out = draw.array(np.zeros((n, sketcher.dim), dtype=np.float32), optional=True) if sketcher.dim < 1000 else None
    sketch = sketcher.sketch(gradients, draw.number(0, 3, 10**9), out, threads=draw.threads())
    assert sketch.shape == (len(gradients), sketcher.dim) and sketch.dtype == np.float32


FUNCTIONS = [
    draw_kmeans,
    draw_assign,
    draw_pair_kmeans,
    draw_pair_norms,
    draw_score_pairs,
    draw_coreset,
    draw_d_optimal,
    draw_matching,
    draw_row_products,
    draw_row_sum,
    draw_allocate_depth,
    draw_ranking_keys,
    draw_sketch,
]


def holds(seed, call):
    """Whether a call has a result, and not one of the errors that it may have."""
    try:
        call(seed)
    except REFUSALS:
        return False
    except BaseException as error:  # a panic is no Exception
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return True


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__.removeprefix("draw_"))
def test_any_arguments_give_a_result_that_holds_or_an_error(function):
    held = sum(holds(seed, lambda seed: function(Draw(seed))) for seed in range(DRAWS))
    assert DRAWS / 8 < held < DRAWS, held


def test_any_arguments_to_a_store(tmp_path):
    """An append that is refused leaves the rows that were there; masks of rows may hold any byte."""
    record = np.dtype((np.void, 72))

    def append(seed):
        draw = Draw(seed)
        n = draw.one_of(1, 3, 50)
        sketches = draw.generator.standard_normal((n, 8)).astype(np.float32)
        writer.append(draw.array(sketches), draw.array(np.zeros(n, dtype=record)))

    with _core.StoreWriter.create(tmp_path / "store", 8, "{}", dtype="float16") as writer:
        held = 0
        for seed in range(DRAWS // 2):
            before = len(writer)
            held += (appended := holds(seed, append))
            assert len(writer) >= before if appended else len(writer) == before
        count = len(writer)
    assert held > DRAWS / 8
    reader = _core.StoreReader(tmp_path / "store")
    assert len(reader) == count and len(reader.verify()) == 0

    def check(seed):
        draw = Draw(seed)
        reader.check(draw.array(draw.generator.random(count) < 0.5), threads=draw.threads())

    assert sum(holds(seed, check) for seed in range(DRAWS // 2)) > DRAWS / 8


def test_masks_may_hold_any_byte(tmp_path):
    """NumPy lets a bool hold any byte; all but zero are true."""
    mask = np.uint8([0, 1, 2, 128, 255, 0]).view(bool)
    rows = np.eye(6, dtype=np.float32)
    pairs = np.stack([np.arange(6), np.arange(6)], axis=1)
    coefficients = np.tile(np.float32([1, 0]), (6, 1))
    clusters = np.zeros(6, dtype=np.int32)
    assert sorted(_core.coreset(rows, pairs, coefficients, clusters, 6, eligible=mask)[0]) == [1, 2, 3, 4]
    assert sorted(_core.d_optimal(rows, pairs, coefficients, 6, eligible=mask)[0]) == [1, 2, 3, 4]
    with _core.StoreWriter.create(tmp_path / "store", 6, "{}") as writer:
        writer.append(rows, np.zeros(6, dtype=np.dtype((np.void, 72))))
    reader = _core.StoreReader(tmp_path / "store")
    path = reader.rows_path
    damaged = bytearray(path.read_bytes())
    damaged[4 * 6 * 4 + 1] ^= 1
    path.write_bytes(damaged)
    assert reader.verify(mask).tolist() == [4]
    with pytest.raises(_core.StoreDamagedError, match="row 4"):
        reader.check(mask)
    with _core.StoreWriter.create(tmp_path / "other", 6, "{}") as writer:
        writer.copy_from(reader, np.uint8([0, 1, 2, 128, 0, 0]).view(bool))
        assert len(writer) == 3


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_arrays_that_are_not_aligned_are_named(tmp_path, offset):
    np.zeros(500, dtype=np.float32).tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", dtype=np.float32, mode="r", offset=offset, shape=(40, 4))
    with pytest.raises(ValueError, match=r"`rows` must be aligned in memory.* rows\.copy\(\)"):
        _core.kmeans(mapped, 3)
    _core.kmeans(mapped.copy(), 3)
    out = np.frombuffer(bytearray(40 * 8 * 4 + 4), dtype=np.float32, offset=offset, count=40 * 8).reshape(40, 8)
    with pytest.raises(ValueError, match=r"`out` must be aligned"):
        _core.Sketcher(8).sketch(np.zeros((40, 4), dtype=np.float32), 0, out)


def test_results_too_large_to_allocate():
    with pytest.raises(MemoryError):
        _core.Sketcher(1 << 24).sketch(np.zeros((1 << 30, 0), dtype=np.float32))
    rows = np.zeros((1 << 40, 0), dtype=np.float32)
    for call in (lambda: _core.kmeans(rows, 3), lambda: _core.assign(rows, np.zeros((2, 0), dtype=np.float32))):
        with pytest.raises(ValueError, match="d >= 1"):
            call()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does")
def test_pools_of_threads_are_bounded():
    def threads():
        return len(list(Path("/proc/self/task").iterdir()))

    scores = np.zeros(1)
    before = threads()
    for count in range(1, 41):
        _core.ranking_keys(scores, threads=count)
    # Those of pools that are given up end a moment later, which on a busy machine is long.
    bound, deadline = before + 40 + 39 + 38 + 37 + 36, time.monotonic() + 60
    while threads() > bound and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() <= bound
    with pytest.raises(ValueError, match="`threads` must be at least 1 and at most 1024"):
        _core.ranking_keys(scores, threads=100_000)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rows_that_another_thread_spoils(metric):
    """Whatever becomes of the rows meanwhile: labels of clusters, or an error."""
    rows = np.random.default_rng(0).standard_normal((4000, 64)).astype(np.float32)
    centroids = rows[:9].copy()
    stop = threading.Event()

    def spoil():
        generator = np.random.default_rng(1)
        while not stop.is_set():
            row = generator.integers(len(rows))
            rows[row] = np.nan
            rows[row] = 1

    calls = [
        lambda _: assert_labels(_core.assign(rows, centroids, metric=metric)[0], 4000, 9),
        lambda _: assert_labels(_core.kmeans(rows, 9, init=centroids, metric=metric, max_iter=3).labels, 4000, 9),
        lambda seed: assert_labels(_core.kmeans(rows, 9, metric=metric, max_iter=2, seed=seed).labels, 4000, 9),
    ]
    thread = threading.Thread(target=spoil)
    thread.start()
    try:
        for seed in range(10 * int(os.environ.get("BPO_TORTURE", 1))):
            for call in calls:
                holds(seed, call)
    finally:
        stop.set()
        thread.join()
