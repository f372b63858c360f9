"""``bpo compare``: train on the pairs of several strategies, and compare the policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import bpo

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_compare(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("compare", help="train on the pairs of several strategies, and compare the policies")
    command.add_argument("config", type=Path, help="YAML file of the fields of bpo.CompareConfig")
    command.add_argument("--output", type=Path, required=True, help="directory for runs, results and report")
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    comparison = bpo.compare(options.config, options.output, jobs=options.jobs)
    print(comparison.summary())
    print(f"\nreport   {comparison.report}")
    return int(bool(comparison.failures))
