"""What autograd itself says of a policy: gradients of its parameters, and whether its tokens see those after them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.policy.checks import UnsupportedModelError, base_of
from bpo.policy.logprobs import check_vocabulary
from bpo.policy.sharding import is_lost

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.policy.logprobs import Forward

# Share of the largest gradient at a token that may come back at later ones: none does, but for rounding.
_LEAK = 1e-4


@contextlib.contextmanager
def named_errors(model: PreTrainedModel) -> Iterator[None]:
    """Says of which model an error is that comes out of its code, but for want of memory.

    Raises:
        UnsupportedModelError: Any such error.
    """
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if is_lost(error):
            raise
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run and differentiated on two short responses, from token ids and an "
            f"attention mask alone: {type(error).__name__}: {error}"
        ) from error


def differentiate(
    forward: Forward, names: Sequence[str], rows: npt.NDArray[np.int64], consume: Callable[[str, torch.Tensor], None]
) -> float:
    """Differentiates Σ log π over a batch by some parameters, with one gradient in memory at a time.

    Args:
        forward: A frozen model, and the responses.
        names: The parameters.
        rows: (n,) which of the responses form the batch.
        consume: Receives name and gradient of each parameter that has a part in it.

    Returns:
        Σ log π.
    """
    parameters = {name: forward.model.get_parameter(name) for name in names}
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def hand_over(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        consume(name, parameter.grad)
        parameter.grad = None

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(hand_over, name)))
        with torch.set_grad_enabled(bool(parameters)):
            logp = forward.logps(rows).logps.sum()
            if logp.requires_grad:
                # Only so far: a tensor of the user's own that requires a gradient gets none.
                torch.autograd.backward(logp, inputs=list(parameters.values()))
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = before[name]
    return float(logp.detach())


@contextlib.contextmanager
def graph_from_embeddings(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Starts the graph at the embedded tokens: with all parameters frozen nothing else would need one.

    Yields:
        The tensors at which graphs begin, filled as the model runs.
    """
    beginnings: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        begun = begin_graph(output, beginnings)
        if begun is output:  # inside a graph of the user's
            beginnings.append(output)
        return begun

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield beginnings
    finally:
        handle.remove()


def begin_graph(output: torch.Tensor, beginnings: list[torch.Tensor]) -> torch.Tensor:
    """Returns an output that has a graph: its own, else one that begins here.

    No leaf is given to the model, which may go on in place, as CTRL scales its embeddings; and none of the user's is
    where it begins.
    """
    if output.requires_grad and not output.is_leaf:
        return output
    beginnings.append(output.detach().requires_grad_(True))
    return beginnings[-1].clone()


def check_policy(forward: Forward) -> None:
    """Checks that a model knows every token of some responses, and that it is causal, on one of middle length.

    Raises:
        ValueError: A token that the model does not know.
        UnsupportedModelError: A model in which a token sees those after it.
    """
    check_vocabulary(forward.model, forward.tokenized.ids)
    lengths = forward.tokenized.lengths
    if len(lengths):
        check_causal(forward, np.argsort(lengths)[len(lengths) // 2])


def check_causal(forward: Forward, row: np.int64) -> None:
    """Checks that log π of the first half of a response depends neither on tokens after it nor on its own last one.

    Seen by its gradient at the embedded tokens. In a causal model the last token of the half has a part as what is
    predicted, but its embedding has none. Of a model that embeds its tokens in another way nothing is said.

    Args:
        forward: A frozen model, and the responses.
        row: The response.

    Raises:
        UnsupportedModelError: It does, as in an encoder.
    """
    tokenized = forward.tokenized.take(np.array([row]))
    length, start = int(tokenized.lengths[0]), max(int(tokenized.prompt_lengths[0]), 1)
    if length <= start:
        return
    last = start + (length - start - 1) // 2
    weights = np.zeros(int(tokenized.response_lengths[0]), dtype=np.float32)
    weights[: last + 1 - int(tokenized.prompt_lengths[0])] = 1
    half = dataclasses.replace(forward, tokenized=dataclasses.replace(tokenized, weights=[weights]))
    norms = torch.zeros(length)
    with torch.enable_grad(), graph_from_embeddings(forward.model) as embedded:
        logp = half.logps(np.array([0])).logps.sum()
        gradients = torch.autograd.grad(logp, embedded, allow_unused=True) if logp.requires_grad and embedded else ()
    for gradient in gradients:
        if gradient is not None and gradient.shape[:-1].numel() == length:
            norms += gradient.reshape(length, -1).float().norm(dim=-1).cpu()
    if float(norms[last:].max()) > _LEAK * float(norms.max()):
        base = base_of(forward.model)
        encoder = getattr(base.config, "is_decoder", None) is False
        advice = "Set is_decoder=True in its configuration, if it was trained so" if encoder else "Pass a causal model"
        raise UnsupportedModelError(
            f"In {type(base).__name__} a token sees those after it, so log π of a response would be read off the "
            f"response itself. {advice}."
        )
