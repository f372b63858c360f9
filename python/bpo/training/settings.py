"""What training and selection must agree on, and the settings of the selection that follow from those of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bpo.config import SelectConfig
from bpo.training.weighting import LOSS_FIELDS

if TYPE_CHECKING:
    from bpo.training.config import BPOConfig

SHARED = (*LOSS_FIELDS, "weight_column", "token_weights", "max_length", "truncation_mode")
"""Fields of the trainer's configuration and of SelectConfig that must agree."""


def select_settings(args: BPOConfig, ref_model: Any, peft_config: Any) -> SelectConfig:
    """Brings together the settings of training and of selection, which must agree."""
    if args.ld_alpha not in (None, 1.0):
        raise ValueError(
            f"BPOTrainer cannot select for ld_alpha={args.ld_alpha!r}: it weights the tokens of a response by the "
            "length of the other one of its pair, so a response has no gradient of its own. Leave ld_alpha at None."
        )
    given: dict[str, Any] = dict(args.select_config or {})  # type: ignore[arg-type]
    if callable(given.get("token_weights")):
        raise ValueError(
            "select_config has a function for token_weights, which the training could not ask: give the weights in "
            "columns of the data, and their name as BPOConfig.token_weights."
        )
    sampling = getattr(args, "train_sampling_strategy", "random")
    if given.get("order", "data") != "data" and sampling != "sequential":
        raise ValueError(
            f"select_config has order={given['order']!r}, which train_sampling_strategy={sampling!r} would not keep: "
            "set train_sampling_strategy='sequential'."
        )
    if isinstance(given.get("loss_type"), str):
        given["loss_type"] = [given["loss_type"]]
    shared = {name: getattr(args, name) for name in SHARED}
    for name, value in shared.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"select_config has {name}={given[name]!r}, but BPOConfig has {value!r}; set it there only."
            )
    if hasattr(peft_config, "r"):
        given.setdefault("lora_rank", peft_config.r)
    given["trust_remote_code"] = args.trust_remote_code
    return SelectConfig.from_dict({**given, **shared, "ref_model": ref_model})
