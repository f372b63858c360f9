"""Sketches on the device: the bits of the core. On a GPU if there is one, else by Triton's interpreter."""

import os
import warnings

import numpy as np
import pytest
import torch

from bpo import _core
from bpo.sketching.batches import Sketching
from bpo.sketching.device import TILE, DeviceSums, device_works

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETED


@pytest.fixture
def device():
    pytest.importorskip("triton")
    if not (GPU or INTERPRETED):
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    return torch.device("cuda:0" if GPU else "cpu")


def random(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def same(device, sketcher, size, calls, most_pending=1 << 27, tile=TILE):
    """Asserts that calls of (offset, gradients, samples) give the bits of the core; NaN may be any NaN."""
    wanted = np.zeros((size, sketcher.dim), np.float32)
    sums = DeviceSums(sketcher, size, device, most_pending=most_pending, tile=tile)
    for offset, gradients, samples in calls:
        sketcher.sketch(np.ascontiguousarray(gradients.float().numpy()), offset, wanted[samples])
        sums.add(offset, gradients.to(device), samples)
    found = sums.rows()
    assert found.shape == wanted.shape and found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
    bits = [np.where(np.isnan(wanted), 0, sketches).astype(np.float32).view(np.uint32) for sketches in (found, wanted)]
    np.testing.assert_array_equal(*bits)
    assert wanted.any()
    return found


@pytest.mark.parametrize(
    ("dim", "nnz", "seed", "offset"),
    [
        (1, 1, 2**64 - 1, 2**62 - 3000),
        (2, 2, 0, 77),
        (7, 1, 1 << 40, 77_777_777_777),
        (12, 4, 2**64 - 1, 0),
        (64, 2, 2**63, 2**62 - 3000),
        (150, 1, 3, 2**32 - 40),
        (600, 3, 2**64 - 1, 2**62 - 3000),
        (1000, 4, 0, 128),
        (1024, 1, 0, 0),
        (1024, 2, 2**32 - 1, 2**40 + 127),
        (4096, 1, 2**64 - 1, 2**62 - 3000),
    ],
)
def test_bits_are_those_of_the_core(device, dim, nnz, seed, offset):
    outputs = dim // nnz
    widths = [1, min(9 * outputs + 5, 1400)] if outputs > 4 else [1, 20]
    calls = [(offset + 1501 * i, random(2, width, i), slice(0, 2)) for i, width in enumerate(widths)]
    # The interpreter takes its time for each program, whatever its size; of 150 outputs it takes two tiles.
    tile = 4096 if INTERPRETED and outputs > 150 else TILE
    same(device, _core.Sketcher(dim, seed=seed, nnz=nnz), 2, calls[::-1], tile=tile)


def test_seeds_and_blocks_differ(device):
    """What the other tests compare is not the same for all seeds, repetitions and offsets."""
    gradients = random(1, 100)
    found = {
        same(device, _core.Sketcher(16, seed=seed, nnz=nnz), 1, [(offset, gradients, slice(0, 1))]).tobytes()
        for seed, nnz, offset in [(0, 1, 0), (1, 1, 0), (1 << 32, 1, 0), (0, 2, 0), (0, 1, 128), (0, 1, 1 << 41)]
    }
    assert len(found) == 6


def philox(counter, key):
    """Philox4x32-10 by integers that do not end."""
    for _ in range(10):
        even, odd = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        low = 0xFFFFFFFF
        counter = [odd >> 32 ^ counter[1] ^ key[0], odd & low, even >> 32 ^ counter[3] ^ key[1], even & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


def test_rotations_take_all_bits(device):
    """Also the few of them that only matter where there are many outputs."""
    from bpo.sketching import kernels

    outputs, count, first, seed, draws = (1 << 24) - 3, 2048, (7 << 32) - 500, 0xF123456789ABCDEF, 256
    table = [seed - (1 << 64), 2, 3, first, count, 0, 0, *[0] * (count // draws)]
    words = [philox([n % 2**32, n >> 32, 3, 2], [seed % 2**32, seed >> 32]) for n in range(first, first + count)]
    wanted = [((low | high << 32) * outputs) >> 64 for low, high, *_ in words]
    assert wanted != [(high * outputs) >> 32 for _, high, *_ in words]
    found = torch.zeros(count, dtype=torch.int32, device=device)
    signs = torch.zeros(1, dtype=torch.int32, device=device)
    settings = {"outputs": outputs, "draws": draws, "enable_fp_fusion": False}
    kernels.draw[(count // draws,)](torch.tensor(table, device=device), 1, 7, signs, found, **settings)
    assert found.tolist() == wanted


def test_slices_of_a_batch_in_the_order_given(device):
    """Layers come last first, in parts of the batch, some more than once; few and many go into one launch."""
    sketcher = _core.Sketcher(48, seed=5)
    rows = [slice(0, 3), slice(2, 3), slice(0, 2), slice(None)]
    calls = []
    for i in range(8):
        count = len(range(*rows[i % 4].indices(3)))
        gradients = 10.0 ** (i % 5) * random(count, [1, 37, 128, 250][i % 4], i)
        calls.append((5000 - 250 * (i // 2), gradients, rows[i % 4]))
    together = same(device, sketcher, 3, calls)
    np.testing.assert_array_equal(together, same(device, sketcher, 3, calls, most_pending=1000))
    # The order does count, so that the above says something of it.
    assert (together != same(device, sketcher, 3, calls[::-1], most_pending=0)).any()


@pytest.mark.parametrize("nnz", [1, 2])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_extreme_values(device, nnz):
    """Denormals are not flushed, and what is infinite or no number stays so."""
    values = random(4, 60)
    values[0] *= 1e-42
    values[1] = -0.0
    values[1, 7] = 1e-45
    values[2, ::5] = 3e38
    values[3, 3], values[3, 50], values[3, 55] = torch.inf, torch.nan, -torch.inf
    found = same(device, _core.Sketcher(16, seed=3, nnz=nnz), 4, [(11, values, slice(0, 4))] * 2)
    assert np.isnan(found).any() and 0 < np.abs(found[0]).max() < 1e-40


def test_rows_that_lie_apart_and_half_precision(device):
    sketcher = _core.Sketcher(32, seed=1, nnz=2)
    wide = random(2, 80)
    for gradients in (wide[:, 30:70], wide[:, ::2], wide[:1].expand(2, -1), wide.half(), wide.bfloat16()):
        same(device, sketcher, 2, [(64, gradients, slice(0, 2))])


def test_bad_input(device):
    sums = DeviceSums(_core.Sketcher(8), 3, device)
    for offset in (-1, 2**62 - 9):
        with pytest.raises(ValueError, match=r"offset.*2\^62"):
            sums.add(offset, torch.ones(3, 10, device=device), slice(0, 3))
    with pytest.raises(ValueError, match="must have 1 rows, but has 3"):
        sums.add(0, torch.ones(3, 10, device=device), slice(1, 2))
    with pytest.raises(TypeError, match="float64"):
        sums.add(0, torch.ones(3, 10, device=device, dtype=torch.float64), slice(0, 3))
    for shape, samples in (((3, 0), slice(0, 3)), ((0, 5), slice(1, 1))):
        sums.add(0, torch.ones(shape, device=device), samples)
    assert not sums.rows().any()
    with pytest.raises(RuntimeError, match="finished"):
        sums.add(0, torch.zeros(2, 3, device=device), slice(0, 2))


def test_a_batch_on_the_device(device):
    """What hooks call: consume, finish, rows."""
    gradients = [random(3, 150, seed).to(device) for seed in range(4)]
    results = []
    for on_device in (True, False):
        with Sketching(_core.Sketcher(40, seed=9), 1, on_device=on_device) as sketching:
            batch = sketching.batch(3)
            assert not batch.under_way
            for i, part in enumerate(gradients):
                batch.consume(150 * (4 - i), part, slice(0, 3))
            assert batch.under_way or not on_device
            batch.finish()
            results.append(batch.rows())
            assert results[-1] is batch.rows() or np.array_equal(results[-1], batch.rows())
            results[-1][0] += 0.0  # what is given away may be written to
    np.testing.assert_array_equal(*results)


def test_where_the_kernel_is_taken(device):
    sparse = _core.Sketcher(24)
    assert device_works(sparse, device, asked=True)
    assert not device_works(sparse, device, asked=False)
    assert device_works(sparse, device) == GPU  # a CPU sketches at once, even where Triton interprets
    dense = _core.Sketcher(24, kind="rademacher")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not device_works(dense, device)
    with pytest.raises(RuntimeError, match='none for kind="rademacher"'):
        device_works(dense, device, asked=True)


@pytest.mark.skipif(not GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_gradients_of_another_device_are_moved():
    sketcher = _core.Sketcher(24)
    sums = DeviceSums(sketcher, 2, torch.device("cuda:0"))
    for device in (0, 1):
        sums.add(0, random(2, 100, device).to(device), slice(0, 2))
    wanted = sketcher.sketch(random(2, 100, 0).numpy())
    np.testing.assert_array_equal(sums.rows(), sketcher.sketch(random(2, 100, 1).numpy(), 0, wanted))
