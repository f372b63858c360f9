"""HTML pages from the templates, each one file that needs no other and runs no script but ours."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

import jinja2
import markupsafe

import bpo
from bpo.system.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_NAMED_PLACES = 5


def write_page(template: str, path: Path, **values: Any) -> Path:
    """Renders a template, with the version of bpo as ``version``, into a file that is replaced whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bpo.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number)
    # The policy of the page names its one script by checksum: no other runs, whatever a text holds.
    script = environment.get_template("page.js").render().strip()
    values |= {"script": markupsafe.Markup(script), "script_hash": script_hash(script), "version": bpo.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, environment.get_template(template).render(**values) + "\n")


def script_hash(script: str) -> str:
    """How a content security policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def percent(value: float | None) -> str:
    """A share as text."""
    return "unknown" if value is None or value != value else f"{100 * value:.1f} %"


def number(value: Any) -> str:
    """A number as text, in three digits where it is no whole number; a dash for none."""
    if value is None or value != value:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def first_places(reasons: Mapping[str, list[str]]) -> dict[str, tuple[int, list[str]]]:
    """The count and the first few places of each reason."""
    return {reason: (len(places), places[:_NAMED_PLACES]) for reason, places in reasons.items()}
