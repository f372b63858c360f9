"""Selecting, then training with TRL: the only import of trl."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from bpo.config import SelectConfig
from bpo.models import check_path, is_adapter, load_tokenizer, naming
from bpo.pipeline import select


@dataclasses.dataclass
class BPOConfig(DPOConfig):  # type: ignore[misc]
    """TRL's ``DPOConfig`` with what :func:`bpo.select` needs; ``beta``, ``loss_type`` and ``max_length`` serve both.

    Attributes:
        budget: Pairs to keep: a whole number, or a fraction of at most 1.0 of the candidates. Required.
        breadth: Prompts to keep, likewise; None for all.
        strategy: Name of the strategy.
        store: Directory of the gradient store; None for a temporary one.
        select_config: Fields of :class:`bpo.SelectConfig`, as a mapping or as an object, but for those that
            ``DPOConfig`` has, too.

    Example:
        >>> import bpo
        >>> args = bpo.BPOConfig(output_dir="out", budget=500, breadth=0.5, report_to="none", bf16=False)
        >>> args.budget, args.strategy
        (500, 'bpo')
    """

    budget: float | None = dataclasses.field(
        default=None, metadata={"help": "Pairs to keep: a count above 1, or a fraction of at most 1.0."}
    )
    breadth: float | None = dataclasses.field(
        default=None, metadata={"help": "Prompts to keep: a count above 1, or a fraction; all by default."}
    )
    strategy: str = dataclasses.field(default="bpo", metadata={"help": "bpo, uniform, random or margin."})
    store: str | None = dataclasses.field(default=None, metadata={"help": "Directory of the gradient store."})
    select_config: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "Fields of bpo.SelectConfig."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.select_config, str):
            try:
                self.select_config = json.loads(self.select_config)
            except ValueError as error:
                raise ValueError(f"select_config is not JSON: {error}") from None
        if isinstance(self.select_config, SelectConfig):
            # What was left at its default must not stand against the field of the same name here.
            defaults = SelectConfig().to_dict()
            fields = self.select_config.to_dict()
            self.select_config = {name: value for name, value in fields.items() if value != defaults[name]}
        if self.select_config is not None and not isinstance(self.select_config, dict):
            raise ValueError(
                f"select_config must be a mapping of bpo.SelectConfig's fields, got {self.select_config!r}"
            )
        elsewhere = {"ref_model", "trust_remote_code", "dtype", "device"} & set(self.select_config or {})
        if elsewhere:
            raise ValueError(
                f"select_config has {', '.join(sorted(elsewhere))}, but the trainer decides how models are loaded: use "
                "its ref_model, trust_remote_code or model_init_kwargs."
            )


# What would change the gradients of the loss in training but not in the selection.
_UNSUPPORTED = {
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "ld_alpha": None,
    "use_weighting": False,
}


class BPOTrainer(DPOTrainer):  # type: ignore[misc]
    """A ``DPOTrainer`` that first selects its training pairs with :func:`bpo.select`.

    All arguments are those of TRL's ``DPOTrainer``; ``train_dataset`` is any format that :func:`bpo.select` takes, and
    ``args`` is a :class:`BPOConfig` with a budget. The gradients are those of a fresh adapter on every linear layer, of
    the rank of ``peft_config`` where one is given, or of the adapter that the model has. With several processes the
    first fills the store and the others read it, so a ``store`` on a shared disk is required.

    Attributes:
        selection: The :class:`bpo.Selection` that is trained on.

    Raises:
        ValueError: No budget, a setting of the loss that selection does not know, or whatever :func:`bpo.select`
            refuses.
        TypeError: A reference given by path.
    """

    _tag_names = ("trl", "dpo", "bpo")
    _name = "BPO"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: BPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, BPOConfig) or args.budget is None:
            raise ValueError("BPOTrainer needs args=bpo.BPOConfig(budget=...): how many pairs to keep.")
        if isinstance(ref_model, (str, Path)):
            raise TypeError("ref_model must be a model object, as in TRL's DPOTrainer.")
        model = str(model) if isinstance(model, Path) else model
        if (
            not isinstance(model, str)
            and not getattr(model.config, "_name_or_path", "")
            and ref_model is None
            and kwargs.get("peft_config") is None
            and not hasattr(model, "peft_config")
            and not args.precompute_ref_log_probs
        ):
            raise ValueError(
                "TRL loads the reference from where the model came from, which this model object does not say. Pass "
                "ref_model or a peft_config, or set precompute_ref_log_probs."
            )
        settings = _select_settings(args, ref_model, kwargs.get("peft_config"))
        processing_class = load_tokenizer(model, processing_class, settings)
        if isinstance(eval_dataset, dict):  # a DatasetDict is one, too
            eval_dataset = {name: _all_pairs(part, settings) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = _all_pairs(eval_dataset, settings)
        state = PartialState()
        if state.num_processes > 1 and args.store is None:
            raise ValueError(
                "With several processes BPOTrainer needs BPOConfig.store, a directory that all of them see."
            )
        with state.main_process_first():
            self.selection = select(
                _load(model, args, kwargs.get("quantization_config")),
                train_dataset,
                budget=_count_or_fraction(args.budget),
                breadth=None if args.breadth is None else _count_or_fraction(args.breadth),
                processing_class=processing_class,
                strategy=args.strategy,  # type: ignore[arg-type]
                store=args.store,
                config=settings,
                seed=args.seed,
                progress=not args.disable_tqdm and state.is_main_process,
            )
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            self.selection.dataset,
            eval_dataset,
            processing_class,
            **kwargs,
        )


def _select_settings(args: BPOConfig, ref_model: Any, peft_config: Any) -> SelectConfig:
    """Brings together the settings of training and of selection, which must agree."""
    for name, supported in _UNSUPPORTED.items():
        if getattr(args, name, supported) != supported:
            raise ValueError(
                f"BPOTrainer selects for {name}={supported!r} only, got {getattr(args, name)!r}. Select with bpo.select"
                " and train with TRL's DPOTrainer if the difference does not matter to you."
            )
    if len(args.loss_type) != 1:
        raise ValueError(f"BPOTrainer selects for one loss, got loss_type={args.loss_type}.")
    given: dict[str, Any] = dict(args.select_config or {})  # type: ignore[arg-type]
    shared = {
        "beta": args.beta,
        "loss_type": args.loss_type[0],
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
    }
    for name, value in shared.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"select_config has {name}={given[name]!r}, but BPOConfig has {value!r}; set it there only."
            )
    if hasattr(peft_config, "r"):
        given.setdefault("lora_rank", peft_config.r)
    given["trust_remote_code"] = args.trust_remote_code
    return SelectConfig.from_dict({**given, **shared, "ref_model": ref_model})


def _all_pairs(dataset: Any, settings: SelectConfig) -> Any:
    """Returns preference rows as they are, and every pair of scored responses."""
    if {"chosen", "rejected"} <= set(getattr(dataset, "column_names", None) or []):
        return dataset
    return select(None, dataset, budget=1.0, strategy="random", config=settings, progress=False).dataset


def _load(model: Any, args: BPOConfig, quantization_config: Any) -> Any:
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


def _count_or_fraction(value: float) -> int | float:
    """A command line gives every number as a float: above 1 it is a count."""
    if value > 1 and value != int(value):
        raise ValueError(f"{value} is neither a whole number nor a fraction of at most 1.0.")
    return int(value) if value > 1 or isinstance(value, int) else value
