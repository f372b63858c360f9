"""Models and adapters by path, loaded to be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from trl import DPOConfig

from bpo.system.paths import check_path, is_adapter, naming

if TYPE_CHECKING:
    from bpo.training.config import BPOConfig


def load_to_train(model: Any, args: BPOConfig, quantization_config: Any) -> Any:
    """Loads a model given by path as TRL will: with ``model_init_kwargs``, in float32 unless they say otherwise."""
    if not isinstance(model, str):
        return model
    settings: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code}
    if isinstance(args.model_init_kwargs, dict):
        settings.update(args.model_init_kwargs)
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    name = check_path(model)
    if is_adapter(name):
        raise ValueError(f"{model} is a saved adapter; pass it as a PeftModel, as TRL's DPOTrainer asks for.")
    with naming(name):
        loaded = AutoModelForCausalLM.from_pretrained(name, **settings)
    placed = quantization_config is not None or "device_map" in settings
    return loaded if placed else loaded.to(args.device)


def adapter_to_train(name: str, args: DPOConfig) -> Any:
    """Loads an adapter, by path or hub id, to be trained further."""
    settings = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    with naming(name):
        return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **settings)
