"""Batches: what memory allows, and what suits the device."""

import numpy as np
import pytest
import torch

import bpo
from bpo.policy.batches import batch_tokens, in_batches, longest_first

LENGTHS = np.array([3, 9, 4, 4, 2, 9, 1, 7])


def test_batches_that_do_not_fit_are_halved_and_so_are_those_after_them():
    batches: list[list[int]] = []

    def run(rows):
        if len(rows) * LENGTHS[rows].max() > 16:
            raise torch.OutOfMemoryError("out of memory")
        batches.append(rows.tolist())
        return LENGTHS[rows].sum()

    order = longest_first(LENGTHS)
    with pytest.warns(UserWarning, match="4 sequences of 9 tokens; going on with 2"):
        done = list(in_batches(run, order, LENGTHS, 40))
    assert [rows.tolist() for rows, _ in done] == batches
    assert np.concatenate([rows for rows, _ in done]).tolist() == order.tolist()
    assert all(found == LENGTHS[rows].sum() for rows, found in done)
    assert max(len(rows) * LENGTHS[rows].max() for rows, _ in done[2:]) <= 16


def test_what_is_falsy_is_a_result():
    results = [found for _, found in in_batches(lambda rows: 0, np.arange(3), LENGTHS, 1)]
    assert results == [0, 0, 0]


def test_a_single_sequence_without_memory_is_named():
    def run(rows):
        raise MemoryError("no more")

    found = in_batches(run, np.array([5, 0]), LENGTHS, 1, lambda row: f" (row {row})")
    with pytest.raises(
        MemoryError, match=r"one sequence of 9 tokens \(row 5\): no more\nLower SelectConfig.max_length"
    ):
        next(found)


def test_other_errors_are_not_taken_for_want_of_memory():
    def run(rows):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        next(in_batches(run, np.arange(2), LENGTHS, 100))


def test_by_default_the_device_says_how_many_tokens():
    assert bpo.SelectConfig().tokens_per_batch is None
    model = torch.nn.Linear(2, 2)
    assert batch_tokens(None, model) == 1024
    assert batch_tokens(7, model) == 7
    if torch.cuda.is_available():
        assert batch_tokens(None, model.cuda()) == 32768
    with pytest.raises(ValueError, match="tokens_per_batch must be a whole number"):
        bpo.SelectConfig(tokens_per_batch=0)
