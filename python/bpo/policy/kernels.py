"""Log-softmax at the targets and its gradient on a GPU: two Triton kernels, each of which reads the logits once.

Written in PyTorch's operations, they would be read and written in float32 some ten times.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _score(
    logits: tl.tensor,
    targets: tl.tensor,
    logps: tl.tensor,
    normalizers: tl.tensor,
    agreements: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    lanes = tl.arange(0, block)
    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)  # Σ exp(z − largest) …
    squares = tl.full([], 0.0, tl.float32)  # … and Σ exp(z − largest)²
    for start in range(0, vocabulary, block):
        z = tl.load(logits + start + lanes, mask=start + lanes < vocabulary, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(z, axis=0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        rescale = tl.exp(before - shift)
        powers = tl.exp(z - shift)
        total = total * rescale + tl.sum(powers, axis=0)
        squares = squares * rescale * rescale + tl.sum(powers * powers, axis=0)
    logarithm = tl.log(total)
    tl.store(normalizers + row, largest + logarithm)
    tl.store(agreements + row, tl.log(squares) - 2 * logarithm)
    target = tl.load(targets + row)
    known = (target >= 0) & (target < vocabulary)
    z = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(logps + row, z - (largest + logarithm))


@triton.jit  # type: ignore[untyped-decorator]
def _differentiate(
    logits: tl.tensor,
    targets: tl.tensor,
    normalizers: tl.tensor,
    upstream: tl.tensor,
    out: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * block + tl.arange(0, block)
    inside = lanes < vocabulary
    z = tl.load(logits + row * stride + lanes, mask=inside, other=float("-inf")).to(tl.float32)
    hit = tl.where(lanes == tl.load(targets + row), 1.0, 0.0)
    gradient = (hit - tl.exp(z - tl.load(normalizers + row))) * tl.load(upstream + row)
    tl.store(out + row * vocabulary + lanes, gradient.to(out.dtype.element_ty), mask=inside)


def score(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Takes (m, vocabulary) logits and (m,) targets; returns log π, log Σ_v exp z_v and log Σ_v π_v², (m,) float32.

    log π of a target beyond the vocabulary is NaN.
    """
    logps, normalizers, agreements = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        size, stride = logits.shape[1], logits.stride(0)
        with _on(logits.device):
            _score[(len(logits),)](
                logits, targets, logps, normalizers, agreements, size, stride, block=_BLOCK, num_warps=8
            )
    return logps, normalizers, agreements


def differentiate(
    logits: torch.Tensor, targets: torch.Tensor, normalizers: torch.Tensor, upstream: torch.Tensor
) -> torch.Tensor:
    """Returns (one-hot(target) − π) · upstream, the gradient at (m, vocabulary) logits, in their type."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if len(logits):
        size, stride = logits.shape[1], logits.stride(0)
        grid = (len(logits), -(-size // _BLOCK))
        with _on(logits.device):
            _differentiate[grid](logits, targets, normalizers, upstream, out, size, stride, block=_BLOCK, num_warps=8)
    return out


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one of the logits."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
