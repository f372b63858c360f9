"""``bpo audit``: which labels look wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import add_fields, fields, place
from bpo.system.paths import check_apart

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_audit(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("audit", help="which labels look wrong, from a gradient store")
    command.add_argument("store", type=place, help="directory or address of the gradient store")
    command.add_argument("dataset", help="file, directory or hub id of the preference data")
    command.add_argument(
        "--store",
        dest="more",
        type=place,
        action="append",
        default=[],
        metavar="STORE",
        help="another store of the data, such as that of another checkpoint; repeatable",
    )
    command.add_argument(
        "--by", action="append", metavar="COLUMN", help="column of the data to group labels by; repeatable"
    )
    command.add_argument("--wrong-share", type=float, metavar="SHARE", help="share of wrong labels, where it is known")
    command.add_argument("--worst", type=int, default=50, metavar="N", help="pairs to show in full (default: 50)")
    command.add_argument("--output", type=Path, help="file for a page, .html")
    command.add_argument("--save", type=Path, help="file for the whole audit, .json")
    command.add_argument("--json", action="store_true", help="print the whole audit as JSON in place of a summary")
    add_fields(command, "as for select")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    stores = [options.store, *options.more]
    check_apart(
        {"--output": options.output, "--save": options.save},
        {"dataset": options.dataset},
        {"store": options.store, **{f"--store {path}": path for path in options.more}},
    )
    audit = bpo.audit(
        stores,
        options.dataset,
        by=options.by,
        wrong_share=options.wrong_share,
        worst=options.worst,
        config=fields(options),
    )
    print(json.dumps(audit.to_dict()) if options.json else audit.summary())
    written = [
        *([] if options.output is None else [f"page   {audit.report(options.output)}"]),
        *([] if options.save is None else [f"audit  {audit.save(options.save)}"]),
    ]
    if written and not options.json:
        print("\n" + "\n".join(written))
