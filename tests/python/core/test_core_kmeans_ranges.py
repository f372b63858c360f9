"""K-means and `assign` over all that float32 can hold: exact, or refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bpo._core import assign, kmeans, pair_kmeans, pair_norms, score_pairs

# 20 values are too few for products in 8 bits; 64 and 200 are not.
DIMS = [20, 64, 200]
LARGEST = float(np.finfo(np.float32).max)


def squares(points, centroids):
    """Squared distances in float64, of which no difference or square of float32 numbers leaves the range."""
    points, centroids = points.astype(float), centroids.astype(float)
    return np.stack([((points - centroid) ** 2).sum(axis=1) for centroid in centroids], axis=1)


def assert_nearest(points, centroids, labels, distances):
    """Every label is of a centroid than which none is nearer, up to what rounding a float32 distance leaves."""
    assert labels.min() >= 0 and labels.max() < len(centroids)
    all_squares = squares(points, centroids)
    own = np.sqrt(all_squares[np.arange(len(points)), labels])
    assert (own <= np.sqrt(all_squares.min(axis=1)) * (1 + 1e-5)).all()
    with np.errstate(over="ignore"):
        expected = own.astype(np.float32)
    np.testing.assert_allclose(distances, expected, rtol=1e-5, atol=2e-45)


def normal(generator, size, scale):
    """Normal numbers times a scale, no longer than float32 allows."""
    return np.clip(generator.standard_normal(size) * scale, -LARGEST, LARGEST).astype(np.float32)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("ratio", [1e-10, 1e-20, 1e-30, 1e-38, 1e-45])
def test_one_long_point_among_short_ones(d, ratio):
    generator = np.random.default_rng(0)
    points = normal(generator, (400, d), ratio)
    points[0] = normal(generator, d, 1 / np.sqrt(d))
    centroids = points[:8].copy()
    labels, distances = assign(points, centroids)
    assert_nearest(points, centroids, labels, distances)
    np.testing.assert_array_equal(labels, squares(points, centroids).argmin(axis=1))
    for init in ("k-means++", centroids):
        result = kmeans(points, 8, init=init, max_iter=5)
        assert_nearest(points, result.centroids, result.labels, result.distances)


def test_seeding_tells_points_apart_that_float32_squares_to_zero():
    """Blobs of 1e-25 beside a point of length 1: each gets a centroid, as each alone does."""
    generator = np.random.default_rng(0)
    centres = normal(generator, (6, 64), 3e-25)
    points = np.concatenate([np.repeat(centres, 40, axis=0) * np.float32(1.001), normal(generator, (1, 64), 1)])
    points[:240] += normal(generator, (240, 64), 1e-27)
    for seed in range(5):
        labels = kmeans(points, 7, seed=seed).labels
        assert len(set(labels)) == 7 and len(set(labels[:240].reshape(6, 40).T.tolist()[0])) == 6
        assert (labels[:240].reshape(6, 40) == labels[:240:40, None]).all()


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("centroid_scale", [1e-44, 1e-38, 1e-20, 1, 1e18, LARGEST])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-22, 1, 1e20, 1e37])
def test_points_and_centroids_of_any_scale(d, scale, centroid_scale):
    generator = np.random.default_rng(0)
    points, centroids = normal(generator, (60, d), scale), normal(generator, (20, d), centroid_scale)
    # Some of each are shorter by many orders, some zero.
    points[::5] *= np.float32(1e-20)
    centroids[::3] *= np.float32(1e-18)
    points[7] = centroids[4] = 0
    labels, distances = assign(points, centroids)
    assert_nearest(points, centroids, labels, distances)
    result = kmeans(points, 20, init=centroids, max_iter=3, tol=0)
    assert np.isfinite(result.centroids).all() and np.isfinite(result.inertia).all()
    assert_nearest(points, result.centroids, result.labels, result.distances)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_and_the_smallest_number(d, sign):
    points = np.full((30, d), sign * LARGEST, dtype=np.float32)
    points[::2] *= -1
    points[::3] = 1.4e-45
    centroids = points[:4].copy()
    labels, distances = assign(points, centroids)
    np.testing.assert_array_equal(labels, squares(points, centroids).argmin(axis=1))
    assert not distances.any()
    result = kmeans(points, 3, seed=1)
    assert_nearest(points, result.centroids, result.labels, result.distances)
    assert not result.distances.any()


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize(
    ("row_exponent", "exponent"),
    [(-120, -60), (-120, 0), (-60, -60), (-60, 60), (0, -60), (0, 60), (60, -50), (60, 60)],
)
def test_pairs_of_rows_and_coefficients_of_any_scale(d, row_exponent, exponent):
    generator = np.random.default_rng(0)
    rows = np.ldexp(generator.standard_normal((40, d)), row_exponent).astype(np.float32)
    pairs = np.stack([np.arange(39), np.arange(1, 40)], axis=1)
    coefficients = np.ldexp(generator.standard_normal((39, 2)), exponent - row_exponent).astype(np.float32)
    coefficients[::4] *= np.float32(2.0**-50)
    points = coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]
    result = pair_kmeans(rows, pairs, coefficients, 5, init=points[:5].copy(), max_iter=3)
    assert_nearest(points, result.centroids, result.labels, result.distances)
    norms = np.linalg.norm(points.astype(float), axis=1)
    np.testing.assert_allclose(pair_norms(rows, pairs, coefficients), norms, rtol=1e-5)
    scores = score_pairs(rows, pairs, coefficients, result.centroids, result.labels)
    own = result.centroids.astype(float)[result.labels]
    np.testing.assert_allclose(
        scores.distance, np.linalg.norm(points - own, axis=1), rtol=1e-5, atol=1e-6 * norms.max()
    )
    lengths = np.linalg.norm(own, axis=1)
    centrality = (points.astype(float) * own).sum(axis=1) / lengths
    np.testing.assert_allclose(scores.centrality, centrality, rtol=1e-5, atol=1e-5 * norms.max())


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e20, 1e37])
def test_directions_do_not_depend_on_lengths(d, scale):
    generator = np.random.default_rng(0)
    points = normal(generator, (300, d), 1)
    lengths = normal(generator, (300, 1), 1)
    centroids = points[:7].copy()
    plain, distances = assign(points, centroids, metric="cosine")
    scaled = points * (0.1 + np.abs(lengths)) * np.float32(scale)
    for of_centroids in (1e-37, 1, 1e37):
        labels, others = assign(scaled, centroids * np.float32(of_centroids), metric="cosine")
        np.testing.assert_array_equal(labels, plain)
        np.testing.assert_allclose(others, distances, atol=1e-6)
    result = kmeans(scaled, 7, init=centroids, metric="cosine", max_iter=3)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, rtol=1e-5)


def test_points_too_short_for_a_direction_are_named():
    points = normal(np.random.default_rng(0), (20, 64), 1)
    points[11] = 1e-42
    with pytest.raises(ValueError, match="point 11 is too short for float32 to bring it to unit length"):
        assign(points, points[:3].copy(), metric="cosine")
    with pytest.raises(ValueError, match="point 11 is too short"):
        kmeans(points, 3, metric="cosine")
    points[11] = 0
    with pytest.raises(ValueError, match="point 11 has zero length"):
        kmeans(points, 3, metric="cosine")


@pytest.mark.parametrize("level", ["plain", "avx2"])
def test_every_level_is_as_exact(level):
    """The level is chosen when the core is first used, so another process tests it."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_core_kmeans_ranges as tests
for d in tests.DIMS:
    for ratio in (1e-20, 1e-38):
        tests.test_one_long_point_among_short_ones(d, ratio)
    for scale, of_centroids in ((1e-44, 1), (1, 1e18), (1e37, 1e-20)):
        tests.test_points_and_centroids_of_any_scale(d, scale, of_centroids)
    tests.test_the_largest_and_the_smallest_number(d, 1)
"""
    environment = {**os.environ, "BPO_SIMD": level}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_unknown_level_is_refused():
    program = "import bpo._core"
    environment = {**os.environ, "BPO_SIMD": "avx1024"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode and "BPO_SIMD=avx1024 names no instruction set; it may be one of plain, " in run.stderr
