"""What an audit found: which labels look wrong, as a table, a page or a file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.data.candidates import Skipped
from bpo.report.audit_page import write_audit_page
from bpo.system.files import read_json, write_whole

if TYPE_CHECKING:
    import numpy.typing as npt

_SHOWN = 12  # groups of a column in a summary


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """Which labels look wrong.

    Attributes:
        pairs: ``pyarrow.Table``, one row a pair whose gradient is usable: ``pair`` (its place among the candidates),
            ``prompt``, ``row`` (of the data), ``chosen`` and ``rejected`` (positions among the prompt's responses),
            ``score_chosen``, ``score_rejected``, ``score_gap``, ``length_chosen`` and ``length_rejected`` (tokens), as
            those of :attr:`bpo.Selection.pairs`; ``margin``, positive where the rest of the data agrees with the label;
            ``wrong``, the probability that the label is wrong, and ``trust``, that it is right.
        prompts: ``pyarrow.Table``, one row a prompt: ``prompt``, ``row``, ``pairs``, ``contradicted`` (the share of its
            labels that the rest disagrees with) and ``wrong`` (the mean probability).
        groups: One record for each value of a column of the data: ``column``, ``value``, ``pairs``, ``prompts``,
            ``contradicted`` with the ends ``low`` and ``high`` of its 95 % interval over prompts (None for a single
            prompt), ``wrong`` (the mean probability) and ``suspects`` (pairs more likely wrong than right).
        worst: The pairs most likely wrong, as records with the texts ``prompt``, ``chosen`` and ``rejected``.
        wrong_share: Share of wrong labels, estimated or as given.
        low: Lower end of its 90 % interval.
        high: Upper end.
        agreement: Share of labels that the rest of the data agrees with.
        p_value: One-sided, of that being no more than chance.
        tells: Whether it is more. Else nothing can be told: every probability is ``wrong_share``.
        one_by_one: Whether labels of one prompt contradict each other, and so testify for each other.
        circles: Share of triples of responses whose labels go round in a circle.
        n_rows: Rows of the data.
        skipped: What of the data could not be used: reason → places.
        seconds: What it took.
        settings: What the results depend on.
    """

    pairs: pa.Table
    prompts: pa.Table
    groups: list[dict[str, Any]]
    worst: list[dict[str, Any]]
    wrong_share: float
    low: float
    high: float
    agreement: float
    p_value: float
    tells: bool
    one_by_one: bool
    circles: float
    n_rows: int
    skipped: dict[str, list[str]]
    seconds: float
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return (
            f"Audit({self.pairs.num_rows} pairs, {self.suspects} more likely wrong than right, "
            f"wrong_share={self.wrong_share:.3f}, tells={self.tells})"
        )

    @property
    def suspects(self) -> int:
        """Pairs whose label is more likely wrong than right."""
        return int((self._column("wrong") > 0.5).sum())

    def row_trust(self) -> list[float | None]:
        """Returns a column for the data, the mean probability that the labels of a row are right.

        Of preference rows that is the pair which a row states; of scored responses the pairs whose preferred response
        it holds. None for rows without a usable pair. ``SelectConfig.trust`` takes the name of such a column; it must
        not have None, so say what such rows are worth.
        """
        rows = self.pairs["row"].to_numpy()
        counts = np.bincount(rows, minlength=self.n_rows)
        sums = np.bincount(rows, weights=self._column("trust"), minlength=self.n_rows)
        return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]

    def summary(self) -> str:
        """Returns what was found, in words."""
        wrong, agreement = self._column("wrong"), f"{self.agreement:.1%} of the labels"
        lines = [
            f"label audit of {self.pairs.num_rows} pairs of {self.prompts.num_rows} prompts ({self.seconds:.1f} s)"
        ]
        against = "the others, those of its own prompt too" if self.one_by_one else "those of other prompts"
        lines.append(f"agreement  {agreement} are as {against} would have them ({self._p()})")
        if self.one_by_one:
            lines.append(
                f"evidence   labels of one prompt contradict each other ({self.circles:.1%} of triples go round in a "
                "circle), so each is taken to be given by itself, and testifies for the others"
            )
        if not self.tells:
            lines.append(
                "cannot tell: that is no more than chance, so nothing is said of single labels. Every probability is "
                f"the base rate of {self.wrong_share:.0%}, which comes "
                + ("as it was given." if self.settings["wrong_share"] is not None else "from no data.")
            )
        else:
            given = self.settings["wrong_share"] is not None
            known = "as given" if given else f"90 % interval {self.low:.1%} to {self.high:.1%}"
            lines.append(f"wrong      {self.wrong_share:.1%} of the labels ({known})")
            tenth = np.sort(wrong)[::-1][: max(1, len(wrong) // 10)]
            lines.append(
                f"suspects   {self.suspects} pairs more likely wrong than right; of the tenth that looks worst "
                f"{tenth.mean():.0%} are expected to be wrong"
            )
            longer = (self._column("length_chosen") > self._column("length_rejected")).astype(np.float64)
            there, every = longer[np.argsort(-wrong, kind="stable")[: len(tenth)]].mean(), longer.mean()
            lines.append(f"length     preferred response longer in {there:.1%} of that tenth, {every:.1%} of all")
        lines += self._group_lines()
        lines.extend(f"unusable   {line}" for line in Skipped(self.skipped).describe().splitlines())
        return "\n".join(lines)

    def _group_lines(self) -> list[str]:
        lines = []
        for column in dict.fromkeys(group["column"] for group in self.groups):
            groups = [group for group in self.groups if group["column"] == column]
            lines += ["", f"by {column}, labels that the rest contradicts (95 %)"]
            width = max(len(str(group["value"])) for group in groups[:_SHOWN])
            for group in groups[:_SHOWN]:
                spread = "" if group["low"] is None else f" ({group['low']:.1%} to {group['high']:.1%})"
                lines.append(
                    f"  {group['value']!s:{width}}  {group['contradicted']:6.1%}{spread}; expected wrong "
                    f"{group['wrong']:.1%}, {group['suspects']} suspects of {group['pairs']} pairs"
                )
            if len(groups) > _SHOWN:
                lines.append(f"  and {len(groups) - _SHOWN} more")
        return lines

    def _p(self) -> str:
        return "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"

    def _column(self, name: str) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = self.pairs[name].to_numpy().astype(np.float64)
        return values

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained HTML page with the pairs that look worst; returns its path."""
        return write_audit_page(
            Path(path),
            self.pairs,
            self.prompts,
            **{name: getattr(self, name) for name in _PLAIN if name != "n_rows"},
            suspects=self.suspects,
            p=self._p(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as JSON has it; the tables as columns."""
        values = {name: getattr(self, name) for name in _PLAIN}
        for name in ("pairs", "prompts"):
            columns = getattr(self, name).to_pydict()
            values[name] = {key: [_plain(value) for value in column] for key, column in columns.items()}
        return {**values, "suspects": self.suspects}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes everything as JSON; the file is replaced whole or not at all."""
        return write_whole(Path(path), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Audit:
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: A file that is no saved audit.
        """
        try:
            values = read_json(Path(path).read_bytes(), "its text")
            values.pop("suspects")
            tables = {name: pa.table(values.pop(name)) for name in ("pairs", "prompts")}
            audit = cls(**tables, **values)
            if not {"row", "wrong", "trust", "length_chosen"} <= set(audit.pairs.column_names):
                raise ValueError("pairs lacks columns")
            audit.summary()
        except (ValueError, TypeError, LookupError, AttributeError, pa.ArrowException) as error:
            said = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path} is no saved audit: {said}") from None
        return audit


_PLAIN = [field.name for field in dataclasses.fields(Audit) if field.name not in ("pairs", "prompts")]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
