"""Log-softmax at the target tokens, in float32 but without a float32 copy of all logits."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bpo.system.memory import is_out_of_memory
from bpo.system.warn import warn

# Rows of logits that are widened to float32 at a time: 64 MB for a vocabulary of 128,000.
_LOGIT_ROWS = 128


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log π and log π − log Σ_v π_v² of (m,) targets under (m, vocabulary) logits, (m,) float32 each."""
    logps, weights = _TokenLogps.apply(logits, targets)
    return logps, weights


class _TokenLogps(torch.autograd.Function):
    """Log-softmax at the targets. Beside the logits themselves, only their gradient is ever as large as they are."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes (m, vocabulary) logits and (m,) targets; returns log π and log π − log Σ_v π_v², (m,) float32."""
        if _kernels_work(logits.device) and logits.stride(1) == 1:
            from bpo.policy import kernels

            logps, normalizer, agreement = kernels.score(logits, targets)
        else:
            normalizer = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
            agreement = torch.empty_like(normalizer)  # log Σ_v π_v²
            for start in range(0, len(logits), _LOGIT_ROWS):
                part = slice(start, start + _LOGIT_ROWS)
                wide = logits[part].float()
                largest = wide.amax(dim=-1, keepdim=True)
                powers = wide.sub(largest).exp_()
                total = powers.sum(dim=-1).log()
                normalizer[part] = largest[:, 0] + total
                agreement[part] = powers.square_().sum(dim=-1).log() - 2 * total
            logps = logits.gather(-1, targets[:, None])[:, 0].float() - normalizer
        weights = logps - agreement
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.mark_non_differentiable(weights)
        return logps, weights

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        """∂ log π(target) / ∂ logits = one-hot(target) − π."""
        logits, targets, normalizer = ctx.saved_tensors
        if _kernels_work(logits.device) and logits.stride(1) == 1:
            from bpo.policy import kernels

            return kernels.differentiate(logits, targets, normalizer, gradient.contiguous()), None
        out = torch.empty_like(logits)
        for start in range(0, len(logits), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            wide = torch.exp(logits[part].float() - normalizer[part, None]).mul_(-gradient[part, None])
            wide.scatter_add_(1, targets[part, None], gradient[part, None].float())
            out[part] = wide
        return out, None


@functools.lru_cache(maxsize=64)
def _kernels_work(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: on a GPU, if they compile there."""
    if device.type != "cuda":
        return False
    try:
        from bpo.policy import kernels
    except ImportError:
        return False
    try:
        logits, target = torch.zeros(1, 2, device=device), torch.ones(1, dtype=torch.int64, device=device)
        logps, normalizers, _ = kernels.score(logits, target)
        found = kernels.differentiate(logits, target, normalizers, torch.ones_like(logps))
        right = bool(torch.allclose(found, torch.tensor([[-0.5, 0.5]], device=device)))
    except Exception as error:  # whatever Triton, its compiler or the driver raises
        if is_out_of_memory(error):
            raise  # there will be some for a smaller batch
        warn(f"Logits on {device} take longer: the Triton kernel does not work ({type(error).__name__}: {error}).")
        return False
    return right
