"""The proven bounds of the core where they are tight: data on which a bound that is a little too small decides wrongly.

Random data never come near: errors of rounding then point anywhere, and Cauchy and Schwarz are far from equality. Here
each error points straight at the difference between two centroids, and the true order is the other one. `tests/mutants`
plants the faults that these tests are to notice.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bpo._core import assign, coreset, d_optimal, kmeans, pair_kmeans, pair_norms, ranking_keys, score_pairs

# 65,536 values are the most that are multiplied in 8 bits.
DIMS = [64, 200, 65_536]
# Powers of two near 1e-25, 1 and 1e15.
EXPONENTS = [-83, 0, 50]


def nearest(points, centroids, metric="euclidean"):
    """Labels in float64, of which none may hang on a rounding in float32."""
    points, centroids = points.astype(float), centroids.astype(float)
    if metric == "cosine":
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
        centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    squares = np.stack([((points - centroid) ** 2).sum(axis=1) for centroid in centroids], axis=1)
    best, second = np.sort(squares, axis=1)[:, :2].T
    assert (best < second * (1 - 1e-5)).all()
    return squares.argmin(axis=1)


def lanes(point, centroid):
    """The squared distance as the core defines it: 32 chains in float32, folded as a tree."""
    terms = np.pad((point - centroid) ** 2, (0, -len(point) % 32)).reshape(-1, 32)
    sums = np.zeros(32, np.float32)
    for term in terms:
        sums += term
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return sums[0]


def signs(d):
    return np.where(np.random.default_rng(0).random(d) < 0.5, -1, 1)


def both(vector):
    """A vector and its opposite, whose mean is the origin."""
    return np.stack([vector, -vector]).astype(np.float32)


def assert_labels(expected, points, centroids, metric="euclidean"):
    """Of `assign`, which meets a few centroids without 8 bits, and of k-means, which always tries these: its result."""
    np.testing.assert_array_equal(assign(points, centroids, metric=metric)[0], expected)
    found = kmeans(points, len(centroids), init=centroids, metric=metric, max_iter=1)
    np.testing.assert_array_equal(found.labels, expected)
    return found


def halves(d):
    """Values from which rounding to 8 bits takes nearly half a step each, all in one direction, and that direction.

    The products of the two are small and positive, those of the rounded ones far below zero.
    """
    sign = signs(d)
    values = np.where(np.arange(d) % 2 == 1, 0.499 * sign, -0.501 * sign)
    direction = np.where(np.arange(d) % 2 == 1, sign, sign * 126 / 127)
    values[0], direction[0] = 127, 0
    return values, direction


# Products in 8 bits


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rounding_of_points(d, exponent, metric):
    values, direction = halves(d)
    points, centroids = np.ldexp(both(values), exponent), np.ldexp(both(direction), exponent)
    np.testing.assert_array_equal(nearest(points, centroids, metric), [0, 1])
    assert_labels([0, 1], points, centroids, metric)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rounding_of_centroids(d, exponent, metric):
    values, direction = halves(d)
    points, centroids = np.ldexp(both(direction), exponent), np.ldexp(both(values), exponent)
    np.testing.assert_array_equal(nearest(points, centroids, metric), [0, 1])
    assert_labels([0, 1], points, centroids, metric)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("length", [1, 2.0**-12])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_rounding_of_pairs(d, exponent, length, metric):
    """What rounding took of both rows adds up, and the coefficients multiply it."""
    values, direction = halves(d)
    rows = np.ldexp(both(values), exponent)
    pairs, coefficients = np.int64([[0, 1], [1, 0]]), np.float32([[0.5, -0.5]] * 2) * np.float32(length)
    points, centroids = rows * np.float32(length), np.ldexp(both(direction), exponent) * np.float32(length)
    np.testing.assert_array_equal(nearest(points, centroids, metric), [0, 1])
    # After one pass the centroids are the points, if they went where they belong.
    found = pair_kmeans(rows, pairs, coefficients, 2, init=centroids, metric=metric, max_iter=1)
    np.testing.assert_array_equal(found.labels, [0, 1])


def test_a_point_that_rounding_makes_longer():
    """The error of the centroid counts as often as the rounded point is long, half as long again as the point."""
    d = 60_000
    values, direction = np.full(d, 0.51) * signs(d), np.full(d, -0.51) * signs(d)
    values[0] = direction[0] = 127
    points, centroids = both(values), both(direction)
    np.testing.assert_array_equal(nearest(points, centroids), [0, 1])
    assert_labels([0, 1], points, centroids)


@pytest.mark.parametrize("d", [65_535, 65_536, 65_537, 66_400, 133_200, 200_000])
def test_sums_of_the_largest_products(d):
    """From 66,312 or 133,144 products of the largest integers on, by the processor, 32 bits would not hold the sum."""
    points = both(np.ones(d))
    found = assert_labels([0, 1], points, np.float32(0.9) * points)
    # Two passes that are both wrong would give the same labels, but not this.
    np.testing.assert_array_equal(found.centroids, points)


# Products in float32


def chains(d, metric):
    """A point and two centroids whose products float32 adds up to too little and too much, by half a unit a step."""
    point, near, far = np.zeros((3, d))
    if metric == "euclidean":
        point[0] = near[0] = far[0] = 1
        step = 2.0**-12
    else:  # of unit length, so that products stay below 1, where units are half as large
        point[0], step = 0.9, 2.0**-12.5
        point[-1] = np.sqrt(1 - 0.81 - d * step**2)
        near[[0, -1]] = far[[0, -1]] = point[[0, -1]]
    steps = signs(d)[1:-1] * step
    point[1:-1], near[1:-1], far[1:-1] = steps, 0.995 * steps, 1.01 * steps
    return point, near, far


@pytest.mark.parametrize("exponent", [*EXPONENTS, 10])
@pytest.mark.parametrize(("metric", "length"), [("euclidean", 1), ("cosine", 1e-3), ("cosine", 1), ("cosine", 1e3)])
@pytest.mark.parametrize("pairs", [False, True])
def test_chains_of_additions(exponent, metric, length, pairs):
    """More values than 8 bits take, so float32 decides."""
    point, near, far = chains(70_000, metric)
    assert ((point - near) ** 2).sum() < ((point - far) ** 2).sum() / 3
    points = np.ldexp(both(point * length), exponent)
    if pairs:
        # The opposite goes the same way, and then to what is left.
        centroids = np.ldexp(np.float32([near, far]), exponent)
        listed, coefficients = np.int64([[0, 1], [1, 0]]), np.float32([[0.5, -0.5]] * 2)
        labels = pair_kmeans(points, listed, coefficients, 2, init=centroids, metric=metric, max_iter=1).labels
        np.testing.assert_array_equal(labels, [0, 1])
    else:
        centroids = np.ldexp(np.concatenate([both(near), both(far)]), exponent)
        np.testing.assert_array_equal(assign(points, centroids, metric=metric)[0], [0, 1])


@pytest.mark.parametrize("d", [64, 65_536, 70_000])
def test_centroids_that_a_distance_cannot_tell_apart(d):
    """The distances are equal in float32, so the lowest label wins, whatever the expanded squares say."""
    point = np.random.default_rng(0).standard_normal(d)
    points = both(point)
    centroids = (np.arange(8)[:, None] * 1e-9 * point).astype(np.float32)
    assert all((points[0] - centroid == points[0]).all() for centroid in centroids)
    np.testing.assert_array_equal(assign(points, centroids)[0], [0, 0])


@pytest.mark.parametrize(("d", "count"), [(48, 40), (48, 1000), (200, 40), (70_000, 40)])
@pytest.mark.parametrize("copies", [1, 100])
def test_many_centroids_that_products_cannot_tell_apart(d, count, copies):
    """More than products in 8 bits are worth, of points enough to give these up, or to measure some of them before the
    others; the last one is the nearest."""
    generator = np.random.default_rng(0)
    near = generator.standard_normal((count, d))
    near *= (1 - 1e-4 * np.arange(count))[:, None] / np.linalg.norm(near, axis=1, keepdims=True)
    points = both(np.full(d, 300 / np.sqrt(d)))
    centroids = np.concatenate([100 * near, *(point + near for point in points), -100 * near]).astype(np.float32)
    last = [2 * count - 1, 3 * count - 1]
    np.testing.assert_array_equal(nearest(points, centroids), last)
    np.testing.assert_array_equal(assign(np.tile(points, (copies, 1)), centroids)[0], last * copies)


@pytest.mark.parametrize("d", [65_536, 70_000])
def test_centroids_whose_own_distance_is_wrong(d):
    """Steps that the chains of a distance lose, from a centroid that is far from all points."""
    centroids = np.zeros((2, d), dtype=np.float32)
    centroids[:, :32] = 1
    centroids[0, 32:] = 2.0**-12
    centroids[1, 0] += 1e-5
    points = np.zeros((2, d), dtype=np.float32)
    distances = [lanes(points[0], centroid) for centroid in centroids]
    assert (
        distances[0] < distances[1]
        and (centroids[0].astype(float) ** 2).sum() > (centroids[1].astype(float) ** 2).sum()
    )
    np.testing.assert_array_equal(assign(points, centroids)[0], [0, 0])


# What underflows or overflows


@pytest.mark.parametrize("ratio", [1e-19, 1e-20, 1e-21, 3e-22, 1e-22, 1e-23, 1e-25])
@pytest.mark.parametrize("d", [20, 64])
def test_squares_near_the_smallest_number(ratio, d):
    """Beside a point of length 1, those whose squares float32 holds with a few bits or none."""
    generator = np.random.default_rng(0)
    points = (generator.standard_normal((400, d)) * ratio).astype(np.float32)
    points[0] = 1 / np.sqrt(d)
    centroids = points[1:9].copy()
    labels, distances = assign(points, centroids)
    squares = ((points[:, None].astype(float) - centroids.astype(float)) ** 2).sum(axis=2)
    np.testing.assert_array_equal(labels[1:], squares[1:].argmin(axis=1))
    np.testing.assert_allclose(distances, np.sqrt(squares.min(axis=1)), rtol=1e-5)


def test_clusters_settle_whatever_their_scale():
    """Centroids beside a long point move by less than float32 can square, and yet they move to the end."""
    generator = np.random.default_rng(0)
    points = (generator.standard_normal((300, 64)) * 1e-25).astype(np.float32)
    points[0] = 1
    found = kmeans(points, 8, init=points[:8].copy(), tol=0, max_iter=300)
    assert found.converged and found.n_iter > 3
    for label in range(8):
        mean = points[found.labels == label].astype(float).mean(axis=0)
        np.testing.assert_allclose(found.centroids[label], mean, rtol=1e-5, atol=1e-32)


def test_pairs_that_vanish_before_they_are_scaled():
    """Coefficients near 1e-45 round what a pair is by half a unit a value, and products know nothing of it."""
    d = 64
    sign = signs(d)
    # A half goes to zero, one and a half and two and a half to two: each loses half of `sign`.
    multiples = np.array([0.5, -1.5, 0.5, 2.5])[np.arange(d) % 4] * sign
    multiples[3] = 127 / 4
    rows, smallest = both(multiples), np.float32(1e-45)
    points = np.array([row.astype(float) * smallest for row in rows]).astype(np.float32)
    centroids = both(np.where(np.arange(d) == 3, 0, -4 * sign)) * smallest
    # Rounding is what decides.
    np.testing.assert_array_equal(nearest(points / smallest, centroids / smallest), [0, 1])
    np.testing.assert_array_equal(nearest(rows, centroids / smallest), [1, 0])
    pairs, coefficients = np.int64([[0, 0], [1, 1]]), np.float32([[smallest, 0]] * 2)
    found = pair_kmeans(rows, pairs, coefficients, 2, init=centroids, max_iter=1)
    np.testing.assert_array_equal(found.labels, [0, 1])


def test_coefficients_that_scaling_takes_digits_from():
    """One pair as long as 1e30 scales the other to where a third of its coefficients is lost."""
    d, length = 48, 0.98e30
    rows = np.stack([np.full(d, length / np.sqrt(d)), np.zeros(d)]).astype(np.float32)
    scale = 2.0 ** -np.round(np.log2(length))
    # Once scaled, 1.49 times the smallest number, which rounds to 1.
    coefficient = np.float32(1.49 * 2.0**-149 / scale)
    pairs, coefficients = np.int64([[0, 1], [0, 0]]), np.float32([[1, 0], [coefficient, coefficient]])
    centroids = np.float32([[1], [1 / 1.49]]) * (2 * coefficient * rows[0])
    # Both are nearest to the first centroid; the long one then goes to the other, which has none.
    found = pair_kmeans(rows, pairs, coefficients, 2, init=centroids, max_iter=1)
    np.testing.assert_array_equal(found.labels, [1, 0])


def test_products_that_overflow():
    """A row near the largest number with a coefficient near the smallest: its product with a centroid is infinite."""
    d = 64
    rows = np.zeros((2, d), dtype=np.float32)
    rows[0, 0], rows[1, 1] = 3e38, 1
    pairs, coefficients = np.int64([[0, 1], [0, 1]]), np.float32([[1e-40, 1], [-1e-40, -1]])
    centroids = np.zeros((2, d), dtype=np.float32)
    centroids[0, 1], centroids[1, 0] = 0.9, 2
    # As before: the second one is nearest to the first centroid as well.
    found = pair_kmeans(rows, pairs, coefficients, 2, init=centroids, max_iter=1)
    np.testing.assert_array_equal(found.labels, [0, 1])


def test_ties_of_what_vanishes_go_to_the_lower_cluster():
    points = np.zeros((3, 64), dtype=np.float32)
    points[0, 0], points[1:, 1] = 1, [1e-30, -1e-30]
    centroids = np.zeros((4, 64), dtype=np.float32)
    centroids[:, 2] = [1e-30, -1e-30, 1e-30, -1e-30]
    np.testing.assert_array_equal(assign(points, centroids)[0][1:], [0, 0])


@pytest.mark.parametrize("exponent", [-83, 50, 83])
@pytest.mark.parametrize("options", [{}, {"batch_size": 300}, {"init": "given"}])
@pytest.mark.parametrize("offset", [0, 20])
def test_scale_changes_nothing(exponent, options, offset):
    """Rows far from the origin, enough of them for the seeding to look at a sample, at 1e-25, 1e15 and 1e25."""
    generator = np.random.default_rng(0)
    points = (generator.standard_normal((1200, 64)) + 3 * generator.integers(0, 3, (1200, 1)) + offset).astype(
        np.float32
    )
    keywords = dict(options, seed=3, max_iter=10)
    if "init" in keywords:
        keywords["init"] = points[:3].copy()
    plain = kmeans(points, 3, **keywords)
    if "init" in keywords:
        keywords["init"] = np.ldexp(keywords["init"], exponent)
    scaled = kmeans(np.ldexp(points, exponent), 3, **keywords)
    np.testing.assert_array_equal(scaled.labels, plain.labels)
    np.testing.assert_array_equal(np.ldexp(scaled.centroids, -exponent), plain.centroids)
    np.testing.assert_allclose(np.ldexp(scaled.inertia, -2 * exponent), plain.inertia, rtol=1e-6)


# Empty clusters


def test_refilling_takes_the_farthest_point_that_is_not_alone():
    points = np.zeros((6, 64), dtype=np.float32)
    points[:, 0] = [0, 0.1, 0.2, 3, 120, 0.3]
    # Point 4 is the farthest from its centroid, and alone with it; nothing is near the last one.
    centroids = np.zeros((3, 64), dtype=np.float32)
    centroids[:, 0] = [0, 200, -500]
    found = kmeans(points, 3, init=centroids, max_iter=1)
    assert len(set(found.labels)) == 3
    np.testing.assert_array_equal(found.centroids[[1, 2], 0], [120, 3])


# Choices of pairs


def as_pairs(vectors):
    """Rows, pairs and coefficients that give these vectors."""
    rows = np.concatenate([vectors, -vectors]).astype(np.float32)
    count = len(vectors)
    pairs = np.stack([np.arange(count), np.arange(count) + count], axis=1)
    return rows, pairs, np.full((count, 2), [0.5, -0.5], dtype=np.float32)


def first_pick(vectors, **keywords):
    """What the pursuit picks first, and the products with the mean, the largest of which is that of the last vector."""
    vectors = vectors.astype(np.float32).astype(float)
    products = vectors @ vectors.mean(axis=0)
    assert products.argmax() == len(vectors) - 1
    picks, _ = coreset(*as_pairs(vectors), np.zeros(len(vectors), dtype=np.int32), 1, **keywords)
    return picks[0], products


@pytest.mark.parametrize("d", [64, 200, 4096])
def test_rounding_of_copies(d):
    """Rounding to bytes takes half a step of each value from the best pair, and gives as much to the second."""
    sign = signs(d)
    second, best = 1.5001 * sign, 1.4999 * sign
    best[1 : 2 + d // 100] = 2 * sign[1 : 2 + d // 100]
    fillers = np.stack([sign, sign]).astype(float)
    second[0], best[0], fillers[:, 0] = 127, 127, -127
    pick, products = first_pick(np.stack([second, *fillers, best]))
    assert products[0] > 0.98 * products[3]
    assert pick == 3


@pytest.mark.parametrize("d", [4096, 65_536])
def test_rounding_of_the_residual(d):
    """Its codes are as coarse as sums of 32 bits ask for; here one value sets the step, and the rest rounds to zero."""
    sign = signs(d)
    largest = min(32_767, (2**31 - 1) // (127 * d))
    residual = 31 / 64 * sign
    residual[0] = largest
    # Numbers that float32 holds exactly, and fillers whose own products are below zero.
    length = np.round(64 * 3 * (residual @ residual) / (31 / 64 * (d - 1))) / 64
    best, second = length * sign, np.zeros(d)
    best[0], second[0] = 0, np.round(64 * 0.96 * length * 31 / 64 * (d - 1) / largest) / 64
    filler = (4 * residual - best - second) / 2
    pick, products = first_pick(np.stack([second, filler, filler, best]))
    assert products[0] > 0.95 * products[3] > 0 > products[1]
    assert pick == 3


@pytest.mark.parametrize("d", [600, 4096, 65_536])
def test_sums_of_the_largest_codes(d):
    sign = signs(d)
    assert first_pick(np.stack([0.9 * sign, 0.95 * sign, sign]))[0] == 2


def test_rounding_of_pairs_without_copies():
    """The best pair is so by what the sum of its rows is rounded by."""
    d = 64
    sign = signs(d)
    rows = np.stack(
        [2.0**24 * sign, 1.5 * sign, np.where(np.arange(d) % 8 == 0, 2.0**24, 2.0**24 + 2) * sign, 0 * sign]
    )
    pairs, coefficients = np.int64([[2, 3], [0, 1]]), np.ones((2, 2), dtype=np.float32)
    arguments = (rows.astype(np.float32), pairs, coefficients, np.zeros(2, dtype=np.int32), 1)
    for cache_bytes in (0, 1 << 20):
        assert coreset(*arguments, cache_bytes=cache_bytes)[0] == [1]


def pairs_of_all_lengths(generator):
    """Most gains are never computed."""
    return generator.standard_normal((3000, 24)) * generator.gamma(1, 1, (3000, 1))


def pairs_that_become_the_best(generator):
    """The long ones lie in four dimensions, where gains fall fast, below those of others that nothing else is like."""
    vectors = np.zeros((3000, 24))
    vectors[:, :4] = generator.standard_normal((3000, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[-300:] = 0
    vectors[np.arange(-300, 0), 4 + np.arange(300) % 20] = 0.5
    return vectors * generator.uniform(1, 1.1, (3000, 1))


@pytest.mark.parametrize("regularization", [1e-2, 1.0])
@pytest.mark.parametrize("max_depth", [None, 3])
@pytest.mark.parametrize("draw", [pairs_of_all_lengths, pairs_that_become_the_best])
def test_lazy_bounds_of_a_design(draw, regularization, max_depth):
    """The picks are those of all gains, computed anew for each."""
    vectors = draw(np.random.default_rng(0)).astype(np.float32).astype(float)
    prompts = np.arange(3000) % 500
    limits = {"prompts": prompts, "max_depth": max_depth} if max_depth else {}
    picks, gains = d_optimal(*as_pairs(vectors), 300, regularization=regularization, **limits)
    inverse = np.eye(24) / regularization
    open_pairs = np.ones(3000, dtype=bool)
    for pick, gain in zip(picks, gains, strict=True):
        products = vectors @ inverse
        squares = np.where(open_pairs, (products * vectors).sum(axis=1), -1)
        assert pick == squares.argmax()
        assert gain == pytest.approx(np.log1p(squares[pick]), rel=1e-6)
        inverse -= np.outer(products[pick], products[pick]) / (1 + squares[pick])
        open_pairs[pick] = False
        if max_depth and (prompts[picks] == prompts[pick])[: np.flatnonzero(picks == pick)[0] + 1].sum() == max_depth:
            open_pairs[prompts == prompts[pick]] = False


# Scores


@pytest.mark.parametrize("share", [1e-1, 1e-2, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15])
def test_squares_that_cancel(share, scale):
    """Of pairs of nearly equal rows, and pairs that nearly lie on their centroid."""
    d = 1024
    generator = np.random.default_rng(0)
    first = generator.standard_normal((20, d))
    rows = (scale * np.concatenate([first, first + np.sqrt(share) * generator.standard_normal((20, d))])).astype(
        np.float32
    )
    pairs = np.stack([np.arange(20), np.arange(20) + 20], axis=1)
    for coefficients in (np.float32([1, -1]), np.float32([1, 0.5])):
        coefficients = np.tile(coefficients, (20, 1))
        points = coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]
        lengths = np.linalg.norm(points.astype(float), axis=1)
        np.testing.assert_allclose(pair_norms(rows, pairs, coefficients), lengths, rtol=5e-6)
        centroids = (points + np.sqrt(share) * points.std() * generator.standard_normal(points.shape)).astype(
            np.float32
        )
        scores = score_pairs(rows, pairs, coefficients, centroids, np.arange(20, dtype=np.int32))
        distances = np.linalg.norm(points.astype(float) - centroids, axis=1)
        np.testing.assert_allclose(scores.distance, distances, rtol=5e-6)


def test_softmax_of_many_scores():
    """One of a thousand and one is first as often as its share says, which noise of a lighter tail would not give."""
    scores = np.zeros(1001)
    scores[500] = 5
    firsts = [ranking_keys(scores, "softmax", seed=seed).argmax() == 500 for seed in range(1000)]
    assert np.mean(firsts) == pytest.approx(np.exp(5) / (np.exp(5) + 1000), abs=0.04)


def test_every_pair_has_noise_of_its_own():
    scores = np.zeros(100_000)
    for ranking in ("softmax", "random"):
        assert len(np.unique(ranking_keys(scores, ranking))) == 100_000


# Rows that change, and processes that fork


@pytest.mark.parametrize("phase", ["seeding", "passes", "the end"])
def test_rows_that_are_not_finite_any_more(phase):
    """The callback spoils all rows a tenth of a second after the first look: an error, or labels of clusters."""
    points = np.random.default_rng(0).standard_normal((20_000, 128), dtype=np.float32)

    def spoil(done, total):
        points[:] = np.nan

    calls = {
        "seeding": lambda: kmeans(points, 128, threads=1, progress=spoil).labels,
        "passes": lambda: kmeans(points, 64, init=points[:64].copy(), tol=0, threads=1, progress=spoil).labels,
        "the end": lambda: assign(points, points[:2000].copy(), threads=1, progress=spoil)[0],
    }
    try:
        labels = calls[phase]()
    except ValueError as error:
        assert "NaN or infinite" in str(error)
    else:  # it was done before
        assert 0 <= labels.min() <= labels.max() < 2000


@pytest.mark.skipif(sys.platform != "linux", reason="names threads as Linux does")
def test_as_many_threads_as_asked_for():
    def threads():
        names = set()
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended by now
                names.add(task.joinpath("comm").read_text().strip())
        return names

    for count in (3, 37):
        ranking_keys(np.zeros(1), threads=count)
        # A thread takes its name once it runs, which on a busy machine is later.
        deadline = time.monotonic() + 10
        while f"bpo-{count - 1}" not in threads() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"bpo-{count - 1}" in threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forked children")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_has_threads_of_its_own(threads):
    """Also one of another number of threads, once those of the parent have to make room."""
    scores = np.arange(5.0)
    for count in (1, 2, 3, 4):
        ranking_keys(scores, threads=count)
    child = os.fork()
    if child == 0:
        for count in (threads, 5, 6, 7, 8, 9, threads):
            if not np.array_equal(ranking_keys(scores, threads=count), scores):
                os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 20
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child waits for threads that it does not have")
        time.sleep(0.01)
