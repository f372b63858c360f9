"""Memory while long work goes on: what was freed is given back, and a batch for which there is none is given up."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

_SECONDS_BETWEEN = 10.0

_Result = TypeVar("_Result")


class HeapTrimmer:
    """Gives memory that was freed back to the system, at most every ten seconds and where the C library can.

    Batches of many shapes leave glibc's heap in pieces that it keeps, above all under bfloat16: gradients of 119,000
    tokens with a model of 135M took 8.2 GB, where no more than 1.5 GB of the heap is in use at a time. A trim takes a
    tenth of a second.
    """

    def __init__(self) -> None:
        library = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(library, "malloc_trim", None)
        self._last = time.monotonic()

    def __call__(self) -> None:
        """To be called after each batch."""
        if self._trim is not None and time.monotonic() - self._last >= _SECONDS_BETWEEN:
            self._trim(0)
            self._last = time.monotonic()


def within_memory(run: Callable[..., _Result], *arguments: Any) -> tuple[_Result | None, str]:
    """Runs one batch; returns None and the reason where memory ran out.

    The error itself must not leave: its traceback would hold on to the tensors of the batch.
    """
    try:
        return run(*arguments), ""
    except (MemoryError, RuntimeError) as error:  # PyTorch's own are the latter
        if not is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, message


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: PyTorch has a class for it on a GPU, elsewhere only sentences."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    sentences = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in sentences)
