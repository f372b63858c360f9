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

from bpo.gradients.capture import Plan, Replay, backward, floating_tensors, map_tensors
from bpo.policy.autograd import begin_graph, check_causal, differentiate, graph_from_embeddings, named_errors
from bpo.policy.checks import UnsupportedModelError, check_one_pass
from bpo.policy.head import chunk_in_flight
from bpo.policy.logprobs import look_anew, predicting_positions, try_without_mask
from bpo.policy.sharding import arithmetic, is_sharded
from bpo.sketching.fingerprint import FINGERPRINT, fingerprint
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

# Of what whole gradients are known to: nothing less is missed.
_EPSILON = torch.finfo(torch.float32).eps


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
        UnsupportedModelError: A model that tokens and a mask do not run, in which a token sees those after it or
            responses act on one another; or what is caught of a batch is not that of its responses alone.
    """
    rows = _probe_rows(forward.tokenized)
    with named_errors(forward.model):
        look_anew(forward.model)
        try_without_mask(forward, rows)
        features.learn_shapes(forward, rows)
        truth = _Truth.of(features.slots, forward, rows)
        if features.layers or features.loose:
            check_causal(forward, rows[-1])
            plan, errors = _gradient_plan(features, forward, rows, truth)
        else:  # embeddings, which come without a backward
            plan = Plan()
            errors = _self_check(features, forward, plan, rows, truth)
    if errors:
        raise UnsupportedModelError(features.refusal(errors))
    return plan


def _gradient_plan(
    features: Features, forward: Forward, rows: npt.NDArray[np.int64], truth: _Truth
) -> tuple[Plan, dict[str, float]]:
    """Plans, and escalates while the self-check finds errors; returns the errors that are left, too."""
    calls = _probe(forward, rows)
    plan = _first_plan(features, forward.model, calls, truth)
    check_one_pass(forward.model, [*plan.replays, *plan.whole])
    _leave_what_fails(plan, features, forward, rows)
    errors = _self_check(features, forward, plan, rows, truth)
    # A module around may use the parameters of a layer without calling it; else only the whole model will do.
    if errors:
        check_one_pass(forward.model, errors)
        _to_modules(plan, features.slots, errors, forward.model, calls)
        _leave_what_fails(plan, features, forward, rows)
        errors = _self_check(features, forward, plan, rows, truth)
    if errors and errors.keys() <= truth.batch.keys():
        _only_whole(plan, features.slots, {features.slots[name].offset for name in errors})
        errors = _self_check(features, forward, plan, rows, truth)
    _tell(plan, features, truth)
    return plan, errors


def _tell(plan: Plan, features: Features, truth: _Truth) -> None:
    """Warns of what is slow, and of what is taken to be zero."""
    if plan.whole:
        warn(
            f"The gradients of {len(plan.whole)} parameters, such as {next(iter(plan.whole))}, take a forward and a "
            "backward of the whole model for each response. Leave them out with SelectConfig.parameters if that is too "
            "slow."
        )
    caught = {slot.offset for layer, _ in plan.all_layers() for slot in layer.slots.values()}
    caught.update(slot.offset for replay in plan.replays.values() for slot in replay.parameters.values())
    unused = [name for name in truth.unused if features.slots[name].offset not in caught]
    if unused:
        warn(
            f"{len(unused)} parameters, such as {unused[0]}, have no part in the two responses that were tried: their "
            "gradients are taken to be zero."
        )


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
    beginnings: list[torch.Tensor] = []

    def rule(tensor: torch.Tensor) -> str:
        first = tensor.shape[0] if tensor.dim() else 0
        return {size: "samples", size * width: "tokens"}.get(first, "shared")

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            rules: list[str] = []
            map_tensors((args, kwargs), lambda given: rules.append(rule(given)))
            given = next(iter((*args, *kwargs.values())), None)
            chunk = chunk_in_flight()
            n_seen = n_predicting if chunk is None else len(chunk.places)
            head = isinstance(given, torch.Tensor) and given.shape[:-1] == (1, n_seen)

            def note(call: _Call, _: torch.Tensor) -> None:
                if calls.setdefault(name, call) != call:
                    # Called in ways that cannot be told apart.
                    calls[name] = _Call([], 0, "shared", head=False, plain=False)

            plain = isinstance(output, torch.Tensor)
            if plain and output.is_floating_point():
                output = begin_graph(output, beginnings)
            for index, tensor in enumerate(floating_tensors(output)):
                if not tensor.requires_grad:
                    beginnings.append(tensor.requires_grad_(True))
                tensor.register_hook(functools.partial(note, _Call(rules, index, rule(tensor), head, plain)))  # type: ignore[no-untyped-call]
            return output

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True)
        for name, module in forward.model.named_modules()
        if name
    ]
    try:
        with torch.enable_grad(), graph_from_embeddings(forward.model) as embedded:
            logps = forward.logps(rows).logps
            backward(logps, [*embedded, *beginnings])
    finally:
        for handle in handles:
            handle.remove()
    return calls


# Plan: the closed form of a layer, else the nearest module that can be run again, else the whole model.


def _first_plan(features: Features, model: PreTrainedModel, calls: dict[str, _Call], truth: _Truth) -> Plan:
    plan = Plan()
    uncalled: list[Layer | str] = []
    for layer in features.layers:
        call = calls.get(layer.name)
        if call is None:
            uncalled.append(layer)
        elif not call.plain:  # no linear layer, though of such a class
            _leave_to_autograd(plan, _replay_around(layer.name, model, calls, plan.replays), layer.slots)
        elif call.separable or call.head:
            plan.layers.append(layer)
        elif (replay := _replay_around(_parent_of(layer.name), model, calls, plan.replays)) is not None:
            replay.layers.append(layer)
        else:
            plan.whole.update(layer.slots)
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
    # No time for parts that text does not reach, such as those for images.
    plan.whole = {name: slot for name, slot in plan.whole.items() if name not in truth.unused}
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
    """The nearest module around a name, itself included, that can be run again for one sample.

    One that embeds the tokens is no part of the model but most of it.
    """
    embeddings = model.get_input_embeddings()
    while name:
        module = model.get_submodule(name)
        if module is not embeddings and any(part is embeddings for part in module.modules()):
            return None
        call = calls.get(name)
        if call is not None and call.separable:
            return replays.setdefault(name, Replay(name, module, call.rules, call.output, call.output_rule))
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
        _leave_to_autograd(plan, _replay_around(_parent_of(layer.name), model, calls, plan.replays), layer.slots)
    _merge_replays(plan.replays)
    _only_whole(plan, slots, {slot.offset for slot in plan.whole.values()})


def _leave_what_fails(plan: Plan, features: Features, forward: Forward, rows: npt.NDArray[np.int64]) -> None:
    """Leaves to the whole model what modules have that cannot be run again, such as those that keep a state."""
    if not plan.replays or not _fails(plan, features, forward, rows):
        return
    for name, replay in list(plan.replays.items()):
        if _fails(Plan(replays={name: replay}), features, forward, rows):
            slots = [*replay.parameters.values(), *(s for layer in replay.layers for s in layer.slots.values())]
            _only_whole(plan, features.slots, {slot.offset for slot in slots})


def _fails(plan: Plan, features: Features, forward: Forward, rows: npt.NDArray[np.int64]) -> bool:
    try:
        features.catch(forward, plan, rows, lambda *_: None)
    except (UnsupportedModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception:
        return True
    return False


def _only_whole(plan: Plan, slots: dict[str, Slot], offsets: set[int]) -> None:
    """Leaves the parameters at some coordinates to the whole model alone, with what else their layers give."""
    while layers := _take_layers(plan, offsets):
        offsets = offsets.union(slot.offset for layer in layers for slot in layer.slots.values())
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
        found = [layer for layer in layers if any(slot.offset in offsets for slot in layer.slots.values())]
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
        apart: The same of all together, relative to the batch.
    """

    batch: dict[str, torch.Tensor]
    alone: list[dict[str, torch.Tensor]]
    logps: list[float]
    noise: dict[str, float]
    apart: float

    @property
    def unused(self) -> list[str]:
        """Parameters that have no part in log π."""
        return [name for name in self.batch if not any(found[name].any() for found in (self.batch, *self.alone))]

    @classmethod
    def of(cls, slots: dict[str, Slot], forward: Forward, rows: npt.NDArray[np.int64]) -> _Truth:
        """Runs the responses together and each alone."""
        parameters = dict(forward.model.named_parameters(remove_duplicate=False))
        parameters = {} if is_sharded(forward.model) else parameters  # of which some may be whole at the moment
        known = {name: slot for name, slot in slots.items() if _differentiable(parameters.get(name))}
        batch, _ = _by_autograd(forward, known, rows)
        alone, logps = [], []
        for index in range(len(rows)):
            found, logp = _by_autograd(forward, known, rows[index : index + 1])
            alone.append(found)
            logps.append(logp)
        apart = {name: gradient - sum(found[name] for found in alone) for name, gradient in batch.items()}
        largest: dict[str, float] = {}
        for name, difference in apart.items():
            largest[kind_of(name)] = max(float(difference.norm()), largest.get(kind_of(name), 0.0))
        noise = {name: largest[kind_of(name)] for name in batch}
        return cls(batch, alone, logps, noise, _norm(apart) / max(_norm(batch), _EPSILON))


def _differentiable(parameter: torch.Tensor | None) -> bool:
    """Whether PyTorch does: not what is quantized, in a form of another library, or elsewhere until it is used."""
    if parameter is None or type(parameter.data) is not torch.Tensor or parameter.is_meta:
        return False
    return parameter.dtype in _TOLERANCE


def _by_autograd(
    forward: Forward, slots: dict[str, Slot], rows: npt.NDArray[np.int64]
) -> tuple[dict[str, torch.Tensor], float]:
    """Fingerprints of what is kept of the gradients of a batch; and its log π."""
    found = {name: torch.zeros(FINGERPRINT) for name in slots}

    def keep(name: str, gradient: torch.Tensor) -> None:
        found[name] = fingerprint(slots[name].keep(gradient))[0]

    return found, differentiate(forward, list(slots), rows, keep)


def _self_check(
    features: Features, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64], truth: _Truth
) -> dict[str, float]:
    """Returns the parameters whose gradients in a batch are not those of each response alone, and the errors."""
    precision = forward.autocast or arithmetic(forward.model) or forward.model.dtype
    tolerance, coarse = _TOLERANCE.get(precision, 0.05), _COARSE_TOLERANCE.get(precision, 0.1)
    caught, logps = _caught(features, forward, plan, rows)
    alone = truth.alone
    if len(truth.batch) < len(features.slots):  # by the same way, but alone, for want of another
        own = [_caught(features, forward, plan, rows[index : index + 1])[0] for index in range(len(rows))]
        alone = [
            {name: known.get(name, found[name][0]) for name in found} for found, known in zip(own, alone, strict=True)
        ]
    errors: dict[str, float] = {}

    def check(name: str, found: torch.Tensor, wanted: torch.Tensor, floor: float) -> None:
        norm, error = float(wanted.norm()), float((found - wanted).norm())
        if not error <= tolerance * norm + floor:
            errors[name] = max(error / norm if norm > 0 else float("inf"), errors.get(name, 0.0))

    _check_independent(truth, logps, coarse)
    usable = True
    for index, wanted in enumerate(alone):
        whole = _norm(wanted)
        if not (np.isfinite(whole) and whole > 0):
            usable = False  # NaN and zero gradients are flagged in the store and named later
            continue
        for name, gradient in wanted.items():
            floor = _NOISE * truth.noise[name] if name in truth.noise else coarse * whole
            check(name, caught[name][index], gradient, floor + _EPSILON * whole)
    # In one batch the arithmetic is the same up to the layer, so its gradient is, too: no noise hides what it lacks.
    same = {slot.offset for layer in plan.layers for slot in layer.slots.values()}
    same -= {slot.offset for replay in plan.replays.values() for slot in replay.parameters.values()}
    for name, gradient in truth.batch.items() if usable else ():
        found = caught[name].sum(dim=0)
        if features.slots[name].offset in same or not caught[name].any():
            check(name, found, gradient, _EPSILON * _norm(truth.batch))
    return errors


def _check_independent(truth: _Truth, logps: npt.NDArray[np.float32], tolerance: float) -> None:
    """Checks that responses are in a batch what they are alone: log π, and their gradients by autograd."""
    for together, alone in zip(logps.tolist(), truth.logps, strict=True):
        if np.isfinite(alone) and not abs(together - alone) <= tolerance * abs(alone):
            what = f"log π of a response is {together:.6g} in a batch of two, but {alone:.6g} alone"
            break
    else:
        if not truth.apart > (tolerance if tolerance < 0.01 else 0.5):  # rounding makes a token take another expert
            return
        what = f"gradients in a batch of two differ by {truth.apart:.1e} of themselves from those alone"
    raise UnsupportedModelError(
        f"{what}: in this model responses of one batch act on one another, or padding acts on them, so no gradient of "
        "a single response exists."
    )


def _norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(np.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values())))


def _caught(
    features: Features, forward: Forward, plan: Plan, rows: npt.NDArray[np.int64]
) -> tuple[dict[str, torch.Tensor], npt.NDArray[np.float32]]:
    """Fingerprints of what the plan catches, (n, buckets) for each parameter, and the log-probabilities."""
    by_offset = {slot.offset: torch.zeros(len(rows), FINGERPRINT) for slot in features.slots.values()}

    def keep(offset: int, gradients: torch.Tensor, samples: slice) -> None:
        by_offset[offset][samples] += fingerprint(gradients)

    logps = features.catch(forward, plan, rows, keep).logps
    return {name: by_offset[slot.offset] for name, slot in features.slots.items()}, logps.cpu().numpy()


# Names of parameters and modules.


def kind_of(name: str) -> str:
    """The name of a parameter without the number of its layer."""
    return re.sub(r"\b\d+\b", "*", name)


def _parent_of(name: str) -> str:
    """The name of the module around."""
    return name.rpartition(".")[0]
