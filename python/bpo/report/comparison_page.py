"""The page of a comparison, with its figures inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import markupsafe

from bpo.report.figures import draw_figures
from bpo.report.page import write_page
from bpo.report.wording import MEASURES, STAGES, agreement, interval, p_value, power

if TYPE_CHECKING:
    from collections.abc import Mapping


def write_report(results: Mapping[str, Any], failures: Mapping[str, str], output: Path) -> Path:
    """Writes ``report.html``, one page with its figures inside, and each figure as SVG and PNG in ``figures``.

    Args:
        results: As :func:`bpo.evidence.compare.results.summarize` returns them.
        failures: Runs that failed, and why.
        output: Directory.

    Returns:
        Path of the page.
    """
    figures = draw_figures(results, output / "figures")
    differences = [entry for entry in results["differences"] if entry["measure"] == "accuracy"]
    return write_page(
        "comparison.html",
        output / "report.html",
        about=results["description"],
        arms=results["arms"],
        families=[
            (title, [entry for entry in differences if entry["family"] == family])
            for family, title in (("baseline", "Against the baseline"), ("bpo", "bpo against every other arm"))
        ],
        other_differences=[
            entry
            for entry in results["differences"]
            if entry["measure"] != "accuracy" and entry["family"] == "baseline"
        ],
        measures=[name for name in MEASURES if any(name in arm["measures"] for arm in results["arms"])],
        titles=MEASURES,
        stages=[stage for stage in STAGES if any(stage in arm["seconds"] for arm in results["arms"])],
        failures=failures,
        figures={path.stem: markupsafe.Markup(_inline(path)) for path in figures},
        interval=interval,
        p_value=p_value,
        power=power,
        agreement=[agreement(entry) for entry in results["agreement"]],
    )


def _inline(path: Path) -> str:
    """An SVG file without its XML prologue."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("<svg") :]
