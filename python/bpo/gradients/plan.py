"""How each gradient of a model can be caught: found out on two short responses."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bpo.gradients.capture import Plan, Replay, floating_tensors, map_tensors
from bpo.policy.logprobs import predicting_positions
from bpo.system.warn import warn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.data.tokens import TokenizedResponses
    from bpo.gradients.layers import Layer, Slot
    from bpo.policy.logprobs import Forward
# Two responses of at least so many tokens: with fewer, positions could be mistaken for samples.
_PROBE_TOKENS = 4


@dataclasses.dataclass
class Call:
    """What a module was given and gave back on the way of a gradient, as far as samples are concerned."""

    rules: list[str]
    output: int
    output_rule: str
    head: bool

    @property
    def separable(self) -> bool:
        """Whether the module can be run again for one sample."""
        return self.output_rule != "shared" and self.rules[:1] not in ([], ["shared"])


def probe(forward: Forward, rows: npt.NDArray[np.int64]) -> dict[str, Call]:
    """Runs two responses through the model and notes how every module that has a part in the gradient sees them."""
    size, width = len(rows), int(forward.tokenized.lengths[rows].max())
    n_predicting = int(predicting_positions(forward.tokenized, rows).sum())
    calls: dict[str, Call] = {}

    def rule(tensor: torch.Tensor) -> str:
        first = tensor.shape[0] if tensor.dim() else 0
        return {size: "samples", size * width: "tokens"}.get(first, "shared")

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rules: list[str] = []
            map_tensors((args, kwargs), lambda given: rules.append(rule(given)))
            shape = next((given.shape for given in args if isinstance(given, torch.Tensor)), torch.Size())
            head = shape[:-1] == (1, n_predicting)

            def note(call: Call, _: torch.Tensor) -> None:
                if calls.setdefault(name, call) != call:
                    calls[name] = Call([], 0, "shared", head=False)  # called in ways that cannot be told apart

            for index, tensor in enumerate(floating_tensors(output)):
                if not tensor.requires_grad and tensor.is_leaf:
                    tensor.requires_grad_(True)
                if tensor.requires_grad:
                    call = Call(rules, index, rule(tensor), head)
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


def probe_rows(tokenized: TokenizedResponses) -> npt.NDArray[np.int64]:
    """Two short responses, of different length where there are such, so that padding has a part."""
    order = np.argsort(tokenized.lengths, kind="stable")
    eligible = order[tokenized.lengths[order] >= _PROBE_TOKENS]
    if len(eligible) < 2:
        return order[-2:]
    longer = eligible[tokenized.lengths[eligible] > tokenized.lengths[eligible[0]]]
    return np.array([eligible[0], longer[0] if len(longer) else eligible[1]])


def first_plan(
    model: PreTrainedModel, calls: dict[str, Call], layers: Sequence[Layer], loose: Mapping[str, Slot]
) -> Plan:
    """Says how each gradient is caught by what was seen of the modules.

    Args:
        model: The model.
        calls: What :func:`probe` noted.
        layers: Candidates for a closed form.
        loose: Parameters without one, by the path of the module that owns them.
    """
    plan = Plan()
    replays = plan.replays
    uncalled: list[Layer | str] = []
    for layer in layers:
        call = calls.get(layer.name)
        if call is None:
            uncalled.append(layer)
        elif call.separable or call.head:
            plan.layers.append(layer)
        elif (replay := _replay_around(_parent_of(layer.name), model, calls, replays)) is not None:
            replay.layers.append(layer)
        else:
            plan.whole.update(_slots_of(layer))
    for name, slot in loose.items():
        if _parent_of(name) not in calls:
            uncalled.append(name)
        elif (replay := _replay_around(_parent_of(name), model, calls, replays)) is not None:
            replay.parameters[name[len(replay.name) + 1 :]] = slot
        else:
            plan.whole[name] = slot
    # What had no part in two short responses: an expert that no token chose, or a parameter that a module around
    # its owner uses. It joins the module that is run again anyway; other layers wait for longer responses.
    for item in uncalled:
        name = item if isinstance(item, str) else item.name
        around = next((replay for prefix, replay in replays.items() if name.startswith(f"{prefix}.")), None)
        if not isinstance(item, str):
            (plan.layers if around is None else around.layers).append(item)
            continue
        around = around or _replay_around(_parent_of(_parent_of(name)), model, calls, replays)
        if around is not None:
            around.parameters[name[len(around.name) + 1 :]] = loose[name]
        else:
            plan.whole[name] = loose[name]
    _merge_replays(replays)
    return plan


def to_modules(plan: Plan, wrong: Mapping[str, Slot], model: PreTrainedModel, calls: dict[str, Call]) -> None:
    """Takes parameters by autograd from the nearest module that can be run again, in place of their layer."""
    for layer in _take_layers(plan, wrong):
        replay = _replay_around(_parent_of(layer.name), model, calls, plan.replays)
        for name, slot in _slots_of(layer).items():
            if replay is None:
                plan.whole[name] = slot
            else:
                replay.parameters[name[len(replay.name) + 1 :]] = slot
    _merge_replays(plan.replays)


def to_whole(plan: Plan, wrong: Mapping[str, Slot], _: PreTrainedModel, __: dict[str, Call]) -> None:
    """Takes parameters by autograd from the whole model, in place of all else."""
    offsets = {slot.offset for slot in wrong.values()}
    _take_layers(plan, wrong)
    for name, replay in list(plan.replays.items()):
        replay.parameters = {n: slot for n, slot in replay.parameters.items() if slot.offset not in offsets}
        if not replay.parameters and not replay.layers:
            del plan.replays[name]
    plan.whole.update(wrong)
    warn(
        f"The gradients of {len(wrong)} parameters, such as {next(iter(wrong))}, take a forward and a backward of "
        "the whole model for each response. Leave them out with SelectConfig.parameters if that is too slow."
    )


def _replay_around(
    name: str, model: PreTrainedModel, calls: dict[str, Call], replays: dict[str, Replay]
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


def _take_layers(plan: Plan, wrong: Mapping[str, Slot]) -> list[Layer]:
    """Takes the layers that give the gradients of some parameters out of the plan."""
    offsets = {slot.offset for slot in wrong.values()}
    taken: list[Layer] = []
    for layers in (plan.layers, *(replay.layers for replay in plan.replays.values())):
        found = [layer for layer in layers if any(slot.offset in offsets for slot in _slots_of(layer).values())]
        taken += found
        layers[:] = [layer for layer in layers if layer not in found]
    return taken


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
