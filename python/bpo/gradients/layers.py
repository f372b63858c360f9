"""Closed forms: the gradient of each sample from what a layer was given and what came back."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn

Consumer = Callable[[int, torch.Tensor, slice], None]
"""Receives the coordinate at which a parameter starts, (n, size) gradients, and the part of the batch they are of."""


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where the gradient of one parameter lies among the coordinates.

    Attributes:
        offset: First coordinate.
        shape: Shape of what is kept of the gradient.
        left: (k, out) or None. A projection of the outputs, on the device of the parameter.
        right: (r, in), (experts, r, in) or None. A projection of the inputs, likewise: what is kept of the gradient G
            of a weight (out, in) is left · G · rightᵀ.
        transposed: Whether the parameter is a weight stored as (in, out), as in GPT-2's Conv1D, or (experts, in, out).
    """

    offset: int
    shape: torch.Size
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        """Coordinates."""
        return self.shape.numel()

    @property
    def projected(self) -> bool:
        """Whether a projection of the gradient is kept."""
        return self.left is not None or self.right is not None

    @functools.cached_property
    def narrow_left(self) -> torch.Tensor | None:
        """``left`` in bfloat16, None where that would change it."""
        return _narrow(self.left)

    @functools.cached_property
    def narrow_right(self) -> torch.Tensor | None:
        """``right`` in bfloat16, None where that would change it."""
        return _narrow(self.right)

    def keep(self, gradient: torch.Tensor) -> torch.Tensor:
        """Returns what is kept of a whole gradient, (1, size) float32."""
        return self._kept(gradient).reshape(1, -1)

    def keep_each(self, gradients: torch.Tensor) -> torch.Tensor:
        """Returns what is kept of n whole gradients, one after the other; (n, size) float32."""
        return self._kept(gradients).flatten(1)

    def _kept(self, gradient: torch.Tensor) -> torch.Tensor:
        kept = gradient.float()
        if self.projected and self.transposed:
            kept = kept.mT
        if self.left is not None:
            kept = self.left @ kept
        if self.right is not None:
            kept = kept @ self.right.transpose(-1, -2)
        return kept


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer (or GPT-2's Conv1D): G = Σ_t g_t x_tᵀ of each sample, with g the gradient at the layer's output.

    Attributes:
        name: Of the module.
        module: The layer.
        weight: Slot of its weight, None where that is not asked for.
        bias: Slot of its bias, likewise.
    """

    name: str
    module: nn.Module
    weight: Slot | None
    bias: Slot | None = None

    @property
    def slots(self) -> dict[str, Slot]:
        """Where its gradients lie, by the name of the parameter."""
        slots = {f"{self.name}.weight": self.weight, f"{self.name}.bias": self.bias}
        return {name: slot for name, slot in slots.items() if slot is not None}

    @property
    def largest(self) -> int:
        """Coordinates of the largest gradient."""
        return max(slot.size for slot in self.slots.values())

    def remember(self, x: torch.Tensor) -> torch.Tensor | None:
        """Takes the (n, t, in) inputs; returns what the gradient needs of them."""
        if self.weight is None:
            return None
        return x if self.weight.right is None else _project(x, self.weight, "right")

    def gradients(self, remembered: torch.Tensor | None, gradient: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Takes (n', t, out) output gradients; yields offset and (n', size) gradients."""
        if self.bias is not None:
            yield self.bias.offset, gradient.sum(dim=1, dtype=torch.float32)
        if self.weight is not None:
            assert remembered is not None
            if self.weight.left is not None:
                gradient = _project(gradient, self.weight, "left")
            swap = self.weight.transposed and not self.weight.projected
            first, second = (remembered, gradient) if swap else (gradient, remembered)
            yield self.weight.offset, _outer(first, second).flatten(1)


@dataclasses.dataclass(frozen=True)
class Embedding:
    """A table of embeddings: the output gradients, added up by token.

    Attributes:
        name: Of the module.
        module: The table.
        weight: Slot of its weight.
    """

    name: str
    module: nn.Embedding
    weight: Slot

    @property
    def slots(self) -> dict[str, Slot]:
        """Where its gradient lies, by the name of the parameter."""
        return {f"{self.name}.weight": self.weight}

    @property
    def largest(self) -> int:
        """Coordinates of the gradient."""
        return self.weight.size

    def remember(self, ids: torch.Tensor) -> torch.Tensor:
        """Takes and returns the (n, t) token ids."""
        return ids

    def gradients(self, ids: torch.Tensor, gradient: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Takes (n', t, d) output gradients; yields offset and (n', size) gradients."""
        gradient = gradient.float()
        if self.module.padding_idx is not None:
            gradient = gradient * (ids != self.module.padding_idx)[..., None]
        if self.weight.left is not None and self.weight.right is not None:
            left = self.weight.left.T[ids]  # (n', t, k)
            right = gradient @ self.weight.right.T
            yield self.weight.offset, torch.bmm(left.transpose(1, 2), right).flatten(1)
            return
        rows = torch.zeros(gradient.shape[0], *self.weight.shape, device=gradient.device)
        # Each adds in the same order every time, where the other does not.
        if gradient.is_cuda:
            samples = torch.arange(gradient.shape[0], device=gradient.device)[:, None].expand_as(ids)
            rows.index_put_((samples, ids), gradient, accumulate=True)
        else:
            for index in range(gradient.shape[0]):
                rows[index].index_add_(0, ids[index], gradient[index])
        yield self.weight.offset, rows.flatten(1)


Layer = Linear | Embedding


def _project(x: torch.Tensor, slot: Slot, side: Literal["left", "right"]) -> torch.Tensor:
    """Takes (n, t, in) and a slot's (k, in) projection; returns their product (n, t, k).

    Where a GPU has bfloat16, as float32 the numbers would have to be written and read again, which takes four times as
    long. The product is rounded to bfloat16 then, as everything is in such a model.
    """
    if _on_tensor_cores(x):
        narrow = slot.narrow_left if side == "left" else slot.narrow_right
        if narrow is not None:
            return nn.functional.linear(x, narrow)
    matrix = slot.left if side == "left" else slot.right
    assert matrix is not None
    return x.float() @ matrix.T


def _outer(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Takes (n, t, a) and (n, t, b); returns Σ_t first_t second_tᵀ, (n, a, b) float32."""
    first = first.transpose(1, 2)
    if first.dtype == second.dtype and _on_tensor_cores(first) and _widens(first.device):
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(first.float(), second.float())


def _on_tensor_cores(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and tensor.dtype == torch.bfloat16


@functools.cache
def _widens(device: torch.device) -> bool:
    """Whether PyTorch gives products of bfloat16 as they are added up, in float32: from 2.8 on, on CUDA."""
    few = torch.zeros(1, 8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.bmm(few, few, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def _narrow(matrix: torch.Tensor | None) -> torch.Tensor | None:
    if matrix is None:
        return None
    narrow = matrix.bfloat16()
    return narrow if torch.equal(narrow.float(), matrix) else None
