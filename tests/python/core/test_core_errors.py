"""What a caller may want to go on from has a class of its own, which says in plain values where the culprit is."""

import concurrent.futures
import copy
import json
import multiprocessing
import pickle

import numpy as np
import pytest

import bpo
from bpo import NoDirectionError, NotDefiniteError, NotFiniteError, OutOfRangeError, _core
from bpo.store.gradient_store import RECORD

ROWS = np.random.default_rng(0).standard_normal((30, 8), dtype=np.float32)
PAIRS = np.stack([np.arange(20), np.arange(20) + 7], axis=1)
COEFFICIENTS = np.tile(np.float32([1, -1]), (20, 1))
LABELS = np.zeros(20, dtype=np.int32)
KEYS = np.arange(20, dtype=np.float64)
PROMPTS = np.arange(20)


def put(array, place, value):
    changed = array.copy()
    changed[place] = value
    return changed


def pair_kmeans(rows=ROWS, pairs=PAIRS, coefficients=COEFFICIENTS, **settings):
    return _core.pair_kmeans(rows, pairs, coefficients, 3, **settings)


def score(rows=ROWS, centroids=ROWS[:2], labels=LABELS, **settings):
    return _core.score_pairs(rows, PAIRS, COEFFICIENTS, centroids, labels, **settings)


def matching(rows=ROWS, target=ROWS[0]):
    return _core.matching(rows, PAIRS, COEFFICIENTS, target, 3)


def allocate(clusters=LABELS, usefulness=KEYS, **settings):
    return _core.allocate_depth(PROMPTS, clusters, usefulness, 20, **settings)


def append(path, sketches):
    with _core.StoreWriter.create(path, sketches.shape[1], json.dumps({})) as writer:
        writer.append(sketches, np.zeros(len(sketches), dtype=RECORD))


NAN, INF = float("nan"), float("inf")
BROKEN = put(ROWS, (9, 5), NAN)
INT8 = ROWS.astype(np.int8)

# What is called; name of the argument, row, column and number.
NOT_FINITE = {
    "kmeans": (lambda: _core.kmeans(BROKEN, 3), "rows", 9, 5, NAN),
    "kmeans of float16": (lambda: _core.kmeans(put(ROWS.astype(np.float16), (9, 5), -INF), 3), "rows", 9, 5, -INF),
    "mini-batches": (lambda: _core.kmeans(BROKEN, 3, batch_size=10), "rows", 9, 5, NAN),
    "weights": (
        lambda: _core.kmeans(ROWS, 3, sample_weight=put(ROWS[:, 0] ** 2, 4, INF)),
        "sample_weight",
        4,
        None,
        INF,
    ),
    "scales": (lambda: _core.kmeans(INT8, 3, scales=put(ROWS[:, 0], 4, NAN)), "scales", 4, None, NAN),
    "init": (lambda: _core.kmeans(ROWS, 3, init=put(ROWS[:3], (2, 1), NAN)), "init", 2, 1, NAN),
    "assign": (lambda: _core.assign(BROKEN, ROWS[:3]), "rows", 9, 5, NAN),
    "centroids": (lambda: _core.assign(ROWS, put(ROWS[:3], (2, 1), INF)), "centroids", 2, 1, INF),
    "pair_kmeans": (lambda: pair_kmeans(BROKEN), "rows", 9, 5, NAN),
    "coefficients": (
        lambda: pair_kmeans(coefficients=put(COEFFICIENTS, (3, 1), INF)),
        "coefficients",
        3,
        1,
        INF,
    ),
    "pair_norms": (lambda: _core.pair_norms(BROKEN, PAIRS, COEFFICIENTS), "rows", 9, 5, NAN),
    "score_pairs": (lambda: score(BROKEN), "rows", 9, 5, NAN),
    "centroids of scores": (lambda: score(centroids=put(ROWS[:2], (1, 7), NAN)), "centroids", 1, 7, NAN),
    "direction": (lambda: score(direction=put(ROWS[0], 2, NAN)), "direction", 2, None, NAN),
    "coreset": (lambda: _core.coreset(BROKEN, PAIRS, COEFFICIENTS, LABELS, 3), "rows", 9, 5, NAN),
    "d_optimal": (lambda: _core.d_optimal(BROKEN, PAIRS, COEFFICIENTS, 3), "rows", 9, 5, NAN),
    "matching": (lambda: matching(BROKEN), "rows", 9, 5, NAN),
    "target": (lambda: matching(target=put(ROWS[0], 2, NAN)), "target", 2, None, NAN),
    "usefulness": (lambda: allocate(usefulness=put(KEYS, 11, NAN)), "usefulness", 11, None, NAN),
    "cluster_weights": (lambda: allocate(cluster_weights=np.array([1, NAN])), "cluster_weights", 1, None, NAN),
    "scores": (lambda: _core.ranking_keys(put(KEYS, 11, -INF)), "scores", 11, None, -INF),
}

# Two rows that float32 holds, and their sum, which it does not.
LONG = put(ROWS, [28, 29], 3e38), put(PAIRS, 6, [28, 29]), put(COEFFICIENTS, 6, 1)
TOO_LONG = {
    "pair_kmeans": lambda: pair_kmeans(*LONG),
    "pair_norms": lambda: _core.pair_norms(*LONG),
    "score_pairs": lambda: _core.score_pairs(*LONG, ROWS[:2], LABELS),
    "coreset": lambda: _core.coreset(*LONG, LABELS, 3),
    "d_optimal": lambda: _core.d_optimal(*LONG, 3),
}

# What is called; name of the argument, place and number.
OUT_OF_RANGE = {
    "pair": (lambda: pair_kmeans(pairs=put(PAIRS, (5, 1), 30)), "pairs", 5, 30),
    "negative pair": (lambda: _core.pair_norms(ROWS, put(PAIRS, (5, 1), -1), COEFFICIENTS), "pairs", 5, -1),
    "label": (lambda: score(labels=put(LABELS, 8, 2)), "labels", 8, 2),
    "cluster": (lambda: allocate(clusters=put(LABELS, 8, -3)), "clusters", 8, -3),
    "cluster of a coreset": (
        lambda: _core.coreset(ROWS, PAIRS, COEFFICIENTS, put(LABELS, 8, -3), 3),
        "clusters",
        8,
        -3,
    ),
    "sample_weight": (lambda: _core.kmeans(ROWS, 3, sample_weight=put(ROWS[:, 0] ** 2, 4, -2)), "sample_weight", 4, -2),
    "cluster_weights": (lambda: allocate(cluster_weights=np.array([1, -0.5])), "cluster_weights", 1, -0.5),
}

NO_DIRECTION = {
    "row": (lambda: _core.kmeans(put(ROWS, 6, 0), 3, metric="cosine"), "rows", 6),
    "row in mini-batches": (lambda: _core.kmeans(put(ROWS, 6, 0), 3, metric="cosine", batch_size=10), "rows", 6),
    "short row": (lambda: _core.kmeans(put(ROWS, 6, 1e-44), 3, metric="cosine"), "rows", 6),
    "pair": (lambda: pair_kmeans(pairs=put(PAIRS, 6, 4), metric="cosine"), "pairs", 6),
    "init": (lambda: _core.kmeans(ROWS, 3, metric="cosine", init=put(ROWS[:3], 1, 0)), "init", 1),
    "centroids": (lambda: _core.assign(ROWS, put(ROWS[:3], 1, 0), metric="cosine"), "centroids", 1),
    "target": (lambda: matching(target=np.zeros(8, dtype=np.float32)), "target", None),
}


def raised(call, kind):
    """The error of a call, of that class and no other, after a journey through a pickle and a copy."""
    with pytest.raises(ValueError) as caught:
        call()
    assert type(caught.value) is kind
    for travelled in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(travelled) is kind
        assert str(travelled) == str(caught.value)
        np.testing.assert_equal(vars(travelled), vars(caught.value))  # NaN equals NaN
    return caught.value


@pytest.mark.parametrize("case", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_number_that_is_not_finite_is_named(case):
    call, array, index, column, value = case
    error = raised(call, NotFiniteError)
    np.testing.assert_equal(vars(error), {"array": array, "index": index, "column": column, "value": value})
    assert [type(entry) for entry in vars(error).values()] == [str, int, type(column), float]
    assert column is None or f"row {index} holds a NaN or infinite value, {value}".lower() in str(error).lower()


@pytest.mark.parametrize("call", TOO_LONG.values(), ids=TOO_LONG)
def test_a_pair_too_long_for_float32_is_named(call):
    assert vars(raised(call, NotFiniteError)) == {"array": "pairs", "index": 6, "column": None, "value": INF}


def test_a_sketch_that_is_not_finite_is_named_whatever_lies_before_it(tmp_path):
    # Beyond what is looked at between two looks at the cancel token, which is cut at a whole row.
    sketches = np.zeros((50_000, 7), dtype=np.float32)
    error = raised(lambda: append(tmp_path, put(sketches, (40_000, 6), INF)), NotFiniteError)
    assert vars(error) == {"array": "sketches", "index": 40_000, "column": 6, "value": INF}


@pytest.mark.parametrize("case", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
def test_what_refers_to_nothing_is_named(case):
    call, array, index, value = case
    error = raised(call, OutOfRangeError)
    assert vars(error) == {"array": array, "index": index, "value": value}
    assert type(error.index) is int and type(error.value) is type(0.5 if "weight" in array else 0)


@pytest.mark.parametrize("case", NO_DIRECTION.values(), ids=NO_DIRECTION)
def test_what_has_no_direction_is_named(case):
    call, array, index = case
    assert vars(raised(call, NoDirectionError)) == {"array": array, "index": index}


def test_a_wrong_shape_or_setting_is_a_plain_value_error():
    raised(lambda: _core.kmeans(ROWS, 31), ValueError)
    raised(lambda: _core.kmeans(ROWS, 3, max_iter=0), ValueError)
    raised(lambda: allocate(clusters=LABELS[1:]), ValueError)
    raised(lambda: _core.allocate_depth(PROMPTS, LABELS, KEYS, 3), ValueError)


def test_too_small_a_regularization_can_be_raised_until_it_suffices():
    rows = np.random.default_rng(0).standard_normal((200, 40), dtype=np.float32)
    pairs = np.random.default_rng(1).integers(0, 200, size=(500, 2))
    coefficients = np.tile(np.float32([1, -1]), (500, 1))
    regularization, refused = 1e-30, 0
    while True:
        try:
            picks, _ = _core.d_optimal(rows, pairs, coefficients, 400, regularization=regularization)
            break
        except NotDefiniteError as error:
            assert "`regularization`" in str(error)
            regularization, refused = regularization * 1e3, refused + 1
    assert refused > 0 and regularization < 1
    assert len(picks) == 400


def test_a_run_drops_the_rows_that_are_not_finite_and_goes_on():
    gradients = put(put(ROWS, (9, 5), NAN), (21, 0), INF)
    kept, dropped = np.arange(len(gradients)), []
    while True:
        try:
            found = _core.kmeans(np.ascontiguousarray(gradients[kept]), 3)
            break
        except bpo.NotFiniteError as error:
            assert error.array == "rows"
            dropped.append((int(kept[error.index]), error.column))
            kept = np.delete(kept, error.index)
    assert dropped == [(9, 5), (21, 0)]
    assert len(found.labels) == 28
    np.testing.assert_array_equal(found.centroids, _core.kmeans(np.delete(ROWS, [9, 21], axis=0), 3).centroids)


def cluster(rows):
    return _core.kmeans(rows, 3).inertia[-1]


def test_an_error_comes_out_of_another_process_whole():
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool, pytest.raises(NotFiniteError) as caught:
        pool.submit(cluster, BROKEN).result()
    assert (caught.value.array, caught.value.index, caught.value.column) == ("rows", 9, 5)
