"""A model in use, and as it was found: all that hooks, freezing and the model's own passes change is put back."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from bpo.policy.checks import check_in_step
from bpo.policy.sharding import is_sharded, ready, reshard

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def inference_state(model: PreTrainedModel) -> Iterator[None]:
    """Turns off dropout, compilation, autocast and every ``requires_grad``; afterwards the model is as it was.

    What was there before stands there again, also after an error or Ctrl-C: attributes of every module (a patched
    ``forward``, caches, active adapters), hooks, parameters and buffers as objects, settings, and random states.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        if is_sharded(model):
            check_in_step(model)
            ready(model)
        stack.enter_context(torch.random.fork_rng(_cuda_devices(model), device_type="cuda"))
        for kind in {"cpu", *(parameter.device.type for parameter in model.parameters())} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))  # a caller's, of which no store would tell
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and the import takes seconds
            # Compiled code may have been made without our hooks, and then never calls them.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        found = _Found(model)
        for _ in range(2):  # the second finishes where Ctrl-C comes in the first
            stack.callback(found.restore)
        stack.callback(reshard, model)  # what was found, and is restored, are parts
        # Not by eval(), which some adapters merge their weights in.
        for module in list(model.modules()):
            module.training = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


class Attributes:
    """Attributes of modules and settings, which can be brought back any number of times to what they were."""

    def __init__(self, owners: Iterable[Any]) -> None:
        self._held: list[tuple[Any, Any]] = []
        for owner in owners:
            attributes = vars(owner)
            self._held.append((attributes, dict(attributes)))
            # Hooks, submodules, buffers, adapters' names and scales lie in containers one level below.
            for value in attributes.values():
                if isinstance(value, (dict, list, set)):
                    self._held.append((value, value.copy()))

    def restore(self) -> bool:
        """Brings everything back that has changed, and says whether anything had."""
        changed = False
        for container, contents in self._held:
            if not _same(container, contents):
                changed = True
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)
        return changed


class _Found:
    """The state of a model, to which it can be brought back any number of times.

    Parameters are told by identity, since no pass writes into them; buffers, in which some count, are copied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._attributes = Attributes([*model.modules(), *_settings(model)])
        self._buffers = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_meta and not b.is_inference()]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def restore(self) -> None:
        """Brings everything back that has changed."""
        self._attributes.restore()
        for buffer, version, values in self._buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
        for parameter, requires_grad, grad in self._parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad


def _same(container: Any, contents: Any) -> bool:
    """Whether a container holds the same objects as its copy, in the same order."""
    if len(container) != len(contents):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), contents.items(), strict=True)
        return all(key == name and value is known for (key, value), (name, known) in pairs)
    if isinstance(container, set):
        return bool(container == contents)
    return all(value is known for value, known in zip(container, contents, strict=True))


def _settings(model: PreTrainedModel) -> list[Any]:
    """The configurations of a model and its parts, for generation too, each once."""
    from transformers import GenerationConfig, PreTrainedConfig

    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in vars(module).values()]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (PreTrainedConfig, GenerationConfig)) and id(value) not in found:
            found[id(value)] = value
            waiting += vars(value).values()
    return list(found.values())


def _cuda_devices(model: PreTrainedModel) -> list[int]:
    devices = {parameter.device for parameter in model.parameters()}
    return sorted(device.index for device in devices if device.type == "cuda")
