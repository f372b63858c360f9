"""K-means where k-means goes wrong: data of every scale, weights, narrow types, ties, degenerate counts."""

import os
import subprocess
import sys

import numpy as np
import pytest
from sklearn.cluster import KMeans

from bpo._core import assign, kmeans

METRICS = ["euclidean", "cosine"]


def blobs(n=600, d=20, k=5, seed=0, spread=0.5):
    """Points of k clusters in turn: the first k are one of each."""
    generator = np.random.default_rng(seed)
    centres = 3 * generator.standard_normal((k, d))
    return (centres[np.arange(n) % k] + spread * generator.standard_normal((n, d))).astype(np.float32)


def plain_assign(points, centroids, metric="euclidean"):
    """Labels and distances in float64, one centroid at a time; ties go to the lower cluster."""
    points, centroids = points.astype(float), centroids.astype(float)
    if metric == "cosine":
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
        centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
        distances = 1 - points @ centroids.T
    else:
        distances = np.stack([np.linalg.norm(points - centroid, axis=1) for centroid in centroids], axis=1)
    labels = distances.argmin(axis=1)
    return labels, distances[np.arange(len(points)), labels]


def assert_like_scikit_learn(points, init, weights=None, inertia=1e-5, **keywords):
    """The same labels and inertia as scikit-learn reaches in float64 from the same centroids; returns ours."""
    ours = kmeans(points, len(init), init=init, sample_weight=weights, max_iter=300, tol=0, **keywords)
    theirs = KMeans(len(init), init=init.astype(float), n_init=1, tol=0).fit(
        points.astype(float), sample_weight=weights
    )
    np.testing.assert_array_equal(ours.labels, theirs.labels_)
    assert ours.inertia[-1] == pytest.approx(theirs.inertia_, rel=inertia)
    assert ours.converged
    return ours


def assert_same_bits(results):
    first, *others = results
    for other in others:
        for name in ("centroids", "labels", "distances", "inertia"):
            np.testing.assert_array_equal(getattr(first, name), getattr(other, name))


def assert_sane(result, points):
    """Finite everywhere, and every label that of a centroid."""
    assert np.isfinite(result.centroids).all() and np.isfinite(result.distances).all()
    assert np.isfinite(result.inertia).all() and (result.inertia >= 0).all()
    assert result.labels.shape == (len(points),)
    assert 0 <= result.labels.min() <= result.labels.max() < len(result.centroids)


# Shapes


@pytest.mark.parametrize("d", [1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 129])
def test_any_number_of_dimensions(d):
    assert_like_scikit_learn(blobs(d=d), blobs(d=d)[:5])


@pytest.mark.parametrize("k", [1, 2, 7, 8, 9, 31, 33, 63, 65, 255, 257, 300])
def test_any_number_of_clusters(k):
    points = blobs(n=1500, k=k, spread=0.1)
    assert_like_scikit_learn(points, points[:k])


@pytest.mark.parametrize("n", [1, 2, 5, 31, 33, 255, 257, 1025])
def test_any_number_of_points(n):
    points = blobs(n=n, k=min(n, 5))
    assert_like_scikit_learn(points, points[: min(n, 5)])


@pytest.mark.parametrize("metric", METRICS)
def test_one_cluster(metric):
    points = blobs()
    result = kmeans(points, 1, metric=metric)
    mean = points.mean(axis=0, dtype=float)
    if metric == "cosine":
        mean = (points / np.linalg.norm(points, axis=1, keepdims=True)).mean(axis=0, dtype=float)
        mean /= np.linalg.norm(mean)
    np.testing.assert_allclose(result.centroids[0], mean, atol=1e-5)
    assert not result.labels.any()


@pytest.mark.parametrize("metric", METRICS)
def test_as_many_clusters_as_points(metric):
    points = blobs(n=300, spread=3)
    result = kmeans(points, 300, metric=metric)
    assert sorted(result.labels) == list(range(300))
    assert result.inertia[-1] == pytest.approx(0, abs=1e-4)


def test_more_clusters_than_points():
    with pytest.raises(ValueError, match="`k` = 7 clusters need at least as many points"):
        kmeans(blobs(n=6), 7)


# Values


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e5])
def test_far_from_the_origin(offset):
    shifted = blobs(spread=1) + np.float32(offset)
    exact = shifted.astype(float) - offset
    near = KMeans(5, init=exact[:5], n_init=1, tol=0).fit(exact)
    far = kmeans(shifted, 5, init=shifted[:5], tol=0)
    np.testing.assert_array_equal(far.labels, near.labels_)
    assert far.inertia[-1] == pytest.approx(near.inertia_, rel=1e-4)
    np.testing.assert_allclose(far.centroids - offset, near.cluster_centers_, atol=offset * 2**-23)
    again, distances = assign(shifted, far.centroids)
    np.testing.assert_array_equal(again, far.labels)
    np.testing.assert_allclose(distances, far.distances, rtol=1e-3, atol=offset * 1e-6)


@pytest.mark.parametrize("exponent", [-40, -20, 0, 20, 40])
@pytest.mark.parametrize("metric", METRICS)
def test_scale_changes_nothing(metric, exponent):
    points = blobs(spread=2)
    plain = kmeans(points, 5, metric=metric, seed=3)
    scaled = kmeans(np.ldexp(points, exponent), 5, metric=metric, seed=3)
    np.testing.assert_array_equal(plain.labels, scaled.labels)
    if metric == "euclidean":
        np.testing.assert_array_equal(np.ldexp(plain.centroids, exponent), scaled.centroids)
        assert scaled.inertia[-1] == pytest.approx(np.ldexp(plain.inertia[-1], 2 * exponent), rel=1e-6)


def test_huge_values():
    points = blobs(d=4)
    # Up to 1.2e18, where squared distances come near the end of float32.
    points = np.ldexp(points / np.abs(points).max(), 60)
    result = kmeans(points, 5, init=points[:5], tol=0)
    small = kmeans(np.ldexp(points, -60), 5, init=np.ldexp(points[:5], -60), tol=0)
    np.testing.assert_array_equal(result.labels, small.labels)
    np.testing.assert_array_equal(result.centroids, np.ldexp(small.centroids, 60))


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-42, 1e-45])
def test_values_too_small_to_square(size):
    points = (blobs().astype(float) * size).astype(np.float32)
    for init in ("k-means++", points[:5]):
        result = kmeans(points, 5, init=init)
        assert_sane(result, points)
        assert np.abs(result.centroids).max() <= np.abs(points).max()
        assert result.converged


def test_one_outlier_a_million_times_as_far():
    points = np.concatenate([blobs(n=2000), np.full((1, 20), 3e6, dtype=np.float32)])
    result = assert_like_scikit_learn(points, points[[0, 1, 2, 3, 4, 2000]], inertia=1e-4)
    assert (result.labels == result.labels[2000]).sum() == 1
    _, distances = plain_assign(points, result.centroids)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-2, atol=1e-2)
    # Seeding finds it, too.
    seeded = kmeans(points, 6)
    assert (seeded.labels == seeded.labels[2000]).sum() == 1


@pytest.mark.parametrize("copies", [2, 50])
@pytest.mark.parametrize("metric", METRICS)
def test_duplicates_share_a_label(metric, copies):
    points = blobs(n=60, spread=2)
    tiled = np.tile(points, (copies, 1))
    once = kmeans(points, 8, metric=metric, init=points[:8], tol=0)
    often = kmeans(tiled, 8, metric=metric, init=points[:8], tol=0)
    np.testing.assert_array_equal(often.labels, np.tile(once.labels, copies))
    np.testing.assert_allclose(often.centroids, once.centroids, atol=1e-5)
    assert often.inertia[-1] == pytest.approx(copies * once.inertia[-1], rel=1e-5)


@pytest.mark.parametrize("value", [0, 1, -2.5, 1e-3, 1e6])
@pytest.mark.parametrize("k", [1, 3, 40])
def test_all_rows_equal(value, k):
    points = np.full((40, 20), value, dtype=np.float32)
    for init in ("k-means++", points[:k]):
        result = kmeans(points, k, init=init)
        assert_sane(result, points)
        assert result.converged
        assert result.inertia[-1] == 0
        np.testing.assert_array_equal(result.centroids, points[:k])


def test_fewer_distinct_points_than_clusters():
    points = np.repeat(blobs(n=3), 20, axis=0)
    for init in ("k-means++", np.zeros((8, 20), dtype=np.float32)):
        result = kmeans(points, 8, init=init)
        assert_sane(result, points)
        assert result.converged
        assert result.inertia[-1] == pytest.approx(0, abs=1e-6)


def test_rows_of_zeros():
    points = blobs()
    points[::3] = 0
    assert_like_scikit_learn(points, points[[0, 1, 2, 4, 5]])
    with pytest.raises(ValueError, match="point 0 has zero length"):
        kmeans(points, 5, metric="cosine")
    with pytest.raises(ValueError, match="0 has zero length"):
        assign(points, blobs()[:5], metric="cosine")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_that_are_not_finite_are_named(value, dtype):
    points = blobs().astype(dtype)
    points[[417, 500], 13] = value
    for refuse in (lambda: kmeans(points, 5), lambda: assign(points, blobs()[:5])):
        with pytest.raises(ValueError, match="`rows` row 417 holds a NaN or infinite value"):
            refuse()


def test_centroids_that_are_not_finite_are_refused():
    points = blobs()
    init = points[:5].copy()
    init[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"`init`.* 3 "):
        kmeans(points, 5, init=init)
    with pytest.raises(ValueError, match=r"`centroids`.* 3\b"):
        assign(points, init)


# Weights


@pytest.mark.parametrize("spread", [0.5, 2])
def test_weights_as_scikit_learn(spread):
    points = blobs(spread=spread)
    weights = np.random.default_rng(1).uniform(0, 3, len(points)).astype(np.float32)
    assert_like_scikit_learn(points, points[:5], weights)


@pytest.mark.parametrize("metric", METRICS)
def test_whole_weights_repeat_rows(metric):
    points = blobs(spread=2)
    weights = np.random.default_rng(1).integers(0, 4, len(points))
    weighted = kmeans(
        points, 5, sample_weight=weights.astype(np.float32), init=points[:5], metric=metric, tol=0, max_iter=300
    )
    repeated = kmeans(points.repeat(weights, axis=0), 5, init=points[:5], metric=metric, tol=0, max_iter=300)
    np.testing.assert_array_equal(weighted.labels.repeat(weights), repeated.labels)
    np.testing.assert_allclose(weighted.centroids, repeated.centroids, atol=1e-5)
    np.testing.assert_allclose(weighted.inertia, repeated.inertia, rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weight", [1, 2.0**-120, 2.0**100])
def test_equal_weights_change_nothing(metric, weight):
    points = blobs(spread=2)
    weights = np.full(len(points), weight, dtype=np.float32)
    plain = kmeans(points, 5, metric=metric, init=points[:5])
    weighted = kmeans(points, 5, metric=metric, init=points[:5], sample_weight=weights)
    np.testing.assert_array_equal(weighted.labels, plain.labels)
    np.testing.assert_allclose(weighted.centroids, plain.centroids, atol=1e-6)
    np.testing.assert_allclose(weighted.inertia, weight * plain.inertia, rtol=1e-6)
    # Seeding weighs as well.
    seeded = kmeans(points, 5, metric=metric, sample_weight=weights)
    assert seeded.inertia[-1] <= 1.5 * weight * plain.inertia[-1]


@pytest.mark.parametrize("init", ["k-means++", "empty"])
def test_points_of_no_weight_pull_nothing(init):
    points = blobs()
    points[::10] = 1e3 * np.random.default_rng(1).standard_normal((60, 20))
    weights = np.ones(600, dtype=np.float32)
    weights[::10] = 0
    if init == "empty":
        # Four of the clusters start without a point and are refilled, never with a point of no weight.
        init = np.concatenate([points[1:2], np.full((4, 20), -1e4, dtype=np.float32)])
    result = kmeans(points, 5, sample_weight=weights, init=init, tol=0)
    counted = weights > 0
    assert np.abs(result.centroids).max() < 20
    assert len(np.unique(result.labels[counted])) == 5
    labels, distances = plain_assign(points, result.centroids)
    np.testing.assert_array_equal(result.labels[~counted], labels[~counted])
    assert result.inertia[-1] == pytest.approx((distances[counted] ** 2).sum(), rel=1e-4)


def test_fewer_points_of_weight_than_clusters():
    points = blobs(n=50)
    weights = np.zeros(50, dtype=np.float32)
    weights[[3, 7]] = 1
    result = kmeans(points, 5, sample_weight=weights)
    assert_sane(result, points)
    assert result.inertia[-1] == pytest.approx(0, abs=1e-6)


def test_a_heavy_point_keeps_its_centroid():
    points = blobs(spread=2)
    weights = np.ones(600, dtype=np.float32)
    weights[[0, 301]] = 1e7
    result = kmeans(points, 5, sample_weight=weights, tol=0)
    np.testing.assert_allclose(result.centroids[result.labels[[0, 301]]], points[[0, 301]], atol=1e-3)


def test_weights_that_cannot_be_used():
    points = blobs()
    ones = np.ones(600, dtype=np.float32)
    for position, value in ((17, -1), (17, np.nan), (17, np.inf)):
        weights = ones.copy()
        weights[position] = value
        with pytest.raises(ValueError, match=r"`sample_weight`.* 17\b"):
            kmeans(points, 5, sample_weight=weights)
    with pytest.raises(ValueError, match=r"`sample_weight`.*zero"):
        kmeans(points, 5, sample_weight=0 * ones)
    with pytest.raises(ValueError, match="`sample_weight` must have shape"):
        kmeans(points, 5, sample_weight=ones[:599])
    with pytest.raises(TypeError, match="`sample_weight` must have dtype float32"):
        kmeans(points, 5, sample_weight=ones.astype(float))


# Types and layouts of rows


def narrow(points, kind):
    """Rows of a narrow type, their scales, and the same rows as float32."""
    if kind == "float16":
        rows = points.astype(np.float16)
        return rows, None, rows.astype(np.float32)
    if kind == "bfloat16":
        rows = (points.view(np.uint32) >> 16).astype(np.uint16)
        return rows, None, (rows.astype(np.uint32) << 16).view(np.float32)
    scales = (np.abs(points).max(axis=1) / 127).astype(np.float32)
    rows = np.rint(points / scales[:, None]).astype(np.int8)
    return rows, scales, rows * scales[:, None]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [20, 67])
def test_narrow_rows_equal_widened_rows(kind, metric, d):
    rows, scales, wide = narrow(blobs(d=d, spread=2), kind)
    ours = kmeans(rows, 5, scales=scales, metric=metric, seed=1, tol=0)
    same = kmeans(wide, 5, metric=metric, seed=1, tol=0)
    np.testing.assert_array_equal(ours.labels, same.labels)
    np.testing.assert_allclose(ours.centroids, same.centroids, atol=1e-6)
    labels, distances = assign(rows, ours.centroids, scales=scales, metric=metric)
    np.testing.assert_array_equal(labels, ours.labels)
    np.testing.assert_allclose(distances, ours.distances, atol=1e-6)


def test_int8_needs_scales():
    rows, scales, _ = narrow(blobs(), "int8")
    for refuse in (
        lambda scales: kmeans(rows, 5, scales=scales),
        lambda scales: assign(rows, blobs()[:5], scales=scales),
    ):
        with pytest.raises((TypeError, ValueError), match="`scales`"):
            refuse(None)
        with pytest.raises(ValueError, match="`scales` must have shape"):
            refuse(scales[:-1])
        with pytest.raises(ValueError, match=r"`scales`.* 4\b"):
            refuse(np.where(np.arange(600) == 4, np.float32(np.nan), scales))
    with pytest.raises((TypeError, ValueError), match="`scales`"):
        kmeans(blobs(), 5, scales=scales)


def test_rows_may_be_read_only_or_mapped(tmp_path):
    points = blobs()
    frozen = points.copy()
    frozen.flags.writeable = False
    points.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", dtype=np.float32, mode="r", shape=points.shape)
    assert_same_bits([kmeans(rows, 5) for rows in (points, frozen, mapped)])
    np.testing.assert_array_equal(mapped, points)
    start = frozen[:5]
    kmeans(frozen, 5, init=start)
    np.testing.assert_array_equal(start, points[:5])


def test_rows_out_of_order_are_refused_with_advice():
    points = blobs()
    for rows in (points[:, ::2], points[::2], np.asfortranarray(points), points.T):
        with pytest.raises(ValueError, match=r"np\.ascontiguousarray\(rows\)"):
            kmeans(rows, 5)
        with pytest.raises(ValueError, match=r"np\.ascontiguousarray\(rows\)"):
            assign(rows, points[:5])
    with pytest.raises(TypeError, match="`rows` must have dtype"):
        kmeans(points.astype(float), 5)


# Properties


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"batch_size": 128}, {"init": True}])
def test_same_bits_for_any_threads(metric, options):
    points = blobs(n=4001, d=33, k=20, spread=3)
    keywords = {"metric": metric, "max_iter": 20, "batch_size": options.get("batch_size")}
    if "weighted" in options:
        keywords["sample_weight"] = np.random.default_rng(1).uniform(0, 3, len(points)).astype(np.float32)
    if "init" in options:
        keywords["init"] = points[:20]
    assert_same_bits([kmeans(points, 20, threads=threads, **keywords) for threads in (1, 2, 3)])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("k", "spread"), [(2, 5), (17, 3), (64, 1), (200, 5)])
@pytest.mark.parametrize("weighted", [False, True])
def test_inertia_never_increases(metric, k, spread, weighted):
    points = blobs(n=2000, k=20, spread=spread)
    weights = np.random.default_rng(1).uniform(0, 3, len(points)).astype(np.float32) if weighted else None
    inertia = kmeans(points, k, metric=metric, sample_weight=weights, tol=0).inertia
    assert (np.diff(inertia) <= 1e-6 * inertia[:-1]).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.5, 2, 4])
def test_agrees_with_scikit_learn(seed, spread):
    points = blobs(n=3000, d=32, k=16, seed=seed, spread=spread)
    result = assert_like_scikit_learn(points, points[:16])
    labels, distances = plain_assign(points, result.centroids)
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_allclose(result.distances, distances, rtol=1e-4)


@pytest.mark.parametrize("tol", [1e-4, 1e-2])
def test_tolerance_as_scikit_learn(tol):
    points = blobs(n=3000, d=32, k=16, spread=4)
    ours = kmeans(points, 16, init=points[:16], max_iter=300, tol=tol)
    theirs = KMeans(16, init=points[:16], n_init=1, tol=tol).fit(points)
    assert ours.n_iter == theirs.n_iter_
    assert ours.inertia[-1] == pytest.approx(theirs.inertia_, rel=1e-5)


@pytest.mark.parametrize("k", [2, 8, 65, 300])
@pytest.mark.parametrize("d", [1, 8, 33])
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lower_cluster(k, d, metric):
    # Whole numbers: every distance is exact.
    points = np.random.default_rng(0).integers(1, 4, (500, d)).astype(np.float32)
    labels, _ = assign(points, np.ones((k, d), dtype=np.float32), metric=metric)
    assert not labels.any()
    twice = np.random.default_rng(1).permutation(np.arange(k) // 2)
    values = np.arange(1, k * d + 1, dtype=np.float32).reshape(k, d)[twice]
    labels, _ = assign(points, values, metric=metric)
    first = np.array([np.flatnonzero((values == value).all(axis=1))[0] for value in values])
    np.testing.assert_array_equal(labels, first[labels])


# Assignment alone


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 1, 1), (700, 5, 3), (700, 33, 64), (300, 130, 257)])
def test_assignment_is_plain(metric, n, d, k):
    points, centroids = blobs(n, d, spread=2), blobs(k, d, seed=1, spread=2)
    labels, distances = assign(points, centroids, metric=metric)
    expected, exact = plain_assign(points, centroids, metric)
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_allclose(distances, exact, rtol=1e-4, atol=1e-5)
    assert labels.dtype == np.int32 and distances.dtype == np.float32
    for threads in (1, 3):
        again = assign(points, centroids, metric=metric, threads=threads)
        np.testing.assert_array_equal(again[0], labels)
        np.testing.assert_array_equal(again[1], distances)


@pytest.mark.parametrize("metric", METRICS)
def test_assignment_continues_the_clustering(metric):
    points = blobs(spread=2)
    result = kmeans(points, 5, metric=metric)
    labels, distances = assign(points, result.centroids, metric=metric)
    np.testing.assert_array_equal(labels, result.labels)
    np.testing.assert_allclose(distances, result.distances, rtol=1e-4, atol=1e-6)


def test_assignment_of_nothing_and_to_nothing():
    points = blobs()
    labels, distances = assign(points[:0], points[:5])
    assert labels.shape == distances.shape == (0,)
    with pytest.raises(ValueError, match="`centroids`"):
        assign(points, points[:0])
    with pytest.raises(ValueError, match="`centroids` must have shape"):
        assign(points, np.ones((5, 19), dtype=np.float32))
    with pytest.raises(TypeError, match="`centroids` must have dtype float32"):
        assign(points, points[:5].astype(float))


# Mini-batches


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
def test_batches_end_near_the_whole(metric, weighted):
    points = blobs(n=5000, k=20, spread=2)
    weights = np.random.default_rng(1).uniform(0, 3, len(points)).astype(np.float32) if weighted else None
    keywords = {"metric": metric, "init": points[:20], "sample_weight": weights, "max_iter": 300}
    whole, batched = kmeans(points, 20, **keywords), kmeans(points, 20, batch_size=200, **keywords)
    assert batched.inertia[-1] <= 1.01 * whole.inertia[-1]
    labels, distances = plain_assign(points, batched.centroids, metric)
    np.testing.assert_array_equal(batched.labels, labels)
    np.testing.assert_allclose(batched.distances, distances, rtol=1e-3, atol=1e-5)
    terms = distances if metric == "cosine" else distances**2
    total = terms.sum() if weights is None else weights @ terms
    assert batched.inertia[-1] == pytest.approx(total, rel=1e-4)


def test_batches_of_all_rows_are_the_whole():
    points = blobs(spread=2)
    whole = kmeans(points, 5, init=points[:5], tol=0)
    for size in (600, 10_000):
        batched = kmeans(points, 5, init=points[:5], tol=0, batch_size=size)
        np.testing.assert_array_equal(batched.labels, whole.labels)
        assert batched.inertia[-1] == pytest.approx(whole.inertia[-1], rel=1e-6)


def test_batches_of_sorted_rows():
    # The first rows are all of one cluster.
    points = blobs(n=2000, k=4)[np.argsort(np.arange(2000) % 4, kind="stable")]
    batched = kmeans(points, 4, batch_size=100)
    assert batched.inertia[-1] <= 1.01 * min(kmeans(points, 4, seed=seed).inertia[-1] for seed in range(5))


def test_batch_sizes_that_cannot_be_used():
    with pytest.raises(ValueError, match="`batch_size` must be"):
        kmeans(blobs(), 5, batch_size=0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident memory from /proc")
def test_mapped_rows_leave_the_memory(tmp_path):
    n, d = 120_000, 256
    rows = np.memmap(tmp_path / "rows", dtype=np.float16, mode="w+", shape=(n, d))
    generator = np.random.default_rng(0)
    for start in range(0, n, 20_000):
        rows[start : start + 20_000] = generator.standard_normal((20_000, d), dtype=np.float32)
    rows.flush()
    program = """if True:
        import sys
        import numpy as np
        from bpo import _core

        def resident_file_pages():
            line = next(line for line in open("/proc/self/status") if line.startswith("RssFile"))
            return int(line.split()[1]) * 1024

        rows = np.memmap(sys.argv[1], dtype=np.float16, mode=sys.argv[2], shape=(120_000, 256))
        before = resident_file_pages()
        seen = []
        found = _core.kmeans(rows, 16, max_iter=3, progress=lambda done, total: seen.append(resident_file_pages()))
        print(max(seen) - before, float(found.inertia[-1]))
    """

    def run(mode):
        command = [sys.executable, "-c", program, str(tmp_path / "rows"), mode]
        pages, inertia = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        return int(pages), float(inertia)

    shared, private = run("r"), run("c")
    assert shared[1] == private[1]
    # Changes of a private map live in its pages alone, so they must stay.
    assert private[0] > rows.nbytes * 0.9
    assert shared[0] < rows.nbytes * 0.6


def test_private_maps_keep_their_changes(tmp_path):
    points = blobs()
    points.tofile(tmp_path / "rows")
    changed = np.memmap(tmp_path / "rows", dtype=np.float32, mode="c", shape=points.shape)
    changed[:] = points + 1
    kmeans(changed, 5)
    np.testing.assert_array_equal(changed, points + 1)


def test_every_processor_finds_the_same():
    program = """if True:
        import hashlib
        import numpy as np
        from bpo import _core

        points = np.random.default_rng(0).standard_normal((3000, 200), dtype=np.float32)
        found = _core.kmeans(points, 40, max_iter=5)
        sketch = _core.Sketcher(64, kind="normal").sketch(points)
        parts = (found.labels, found.centroids, found.distances, found.inertia, sketch)
        print(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
    """
    levels = ("plain", "avx2", "avxvnni", "avx512", "avx512vnni")
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"BPO_SIMD": level},
        )
        for level in levels
    ]
    assert len({run.stdout for run in runs}) == 1


def test_batches_name_the_row():
    points = blobs()
    weights = np.where(np.arange(600) == 17, -1, 1).astype(np.float32)
    with pytest.raises(ValueError, match=r"`sample_weight`.* 17\b"):
        kmeans(points, 5, sample_weight=weights, batch_size=100)
    points[23] = 0
    with pytest.raises(ValueError, match=r"point 23\b"):
        kmeans(points, 5, metric="cosine", batch_size=100)
    points[23, 4] = np.nan
    with pytest.raises(ValueError, match=r"row 23\b"):
        kmeans(points, 5, batch_size=100)
