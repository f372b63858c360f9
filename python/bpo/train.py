"""Selecting, then training with TRL: the only import of trl."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from trl import DPOConfig, DPOTrainer

from bpo.config import SelectConfig
from bpo.pipeline import select


@dataclasses.dataclass
class BPOConfig(DPOConfig):  # type: ignore[misc]
    """TRL's ``DPOConfig`` with what :func:`bpo.select` needs; ``beta``, ``loss_type`` and ``max_length`` serve both.

    Attributes:
        budget: Pairs to keep: a whole number, or a fraction of at most 1.0 of the candidates. Required.
        breadth: Prompts to keep, likewise; None for all.
        strategy: Name of the strategy.
        store: Directory of the gradient store; None for a temporary one.
        select_config: Fields of :class:`bpo.SelectConfig`, as a mapping or as an object.

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
        if isinstance(self.select_config, SelectConfig):
            if self.select_config.ref_model is not None:
                raise ValueError("Pass ref_model to BPOTrainer instead of putting it into select_config.")
            self.select_config = self.select_config.to_dict()


class BPOTrainer(DPOTrainer):  # type: ignore[misc]
    """A ``DPOTrainer`` that first selects its training pairs with :func:`bpo.select`.

    All arguments are those of TRL's ``DPOTrainer``; ``train_dataset`` is any format that :func:`bpo.select` takes, and
    ``args`` is a :class:`BPOConfig` with a budget.

    Attributes:
        selection: The :class:`bpo.Selection` that is trained on.

    Raises:
        ValueError: No budget, or whatever :func:`bpo.select` refuses.
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
        if len(args.loss_type) != 1:
            raise ValueError(f"BPOTrainer selects for one loss, got loss_type={args.loss_type}.")
        if args.max_length is None:
            raise ValueError("BPOTrainer needs max_length, since selection truncates as training does.")
        settings = {
            **_mapping(args.select_config),
            "beta": args.beta,
            "loss_type": args.loss_type[0],
            "max_length": args.max_length,
            "ref_model": ref_model,
            "trust_remote_code": args.trust_remote_code,
        }
        self.selection = select(
            model,
            train_dataset,
            budget=_count_or_fraction(args.budget),
            breadth=None if args.breadth is None else _count_or_fraction(args.breadth),
            processing_class=processing_class,
            strategy=args.strategy,  # type: ignore[arg-type]
            store=args.store,
            config=SelectConfig.from_dict(settings),
            seed=args.seed,
            progress=not args.disable_tqdm,
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


def _count_or_fraction(value: float) -> int | float:
    """A command line gives every number as a float: above 1 it is a count."""
    if value > 1 and value != int(value):
        raise ValueError(f"{value} is neither a whole number nor a fraction of at most 1.0.")
    return int(value) if value > 1 or isinstance(value, int) else value


def _mapping(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A command line gives a mapping as JSON."""
    return json.loads(value) if isinstance(value, str) else (value or {})
