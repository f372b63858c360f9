"""Scores of pairs against a plain NumPy reference, and the rankings made of them."""

import numpy as np
import pytest

from bpo._core import pair_norms, ranking_keys, score_pairs


@pytest.fixture
def problem():
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((300, 33), dtype=np.float32)
    pairs = generator.integers(300, size=(900, 2))
    pairs[:, 1] = (pairs[:, 0] + 1 + pairs[:, 1] % 299) % 300
    coefficients = generator.standard_normal((900, 2), dtype=np.float32)
    points = coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]
    coefficients /= np.linalg.norm(points, axis=1, keepdims=True)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    centroids = generator.standard_normal((6, 33), dtype=np.float32)
    labels = generator.integers(6, size=900).astype(np.int32)
    return rows, pairs, coefficients, points, centroids, labels


def test_norms(problem):
    rows, pairs, coefficients, points, *_ = problem
    np.testing.assert_allclose(pair_norms(rows, pairs, coefficients), 1, rtol=1e-5)
    np.testing.assert_allclose(pair_norms(rows, pairs, 3 * coefficients), np.linalg.norm(3 * points, axis=1), rtol=1e-5)


def test_scores(problem):
    rows, pairs, coefficients, points, centroids, labels = problem
    scores = score_pairs(rows, pairs, coefficients, centroids, labels)
    unit = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    np.testing.assert_allclose(scores.centrality, (points * unit[labels]).sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(scores.distance, np.linalg.norm(points - centroids[labels], axis=1), atol=1e-5)
    mean = points.mean(axis=0)
    np.testing.assert_allclose(scores.direction, mean / np.linalg.norm(mean), atol=1e-5)
    np.testing.assert_allclose(scores.alignment, points @ scores.direction, atol=1e-5)


def test_given_direction_is_normalised(problem):
    rows, pairs, coefficients, points, centroids, labels = problem
    direction = np.arange(33, dtype=np.float32)
    scores = score_pairs(rows, pairs, coefficients, centroids, labels, direction=direction)
    np.testing.assert_allclose(scores.direction, direction / np.linalg.norm(direction), rtol=1e-5)
    np.testing.assert_allclose(scores.alignment, points @ scores.direction, atol=1e-5)


def test_degenerate_directions_score_zero(problem):
    rows, pairs, coefficients, _, centroids, labels = problem
    pairs = np.concatenate([pairs, pairs])
    coefficients = np.concatenate([coefficients, -coefficients])
    labels = np.concatenate([labels, labels])
    scores = score_pairs(rows, pairs, coefficients, 0 * centroids, labels)
    assert not scores.centrality.any()
    np.testing.assert_allclose(scores.distance, 1, rtol=1e-5)


def test_pairs_on_their_centroid_and_rows_far_away():
    generator = np.random.default_rng(0)
    rows = (1000 + generator.standard_normal((40, 64))).astype(np.float32)
    pairs = np.stack([np.arange(0, 40, 2), np.arange(1, 40, 2)], axis=1)
    coefficients = np.tile(np.array([[0.5, -0.5]], dtype=np.float32), (20, 1))
    points = 0.5 * (rows[pairs[:, 0]].astype(np.float64) - rows[pairs[:, 1]])
    labels = np.arange(20, dtype=np.int32)
    scores = score_pairs(rows, pairs, coefficients, points.astype(np.float32), labels)
    lengths = np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(pair_norms(rows, pairs, coefficients), lengths, rtol=1e-6)
    np.testing.assert_allclose(scores.centrality, lengths, rtol=1e-6)
    np.testing.assert_allclose(scores.distance, 0, atol=1e-6)
    np.testing.assert_allclose(scores.alignment, points @ scores.direction, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pairs_that_share_rows(dtype):
    generator = np.random.default_rng(1)
    rows = generator.standard_normal((120, 48)).astype(dtype)
    first, second = np.triu_indices(6, 1)
    pairs = np.concatenate([6 * prompt + np.stack([first, second], axis=1) for prompt in range(20)])
    pairs = np.concatenate([pairs, pairs[:7], pairs[:5, ::-1]]).copy()
    coefficients = generator.standard_normal((len(pairs), 2), dtype=np.float32)
    wide = rows.astype(np.float64)
    points = coefficients[:, :1] * wide[pairs[:, 0]] + coefficients[:, 1:] * wide[pairs[:, 1]]
    centroids = generator.standard_normal((3, 48), dtype=np.float32)
    labels = generator.integers(3, size=len(pairs)).astype(np.int32)
    scores = score_pairs(rows, pairs, coefficients, centroids, labels)
    mean = points.mean(axis=0)
    np.testing.assert_allclose(scores.direction, mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(scores.distance, np.linalg.norm(points - centroids[labels], axis=1), rtol=1e-5)
    np.testing.assert_allclose(pair_norms(rows, pairs, coefficients), np.linalg.norm(points, axis=1), rtol=1e-5)


def test_same_bits_for_any_threads(problem):
    rows, pairs, coefficients, _, centroids, labels = problem
    one = score_pairs(rows, pairs, coefficients, centroids, labels, threads=1)
    two = score_pairs(rows, pairs, coefficients, centroids, labels, threads=2)
    for name in ("centrality", "distance", "alignment", "direction"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    norms = [pair_norms(rows, pairs, coefficients, threads=threads) for threads in (1, 2)]
    np.testing.assert_array_equal(*norms)


def test_errors_name_the_culprit(problem):
    rows, pairs, coefficients, _, centroids, labels = problem
    with pytest.raises(ValueError, match=r"`centroids` must have shape \(k, 33\)"):
        score_pairs(rows, pairs, coefficients, centroids[:, :5].copy(), labels)
    wrong = labels.copy()
    wrong[13] = 6
    with pytest.raises(ValueError, match=r"`labels` holds cluster 6 at index 13; it must be in 0\.\.6"):
        score_pairs(rows, pairs, coefficients, centroids, wrong)
    broken = rows.copy()
    broken[pairs[5, 0]] = np.inf
    with pytest.raises(ValueError, match="holds a NaN or infinite value"):
        pair_norms(broken, pairs, coefficients)
    with pytest.raises(ValueError, match="`coefficients` row 2 holds a NaN or infinite value, NaN in column"):
        coefficients[2] = np.nan
        pair_norms(rows, pairs, coefficients)


def test_rankings():
    scores = np.random.default_rng(0).standard_normal(200)
    np.testing.assert_array_equal(ranking_keys(scores), scores)
    np.testing.assert_array_equal(ranking_keys(scores.astype(np.float32), "farthest"), -scores.astype(np.float32))
    for ranking in ("random", "softmax"):
        keys = ranking_keys(scores, ranking, seed=5)
        np.testing.assert_array_equal(keys, ranking_keys(scores, ranking, seed=5))
        np.testing.assert_array_equal(keys[:50], ranking_keys(scores[:50].copy(), ranking, seed=5))
        assert (keys != ranking_keys(scores, ranking, seed=6)).any()


def test_softmax_ranking_draws_from_the_softmax():
    scores = np.array([0.0, 1.0, 2.0, -1.0])
    temperature = 0.7
    firsts = [ranking_keys(scores, "softmax", temperature=temperature, seed=seed).argmax() for seed in range(4000)]
    expected = np.exp(scores / temperature) / np.exp(scores / temperature).sum()
    np.testing.assert_allclose(np.bincount(firsts, minlength=4) / 4000, expected, atol=0.035)


def test_ranking_errors():
    scores = np.array([0.0, np.nan])
    with pytest.raises(ValueError, match="`scores` holds NaN at index 1"):
        ranking_keys(scores)
    with pytest.raises(ValueError, match="`temperature` must be finite and above 0, but is 0"):
        ranking_keys(scores[:1], "softmax", temperature=0)
    with pytest.raises(ValueError, match="`ranking` must be"):
        ranking_keys(scores[:1], "best")
