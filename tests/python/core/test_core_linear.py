"""The passes of a linear model over rows against plain float64."""

import numpy as np
import pytest

from bpo._core import row_products, row_sum

ROWS = np.random.default_rng(0).standard_normal((40_000, 33), dtype=np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("count", [0, 1, 255, 257, 20_001])
def test_products_and_sums_are_those_of_float64(dtype, count):
    rows = (ROWS * 10).astype(dtype)
    generator = np.random.default_rng(count)
    index = generator.integers(0, len(rows), count)
    vector, weights = generator.standard_normal(33), generator.standard_normal(count)
    products, total = row_products(rows, index, vector), row_sum(rows, index, weights)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(products, wide[index] @ vector, rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(total, weights @ wide[index], rtol=1e-12, atol=1e-11)
    assert products.dtype == total.dtype == np.float64
    for threads in (1, 3):
        np.testing.assert_array_equal(row_products(rows, index, vector, threads=threads), products)
        np.testing.assert_array_equal(row_sum(rows, index, weights, threads=threads), total)


def test_bits_of_bfloat16():
    bits = (ROWS[:300].view(np.uint32) >> 16).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    np.testing.assert_allclose(row_sum(bits, np.arange(300), np.ones(300)), wide.sum(axis=0), rtol=1e-12, atol=1e-12)


def test_what_cancels_in_float32_does_not():
    rows = np.float32([[1e8], [1.0], [-1e8]])
    assert row_sum(rows, np.array([0, 1, 2]), np.ones(3)).tolist() == [1.0]


def test_errors_name_the_culprit():
    index = np.array([0, 1])
    with pytest.raises(ValueError, match=r"`index` must be numbers of the 40000 rows, but is 40000"):
        row_products(ROWS, np.array([0, 40_000]), np.ones(33))
    with pytest.raises(ValueError, match=r"`index` must be numbers of the 40000 rows"):
        row_sum(ROWS, np.array([-1]), np.ones(1))
    with pytest.raises(ValueError, match=r"`vector` must have shape \(33,\), but has shape \(32,\)"):
        row_products(ROWS, index, np.ones(32))
    with pytest.raises(ValueError, match=r"`weights` must have shape \(2,\), as `index` has"):
        row_sum(ROWS, index, np.ones(3))
    with pytest.raises(TypeError, match="`index` must have dtype int64"):
        row_sum(ROWS, index.astype(np.int32), np.ones(2))
