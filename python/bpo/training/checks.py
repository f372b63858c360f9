"""What cannot be had together in a training that selects its pairs, refused before any work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bpo.data.rows import load_rows
from bpo.policy.sharding import is_sharded

if TYPE_CHECKING:
    from bpo.config import SelectConfig
    from bpo.selection.selection import Selection
    from bpo.training.config import BPOConfig


def check_origin(model: Any, ref_model: Any, args: BPOConfig, peft_config: Any) -> None:
    """Checks that TRL finds a reference, and a model that it can share out itself.

    Raises:
        ValueError: It would load the reference from where the model came from, which the model does not say; or the
            model is shared out by FSDP2 already.
    """
    if not isinstance(model, str) and is_sharded(model):
        raise ValueError(
            "BPOTrainer selects with a whole model in each process, which FSDP2 shares out for the training: pass it "
            "by path or whole. For one that no device can hold, call bpo.select with the model that is shared out "
            "first, and give selection.dataset to bpo.WeightedDPOTrainer."
        )
    if (
        not isinstance(model, str)
        and not getattr(model.config, "_name_or_path", "")
        and ref_model is None
        and peft_config is None
        and not hasattr(model, "peft_config")
        and not args.precompute_ref_log_probs
    ):
        raise ValueError(
            "TRL loads the reference from where the model came from, which this model object does not say. Pass "
            "ref_model or a peft_config, or set precompute_ref_log_probs."
        )


def check_rounds(args: BPOConfig, settings: SelectConfig) -> None:
    """Checks what cannot be had together with rounds.

    Raises:
        ValueError: Such a setting.
    """
    sampling = getattr(args, "train_sampling_strategy", "random")
    sharded = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    plugin = args.deepspeed_plugin
    refused = {
        "checkpoints in select_config": (settings.checkpoints, "their gradients do not change with the policy"),
        "preconditioner in select_config": (settings.preconditioner, "it belongs to one state of the adapter"),
        "sync_ref_model": (args.sync_ref_model, "later rounds use log π_ref of the first"),
        f"train_sampling_strategy={sampling!r}": (
            sampling not in ("random", "sequential"),
            "the lengths change with the rounds",
        ),
        "FSDP": (sharded, "no process holds the whole model"),
        "ZeRO-3": (plugin is not None and plugin.zero_stage == 3, "no process holds the whole model"),
    }
    for name, (value, reason) in refused.items():
        if value:
            raise ValueError(f"reselect_strategy={args.reselect_strategy!r} does not go with {name}: {reason}.")


def check_resampling(args: BPOConfig, scorer: Any, dataset: Any, *, fixed_reference: bool) -> None:
    """Checks that new responses can be scored, weighted and compared with the reference.

    Raises:
        ValueError: They cannot.
    """
    if (scorer is None) != (args.resample is None):
        raise ValueError(
            "BPOTrainer needs a scorer for the responses that BPOConfig.resample samples anew."
            if scorer is None
            else "A scorer scores responses that are sampled anew: set BPOConfig.resample, too."
        )
    if args.resample is None:
        return
    if args.token_weights is not None:
        raise ValueError("Responses that are sampled anew have no token weights: set resample or token_weights alone.")
    if {"chosen", "rejected", args.weight_column} <= set(load_rows(dataset).column_names):
        raise ValueError(
            "Pairs of responses that are sampled anew have no weights of the data's pairs: set weight_column=None, or "
            "give the data as prompts with scored responses, whose weights are those of the prompts."
        )
    if args.precompute_ref_log_probs and not fixed_reference:
        raise ValueError(
            "resample needs a reference that runs over new responses, but with precompute_ref_log_probs there is only "
            "the model before its training. Pass ref_model, or turn precompute_ref_log_probs off."
        )


def check_progress(args: BPOConfig, first: Selection) -> None:
    """Checks that a selection tells how the policy ranks its pairs, where learning progress is asked for.

    Raises:
        ValueError: Its strategy computes no log-probabilities.
    """
    if args.learning_progress is not None and first.pairs["logp_chosen"].null_count == first.pairs.num_rows:
        raise ValueError(
            f"learning_progress needs log-probabilities of the candidates, which strategy={args.strategy!r} does not "
            "compute; take one that reads gradients, such as 'bpo'."
        )


def check_target(args: BPOConfig, target: Any, *, fixed_reference: bool) -> None:
    """Checks that responses of a target can be compared with the reference in later rounds, too.

    Raises:
        ValueError: They cannot.
    """
    if target is not None and args.precompute_ref_log_probs and not fixed_reference:
        raise ValueError(
            "A target needs a reference that runs over its responses in later rounds, too, but with "
            "precompute_ref_log_probs there is only the model before its training. Pass ref_model, or turn "
            "precompute_ref_log_probs off."
        )
