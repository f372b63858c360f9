"""What the benchmarks print: a row for each measurement, with its ratio and goal."""

from __future__ import annotations

import functools
import importlib
import re
import resource
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the table; ratio is (median, least, greatest), and more is better."""

    name: str
    ours: str
    peer: str
    theirs: str
    ratio: tuple[float, float, float] | None = None
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None or self.ratio is None else self.ratio[0] >= self.goal

    def cells(self) -> list[str]:
        ratio = "" if self.ratio is None else "{}  [{}, {}]".format(*map(shown_ratio, self.ratio))
        goal = "" if self.goal is None else f">= {self.goal:.2f}"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return [self.name, self.ours, self.peer, self.theirs, ratio, goal, met]


@functools.cache
def optional(module: str) -> Any:
    """The module of an optional peer, or None."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def shown_ratio(ratio: float) -> str:
    return f"{ratio:.4f}" if 0.99 < ratio < 1.01 else f"{ratio:.2f}"


def shown_time(seconds: list[float]) -> str:
    value = statistics.median(seconds)
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def shown_rate(amount: float, seconds: list[float], unit: str) -> str:
    return f"{amount / statistics.median(seconds):.3g} {unit}"


def peak_memory() -> float:
    """Most megabytes that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux starts from what the parent held.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def printed(rows: list[Row]) -> str:
    lines = [["", "ours", "peer or limit", "theirs", "ratio  [least, greatest]", "goal", "met"]]
    previous = ""
    for row in rows:
        name, *cells = row.cells()
        lines.append(["" if name == previous else name, *cells])
        previous = name
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
