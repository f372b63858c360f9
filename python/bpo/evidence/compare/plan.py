"""What all runs of a comparison share: settings, data and how it is split, gradients and the reference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

import bpo
from bpo.config import SelectConfig
from bpo.evidence.compare.files import damaged, read
from bpo.system.files import differing, flattened

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from bpo.evidence.compare.config import Arm, CompareConfig
    from bpo.evidence.compare.data import ComparedPairs
    from bpo.evidence.compare.files import ComparisonFiles

# Keeps the draw of a split apart from those of the selection with the same seed.
_SPLIT = 1


_RUN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "seed": int,
    "arm": str,
    "budget": (int, float),
    "arm_settings": dict,
    "n_pairs": int,
    "n_prompts": int,
    "warnings": list,
    "pairs": list,
    "heldout_pairs": list,
    "measures": dict,
    "correct": list,
    "seconds": dict,
}


@dataclasses.dataclass(frozen=True)
class Task:
    """One run: a seed, an arm and a budget."""

    seed: int
    arm: Arm
    budget: int | float

    @property
    def name(self) -> str:
        """In file names and messages."""
        return f"seed{self.seed}-{self.arm.name}-{self.budget}"


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The pairs of one seed.

    Attributes:
        train: (·,) int64, ascending, the pairs to select from.
        heldout: Likewise, those to evaluate on.
        target: Likewise, those to select toward.
    """

    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything that runs share.

    Attributes:
        config: Settings.
        files: Where results go.
        pool: Pairs that training and, where ``heldout`` is None, held-out pairs are drawn from.
        heldout: Pairs of held-out data that is given.
        train_ref_logps: (S,) float32, log π_ref of each sequence of ``pool`` in the precision of training, which may be
            another than that of evaluation; None where it is not known, so that TRL runs the reference.
        store: Gradient store; None where there is none and no arm needs it.
        costs: Seconds of what was computed once, by stage.
        threads: Of one run; None for all.
    """

    config: CompareConfig
    files: ComparisonFiles
    pool: ComparedPairs
    heldout: ComparedPairs | None
    train_ref_logps: npt.NDArray[np.float32] | None = None
    store: Path | None = None
    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    threads: int | None = None

    @property
    def evaluated(self) -> ComparedPairs:
        """Where held-out pairs are."""
        return self.pool if self.heldout is None else self.heldout

    def prompts(self, pairs: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Returns the prompts of held-out pairs, with what the chat template gets beside them."""
        data = self.evaluated
        _, first = np.unique(data.prompt_of_pair[pairs], return_index=True)
        names = ("prompt", "tools", "chat_template_kwargs")
        return [{name: data.rows[pair][name] for name in names if name in data.rows[pair]} for pair in pairs[first]]

    def split(self, seed: int) -> Split:
        """Draws the prompts of a seed."""
        config = self.config
        order = np.random.default_rng([seed, _SPLIT]).permutation(len(self.pool.prompt_ids))
        n_train, n_heldout = self.counts()
        most = config.evaluate["max_pairs_per_prompt"]
        if self.heldout is None:
            heldout, order = self.pool.of_prompts(order[:n_heldout], most), order[n_heldout:]
        else:
            heldout = self.heldout.of_prompts(np.arange(n_heldout), most)
        n_target = config.target_prompts or 0
        train = self.pool.of_prompts(order[n_target : n_target + n_train])
        return Split(train, heldout, self.pool.of_prompts(order[:n_target]))

    def counts(self) -> tuple[int, int]:
        """Returns the numbers of training and of held-out prompts.

        Raises:
            ValueError: More than there are.
        """
        config, n = self.config, len(self.pool.prompt_ids)
        if self.heldout is None:
            n_heldout = config.heldout_prompts or max(1, round(config.heldout * n))
            n_rest = n - n_heldout
        else:
            there = len(self.heldout.prompt_ids)
            n_heldout, n_rest = config.heldout_prompts or there, n
            if n_heldout > there:
                raise ValueError(f"heldout_prompts={n_heldout} is above the {there} prompts of heldout.")
        n_rest -= config.target_prompts or 0
        if n_rest < 1:
            apart = "heldout_prompts and target_prompts" if config.target_prompts else f"heldout_prompts={n_heldout}"
            raise ValueError(f"{apart} leave none of the {n} prompts to train on.")
        n_train = config.train_prompts or n_rest
        if n_train > n_rest:
            raise ValueError(f"train_prompts={n_train} is above the {n_rest} prompts that are left to train on.")
        return n_train, n_heldout

    def finished(self, task: Task) -> bool:
        """Whether a run is there."""
        return self.files.run(task.name).is_file()

    def read_run(self, path: Path) -> dict[str, Any]:
        """Reads a finished run.

        Raises:
            ValueError: It is damaged; the message names the file.
        """
        run = read(path, _RUN_FIELDS)
        held, n_pairs = len(run["heldout_pairs"]), len(self.pool.rows)
        for name, most in (("pairs", n_pairs), ("turned", n_pairs), ("heldout_pairs", len(self.evaluated.rows))):
            pairs = run.get(name, [])
            if not isinstance(pairs, list) or not all(type(pair) is int and 0 <= pair < most for pair in pairs):
                raise damaged(path, f"its {name} are not numbers of pairs from 0 to {most - 1}")
        if len(run["correct"]) != held or not {*run["correct"]} <= {0.0, 0.5, 1.0}:
            raise damaged(path, f"it does not say of the {held} held-out pairs which are ranked rightly")
        for name in ("measures", "seconds"):
            if not all(value is None or isinstance(value, (int, float)) for value in run[name].values()):
                raise damaged(path, f"its {name} are not numbers")
        if not isinstance(run["arm_settings"].get("select"), dict):
            raise damaged(path, "it does not say what was selected with")
        return run

    def check(self, task: Task) -> None:
        """Checks that a run that is there is of the same arm.

        Raises:
            ValueError: It is of an arm of that name with other settings, or damaged.
        """
        if not self.finished(task):
            return
        path = self.files.run(task.name)
        run = self.read_run(path)
        if (run["seed"], run["arm"], run["budget"]) != (task.seed, task.arm.name, task.budget):
            raise damaged(path, f"it is of seed {run['seed']}, arm {run['arm']!r}, budget {run['budget']}")
        if not np.array_equal(run["heldout_pairs"], self.split(task.seed).heldout):
            raise damaged(path, "its held-out pairs are not those of the seed")
        # A setting that there was none of when the run was made is as if at its default.
        defaults = SelectConfig().to_dict()
        there, here = (
            flattened({**settings, "select": {**defaults, **settings["select"]}})
            for settings in (run["arm_settings"], task.arm.settings())
        )
        changed = differing(there, here)
        if changed:
            raise ValueError(
                f"{self.files.directory} holds runs of the arm {task.arm.name!r} with another {', '.join(changed)}: "
                f"{changed[0]} is {there.get(changed[0])!r} there and {here.get(changed[0])!r} here. Give the arm "
                "another name, or name another output."
            )

    def description(self) -> dict[str, Any]:
        """Returns what a report says of the comparison as a whole."""
        n_train, n_heldout = self.counts()
        config = self.config
        first = self.split(config.seeds[0])
        return {
            "bpo": bpo.__version__,
            "model": config.model,
            "dataset": config.dataset if isinstance(config.dataset, str) else type(config.dataset).__name__,
            "heldout": "prompts of the data set" if self.heldout is None else "a data set of its own",
            "heldout_share": n_heldout / len(self.pool.prompt_ids) if self.heldout is None else None,
            "n_train_prompts": n_train,
            "n_heldout_prompts": n_heldout,
            "n_train_pairs": len(first.train),
            "n_heldout_pairs": len(first.heldout),
            "heldout_prompt_of_pair": None
            if self.heldout is None
            else self.heldout.prompt_of_pair[first.heldout].tolist(),
            "seeds": list(config.seeds),
            "budgets": list(config.budget),
            "arms": [
                {"name": arm.name, "strategy": arm.strategy, "needs_gradients": arm.needs_gradients}
                for arm in config.arms
            ],
            "baseline": config.baseline,
            "training": dict(config.training),
            "evaluate": dict(config.evaluate),
            "seconds": self.costs,
            "n_responses": len(self.pool.tokenized.ids),
            "n_tokens": int(self.pool.tokenized.lengths.sum()),
        }
