"""``bpo preview``: what a selection is worth, before training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.arguments import add_fields, fields, place
from bpo.system.files import read_json
from bpo.system.paths import check_apart

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_preview(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("preview", help="what a selection is worth, before training, from a gradient store")
    command.add_argument("store", type=place, help="directory or address of the gradient store")
    command.add_argument("dataset", help="file, directory or hub id of the preference data")
    command.add_argument("--budget", type=int, action="append", required=True, help="pairs to train on; repeatable")
    arms = command.add_mutually_exclusive_group()
    arms.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="ARM",
        help="name of a strategy, or JSON with name, strategy, breadth, select and store; repeatable",
    )
    arms.add_argument(
        "--all", action="store_true", help="every strategy that the data allows; the others are named with the reason"
    )
    command.add_argument("--baseline", default="random", help="arm that the others are compared with")
    command.add_argument("--heldout", default="0.25", help="share of the prompts held out, or a data set of its own")
    command.add_argument("--seeds", type=int, default=100, help="splits")
    command.add_argument("--output", type=Path, help="file for the results, .json")
    command.add_argument("--figure", type=Path, help="file for a figure, .svg, .png or .pdf")
    add_fields(command, "as for select")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    check_apart(
        {"--output": options.output, "--figure": options.figure},
        {"dataset": options.dataset, "--heldout": options.heldout},
        {"store": options.store},
    )
    arms: dict[str, Any] = {"arms": [_arm(text) for text in options.arm]} if options.arm else {}
    if options.all:
        arms = {"arms": "all"}
    try:
        heldout: Any = float(options.heldout)
    except ValueError:
        heldout = options.heldout
    preview = bpo.preview(
        options.store,
        options.dataset,
        budget=options.budget,
        baseline=options.baseline,
        heldout=heldout,
        seeds=options.seeds,
        config=fields(options),
        **arms,
    )
    print(preview.summary())
    if options.output is not None:
        print(f"\nresults  {preview.save(options.output)}")
    if options.figure is not None:
        print(f"figure   {preview.figure(options.figure)}")


def _arm(text: str) -> Any:
    """Reads the name of a strategy, or an arm as JSON."""
    if not text.lstrip().startswith("{"):
        return text
    return read_json(text, f"--arm {text}")
