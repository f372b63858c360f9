"""How each gradient of a model can be caught: probe, plan, check on two short responses, and escalate where need be."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bpo.gradients.capture import Plan, Replay, floating_tensors, map_tensors
from bpo.policy.checks import UnsupportedModelError
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

# Largest relative error of the self-check, by the precision of the model's arithmetic.
_SELF_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}

# The self-check looks at so many coordinates at most (256 MB a response), of every kind of parameter at least one.
_CHECKED_COORDINATES = 1 << 26


def find_plan(features: Features, forward: Forward) -> Plan:
    """Finds out, on two short responses, how every coordinate can be caught, and checks that it is right.

    Args:
        features: The coordinates.
        forward: The model they are of, frozen, and the responses.

    Returns:
        The plan.

    Raises:
        UnsupportedModelError: The model's output for a response depends on the other responses of its batch, or what
            is caught of a batch is not that of its responses alone.
    """
    rows = _probe_rows(forward.tokenized)
    features.learn_shapes(forward, rows)
    if features.layers or features.loose:
        plan, errors = _gradient_plan(features, forward, rows)
    else:  # embeddings, which come without a backward
        plan = Plan()
        errors = _self_check(features, forward, plan, rows)
    if errors:
        raise UnsupportedModelError(features.refusal(errors))
    return plan


def _gradient_plan(features: Features, forward: Forward, rows: npt.NDArray[np.int64]) -> tuple[Plan, dict[str, float]]:
    """Plans, and escalates while the self-check finds errors; returns the errors that are left, too."""
    model = forward.model
    calls = _probe(forward, rows)
    plan = _first_plan(features, model, calls)
    errors = _self_check(features, forward, plan, rows)
    # A module around may use the parameters of a layer without calling it; else only the whole model will do.
    if errors:
        _to_modules(plan, features.slots, errors, model, calls)
        errors = _self_check(features, forward, plan, rows)
    if errors:
        _to_whole_model(plan, features.slots, errors)
        errors = _self_check(features, forward, plan, rows)
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
    """What a module was given and gave back on the way of a gradient, as far as samples are concerned."""

    rules: list[str]
    output: int
    output_rule: str
    head: bool

    @property
    def separable(self) -> bool:
        """Whether the module can be run again for one sample."""
        return self.output_rule != "shared" and self.rules[:1] not in ([], ["shared"])


def _probe(forward: Forward, rows: npt.NDArray[np.int64]) -> dict[str, _Call]:
    """Runs two responses through the model and notes how every module that has a part in the gradient sees them."""
    size, width = len(rows), int(forward.tokenized.lengths[rows].max())
    n_predicting = int(predicting_positions(forward.tokenized, rows).sum())
    calls: dict[str, _Call] = {}

    def rule(tensor: torch.Tensor) -> str:
        first = tensor.shape[0] if tensor.dim() else 0
        return {size: "samples", size * width: "tokens"}.get(first, "shared")

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rules: list[str] = []
            map_tensors((args, kwargs), lambda given: rules.append(rule(given)))
            shape = next((given.shape for given in args if isinstance(given, torch.Tensor)), torch.Size())
            head = shape[:-1] == (1, n_predicting)

            def note(call: _Call, _: torch.Tensor) -> None:
                if calls.setdefault(name, call) != call:
                    calls[name] = _Call([], 0, "shared", head=False)  # called in ways that cannot be told apart

            for index, tensor in enumerate(floating_tensors(output)):
                if not tensor.requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(True)
                if tensor.requires_grad:
                    call = _Call(rules, index, rule(tensor), head)
                    tensor.register_hook(functools.partial(note, call))  # type: ignore[no-untyped-call]

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in forward.model.named_modules()
        if name
    ]
    try:
        with torch.enable_grad():
            forward.logps(rows).logps.sum().backward()  # type: ignore[no-untyped-call]
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
    for layer in _take_layers(plan, wrong, slots):
        _leave_to_autograd(plan, _replay_around(_parent_of(layer.name), model, calls, plan.replays), _slots_of(layer))
    _merge_replays(plan.replays)


def _to_whole_model(plan: Plan, slots: dict[str, Slot], wrong: Collection[str]) -> None:
    """Takes parameters by autograd from the whole model, in place of all else."""
    offsets = {slots[name].offset for name in wrong}
    _take_layers(plan, wrong, slots)
    for name, replay in list(plan.replays.items()):
        replay.parameters = {n: slot for n, slot in replay.parameters.items() if slot.offset not in offsets}
        if not replay.parameters and not replay.layers:
            del plan.replays[name]
    plan.whole.update({name: slots[name] for name in wrong})
    warn(
        f"The gradients of {len(wrong)} parameters, such as {next(iter(wrong))}, take a forward and a backward of "
        "the whole model for each response. Leave them out with SelectConfig.parameters if that is too slow."
    )


def _take_layers(plan: Plan, names: Collection[str], slots: dict[str, Slot]) -> list[Layer]:
    """Takes the layers that give the gradients of some parameters out of the plan."""
    offsets = {slots[name].offset for name in names}
    taken: list[Layer] = []
    for layers in (plan.layers, *(replay.layers for replay in plan.replays.values())):
        found = [layer for layer in layers if any(slot.offset in offsets for slot in _slots_of(layer).values())]
        taken += found
        layers[:] = [layer for layer in layers if layer not in found]
    return taken


# Self-check: in a batch of two as alone.


def _self_check(features: Features, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64]) -> dict[str, float]:
    """Returns the parameters whose gradients in a batch are not those of each response alone, and the errors."""
    names = _checked(features.slots)
    tolerance = _SELF_CHECK_TOLERANCE.get(forward.autocast or forward.model.dtype, 0.1)
    together, logps = _caught(features, forward, plan, rows, names)
    errors: dict[str, float] = {}
    for index in range(len(rows)):
        alone, logp = _alone(features, forward, plan, rows[index : index + 1], names)
        if not abs(logps[index] - logp) <= tolerance * abs(logp) and np.isfinite(logp):
            raise UnsupportedModelError(
                f"log π of a response is {logps[index]:.6g} in a batch of two, but {logp:.6g} alone: in this model "
                "responses of one batch act on one another, so no gradient of a single response exists."
            )
        norm = sum(float(gradient.square().sum()) for gradient in alone.values()) ** 0.5
        if not (np.isfinite(norm) and norm > 0):
            continue  # NaN and zero gradients are flagged in the store and named later
        for name, gradient in alone.items():
            error = float((together[name][index] - gradient[0]).norm()) / norm
            if not error <= tolerance:
                errors[name] = max(error, errors.get(name, 0.0))
    return errors


def _checked(slots: dict[str, Slot]) -> list[str]:
    """The parameters that the self-check looks at: one of every kind, then the others while there is room."""
    kinds: dict[str, str] = {}
    for name in slots:
        kinds.setdefault(kind_of(name), name)
    names, room = [], _CHECKED_COORDINATES
    for name in dict.fromkeys([*kinds.values(), *slots]):
        if slots[name].size <= room:
            names.append(name)
            room -= slots[name].size
    return names


def _caught(
    features: Features, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], names: list[str]
) -> tuple[dict[str, torch.Tensor], npt.NDArray[np.float32]]:
    """The gradients of some parameters, (n, size) each, and the log-probabilities, as the plan catches them."""
    slots = {name: features.slots[name] for name in names}
    by_offset = {slot.offset: torch.zeros(len(rows), slot.size) for slot in slots.values()}

    def keep(offset: int, gradients: torch.Tensor, samples: slice) -> None:
        if offset in by_offset:
            by_offset[offset][samples] += gradients.cpu()

    logps = features.catch(forward, plan, rows, keep).logps
    return {name: by_offset[slot.offset] for name, slot in slots.items()}, logps.cpu().numpy()


def _alone(
    features: Features, forward: Forward, plan: Plan, row: npt.NDArray[np.int64], names: list[str]
) -> tuple[dict[str, torch.Tensor], float]:
    """The same of a single response, without the plan where there is such a way."""
    exact = features.exact(forward, row, names)
    if exact is not None:
        return exact
    gradients, logps = _caught(features, forward, plan, row, names)
    return gradients, float(logps[0])


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
