"""Gradients to sketches on the device where they are: what feeds the kernels."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import numpy as np
import torch

from bpo import _core
from bpo.policy.transfer import Fetched, sent
from bpo.sketching.tables import Tables
from bpo.system.memory import is_out_of_memory
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.sketching.tables import Slice

# Gradients that are kept until one launch takes them all: a launch costs as much time as a small layer.
MOST_PENDING = 1 << 27

# Outputs of a program, and positions that one draws.
TILE = 128
_DRAWS = 256

# Threads of a program are these times 32, where it has as many outputs.
_WARPS = 4

# Coordinates end here.
_END = 1 << 62


def device_works(sketcher: _core.Sketcher, device: torch.device, *, asked: bool | None = None) -> bool:
    """Whether to sketch on a device.

    Before the first time, the kernels are compared with the core, bit for bit.

    Args:
        sketcher: The sketch.
        device: Where gradients are.
        asked: True asks for the device, False for the core; None leaves it to what works, with a warning where the
            kernels should work and do not.

    Raises:
        RuntimeError: It was asked for and does not work.
    """
    if asked is False or (asked is None and device.type != "cuda"):
        return False
    reason, expected = _fault(device, sketcher.kind, sketcher.dim, sketcher.nnz)
    if reason is None:
        return True
    if asked:
        raise RuntimeError(f"Cannot sketch on {device} with the Triton kernel: {reason}.")
    if not expected:
        _warn_once(device, reason)
    return False


@functools.lru_cache(maxsize=64)
def _fault(device: torch.device, kind: str, dim: int, nnz: int) -> tuple[str | None, bool]:
    """Why the kernels do not work on a device, or None; and whether nobody is surprised by that."""
    if kind != "sparse":
        return f'there is none for kind="{kind}"', True
    try:
        from bpo.sketching import kernels
    except ImportError as error:
        return f"Triton is not installed ({error})", device.type != "cuda"
    on_cpu = device.type == "cpu"
    if on_cpu != kernels.INTERPRETED:
        return "Triton serves a GPU, or a CPU where TRITON_INTERPRET=1", on_cpu
    sketcher = _core.Sketcher(dim, seed=2**64 - 59, nnz=nnz)
    generator = np.random.default_rng(0)
    widths = {9: min(2 * dim // nnz + 77, 5000), 2**33: 300}
    parts = {at: generator.normal(size=(2, width)).astype(np.float32) for at, width in widths.items()}
    wanted = np.zeros((2, dim), np.float32)
    try:
        sums = DeviceSums(sketcher, 2, device)
        for offset, part in parts.items():
            sketcher.sketch(part, offset, wanted)
            sums.add(offset, torch.from_numpy(part).to(device), slice(0, 2))
        found = sums.rows()
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        if is_out_of_memory(error):
            raise  # there will be some for a smaller batch
        return f"{type(error).__name__}: {' '.join(str(error).split())}", False
    if not np.array_equal(found.view(np.uint32), wanted.view(np.uint32)):
        return "its sketches differ from those of the core", False
    return None, True


@functools.lru_cache(maxsize=64)
def _warn_once(device: torch.device, reason: str) -> None:
    warn(f"Gradients on {device} are sketched on the CPU, which is slower: the Triton kernel does not work ({reason}).")


class DeviceSums:
    """The sketches of one batch of n samples, on a device.

    Gradients are kept until there are enough for a launch; launches run on the current stream, in the order in which
    gradients came, so that the bits are those of the core.

    Args:
        sketcher: A sparse sketch.
        size: How many samples.
        device: A GPU, or the CPU where Triton interprets.
        most_pending: Bytes of gradients beyond which a launch takes them.
        tile: Outputs of a program, a power of two. Changes no bit.
    """

    def __init__(
        self,
        sketcher: _core.Sketcher,
        size: int,
        device: torch.device,
        *,
        most_pending: int = MOST_PENDING,
        tile: int = TILE,
    ) -> None:
        self._sketcher = sketcher
        self._device = device
        self._most_pending = most_pending
        self._tile = tile
        self._sums = torch.zeros(size, sketcher.dim, device=device)
        self._pending: list[Slice] = []
        self._bytes = 0
        self._fetched: Fetched | None = None
        self.under_way = True

    def add(self, offset: int, gradients: torch.Tensor, samples: slice) -> None:
        """Adds the sketch of (n', size) gradients; those of another device are moved to this one."""
        if self._fetched is not None:
            raise RuntimeError("The sketches of this batch are finished: no more gradients can be added.")
        first, last, _ = samples.indices(len(self._sums))
        count, width = gradients.shape
        if count != last - first:
            raise ValueError(f"`gradients` must have {last - first} rows, but has {count}")
        if not 0 <= offset <= _END - width:
            raise ValueError(f"`offset` must be below 2^62 with the coordinates that follow, but is {offset}")
        if gradients.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(f"`gradients` must be float32, float16 or bfloat16, but is {gradients.dtype}")
        if not count or not width:
            return
        gradients = gradients.detach().to(self._device, torch.float32, non_blocking=True)
        if gradients.stride(1) != 1:
            gradients = gradients.contiguous()
        self._pending.append((offset, gradients, first, last))
        self._bytes += gradients.nbytes
        if self._bytes > self._most_pending:
            self._launch()

    def finish(self) -> None:
        """Launches what is pending, and starts the copy of the sketches to the host."""
        if self._fetched is None:
            self._launch()
            self._fetched = Fetched(self._sums)

    def rows(self) -> npt.NDArray[np.float32]:
        """Finishes and waits; returns the (n, d) sketches."""
        self.finish()
        assert self._fetched is not None
        rows: npt.NDArray[np.float32] = self._fetched.numpy()
        return rows

    def _launch(self) -> None:
        """Sketches what is pending: one launch draws all signs and rotations, one adds."""
        if not self._pending:
            return
        from bpo.sketching import kernels

        size, dim = self._sums.shape
        nnz = self._sketcher.nnz
        outputs = dim // nnz
        # The gradients stay alive until what reads them is on the stream: memory is used again in its order.
        pending, self._pending, self._bytes = self._pending, [], 0
        tables = Tables.of(pending, self._sketcher, size, _DRAWS)
        scale = float(np.float32(1) / np.sqrt(np.float32(nnz)))
        tile = min(self._tile, 1 << (outputs - 1).bit_length())
        with contextlib.ExitStack() as stack:
            if self._device.type != "cpu":
                stack.enter_context(torch.cuda.device(self._device))
            table = sent(torch.from_numpy(tables.joined), self._device)
            signs = torch.empty(tables.sign_words, dtype=torch.int32, device=self._device)
            rotations = torch.empty(tables.rotations, dtype=torch.int32, device=self._device)
            kernels.draw[(tables.programs,)](
                table,
                tables.tasks,
                tables.owners,
                signs,
                rotations,
                outputs=outputs,
                draws=_DRAWS,
                enable_fp_fusion=False,
            )
            kernels.add[(size * nnz * -(-outputs // tile),)](
                table,
                tables.slices,
                tables.begins,
                tables.visits,
                signs,
                rotations,
                self._sums,
                scale,
                outputs=outputs,
                repetitions=nnz,
                tile=tile,
                num_warps=max(1, min(_WARPS, tile // 32)),
                enable_fp_fusion=False,
            )
