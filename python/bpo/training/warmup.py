"""The warm-up before a selection, as in LESS: a short training with TRL whose checkpoints give the gradients."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

from peft import LoraConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig, DPOTrainer

import bpo
from bpo.choices import SEED
from bpo.config import SelectConfig
from bpo.data.tokenizers import load_tokenizer
from bpo.policy.models import plain
from bpo.selection.select import select
from bpo.system.files import read_json, write_whole
from bpo.system.paths import check_path, is_adapter
from bpo.training.load import adapter_to_train

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
    seed: int = SEED,
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
            adapter_to_train(name, args) if is_adapter(name) else name,
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


def _known_warm_up(directory: Path, settings: dict[str, Any]) -> dict[str, float] | None:
    """Returns the checkpoints of a finished warm-up; None if there is none, or one to go on with.

    Raises:
        ValueError: A warm-up with other settings, or one whose file is damaged.
        FileExistsError: Something else.
    """
    manifest = directory / _WARM_UP
    if manifest.is_file():
        saved = read_json(manifest.read_bytes(), manifest)
        there = saved.get("settings") if isinstance(saved, dict) else None
        rates = saved.get("checkpoints", {}) if isinstance(saved, dict) else None
        if not isinstance(there, dict) or not isinstance(rates, dict) or not all(map(_is_rate, rates.values())):
            raise ValueError(f"{manifest} is damaged: it does not say what the warm-up is of. Name another output_dir.")
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


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    write_whole(directory / _WARM_UP, json.dumps(manifest, indent=1) + "\n")


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
