"""Training with TRL on the pairs that were selected for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoModelForCausalLM

from bpo.config import SelectConfig
from bpo.models import check_path, is_adapter, load_tokenizer, naming, window
from bpo.pipeline import select
from bpo.selection import add_ref_logps, has_ref_logps
from bpo.weighting import LOSS_FIELDS, WeightedDPOConfig, WeightedDPOTrainer


@dataclasses.dataclass
class BPOConfig(WeightedDPOConfig):
    """TRL's ``DPOConfig`` with what :func:`bpo.select` needs; its loss and its ``max_length`` serve both.

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


# Fields of the trainer's configuration and of SelectConfig that must agree.
_SHARED = (*LOSS_FIELDS, "weight_column", "max_length", "truncation_mode")


class BPOTrainer(WeightedDPOTrainer):
    """A ``DPOTrainer`` that first selects its training pairs with :func:`bpo.select`.

    All arguments are those of TRL's ``DPOTrainer``; ``train_dataset`` is any format that :func:`bpo.select` takes, and
    ``args`` is a :class:`BPOConfig` with a budget. The gradients are those of a fresh adapter on every linear layer, of
    the rank of ``peft_config`` where one is given, or of the adapter that the model has. With several processes the
    first fills the store and the others read it, so a ``store`` on a shared disk is required.

    Selection is for the loss of ``args``. The auxiliary loss that TRL adds for mixtures of experts
    (``router_aux_loss_coef``) belongs to a batch, not to a pair, and takes no part in it.

    With ``precompute_ref_log_probs=True`` the reference does not run a second time: training uses the log-probabilities
    that selection computed, in the precision of the model as it was loaded.

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
        self._window = window(model, settings)
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

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        """Adds log π_ref of the selected pairs, which selecting computed; TRL computes that of other data."""
        if dataset is self.train_dataset and has_ref_logps(dataset) and self._cuts_as_selected(dataset):
            return add_ref_logps(dataset)
        return super()._precompute_ref_logps(dataset, *args)

    def _cuts_as_selected(self, dataset: Any) -> bool:
        """Whether no sequence is longer than what the model was made for, where selection cuts and TRL does not."""
        if self._window in (None, self.args.max_length):
            return True
        return all(
            len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= self._window
            for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
        )


def _select_settings(args: BPOConfig, ref_model: Any, peft_config: Any) -> SelectConfig:
    """Brings together the settings of training and of selection, which must agree."""
    if args.ld_alpha not in (None, 1.0):
        raise ValueError(
            f"BPOTrainer cannot select for ld_alpha={args.ld_alpha!r}: it weights the tokens of a response by the "
            "length of the other one of its pair, so a response has no gradient of its own. Leave ld_alpha at None."
        )
    given: dict[str, Any] = dict(args.select_config or {})  # type: ignore[arg-type]
    if given.get("token_weights") is not None:
        raise ValueError(
            "TRL's DPOTrainer does not weigh tokens, so BPOTrainer cannot train with select_config's token_weights. "
            "Select with bpo.select and train with a trainer that does."
        )
    if isinstance(given.get("loss_type"), str):
        given["loss_type"] = [given["loss_type"]]
    shared = {name: getattr(args, name) for name in _SHARED}
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
