"""Training with TRL, after a selection or as the warm-up before one: the only import of trl."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer

import bpo
from bpo.config import SelectConfig
from bpo.models import check_path, is_adapter, load_tokenizer, naming, plain, window
from bpo.pipeline import select
from bpo.selection import add_ref_logps, has_ref_logps

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel


@dataclasses.dataclass
class BPOConfig(DPOConfig):  # type: ignore[misc]
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
    strategy: str = dataclasses.field(default="bpo", metadata={"help": "Name of the strategy."})
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


SHARED = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "use_weighting",
    "max_length",
    "truncation_mode",
)
"""Fields of DPOConfig and of SelectConfig that say what the gradients are."""


class BPOTrainer(DPOTrainer):  # type: ignore[misc]
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
                strategy=args.strategy,
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


_WARM_UP = "warm_up.json"
# Settings of the trainer that leave the checkpoints as they are.
_WITHOUT_EFFECT = {"output_dir", "run_name", "report_to", "disable_tqdm", "local_rank", "log_level"}


def warm_up(
    model: str | os.PathLike[str],
    dataset: Any,
    output_dir: str | os.PathLike[str],
    *,
    fraction: float = 0.05,
    processing_class: Any = None,
    args: DPOConfig | None = None,
    peft_config: Any = None,
    seed: int = 0,
) -> dict[str, float]:
    """Trains an adapter on a few random pairs: checkpoints and optimizer states for the gradients of a selection.

    The first step of LESS (arXiv 2402.04333), with DPO in place of supervised fine-tuning. A fresh adapter has neither
    A-gradients nor an optimizer state; these checkpoints have both. Each is an ordinary one of TRL's ``DPOTrainer``,
    saved at the end of an epoch.

    A warm-up that was interrupted goes on from its last checkpoint, and a finished one is returned at once.

    Args:
        model: Path or hub id of the policy, or of its adapter, which is then trained further. Not an object: training
            would change it, and the checkpoints of an adapter name their base by path.
        dataset: Preference data in any format of :func:`bpo.select`.
        output_dir: A new or empty directory, or one with the same warm-up.
        fraction: Part of the candidate pairs that is trained on, in (0, 1]; LESS takes 5 %.
        processing_class: The tokenizer; by default the one saved with the model.
        args: Settings of the training but for what is logged and saved. By default TRL's with the 4 epochs and the
            learning rate 2e-5 of LESS's own scripts, in bfloat16 on a GPU that has it.
        peft_config: The adapter; by default LoRA on every linear layer, of the rank of the fresh adapter.
        seed: Of the pairs, and of the training where ``args`` is None.

    Returns:
        The path of each checkpoint and the average learning rate of its epoch (LESS's η̄), as the trainer logged it at
        every step: what ``SelectConfig.checkpoints`` takes. An epoch whose learning rate was zero is left out.

    Raises:
        TypeError: A model object.
        ValueError: A fraction out of range, unusable data, or an ``output_dir`` with another warm-up.
        FileExistsError: An ``output_dir`` that holds something else.

    Example:
        .. code-block:: python

            checkpoints = bpo.warm_up("my-sft-model", data, "warm-up")
            config = bpo.SelectConfig(checkpoints=checkpoints, preconditioner="checkpoint")
            selection = bpo.select("my-sft-model", data, budget=5000, config=config)
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"warm_up takes the path or hub id of a model, not a {type(model).__name__}; save it first "
            "(save_pretrained)."
        )
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction!r}")
    name = check_path(os.fspath(model))
    # Saved adapters name their base by this path, wherever they are loaded from.
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    if is_adapter(name) and peft_config is not None:
        raise ValueError(f"{model} is an adapter, which is trained further; a peft_config is for a model without one.")
    if peft_config is None and not is_adapter(name):
        peft_config = LoraConfig(r=SelectConfig().lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    directory = Path(output_dir)
    args = _warm_up_arguments(args, directory, seed)
    pairs = select(None, dataset, budget=float(fraction), strategy="random", seed=seed, progress=False).dataset
    settings = {
        **{key: value for key, value in json.loads(args.to_json_string()).items() if key not in _WITHOUT_EFFECT},
        "bpo": bpo.__version__,
        "model": name,
        "pairs": hashlib.sha256(json.dumps(pairs.to_list(), default=str).encode()).hexdigest(),
        "peft_config": None if peft_config is None else json.loads(json.dumps(peft_config.to_dict(), default=plain)),
    }
    known = _known_warm_up(directory, settings)
    if known is None:
        trainer = DPOTrainer(
            _adapter_to_train(name, args) if is_adapter(name) else name,
            args=args,
            train_dataset=pairs,
            processing_class=load_tokenizer(
                name, processing_class, SelectConfig(trust_remote_code=args.trust_remote_code)
            ),
            peft_config=peft_config,
        )
        if args.should_save:
            directory.mkdir(parents=True, exist_ok=True)
            _write_manifest(directory, {"settings": settings})
        complete = _checkpoints(directory)
        trainer.train(resume_from_checkpoint=str(directory / complete[-1]) if complete else None)
        known = _average_learning_rates(trainer.state.log_history, _checkpoints(directory))
        if args.should_save:
            _write_manifest(directory, {"settings": settings, "checkpoints": known})
    return {str(directory / checkpoint): rate for checkpoint, rate in known.items() if rate > 0}


def _warm_up_arguments(args: DPOConfig | None, directory: Path, seed: int) -> DPOConfig:
    """Returns the settings of a warm-up: one checkpoint an epoch, and the learning rate logged at every step."""
    if args is None:
        args = DPOConfig(
            str(directory),
            num_train_epochs=4,
            learning_rate=2e-5,
            bf16=is_torch_bf16_gpu_available(),
            report_to="none",
            seed=seed,
        )
    args = copy.copy(args)
    args.output_dir = str(directory)
    args.save_strategy = SaveStrategy.EPOCH
    args.save_total_limit = None
    args.save_only_model = False
    args.logging_strategy = IntervalStrategy.STEPS
    args.logging_steps = 1
    return args


def _adapter_to_train(name: str, args: DPOConfig) -> Any:
    settings = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    with naming(name):
        return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **settings)


def _known_warm_up(directory: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """Returns the checkpoints of a finished warm-up; None if there is none, or one to go on with.

    Raises:
        ValueError: A warm-up with other settings.
        FileExistsError: Something else.
    """
    manifest = directory / _WARM_UP
    if manifest.is_file():
        saved = json.loads(manifest.read_text(encoding="utf-8"))
        there = saved["settings"]
        changed = [key for key, value in settings.items() if there.get(key) != value]
        if changed:
            raise ValueError(
                f"{directory} holds a warm-up with another {', '.join(changed)}: {changed[0]} is "
                f"{there.get(changed[0])!r} there and {settings[changed[0]]!r} here. Name another output_dir."
            )
        checkpoints: dict[str, float] | None = saved.get("checkpoints")
        return checkpoints
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise FileExistsError(f"{directory} is no empty directory and holds no warm-up; name another output_dir.")
    return None


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    scratch = directory / f"{_WARM_UP}.new"
    scratch.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    scratch.replace(directory / _WARM_UP)


def _checkpoints(directory: Path) -> list[str]:
    """Names of the whole checkpoints, in order: Trainer writes its own state last."""
    names = [path.parent.name for path in directory.glob("checkpoint-*/trainer_state.json")]
    return sorted(names, key=_step)


def _step(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _average_learning_rates(log_history: list[dict[str, Any]], checkpoints: list[str]) -> dict[str, float]:
    """Returns the mean learning rate of the steps between each checkpoint and the one before."""
    rates = {entry["step"]: entry["learning_rate"] for entry in log_history if "learning_rate" in entry}
    averages, first = {}, 1
    for checkpoint in checkpoints:
        last = _step(checkpoint)
        averages[checkpoint] = fmean(rates[step] for step in range(first, last + 1))
        first = last + 1
    return averages


def dpo_config_fields() -> list[str]:
    """Returns the names of the settings of a training."""
    return [field.name for field in dataclasses.fields(DPOConfig) if field.init]


def dpo_config(fields: Mapping[str, Any], output_dir: str, seed: int) -> DPOConfig:
    """Returns the settings of a training of which nothing is kept but the model.

    Args:
        fields: Those of ``DPOConfig``, with its defaults, but bfloat16 only on a GPU that has it; ``peft`` is left
            aside.
        output_dir: Where nothing will be written.
        seed: Of the order of the pairs and of the adapter.
    """
    accelerated = torch.accelerator.is_available()
    given = {
        "use_cpu": not accelerated,
        "bf16": is_torch_bf16_gpu_available() and not fields.get("fp16"),
        "dataloader_pin_memory": accelerated,
        "logging_strategy": "no",
        **{name: value for name, value in fields.items() if name != "peft"},
    }
    return DPOConfig(
        **given,
        output_dir=output_dir,
        seed=seed,
        data_seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        precompute_ref_log_probs=True,
    )


def train_on_pairs(
    model: str,
    dataset: Any,
    args: DPOConfig,
    *,
    processing_class: Any = None,
    peft_config: LoraConfig | None = None,
    ref_logps: npt.NDArray[np.float32] | None = None,
) -> PreTrainedModel:
    """Trains a policy with TRL and returns it as a plain model, with nothing of the trainer left on it.

    Args:
        model: Path or hub id of the policy, or of an adapter, which is then trained further.
        dataset: Pairs in TRL's format.
        args: Settings, with ``precompute_ref_log_probs``.
        processing_class: The tokenizer; by default the one saved with the model.
        peft_config: The adapter to train; None trains every weight.
        ref_logps: (P, 2) log π_ref of the preferred and of the other response of each pair. None runs the reference.

    Returns:
        The trained model.
    """
    config = SelectConfig(trust_remote_code=args.trust_remote_code)
    trainer = _KnownReferenceTrainer(
        _adapter_to_train(model, args) if is_adapter(model) else _load(model, args, None),
        args=args,
        train_dataset=dataset,
        processing_class=load_tokenizer(model, processing_class, config),
        peft_config=peft_config,
        ref_logps=ref_logps,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # The trainer wraps the forward in its own autocast.
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


class _KnownReferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """A ``DPOTrainer`` that is told log π_ref of its pairs."""

    def __init__(self, *args: Any, ref_logps: npt.NDArray[np.float32] | None, **kwargs: Any) -> None:
        self._ref_logps = ref_logps
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        if self._ref_logps is None:
            return super()._precompute_ref_logps(dataset, *args)
        if len(dataset) != len(self._ref_logps):
            # TRL sets pairs aside whose prompt fills the window; they were none when the reference ran.
            raise ValueError(f"{len(dataset)} of {len(self._ref_logps)} pairs are left of the training set.")
        for side, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            dataset = dataset.add_column(name, self._ref_logps[:, side])
        return dataset
