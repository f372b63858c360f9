"""The kernels of the core alone, to compare two builds of it: --benchmark-save before, --benchmark-compare after.

How they compare with other libraries is for peers.py, whose data these are.
"""

import numpy as np
import pytest

from bpo import _core
from peers import clusters, normal, preference_pairs


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("nnz", [1, 4])
def test_sparse_sketch(benchmark, dtype, nnz):
    benchmark(_core.Sketcher(1024, nnz=nnz).sketch, normal(4, 1_000_000).astype(dtype))


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_dense_sketch(benchmark, kind):
    benchmark(_core.Sketcher(1024, kind=kind).sketch, normal(4, 20_000))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("k", [16, 256])
def test_kmeans(benchmark, k, metric):
    points = clusters(5000, 512, k, noise=4)
    benchmark(_core.kmeans, points, k, init=points[:k], metric=metric, max_iter=3, tol=0)


def test_seeding(benchmark):
    benchmark(_core.kmeans, clusters(5000, 512, 64, noise=4), 64, max_iter=1)


def test_assign(benchmark):
    benchmark(_core.assign, normal(5000, 512), normal(256, 512, seed=1))


@pytest.fixture(scope="module")
def pairs():
    return preference_pairs(prompts=200, responses=8, dim=1024)


def test_pair_norms(benchmark, pairs):
    benchmark(_core.pair_norms, *pairs)


def test_pair_kmeans(benchmark, pairs):
    benchmark(_core.pair_kmeans, *pairs, 64, init=normal(64, 1024), max_iter=3, tol=0)


def test_score_pairs(benchmark, pairs):
    labels = np.arange(len(pairs[1]), dtype=np.int32) % 64
    benchmark(_core.score_pairs, *pairs, normal(64, 1024), labels)
