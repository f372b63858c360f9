"""The greedy matching to a direction against the plain algorithm, on data made to mislead it."""

import numpy as np
import pytest

from bpo._core import matching
from references import greedy_matching


def problem(prompts=120, responses=4, dim=24, seed=0):
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((prompts * responses, dim), dtype=np.float32)
    one = np.stack(np.triu_indices(responses, 1), axis=1)
    pairs = (one + responses * np.arange(prompts)[:, None, None]).reshape(-1, 2)
    weights = (0.2 + generator.random(len(pairs))).astype(np.float32)
    coefficients = np.stack([weights, -weights], axis=1)
    target = generator.standard_normal(dim, dtype=np.float32)
    return rows, pairs, coefficients, target, np.repeat(np.arange(prompts), len(one))


def vectors_of(rows, pairs, coefficients):
    rows, coefficients = rows.astype(np.float64), coefficients.astype(np.float64)
    return coefficients[:, :1] * rows[pairs[:, 0]] + coefficients[:, 1:] * rows[pairs[:, 1]]


def assert_greedy(rows, pairs, coefficients, target, budget, **limits):
    """The picks of the plain algorithm, and the same bits on one thread and two."""
    picks, cosines = matching(rows, pairs, coefficients, target, budget, threads=2, **limits)
    vectors = vectors_of(rows, pairs, coefficients)
    expected = greedy_matching(vectors, target, budget, **limits)
    np.testing.assert_array_equal(picks, expected[0])
    np.testing.assert_allclose(cosines, expected[1], rtol=0, atol=1e-12)
    alone = matching(rows, pairs, coefficients, target, budget, threads=1, **limits)
    np.testing.assert_array_equal(picks, alone[0])
    np.testing.assert_array_equal(cosines, alone[1])
    return picks, cosines


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_depth", [None, 1, 2])
def test_picks_are_those_of_the_plain_algorithm(seed, max_depth):
    *arguments, prompts = problem(seed=seed)
    eligible = np.arange(len(prompts)) % 7 != 3
    limits = {} if max_depth is None else {"prompts": prompts, "max_depth": max_depth}
    assert_greedy(*arguments, 300, eligible=eligible, **limits)


@pytest.mark.parametrize("budget", [120, 300, 10_000])
@pytest.mark.parametrize("max_depth", [None, 3])
@pytest.mark.parametrize("min_depth", [0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_budget_is_shared_among_prompts_and_clusters(budget, max_depth, min_depth, weighted):
    *arguments, prompts = problem(seed=budget)
    generator = np.random.default_rng(budget)
    # Clusters of unequal size, of which one is one prompt's and one gives nothing but what the caps of others leave.
    clusters = generator.choice(np.int32([0, 1, 2, 5, 7]), len(prompts), p=[0.5, 0.2, 0.1, 0.15, 0.05])
    clusters[prompts == 3] = 9
    weights = np.array([1, 2.5, 0, 0, 0, 0.3, 0, 4, 0, 1]) if weighted else None
    eligible = generator.random(len(prompts)) < 0.9
    eligible[prompts == 5] = False
    picks, _ = assert_greedy(
        *arguments,
        budget,
        eligible=eligible,
        prompts=prompts,
        min_depth=min_depth,
        max_depth=max_depth,
        clusters=clusters,
        cluster_weights=weights,
    )
    depths = np.bincount(prompts[picks], minlength=120)
    most = np.minimum(np.bincount(prompts[eligible], minlength=120), max_depth or 6)
    assert len(picks) == min(budget, most.sum())
    assert (depths <= most).all() and (not min_depth or (depths >= np.minimum(most, 1)).all())
    if min_depth:
        assert len(set(prompts[picks[:119]])) == 119


def test_the_share_of_a_cluster_is_that_of_its_pairs():
    *arguments, prompts = problem()
    clusters = (np.arange(len(prompts)) % 4 // 3).astype(np.int32)
    for budget in (40, 400):
        picks, _ = matching(*arguments, budget, clusters=clusters)
        assert np.bincount(clusters[picks]).tolist() == [budget * 3 // 4, budget // 4]
    heavy = np.array([1.0, 9.0])
    picks, _ = matching(*arguments, 40, clusters=clusters, cluster_weights=heavy)
    assert np.bincount(clusters[picks]).tolist() == [10, 30]
    # Any names, of which none is room for others.
    picks, _ = matching(*arguments, 40, clusters=clusters * np.int32(2**31 - 2))
    assert np.bincount(clusters[picks]).tolist() == [30, 10]


@pytest.mark.parametrize("prompts, dim", [(1500, 64), (1500, 3), (400, 300)])
def test_many_picks(prompts, dim):
    *arguments, _ = problem(prompts, 4, dim)
    _, cosines = assert_greedy(*arguments, 700)
    assert cosines[-1] > 0.9


def test_a_mean_that_all_share():
    """As real gradients have: pairs that lean to the target, and one direction that is longer than all others."""
    rows, pairs, coefficients, target, _ = problem(1500, 4, 64)
    rows[::4] += 3 * target / np.linalg.norm(target)
    rows += np.outer(np.random.default_rng(1).standard_normal(len(rows)), rows[1]).astype(np.float32)
    assert_greedy(rows, pairs, coefficients, target, 700)


def test_a_target_against_all_pairs():
    """Cosines are negative all along, and the nearest to zero wins."""
    rows, pairs, coefficients, target, _ = problem(300, 4, 16)
    vectors = vectors_of(rows, pairs, coefficients)
    coefficients[vectors @ target > 0] *= -1
    _, cosines = assert_greedy(rows, pairs, coefficients, target, 120)
    assert (cosines < 0).all()


def test_it_goes_on_where_the_cosine_falls():
    *arguments, _ = problem(60, 3, 8)
    picks, cosines = assert_greedy(*arguments, 10_000)
    assert len(picks) == 180 and np.diff(cosines).min() < -1e-3


def test_opposite_pairs_and_zero_vectors():
    """Copies of two rows against one another, with and without rest; the sum zero has no direction and comes last."""
    rows = np.float32([[1, 0], [0, 1], [0, 0]])
    pairs = np.array([[0, 2], [2, 0], [2, 2], [1, 2], [0, 2]])
    coefficients = np.tile(np.float32([1, -1]), (5, 1))
    target = np.float32([1, 0])
    # z = e0, -e0, 0, e1, e0.
    picks, cosines = assert_greedy(rows, pairs, coefficients, target, 5)
    assert picks.tolist() == [0, 2, 4, 1, 3]
    picks, cosines = assert_greedy(rows, pairs[:2], coefficients[:2], target, 2)
    assert picks.tolist() == [0, 1] and cosines.tolist() == [1, 0]
    # Zero vectors alone.
    picks, cosines = assert_greedy(rows, pairs[[2, 2]], coefficients[:2], target, 2)
    assert picks.tolist() == [0, 1] and cosines.tolist() == [0, 0]
    # The sum would be zero after either of the last two.
    eligible = np.array([True, True, False, True, False])
    assert_greedy(rows, pairs, coefficients, -target, 5, eligible=eligible)


@pytest.mark.parametrize("dim", [1, 5])
def test_copies_come_in_their_order(dim):
    """All pairs alike; then a few kinds, many times each."""
    rows = np.random.default_rng(0).standard_normal((8, dim), dtype=np.float32)
    pairs = np.tile([[0, 1]], (1200, 1))
    coefficients = np.tile(np.float32([1, -1]), (1200, 1))
    target = rows[2]
    picks, _ = matching(rows, pairs, coefficients, target, 80)
    assert picks.tolist() == list(range(80))
    pairs = np.random.default_rng(1).integers(0, 8, (1200, 2))
    picks, _ = matching(rows, pairs, coefficients, target, 300)
    for kind in np.unique(pairs, axis=0):
        own = picks[(pairs[picks] == kind).all(axis=1)]
        np.testing.assert_array_equal(own, np.flatnonzero((pairs == kind).all(axis=1))[: len(own)])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_any_scale(scale):
    rows, pairs, coefficients, target, _ = problem(200, 4, 20)
    assert_greedy((rows * scale).astype(np.float32), pairs, coefficients, target, 200)
    assert_greedy(rows, pairs, (coefficients * scale).astype(np.float32), target, 200)


@pytest.mark.parametrize("dtype", [np.float16, np.int8])
def test_other_types(dtype):
    rows, pairs, coefficients, target, _ = problem(200, 4, 20)
    assert_greedy((rows * 10).astype(dtype), pairs, coefficients, target, 100)


def test_pairs_of_nearly_equal_rows():
    """Lengths that the products of their rows could not tell."""
    rows, pairs, coefficients, target, _ = problem(200, 2, 20)
    rows[1::2] = rows[::2]
    rows[1::2, :3] += 1e-6 * np.random.default_rng(2).standard_normal((200, 3)).astype(np.float32)
    assert_greedy(rows, pairs, coefficients, target, 60)


@pytest.mark.parametrize("cache_bytes", [0, 100 * 24])
def test_rows_without_copies(cache_bytes):
    *arguments, _ = problem()
    expected = matching(*arguments, 90)
    for one, other in zip(expected, matching(*arguments, 90, cache_bytes=cache_bytes), strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_map(tmp_path):
    rows, pairs, coefficients, target, _ = problem()
    rows.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", dtype=np.float32, mode="r", shape=rows.shape)
    for one, other in zip(
        matching(rows, pairs, coefficients, target, 90), matching(mapped, pairs, coefficients, target, 90), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_progress_and_ctrl_c():
    *arguments, _ = problem()
    seen = []
    matching(*arguments, 90, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (90, 90)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        matching(*arguments, 90, progress=stop)


def test_errors_name_the_culprit():
    rows, pairs, coefficients, target, prompts = problem()
    with pytest.raises(ValueError, match=r"`target` must have shape \(24,\), but has shape \(23,\)"):
        matching(rows, pairs, coefficients, target[:-1], 5)
    with pytest.raises(ValueError, match="`target` must be a direction, but is zero"):
        matching(rows, pairs, coefficients, 0 * target, 5)
    with pytest.raises(ValueError, match="`target` holds NaN at index 0"):
        matching(rows, pairs, coefficients, np.nan * target, 5)
    with pytest.raises(TypeError, match="`target` must have dtype float32"):
        matching(rows, pairs, coefficients, target.astype(np.float64), 5)
    with pytest.raises(TypeError, match="`max_depth` needs `prompts`"):
        matching(rows, pairs, coefficients, target, 5, max_depth=2)
    with pytest.raises(ValueError, match=r"`prompts` must have shape \(720,\), one for each pair"):
        matching(rows, pairs, coefficients, target, 5, prompts=prompts[:4], max_depth=2)
    with pytest.raises(TypeError, match="`min_depth` needs `prompts`"):
        matching(rows, pairs, coefficients, target, 5, min_depth=1)
    with pytest.raises(ValueError, match="`min_depth` must be 0 or 1, but is 2"):
        matching(rows, pairs, coefficients, target, 5, prompts=prompts, min_depth=2)
    with pytest.raises(ValueError, match="119"):
        matching(rows, pairs, coefficients, target, 119, prompts=prompts, min_depth=1)
    clusters, weights = np.zeros(len(pairs), dtype=np.int32), np.ones(1)
    with pytest.raises(ValueError, match=r"`clusters` must have shape \(720,\), one for each pair"):
        matching(rows, pairs, coefficients, target, 5, clusters=clusters[1:])
    with pytest.raises(TypeError, match="`cluster_weights` needs `clusters`"):
        matching(rows, pairs, coefficients, target, 5, cluster_weights=weights)
    with pytest.raises(ValueError, match="`clusters`"):
        matching(rows, pairs, coefficients, target, 5, clusters=clusters - 1)
    with pytest.raises(ValueError, match="`clusters`"):
        matching(rows, pairs, coefficients, target, 5, clusters=clusters + 1, cluster_weights=weights)
    with pytest.raises(ValueError, match="`cluster_weights`"):
        matching(rows, pairs, coefficients, target, 5, clusters=clusters, cluster_weights=-weights)
    rows[pairs[3, 0]] = np.inf
    with pytest.raises(ValueError, match="`rows` row 1 holds a NaN or infinite value"):
        matching(rows, pairs, coefficients, target, 5)
