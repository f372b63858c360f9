"""Sketches of a batch by the core: at once, or beside the model, with the same bits."""

import threading

import numpy as np
import pytest
import torch

from bpo import _core
from bpo.sketching.batches import Sketching
from bpo.sketching.host import HostSums

PIECES = [
    (offset, torch.randn(5, 700, generator=torch.Generator().manual_seed(offset))) for offset in range(6300, -1, -700)
]


def sketches(dim, kind="sparse", device="cpu", pieces=PIECES, **settings):
    with Sketching(_core.Sketcher(dim, seed=1, kind=kind), 1, **settings) as sketching:
        batch = sketching.batch(5)
        assert not batch.under_way
        for offset, piece in pieces:
            batch.consume(offset, piece.to(device), slice(0, 5))
        batch.finish()
        return batch.rows()


def by_the_core(dim, kind="sparse", pieces=PIECES):
    rows = np.zeros((5, dim), np.float32)
    for offset, piece in pieces:
        _core.Sketcher(dim, seed=1, kind=kind).sketch(piece.float().numpy(), offset, rows)
    return rows


@pytest.mark.parametrize("beside", [False, True, None])
@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_beside_the_model_or_at_once(kind, beside):
    np.testing.assert_array_equal(sketches(64, kind, beside=beside), by_the_core(64, kind))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("on_device", [False, None])
@pytest.mark.parametrize("kind", ["sparse", "rademacher"])
def test_from_a_gpu(kind, on_device):
    """Through pinned memory, or whatever the sketch allows."""
    np.testing.assert_array_equal(sketches(64, kind, "cuda", on_device=on_device), by_the_core(64, kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beside", [False, True])
def test_half_precision_widens(dtype, beside):
    pieces = [(offset, piece.to(dtype)) for offset, piece in PIECES]
    np.testing.assert_array_equal(sketches(64, pieces=pieces, beside=beside), by_the_core(64, pieces=pieces))


def test_rows_finish_and_a_batch_without_gradients_is_zero():
    with Sketching(_core.Sketcher(64, seed=1), 1, beside=True) as sketching:
        batch = sketching.batch(5)
        batch.finish()
        assert not batch.under_way and batch.rows().shape == (5, 64) and not batch.rows().any()
        batch.consume(*PIECES[0], slice(0, 5))
        assert batch.under_way
        np.testing.assert_array_equal(batch.rows(), by_the_core(64, pieces=PIECES[:1]))


def test_what_comes_after_gradients_under_way_waits_for_its_turn():
    """One thread at a time adds to a row, though gradients of a GPU and of the CPU meet in a batch."""

    class Half(Sketching):
        def sums(self, size, device):
            sums = super().sums(size, device)
            assert isinstance(sums, HostSums)
            turns = iter([True, *[False] * len(PIECES)])
            self._host.beside = lambda _: next(turns)
            return sums

    with Half(_core.Sketcher(64, seed=1), 1) as sketching:
        batch = sketching.batch(5)
        for offset, piece in PIECES:
            batch.consume(offset, piece, slice(0, 5))
        assert len(batch._sums._futures) == len(PIECES)
        np.testing.assert_array_equal(batch.rows(), by_the_core(64))


def test_the_kernel_is_not_taken_in_silence_for_another(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("bpo.sketching.kernels.INTERPRETED", False)
    with pytest.raises(RuntimeError, match=r"Cannot sketch on cpu with the Triton kernel: Triton"):
        sketches(64, on_device=True)


def test_threads_that_hand_over_at_once_lose_nothing():
    """Layers on several devices have a thread each."""
    for _ in range(50):
        with Sketching(_core.Sketcher(64, seed=1), 1, beside=True) as sketching:
            batch, begin = sketching.batch(5), threading.Barrier(4)

            def hand_over(part, batch=batch, begin=begin):
                begin.wait()
                for offset, piece in part:
                    batch.consume(offset, piece, slice(0, 5))

            threads = [threading.Thread(target=hand_over, args=(PIECES[index::4],)) for index in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            np.testing.assert_allclose(batch.rows(), by_the_core(64), rtol=1e-4, atol=1e-4)
