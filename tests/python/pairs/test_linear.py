"""Fits of the linear regime: margins of left-out prompts."""

import numpy as np
import pytest

from bpo.pairs.linear import cross_fitted_margins
from bpo.pairs.pair_gradients import PairGradients


def pairs_of(x):
    """Pairs whose −ẑ are the rows of x."""
    index = np.arange(len(x))
    return PairGradients(
        np.asarray(x, np.float32), np.stack([index, index], axis=1), np.tile(np.float32([-1, 0]), (len(x), 1))
    )


def world(seed=0, prompts=60, depth=4, dim=64, flipped=0.2):
    generator = np.random.default_rng(seed)
    direction = generator.normal(size=dim)
    x = direction / np.linalg.norm(direction) + 2 * generator.normal(size=(prompts * depth, dim)) / np.sqrt(dim)
    wrong = generator.random(len(x)) < flipped
    x[wrong] *= -1
    return x / np.linalg.norm(x, axis=1, keepdims=True), np.repeat(np.arange(prompts), depth), wrong


def test_flipped_pairs_have_the_small_margins():
    x, prompts, wrong = world()
    margins = cross_fitted_margins(pairs_of(x), prompts, seed=0)
    above = margins[~wrong][:, None] > margins[wrong][None]
    assert above.mean() > 0.85


def test_a_prompt_is_never_judged_by_its_own_pairs():
    """Noise alone has nothing that carries over, but pairs of a prompt that are copies would give one another away."""
    generator = np.random.default_rng(1)
    x = np.repeat(generator.normal(size=(80, 64)), 4, axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    margins = cross_fitted_margins(pairs_of(x), np.repeat(np.arange(80), 4), seed=0)
    assert (margins > 0).mean() < 0.65


def test_every_fold_is_fitted_to_the_others():
    x, prompts, _ = world(prompts=7)
    margins = cross_fitted_margins(pairs_of(x), prompts, seed=3)
    assert np.isfinite(margins).all() and (margins != 0).all()
    assert np.array_equal(margins, cross_fitted_margins(pairs_of(x), prompts, seed=3))
    assert not np.array_equal(margins, cross_fitted_margins(pairs_of(x), prompts, seed=4))


def test_one_prompt_has_nothing_to_be_judged_by():
    x, prompts, _ = world(prompts=1)
    with pytest.raises(ValueError, match="two prompts"):
        cross_fitted_margins(pairs_of(x), prompts, seed=0)
