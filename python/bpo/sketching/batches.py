"""The sketches of a batch: on the GPU where the gradients are, or by the core."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import torch

from bpo import _core
from bpo.sketching.device import DeviceSums, device_works
from bpo.sketching.host import HostSketcher, HostSums
from bpo.system.processes import cores

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig


class SketchBatch:
    """The sketches of one batch of n samples, complete once :meth:`rows` returns them."""

    def __init__(self, sketching: Sketching, size: int) -> None:
        self._sketching = sketching
        self._size = size
        self._sums: DeviceSums | HostSums | None = None
        # Layers on several devices hand over their gradients from a thread each.
        self._lock = threading.Lock()

    def consume(self, offset: int, gradients: torch.Tensor, samples: slice) -> None:
        """Adds the sketch of (n', size) gradients that start at a coordinate, of a part of the batch.

        The first ones decide where the batch is sketched. Gradients must not change before :meth:`finish`.

        Args:
            offset: The first coordinate.
            gradients: float32, float16 or bfloat16; those of half precision widen exactly.
            samples: The part of the batch.

        Raises:
            TypeError: Gradients of another dtype.
            ValueError: Another number of rows than samples, or coordinates beyond 2^62.
        """
        with self._lock:
            if self._sums is None:
                self._sums = self._sketching.sums(self._size, gradients.device)
            self._sums.add(offset, gradients, samples)

    def finish(self) -> None:
        """Says that there are no more gradients; on a GPU the sketches start their way to the host."""
        if self._sums is not None:
            self._sums.finish()

    @property
    def under_way(self) -> bool:
        """Whether :meth:`rows` may have something to wait for."""
        return self._sums is not None and self._sums.under_way

    def rows(self) -> npt.NDArray[np.float32]:
        """Finishes and waits; returns the (n, d) sketches."""
        if self._sums is None:
            return np.zeros((self._size, self._sketching.sketcher.dim), dtype=np.float32)
        return self._sums.rows()


class Sketching:
    """Sketches what the hooks hand over, with the same bits wherever it is done.

    Gradients on a GPU are sketched there where Triton is installed and the sketch is sparse. Otherwise they go through
    pinned memory to one thread, in order; the GPU goes on meanwhile. Those on a CPU are sketched at once, since model
    and sketch would want the same cores.

    Args:
        sketcher: The sketch.
        threads: Threads of the Rust core; None for all.
        beside: Whether the core sketches in a thread of its own; by default where gradients are on a GPU.
        on_device: True asks for the kernel and raises an error where it cannot run, False never takes it; None takes
            it where it works.
    """

    def __init__(
        self,
        sketcher: _core.Sketcher,
        threads: int | None,
        *,
        beside: bool | None = None,
        on_device: bool | None = None,
    ) -> None:
        self.sketcher = sketcher
        self._host = HostSketcher(sketcher, threads, beside)
        self._on_device = on_device

    @classmethod
    def of(cls, config: SelectConfig, sharers: int = 1) -> Sketching:
        """Returns the sketching that a configuration asks for, on a machine that so many processes share."""
        sketcher = _core.Sketcher(
            config.sketch_dim, seed=config.sketch_seed, kind=config.sketch_kind, nnz=config.sketch_nnz
        )
        threads = config.threads if config.threads is not None or sharers == 1 else max(1, cores() // sharers)
        return cls(sketcher, threads)

    def batch(self, size: int) -> SketchBatch:
        """Starts the sketches of a batch of n samples."""
        return SketchBatch(self, size)

    def sums(self, size: int, device: torch.device) -> DeviceSums | HostSums:
        """Starts the sketches of n samples whose gradients come from a device.

        Raises:
            RuntimeError: The kernel is asked for and cannot run.
        """
        if device_works(self.sketcher, device, asked=self._on_device):
            return DeviceSums(self.sketcher, size, device)
        return HostSums(self._host, size)

    def __enter__(self) -> Sketching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._host.close()
