"""Numbers to the coordinates of a page's pictures: few, however many pairs there are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt
    import pyarrow as pa

    Axis = tuple[str, npt.NDArray[np.float64]]
    Floats = npt.NDArray[np.float64]
    Mask = npt.NDArray[np.bool_]

WIDTH, HEIGHT = 1000, 440
"""Of a scatter plot; its points are on whole numbers."""

_COLUMNS, _ROWS, _SHADES = 80, 40, 5
_BINS = 24


def reach(records: Iterable[Mapping[str, Any]]) -> float:
    """How far from zero a picture of intervals reaches, above 0: to the farthest, but 2.5 times the median at most.

    An arm that is far off, as a control may be, would hide all others. An interval that is not known has NaN.
    """
    far = sorted(max(abs(row["low"]), abs(row["high"])) for row in records if not math.isnan(row["low"]))
    return max(1e-9, min(far[-1], 2.5 * far[len(far) // 2])) * 1.05 if far else 1.0


def column(pairs: pa.Table, name: str) -> Floats:
    """A column of the table of a selection, (P,) float64: NaN where a pair, or an earlier version, has none."""
    if name not in pairs.column_names:
        return np.full(pairs.num_rows, np.nan)
    values: Floats = pairs[name].to_numpy().astype(np.float64)
    return values


def pair_axes(pairs: pa.Table) -> list[Axis]:
    """What of the pairs there is to draw, each with its title: what tells most comes first, lengths last."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(column(pairs, "length_ratio"))
    axes = [
        ("score gap", column(pairs, "score_gap")),
        ("centrality", column(pairs, "centrality")),
        ("length of the gradient", column(pairs, "informativeness")),
        ("log2 of length, chosen over rejected", ratio),
    ]
    return [axis for axis in axes if np.isfinite(axis[1]).any()]


def scatter(x: Floats, y: Floats, kept: Mask) -> dict[str, Any] | None:
    """A scatter plot of two numbers of each pair: every kept pair is a dot of one path, the others are a density.

    Args:
        x: (P,), NaN where a pair has none.
        y: (P,) likewise.
        kept: (P,) bool.

    Returns:
        ``dots`` (the path of the kept pairs), ``shades`` (paths of squares, from few to many dropped pairs), the ranges
        ``x`` and ``y``, and how many dots and dropped pairs there are; ``edge`` counts the kept pairs that lack a
        number and lie on the edge of the picture. None where no pair has both.
    """
    known = np.isfinite(x) & np.isfinite(y)
    if not known.any():
        return None
    ranges = [_range(values[known]) for values in (x, y)]
    places = [
        np.nan_to_num((values - low) / (high - low), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
        for values, (low, high) in zip((x, y), ranges, strict=True)
    ]
    across, up = places
    columns = np.rint(across[kept] * (WIDTH - 12) + 6).astype(int)
    rows = np.rint((1 - up[kept]) * (HEIGHT - 12) + 6).astype(int)
    dropped = known & ~kept
    return {
        "dots": _dots(columns, rows),
        "shades": _shades(across[dropped], up[dropped]),
        "x": ranges[0],
        "y": ranges[1],
        "kept": int(kept.sum()),
        "dropped": int(dropped.sum()),
        "edge": int((kept & ~known).sum()),
    }


def _dots(columns: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> str:
    """A path of a dot at each place, by steps from dot to dot, which are short in this order."""
    order = np.lexsort((rows, columns))
    steps = [np.diff(each[order], prepend=0).tolist() for each in (columns, rows)]
    return "".join(f"m{across} {down}h0" for across, down in zip(*steps, strict=True))


def _shades(across: Floats, up: Floats) -> list[str]:
    """Squares of the plane that hold dropped pairs, as one path for each of a few levels, the emptiest first."""
    if len(across) == 0:
        return []
    column = np.minimum((across * _COLUMNS).astype(int), _COLUMNS - 1)
    row = np.minimum(((1 - up) * _ROWS).astype(int), _ROWS - 1)
    counts = np.bincount(row * _COLUMNS + column, minlength=_COLUMNS * _ROWS)
    # By the logarithm: where pairs are thousands, single ones stay to be seen.
    level = np.ceil(_SHADES * np.log1p(counts) / np.log1p(counts.max())).astype(int)
    wide, high = WIDTH / _COLUMNS, HEIGHT / _ROWS
    return [
        "".join(
            f"M{place % _COLUMNS * wide:g} {place // _COLUMNS * high:g}h{wide:g}v{high:g}h-{wide:g}z"
            for place in np.flatnonzero(level == shade).tolist()
        )
        for shade in range(1, _SHADES + 1)
    ]


def histogram(values: Floats, kept: Mask, bins: int = _BINS) -> dict[str, Any] | None:
    """Shares of the kept and of all pairs in bins of equal width; the outermost hold the 0.5 % at either end, too.

    Returns:
        ``bins`` with ``low``, ``high``, counts and shares ``kept`` and ``all``, and ``most``, the largest share. None
        where no pair has a number.
    """
    known = np.isfinite(values)
    if not known.any():
        return None
    low, high = _range(np.quantile(values[known], [0.005, 0.995]))
    edges = np.linspace(low, high, bins + 1)
    sides = {"all": values[known].clip(low, high), "kept": values[known & kept].clip(low, high)}
    counts = {name: np.histogram(side, edges)[0] for name, side in sides.items()}
    shares = {name: count / max(1, count.sum()) for name, count in counts.items()}
    return {
        "bins": [
            {
                "low": float(edges[at]),
                "high": float(edges[at + 1]),
                **{name: float(share[at]) for name, share in shares.items()},
                **{f"{name}_count": int(count[at]) for name, count in counts.items()},
            }
            for at in range(bins)
        ],
        "most": max(float(share.max()) for share in shares.values()),
        "median": {name: float(np.median(side)) if len(side) else None for name, side in sides.items()},
    }


def _range(values: Floats) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    pad = 0.5 * max(1.0, abs(low))
    return (low, high) if high > low else (low - pad, high + pad)
