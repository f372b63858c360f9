"""Short fingerprints of gradients, by which a plan compares them."""

from __future__ import annotations

import functools

import torch

# Numbers in a fingerprint, and signs that are drawn once and used over and over.
FINGERPRINT = 64
_SIGNS = 1 << 16


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
