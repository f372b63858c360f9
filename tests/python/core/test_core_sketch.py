"""Sketches: unbiased, as accurate as theory says, and the same bits however they are computed."""

import itertools
import math

import numpy as np
import pytest

from bpo._core import Sketcher

KINDS = [("sparse", 1), ("sparse", 4), ("rademacher", 1), ("normal", 1)]


def gradients(rows=4, width=5000, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)


@pytest.mark.parametrize(("kind", "nnz"), KINDS)
def test_inner_products_are_unbiased(kind, nnz):
    values = gradients(2, 700)
    values[1] += 0.5 * values[0]
    estimates = []
    for seed in range(400):
        left, right = Sketcher(64, seed=seed, kind=kind, nnz=nnz).sketch(values)
        estimates.append(float(left @ right))
    error = np.mean(estimates) - float(values[0] @ values[1])
    assert abs(error) < 5 * np.std(estimates) / np.sqrt(len(estimates))


@pytest.mark.parametrize(("kind", "nnz"), KINDS)
def test_cosines_err_as_theory_says(kind, nnz):
    dim = 256
    values = gradients(60, 10_000)
    sketches = Sketcher(dim, kind=kind, nnz=nnz).sketch(values)

    def cosines(rows):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return (unit @ unit.T)[np.triu_indices(len(rows), 1)]

    error = np.sqrt(np.mean((cosines(sketches) - cosines(values)) ** 2))
    assert error == pytest.approx(1 / np.sqrt(dim), rel=0.1)


@pytest.mark.parametrize(("kind", "nnz"), KINDS)
def test_same_bits_for_any_threads_batch_and_slices(kind, nnz):
    sketcher = Sketcher(512, seed=3, kind=kind, nnz=nnz)
    values = gradients(16, 3000)
    whole = sketcher.sketch(values, threads=1)
    np.testing.assert_array_equal(sketcher.sketch(values, threads=2), whole)
    one_by_one = [sketcher.sketch(values[row : row + 1], threads=2)[0] for row in range(16)]
    np.testing.assert_array_equal(one_by_one, whole)
    sliced = np.zeros((16, 512), dtype=np.float32)
    cuts = [0, 1, 130, 1023, 1024, 2500, 3000]
    for start, stop in itertools.pairwise(cuts):
        slice_ = np.ascontiguousarray(values[:, start:stop])
        assert sketcher.sketch(slice_, start, sliced) is sliced
    np.testing.assert_array_equal(sliced, whole)


@pytest.mark.parametrize(("kind", "nnz"), KINDS)
def test_entries_depend_on_seed_and_coordinate_alone(kind, nnz):
    column = np.ones((1, 1), dtype=np.float32)
    far = 5 * 2**32 + 17
    sketcher = Sketcher(64, seed=1, kind=kind, nnz=nnz)
    np.testing.assert_array_equal(sketcher.sketch(column, far), sketcher.sketch(column, far))
    long = np.zeros((1, 400), dtype=np.float32)
    long[0, 399] = 1
    np.testing.assert_array_equal(sketcher.sketch(long, far - 399), sketcher.sketch(column, far))
    assert (sketcher.sketch(column, far) != Sketcher(64, seed=2, kind=kind, nnz=nnz).sketch(column, far)).any()
    assert np.linalg.norm(sketcher.sketch(column, far)) == pytest.approx(1, rel=0.5)


def test_normal_entries_are_normal():
    """Moments, tails and the largest distance of the distributions (Kolmogorov and Smirnov), and no correlation."""
    dim, coordinates = 1024, 400
    entries = Sketcher(dim, seed=2, kind="normal").sketch(np.eye(coordinates, dtype=np.float32)) * np.sqrt(dim)
    entries = entries.astype(np.float64)
    count = entries.size
    assert abs(entries.mean()) < 4 / np.sqrt(count)
    for power, moment, variance in [(2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)]:
        assert abs(np.mean(entries**power) - moment) < 4 * np.sqrt(variance / count)
    for bound in (2, 3, 4, 4.5):
        expected = count * math.erfc(bound / np.sqrt(2))
        assert abs(np.count_nonzero(np.abs(entries) > bound) - expected) < 4 * np.sqrt(expected)
    ordered = np.sort(entries, axis=None)
    exact = np.array([0.5 * math.erfc(-value / np.sqrt(2)) for value in ordered])
    assert np.abs(exact - (np.arange(count) + 0.5) / count).max() < 1.95 / np.sqrt(count)
    for values in (entries, entries**2 - 1, np.abs(entries) - np.sqrt(2 / np.pi)):
        spread = np.mean(values**2)
        for shift in (1, 2, 8, 16, 32):
            for axis in (0, 1):
                correlation = np.mean(values * np.roll(values, shift, axis)) / spread
                assert abs(correlation) < 4.5 / np.sqrt(count)


def test_sparse_has_nnz_entries_a_coordinate():
    for nnz in (1, 2, 8):
        sketch = Sketcher(64, nnz=nnz).sketch(np.ones((1, 1), dtype=np.float32))
        assert np.count_nonzero(sketch) == nnz
        assert np.abs(sketch[sketch != 0]) == pytest.approx(1 / np.sqrt(nnz))


def test_half_precision_widens():
    values = gradients(3, 2000)
    sketcher = Sketcher(128)
    half = values.astype(np.float16)
    np.testing.assert_array_equal(sketcher.sketch(half), sketcher.sketch(half.astype(np.float32)))
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    brain = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(sketcher.sketch(bits), sketcher.sketch(brain))


def test_memory_map_and_empty_rows(tmp_path):
    values = gradients(2, 300)
    values.tofile(tmp_path / "values")
    mapped = np.memmap(tmp_path / "values", dtype=np.float32, mode="r", shape=(2, 300))
    sketcher = Sketcher(32)
    np.testing.assert_array_equal(sketcher.sketch(mapped), sketcher.sketch(values))
    assert sketcher.sketch(values[:0]).shape == (0, 32)
    assert not sketcher.sketch(np.empty((2, 0), dtype=np.float32)).any()


def test_errors_name_the_argument():
    values = gradients()
    sketcher = Sketcher(32)
    with pytest.raises(ValueError, match="`dim` must be in"):
        Sketcher(0)
    with pytest.raises(ValueError, match="`nnz` must be a divisor of dim = 32"):
        Sketcher(32, nnz=5)
    with pytest.raises(ValueError, match="`kind` must be"):
        Sketcher(32, kind="gaussian")
    with pytest.raises(ValueError, match=r"np\.ascontiguousarray\(gradients\)"):
        sketcher.sketch(values[:, ::2])
    with pytest.raises(TypeError, match="`gradients` must have dtype float32, float16 or uint16"):
        sketcher.sketch(values.astype(np.float64))
    with pytest.raises(TypeError, match="`gradients` must be a NumPy array"):
        sketcher.sketch([[1.0]])
    with pytest.raises(ValueError, match="`out` must have shape"):
        sketcher.sketch(values, 0, np.zeros((1, 32), dtype=np.float32))
    with pytest.raises(ValueError, match="`threads` must be at least 1"):
        sketcher.sketch(values, threads=0)
    read_only = np.zeros((4, 32), dtype=np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="`out` cannot be written to"):
        sketcher.sketch(values, 0, read_only)
