"""The greedy D-optimal design against NumPy's determinants, and its limits."""

import numpy as np
import pytest

from bpo._core import d_optimal
from references import greedy_design


@pytest.fixture
def problem():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((90, 17), dtype=np.float32)
    prompts = np.repeat(np.arange(30), 3)
    first, second = np.triu_indices(3, 1)
    pairs = np.concatenate([3 * prompt + np.stack([first, second], axis=1) for prompt in range(30)])
    weights = generator.random(90, dtype=np.float32)
    return rows, pairs, np.stack([weights, -weights], axis=1), prompts


def vectors_of(rows, pairs, coefficients):
    return coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]


@pytest.mark.parametrize("regularization", [1e-3, 1.0])
@pytest.mark.parametrize("max_depth", [None, 1])
def test_picks_and_gains(problem, regularization, max_depth):
    rows, pairs, coefficients, prompts = problem
    eligible = np.arange(90) % 7 != 3
    limits = {"eligible": eligible, "prompts": prompts, "max_depth": max_depth}
    picks, gains = d_optimal(rows, pairs, coefficients, 40, regularization=regularization, **limits)
    vectors = vectors_of(rows, pairs, coefficients)
    expected = greedy_design(vectors, 40, regularization, prompts, max_depth or 90, eligible)
    np.testing.assert_array_equal(picks, expected[0])
    np.testing.assert_allclose(gains, expected[1], rtol=1e-8)


def test_copies_zeros_and_a_budget_above_all(problem):
    rows, pairs, coefficients, _ = problem
    coefficients[::4] = 0
    pairs = np.concatenate([pairs, pairs])
    coefficients = np.concatenate([coefficients, coefficients])
    picks, gains = d_optimal(rows, pairs, coefficients, 1000, regularization=0.1)
    assert sorted(picks) == list(range(180))
    assert (np.diff(gains) <= 1e-12).all()
    zero = np.flatnonzero(~coefficients.any(axis=1))
    np.testing.assert_array_equal(picks[-len(zero) :], zero)
    assert not gains[-len(zero) :].any()
    # A copy comes after its original.
    order = np.argsort(picks)
    assert (order[:90] < order[90:]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_same_bits_for_any_threads(problem, dtype):
    rows, pairs, coefficients, _ = problem
    one, two = (d_optimal(rows.astype(dtype), pairs, coefficients, 80, threads=threads) for threads in (1, 2))
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])


def test_errors_name_the_culprit(problem):
    rows, pairs, coefficients, prompts = problem
    with pytest.raises(ValueError, match="`regularization` must be finite and above 0, but is 0"):
        d_optimal(rows, pairs, coefficients, 5, regularization=0)
    with pytest.raises(TypeError, match="`max_depth` needs `prompts`"):
        d_optimal(rows, pairs, coefficients, 5, max_depth=2)
    with pytest.raises(ValueError, match=r"`prompts` must have shape \(90,\), one for each pair"):
        d_optimal(rows, pairs, coefficients, 5, prompts=prompts[:4], max_depth=2)
    with pytest.raises(ValueError, match=r"`rows` must have shape \(n, d\) with d in 1\.\.=8192"):
        d_optimal(np.zeros((90, 8193), dtype=np.float32), pairs, coefficients, 5)
    rows[pairs[3, 0]] = np.nan
    with pytest.raises(ValueError, match="`rows` row 3 holds a NaN or infinite value"):
        d_optimal(rows, pairs, coefficients, 5)
