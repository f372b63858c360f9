"""Tensors between the CPU and a GPU, without waiting for what the GPU is doing."""

from __future__ import annotations

from typing import Any

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns a tensor of the CPU on a device. Only memory that is pinned can be let go before it was copied."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Fetched:
    """A tensor on its way to the CPU.

    Args:
        tensor: What to fetch, as it is once everything before has run.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def tensor(self) -> torch.Tensor:
        """Waits for it; returns it on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu()

    def numpy(self) -> Any:
        """Waits for it; returns an array of its shape and type."""
        return self.tensor().numpy()
