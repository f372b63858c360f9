"""Policies: loading by path, and fingerprints that tell two of them apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bpo.choices import NO_MODELS
from bpo.policy.checks import (
    UnsupportedModelError,
    base_of,
    check_kind,
    check_model,
    check_policy,
    kept_value,
    unwrapped,
)
from bpo.policy.sharding import class_of, reshard, whole
from bpo.system.paths import check_path, is_adapter, naming

if TYPE_CHECKING:
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


def device_for(config: SelectConfig) -> torch.device:
    """Returns the device that a model given by path runs on.

    Raises:
        ValueError: ``SelectConfig.device`` is none.
    """
    try:
        return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"SelectConfig.device={config.device!r} is no device: {error}") from None


def load_policy(model: Any, config: SelectConfig) -> PreTrainedModel:
    """Returns the model object given, or loads a causal language model (or a saved PEFT adapter) by path or hub id.

    Of an object that ``torch.compile`` or data parallelism has wrapped, the model inside.

    Raises:
        FileNotFoundError: A path that does not exist, or that holds no model.
        OSError: A hub id that cannot be loaded.
        TypeError: Something that is no model.
        UnsupportedModelError: A model that is no policy: see :func:`bpo.policy.checks.check_policy`.
    """
    if not isinstance(model, (str, Path)):
        model = unwrapped(model)
        check_policy(model)
        return model
    name, device = check_path(str(model)), device_for(config)
    with naming(name):
        policy = _load(name, config).to(device)
    check_model(policy)  # with ZeRO-3 configured, transformers shares out what it loads
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
    return policy


def _load(name: str, config: SelectConfig) -> Any:
    """Loads a causal language model or an adapter of one, and nothing that would be half of one."""
    from transformers import AutoModelForCausalLM

    settings: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "trust_remote_code": config.trust_remote_code,
    }
    saved = _saved_config(name, config)
    check_kind(saved)
    # transformers loads a directory with an adapter_config.json as base model plus adapter, but not as a PeftModel.
    if is_adapter(name):
        from peft import AutoPeftModelForCausalLM

        _check_adapter(name)
        return AutoPeftModelForCausalLM.from_pretrained(name, **settings)
    if not (config.trust_remote_code or type(saved) in AutoModelForCausalLM._model_mapping):
        raise UnsupportedModelError(
            f"{name} is a model of type {saved.model_type}, which AutoModelForCausalLM does not load. If it is a "
            "causal language model, load it with its own class and pass the object."
        )
    loaded, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **settings)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UnsupportedModelError(
            f"{name} is no whole causal language model: it has no trained weights for {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more." if len(missing) > 5 else ".")
        )
    return loaded


def _check_adapter(name: str) -> None:
    """Refuses adapters that were trained for something else."""
    from peft import PeftConfig

    task = getattr(PeftConfig.from_pretrained(name), "task_type", None)
    task = getattr(task, "value", task)
    if task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(
            f"{name} is an adapter of task_type {task}: a policy is a causal language model (CAUSAL_LM)."
        )


def _saved_config(name: str, config: SelectConfig) -> Any:
    """The configuration of a saved model, or of that below a saved adapter."""
    from transformers import AutoConfig

    if is_adapter(name):
        from peft import PeftConfig

        name = PeftConfig.from_pretrained(name).base_model_name_or_path
    return AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)


def window(model: Any, config: SelectConfig) -> int | None:
    """Returns the longest sequence that the settings, the model and its reference allow, in tokens; None for any."""
    longest = [config.max_length, _positions(model, config)]
    if config.ref_model is not None and config.ref_model not in NO_MODELS:
        longest.append(_positions(config.ref_model, config))
    return min((length for length in longest if length), default=None)


def _positions(model: Any, config: SelectConfig) -> int | None:
    """Returns how many positions a model was made for, None where it does not say."""
    if isinstance(model, (str, Path)):
        name = check_path(str(model))
        with naming(name):
            model_config = _saved_config(name, config)
        check_kind(model_config)
    else:
        model = unwrapped(model)
        check_model(model)
        model_config = model.config
    positions: int | None = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet says -1


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns the SHA-256 of the architecture, of every weight and of how adapters are applied (hex).

    It reads every weight, about a second for each GB; of weights that are shared out, one whole at a time, for which
    all processes must call it.
    """
    digest = hashlib.sha256(class_of(base_of(model)).__name__.encode())
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    adapters = {
        name: {key: value for key, value in adapter.to_dict().items() if key not in _VOLATILE_ADAPTER}
        for name, adapter in getattr(model, "peft_config", {}).items()
    }
    if adapters:
        # Scaling can be changed at run time, past the configuration.
        scaling = {name: module.scaling for name, module in model.named_modules() if hasattr(module, "scaling")}
        applied = [adapters, list(model.active_adapters), scaling]
        digest.update(json.dumps(applied, sort_keys=True, default=plain).encode())
    # The state holds the scales of quantized weights, too, which are no parameters.
    reshard(model)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            value = kept_value(model, name) if tensor.is_meta else whole(tensor)
            digest.update(value.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """JSON for what PEFT keeps in its configurations: sets and enumerations."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
