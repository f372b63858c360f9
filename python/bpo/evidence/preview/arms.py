"""The arms of a preview: ways to choose pairs, checked before any data is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bpo.config import SelectConfig
from bpo.evidence.preview.results import ALL
from bpo.selection.strategies.register import STRATEGIES
from bpo.store.gradient_store import GradientStore, with_settings_of
from bpo.store.mirror import holds_store

_FIELDS = {"name", "strategy", "breadth", "select", "store"}

# What a store is made with: an arm with a store of its own has these from there.
_OF_STORES = (
    "features",
    "parameters",
    "factor_dim",
    "lora_rank",
    "preconditioner",
    "sketch_seed",
    "sketch_dim",
    "sketch_kind",
    "sketch_nnz",
    "sketch_dtype",
    "max_length",
    "truncation_mode",
)


@dataclasses.dataclass(frozen=True)
class PreviewArm:
    """One way to choose the pairs.

    Attributes:
        name: Its name in the results.
        strategy: Of :func:`bpo.select`, but ``"less"``.
        breadth: Prompts to keep, a count or a fraction, drawn at random (no encoder runs here); None for all.
        config: Settings of the selection.
        store: Gradient store whose rows it chooses by; None for that of the preview.
    """

    name: str
    strategy: str
    breadth: int | float | None
    config: SelectConfig
    store: str | None = None

    def describe(self) -> dict[str, Any]:
        """Returns what its results depend on, of the settings those that are not the defaults."""
        defaults = SelectConfig().to_dict()
        changed = {name: value for name, value in self.config.to_dict().items() if value != defaults[name]}
        return {"strategy": self.strategy, "breadth": self.breadth, "store": self.store, "select": changed}


def read_budgets(budget: int | Sequence[int]) -> list[int]:
    """Returns pairs to train on, given as one number or several."""
    budgets = [budget] if isinstance(budget, (int, np.integer)) else list(budget)
    for value in budgets:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"budget must be whole numbers of at least 1, got {value!r}")
    if not budgets or len(set(budgets)) < len(budgets):
        raise ValueError(f"budget must be one number or several different ones, got {budget!r}")
    return [int(value) for value in budgets]


EVERY = "all"
"""What stands for every strategy in the place of arms."""


def every_strategy() -> tuple[list[str], dict[str, str]]:
    """Returns the strategies that a preview can have, and why it cannot have the others: name → reason."""
    left_out = {name: "a preview has no target" for name in STRATEGIES if "target" in STRATEGIES[name].needs}
    return [name for name in STRATEGIES if name not in left_out], left_out


def read_arms(arms: Sequence[str | Mapping[str, Any]], baseline: str, config: SelectConfig) -> list[PreviewArm]:
    """Returns the arms with the baseline among them.

    Raises:
        ValueError: Something that is no arm, a strategy that a preview has nothing for, or two of one name.
        FileNotFoundError, bpo.StoreMismatchError: A store that is not there, or was made otherwise than an arm says.
    """
    if isinstance(arms, str):
        raise ValueError(f"arms must be a list of arms, or {EVERY!r} for every strategy, got {arms!r}")
    found: dict[str, PreviewArm] = {}
    for arm in arms:
        values: dict[str, Any] = {"name": arm} if isinstance(arm, str) else dict(arm)
        unknown = sorted(set(values) - _FIELDS)
        if unknown or "name" not in values:
            raise ValueError(f"An arm has a name and any of strategy, breadth, select and store; got {arm!r}.")
        name = values["name"]
        strategy = values.get("strategy", name)
        if strategy not in STRATEGIES:
            raise ValueError(f"The arm {name!r} has strategy {strategy!r}; it must be one of {sorted(STRATEGIES)}.")
        if "target" in STRATEGIES[strategy].needs:
            raise ValueError(f"The arm {name!r}: a preview has no target for strategy {strategy!r}.")
        if name in found or name == ALL:
            raise ValueError(f"Two arms are called {name!r}.")
        select = {"min_depth": 0, **values.get("select", {})}
        if SelectConfig.from_dict(select).trust_column is not None:
            raise ValueError(f"The arm {name!r}: the column of trust is one for all; name it in config.")
        store = values.get("store")
        found[name] = PreviewArm(
            name,
            strategy,
            values.get("breadth"),
            dataclasses.replace(config, **select) if store is None else _settings_with(store, name, config, select),
            None if store is None else os.fspath(store),
        )
    if baseline not in found:
        if baseline not in STRATEGIES:
            raise ValueError(f"baseline must be the name of an arm, got {baseline!r}; there are {', '.join(found)}.")
        found = {**found, **{arm.name: arm for arm in read_arms([baseline], baseline, config)}}
    return list(found.values())


def _settings_with(store: Any, arm: str, config: SelectConfig, select: Mapping[str, Any]) -> SelectConfig:
    """The settings of an arm with a store of its own: what those of all arms say of the gradients is of another store.

    Raises:
        ValueError: Something else than a path.
        FileNotFoundError: No store there.
        StoreMismatchError: ``select`` has another setting of the gradients than the store.
    """
    if not isinstance(store, (str, os.PathLike)):
        raise ValueError(f"The arm {arm!r}: store must be the directory or address of a gradient store, got {store!r}.")
    if not holds_store(store):
        raise FileNotFoundError(f"The arm {arm!r}: {store} holds no gradient store.")
    return with_settings_of(GradientStore.open(store), dataclasses.replace(without_store_settings(config), **select))


def without_store_settings(config: SelectConfig) -> SelectConfig:
    """Returns settings for another store than the one that they were completed from."""
    defaults = SelectConfig()
    return dataclasses.replace(config, **{name: getattr(defaults, name) for name in _OF_STORES})
