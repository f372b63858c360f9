"""The output head over the positions that predict, a chunk of them at a time: logits of all of them are never held.

The model itself lets its head see one position only. What it does to the output of its head, such as soft-capping, is
found out once, from what it makes of numbers that are put in the place of that output; where nothing that is known here
does the same, bit by bit, all logits are computed at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from bpo.policy.checks import UnsupportedModelError, base_of
from bpo.policy.sharding import is_sharded
from bpo.policy.softmax import score_tokens
from bpo.policy.transfer import sent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy.typing as npt
    from transformers import PreTrainedModel

# What the logits of a chunk may take in float32. Products of fewer rows take longer: with a quarter, gradients on 2
# cores took 1.3 times as long (a vocabulary of 151,936, float32).
CPU_CHUNK_BYTES = 256 << 20
ACCELERATOR_CHUNK_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive predicting positions that the output head is run over at once, c of them.

    Attributes:
        rows: Which of the predicting positions of the batch.
        samples: Which responses they are of.
        counts: (n',) how many are of each of these.
    """

    rows: slice
    samples: slice
    counts: npt.NDArray[np.int64]

    @functools.cached_property
    def places(self) -> torch.Tensor:
        """(c,) int64, where each belongs in a matrix of a row a response, flattened."""
        return torch.from_numpy(np.flatnonzero(np.arange(self.counts.max()) < self.counts[:, None]))

    def by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns (n', t', features), filled up with zeros, of (1, c, features)."""
        if len(self.counts) == 1:
            return tensor
        width, features = int(self.counts.max()), tensor.shape[-1]
        padded = tensor.new_zeros(len(self.counts) * width, features)
        padded.index_copy_(0, sent(self.places, tensor.device), tensor[0])
        return padded.view(-1, width, features)


@dataclasses.dataclass(frozen=True)
class Positions:
    """The positions of a padded batch whose output predicts a token of a response: m of them, in n responses.

    Attributes:
        shape: (n, t) of the batch.
        index: (m,) int64, on the CPU: their places in the batch, flattened; ascending.
        counts: (n,) how many are of each response.
    """

    shape: torch.Size
    index: torch.Tensor
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, predicting: torch.Tensor) -> Positions:
        """Takes (n, t − 1) bool, see :func:`bpo.policy.logprobs.predicting_positions`."""
        padded = torch.nn.functional.pad(predicting, (0, 1))
        return cls(padded.shape, padded.flatten().nonzero()[:, 0], predicting.sum(dim=1).numpy())

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns (m, features) of (n, t, features)."""
        return tensor.flatten(0, 1).index_select(0, sent(self.index, tensor.device))

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Adds (m,) values up by response, (n,): row by row of a padded matrix, deterministic on a GPU, too."""
        matrix = torch.zeros(self.shape.numel(), dtype=values.dtype, device=values.device)
        return matrix.index_copy(0, sent(self.index, values.device), values).view(self.shape).sum(dim=1)

    def cuts(self, limit: int) -> list[slice]:
        """Cuts them into runs of at most ``limit``, as even as can be."""
        m = len(self.index)
        size = -(-m // -(-m // limit))
        return [slice(start, min(start + size, m)) for start in range(0, m, size)]

    def chunks(self, limit: int) -> Iterator[Chunk]:
        """Cuts them into chunks that have at most ``limit`` rows, also with each response padded to the longest.

        Whole responses, where one is not longer than that, so that the gradient of a response comes in few parts.
        """
        n, start, first = len(self.counts), 0, 0
        while first < n:
            count = int(self.counts[first])
            if count > limit:
                size = -(-count // -(-count // limit))
                parts = [min(size, count - done) for done in range(0, count, size)]
                last = first + 1
            else:
                last, longest = first, 0
                while last < n and (last + 1 - first) * max(longest, int(self.counts[last])) <= limit:
                    longest = max(longest, int(self.counts[last]))
                    last += 1
                parts = [int(self.counts[first:last].sum())]
            for part in filter(None, parts):
                counts = self.counts[first:last] if len(parts) == 1 else np.array([part])
                yield Chunk(slice(start, start + part), slice(first, last), counts)
                start += part
            first = last

    def all(self) -> Chunk:
        """All of them, as one chunk."""
        return Chunk(slice(0, len(self.index)), slice(0, len(self.counts)), self.counts)


_IN_FLIGHT: ContextVar[Chunk | None] = ContextVar("chunk", default=None)


def chunk_in_flight() -> Chunk | None:
    """Returns what the output head is being run over, for hooks on it; None where it is not by responses."""
    return _IN_FLIGHT.get()


@dataclasses.dataclass(frozen=True)
class _Tail:
    """What a model does to the output of its head: scales it, and caps it softly.

    Attributes:
        dtype: Of the logits that it returns.
        early: Whether it comes to that first, else last.
        factor: That it multiplies by.
        divisor: That it divides by.
        cap: That no logit exceeds.
    """

    dtype: torch.dtype
    early: bool
    factor: float | None
    divisor: float | None
    cap: float | None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.early:
            logits = logits.to(self.dtype)
        if self.factor is not None:
            logits = logits * self.factor
        if self.divisor is not None:
            logits = logits / self.divisor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits.to(self.dtype)


def _settings(model: PreTrainedModel) -> tuple[float, ...]:
    """Numbers of a model's configuration that may have a part in its logits; which do is found out."""
    config = base_of(model).config
    found = {}
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            known = "logit" in name or "lm_head" in name or name == "output_multiplier"
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if known and number and value != 0 and math.isfinite(value):
                found[name] = float(value)
    return tuple(sorted(set(found.values())))


def _tail_of(given: torch.Tensor, made: torch.Tensor, settings: tuple[float, ...]) -> _Tail | None:
    """What makes logits of what took the place of a head's output, None where nothing known does."""
    given = given.to(made.device)
    scales = [(None, None), *((value, None) for value in settings), *((None, value) for value in settings)]
    for cap, (factor, divisor), early in itertools.product((None, *settings), scales, (False, True)):
        tail = _Tail(made.dtype, early, factor, divisor, cap)
        if torch.equal(tail(given), made):
            return tail
    return None


# What is known of models so far, by what it may depend on beside them. None: all logits at once.
_Tails = dict[tuple[Any, ...], "_Tail | None"]
_TAILS: weakref.WeakKeyDictionary[torch.nn.Module, _Tails] = weakref.WeakKeyDictionary()


def forget(model: PreTrainedModel) -> None:
    """Forgets what was found out about a model, which may have changed since: to be called before each run."""
    _TAILS.pop(model, None)


def score_positions(
    model: PreTrainedModel, inputs: Mapping[str, Any], positions: Positions, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a model once and scores the tokens that some of its positions predict.

    Args:
        model: A causal language model.
        inputs: Keyword arguments of its forward pass over an (n, t) batch.
        positions: Which positions.
        targets: (m,) int64, on the CPU: the token that each predicts.

    Returns:
        What :func:`bpo.policy.softmax.score_tokens` does.
    """
    head = model.get_output_embeddings()
    if head is None or not len(positions.index):
        return _score_all(model(**inputs).logits, positions, targets)
    known, settings = _TAILS.setdefault(model, {}), _settings(model)
    kind = inputs["input_ids"].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (weakref.ref(head), settings, autocast, torch.is_inference_mode_enabled())
    if not all(parameter.is_floating_point() for parameter in head.parameters()):
        known[key] = None  # quantized: what it gives back may depend on what comes together
    if key not in known and is_sharded(model):
        known[key] = None  # in step with other processes, it runs once a pass, within the model
    if key not in known or known[key] is not None:
        call = _HeadCall(head, positions, find_out=key not in known)
        with call.caught():
            logits = model(**inputs).logits
        if call.hidden is None:  # the head was not run over the batch, so these are all logits
            return _score_all(logits, positions, targets)
        tail = known.get(key) or call.tail(logits, settings)
        known[key] = tail if call.once else None
        if tail is not None and call.once:
            return call.score(tail, targets)
        del call, logits
    call = _HeadCall(head, positions, every=True)
    with call.caught():
        logits = model(**inputs).logits
    return _score_all(logits, positions, targets)


def _score_all(logits: torch.Tensor, positions: Positions, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores by all logits at once, of the batch or of the positions."""
    reduced = logits.shape[:-1] == (1, len(positions.index))
    if not reduced and logits.shape[:-1] != positions.shape:
        raise UnsupportedModelError(
            f"The model gives logits of shape {tuple(logits.shape)} for {positions.shape[0]} sequences of "
            f"{positions.shape[1]} tokens: whatever puts tokens in front of a prompt (prompt tuning) cannot be scored."
        )
    return score_tokens(logits[0] if reduced else positions.take(logits), sent(targets, logits.device))


class _HeadCall:
    """The call of the output head in the forward pass of a model, which lets it see few positions.

    Args:
        head: The output head.
        positions: The positions that predict.
        every: Whether it sees all of these, else the first one.
        find_out: Whether its output is to be replaced, to find out what the model does to it.

    Attributes:
        hidden: (m, features), what the head is to be run over; None until it is called with the whole batch.
    """

    def __init__(
        self, head: torch.nn.Module, positions: Positions, *, every: bool = False, find_out: bool = False
    ) -> None:
        self.hidden: torch.Tensor | None = None
        self._head = head
        self._positions = positions
        self._every = every
        self._find_out = find_out
        self._watched = any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
            for module in head.modules()
        )
        self._calls = 0
        self._alone = False
        self._output: Any = None
        self._replaced: torch.Tensor | None = None

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Catches it while a model runs."""
        handles = [self._head.register_forward_pre_hook(self._before)]
        if not self._every:
            handles.append(self._head.register_forward_hook(self._after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._calls += 1
        if not args or not isinstance(args[0], torch.Tensor) or args[0].shape[:-1] != self._positions.shape:
            return None
        self._alone = len(args) == 1
        self.hidden = self._positions.take(args[0])
        seen = self.hidden[None] if self._every else self.hidden[None, :1]
        # Cut off, so that its output has a graph where something in the head is differentiated, and only there. Hooks
        # may count on one.
        return (seen if self._every or self._watched else seen.detach(), *args[1:])

    def _after(self, _: torch.nn.Module, __: Any, output: Any) -> torch.Tensor | None:
        if self.hidden is None:
            return None
        self._output = output
        if not self._find_out or not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return None
        # Of both signs and all sizes that half precision holds, so that a cap is seen wherever it is.
        places = torch.arange(output.numel(), dtype=torch.int64) * 389 % 1009
        numbers = (1 - 2 * (places % 2)) * 10.0 ** (places / 1009 * 6.4 - 2)
        self._replaced = numbers.to(output.device, output.dtype).view(output.shape)
        return self._replaced

    @property
    def once(self) -> bool:
        """Whether the head was called once, with the batch and nothing more, and gave back a row."""
        row = isinstance(self._output, torch.Tensor) and self._output.shape[:-1] == (1, 1)
        return row and self._calls == 1 and self._alone

    def tail(self, logits: torch.Tensor, settings: tuple[float, ...]) -> _Tail | None:
        """What the model did to the head's output, None where the head outside of the model is not what it is within.

        Waits for the device.
        """
        if not self.once or self._replaced is None or logits.shape != self._replaced.shape:
            return None
        assert self.hidden is not None
        with torch.set_grad_enabled(not torch.is_inference_mode_enabled()):
            leaf = self.hidden[None, :1].detach()
            again = self._head(leaf if torch.is_inference_mode_enabled() else leaf.requires_grad_(True))
        if again.dtype != self._output.dtype or not (again.requires_grad or torch.is_inference_mode_enabled()):
            return None
        close = 0.02 if again.dtype.itemsize < 4 else 1e-5
        if not torch.allclose(again.detach(), self._output.detach(), rtol=close, atol=close, equal_nan=True):
            return None
        return _tail_of(self._replaced, logits.detach(), settings)

    def score(self, tail: _Tail, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs the head over all positions, some at a time; see :func:`score_tokens`."""
        assert self.hidden is not None
        device = self._output.device
        limit = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
        limit = max(1, limit // (4 * self._output.shape[-1]))
        targets = sent(targets, device)

        def run(hidden: torch.Tensor, rows: slice, chunk: Chunk | None = None) -> tuple[torch.Tensor, torch.Tensor]:
            token = _IN_FLIGHT.set(chunk)
            try:
                return score_tokens(tail(self._head(hidden[None]))[0], targets[rows])
            finally:
                _IN_FLIGHT.reset(token)

        calls: list[tuple[slice, Chunk | None]] = [(rows, None) for rows in self._positions.cuts(limit)]
        if self._watched:
            calls = [(chunk.rows, chunk) for chunk in self._positions.chunks(limit)]
        elif torch.is_grad_enabled() and self.hidden.requires_grad and not self._output.requires_grad:
            logps, weights = _OnePass.apply(self.hidden, run, [rows for rows, _ in calls])
            return logps, weights
        if torch.is_grad_enabled() and self._output.requires_grad:
            # Something in the head is differentiated, or hooks on it want to know what comes back: it is run again.
            run = functools.partial(checkpoint, run, use_reentrant=False)
        scored = [run(self.hidden[rows], rows, chunk) for rows, chunk in calls]
        return torch.cat([logps for logps, _ in scored]), torch.cat([weights for _, weights in scored])


class _OnePass(torch.autograd.Function):
    """A head of which nothing is differentiated: the gradient at its input is formed at once, part by part."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        run: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
        cuts: list[slice],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes (m, features) and what scores a run of them; returns what :func:`score_tokens` does."""
        gradient = torch.empty_like(hidden)
        scored = []
        for rows in cuts:
            with torch.enable_grad():
                leaf = hidden[rows].detach().requires_grad_(True)
                logps, weights = run(leaf, rows)
            gradient[rows] = torch.autograd.grad(logps, leaf, torch.ones_like(logps))[0]
            scored.append((logps.detach(), weights))
            del leaf, logps
        ctx.save_for_backward(gradient)
        weights = torch.cat([weights for _, weights in scored])
        ctx.mark_non_differentiable(weights)
        return torch.cat([logps for logps, _ in scored]), weights

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Each position has its own log-probability, so its gradient is that times what comes back."""
        (own,) = ctx.saved_tensors
        return (own * gradient[:, None].to(own.device)).to(own.dtype), None, None
