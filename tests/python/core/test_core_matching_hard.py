"""The matching where copies in few bits lose as much as they can, and where what is left of a sum is tiny.

Each time the pair that a coarse product likes best is not the one with the largest cosine. What rounding takes points
straight at a pair, so whoever allows for less of it decides wrongly; `tests/mutants` plants such faults.
"""

import numpy as np
import pytest

from bpo._core import matching
from references import greedy_matching

DIMS = [64, 518, 1024, 4096, 65_536]
# Of copies in 8 bits, and of vectors in 16 that 32 bits hold the products of.
LEVELS = [127, 32_767, "32 bits"]


def signs(d):
    return np.where(np.random.default_rng(0).random(d) < 0.5, -1.0, 1.0)


def as_pairs(vectors, opposite=True):
    """Rows, pairs and coefficients that give these vectors: half of each row and of its opposite, or the rows alone."""
    vectors, count = np.asarray(vectors, dtype=np.float32), len(vectors)
    rows = np.concatenate([vectors, -vectors if opposite else np.zeros_like(vectors[:1])])
    pairs = np.stack([np.arange(count), np.arange(count) + count if opposite else np.full(count, count)], axis=1)
    return rows, pairs, np.tile(np.float32([0.5, -0.5] if opposite else [1, 0]), (count, 1))


def assert_picks(vectors, target, expected, **keywords):
    """Those of the plain algorithm, the first of which are known."""
    vectors, target = np.asarray(vectors, dtype=np.float32), np.asarray(target, dtype=np.float32)
    picks, cosines = greedy_matching(vectors, target, len(vectors))
    assert picks[: len(expected)] == expected
    for opposite in (False, True):
        found, at = matching(*as_pairs(vectors, opposite), target, len(vectors), **keywords)
        np.testing.assert_array_equal(found, picks)
        np.testing.assert_allclose(at, cosines, rtol=0, atol=1e-12)


def shortened(rest, best, share, place):
    """`second`, in some places of the rest alone: with it the rest is a little longer than with `best`."""
    gained = -(2 * rest + best) @ best
    part = np.where(place, rest, 0)
    # s of 2s‖part‖² − s²‖part‖², which is at most ‖part‖².
    root = 1 - share * gained / (part @ part)
    assert gained > 0 and root > 0
    return -(1 - np.sqrt(root)) * part


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-83, 2.0**50])
def test_rounding_of_the_rest(d, levels, scale):
    """One value sets the step, all others are just below half a step, and the best pair is against these."""
    largest = levels if levels != "32 bits" else min(32_767, (2**31 - 1) // (127 * d))
    sign = signs(d)
    rest = 31 / 64 * sign
    rest[:2] = largest, 0
    best = np.where(np.arange(d) < 2, 0, -rest)
    second = shortened(rest, best, 0.98, np.arange(d) == 0)
    first = rest.copy()
    first[1] = largest
    assert_picks(scale * np.stack([second, best, first]), np.arange(d) == 1, [2, 1])


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("scale", [1.0, 2.0**-83, 2.0**50])
def test_rounding_of_rows(d, scale):
    """Rounding to bytes takes half a step of each value but one, all against the rest."""
    rest = 1e5 * signs(d)
    rest[:2] = 0
    best = -0.49e-5 * rest
    best[0] = 127
    second = shortened(rest, best, 0.97, np.arange(d) < d // 2)
    first = rest.copy()
    first[1] = 1e5
    assert_picks(scale * np.stack([second, best, first]), np.arange(d) == 1, [2, 1])


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("levels", LEVELS)
def test_rounding_of_the_target(d, levels):
    largest = levels if levels != "32 bits" else min(32_767, (2**31 - 1) // (127 * d))
    target = 31 / 64 * signs(d)
    target[0] = largest
    best = np.where(np.arange(d) == 0, 0, target)
    # Of the same cosine, nearly.
    cosine = np.linalg.norm(best) / np.linalg.norm(target)
    second = np.zeros(d)
    second[0], second[1] = 0.99 * cosine, np.sqrt(1 - (0.99 * cosine) ** 2)
    second[1] *= -np.sign(target[1])
    assert_picks([second, best], target, [1])


@pytest.mark.parametrize("d", [518, 1024, 4096, 66_400, 133_200])
@pytest.mark.parametrize("toward", [-1, 1])
def test_sums_of_the_largest_codes(d, toward):
    """Products of the largest codes in every place, the sum of which 32 bits may not hold, against those of a few."""
    rest = signs(d)
    rest[0] = 0
    if toward < 0:
        best = -100 / d * rest
        second = shortened(rest, best, 0.95, np.arange(d) < 400)
        first = rest + (np.arange(d) == 0)
        assert_picks([second, best, first], np.arange(d) == 0, [2, 1])
    else:
        # Against the rest nothing is gained, and all that lengthens it is worse than what does so a little.
        away, across = rest, np.where(np.arange(d) % 2 == 0, rest, -rest)
        first = 2 * rest + (np.arange(d) == 0)
        assert_picks([away, across, first], np.arange(d) == 0, [2, 1])


@pytest.mark.parametrize("d", [24, 64, 1024, 4096])
@pytest.mark.parametrize("left", [1e-1, 1e-2, 1e-3, 1e-5, 1e-6])
def test_sums_that_cancel(d, left):
    """Pairs against the sum, of which so little is left that its square is rounding."""
    generator = np.random.default_rng(0)
    target = generator.standard_normal(d)
    first = (target + generator.standard_normal(d)).astype(np.float32)
    vectors = -first * 0.999 + left * generator.standard_normal((40, d))
    assert_picks(np.concatenate([vectors, first[None]]), target, [40])


@pytest.mark.parametrize("exponent", [15, 16])
def test_sums_that_cancel_across_the_target(exponent):
    """Nearly all of the sum cancels, and that lies across the target but for a few units: rounding in
    float64 hides these from whoever adds the sum's share of the target to that of a pair."""
    d, count = 100_000, 60
    generator = np.random.default_rng(0)
    # Numbers of 24 bits, so that float32 holds them and float64 their sums.
    rests = generator.integers(-(2**23) + 100, 2**23 - 100, (count, d))
    for index, rest in enumerate(rests):
        rest[0] -= rest.sum() % d
        rest -= rest.sum() // d
        rest[0] += index % 7
    np.testing.assert_array_equal(rests.sum(axis=1), np.arange(count) % 7)
    assert np.abs(rests).max() < 2**24
    cosines = rests.sum(axis=1) / np.linalg.norm(rests.astype(float), axis=1)
    long = np.full((1, d), (2**23 + 1_234_567) << 28)
    rows = np.concatenate([rests << exponent, long, 0 * long]).astype(np.float32)
    pairs = np.array([[index, count] for index in range(count)] + [[count, count + 1]])
    coefficients = np.tile(np.float32([1, -1]), (len(pairs), 1))
    picks, _ = matching(rows, pairs, coefficients, np.ones(d, dtype=np.float32), 2)
    assert picks.tolist() == [count, cosines.argmax()]
