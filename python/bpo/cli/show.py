"""``bpo show``: summarise what another command left."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import place
from bpo.evidence.compare import results
from bpo.store.objects import Objects

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_show(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("show", help="summarise a saved selection, gradient store, comparison or preview")
    command.add_argument("path", type=place, help="file or directory; of a selection or a store also its address")
    command.set_defaults(run=show)


def show(options: argparse.Namespace) -> None:
    """Prints the summary of a saved selection, comparison or preview, or of a gradient store."""
    path: str | Path = options.path
    if isinstance(path, str):
        saved = "selection.json" in Objects(path).names()
        print(bpo.Selection.load(path).summary() if saved else bpo.describe_store(path))
    elif path.is_file():
        print(bpo.Preview.load(path).summary())
    elif (path / "selection.json").is_file():
        print(bpo.Selection.load(path).summary())
    elif (path / "results.json").is_file():
        print(results.table(results.load(path / "results.json")))
    else:
        print(bpo.describe_store(path))
