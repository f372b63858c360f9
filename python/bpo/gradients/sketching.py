"""Gradients to sketches, beside the model: on a GPU they are copied and sketched while the next layers run."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from bpo import _core

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig


# Gradients on their way from the GPU to the sketch; more make the model wait.
_BYTES_UNDER_WAY = 1 << 30

# Numbers in a fingerprint, and signs that are drawn once and used over and over.
FINGERPRINT = 64
_SIGNS = 1 << 16


class SketchBatch:
    """The sketches of one batch, complete once :meth:`rows` returns them."""

    def __init__(self, sketching: Sketching, size: int, dim: int) -> None:
        self._sketching = sketching
        self._rows = np.zeros((size, dim), dtype=np.float32)
        self._futures: list[concurrent.futures.Future[None]] = []

    def consume(self, offset: int, gradients: torch.Tensor, samples: slice) -> None:
        """Adds the sketch of (n', size) gradients that start at a coordinate, of a part of the batch."""
        future = self._sketching.add(offset, gradients.contiguous(), self._rows[samples])
        if future is not None:
            self._futures.append(future)

    @property
    def under_way(self) -> bool:
        """Whether some gradients have been left to be sketched beside the model."""
        return bool(self._futures)

    def rows(self) -> npt.NDArray[np.float32]:
        """Waits, and returns the (n, d) sketches."""
        for future in self._futures:
            future.result()
        return self._rows


class Sketching:
    """Sketches what the hooks hand over.

    On a CPU at once, since both would want the same cores. From a GPU, gradients go through pinned memory to one
    thread, in order, so that the result does not depend on timing; the GPU goes on meanwhile.

    Args:
        sketcher: The sketch.
        threads: Threads of the Rust core; None for all.
        beside: Whether to sketch in a thread of its own; by default where gradients are on a GPU.
    """

    def __init__(self, sketcher: _core.Sketcher, threads: int | None, *, beside: bool | None = None) -> None:
        self._sketcher = sketcher
        self._threads = threads
        self._beside = beside
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="bpo-sketch")
        self._under_way: collections.deque[tuple[concurrent.futures.Future[None], int]] = collections.deque()
        self._bytes = 0

    @classmethod
    def of(cls, config: SelectConfig) -> Sketching:
        """Returns the sketching that a configuration asks for."""
        sketcher = _core.Sketcher(
            config.sketch_dim, seed=config.sketch_seed, kind=config.sketch_kind, nnz=config.sketch_nnz
        )
        return cls(sketcher, config.threads)

    def batch(self, size: int) -> SketchBatch:
        """Starts the sketches of a batch of n samples."""
        return SketchBatch(self, size, self._sketcher.dim)

    def add(
        self, offset: int, gradients: torch.Tensor, out: npt.NDArray[np.float32]
    ) -> concurrent.futures.Future[None] | None:
        """Adds the sketch of contiguous (n', size) gradients to ``out``, now or later."""
        if not (gradients.is_cuda if self._beside is None else self._beside):
            self._sketcher.sketch(gradients.cpu().numpy(), offset, out, threads=self._threads)
            return None
        while self._under_way and (self._bytes > _BYTES_UNDER_WAY or self._under_way[0][0].done()):
            oldest, size = self._under_way.popleft()
            oldest.result()
            self._bytes -= size
        copied = None
        if gradients.is_cuda:
            host = torch.empty(gradients.shape, dtype=gradients.dtype, pin_memory=True)
            host.copy_(gradients, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
            gradients = host
        future = self._worker.submit(self._sketch, offset, gradients, out, copied)
        self._under_way.append((future, gradients.nbytes))
        self._bytes += gradients.nbytes
        return future

    def _sketch(
        self, offset: int, gradients: torch.Tensor, out: npt.NDArray[np.float32], copied: torch.cuda.Event | None
    ) -> None:
        if copied is not None:
            copied.synchronize()
        self._sketcher.sketch(gradients.numpy(), offset, out, threads=self._threads)

    def __enter__(self) -> Sketching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)


def fingerprint(gradients: torch.Tensor) -> torch.Tensor:
    """Takes (n, size) gradients; returns (n, buckets), on the CPU: linear, and as long as they are but for some 10 %.

    Each number has a random sign and one of the buckets, in which it is added up (a count sketch, whose signs are the
    product of two, so that few are drawn).
    """
    n, size = gradients.shape
    within, across = _signs(-(-size // _SIGNS))
    total = torch.zeros(n, FINGERPRINT, device=gradients.device)
    for block, part in enumerate(torch.split(gradients, _SIGNS, dim=1)):
        signed = part.float() * within[: part.shape[1]].to(part.device)
        signed = torch.nn.functional.pad(signed, (0, -part.shape[1] % FINGERPRINT))
        total += signed.view(n, -1, FINGERPRINT).sum(dim=1) * across[block].to(part.device)
    return total.cpu()


@functools.lru_cache(maxsize=4)
def _signs(blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ±1 for the numbers of a block, and for the buckets of each block."""
    draw = functools.partial(torch.randint, 0, 2, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return 2.0 * draw((_SIGNS,)) - 1, 2.0 * draw((blocks, FINGERPRINT)) - 1
