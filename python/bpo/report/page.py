"""HTML pages from the templates, each one file that needs no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jinja2

import bpo
from bpo.system.files import write_whole

if TYPE_CHECKING:
    from pathlib import Path


def write_page(template: str, path: Path, **values: Any) -> Path:
    """Renders a template, with the version of bpo as ``version``, into a file that is replaced whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bpo.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, environment.get_template(template).render(version=bpo.__version__, **values))
