"""``bpo compare``, ``bpo show`` and ``bpo report``: what strategies are worth in training, and what a command left."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import check_writable, examples, place
from bpo.system.paths import is_url, joined

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_compare(commands: Commands) -> None:
    """Adds the command that trains on the pairs of several strategies."""
    command = commands.add_parser(
        "compare",
        help="train on the pairs of several strategies, and compare the policies",
        epilog=examples(
            "bpo compare compare.yaml --output comparison", "bpo compare compare.yaml --output comparison --jobs 2"
        ),
    )
    command.add_input("settings", "--config", metavar="config", type=Path, help="YAML file of bpo.CompareConfig")
    command.add_argument(
        "--output", "--output_dir", type=Path, required=True, help="directory for runs, results and report"
    )
    command.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads")
    command.set_defaults(run=_compare, keeps="output")


def _compare(options: argparse.Namespace) -> int:
    if not options.settings.is_file():
        raise FileNotFoundError(f"{options.settings}: there is no such file")
    check_writable("--output", options.output)
    comparison = bpo.compare(options.settings, options.output, jobs=options.jobs)
    print(comparison.summary())
    print(f"\nreport   {shlex.quote(str(comparison.report))}")
    return int(bool(comparison.failures))


def add_show(commands: Commands) -> None:
    """Adds the command that summarises."""
    command = commands.add_parser(
        "show",
        help="summarise a saved selection, gradient store, comparison or preview",
        epilog=examples("bpo show selection", "bpo show s3://bucket/gradients"),
    )
    command.add_argument("path", type=place, help="file or directory; of a selection or a store also its address")
    command.set_defaults(run=show)


def show(options: argparse.Namespace) -> None:
    """Prints the summary of a saved selection, comparison or preview, or of a gradient store."""
    path: str | Path = options.path
    if isinstance(path, str):
        from bpo.store.objects import Objects

        saved = "selection.json" in Objects(path).names()
        print(bpo.Selection.load(path).summary() if saved else bpo.describe_store(path))
    elif not path.exists():
        raise FileNotFoundError(f"{path} holds no gradient store, and there is no such file or directory")
    elif path.is_file():
        print(bpo.Preview.load(path).summary())
    elif (path / "selection.json").is_file():
        print(bpo.Selection.load(path).summary())
    elif (path / "results.json").is_file():
        from bpo.evidence.compare import results

        print(results.table(results.load(path / "results.json")))
    else:
        print(bpo.describe_store(path))


def add_report(commands: Commands) -> None:
    """Adds the command that writes the page of a selection."""
    command = commands.add_parser(
        "report",
        help="write the page of a saved selection",
        epilog=examples(
            "bpo report s3://bucket/selection --output report.html",
            "bpo report selection --preview preview.json --audit audit.json",
        ),
    )
    command.add_argument("path", type=place, help="directory or address of the selection")
    command.add_argument("--output", type=Path, help="file of the page, .html (default: report.html in the directory)")
    command.add_argument("--preview", type=Path, help="results of bpo preview on the same data, .json")
    command.add_argument("--audit", type=Path, help="audit of the same data that bpo audit saved, .json")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> None:
    if options.output is None and is_url(options.path):
        raise ValueError("--output is needed for a selection at an address: the file to write the page to")
    output = options.output or joined(options.path, "report.html")
    if isinstance(options.path, Path) and not (options.path / "selection.json").is_file():
        raise FileNotFoundError(f"{options.path} holds no saved selection (no selection.json)")
    check_writable("--output", output, endings=(".html",))
    selection = bpo.Selection.load(options.path)
    preview = None if options.preview is None else bpo.Preview.load(options.preview)
    audit = None if options.audit is None else bpo.Audit.load(options.audit)
    print(f"report   {shlex.quote(str(selection.report(output, preview=preview, audit=audit)))}")
