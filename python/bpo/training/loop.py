"""What lets training pairs change under the running loop of TRL's trainer."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Iterator


class RowNumbers(Dataset[int]):
    """The numbers 0 to n − 1, for a data loader that draws rows which are looked up when their step begins.

    Loaders fetch ahead, and workers hold copies of a data set: what they draw must not change with it.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def collate_rows(rows: list[int]) -> dict[str, torch.Tensor]:
    """A batch of row numbers."""
    return {"row": torch.tensor(rows)}


@contextlib.contextmanager
def untouched_training(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Lets a model in training be used for something else: random states stay, and so does its own arithmetic.

    Accelerate has wrapped its forward pass in mixed precision; selection decides on its precision itself.
    """
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else [device.index or 0]
    wrapped = model.__dict__.get("forward") if hasattr(model, "_original_forward") else None
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        if wrapped is not None:
            model.forward = model._original_forward  # type: ignore[assignment]
        try:
            yield
        finally:
            if wrapped is not None:
                model.forward = wrapped
            random.setstate(states[0])
            np.random.set_state(states[1])
