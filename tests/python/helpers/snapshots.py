"""Everything of a model and a tokenizer that a call could leave changed, to be compared before and after."""

import random

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedConfig


def snapshot(model, tokenizer=None):
    """Name → value, such that two snapshots are equal where nothing has changed.

    Objects stand for themselves (and are kept alive, so that none can take another's place); tensors also as bytes.
    """
    found = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()),
        "random": random.getstate(),
        "modules": [(name, _Same(module)) for name, module in model.named_modules()],
    }
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            _note(found, f"{name}.{key}", value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name} itself"] = _Same(tensor), tensor.requires_grad, _Same(tensor.grad)
        found[f"{name} hooks"] = dict(tensor._backward_hooks or {})
        if not tensor.is_meta:
            found[f"{name} bits"] = tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if tokenizer is not None:
        found["tokenizer"] = {key: _plain(value) for key, value in vars(tokenizer).items()}
        for key in ("padding_side", "truncation_side", "pad_token", "chat_template", "model_max_length"):
            found[f"tokenizer {key}"] = getattr(tokenizer, key)
        found["tokenizer backend"] = tokenizer.backend_tokenizer.to_str()
    return found


def assert_unchanged(before, after):
    """Names what has changed."""
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    assert not changed, changed


class _Same:
    """An object that is equal to itself alone."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None

    def __repr__(self):
        return f"<{type(self.value).__name__} {id(self.value):x}>"


def _note(found, name, value):
    found[name] = _Same(value) if not isinstance(value, (bool, int, float, str, type(None))) else value
    if isinstance(value, dict):
        found[f"{name} holds"] = [(key, _Same(item)) for key, item in value.items()]
    elif isinstance(value, (list, set)):
        found[f"{name} holds"] = repr(value)
    elif isinstance(value, (PreTrainedConfig, GenerationConfig)):
        found[f"{name} says"] = repr(sorted(value.to_dict().items(), key=str))


def _plain(value):
    return repr(value) if isinstance(value, (bool, int, float, str, dict, list, type(None))) else _Same(value)
