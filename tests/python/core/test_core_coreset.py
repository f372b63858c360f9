"""The pursuit against a plain one over SciPy's non-negative least squares, and its limits."""

import numpy as np
import pytest

from bpo._core import coreset
from references import pursuit


@pytest.fixture
def problem():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((120, 40), dtype=np.float32)
    pairs = np.stack([generator.permutation(120)[:60], generator.permutation(120)[:60]], axis=1)
    pairs = np.concatenate([pairs, generator.permutation(pairs.ravel()).reshape(-1, 2)])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]].copy()
    vectors = rows[pairs[:, 0]] - rows[pairs[:, 1]]
    scale = 1 / np.linalg.norm(vectors, axis=1)
    coefficients = np.stack([scale, -scale], axis=1).astype(np.float32)
    clusters = generator.integers(3, size=len(pairs)).astype(np.int32)
    return rows, pairs, coefficients, clusters


def vectors_of(rows, pairs, coefficients):
    return coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]


@pytest.mark.parametrize("budget", [4, 30, 75])
def test_picks_and_weights(problem, budget):
    rows, pairs, coefficients, clusters = problem
    picks, weights = coreset(rows, pairs, coefficients, clusters, budget)
    assert len(picks) == budget
    vectors = vectors_of(rows, pairs, coefficients)
    start = 0
    for cluster in range(3):
        members = np.flatnonzero(clusters == cluster)
        quota = int((clusters[picks] == cluster).sum())
        assert abs(quota - budget * len(members) / len(pairs)) < 1
        expected, expected_weights = pursuit(vectors[members], quota)
        np.testing.assert_array_equal(picks[start : start + quota], members[expected])
        np.testing.assert_allclose(weights[start : start + quota], expected_weights, atol=1e-6)
        start += quota


def test_the_mean_of_a_cluster_is_reached(problem):
    rows, pairs, coefficients, clusters = problem
    rows = rows[:, :6].copy()
    picks, weights = coreset(rows, pairs, coefficients, clusters * 0, 60)
    vectors = vectors_of(rows, pairs, coefficients).astype(np.float64)
    np.testing.assert_allclose(weights @ vectors[picks], vectors.mean(axis=0), atol=1e-9)
    assert (weights >= 0).all()
    assert (weights > 0).sum() < 20


@pytest.mark.parametrize("max_depth", [None, 1, 2])
def test_limits(problem, max_depth):
    rows, pairs, coefficients, clusters = problem
    prompts = np.arange(len(pairs)) % 23 - 5
    eligible = np.arange(len(pairs)) % 5 != 0
    limits = {"eligible": eligible, "prompts": prompts, "max_depth": max_depth}
    picks, _ = coreset(rows, pairs, coefficients, clusters, 70, **limits)
    depths = np.unique(prompts[picks], return_counts=True)[1]
    sizes = np.unique(prompts[eligible], return_counts=True)[1]
    cap = max_depth or 70
    assert len(np.unique(picks)) == len(picks) == min(70, np.minimum(sizes, cap).sum())
    assert eligible[picks].all()
    assert depths.max() <= cap


def test_same_bits_for_any_threads(problem):
    rows, pairs, coefficients, clusters = problem
    for limits in ({}, {"prompts": np.arange(len(pairs)) % 31, "max_depth": 2}):
        one, two = (coreset(rows, pairs, coefficients, clusters, 50, threads=threads, **limits) for threads in (1, 2))
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[1], two[1])


def test_errors_name_the_culprit(problem):
    rows, pairs, coefficients, clusters = problem
    with pytest.raises(ValueError, match="`clusters` holds cluster -1 at index 2"):
        wrong = clusters.copy()
        wrong[2] = -1
        coreset(rows, pairs, coefficients, wrong, 5)
    with pytest.raises(ValueError, match="`clusters` must have shape"):
        coreset(rows, pairs, coefficients, clusters[:5], 5)
    rows[pairs[3, 0]] = np.inf
    with pytest.raises(ValueError, match=f"`rows` row {pairs[3, 0]} holds a NaN or infinite value"):
        coreset(rows, pairs, coefficients, clusters, 5)
    assert len(coreset(rows[:0], pairs[:0], coefficients[:0], clusters[:0], 5)[0]) == 0
