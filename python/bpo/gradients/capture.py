"""Per-sample gradients of a model, exactly, from one forward and one backward over a batch.

The log-probabilities of the responses of a batch are summed and differentiated once. Hooks on the layers catch each
layer's inputs and output gradients, from which the gradient of every sample follows, since samples do not mix. Where
the samples cannot be told apart inside a module (experts that regroup tokens) or a module has no closed form (norms),
the module alone is run again, one sample at a time. Parameters are frozen and no ``.grad`` is ever allocated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bpo.policy.autograd import begin_graph, differentiate, graph_from_embeddings
from bpo.policy.checks import UnsupportedModelError
from bpo.policy.head import Positions, chunk_in_flight
from bpo.policy.logprobs import CompletionLogps, predicting_positions
from bpo.policy.state import Attributes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.gradients.layers import Consumer, Layer, Slot
    from bpo.policy.head import Chunk
    from bpo.policy.logprobs import Forward


# Per-sample gradients of one parameter are formed for so many samples at a time that they stay below this.
_GRADIENT_BUFFER_BYTES = 256 << 20


@dataclasses.dataclass
class Replay:
    """A module that is run again for one sample at a time, from its recorded inputs and output gradient.

    Attributes:
        name: Of the module.
        module: The module.
        rules: How each tensor among its inputs is cut to a sample: by its first dimension as ``"samples"`` or
            ``"tokens"`` (samples and positions as one), or not (``"shared"``).
        output: Which of the floating-point tensors of its output the gradient comes back through.
        output_rule: How that one is cut to a sample.
        parameters: Name of a parameter within the module to its slot: differentiated by autograd.
        layers: Layers within the module: they give their gradients as elsewhere, but see one sample only.
        vectorized: Whether to try to run it for all samples in one go, each with its own parameters, by ``vmap``.
    """

    name: str
    module: nn.Module
    rules: list[str]
    output: int
    output_rule: str
    parameters: dict[str, Slot] = dataclasses.field(default_factory=dict)
    layers: list[Layer] = dataclasses.field(default_factory=list)
    vectorized: bool = True


@dataclasses.dataclass
class Plan:
    """How the gradients of everything that is asked for are caught.

    Attributes:
        layers: Layers with a closed form.
        replays: Modules that are run again, a sample at a time, by name.
        whole: Parameters, by name, for which the whole model is run again, a sample at a time.
    """

    layers: list[Layer] = dataclasses.field(default_factory=list)
    replays: dict[str, Replay] = dataclasses.field(default_factory=dict)
    whole: dict[str, Slot] = dataclasses.field(default_factory=dict)

    def all_layers(self) -> Iterator[tuple[Layer, Replay | None]]:
        """Yields each layer with the replay that it is caught in, None for the pass over the batch."""
        yield from ((layer, None) for layer in self.layers)
        for replay in self.replays.values():
            yield from ((layer, replay) for layer in replay.layers)


def sum_gradients(forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], consume: Consumer) -> CompletionLogps:
    """Runs one forward and one backward over a batch and hands every parameter's per-sample gradients to ``consume``.

    Args:
        forward: A model with frozen parameters (see :func:`bpo.policy.state.inference_state`) and responses. Where it
            has gradient checkpointing enabled, its layers keep their inputs only and are computed again on the way
            back.
        plan: Which gradients to form, and how.
        rows: (n,) which of the responses form the batch.
        consume: Receives offset, (n', size) gradients and the slice of the batch they belong to; the gradients of one
            coordinate may come in several parts, which add up.

    Returns:
        The log-probabilities of the responses, without gradient.
    """
    batch = _Batch(forward, rows, consume)
    with contextlib.ExitStack() as stack:
        beginnings = stack.enter_context(graph_from_embeddings(forward.model))
        for layer, inside in plan.all_layers():
            handle = layer.module.register_forward_hook(batch.layer_hook(layer, inside), with_kwargs=True)
            stack.callback(handle.remove)
        for replay in plan.replays.values():
            handle = replay.module.register_forward_hook(batch.replay_hook(replay), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_checkpointed(forward.model))
        result = forward.logps(rows)
        batch.on_the_way = False
        backward(result.logps, [*beginnings, *batch.beginnings])
    if plan.whole:
        for index in range(len(rows)):
            own = slice(index, index + 1)

            def keep(name: str, gradient: torch.Tensor, own: slice = own) -> None:
                consume(plan.whole[name].offset, plan.whole[name].keep(gradient), own)

            with _checkpointed(forward.model):
                differentiate(forward, list(plan.whole), rows[own], keep)
    return CompletionLogps(result.logps.detach(), result.log_weights)


def backward(logps: torch.Tensor, beginnings: list[torch.Tensor]) -> None:
    """Differentiates the sum of log-probabilities for what hooks catch on the way.

    Only as far as the beginnings of graphs: a tensor of the user's own that requires a gradient gets none.
    """
    if not beginnings or not logps.requires_grad:
        raise UnsupportedModelError("The log-probabilities of this model cannot be differentiated: it has no graph.")
    torch.autograd.backward(logps.sum(), inputs=beginnings)
    for tensor in beginnings:
        tensor.grad = None


class _Batch:
    """The batch in flight: tells its samples apart in what the hooks see."""

    def __init__(self, forward: Forward, rows: npt.NDArray[np.int64], consume: Consumer) -> None:
        self.forward = forward
        self.consume = consume
        self.size = len(rows)
        self.width = int(forward.tokenized.lengths[rows].max())
        self.every = Positions.of(predicting_positions(forward.tokenized, rows)).all()
        self.beginnings: list[torch.Tensor] = []
        self.on_the_way = True  # afterwards, hooks see what gradient checkpointing computes again: known already
        self.replay: Replay | None = None  # the module that is being run again …
        self.sample = 0  # … and for which sample

    def layer_hook(self, layer: Layer, inside: Replay | None) -> Callable[..., torch.Tensor | None]:
        """A forward hook that catches what the gradients of a layer need."""

        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor
        ) -> torch.Tensor | None:
            if self.replay is not inside or (inside is None and not self.on_the_way) or not torch.is_grad_enabled():
                return None
            given: torch.Tensor = next(iter((*args, *kwargs.values())))
            if not output.requires_grad:
                if given.requires_grad:
                    raise UnsupportedModelError(
                        f"{layer.name}: {type(layer.module).__name__} gives back nothing to differentiate, so that no "
                        "gradient reaches what lies below it. Pass the model with layers that can be trained through."
                    )
                output = begin_graph(output, self.beginnings)
            chunk = chunk_in_flight() or self.every
            samples = chunk.samples if inside is None else slice(self.sample, self.sample + 1)
            size = samples.stop - samples.start
            x = self._by_sample(given.detach(), size, chunk)
            with self._exactly():
                remembered = None if x is None else layer.remember(x)

            def on_gradient(gradient: torch.Tensor) -> None:
                by_sample = self._by_sample(gradient, size, chunk)
                if x is None or by_sample is None:
                    raise UnsupportedModelError(
                        f"{layer.name}: its input has shape {tuple(given.shape)}, in which {size} samples of "
                        f"{self.width} tokens cannot be told apart, although on two short responses they could. Leave "
                        "it out with SelectConfig.parameters."
                    )
                step = max(1, _GRADIENT_BUFFER_BYTES // (4 * layer.largest))
                for start in range(0, size, step):
                    part = slice(start, min(start + step, size))
                    kept = None if remembered is None else remembered[part]
                    for offset, gradients in layer.gradients(kept, by_sample[part]):  # type: ignore[arg-type]
                        self.consume(offset, gradients, slice(samples.start + part.start, samples.start + part.stop))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _exactly(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of the tensors at hand; entering autocast takes as long as a small product."""
        kind = self.forward.device.type
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()

    def _by_sample(self, tensor: torch.Tensor, size: int, chunk: Chunk) -> torch.Tensor | None:
        """Returns (n, t, features), or (n, t) of token ids, of a tensor that may have samples and positions as one.

        None where samples cannot be told apart. That is no error until a gradient comes: DoRA shows its layers a unit
        matrix, too, to see their weights.
        """
        features = tensor.shape[-1:] if tensor.is_floating_point() else torch.Size()
        if size == 1 or tensor.shape[0] == size:
            return tensor.reshape(size, -1, *features)
        if tensor.shape[:-1] == (size * self.width,):
            return tensor.view(size, self.width, *features)
        if tensor.shape[:-1] == (1, len(chunk.places)):  # the output head sees predicting positions only
            return chunk.by_sample(tensor)
        return None

    def replay_hook(self, replay: Replay) -> Callable[..., Any]:
        """A forward hook that records a call, to run it again for each sample once its output gradient is known."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.replay is not None or not self.on_the_way:
                return None
            tensor = floating_tensors(output)[replay.output]
            if tensor is output:
                output = tensor = begin_graph(output, self.beginnings)
            elif not tensor.requires_grad:
                self.beginnings.append(tensor.requires_grad_(True))
            inputs = map_tensors((args, kwargs), torch.Tensor.detach)

            def on_gradient(gradient: torch.Tensor) -> None:
                leaves = {
                    name: parameter.detach().requires_grad_(True)
                    for name, parameter in replay.module.named_parameters(remove_duplicate=False)
                    if name in replay.parameters
                }
                fits = 4 * self.size * sum(leaf.numel() for leaf in leaves.values()) <= _GRADIENT_BUFFER_BYTES
                vectorized = replay.vectorized and not replay.layers and fits
                if not vectorized or not self._run_vectorized(replay, leaves, inputs, gradient):
                    for index in range(self.size):
                        self._run_again(replay, leaves, inputs, gradient, index)

            tensor.register_hook(on_gradient)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _run_vectorized(
        self, replay: Replay, leaves: dict[str, torch.Tensor], inputs: Any, gradient: torch.Tensor
    ) -> bool:
        """Runs a module again for all samples in one go; False, once and for all, where ``vmap`` cannot."""
        given: list[torch.Tensor] = []
        map_tensors(inputs, given.append)
        if len(given) != len(replay.rules):  # such as no mask for a batch without padding
            return False
        stacked = [self._stacked(tensor, rule) for tensor, rule in zip(given, replay.rules, strict=True)]
        dims = tuple(None if rule == "shared" else 0 for rule in replay.rules)

        def differentiated(own: torch.Tensor, *cut: torch.Tensor) -> dict[str, torch.Tensor]:
            tensors = iter(cut)
            args, kwargs = map_tensors(inputs, lambda _: next(tensors))

            def run(leaves: dict[str, torch.Tensor]) -> torch.Tensor:
                outputs = torch.func.functional_call(replay.module, leaves, args, kwargs)
                return floating_tensors(outputs)[replay.output]

            output, backward, *_ = torch.func.vjp(run, leaves)
            found: dict[str, torch.Tensor] = backward(own.reshape(output.shape))[0]
            return found

        before = Attributes(replay.module.modules())
        self.replay = replay
        try:
            with self.forward.autocasting():
                own = self._stacked(gradient, replay.output_rule)
                gradients = torch.func.vmap(differentiated, in_dims=(0, *dims))(own, *stacked)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # what a module does may depend on its numbers, or have no form for several samples
            replay.vectorized = False
        finally:
            self.replay = None
            if before.restore():  # a module that keeps something for later would keep what is for vmap alone
                replay.vectorized = False
        if not replay.vectorized:
            return False
        for name, found in gradients.items():
            slot = replay.parameters[name]
            self.consume(slot.offset, slot.keep_each(found), slice(0, self.size))
        return True

    def _stacked(self, tensor: torch.Tensor, rule: str) -> torch.Tensor:
        """Returns a tensor with the samples as a dimension of their own in front, each as it is cut elsewhere."""
        if rule == "samples":
            return tensor[:, None]
        if rule == "tokens":
            return tensor.reshape(self.size, self.width, *tensor.shape[1:])
        return tensor

    def _run_again(
        self, replay: Replay, leaves: dict[str, torch.Tensor], inputs: Any, gradient: torch.Tensor, index: int
    ) -> None:
        rules = iter(replay.rules)
        args, kwargs = map_tensors(inputs, lambda tensor: self._cut(tensor, next(rules), index))
        targets = list(leaves.values())
        if replay.layers:
            # Layers give their gradients on the way from the output to the inputs.
            args, kwargs = map_tensors((args, kwargs), _as_leaf)
            map_tensors((args, kwargs), lambda tensor: targets.append(tensor) if tensor.requires_grad else None)
        self.replay, self.sample = replay, index
        begun = len(self.beginnings)
        try:
            with torch.enable_grad(), self.forward.autocasting():
                outputs = torch.func.functional_call(replay.module, leaves, args, kwargs)
            targets += self.beginnings[begun:]
            del self.beginnings[begun:]
            output = floating_tensors(outputs)[replay.output]
            own = self._cut(gradient, replay.output_rule, index)
            gradients = torch.autograd.grad(output, targets, own.reshape(output.shape), allow_unused=True)
        finally:
            self.replay = None
        for name, found in zip(leaves, gradients, strict=False):
            if found is not None:
                slot = replay.parameters[name]
                self.consume(slot.offset, slot.keep(found), slice(index, index + 1))

    def _cut(self, tensor: torch.Tensor, rule: str, index: int) -> torch.Tensor:
        if rule == "samples":
            return tensor[index : index + 1]
        if rule == "tokens":
            return tensor[index * self.width : (index + 1) * self.width]
        return tensor


@contextlib.contextmanager
def _checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Honours gradient checkpointing where the model has it enabled, also outside training mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    with contextlib.ExitStack() as stack:
        for layer in list(model.modules()):
            if isinstance(layer, GradientCheckpointingLayer) and getattr(layer, "gradient_checkpointing", False):
                # What others put there (accelerate's hooks, patches) is what runs, and what stands there afterwards.
                stack.callback(_put_back, layer, "forward", layer.__dict__.get("forward"))
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        yield


def _put_back(module: nn.Module, name: str, attribute: Any) -> None:
    """Has an instance attribute again as it was, None for none."""
    if attribute is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = attribute


def _as_leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(True) if tensor.is_floating_point() else tensor


def floating_tensors(value: Any) -> list[torch.Tensor]:
    """Returns the floating-point tensors of nested tuples, lists and mappings, in order."""
    found: list[torch.Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) if tensor.is_floating_point() else None)
    return found


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """Applies a function to every tensor of nested tuples, lists and mappings, in order; leaves the rest alone."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, function) for item in value)
    return value
