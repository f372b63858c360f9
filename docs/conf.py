"""How Sphinx builds the site of these pages: `make docs`. Nothing is fetched, and a dead link is an error."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import bpo
from bpo.cli.main import build_parser

project = "bpo"
copyright = "the authors of bpo"
version = release = bpo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"bpo {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
exclude_patterns = ["figures"]
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline"]
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
napoleon_attr_annotations = False
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app: Any) -> None:
    """Writes the page of the commands before the others are read."""
    app.connect("builder-inited", write_commands)


def write_commands(app: Any) -> None:
    """Every command with its arguments, as ``--help`` prints them."""
    os.environ["COLUMNS"] = "100"
    parser = build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# The command line\n\n`bpo COMMAND --help` prints the same.\n"]
    for name, command in commands.choices.items():
        parts.append(f"\n## bpo {name}\n\n```text\n{command.format_help()}```\n")
    Path(app.srcdir, "reference", "commands.md").write_text("".join(parts), encoding="utf-8")
