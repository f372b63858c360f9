"""``bpo store``: describe, verify, repair, merge, gather and export gradient stores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import bpo
from bpo.choices import SketchDType
from bpo.cli.arguments import check_writable, examples, place
from bpo.cli.results import show

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_store(commands: Commands) -> None:
    """Adds the command, with one of its own for each task."""
    command = commands.add_parser(
        "store",
        help="describe, verify, repair, merge, gather and export gradient stores",
        epilog=examples("bpo store verify gradients", "bpo store export gradients rows.parquet"),
    )
    tasks = command.add_subparsers(dest="task", required=True, metavar="TASK")
    for name, run, text in (
        ("info", show, "what a store holds and what it was made with"),
        ("verify", _verify, "compare a store with its checksums; the exit status is 1 if something is wrong"),
        ("repair", _repair, "mend what can be mended; damaged rows are set aside and computed anew by the next run"),
    ):
        task = tasks.add_parser(name, help=text)
        task.add_argument("path", type=place, help="directory or address")
        task.set_defaults(run=run)
    merge = tasks.add_parser("merge", help="copy the rows of several stores into one")
    merge.add_argument("output", type=place, help="directory or address of the result; a store there is added to")
    merge.add_argument("stores", type=place, nargs="+")
    merge.add_argument("--dtype", choices=get_args(SketchDType), help="keep the numbers in this type")
    merge.set_defaults(run=_merge)
    gather = tasks.add_parser("gather", help="put the shares that bpo collect --shard made into the store of one run")
    gather.add_argument("output", type=Path, help="directory of the store; an interrupted gathering goes on there")
    gather.add_argument("shards", type=Path, nargs="+", help="directories of all shares, in any order")
    gather.set_defaults(run=_gather)
    export = tasks.add_parser("export", help="write the rows for other programs")
    export.add_argument("path", type=place, help="directory or address")
    export.add_argument("output", type=Path, help="a new file, .npz or .parquet")
    export.set_defaults(run=_export)


def _verify(options: argparse.Namespace) -> int:
    problems = bpo.verify_store(options.path)
    for problem in problems:
        print(f"bpo: {problem}", file=sys.stderr)
    if not problems:
        from bpo.store.mirror import described

        with described(options.path) as directory:
            count = len(bpo.GradientStore.open(directory))
        print(f"{options.path}: all {count} rows are as they were written")
    return int(bool(problems))


def _repair(options: argparse.Namespace) -> None:
    from bpo.store.maintenance import name_rows

    done = bpo.repair_store(options.path)
    said = [f"written anew: {', '.join(done.mended)}"] if done.mended else []
    if len(done.set_aside):
        said.append(f"{len(done.set_aside)} damaged rows set aside: {name_rows(done.set_aside)}")
    if done.lost:
        said.append(f"{done.lost} rows were lost with the end of a file")
    if done.cut_bytes:
        said.append(f"{done.cut_bytes} bytes behind the last row cut off")
    print(f"{options.path}: {'; '.join(said) or 'nothing to mend'}")
    print(f"{done.count} rows; the next run computes anew what is missing")


def _merge(options: argparse.Namespace) -> None:
    print(bpo.merge_stores(options.output, options.stores, dtype=options.dtype))


def _gather(options: argparse.Namespace) -> None:
    print(bpo.gather_stores(options.output, options.shards))


def _export(options: argparse.Namespace) -> None:
    check_writable("output", options.output, endings=(".npz", ".parquet"))
    print(bpo.export_store(options.path, options.output))
