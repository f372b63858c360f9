"""TRL's ``DPOConfig`` with what a selection and its rounds need."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from bpo.config import SelectConfig
from bpo.system.files import read_json
from bpo.training.resampling import RESAMPLING
from bpo.training.weighting import WeightedDPOConfig


@dataclasses.dataclass
class BPOConfig(WeightedDPOConfig):
    """TRL's ``DPOConfig`` with what :func:`bpo.select` needs; its loss and its ``max_length`` serve both.

    Attributes:
        budget: Pairs to keep: a whole number, or a fraction of at most 1.0 of the candidates. Required.
        breadth: Prompts to keep, likewise; None for all.
        strategy: Name of the strategy.
        store: Directory or address of the gradient store; None for a temporary one.
        split: Which split of ``train_dataset`` is read, such as ``"train_prefs"``; None is that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``; where
            what is evaluated and the target have them, too, they are called so there.
        select_config: Fields of :class:`bpo.SelectConfig`, as a mapping or as an object, but for those that
            ``DPOConfig`` has, too.
        reselect_strategy: When to select again, with the policy as it has become: ``"no"``, ``"steps"`` (every
            ``reselect_steps``) or ``"epoch"`` (every ``reselect_epochs``).
        reselect_steps: Optimizer steps between two rounds; below 1 a fraction of all steps of the training.
        reselect_epochs: Epochs between two rounds.
        resample: Responses to each prompt that the policy gives anew in each round after the first, in place of those
            of the data; :class:`bpo.BPOTrainer` then needs a ``scorer``. None keeps those of the data.
        learning_progress: κ of the weight σ(κΔ) + ½ that each pair of a later round counts by, as in LPPO (arXiv
            2507.06573), with Δ by how much better the policy ranks the pairs of its prompt than in the rounds before;
            8 in others' code. None weighs no pair so. It takes a strategy that reads gradients, and multiplies with
            the weights of ``weight_column``.
        learning_progress_decay: β of the moving average of how well a prompt is ranked, of which Δ is the change.
        resample_config: Further arguments of :func:`bpo.sample_responses`, such as ``temperature`` or
            ``max_new_tokens``; ``keep_existing`` keeps the responses of the data beside the new ones.

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
    split: str | None = dataclasses.field(default=None, metadata={"help": "Split of the data that is read."})
    columns: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "Columns of the accepted formats and what they are called in the data."}
    )
    select_config: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "Fields of bpo.SelectConfig."}
    )

    reselect_strategy: str = dataclasses.field(
        default="no", metadata={"help": "When to select again with the current policy: no, steps or epoch."}
    )
    reselect_steps: float | None = dataclasses.field(
        default=None, metadata={"help": "Steps between two rounds of selection, or a fraction of all steps."}
    )
    reselect_epochs: int = dataclasses.field(default=1, metadata={"help": "Epochs between two rounds of selection."})
    resample: int | None = dataclasses.field(
        default=None, metadata={"help": "Responses to each prompt that the policy gives anew in each later round."}
    )
    learning_progress: float | None = dataclasses.field(
        default=None, metadata={"help": "Sharpness of weights by learning progress between rounds, such as 8."}
    )
    learning_progress_decay: float = dataclasses.field(
        default=0.8, metadata={"help": "Decay of the moving average whose change is learning progress."}
    )
    resample_config: dict[str, Any] | str | None = dataclasses.field(
        default=None, metadata={"help": "Further arguments of bpo.sample_responses."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.reselect_strategy = getattr(self.reselect_strategy, "value", self.reselect_strategy)
        if self.reselect_strategy not in ("no", "steps", "epoch"):
            raise ValueError(f"reselect_strategy must be 'no', 'steps' or 'epoch', got {self.reselect_strategy!r}")
        steps = self.reselect_steps
        if self.reselect_strategy == "steps" and not (steps and steps > 0 and (steps < 1 or steps == int(steps))):
            raise ValueError(
                "reselect_strategy='steps' needs reselect_steps, a whole number of steps or a fraction below 1 of all "
                f"of them, got {steps!r}"
            )
        if self.reselect_epochs < 1 or self.reselect_epochs != int(self.reselect_epochs):
            raise ValueError(f"reselect_epochs must be a whole number of at least 1, got {self.reselect_epochs!r}")
        for name, kinds in (
            ("select_config", (dict, SelectConfig)),
            ("resample_config", (dict,)),
            ("columns", (dict,)),
        ):
            if isinstance(getattr(self, name), str):
                setattr(self, name, read_json(getattr(self, name), name))
            if not isinstance(getattr(self, name), (*kinds, type(None))):
                raise ValueError(f"{name} must be a mapping of names to values, got {getattr(self, name)!r}")
        if self.resample is not None and self.reselect_strategy == "no":
            raise ValueError("resample needs rounds: set reselect_strategy, too.")
        if self.resample is not None and self.resample < 1:
            raise ValueError(f"resample must be at least 1, got {self.resample!r}")
        unknown = set(self.resample_config or {}) - RESAMPLING
        if unknown:
            raise ValueError(
                f"resample_config has {', '.join(sorted(unknown))}; it takes {', '.join(sorted(RESAMPLING))}."
            )
        self._check_learning_progress()
        for name in ("embedder", "prompt_embeddings"):
            given = self.select_config
            value = given.get(name) if isinstance(given, dict) else getattr(given, name, None)
            if not isinstance(value, (str, os.PathLike, type(None))):
                kind = "a path or hub id" if name == "embedder" else "the name of a column"
                raise ValueError(
                    f"select_config.{name} must be {kind} here, for the settings of a training are saved as JSON; got "
                    f"{type(value).__name__}. Or select with bpo.select, and train with bpo.WeightedDPOTrainer."
                )
        if isinstance(self.select_config, SelectConfig):
            # What was left at its default must not stand against the field of the same name here.
            defaults = SelectConfig().to_dict()
            fields = self.select_config.to_dict()
            self.select_config = {name: value for name, value in fields.items() if value != defaults[name]}
        elsewhere = {"ref_model", "trust_remote_code", "dtype", "device"} & set(self.select_config or {})
        if elsewhere:
            raise ValueError(
                f"select_config has {', '.join(sorted(elsewhere))}, but the trainer decides how models are loaded: use "
                "its ref_model, trust_remote_code or model_init_kwargs."
            )

    def _check_learning_progress(self) -> None:
        """Checks the weights by learning progress."""
        sharpness, decay = self.learning_progress, self.learning_progress_decay
        if sharpness is None:
            return
        if not 0 < sharpness < math.inf or not 0 <= decay < 1:
            raise ValueError(
                "learning_progress must be a finite number above 0 and learning_progress_decay from 0 to below 1, got "
                f"{sharpness!r} and {decay!r}"
            )
        if self.reselect_strategy == "no":
            raise ValueError("learning_progress needs rounds: set reselect_strategy, too.")
        if self.weight_column is None:
            raise ValueError("learning_progress weighs pairs, so weight_column must not be None.")


def count_or_fraction(value: float) -> int | float:
    """A command line gives every number as a float: above 1 it is a count."""
    if value > 1 and value != int(value):
        raise ValueError(f"{value} is neither a whole number nor a fraction of at most 1.0.")
    return int(value) if value > 1 or isinstance(value, int) else value
