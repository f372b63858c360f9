"""Figures of comparisons, previews and selections."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.report.charts import pair_axes, reach
from bpo.report.wording import STAGES, pairs_at
from bpo.system.files import replacing
from bpo.system.optional import import_matplotlib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    import pyarrow as pa

    from bpo.report.charts import Axis

_INK, _SOFT, _STRONG, _PALE, _ACCENT = "#1b1f24", "#5c6670", "#1f5fa8", "#c9d6e6", "#c2410c"


# Neither a date nor random ids, so that the same results are the same file; text stays text.
_STYLE = {"svg.hashsalt": "bpo", "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": _SOFT}


def draw_figures(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws accuracy, differences, budgets (where there are several), agreement with the linearised regime, and costs.

    Args:
        results: As :func:`bpo.evidence.compare.results.summarize` returns them.
        directory: Where ``NAME.svg`` and ``NAME.png`` go.

    Returns:
        Paths of the SVG files.
    """
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawings: dict[str, Callable[..., bool]] = {
        "accuracy": _accuracy,
        "differences": _differences,
        "budgets": _budgets,
        "agreement": _agreement,
        "costs": _costs,
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in drawings.items():
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            if not draw(figure, results):
                continue
            paths.append(_save(figure, directory / f"{name}.svg"))
            _save(figure, directory / f"{name}.png")
    return paths


def draw_preview(
    records: Sequence[Mapping[str, Any]], budgets: Sequence[int], baseline: str, path: str | os.PathLike[str]
) -> Path:
    """Draws how much more accurate each arm of a preview is than the baseline, one panel a budget.

    Args:
        records: As :meth:`bpo.Preview.table` returns them.
        budgets: Pairs to train on.
        baseline: Name of the arm that the others are compared with.
        path: File to write, whose name ends in .svg, .png or .pdf; replaced whole or not at all.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A name that ends otherwise.
    """
    records = [row for row in records if row["difference"] is not None]
    with _figure(path) as figure:
        names = list(dict.fromkeys(row["arm"] for row in records))
        figure.set_size_inches(2.2 + 3.4 * len(budgets), 1.0 + 0.25 * len(names))
        axes = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)[0]
        limit = 100 * reach(records)  # an arm beyond is told in words
        for axis, budget in zip(axes, budgets, strict=True):
            _preview_panel(axis, [row for row in records if row["budget"] == budget], names, limit)
            axis.set_title(pairs_at(budget), loc="left")
        axes[0].set_yticks(range(len(names)), names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        axes[0].set_xlim(-limit, limit)
        figure.supxlabel(
            f"points of accuracy above {baseline}: ± standard error over splits, 95 % interval for new data",
            fontsize=8,
        )
    return Path(path)


def draw_selection(
    pairs: pa.Table,
    selected: npt.NDArray[np.bool_],
    depth: npt.NDArray[np.int64],
    worth: Mapping[str, Any],
    path: str | os.PathLike[str],
) -> Path:
    """Draws a selection: depth, score gap and centrality, lengths, and the choice against others.

    Args:
        pairs: As :attr:`bpo.Selection.pairs`.
        selected: (P,) bool, which of them are kept.
        depth: (n,) int64, pairs kept of each prompt.
        worth: As in :attr:`bpo.Selection.evidence`.
        path: File to write, whose name ends in .svg, .png or .pdf; replaced whole or not at all.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A name that ends otherwise.
    """
    axes = pair_axes(pairs)
    panels: list[Callable[[Any], None]] = [lambda axis: _depth_panel(axis, depth)]
    if len(axes) > 1:
        panels.append(lambda axis: _scatter_panel(axis, axes[0], axes[1], selected))
    if axes:
        panels.append(lambda axis: _histogram_panel(axis, axes[-1], selected))
    if "arms" in worth:
        panels.append(lambda axis: _worth_panel(axis, worth))
    with _figure(path) as figure:
        figure.set_size_inches(3.3 * len(panels), 2.9)
        for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            panel(axis)
            axis.spines[["top", "right"]].set_visible(False)
    return Path(path)


@contextlib.contextmanager
def _figure(path: str | os.PathLike[str]) -> Iterator[Any]:
    """An empty figure, which is written once it has been drawn.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A name that does not end in .svg, .png or .pdf.
    """
    matplotlib = import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ValueError(f"{path}: the name of a figure ends in .svg, .png or .pdf.")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, path)


def _depth_panel(axis: Any, depth: npt.NDArray[np.int64]) -> None:
    counts = np.bincount(depth)
    axis.bar(range(len(counts)), counts, color=_STRONG)
    axis.set_xlabel("pairs kept of a prompt")
    axis.set_ylabel("prompts")


def _scatter_panel(axis: Any, x: Axis, y: Axis, selected: npt.NDArray[np.bool_]) -> None:
    """Dots of the kept pairs, as a picture within a vector figure, over the density of the others."""
    (x_title, across), (y_title, up) = x, y
    known = np.isfinite(across) & np.isfinite(up)
    dropped = known & ~selected
    if dropped.any():
        axis.hist2d(across[dropped], up[dropped], bins=48, cmap="Greys", norm="log", rasterized=True)
    kept = known & selected
    axis.scatter(across[kept], up[kept], s=4, color=_STRONG, linewidth=0, rasterized=True)
    axis.set_xlabel(x_title)
    axis.set_ylabel(y_title)


def _histogram_panel(axis: Any, drawn: Axis, selected: npt.NDArray[np.bool_]) -> None:
    title, values = drawn
    known = np.isfinite(values)
    low, high = np.quantile(values[known], [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, 25)
    for mask, label, colour in ((known, "all", _PALE), (known & selected, "kept", _STRONG)):
        weights = np.full(int(mask.sum()), 1 / max(1, mask.sum()))
        style = {"color": colour} if label == "all" else {"histtype": "step", "color": colour}
        axis.hist(values[mask].clip(edges[0], edges[-1]), edges, weights=weights, label=label, **style)
    axis.set_xlabel(title)
    axis.set_ylabel("share of the pairs")
    axis.legend(frameon=False)


def _worth_panel(axis: Any, worth: Mapping[str, Any]) -> None:
    """How much more is ranked as labelled than after random pairs, with 95 % intervals."""
    arms = [arm for arm in worth["arms"] if arm["low"] is not None]
    axis.axvline(0, color=_SOFT, linewidth=0.8)
    for row, arm in enumerate(arms):
        axis.plot([100 * arm["low"], 100 * arm["high"]], [row, row], color=_PALE, linewidth=5)
        axis.scatter([100 * arm["difference"]], [row], s=26, color=_STRONG, zorder=4)
    axis.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
    axis.set_ylim(len(arms) - 0.4, -0.6)
    axis.set_xlabel("points above random, held out, linearised")


def _save(figure: Any, path: Path) -> Path:
    """Writes a figure; the file is replaced whole or not at all, and has no date where it is text."""
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path


def _preview_panel(axis: Any, records: Sequence[Mapping[str, Any]], names: list[str], limit: float) -> None:
    """One budget of a preview: the interval of each arm, its standard error and its difference."""
    axis.axvline(0, color=_SOFT, linewidth=0.8)
    for row in records:
        y = names.index(row["arm"])
        if abs(row["difference"]) * 100 > limit:
            left = row["difference"] < 0
            text = f"← −{-100 * row['difference']:.1f}" if left else f"+{100 * row['difference']:.1f} →"
            axis.text(-limit if left else limit, y, text, va="center", ha="left" if left else "right")
            continue
        axis.plot([100 * row["low"], 100 * row["high"]], [y, y], color=_PALE, linewidth=5, zorder=2)
        spread = 100 * row["standard_error"]
        axis.plot([100 * row["difference"] - spread, 100 * row["difference"] + spread], [y, y], color=_STRONG)
        axis.scatter([100 * row["difference"]], [y], s=26, color=_STRONG, zorder=4)
    _open_frame(axis)


def _accuracy(figure: Any, results: Mapping[str, Any]) -> bool:
    """Accuracy of each arm, one panel a budget: mean, interval and the seeds."""
    budgets = results["description"]["budgets"]
    panels = [
        (budget, [arm for arm in results["arms"] if arm["budget"] == budget and arm["measures"]]) for budget in budgets
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return False
    rows = max(len(arms) for _, arms in panels)
    figure.set_size_inches(1.5 + 4.2 * len(panels), 1.2 + 0.36 * rows)
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axis, (budget, arms) in zip(axes, panels, strict=True):
        _rows(axis, [(arm["arm"], arm["measures"]["accuracy"]) for arm in arms])
        axis.set_title(pairs_at(budget), loc="left")
        axis.set_xlabel("held-out accuracy, mean over seeds with 95 % interval")
    return True


def _differences(figure: Any, results: Mapping[str, Any]) -> bool:
    """Paired differences of accuracy from the baseline and of bpo from the others."""
    entries = [entry for entry in results["differences"] if entry["measure"] == "accuracy"]
    panels = [
        (family, budget, [entry for entry in entries if (entry["family"], entry["budget"]) == (family, budget)])
        for family in ("baseline", "bpo")
        for budget in results["description"]["budgets"]
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return False
    heights = [len(panel[2]) + 1 for panel in panels]
    figure.set_size_inches(6.5, 0.6 + 0.42 * sum(heights))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (family, budget, found) in zip(axes, panels, strict=True):
        axis.axvline(0, color=_SOFT, linewidth=0.8)
        _rows(axis, [(f"{entry['arm']} − {entry['against']}", entry) for entry in found])
        against = "against the baseline" if family == "baseline" else "bpo against the others"
        axis.set_title(f"{pairs_at(budget)}, {against}", loc="left")
    axes[-1].set_xlabel("difference of held-out accuracy, paired by seed, with 95 % interval")
    return True


def _budgets(figure: Any, results: Mapping[str, Any]) -> bool:
    """Accuracy against budget, one line an arm."""
    budgets = results["description"]["budgets"]
    if len(budgets) < 2:
        return False
    figure.set_size_inches(6, 4)
    axis = figure.subplots()
    for arm in results["description"]["arms"]:
        points = [
            (entry["n_pairs"], entry["measures"]["accuracy"])
            for entry in results["arms"]
            if entry["arm"] == arm["name"] and "accuracy" in entry["measures"]
        ]
        if points:
            points.sort(key=lambda point: point[0])
            axis.errorbar(
                [x for x, _ in points],
                [estimate["mean"] for _, estimate in points],
                yerr=[estimate["standard_error"] or 0.0 for _, estimate in points],
                label=arm["name"],
                capsize=2,
                marker="o",
                markersize=3,
            )
    axis.set_xlabel("pairs trained on")
    axis.set_ylabel("held-out accuracy ± standard error")
    axis.legend(frameon=False)
    return True


def _agreement(figure: Any, results: Mapping[str, Any]) -> bool:
    """Accuracy after training against that in the linearised regime: one dot a run, a cross for the mean of an arm."""
    panels = results["agreement"]
    if not panels:
        return False
    figure.set_size_inches(4.6 * len(panels) + 0.6, 4.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    names = [arm["name"] for arm in results["description"]["arms"]]
    for axis, panel in zip(axes, panels, strict=True):
        for position, name in enumerate(names):
            runs = [run for run in panel["runs"] if run["arm"] == name]
            if not runs:
                continue
            x = [run["linearised_accuracy"] for run in runs]
            y = [run["accuracy"] for run in runs]
            colour = f"C{position % 10}"
            axis.scatter(x, y, s=14, color=colour, alpha=0.6, linewidth=0)
            axis.scatter([sum(x) / len(x)], [sum(y) / len(y)], s=70, color=colour, marker="X", label=name)
        axis.set_xlabel("linearised accuracy, before training")
        axis.set_ylabel("held-out accuracy after training")
        axis.set_title(pairs_at(panel["budget"]), loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return True


def _costs(figure: Any, results: Mapping[str, Any]) -> bool:
    """Seconds of each stage of one run, and of what is computed once."""
    arms = [arm for arm in results["arms"] if arm["seconds"]]
    if not arms:
        return False
    once = results["description"]["seconds"]
    labels = [f"{arm['arm']}, {arm['budget']}" for arm in arms] + [f"once: {stage}" for stage in once]
    figure.set_size_inches(6.5, 1.1 + 0.3 * len(labels))
    axis = figure.subplots()
    left = [0.0] * len(arms)
    for stage, colour in zip(STAGES, (_ACCENT, _STRONG, _PALE, _SOFT), strict=True):
        widths = [arm["seconds"].get(stage, 0.0) for arm in arms]
        if not any(widths):
            continue
        axis.barh(range(len(arms)), widths, left=left, color=colour, label=stage, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.barh(range(len(arms), len(labels)), list(once.values()), color=_INK, height=0.6)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("seconds of a run")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    return True


def _rows(axis: Any, entries: list[tuple[str, Mapping[str, Any]]]) -> None:
    """One row an entry: the seeds as dots, the mean and its interval."""
    for row, (_, estimate) in enumerate(entries):
        values = estimate["values"]
        axis.scatter(values, [row + 0.22] * len(values), s=9, color=_SOFT, linewidth=0, alpha=0.7, zorder=2)
        if estimate["low"] is not None:
            axis.plot([estimate["low"], estimate["high"]], [row, row], color=_STRONG, linewidth=2, zorder=3)
        axis.scatter([estimate["mean"]], [row], s=34, color=_STRONG, zorder=4)
    axis.set_yticks(range(len(entries)), [label for label, _ in entries])
    axis.set_ylim(len(entries) - 0.4, -0.6)
    _open_frame(axis)


def _open_frame(axis: Any) -> None:
    """A frame open at the top and the right, and pale lines up from the values."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#eceff2", zorder=0)
    axis.set_axisbelow(True)
