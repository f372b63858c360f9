"""How each gradient of a model can be caught: probe, plan, check on two short responses, and escalate where need be."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bpo.gradients.capture import Plan, Replay, backward, floating_tensors, map_tensors
from bpo.policy.causal import sees_ahead
from bpo.policy.checks import UnsupportedModelError, base_of
from bpo.policy.logprobs import predicting_positions
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.data.tokens import TokenizedResponses
    from bpo.gradients.features import Features
    from bpo.gradients.layers import Layer, Slot
    from bpo.policy.logprobs import Forward

# Two responses of at least so many tokens: with fewer, positions could be mistaken for samples.
_PROBE_TOKENS = 4

# Largest error of a parameter's gradient in the self-check, relative to itself, by the precision of the arithmetic.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}

# Largest relative difference of log π of a response in a batch and alone; and of a gradient, by that of the whole, that
# autograd cannot tell.
_COARSE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

# What autograd itself says otherwise in a batch than of its responses alone may show so many times over.
_NOISE = 8.0

# Numbers in the fingerprint of a gradient, and signs that are drawn once and used over and over.
_BUCKETS = 64
_SIGNS = 1 << 16


def find_plan(features: Features, forward: Forward) -> Plan:
    """Finds out, on two short responses, how every coordinate can be caught, and checks that it is right.

    Every parameter is checked by itself, against autograd over the batch and over each response alone, so that none is
    lost for being small beside the others.

    Args:
        features: The coordinates.
        forward: The model they are of, frozen, and the responses.

    Returns:
        The plan.

    Raises:
        UnsupportedModelError: A model that cannot be run on tokens and a mask alone, in which a token sees those after
            it, or whose output for a response depends on the other responses of its batch; or what is caught of a
            batch is not that of its responses alone.
    """
    rows = _probe_rows(forward.tokenized)
    with _named(forward.model):
        if sees_ahead(forward, rows[-1]):
            raise UnsupportedModelError(_sees_ahead(forward.model))
        features.learn_shapes(forward, rows)
        truth = _Truth.of(features.slots, forward, rows)
        if features.layers or features.loose:
            plan, errors = _gradient_plan(features, forward, rows, truth)
        else:  # embeddings, which come without a backward
            plan = Plan()
            errors = _self_check(features, forward, plan, rows, truth)
    if errors:
        raise UnsupportedModelError(features.refusal(errors))
    return plan


@contextlib.contextmanager
def _named(model: PreTrainedModel) -> Iterator[None]:
    """Says of which model an error is that comes out of its code."""
    try:
        yield
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run and differentiated on two short responses, from token ids and an "
            f"attention mask alone: {type(error).__name__}: {error}"
        ) from error


def _sees_ahead(model: PreTrainedModel) -> str:
    base = base_of(model)
    encoder = getattr(base.config, "is_decoder", None) is False
    advice = "Set is_decoder=True in its configuration, if it was trained so" if encoder else "Pass a causal model"
    return (
        f"In {type(base).__name__} a token sees those after it, so log π of a response would be read off the response "
        f"itself. {advice}."
    )


def _gradient_plan(
    features: Features, forward: Forward, rows: npt.NDArray[np.int64], truth: _Truth
) -> tuple[Plan, dict[str, float]]:
    """Plans, and escalates while the self-check finds errors; returns the errors that are left, too."""
    model = forward.model
    calls = _probe(forward, rows)
    plan = _first_plan(features, model, calls)
    errors = _self_check(features, forward, plan, rows, truth)
    # A module around may use the parameters of a layer without calling it; else only the whole model will do.
    if errors:
        _to_modules(plan, features.slots, errors, model, calls)
        errors = _self_check(features, forward, plan, rows, truth)
    if errors and errors.keys() <= truth.batch.keys():
        _to_whole_model(plan, features.slots, errors)
        errors = _self_check(features, forward, plan, rows, truth)
    return plan, errors


# Probe: how modules see the samples of a batch.


def _probe_rows(tokenized: TokenizedResponses) -> npt.NDArray[np.int64]:
    """Two short responses, of different length where there are such, so that padding has a part."""
    order = np.argsort(tokenized.lengths, kind="stable")
    eligible = order[tokenized.lengths[order] >= _PROBE_TOKENS]
    if len(eligible) < 2:
        return order[-2:]
    longer = eligible[tokenized.lengths[eligible] > tokenized.lengths[eligible[0]]]
    return np.array([eligible[0], longer[0] if len(longer) else eligible[1]])


@dataclasses.dataclass
class _Call:
    """What a module was given and gave back on the way of a gradient, as far as samples are concerned.

    Attributes:
        rules: How each tensor that it was given holds the samples, see :class:`Replay`.
        output: Which of the floating-point tensors that it gave back the gradient came through.
        output_rule: How that one holds the samples.
        head: Whether it saw the predicting positions only.
        plain: Whether it gave back a tensor and nothing else.
    """

    rules: list[str]
    output: int
    output_rule: str
    head: bool
    plain: bool

    @property
    def separable(self) -> bool:
        """Whether the module can be run again for one sample."""
        return self.output_rule != "shared" and self.rules[:1] not in ([], ["shared"])


def _probe(forward: Forward, rows: npt.NDArray[np.int64]) -> dict[str, _Call]:
    """Runs two responses through the model and notes how every module that has a part in the gradient sees them."""
    size, width = len(rows), int(forward.tokenized.lengths[rows].max())
    n_predicting = int(predicting_positions(forward.tokenized, rows).sum())
    calls: dict[str, _Call] = {}
    leaves: list[torch.Tensor] = []

    def rule(tensor: torch.Tensor) -> str:
        first = tensor.shape[0] if tensor.dim() else 0
        return {size: "samples", size * width: "tokens"}.get(first, "shared")

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            rules: list[str] = []
            map_tensors((args, kwargs), lambda given: rules.append(rule(given)))
            shape = next((given.shape for given in args if isinstance(given, torch.Tensor)), torch.Size())
            head = shape[:-1] == (1, n_predicting)

            def note(call: _Call, _: torch.Tensor) -> None:
                if calls.setdefault(name, call) != call:
                    # Called in ways that cannot be told apart.
                    calls[name] = _Call([], 0, "shared", head=False, plain=False)

            if isinstance(output, torch.Tensor) and output.is_leaf and output.is_floating_point():
                # No leaf goes on to the model, which may change it in place, nor one of the user's into the graph.
                leaves.append(output.detach().requires_grad_(True))
                output = leaves[-1].clone()
            for index, tensor in enumerate(floating_tensors(output)):
                if not tensor.requires_grad and tensor.is_leaf:
                    leaves.append(tensor.requires_grad_(True))
                if tensor.requires_grad:
                    call = _Call(rules, index, rule(tensor), head, isinstance(output, torch.Tensor))
                    tensor.register_hook(functools.partial(note, call))  # type: ignore[no-untyped-call]
            return output

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in forward.model.named_modules()
        if name
    ]
    try:
        with torch.enable_grad():
            backward(forward.logps(rows).logps, leaves)
    finally:
        for handle in handles:
            handle.remove()
    return calls


# Plan: the closed form of a layer, else the nearest module that can be run again, else the whole model.


def _first_plan(features: Features, model: PreTrainedModel, calls: dict[str, _Call]) -> Plan:
    plan = Plan()
    uncalled: list[Layer | str] = []
    for layer in features.layers:
        call = calls.get(layer.name)
        if call is None:
            uncalled.append(layer)
        elif not call.plain:  # no linear layer, though of such a class
            _leave_to_autograd(plan, _replay_around(layer.name, model, calls, plan.replays), _slots_of(layer))
        elif call.separable or call.head:
            plan.layers.append(layer)
        elif (replay := _replay_around(_parent_of(layer.name), model, calls, plan.replays)) is not None:
            replay.layers.append(layer)
        else:
            plan.whole.update(_slots_of(layer))
    for name, slot in features.loose.items():
        if _parent_of(name) in calls:
            _leave_to_autograd(plan, _replay_around(_parent_of(name), model, calls, plan.replays), {name: slot})
        else:
            uncalled.append(name)
    # What had no part in two short responses: an expert that no token chose, or a parameter that a module around its
    # owner uses. It joins the module that is run again anyway; other layers wait for longer responses.
    for item in uncalled:
        name = item if isinstance(item, str) else item.name
        around = next((replay for prefix, replay in plan.replays.items() if name.startswith(f"{prefix}.")), None)
        if not isinstance(item, str):
            (plan.layers if around is None else around.layers).append(item)
            continue
        around = around or _replay_around(_parent_of(_parent_of(name)), model, calls, plan.replays)
        _leave_to_autograd(plan, around, {name: features.loose[name]})
    _merge_replays(plan.replays)
    _only_whole(plan, features.slots, {slot.offset for slot in plan.whole.values()})
    return plan


def _leave_to_autograd(plan: Plan, replay: Replay | None, slots: dict[str, Slot]) -> None:
    """Has parameters differentiated by autograd, in a module that is run again, or in the whole model."""
    for name, slot in slots.items():
        if replay is None:
            plan.whole[name] = slot
        else:
            replay.parameters[name[len(replay.name) + 1 :]] = slot


def _replay_around(
    name: str, model: PreTrainedModel, calls: dict[str, _Call], replays: dict[str, Replay]
) -> Replay | None:
    """The nearest module around a name, itself included, that can be run again for one sample."""
    while name:
        call = calls.get(name)
        if call is not None and call.separable:
            return replays.setdefault(
                name, Replay(name, model.get_submodule(name), call.rules, call.output, call.output_rule)
            )
        name = _parent_of(name)
    return None


def _merge_replays(replays: dict[str, Replay]) -> None:
    """Takes replays within others into these: each module is run again once."""
    for name in sorted(replays, key=len):
        outer = next((replay for prefix, replay in replays.items() if name.startswith(f"{prefix}.")), None)
        if outer is not None:
            inner = replays.pop(name)
            within = name[len(outer.name) + 1 :]
            outer.parameters.update({f"{within}.{key}": slot for key, slot in inner.parameters.items()})
            outer.layers.extend(inner.layers)


# Escalate: what a layer does not give right is had in a slower way.


def _to_modules(
    plan: Plan, slots: dict[str, Slot], wrong: Collection[str], model: PreTrainedModel, calls: dict[str, _Call]
) -> None:
    """Takes parameters by autograd from the nearest module that can be run again, in place of their layer."""
    for layer in _take_layers(plan, {slots[name].offset for name in wrong}):
        _leave_to_autograd(plan, _replay_around(_parent_of(layer.name), model, calls, plan.replays), _slots_of(layer))
    _merge_replays(plan.replays)
    _only_whole(plan, slots, {slot.offset for slot in plan.whole.values()})


def _to_whole_model(plan: Plan, slots: dict[str, Slot], wrong: Collection[str]) -> None:
    """Takes parameters by autograd from the whole model, in place of all else."""
    _only_whole(plan, slots, {slots[name].offset for name in wrong})
    warn(
        f"The gradients of {len(wrong)} parameters, such as {next(iter(wrong))}, take a forward and a backward of "
        "the whole model for each response. Leave them out with SelectConfig.parameters if that is too slow."
    )


def _only_whole(plan: Plan, slots: dict[str, Slot], offsets: set[int]) -> None:
    """Leaves the parameters at some coordinates to the whole model alone, with what else their layers give."""
    while layers := _take_layers(plan, offsets):
        offsets = offsets.union(slot.offset for layer in layers for slot in _slots_of(layer).values())
    for name, replay in list(plan.replays.items()):
        replay.parameters = {key: slot for key, slot in replay.parameters.items() if slot.offset not in offsets}
        if not replay.parameters and not replay.layers:
            del plan.replays[name]
    plan.whole = {key: slot for key, slot in plan.whole.items() if slot.offset not in offsets}
    plan.whole.update((name, slot) for name, slot in slots.items() if slot.offset in offsets)


def _take_layers(plan: Plan, offsets: Collection[int]) -> list[Layer]:
    """Takes the layers that give the gradients at some coordinates out of the plan."""
    taken: list[Layer] = []
    for layers in (plan.layers, *(replay.layers for replay in plan.replays.values())):
        found = [layer for layer in layers if any(slot.offset in offsets for slot in _slots_of(layer).values())]
        taken += found
        layers[:] = [layer for layer in layers if layer not in found]
    return taken


# Self-check: in a batch of two as by autograd, parameter by parameter, by fingerprints.


@dataclasses.dataclass(frozen=True)
class _Truth:
    """What autograd says of a few responses, in a batch and alone, without hooks and plans.

    Attributes:
        batch: Fingerprint of the gradient of a batch, the sum of its responses', by parameter. Parameters that PyTorch
            does not differentiate, such as quantized ones, are left out.
        alone: Those of each response, likewise.
        logps: log π of each response alone.
        noise: By parameter, how far the batch is from the sum of its responses, the largest of all alike: rounding.
    """

    batch: dict[str, torch.Tensor]
    alone: list[dict[str, torch.Tensor]]
    logps: list[float]
    noise: dict[str, float]

    @classmethod
    def of(cls, slots: dict[str, Slot], forward: Forward, rows: npt.NDArray[np.int64]) -> _Truth:
        """Runs the responses together and each alone."""
        parameters = dict(forward.model.named_parameters())
        known = {name: slot for name, slot in slots.items() if _differentiable(parameters.get(name))}
        batch, _ = _by_autograd(forward, known, rows)
        alone, logps = [], []
        for index in range(len(rows)):
            found, logp = _by_autograd(forward, known, rows[index : index + 1])
            alone.append(found)
            logps.append(logp)
        largest: dict[str, float] = {}
        for name, gradient in batch.items():
            far = float((gradient - sum(found[name] for found in alone)).norm())
            largest[kind_of(name)] = max(far, largest.get(kind_of(name), 0.0))
        return cls(batch, alone, logps, {name: largest[kind_of(name)] for name in batch})


def _differentiable(parameter: torch.Tensor | None) -> bool:
    if parameter is None or parameter.is_meta:
        return False
    return type(parameter.data) is torch.Tensor and parameter.dtype in _TOLERANCE


def _by_autograd(
    forward: Forward, slots: dict[str, Slot], rows: npt.NDArray[np.int64]
) -> tuple[dict[str, torch.Tensor], float]:
    """Fingerprints of the gradients of some parameters over a batch, one gradient in memory at a time; and log π."""
    found = {name: torch.zeros(_BUCKETS) for name in slots}
    parameters = {name: forward.model.get_parameter(name) for name in slots}
    before = {name: parameter.grad for name, parameter in parameters.items()}

    def keep(name: str, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        found[name] = _fingerprint(slots[name].keep(parameter.grad))[0]
        parameter.grad = None

    handles = []
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(functools.partial(keep, name)))
        with torch.enable_grad():
            logp = forward.logps(rows).logps.sum()
            if logp.requires_grad and parameters:
                torch.autograd.backward(logp, inputs=[*parameters.values()])
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = before[name]
    return found, float(logp.detach())


def _self_check(
    features: Features, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], truth: _Truth
) -> dict[str, float]:
    """Returns the parameters whose gradients in a batch are not those of each response alone, and the errors."""
    precision = forward.autocast or forward.model.dtype
    tolerance, coarse = _TOLERANCE.get(precision, 0.05), _COARSE_TOLERANCE.get(precision, 0.1)
    caught, logps = _caught(features, forward, plan, rows)
    alone = truth.alone
    if len(truth.batch) < len(features.slots):  # by the same way, but alone, for want of another
        found = [_caught(features, forward, plan, rows[index : index + 1])[0] for index in range(len(rows))]
        alone = [{**{n: g[0] for n, g in own.items()}, **known} for own, known in zip(found, truth.alone, strict=True)]
    errors: dict[str, float] = {}

    def check(name: str, found: torch.Tensor, wanted: torch.Tensor, floor: float) -> None:
        norm, error = float(wanted.norm()), float((found - wanted).norm())
        if not error <= tolerance * norm + floor:
            errors[name] = max(error / norm if norm > 0 else float("inf"), errors.get(name, 0.0))

    for index, wanted in enumerate(alone):
        _check_logps(float(logps[index]), truth.logps[index], coarse)
        whole = sum(float(gradient.square().sum()) for gradient in wanted.values()) ** 0.5
        if not (np.isfinite(whole) and whole > 0):
            return {}  # NaN and zero gradients are flagged in the store and named later
        for name, gradient in wanted.items():
            floor = _NOISE * truth.noise[name] if name in truth.noise else coarse * whole
            check(name, caught[name][index], gradient, floor + torch.finfo(torch.float32).eps * whole)
    # In one batch the arithmetic is the same up to the layer, so its gradient is, too: no noise hides what it lacks.
    same = {slot.offset for layer in plan.layers for slot in _slots_of(layer).values()}
    same -= {slot.offset for replay in plan.replays.values() for slot in replay.parameters.values()}
    for name, gradient in truth.batch.items():
        found = caught[name].sum(dim=0)
        if features.slots[name].offset in same or not found.any():
            check(name, found, gradient, torch.finfo(torch.float32).eps * whole)
    return errors


def _check_logps(together: float, alone: float, tolerance: float) -> None:
    if not abs(together - alone) <= tolerance * abs(alone) and np.isfinite(alone):
        raise UnsupportedModelError(
            f"log π of a response is {together:.6g} in a batch of two, but {alone:.6g} alone: in this model responses "
            "of one batch act on one another, so no gradient of a single response exists."
        )


def _caught(
    features: Features, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64]
) -> tuple[dict[str, torch.Tensor], npt.NDArray[np.float32]]:
    """Fingerprints of what the plan catches, (n, buckets) for each parameter, and the log-probabilities."""
    by_offset = {slot.offset: torch.zeros(len(rows), _BUCKETS) for slot in features.slots.values()}

    def keep(offset: int, gradients: torch.Tensor, samples: slice) -> None:
        by_offset[offset][samples] += _fingerprint(gradients)

    logps = features.catch(forward, plan, rows, keep).logps
    return {name: by_offset[slot.offset] for name, slot in features.slots.items()}, logps.cpu().numpy()


def _fingerprint(gradients: torch.Tensor) -> torch.Tensor:
    """Takes (n, size) gradients; returns (n, buckets), on the CPU: linear, and as long as they are but for some 10 %.

    Each number has a random sign and one of the buckets, in which it is added up (a count sketch, whose signs are the
    product of two, so that few are drawn).
    """
    n, size = gradients.shape
    within, across = _signs(-(-size // _SIGNS))
    total = torch.zeros(n, _BUCKETS, device=gradients.device)
    for block, part in enumerate(gradients.split(_SIGNS, dim=1)):
        signed = part.float() * within[: part.shape[1]].to(part.device)
        signed = nn.functional.pad(signed, (0, -part.shape[1] % _BUCKETS))
        total += signed.view(n, -1, _BUCKETS).sum(dim=1) * across[block].to(part.device)
    return total.cpu()


@functools.lru_cache(maxsize=4)
def _signs(blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ±1 for the numbers of a block, and for the buckets of each block."""
    draw = functools.partial(torch.randint, 0, 2, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return 2.0 * draw((_SIGNS,)) - 1, 2.0 * draw((blocks, _BUCKETS)) - 1


# Names of parameters and modules.


def _slots_of(layer: Layer) -> dict[str, Slot]:
    """Where the gradients of a layer lie, by the name of the parameter."""
    slots = {"weight": layer.weight, "bias": getattr(layer, "bias", None)}
    return {f"{layer.name}.{key}": slot for key, slot in slots.items() if slot is not None}


def kind_of(name: str) -> str:
    """The name of a parameter without the number of its layer."""
    return re.sub(r"\b\d+\b", "*", name)


def _parent_of(name: str) -> str:
    """The name of the module around."""
    return name.rpartition(".")[0]
