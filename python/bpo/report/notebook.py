"""What a notebook shows of an object: a few facts as a small table, with every text escaped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import markupsafe

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def facts_table(title: str, facts: Iterable[tuple[str, Any]]) -> str:
    """Returns a heading and two columns, as HTML; facts that are None are left out.

    Example:
        >>> facts_table("Selection", [("pairs", 3), ("by", "a<b"), ("store", None)])
        '<table><caption>Selection</caption><tr><th>pairs</th><td>3</td></tr><tr><th>by</th><td>a&lt;b</td></tr></table>'
    """
    rows = [(name, value) for name, value in facts if value is not None]
    return _table(title, markupsafe.Markup("").join(_row([("th", name), ("td", value)]) for name, value in rows))


def records_table(title: str, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a table with a line of names, as HTML."""
    head = _row([("th", name) for name in names])
    return _table(title, head + markupsafe.Markup("").join(_row([("td", value) for value in row]) for row in rows))


def _table(title: str, rows: markupsafe.Markup) -> str:
    return str(markupsafe.Markup("<table><caption>{}</caption>{}</table>").format(title, rows))


def _row(cells: Sequence[tuple[str, Any]]) -> markupsafe.Markup:
    parts = [markupsafe.Markup(f"<{tag}>{{}}</{tag}>").format(value) for tag, value in cells]
    return markupsafe.Markup("<tr>{}</tr>").format(markupsafe.Markup("").join(parts))
