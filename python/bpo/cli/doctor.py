"""``bpo doctor``: what is differentiated, whether it is sound, and what it will cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import add_fields, fields

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_doctor(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("doctor", help="before a run: what is differentiated, is it sound, what will it cost")
    command.add_argument("model", help="path or hub id of the policy")
    command.add_argument("dataset", help="file, directory or hub id of the preference data")
    add_fields(command, "as for select")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    config = bpo.SelectConfig.from_dict(fields(options))
    print(bpo.doctor(options.model, options.dataset, config=config))
