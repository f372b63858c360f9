"""Draws figures/rooms.svg: the rooms of python/bpo, what each is for, and which imports which.

`python docs/rooms.py` writes it; with `--check` it only says whether what is there is still true.
"""

from __future__ import annotations

import ast
import html
import itertools
import sys
import textwrap
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "bpo"
FIGURE = ROOT / "docs" / "figures" / "rooms.svg"

WIDTH, MARGIN = 900, 16
LANE, GAP, BETWEEN_ROWS = 20, 18, 36
WIDEST_BOX = 440
LINE, CHARACTER = 14.5, 6.0
KEPT_ORDERS = 6
GROUND = "_core: the Rust core, which does the arithmetic over all rows and keeps the store"
LEFT_OUT = "An arrow points to what a room imports; it is left out where a longer way leads there, too."
STYLE = (
    ".box{fill:#fff;stroke:#c3ccd5;stroke-width:1.2}.ground{fill:#eef2f6;stroke:#c3ccd5;stroke-width:1.2}"
    ".name{font-weight:600;font-size:13px;fill:#1b1f24}.soft{font-size:11px;fill:#5c6670}"
    ".line{stroke:#8a96a3;stroke-width:1.2;fill:none;marker-end:url(#tip)}"
)

Arrow = tuple[str, str]  # importer, imported
Item = str | Arrow  # in a row: a room, or the lane of an arrow that passes the row


def main() -> int:
    """Writes the figure, or compares it; returns 1 if what is there is out of date."""
    figure = draw(rooms(), shortest(imports()))
    if "--check" not in sys.argv:
        FIGURE.write_text(figure, encoding="utf-8")
    elif not FIGURE.exists() or FIGURE.read_text(encoding="utf-8") != figure:
        print(f"{FIGURE.relative_to(ROOT)}:1: the rooms or their imports have changed: write it anew with make tables")
        return 1
    return 0


def rooms() -> dict[str, str]:
    """The folders and files of bpo, each with the one sentence of its docstring."""
    paths = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    paths |= {path.stem: path for path in PACKAGE.glob("[!_]*.py")}
    sentences = {name: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for name, path in paths.items()}
    return {name: (text or "").partition("\n")[0].replace("``", "") for name, text in sorted(sentences.items())}


def imports() -> set[Arrow]:
    """Which room imports which."""
    sys.path.insert(0, str(PACKAGE.parent))
    graph = grimp.build_graph("bpo", cache_dir=None)
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            importer, target = module.split(".")[1:2], imported.split(".")[1:2]
            if importer and target and importer != target and not importer[0].startswith("_"):
                found.add((importer[0], target[0]))
    return found


def shortest(arrows: set[Arrow]) -> list[Arrow]:
    """Leaves out every arrow to where a longer way leads."""
    below = {name: {target for importer, target in arrows if importer == name} for name, _ in arrows}

    def reached(name: str) -> set[str]:
        return {name}.union(*(reached(target) for target in below.get(name, ())))

    return sorted(
        (importer, target)
        for importer, target in arrows
        if not any(target in reached(other) for other in below[importer] - {target})
    )


def levels(names: list[str], arrows: list[Arrow]) -> dict[str, int]:
    """How high each room stands: one above the highest that it imports."""

    def level(name: str) -> int:
        return max((1 + level(target) for importer, target in arrows if importer == name), default=0)

    return {name: level(name) for name in names}


def arrange(names: list[str], arrows: list[Arrow]) -> list[list[Item]]:
    """Puts rooms and lanes into rows, from the roof down, where arrows cross least and are short."""
    level = levels(names, arrows)
    top = max(level.values())
    rows: list[list[Item]] = [[name for name in names if level[name] == height] for height in range(top, -1, -1)]
    for importer, target in arrows:
        for height in range(level[target] + 1, level[importer]):
            rows[top - height].append((importer, target))
    # The best way to each order of a row, row by row: cost, and the orders so far. Of a row the best orders suffice.
    best: dict[tuple[Item, ...], tuple[float, list[tuple[Item, ...]]]] = {(): (0.0, [])}
    for row in rows:
        following = {}
        for order in itertools.permutations(row):
            options = ((cost + between(above, order, arrows), orders) for above, (cost, orders) in best.items())
            cost, orders = min(options, key=lambda option: option[0])
            following[order] = (cost, [*orders, order])
        best = dict(sorted(following.items(), key=lambda option: option[1][0])[:KEPT_ORDERS])
    return [list(order) for order in min(best.values(), key=lambda option: option[0])[1]]


def between(above: tuple[Item, ...], below: tuple[Item, ...], arrows: list[Arrow]) -> float:
    """What the arrows from one row to the next cost: a thousand for a crossing, and one for each pixel to the side."""
    left, right = centres(above), centres(below)
    steps = []
    for arrow in arrows:
        start, end = (
            next((item for item in row if item in (arrow, name)), None)
            for row, name in zip((above, below), arrow, strict=True)
        )
        if start is not None and end is not None:
            steps.append((left[start], right[end]))
    crossings = sum((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(steps, 2))
    return 1000.0 * crossings + sum(abs(start - end) for start, end in steps)


def box_width(row: tuple[Item, ...] | list[Item]) -> float:
    """The width of each box of a row."""
    boxes = sum(isinstance(item, str) for item in row)
    lanes = len(row) - boxes
    return min(WIDEST_BOX, (WIDTH - 2 * MARGIN - GAP * (len(row) - 1) - LANE * lanes) / boxes)


def centres(row: tuple[Item, ...] | list[Item]) -> dict[Item, float]:
    """Where the items of a row stand, from left to right around the middle."""
    if not row:
        return {}
    widths = [box_width(row) if isinstance(item, str) else LANE for item in row]
    left = (WIDTH - sum(widths) - GAP * (len(row) - 1)) / 2
    found = {}
    for item, width in zip(row, widths, strict=True):
        found[item] = left + width / 2
        left += width + GAP
    return found


def draw(sentences: dict[str, str], arrows: list[Arrow]) -> str:
    """Returns the figure."""
    rows = arrange(list(sentences), arrows)
    x = {(number, item): centre for number, row in enumerate(rows) for item, centre in centres(row).items()}
    boxes, tops, bottoms = [], [], []
    y = float(MARGIN)
    for number, row in enumerate(rows):
        width = box_width(row)
        texts = {
            name: textwrap.wrap(sentences[name], int((width - 28) / CHARACTER), break_on_hyphens=False)
            for name in row
            if isinstance(name, str)
        }
        height = 34 + LINE * max(map(len, texts.values()))
        boxes += [box(name, lines, x[number, name], y, width, height) for name, lines in texts.items()]
        tops.append(y)
        bottoms.append(y + height)
        y += height + BETWEEN_ROWS
    lines = [line(route, tops, bottoms) for route in routes(rows, x, arrows)]
    y += 12 - BETWEEN_ROWS
    name, _, text = GROUND.partition(": ")
    ground = (
        f'<rect class="ground" x="{MARGIN}" y="{y:g}" width="{WIDTH - 2 * MARGIN}" height="32" rx="8"/>'
        f'<text x="{MARGIN + 14}" y="{y + 20:g}"><tspan class="name">{name}</tspan>'
        f'<tspan class="soft" dx="10">{text}</tspan></text>'
    )
    note = f'<text class="soft" x="{MARGIN}" y="{y + 54:g}">{LEFT_OUT}</text>'
    height = y + 68
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
        "font-family=\"system-ui, 'DejaVu Sans', sans-serif\">"
        f'<rect width="{WIDTH}" height="{height:g}" fill="#ffffff"/>'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0.8 7 4 0 7.2z" fill="#8a96a3"/></marker><style>{STYLE}</style></defs>'
    )
    return "\n".join([head, *lines, *boxes, ground, note, "</svg>", ""])


def box(name: str, lines: list[str], centre: float, y: float, width: float, height: float) -> str:
    """A room: its name, and its sentence below."""
    left = centre - width / 2
    texts = [f'<text class="name" x="{left + 14:g}" y="{y + 21:g}">{name}</text>']
    for number, text in enumerate(lines):
        texts.append(f'<text class="soft" x="{left + 14:g}" y="{y + 38 + LINE * number:g}">{html.escape(text)}</text>')
    return f'<rect class="box" x="{left:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8"/>' + "".join(texts)


def routes(
    rows: list[list[Item]], x: dict[tuple[int, Item], float], arrows: list[Arrow]
) -> list[list[tuple[int, float]]]:
    """Where each arrow runs: row and x of its start, of the lanes that it takes, and of its end."""
    row_of = {item: number for number, row in enumerate(rows) for item in row if isinstance(item, str)}
    found = {}
    for arrow in arrows:
        start, end = (row_of[name] for name in arrow)
        items: list[Item] = [arrow[0], *[arrow] * (end - start - 1), arrow[1]]
        found[arrow] = [(number, x[number, item]) for number, item in enumerate(items, start=start)]
    # The ends at one side of a box stand apart, in the order in which the arrows come or go.
    for side, neighbour in ((0, 1), (-1, -2)):
        for name in row_of:
            here = sorted((route[neighbour][1], arrow) for arrow, route in found.items() if arrow[side] == name)
            spread = min(60.0, (box_width(rows[row_of[name]]) - 60) / max(1, len(here)))
            for place, (_, arrow) in enumerate(here):
                number, centre = found[arrow][side]
                found[arrow][side] = (number, centre + spread * (place - (len(here) - 1) / 2))
    return list(found.values())


def line(route: list[tuple[int, float]], tops: list[float], bottoms: list[float]) -> str:
    """An arrow: straight through its lanes, bent between the rows."""
    number, x = route[0]
    parts = [f"M{x:.1f} {bottoms[number]:g}"]
    for number, following in route[1:]:
        start, end = bottoms[number - 1], tops[number]
        middle = (start + end) / 2
        parts.append(f"C{x:.1f} {middle:g} {following:.1f} {middle:g} {following:.1f} {end:g}")
        x = following
        if number != route[-1][0]:
            parts.append(f"V{bottoms[number]:g}")
    return f'<path class="line" d="{"".join(parts)}"/>'


if __name__ == "__main__":
    sys.exit(main())
