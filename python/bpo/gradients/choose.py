"""Which features a configuration and a model mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bpo.gradients.parameters import FreshAdapter, Parameters, matches
from bpo.gradients.response_embeddings import ResponseEmbeddings
from bpo.policy.checks import UnsupportedModelError, check_one_pass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from bpo.config import SelectConfig
    from bpo.gradients.features import Features


def choose_features(model: PreTrainedModel, config: SelectConfig) -> Features:
    """Decides what stands for a response (``SelectConfig.features`` and ``SelectConfig.parameters``).

    A ``PeftModel`` gives the gradients of its trainable parameters, ``modules_to_save`` included; where every B of a
    LoRA is zero (never trained), its A is left out, since A's gradients are exactly zero then.

    Raises:
        UnsupportedModelError: An adapter whose gradients cannot be had by sample, or patterns that match nothing.
    """
    peft_config = getattr(model, "peft_config", None)
    if peft_config is not None and not hasattr(model, "get_base_model"):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries an adapter without being a PeftModel. Pass the path of the adapter, or a "
            "model made by PeftModel.from_pretrained or get_peft_model."
        )
    if config.features == "embeddings":
        if peft_config is not None:
            _check_adapters(model)
        return ResponseEmbeddings(model)
    if config.features == "lora" and peft_config is None:
        adapter = FreshAdapter(model, config.lora_rank, config.sketch_seed, config.parameters)
        _check_at_hand(model, adapter.loose)
        check_one_pass(model, adapter.loose)
        return adapter
    names = [name for name, _ in model.named_parameters()]
    if config.features == "lora":
        names = _adapter_parameters(model)
    names = [name for name in names if matches(name, config.parameters)]
    if not names:
        raise UnsupportedModelError(
            f"No parameter of {type(model).__name__} matches SelectConfig.parameters={list(config.parameters or ())}."
        )
    integer = [name for name in names if not model.get_parameter(name).is_floating_point()]
    if integer:
        raise UnsupportedModelError(
            f"{integer[0]} is quantized to {model.get_parameter(integer[0]).dtype} and has no gradient. Use "
            "features='lora', which needs the layers' inputs and outputs only, or leave it out with "
            "SelectConfig.parameters."
        )
    _check_at_hand(model, names)
    parameters = Parameters(model, names, config.factor_dim, config.sketch_seed)
    check_one_pass(model, parameters.loose)
    return parameters


def _check_at_hand(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuses parameters that autograd would have to see, but accelerate brings for each forward and takes away."""
    away = [name for name in names if model.get_parameter(name).is_meta]
    if away:
        raise UnsupportedModelError(
            f"{away[0]} is offloaded by accelerate, so that it has no gradient of its own. Load the model without "
            "offloading it, differentiate features='lora', or leave it out with SelectConfig.parameters."
        )


def _adapter_parameters(model: PreTrainedModel) -> list[str]:
    """The parameters that training would change: those that require a gradient, else those of the active adapters."""
    _check_adapters(model)
    parameters = dict(model.named_parameters())
    names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if not names:  # loaded for inference: everything is frozen
        names = [name for name in parameters if any(f".{adapter}." in f"{name}." for adapter in model.active_adapters)]
    b_names = [name for name in names if ".lora_B." in name]
    if b_names and not any(bool(parameters[name].any()) for name in b_names):
        names = [name for name in names if ".lora_A." not in name]
    return names


def _check_adapters(model: PreTrainedModel) -> None:
    """Refuses adapters that change the tokens, or that take no part in the forward pass."""
    for name in model.active_adapters:
        if model.peft_config[name].is_prompt_learning:
            kind = getattr(model.peft_config[name].peft_type, "value", model.peft_config[name].peft_type)
            raise UnsupportedModelError(
                f"The adapter '{name}' is of type {kind}, which puts tokens in front of the prompt: those are not the "
                "tokens that bpo differentiates. Pass a model with another adapter, or without one."
            )
    for name, module in model.named_modules():
        if getattr(module, "merged", False) is True or getattr(module, "disable_adapters", False) is True:
            raise UnsupportedModelError(
                f"{name}: its adapter is merged or disabled, so it takes no part in the forward pass. Unmerge or "
                "enable it, or pass the model without adapter."
            )
