"""Gradients to sketches by the core: at once, or through pinned memory while the next layers run."""

from __future__ import annotations

import collections
import concurrent.futures
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.policy.transfer import Fetched

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo import _core

# Gradients on their way from the GPU to the sketch; more make the model wait.
_BYTES_UNDER_WAY = 1 << 30


class HostSketcher:
    """The core, and one thread that sketches in the order given, so that the result does not depend on timing.

    Args:
        sketcher: The sketch.
        threads: Threads of the Rust core; None for all.
        beside: Whether to sketch in a thread of its own; None where gradients are on a GPU.
    """

    def __init__(self, sketcher: _core.Sketcher, threads: int | None, beside: bool | None) -> None:
        self.dim = sketcher.dim
        self._sketcher = sketcher
        self._threads = threads
        self._beside = beside
        self._worker = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="bpo-sketch")
        self._under_way: collections.deque[tuple[concurrent.futures.Future[None], int]] = collections.deque()
        self._bytes = 0

    def beside(self, gradients: torch.Tensor) -> bool:
        """Whether gradients are left to the thread."""
        return gradients.is_cuda if self._beside is None else self._beside

    def now(self, offset: int, gradients: torch.Tensor, out: npt.NDArray[np.float32]) -> None:
        """Adds the sketch of (n', size) gradients to ``out``."""
        self._sketcher.sketch(_array(gradients.cpu()), offset, out, threads=self._threads)

    def later(
        self, offset: int, gradients: torch.Tensor, out: npt.NDArray[np.float32]
    ) -> concurrent.futures.Future[None]:
        """Adds the sketch of (n', size) gradients to ``out`` once the thread gets there."""
        while self._under_way and (self._bytes > _BYTES_UNDER_WAY or self._under_way[0][0].done()):
            oldest, size = self._under_way.popleft()
            self._bytes -= size
            oldest.result()
        future = self._worker.submit(self._sketch, offset, Fetched(gradients), out)
        self._under_way.append((future, gradients.nbytes))
        self._bytes += gradients.nbytes
        return future

    def _sketch(self, offset: int, gradients: Fetched, out: npt.NDArray[np.float32]) -> None:
        self.now(offset, gradients.tensor(), out)

    def close(self) -> None:
        """Ends the thread; what it has not begun is left undone."""
        self._worker.shutdown(wait=True, cancel_futures=True)


class HostSums:
    """The sketches of one batch of n samples, by the core."""

    def __init__(self, sketcher: HostSketcher, size: int) -> None:
        self._sketcher = sketcher
        self._rows = np.zeros((size, sketcher.dim), dtype=np.float32)
        self._futures: list[concurrent.futures.Future[None]] = []

    @property
    def under_way(self) -> bool:
        """Whether some gradients have been left to the thread."""
        return bool(self._futures)

    def add(self, offset: int, gradients: torch.Tensor, samples: slice) -> None:
        """Adds the sketch of (n', size) gradients, now or later."""
        gradients, out = gradients.contiguous(), self._rows[samples]
        # What comes after gradients that are under way waits for its turn.
        if self._futures or self._sketcher.beside(gradients):
            self._futures.append(self._sketcher.later(offset, gradients, out))
        else:
            self._sketcher.now(offset, gradients, out)

    def finish(self) -> None:
        """Says that there are no more gradients."""

    def rows(self) -> npt.NDArray[np.float32]:
        """Waits, and returns the (n, d) sketches."""
        for future in self._futures:
            future.result()
        return self._rows


def _array(gradients: torch.Tensor) -> npt.NDArray[Any]:
    """As the core takes them: bfloat16 as its bits."""
    if gradients.dtype == torch.bfloat16:
        gradients = gradients.view(torch.uint16)
    return gradients.detach().numpy()
