"""What a preview found: accuracies of every arm, as a table, a figure or a file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.evidence.statistics import holm, paired
from bpo.report.figures import draw_preview
from bpo.report.notebook import records_table
from bpo.report.preview_page import write_preview_page
from bpo.system.files import read_json, write_whole

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.evidence.statistics import Estimate

ALL = "all candidates"
"""Name of the arm that trains on every candidate pair of the training prompts: what no selection loses."""


@dataclasses.dataclass(frozen=True)
class Preview:
    """Held-out preference accuracy of each arm in the linearised regime.

    Attributes:
        arms: (A,) names, :data:`ALL` last.
        budgets: (B,) pairs to train on.
        accuracy: (A, B, S) float64 for each seed: share of the held-out pairs ranked rightly, a tie counting one half.
            NaN where a strategy chose fewer pairs than the budget.
        length_controlled: (A, B, S) likewise: the mean of the accuracies on pairs whose preferred response is the
            longer and the shorter one.
        mean_depth: (A, B, S) pairs of each prompt that has any.
        baseline: Name of the arm that the others are compared with.
        heldout_share: Held-out prompts as a share of all; None if they are a data set of their own.
        n_pairs: Candidate pairs of the training prompts, mean over the seeds.
        n_heldout: Held-out pairs, likewise.
        seconds: What it took.
        settings: What the results depend on.
        left_out: With ``arms="all"``, the strategies that this data or a preview has nothing for: name → reason.
    """

    arms: list[str]
    budgets: list[int]
    accuracy: npt.NDArray[np.float64]
    length_controlled: npt.NDArray[np.float64]
    mean_depth: npt.NDArray[np.float64]
    baseline: str
    heldout_share: float | None
    n_pairs: float
    n_heldout: float
    seconds: float
    settings: dict[str, Any]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Preview({len(self.arms)} arms at {', '.join(map(str, self.budgets))} pairs, "
            f"{self.accuracy.shape[2]} seeds, baseline={self.baseline!r})"
        )

    def _repr_html_(self) -> str:
        rows = [
            (
                row["budget"],
                row["arm"],
                f"{row['accuracy']:.3f}",
                ""
                if row["difference"] is None
                else f"{100 * row['difference']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})",
            )
            for row in self.table()
        ]
        return records_table(repr(self), ("pairs", "arm", "accuracy", f"points above {self.baseline} (95 %)"), rows)

    def difference(self, arm: str, budget: int, *, to: str | None = None, length_controlled: bool = False) -> Estimate:
        """Returns how much more accurate an arm is than another (by default the baseline), paired by seed.

        Re-splits of one data set overlap, which the interval takes into account (Nadeau & Bengio, 2003).

        Raises:
            ValueError: An arm or a budget that is not in the preview, or too few pairs for the budget.
        """
        values = self.length_controlled if length_controlled else self.accuracy
        position = self._position("budget", budget, self.budgets)
        one, other = (
            values[self._position("arm", name, self.arms), position]
            for name in (arm, self.baseline if to is None else to)
        )
        if np.isnan(one - other).any():
            raise ValueError(f"{arm!r} cannot be compared at {budget} pairs: it, or the other arm, chose fewer.")
        return paired(one - other, self.heldout_share)

    def _position(self, what: str, value: Any, known: list[Any]) -> int:
        if value not in known:
            raise ValueError(f"The preview has no {what} {value!r}; it has {', '.join(map(str, known))}.")
        return known.index(value)

    def table(self) -> list[dict[str, Any]]:
        """Returns one record an arm and budget: accuracies, the difference to the baseline with interval and p-value.

        ``standard_error`` is that over the splits of this data; interval and p-value are for new data of this kind.
        p-values are adjusted for all arms of a budget (Holm).
        """
        records = []
        for position, budget in enumerate(self.budgets):
            rows: list[dict[str, Any]] = []
            for index, arm in enumerate(self.arms):
                complete = not np.isnan(self.accuracy[index, position]).any()
                against = arm != self.baseline and complete
                difference = self.difference(arm, budget) if against else None
                values = self.accuracy[index, position] - self.accuracy[self.arms.index(self.baseline), position]
                several = len(values) > 1
                rows.append(
                    {
                        "budget": budget,
                        "arm": arm,
                        "accuracy": float(self.accuracy[index, position].mean()),
                        "length_controlled": float(self.length_controlled[index, position].mean()),
                        "mean_depth": float(self.mean_depth[index, position].mean()),
                        "difference": None if difference is None else difference.mean,
                        "standard_error": float(values.std(ddof=1) / len(values) ** 0.5) if several else math.nan,
                        "low": None if difference is None else difference.low,
                        "high": None if difference is None else difference.high,
                        "p": None if difference is None else difference.p_value,
                    }
                )
            adjusted = holm([math.nan if row["p"] is None else float(row["p"]) for row in rows])
            for row, value in zip(rows, adjusted, strict=True):
                row["p"] = None if row["p"] is None else value
            records += rows
        return records

    def summary(self) -> str:
        """Returns the table as text, and what it says in a sentence for each budget."""
        seeds = self.accuracy.shape[2]
        lines = [
            f"linearised DPO, {seeds} seeds, {self.n_pairs:.0f} candidate and {self.n_heldout:.0f} held-out pairs "
            f"({self.seconds:.1f} s)"
        ]
        records = self.table()
        width = max(len(arm) for arm in self.arms)
        for budget in self.budgets:
            rows = [row for row in records if row["budget"] == budget]
            head = f"difference to {self.baseline}, points (95 %)"
            lines += ["", f"{budget} pairs", f"  {'arm':{width}}  accuracy  length-contr.  depth  {head}   p (Holm)"]
            for row in rows:
                if math.isnan(row["accuracy"]):
                    lines.append(f"  {row['arm']:{width}}  left out, since it cannot choose so many pairs")
                    continue
                difference = ""
                if row["difference"] is not None:
                    difference = (
                        f"{100 * row['difference']:+5.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
                    )
                p = "" if row["p"] is None else f"{row['p']:.3f}"
                lines.append(
                    f"  {row['arm']:{width}}  {row['accuracy']:8.3f}  {row['length_controlled']:13.3f}  "
                    f"{row['mean_depth']:5.1f}  {difference:{len(head)}}  {p:>8}"
                )
            lines.append(f"  {self._verdict(rows)}")
        if self.left_out:
            lines += ["", "left out", *(f"  {name}: {reason}" for name, reason in self.left_out.items())]
        return "\n".join(lines)

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Draws the differences to the baseline into a .svg, .png or .pdf file; needs matplotlib. Returns its path."""
        return draw_preview(self.table(), self.budgets, self.baseline, path)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained HTML page, which says in words what the table means; returns its path."""
        records = self.table()
        return write_preview_page(
            Path(path),
            records,
            self.budgets,
            self.baseline,
            verdicts=[
                (budget, self._verdict([row for row in records if row["budget"] == budget])) for budget in self.budgets
            ],
            seeds=self.accuracy.shape[2],
            **{
                name: getattr(self, name)
                for name in ("n_pairs", "n_heldout", "heldout_share", "seconds", "settings", "left_out")
            },
        )

    def _verdict(self, rows: list[dict[str, Any]]) -> str:
        """Whether the choice of pairs matters at this budget, in a sentence."""
        sure = [row for row in rows if row["p"] is not None and row["p"] < 0.05 and row["arm"] != ALL]
        better = [row["arm"] for row in sure if row["difference"] > 0]
        worse = [row["arm"] for row in sure if row["difference"] < 0]
        found = [f"{' and '.join(names)} {word}" for names, word in ((better, "better"), (worse, "worse")) if names]
        if found:
            return f"than {self.baseline}: {'; '.join(found)}."
        return f"no arm is distinguishable from {self.baseline}."

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes everything as JSON; the file is replaced whole or not at all."""
        path = Path(path)
        values = dataclasses.asdict(self)
        for name in ("accuracy", "length_controlled", "mean_depth"):
            values[name] = [
                [[None if math.isnan(v) else v for v in seeds] for seeds in arm] for arm in values[name].tolist()
            ]
        return write_whole(path, json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Preview:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: A file that is no saved preview.
        """
        try:
            values = read_json(Path(path).read_bytes(), "its text")
            for name in ("accuracy", "length_controlled", "mean_depth"):
                values[name] = np.array(values[name], dtype=np.float64)
            preview = cls(**values)
            preview._check()
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no saved preview: {said}") from None
        return preview

    def _check(self) -> None:
        """Checks values that come from a file.

        Raises:
            ValueError, TypeError: They do not fit together.
        """
        shape = (len(self.arms), len(self.budgets))
        for name in ("accuracy", "length_controlled", "mean_depth"):
            values = getattr(self, name)
            if values.ndim != 3 or values.shape[:2] != shape or values.shape != self.accuracy.shape or not values.size:
                raise ValueError(f"{name} is of shape {values.shape}, for {shape[0]} arms and {shape[1]} budgets")
        if not all(isinstance(arm, str) for arm in self.arms) or self.baseline not in self.arms:
            raise ValueError(f"arms are {self.arms!r} and baseline {self.baseline!r}")
        if not isinstance(self.left_out, dict):
            raise ValueError(f"left_out is {self.left_out!r}")
        if not all(isinstance(budget, int) for budget in self.budgets):
            raise ValueError(f"budgets are {self.budgets!r}")
        share = 0.5 if self.heldout_share is None else self.heldout_share
        if not (0 < share < 1 and all(math.isfinite(n) for n in (self.n_pairs, self.n_heldout, self.seconds))):
            raise ValueError("heldout_share, n_pairs, n_heldout or seconds is out of range")
