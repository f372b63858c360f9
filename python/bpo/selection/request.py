"""What is asked of a selection: strategy and settings, and how many pairs and prompts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.config import SelectConfig
from bpo.selection.strategies.register import STRATEGIES

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from bpo.selection.strategies.candidacy import Need, Strategy


@dataclasses.dataclass(frozen=True)
class Request:
    """What all stages of a selection share.

    Attributes:
        strategy: Name of the strategy.
        config: Settings.
        seed: Of every random choice but the sketch.
        store: Directory or address of the gradient store; None for a temporary one.
        progress: Whether to show progress bars.
    """

    strategy: str
    config: SelectConfig
    seed: int
    store: str | os.PathLike[str] | None = None
    progress: bool = False

    @classmethod
    def of(
        cls,
        strategy: str,
        config: SelectConfig | Mapping[str, Any] | None,
        seed: Any,
        *,
        target: Any,
        store: str | os.PathLike[str] | None,
        progress: bool,
    ) -> Request:
        """Checks what is known of a selection before any data.

        Raises:
            ValueError: An unknown strategy, one that needs what is not given, or a seed out of range.
        """
        config = SelectConfig.of(config)
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {sorted(STRATEGIES)}, got {strategy!r}")
        needs = STRATEGIES[strategy].needs_of(config)
        if "target" in needs and target is None:
            raise ValueError(f"strategy={strategy!r} needs a target: pairs that say where to go, as target=…")
        if config.reference_logps and not ("gradients" in needs or config.trust == "audit"):
            raise ValueError(
                f"reference_logps needs log-probabilities, and strategy={strategy!r} computes none: leave it out, or "
                "take a strategy that reads gradients, such as 'bpo'."
            )
        of_one_model = {"differences": "gradients", "logps": "log-probabilities", "reference": "log-probabilities"}
        for need, what in of_one_model.items():
            if need in needs and config.checkpoints is not None:
                raise ValueError(
                    f"strategy={strategy!r} needs the {what} of one model: leave out SelectConfig.checkpoints."
                )
        if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
        return cls(strategy, config, int(seed), store, progress)

    @property
    def rule(self) -> Strategy:
        """The strategy."""
        return STRATEGIES[self.strategy]

    @property
    def needs(self) -> frozenset[Need]:
        """What the strategy reads of the pairs, and what says which labels to trust."""
        needs = self.rule.needs_of(self.config)
        return needs | {"gradients"} if self.config.trust == "audit" else needs

    @property
    def clustering(self) -> SelectConfig:
        """The settings of the clusters: strategies that read gradients but no clusters take all pairs for one."""
        return self.config if "clusters" in self.needs else dataclasses.replace(self.config, n_clusters=1)


def count_of(value: int | float, total: int) -> int:
    """Returns a whole number as it is, and a fraction (a float) of a total as a count of at least 1."""
    if isinstance(value, int):
        return value
    # A product such as 0.29 * 100 must not lose one to rounding.
    return max(1, int(value * total + 1e-9))


def counted(name: str, value: Any, total: int) -> int:
    """Returns a count given as a whole number or as a fraction (a float in (0, 1])."""
    of = {"breadth": "usable prompts", "budget": "candidate pairs of the prompts that can be kept"}[name]
    if isinstance(value, (float, np.floating)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} is neither a whole number nor a fraction above 0 and at most 1.")
        return count_of(float(value), total)
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number or a fraction, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > total:
        raise ValueError(f"{name}={value} is above the {total} {of}; give at most {total}.")
    return int(value)


def check_budget(budget: Any, n_pairs: int, n_prompts: int, strategy: str) -> None:
    """Checks that each of so many prompts can have a pair."""
    if n_pairs < n_prompts:
        given = f"budget={budget}" + (f", which makes {n_pairs}," if isinstance(budget, float) else "")
        fewer = "breadth" if isinstance(budget, float) else f"breadth={n_pairs}"
        raise ValueError(
            f"{given} is below the {n_prompts} prompts: strategy={strategy!r} keeps at least one pair of each. Give a "
            f"budget of at least {n_prompts} pairs, keep fewer prompts with {fewer}, or leave "
            "SelectConfig.min_depth=None, which lets prompts go."
        )
