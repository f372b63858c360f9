"""Draws from a policy's distribution, with random numbers that belong to one response."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

Sampled = tuple[str, bool, bool]
"""A response: its text, whether it was cut at the token limit, whether a server marks it as a refusal."""


def random_stream(seed: int, prompt: bytes, response: int, length: int) -> npt.NDArray[np.float64]:
    """Returns the random numbers of one response: ``length`` uniforms in [0, 1), of which more begin with the same."""
    key = hashlib.sha256(f"{seed} {response} ".encode() + prompt).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little"))).random(length)


class OwnStreams:
    """A logits processor that draws a token for each row with the row's own random numbers and leaves only that one.

    Args:
        uniforms: (b, max_new_tokens) in [0, 1).
        start: Tokens of the padded prompts.
        temperature: Of the softmax.
        top_p: Of the nucleus.
    """

    def __init__(self, uniforms: npt.NDArray[np.float64], start: int, temperature: float, top_p: float) -> None:
        self.uniforms = uniforms
        self.start = start
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes (b, t) ids and (b, v) logits; returns logits that are finite at the token drawn for each row alone."""
        import torch

        column = torch.from_numpy(self.uniforms[:, input_ids.shape[1] - self.start].copy())
        chosen = draw_tokens(scores, column, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw_tokens(scores: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draws a token for each row by inverting its distribution function.

    The function runs over the vocabulary in its order, not by probability: two tokens of nearly equal probability then
    cannot change places by rounding, and a change of the logits by ε changes a draw with probability O(ε).

    Args:
        scores: (b, v) logits.
        uniforms: (b,) float64 in [0, 1).
        temperature: Divides the logits.
        top_p: The smallest set of most probable tokens whose mass reaches it is drawn from, with what ties its last.

    Returns:
        (b,) int64.

    Raises:
        ValueError: Logits that are NaN or infinite.
    """
    import torch

    # Not all devices have float64.
    exact = scores.cpu() if scores.device.type == "mps" else scores
    probabilities = torch.softmax(exact.double() / temperature, dim=-1)
    if top_p < 1:
        # Mostly few tokens make up the nucleus; sorting them all takes longest of all that is done here.
        for most in (1024, probabilities.shape[1]):
            ordered = probabilities.topk(min(most, probabilities.shape[1]), dim=-1).values
            before = ordered.cumsum(dim=-1) - ordered  # mass of what is more probable
            if bool((before[:, -1] >= top_p).all()):
                break
        least = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise ValueError("The model gives logits that are NaN or infinite; try another dtype.")
    target = torch.minimum(uniforms.to(cumulative)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose cumulative mass exceeds the target, so never one of no mass.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).to(scores.device)
