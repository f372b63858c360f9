import numpy as np
import pytest

from bpo import SelectConfig, cluster_pairs, compress_breadth, pair_coefficients
from bpo.breadth import _quotas


@pytest.fixture
def problem():
    """Rows around four directions, and pairs of every two rows of a prompt."""
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(4, 64))
    rows = (directions[generator.integers(0, 4, 200)] + 0.3 * generator.normal(size=(200, 64))).astype(np.float32)
    pairs = np.array([(p * 5 + i, p * 5 + j) for p in range(40) for i in range(5) for j in range(i + 1, 5)])
    ratios = generator.normal(size=200).astype(np.float32)
    return rows, pairs, pair_coefficients(ratios, np.zeros(200), pairs, config={"beta": 0.5})


def materialised(rows, pairs, weights):
    return weights[:, :1].astype(np.float64) * rows[pairs[:, 0]] + weights[:, 1:] * rows[pairs[:, 1]]


def test_scores_are_what_their_formulas_say(problem):
    clusters = cluster_pairs(*problem, config=SelectConfig(n_clusters=6))
    z = materialised(*problem)
    norms = np.linalg.norm(z, axis=1)
    unit = z / norms[:, None]
    own = clusters.centroids[clusters.labels].astype(np.float64)
    np.testing.assert_allclose(clusters.informativeness, norms, rtol=1e-5)
    np.testing.assert_allclose(clusters.distance, np.linalg.norm(unit - own, axis=1), atol=1e-5)
    centrality = (unit * own).sum(axis=1) / np.linalg.norm(own, axis=1)
    np.testing.assert_allclose(clusters.centrality, centrality, atol=1e-5)
    direction = unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0))
    np.testing.assert_allclose(clusters.alignment, unit @ direction, atol=1e-5)


def test_labels_are_nearest_centroids_and_centroids_are_means(problem):
    clusters = cluster_pairs(*problem, config=SelectConfig(n_clusters=6))
    z = materialised(*problem)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    distances = np.linalg.norm(unit[:, None] - clusters.centroids[None], axis=2)
    np.testing.assert_allclose(distances.min(axis=1), clusters.distance, atol=1e-5)
    for label in range(6):
        np.testing.assert_allclose(unit[clusters.labels == label].mean(axis=0), clusters.centroids[label], atol=1e-4)


def test_same_result_for_any_number_of_threads(problem):
    one, two = (cluster_pairs(*problem, config=SelectConfig(n_clusters=6, threads=threads)) for threads in (1, 2))
    for name in ("labels", "centroids", "informativeness", "centrality", "distance", "alignment", "inertia"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_zero_gradients_never_reach_kmeans(problem):
    rows, pairs, weights = problem
    rows = rows.copy()
    rows[pairs[7]] = 0
    clusters = cluster_pairs(rows, pairs, weights, config=SelectConfig(n_clusters=3))
    assert not clusters.usable[7] and clusters.labels[7] == -1 and np.isnan(clusters.centrality[7])
    with pytest.raises(ValueError, match="every pair is zero"):
        cluster_pairs(np.zeros_like(rows), pairs, weights)


def test_breadth_keeps_every_group_and_prefers_its_centre():
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    points = np.eye(8)[labels] + 0.1 * generator.normal(size=(100, 8))
    breadth = compress_breadth(points, 3, seed=0)
    assert sorted(labels[breadth.kept]) == [0, 1, 2]
    for label in range(3):
        members = labels == label
        assert breadth.distances[breadth.kept & members] == breadth.distances[members].min()


def test_breadth_shares_in_proportion_where_clusters_are_fewer_than_prompts():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(1000, 4))
    breadth = compress_breadth(points, 500, seed=0)
    assert breadth.kept.sum() == 500
    sizes, kept = np.bincount(breadth.labels), np.bincount(breadth.labels[breadth.kept])
    assert len(sizes) == 100 and (np.abs(kept - sizes / 2) <= 1).all()


def test_breadth_edges():
    points = np.random.default_rng(0).normal(size=(7, 3))
    assert compress_breadth(points, 7).kept.all()
    assert compress_breadth(points, 1).kept.sum() == 1
    duplicates = np.tile(points[:2], (5, 1))
    assert compress_breadth(duplicates, 4).kept.sum() == 4
    with pytest.raises(ValueError, match="between 1 and the 7 prompts"):
        compress_breadth(points, 8)
    with pytest.raises(ValueError, match="embedding of prompt 3 is zero"):
        points[3] = 0
        compress_breadth(points, 2)


def test_quotas_are_exact_and_within_bounds():
    generator = np.random.default_rng(0)
    for _ in range(200):
        sizes = generator.integers(1, 30, generator.integers(1, 12))
        total = int(generator.integers(len(sizes), sizes.sum() + 1))
        quotas = _quotas(sizes, total)
        assert quotas.sum() == total and (quotas >= 1).all() and (quotas <= sizes).all()
