"""Whether the tokens of a model see those after them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from bpo.policy.logprobs import Forward

# Share of the largest gradient at a token that may come back at later ones: none does, but for rounding.
_LEAK = 1e-4


def sees_ahead(forward: Forward, row: np.int64) -> bool:
    """Whether log π of the first half of a response depends on tokens after it, or on its own last one.

    Found by its gradient at the embedded tokens. In a causal model the last token of the half has a part as what is
    predicted, but its embedding has none.

    Args:
        forward: A frozen model, and the responses.
        row: The response.

    Returns:
        False also where the model embeds its tokens in another way than by its input embeddings.
    """
    tokenized = forward.tokenized.take(np.array([row]))
    length, start = int(tokenized.lengths[0]), max(int(tokenized.prompt_lengths[0]), 1)
    if length <= start:
        return False
    last = start + (length - start - 1) // 2
    weights = np.zeros(int(tokenized.response_lengths[0]), dtype=np.float32)
    weights[: last + 1 - int(tokenized.prompt_lengths[0])] = 1
    half = dataclasses.replace(forward, tokenized=dataclasses.replace(tokenized, weights=[weights]))
    norms = torch.zeros(length)
    leaves: list[torch.Tensor] = []

    def add(gradient: torch.Tensor) -> None:
        if gradient.shape[:-1] == (1, length):
            norms.add_(gradient[0].float().norm(dim=-1).cpu())

    def start_here(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        leaf = output.detach().requires_grad_(True)
        leaves.append(leaf)
        leaf.register_hook(add)  # type: ignore[no-untyped-call]
        return leaf.clone()  # some models scale it in place

    handle = forward.model.get_input_embeddings().register_forward_hook(start_here)
    try:
        with torch.enable_grad():
            logp = half.logps(np.array([0])).logps.sum()
            if logp.requires_grad and leaves:
                torch.autograd.backward(logp, inputs=leaves)
    finally:
        handle.remove()
    return float(norms[last:].max()) > _LEAK * float(norms.max())
