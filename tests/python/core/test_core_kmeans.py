"""K-means over rows and over pairs: against references, on hard data, and as a guest of the interpreter."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from sklearn.cluster import KMeans

from bpo._core import kmeans, pair_kmeans


def blobs(n=600, d=20, k=5, seed=0, spread=0.5):
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((k, d)) * 3
    labels = generator.integers(k, size=n)
    return (centres[labels] + spread * generator.standard_normal((n, d))).astype(np.float32)


def preference_pairs(prompts=60, responses=5, d=24, seed=0):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((prompts * responses, d), dtype=np.float32)
    pairs = np.array(
        [
            (prompt * responses + first, prompt * responses + second)
            for prompt in range(prompts)
            for first in range(responses)
            for second in range(first + 1, responses)
        ],
        dtype=np.int64,
    )
    coefficients = generator.uniform(0.2, 2, (len(pairs), 2)).astype(np.float32) * np.float32([1, -1])
    points = coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]
    return rows, pairs, coefficients, points


def assert_consistent(result, points):
    """Labels, distances and inertia belong to the centroids."""
    distances = np.linalg.norm(points[:, None].astype(float) - result.centroids[None].astype(float), axis=2)
    own = distances[np.arange(len(points)), result.labels]
    np.testing.assert_allclose(result.distances, own, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(own, distances.min(axis=1), rtol=1e-4, atol=1e-4)
    assert result.inertia[-1] == pytest.approx((own**2).sum(), rel=1e-4, abs=1e-6)
    assert len(result.inertia) == result.n_iter + 1


def test_seeding_is_as_good_as_scikit_learn():
    points = blobs(n=3000, k=30, spread=0.3)
    ours = [kmeans(points, 30, seed=seed).inertia[-1] for seed in range(5)]
    theirs = [KMeans(30, n_init=1, random_state=seed).fit(points).inertia_ for seed in range(5)]
    assert np.median(ours) <= 1.1 * np.median(theirs)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["given", "k-means++"])
def test_pairs_equal_materialised_pairs(metric, init):
    rows, pairs, coefficients, points = preference_pairs()
    if init == "given":
        init = points[::50][:8].copy()
    implicit = pair_kmeans(rows, pairs, coefficients, 8, init=init, metric=metric, seed=4, tol=0)
    explicit = kmeans(points, 8, init=init, metric=metric, seed=4, tol=0)
    np.testing.assert_array_equal(implicit.labels, explicit.labels)
    np.testing.assert_allclose(implicit.centroids, explicit.centroids, atol=1e-5)
    np.testing.assert_allclose(implicit.distances, explicit.distances, atol=1e-5)


def test_cosine_is_spherical():
    points = blobs(spread=1.5)
    scaled = points * np.random.default_rng(1).uniform(0.1, 10, (len(points), 1)).astype(np.float32)
    result = kmeans(scaled, 5, metric="cosine", init=points[:5].copy())
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, rtol=1e-5)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    cosines = unit @ result.centroids.T
    np.testing.assert_allclose(result.distances, 1 - cosines.max(axis=1), atol=1e-5)
    assert result.inertia[-1] == pytest.approx(result.distances.astype(float).sum(), rel=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_same_bits_for_any_threads(metric):
    points = blobs(n=5000, k=20, spread=3)
    rows, pairs, coefficients, _ = preference_pairs(prompts=400)
    for cluster in (
        lambda threads: kmeans(points, 20, metric=metric, threads=threads),
        lambda threads: pair_kmeans(rows, pairs, coefficients, 20, metric=metric, threads=threads),
    ):
        one, two = cluster(1), cluster(2)
        for name in ("centroids", "labels", "distances", "inertia"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_empty_clusters_are_refilled():
    points = blobs(n=300)
    init = np.concatenate([points[:1], np.full((4, 20), 1e3, dtype=np.float32)])
    result = kmeans(points, 5, init=init)
    assert len(np.unique(result.labels)) == 5
    assert_consistent(result, points)


def test_errors_name_the_culprit():
    points = blobs(n=10)
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        kmeans(points, 0)
    with pytest.raises(ValueError, match="`k` = 11 clusters need at least as many points"):
        kmeans(points, 11)
    broken = points.copy()
    broken[7, 3] = np.nan
    broken[8, 3] = np.inf
    with pytest.raises(ValueError, match="`rows` row 7 holds a NaN or infinite value"):
        kmeans(broken, 2)
    zero = points.copy()
    zero[4] = 0
    with pytest.raises(ValueError, match="point 4 has zero length"):
        kmeans(zero, 2, metric="cosine")
    with pytest.raises(ValueError, match="`init` must have shape"):
        kmeans(points, 3, init=points[:2].copy())
    with pytest.raises(ValueError, match="`init` must be"):
        kmeans(points, 3, init="random")
    with pytest.raises(ValueError, match="`metric` must be"):
        kmeans(points, 3, metric="manhattan")
    pairs, coefficients = np.int64([[0, 1], [2, 10]]), np.ones((2, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="`pairs` row 1 refers to row 10, but `rows` has 10 rows"):
        pair_kmeans(points, pairs, coefficients, 1)
    with pytest.raises(TypeError, match="`pairs` must have dtype int64, but has int32"):
        pair_kmeans(points, pairs.astype(np.int32), coefficients, 1)
    with pytest.raises(ValueError, match="`coefficients` must have shape"):
        pair_kmeans(points, pairs[:1], coefficients, 1)
    # A row that no pair refers to may be anything.
    assert pair_kmeans(broken, pairs[:1], coefficients[:1], 1).n_iter >= 1


def long_points():
    return np.random.default_rng(0).standard_normal((20_000, 128), dtype=np.float32)


def test_progress_is_called_and_may_raise():
    calls = []
    points = long_points()
    kmeans(points, 64, max_iter=5, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 0
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)

    def fail(done, total):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        kmeans(points, 512, tol=0, progress=fail)


def test_other_threads_run_meanwhile():
    counter, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            counter[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    before = counter[0]
    kmeans(long_points(), 64, max_iter=5, tol=0)
    after = counter[0]
    stop.set()
    thread.join()
    assert after > before + 10


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
def test_interrupt_is_answered():
    code = """
import os, signal, threading, time
import numpy as np
from bpo._core import kmeans
# A parent that ignores SIGINT, as background jobs of a shell do, would pass that on.
signal.signal(signal.SIGINT, signal.default_int_handler)
points = np.random.default_rng(0).standard_normal((50_000, 256), dtype=np.float32)
def interrupt():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    kmeans(points, 2000, tol=0, max_iter=1000)
except KeyboardInterrupt:
    print("interrupted")
"""
    # Left alone, the clustering would take many minutes.
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert finished.stdout == "interrupted\n"
