"""``bpo audit``: which labels look wrong."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import (
    add_dataset,
    add_fields,
    add_saying,
    add_tokenizer,
    check_dataset,
    check_stores,
    check_writable,
    dataset_of,
    examples,
    fields,
    place,
    say,
    silent,
)
from bpo.system.paths import check_apart

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_audit(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "audit",
        help="which labels look wrong, from a gradient store",
        epilog=examples(
            "bpo audit gradients responses.jsonl --output suspects.html",
            "bpo audit gradients responses.jsonl --by source --save audit.json",
        ),
    )
    command.add_argument("store", type=place, help="directory or address of the gradient store")
    add_dataset(command)
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
    command.add_argument("--worst", type=int, default=50, metavar="N", help="pairs to show in full")
    command.add_argument("--output", type=Path, help="file for a page, .html")
    command.add_argument("--save", type=Path, help="file for the whole audit, .json")
    add_tokenizer(command)
    add_fields(command, "as for select")
    add_saying(command)
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    stores = [options.store, *options.more]
    check_apart(
        {"--output": options.output, "--save": options.save},
        {"dataset": options.dataset},
        {"store": options.store, **{f"--store {path}": path for path in options.more}},
    )
    check_writable("--output", options.output, endings=(".html",))
    check_writable("--save", options.save, endings=(".json",))
    check_dataset(options)
    check_stores(*stores)
    audit = bpo.audit(
        stores,
        dataset_of(options),
        by=options.by,
        wrong_share=options.wrong_share,
        worst=options.worst,
        processing_class=options.processing_class,
        config=fields(options),
    )
    say(options, audit.summary, audit.to_dict)
    written = [
        *([] if options.output is None else [f"page   {shlex.quote(str(audit.report(options.output)))}"]),
        *([] if options.save is None else [f"audit  {shlex.quote(str(audit.save(options.save)))}"]),
    ]
    if written and not silent(options):
        print("\n" + "\n".join(written))
