"""What a comparison of strategies is made of, read from YAML and validated before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig

from bpo.config import SelectConfig
from bpo.evidence.compare.yaml_file import read_yaml
from bpo.evidence.win_rates import ScorerConfig
from bpo.selection.strategies.register import STRATEGIES
from bpo.store.mirror import holds_store
from bpo.system.paths import check_path, expanded, is_adapter
from bpo.training.dpo import dpo_config, dpo_config_fields
from bpo.training.settings import SHARED

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
UNTRAINED = "untrained"
"""The arm that every comparison has: the starting policy."""

_MOST_SEED = 2**32  # what NumPy's global generator, which Trainer seeds, takes

# What a store of gradients is made with, so that one store cannot serve two arms that differ in it.
_OF_GRADIENTS = (
    "token_weights",
    "features",
    "parameters",
    "factor_dim",
    "lora_rank",
    "preconditioner",
    "checkpoints",
    "sketch_seed",
    "sketch_dim",
    "sketch_kind",
    "sketch_nnz",
    "sketch_dtype",
    "bf16",
    "dtype",
)

# A policy is trained against where it started, whose log π is of tokens that count once; and every seed
# has one set of gradients.
_NO_SELECT = ("ref_model", "reference_logps", "token_weights", "checkpoints")
_NO_TRAINING = (
    "output_dir",
    "seed",
    "data_seed",
    "save_strategy",
    "eval_strategy",
    "report_to",
    "disable_tqdm",
    "push_to_hub",
    "resume_from_checkpoint",
    "precompute_ref_log_probs",
    "sync_ref_model",
    "token_weights",
)
_ALIASES = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "lr": "learning_rate",
    "steps": "max_steps",
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to choose the pairs.

    Attributes:
        name: In results and file names.
        strategy: Of :func:`bpo.select`.
        breadth: Prompts to keep, as of :func:`bpo.select`.
        select: Settings of the selection.
        store: Directory of a gradient store of its own that is there already; None for that of the comparison.
    """

    name: str
    strategy: str
    breadth: int | float | None
    select: SelectConfig
    store: str | None = None

    @property
    def needs_gradients(self) -> bool:
        """Whether it selects by gradients."""
        return "gradients" in STRATEGIES[self.strategy].needs_of(self.select)

    @property
    def needs_target(self) -> bool:
        """Whether it selects toward target pairs."""
        return "target" in STRATEGIES[self.strategy].needs_of(self.select)

    @property
    def needs_model(self) -> bool:
        """Whether selecting runs the policy though the gradients are there: it embeds the prompts."""
        return self.breadth is not None and self.select.embedder is None and self.select.prompt_embeddings is None

    def settings(self) -> dict[str, Any]:
        """Returns what the arm's results depend on, as plain values."""
        values = self.select.to_dict()
        for name in ("threads", "max_memory"):  # results do not depend on them
            values.pop(name)
        return {"strategy": self.strategy, "breadth": self.breadth, "store": self.store, "select": values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of :func:`bpo.compare`, as fields or as a YAML file of them.

    Attributes:
        model: Path or hub id of the starting policy, which is also the reference, or of its adapter.
        dataset: Preference data in any format of :func:`bpo.select`; in YAML a path or hub id.
        split: Which split of ``dataset`` is read, such as ``"train_prefs"``; None is that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``; where
            ``heldout`` is data that has them, too, they are called so there.
        heldout: What trained policies are measured on: a fraction of the prompts, drawn anew for each seed, or a second
            data set, which is the same for every seed.
        heldout_prompts: Held-out prompts, as a count in place of a fraction; of a second data set that many of the
            first.
        train_prompts: Prompts to select from, drawn anew for each seed; None for all that are not held out.
        target_prompts: Prompts, drawn anew for each seed, whose pairs are the target of strategies that need one, such
            as ``"less"``. They are neither selected from nor evaluated on.
        seeds: How many, counted from 0, or which. A seed is a split of the prompts, a seed of the selection and one of
            the training, the same for every arm, so that arms are compared in pairs.
        budget: Pairs to train on, one number or several: a count, or a fraction (a float in (0, 1]) of the pairs of the
            training prompts.
        breadth: Prompts that arms keep unless they say otherwise, as of :func:`bpo.select`.
        arms: Names of strategies, or mappings with a ``name`` and any of ``strategy`` (by default that of the name),
            ``breadth``, ``select`` (fields of :class:`bpo.SelectConfig` on top of those for all arms) and ``store``.
            ``"pairs"`` is ``"random"`` with one pair a prompt at most: the ordinary (n, 2) preference set.
        baseline: The arm that all others are compared with.
        store: Gradient store of the data that is there already; None makes one beside the results.
        processing_class: Path of the tokenizer; None for that of the model.
        select: Fields of :class:`bpo.SelectConfig` for all arms. Those of the loss and ``max_length`` are taken from
            ``training``.
        training: Fields of TRL's ``DPOConfig``, with its defaults, and ``peft``: fields of PEFT's ``LoraConfig``, or
            None to train every weight. By default LoRA of rank 8 on every linear layer.
        evaluate: ``max_pairs_per_prompt`` (held-out pairs of a prompt, those with the largest score gap; all by
            default), ``tokens_per_batch`` and ``bf16`` (off by default: it rounds off as much as a short training
            changes).
        scorer: What says which of two responses is better, for the win rate of each trained policy against the starting
            policy on responses to held-out prompts: one of ``function`` (``MODULE:FUNCTION`` of a prompt and a
            response), ``reward_model`` (path) and ``judge`` (address of a server, with ``model``, its name there, and
            any of ``mode``, ``criteria``, ``max_tokens``, ``concurrency`` and ``requests_per_minute``); and any of
            ``n_responses`` (1), ``temperature`` (1.0), ``top_p`` (0.95), ``max_new_tokens`` (256) and ``batch_size``
            (32), as of :func:`bpo.sample_responses`. None samples nothing.
        shared: What ``select`` and ``training`` say of the selection of every arm.

    Raises:
        ValueError: A value out of range; the message names the field.
        FileNotFoundError: A path that does not exist.

    Example:
        >>> config = CompareConfig.of({"model": "org/model", "dataset": "data.jsonl", "budget": 60, "seeds": [0, 1],
        ...                            "arms": ["random", {"name": "deep", "strategy": "uniform", "breadth": 0.5}]})
        >>> [(arm.name, arm.strategy, arm.breadth) for arm in config.arms]
        [('random', 'random', None), ('deep', 'uniform', 0.5)]
    """

    model: str
    dataset: Any
    budget: Any
    split: str | None = None
    columns: Mapping[str, str] | None = None
    heldout: Any = None
    heldout_prompts: int | None = None
    train_prompts: int | None = None
    target_prompts: int | None = None
    seeds: Any = 5
    breadth: int | float | None = None
    arms: Any = ("bpo", "uniform", "random", "best_worst", "margin")
    baseline: str = "random"
    store: str | None = None
    processing_class: str | None = None
    select: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluate: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scorer: Any = None
    shared: SelectConfig = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        def set_(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("model", "baseline"):
            if not isinstance(getattr(self, name), (str, os.PathLike)):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
            set_(name, os.fspath(getattr(self, name)))
        for name in ("store", "processing_class"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (str, os.PathLike)):
                raise ValueError(f"{name} must be a path, got {value!r}")
            set_(name, None if value is None else os.fspath(value))
        with _field("model"):
            check_path(self.model)
        if self.dataset is None:
            raise ValueError("dataset is missing: a path, a hub id, or data")
        for name in ("heldout_prompts", "train_prompts", "target_prompts"):
            if getattr(self, name) is not None:
                set_(name, _count(name, getattr(self, name)))
        if self.split is not None and not isinstance(self.split, str):
            raise ValueError(f"split must be text, got {self.split!r}")
        if self.columns is not None and not isinstance(self.columns, Mapping):
            raise ValueError(f"columns must be a mapping such as {{'prompt': 'question'}}, got {self.columns!r}")
        if self.heldout is None and self.heldout_prompts is None:
            set_("heldout", 0.25)
        if isinstance(self.heldout, (int, float)):
            if isinstance(self.heldout, bool) or not 0 < self.heldout < 1:
                raise ValueError(f"heldout must be a fraction above 0 and below 1, or data, got {self.heldout!r}")
            if self.heldout_prompts is not None:
                raise ValueError("heldout and heldout_prompts both say how many prompts are held out; give one.")
        set_("seeds", _seeds(self.seeds))
        set_("budget", _budgets(self.budget))
        for name in ("select", "training", "evaluate"):
            value = getattr(self, name)
            if value is None:
                set_(name, {})
            elif not isinstance(value, Mapping):
                raise ValueError(f"{name} must be a mapping of fields to values, got {value!r}")
        if self.scorer is not None and not isinstance(self.scorer, ScorerConfig):
            if not isinstance(self.scorer, Mapping):
                raise ValueError(f"scorer must be a mapping of fields to values, got {self.scorer!r}")
            set_("scorer", ScorerConfig.of(self.scorer))
        set_("training", _training(self.training, self.model))
        self._check_evaluate()
        set_("shared", self._shared_select())
        set_("arms", self._arms())
        for arm in self.arms:
            if not isinstance(arm.select.prompt_embeddings, (str, type(None))):
                raise ValueError("select.prompt_embeddings must be the name of a column: splits take rows of the data")
        names = [arm.name for arm in self.arms]
        aimless = next((arm.name for arm in self.arms if arm.needs_target and self.target_prompts is None), None)
        if aimless is not None:
            raise ValueError(f"target_prompts must be given for the arm {aimless!r}, which selects toward a target")
        if self.baseline not in names:
            raise ValueError(f"baseline must be one of the arms {', '.join(names)}, got {self.baseline!r}")
        if self.store is not None and not holds_store(expanded(self.store)):
            raise FileNotFoundError(f"store: {self.store} holds no gradient store; leave it out to have one made.")

    @classmethod
    def of(cls, value: Any) -> CompareConfig:
        """Returns a configuration given as such, as a mapping, or as the path of a YAML file.

        Raises:
            TypeError: Anything else.
            ValueError: A file that is no YAML, a name that is no field, or a value out of range.
            FileNotFoundError: No such file.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, os.PathLike)):
            values = read_yaml(Path(value).expanduser())
            try:
                return cls.of(values)
            except ValueError as error:
                raise ValueError(f"{value}: {error}") from error
        if not isinstance(value, Mapping):
            raise TypeError(f"config must be a mapping, a YAML file or a CompareConfig, not {type(value).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        _check_names("", value, known)
        missing = [name for name in ("model", "dataset", "budget") if value.get(name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given")
        return cls(**value)

    @property
    def splits(self) -> bool:
        """Whether held-out prompts are drawn from the data set."""
        return self.heldout is None or isinstance(self.heldout, float)

    @property
    def more_columns(self) -> set[str]:
        """Columns of the data beside prompts, responses and scores that some arm reads."""
        return {arm.select.prompt_embeddings for arm in self.arms} - {None}

    @property
    def needs_store(self) -> bool:
        """Whether some arm reads the gradients of the comparison's own store."""
        return any(arm.needs_gradients and arm.store is None for arm in self.arms)

    @property
    def eval_bf16(self) -> bool:
        """Whether policies are evaluated under bfloat16 autocast."""
        return bool(self.evaluate["bf16"])

    @property
    def evaluation(self) -> SelectConfig:
        """Settings with which policies are evaluated."""
        values = {name: self.evaluate[name] for name in ("tokens_per_batch", "bf16")}
        return dataclasses.replace(self.shared, **values)

    @property
    def peft_config(self) -> LoraConfig | None:
        """The adapter to train; None for every weight, or for that of the model."""
        fields = self.training.get("peft")
        return None if fields is None else LoraConfig(**fields)

    def settings(self) -> dict[str, Any]:
        """Returns what all results depend on beside model, data and arms, as plain values."""
        return {
            "heldout": self.heldout if self.splits else "a data set",
            "heldout_prompts": self.heldout_prompts,
            "train_prompts": self.train_prompts,
            "target_prompts": self.target_prompts,
            "training": dict(self.training),
            "evaluate": dict(self.evaluate),
            "scorer": None if self.scorer is None else dataclasses.asdict(self.scorer),
        }

    def _check_evaluate(self) -> None:
        fields = ("max_pairs_per_prompt", "tokens_per_batch", "bf16")
        _check_names("evaluate.", self.evaluate, fields)
        values = {"max_pairs_per_prompt": None, "tokens_per_batch": None, "bf16": False, **self.evaluate}
        with _field("evaluate"):
            SelectConfig(**values)
        object.__setattr__(self, "evaluate", values)

    def _shared_select(self) -> SelectConfig:
        """Brings together the settings of training and of selection, which must agree."""
        given = dict(self.select)
        for name in _NO_SELECT:
            if given.get(name) is not None:
                raise ValueError(f"select.{name} cannot be set in a comparison")
        peft = self.training.get("peft")
        if peft is not None and self.store is None:
            given.setdefault("lora_rank", LoraConfig(**peft).r)
        args = dpo_config(self.training, ".", 0)
        if args.ld_alpha not in (None, 1.0):
            raise ValueError("training.ld_alpha: a response has no gradient of its own then; leave it out")
        with _field("select"):
            asked = SelectConfig.from_dict(given)
        shared = {name: getattr(args, name) for name in SHARED}
        with _field("training"):
            config = SelectConfig.from_dict({**given, **shared})
        for name in SHARED:
            if name in given and getattr(asked, name) != getattr(config, name):
                raise ValueError(
                    f"select.{name} is {given[name]!r}, but training has {shared[name]!r}; set it under training only"
                )
        return config

    def _arms(self) -> tuple[Arm, ...]:
        if not isinstance(self.arms, (list, tuple)) or not self.arms:
            raise ValueError(f"arms must be a list of strategies, got {self.arms!r}")
        arms = tuple(self._arm(f"arms[{index}]", given) for index, given in enumerate(self.arms))
        names = [arm.name for arm in arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"arms has {twice!r} twice; give each arm a name of its own")
        return arms

    def _arm(self, place: str, given: Any) -> Arm:
        if isinstance(given, Arm):
            return given
        if isinstance(given, str):
            given = {"name": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"{place} must be the name of a strategy or a mapping, got {given!r}")
        _check_names(f"{place}.", given, ("name", "strategy", "breadth", "select", "store"))
        name = given.get("name", given.get("strategy"))
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name == UNTRAINED:
            raise ValueError(
                f"{place}.name must be of letters, digits and . _ + -, and not {UNTRAINED!r}, got {name!r}"
            )
        select = given.get("select") or {}
        if not isinstance(select, Mapping):
            raise ValueError(f"{place}.select must be a mapping of fields to values, got {select!r}")
        strategy = given.get("strategy", name)
        if strategy == "pairs" and strategy not in STRATEGIES:
            strategy, select = "random", {"max_depth": 1, **select}
        if strategy not in STRATEGIES:
            raise ValueError(f"{place}.strategy must be one of {', '.join(sorted(STRATEGIES))}, got {strategy!r}")
        for field in select:
            if field in SHARED:
                raise ValueError(f"{place}.select.{field} is the same for all arms: set it under training")
            if field in (*_OF_GRADIENTS, *_NO_SELECT) and given.get("store") is None:
                raise ValueError(
                    f"{place}.select.{field} is a setting of the gradients, which are computed once for all arms: set "
                    f"it under select, or give {place}.store, a gradient store that was made with it"
                )
        with _field(f"{place}.select"):
            config = SelectConfig.from_dict({**_fields(self.shared), **select})
        store = given.get("store")
        if store is not None and not holds_store(expanded(store)):
            raise FileNotFoundError(f"{place}.store: {store} holds no gradient store")
        breadth = given.get("breadth", self.breadth)
        if breadth is not None and (isinstance(breadth, bool) or not isinstance(breadth, (int, float))):
            raise ValueError(f"{place}.breadth must be a count or a fraction, got {breadth!r}")
        return Arm(name, strategy, breadth, config, None if store is None else os.fspath(store))


class _field:  # noqa: N801
    """Puts the name of a field in front of an error's message."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self.name}: {error}") from error
        if isinstance(error, (ValueError, TypeError)):
            raise ValueError(f"{self.name}: {error}") from error


def _check_names(prefix: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            alias = _ALIASES.get(name) if _ALIASES.get(str(name)) in known else None
            hint = f"; did you mean {alias or close[0]}?" if alias or close else f"; there are {', '.join(known)}"
            raise ValueError(f"{prefix}{name} is no field{hint}")


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return value


def _seeds(given: Any) -> tuple[int, ...]:
    if isinstance(given, int) and not isinstance(given, bool):
        return tuple(range(_count("seeds", given)))
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"seeds must be a count or a list of whole numbers, got {given!r}")
    for seed in given:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < _MOST_SEED:
            raise ValueError(f"seeds must be whole numbers from 0 to 2**32 - 1, got {seed!r}")
    if len(set(given)) < len(given):
        raise ValueError(f"seeds has a seed twice: {list(given)}")
    return tuple(given)


def _budgets(given: Any) -> tuple[int | float, ...]:
    budgets = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for budget in budgets:
        number = isinstance(budget, (int, float)) and not isinstance(budget, bool) and math.isfinite(budget)
        if not number or budget <= 0 or (isinstance(budget, float) and budget > 1):
            raise ValueError(f"budget must be a count of pairs, a fraction of at most 1.0, or several, got {budget!r}")
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(f"budget must be distinct numbers, got {given!r}")
    return budgets


def _training(given: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Checks the settings of training; says what adapter there is by default."""
    _check_names("training.", given, [*dpo_config_fields(), "peft"])
    for name in _NO_TRAINING:
        if name in given:
            raise ValueError(f"training.{name} is decided by the comparison; leave it out")
    values = dict(given)
    adapter = is_adapter(model)
    if adapter and values.get("peft") is not None:
        raise ValueError(f"training.peft: {model} is an adapter, which is trained further; leave peft out")
    if not adapter and "peft" not in values:
        values["peft"] = {"r": 8, "target_modules": "all-linear"}
    if values.get("peft") is not None:
        if not isinstance(values["peft"], Mapping):
            raise ValueError(f"training.peft must be a mapping of LoraConfig's fields, got {values['peft']!r}")
        values["peft"] = {"task_type": "CAUSAL_LM", **values["peft"]}
        _check_names("training.peft.", values["peft"], [field.name for field in dataclasses.fields(LoraConfig)])
        with _field("training.peft"):
            LoraConfig(**values["peft"])
    with _field("training"):
        dpo_config(values, ".", 0)
    return values


def _fields(config: SelectConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
