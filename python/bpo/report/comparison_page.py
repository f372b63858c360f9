"""The page of a comparison, with its figures inside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import markupsafe

from bpo.report.figures import draw_figures
from bpo.report.page import write_page
from bpo.report.wording import MEASURES, STAGES, agreement, interval, p_value, pairs_at, power

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SURE = 0.05
_TITLES = {
    "accuracy": "Held-out accuracy of each arm",
    "budgets": "Accuracy against the number of pairs",
    "differences": "Paired differences of accuracy",
    "agreement": "Accuracy after training against that in the linearised regime",
    "costs": "Seconds of each stage",
}


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
        verdicts=_verdicts(differences),
        figure_titles=_TITLES,
        figures={path.stem: markupsafe.Markup(_inline(path)) for path in figures},
        interval=interval,
        p_value=p_value,
        power=power,
        agreement=[agreement(entry) for entry in results["agreement"]],
    )


def _verdicts(differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """What can be said of each budget: which arms differ from the baseline by more than chance."""
    said = []
    entries = [entry for entry in differences if entry["family"] == "baseline"]
    for budget in dict.fromkeys(entry["budget"] for entry in entries):
        here = [entry for entry in entries if entry["budget"] == budget]
        sure = [entry for entry in here if entry["p_value_holm"] is not None and entry["p_value_holm"] < _SURE]
        better, worse = ([entry["arm"] for entry in sure if (entry["mean"] > 0) == up] for up in (True, False))
        found = [f"{' and '.join(arms)} {word}" for arms, word in ((better, "better"), (worse, "worse")) if arms]
        against = here[0]["against"]
        if found:
            said.append(f"At {pairs_at(budget)}, than {against}: {'; '.join(found)} (p < {_SURE:g} after Holm).")
        elif all(entry["p_value_holm"] is None for entry in here):
            said.append(f"At {pairs_at(budget)}: too few seeds to tell chance.")
        else:
            said.append(
                f"At {pairs_at(budget)}, no arm is distinguishable from {against}; the tables say what would be."
            )
    return said or ["There is nothing to compare with a baseline."]


def _inline(path: Path) -> str:
    """An SVG file without its XML prologue; its ids, which figures have in common, begin with its name."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{path.stem}-", text[text.index("<svg") :])
