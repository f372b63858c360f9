"""``bpo preview``: what a selection is worth, before training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from bpo.system.files import read_json
from bpo.system.paths import check_apart

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_preview(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "preview",
        help="what a selection is worth, before training, from a gradient store",
        epilog=examples(
            "bpo preview gradients responses.jsonl --budget 500",
            "bpo preview gradients responses.jsonl --budget 500 --arm bpo --arm matching --figure preview.svg",
        ),
    )
    command.add_argument("store", type=place, help="directory or address of the gradient store")
    add_dataset(command)
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
    command.add_argument("--output", type=Path, help="file for the results, .json, or for a page, .html")
    command.add_argument("--figure", type=Path, help="file for a figure, .svg, .png or .pdf")
    add_tokenizer(command)
    add_fields(command, "as for select")
    add_saying(command)
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
    given = fields(options)
    check_writable("--output", options.output, endings=(".json", ".html"))
    check_writable("--figure", options.figure, endings=(".svg", ".png", ".pdf"))
    check_dataset(options)
    check_stores(options.store)
    preview = bpo.preview(
        options.store,
        dataset_of(options),
        budget=options.budget,
        baseline=options.baseline,
        heldout=heldout,
        seeds=options.seeds,
        processing_class=options.processing_class,
        config=given,
        progress=not silent(options),
        **arms,
    )
    say(options, preview.summary, lambda: {"settings": preview.settings, "table": preview.table()})
    if options.output is not None:
        page = options.output.suffix == ".html"
        written = preview.report(options.output) if page else preview.save(options.output)
        _tell(options, f"\n{'page' if page else 'results':7}  {shlex.quote(str(written))}")
    if options.figure is not None:
        _tell(options, f"figure   {shlex.quote(str(preview.figure(options.figure)))}")


def _tell(options: argparse.Namespace, text: str) -> None:
    if not silent(options):
        print(text)


def _arm(text: str) -> Any:
    """Reads the name of a strategy, or an arm as JSON."""
    if not text.lstrip().startswith("{"):
        return text
    return read_json(text, f"--arm {text}")
