"""Policies: loading by path, freezing, and fingerprints that tell two of them apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bpo.choices import NO_MODELS
from bpo.system.model_paths import check_path, is_adapter, naming

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

    from bpo.config import SelectConfig


# Settings that trainers and loaders change without changing what the model computes.
_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "use_cache", "pad_token_id", "dtype", "torch_dtype"}

# Settings of an adapter that do not change what it computes.
_VOLATILE_ADAPTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model inside a ``PeftModel``, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_model(model: Any) -> None:
    """Checks that an object given as a model is one.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"model must be a path, a hub id, a PreTrainedModel or a PeftModel, not {type(model).__name__}."
        )


def load_policy(model: Any, config: SelectConfig) -> PreTrainedModel:
    """Returns the model object given, or loads a causal language model (or a saved PEFT adapter) by path or hub id.

    Raises:
        FileNotFoundError: A path that does not exist, or that holds no model.
        OSError: A hub id that cannot be loaded.
        TypeError: Something that is no model.
    """
    if not isinstance(model, (str, Path)):
        check_model(model)
        return model
    from transformers import AutoModelForCausalLM

    name = check_path(str(model))
    try:
        device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"SelectConfig.device={config.device!r} is no device: {error}") from None
    # transformers loads a directory with an adapter_config.json as base model plus adapter, but not as a PeftModel.
    loader = AutoModelForCausalLM
    if is_adapter(name):
        from peft import AutoPeftModelForCausalLM

        loader = AutoPeftModelForCausalLM
    dtype = getattr(torch, config.dtype)
    with naming(name):
        policy = loader.from_pretrained(name, dtype=dtype, trust_remote_code=config.trust_remote_code).to(device)
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    return policy


def window(model: Any, config: SelectConfig) -> int | None:
    """Returns the longest sequence that the settings, the model and its reference allow, in tokens; None for any."""
    longest = [config.max_length, _positions(model, config)]
    if config.ref_model is not None and config.ref_model not in NO_MODELS:
        longest.append(_positions(config.ref_model, config))
    return min((length for length in longest if length), default=None)


def _positions(model: Any, config: SelectConfig) -> int | None:
    """Returns how many positions a model was made for, None where it does not say."""
    if isinstance(model, (str, Path)):
        from transformers import AutoConfig

        name = check_path(str(model))
        if is_adapter(name):
            from peft import PeftConfig

            name = PeftConfig.from_pretrained(name).base_model_name_or_path
        with naming(name):
            model_config = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    else:
        check_model(model)
        model_config = model.config
    positions: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions


@contextlib.contextmanager
def inference_state(model: PreTrainedModel) -> Iterator[None]:
    """Turns off dropout and freezes every parameter for the duration, and restores both."""
    training = {name: module.training for name, module in model.named_modules()}
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            # Some swap modules on the way.
            module.training = training.get(name, module.training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns the SHA-256 of the architecture, of every weight and of how adapters are applied (hex).

    It reads every weight, about a second for each GB.
    """
    digest = hashlib.sha256(type(base_of(model)).__name__.encode())
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    adapters = {
        name: {key: value for key, value in adapter.to_dict().items() if key not in _VOLATILE_ADAPTER}
        for name, adapter in getattr(model, "peft_config", {}).items()
    }
    if adapters:
        # Scaling can be changed at run time, past the configuration.
        scaling = {name: module.scaling for name, module in model.named_modules() if hasattr(module, "scaling")}
        state = [adapters, list(model.active_adapters), scaling]
        digest.update(json.dumps(state, sort_keys=True, default=plain).encode())
    # The state holds the scales of quantized weights, too, which are no parameters.
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """JSON for what PEFT keeps in its configurations: sets and enumerations."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
