"""The core beside what users could pick instead, in one run: compare the medians within a group."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from bpo import _core

P, D = 1_000_000, 1024
N, K, ITERATIONS = 20_000, 64, 5
PROMPTS, RESPONSES = 400, 8


@pytest.fixture(scope="module")
def gradients():
    return np.random.default_rng(0).normal(size=(4, P)).astype(np.float32)


@pytest.mark.benchmark(group="sketch 4 gradients of 1e6 to 1024")
class TestSketch:
    def test_bpo_sparse(self, benchmark, gradients):
        benchmark(_core.Sketcher(D, seed=0).sketch, gradients)

    def test_numpy_bincount(self, benchmark, gradients):
        generator = np.random.default_rng(0)
        bucket, sign = generator.integers(0, D, P), generator.choice([-1.0, 1.0], P).astype(np.float32)
        benchmark(lambda: [np.bincount(bucket, weights=row * sign, minlength=D) for row in gradients])

    def test_torch_index_add(self, benchmark, gradients):
        generator = np.random.default_rng(0)
        bucket = torch.tensor(generator.integers(0, D, P))
        sign = torch.tensor(generator.choice([-1.0, 1.0], P).astype(np.float32))
        rows = torch.tensor(gradients)
        benchmark(lambda: torch.zeros(len(rows), D).index_add_(1, bucket, rows * sign))


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(K, 512))
    points = centres[generator.integers(0, K, N)] + 2 * generator.normal(size=(N, 512))
    return points.astype(np.float32), centres.astype(np.float32)


@pytest.mark.benchmark(group="k-means, 20,000 x 512, k = 64, 5 iterations from the same centroids")
class TestKMeans:
    def test_bpo(self, benchmark, rows):
        points, centres = rows
        benchmark(lambda: _core.kmeans(points, K, init=centres, max_iter=ITERATIONS, tol=0.0))

    def test_scikit_learn_lloyd(self, benchmark, rows):
        points, centres = rows
        benchmark(lambda: KMeans(K, init=centres, n_init=1, max_iter=ITERATIONS, tol=0.0).fit(points))


@pytest.fixture(scope="module")
def pairs():
    generator = np.random.default_rng(0)
    sketches = generator.normal(size=(PROMPTS * RESPONSES, 512)).astype(np.float32)
    index = np.array(
        [
            (prompt * RESPONSES + i, prompt * RESPONSES + j)
            for prompt in range(PROMPTS)
            for i in range(RESPONSES)
            for j in range(i + 1, RESPONSES)
        ]
    )
    weights = np.tile(np.float32([-1, 1]), (len(index), 1))
    weights /= _core.pair_norms(sketches, index, weights)[:, None]
    return sketches, index, weights


@pytest.mark.benchmark(group="k-means of 11,200 pairs of 3,200 responses, d = 512, k = 64, 5 iterations")
class TestPairKMeans:
    def test_bpo(self, benchmark, pairs):
        sketches, index, weights = pairs
        centres = _materialise(sketches, index[:K], weights[:K])
        benchmark(lambda: _core.pair_kmeans(*pairs, K, init=centres, max_iter=ITERATIONS, tol=0.0))

    def test_scikit_learn_on_materialised_pairs(self, benchmark, pairs):
        sketches, index, weights = pairs
        centres = _materialise(sketches, index[:K], weights[:K])

        def fit():
            points = _materialise(sketches, index, weights)
            KMeans(K, init=centres, n_init=1, max_iter=ITERATIONS, tol=0.0).fit(points)

        benchmark(fit)


def _materialise(sketches, index, weights):
    return weights[:, :1] * sketches[index[:, 0]] + weights[:, 1:] * sketches[index[:, 1]]
