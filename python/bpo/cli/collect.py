"""``bpo collect``: the gradients of all responses into a store, or of a share of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import add_fields, fields
from bpo.system.paths import check_apart

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_collect(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("collect", help="extract the gradients of all responses into a store")
    command.add_argument("model", help="path or hub id of the policy")
    command.add_argument("dataset", help="file, directory or hub id of the preference data")
    command.add_argument("--store", type=Path, required=True, help="directory of the gradient store")
    command.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only share I of N, for machines that see no disk in common; bpo store gather joins the shares",
    )
    add_fields(command, "a field of bpo.SelectConfig; repeatable")
    command.set_defaults(run=_run)


def _shard(text: str) -> tuple[int, int]:
    """Reads ``2/4``."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise ValueError
    return int(found[1]), int(found[2])


def _run(options: argparse.Namespace) -> None:
    check_apart({"--store": options.store}, {"dataset": options.dataset, "model": options.model})
    config = bpo.SelectConfig.from_dict(fields(options))
    print(
        bpo.collect_gradients(options.model, options.dataset, store=options.store, shard=options.shard, config=config)
    )
