"""``bpo select`` and ``bpo reselect``: choose the pairs to train on."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import add_fields, count_or_fraction, fields, place
from bpo.selection.strategies.register import STRATEGIES
from bpo.store.objects import Objects
from bpo.system.paths import check_apart, joined
from bpo.world.world import world

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_select(commands: Commands) -> None:
    """Adds the command that chooses with a model."""
    command = commands.add_parser("select", help="choose the pairs to train on")
    command.add_argument("model", help="path or hub id of the policy")
    _add_selection(command)
    command.add_argument(
        "--store", type=place, help="directory or address of the gradient store, reused when it is there"
    )
    command.set_defaults(run=_run)


def add_reselect(commands: Commands) -> None:
    """Adds the command that chooses from a gradient store alone."""
    command = commands.add_parser("reselect", help="choose again from a gradient store, without the model")
    command.add_argument("store", type=place, help="directory or address of the gradient store")
    _add_selection(command)
    command.set_defaults(run=_run, model=None)


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset", help="file, directory or hub id of the preference data")
    command.add_argument("--budget", type=count_or_fraction, required=True, help="pairs to keep: a count or a fraction")
    command.add_argument("--breadth", type=count_or_fraction, help="prompts to keep, likewise; all by default")
    command.add_argument("--strategy", default="bpo", help=", ".join(STRATEGIES))
    command.add_argument("--target", help="pairs that say where to go, for less: file, directory or hub id")
    command.add_argument("--output", type=place, required=True, help="directory or address for the selection")
    command.add_argument("--seed", type=int, default=0)
    add_fields(command, "a field of bpo.SelectConfig; repeatable")


def _run(options: argparse.Namespace) -> None:
    from bpo.selection.saved import check_directory

    writes, reads = {"--output": options.output}, {"dataset": options.dataset, "--target": options.target}
    if options.command == "select":
        check_apart({**writes, "--store": options.store}, {**reads, "model": options.model})
    else:
        check_apart(writes, reads, {"store": options.store})
    check_directory(options.output)
    selection = bpo.select(
        options.model,
        options.dataset,
        budget=options.budget,
        breadth=options.breadth,
        strategy=options.strategy,
        target=options.target,
        store=options.store,
        config=bpo.SelectConfig.from_dict(fields(options)),
        seed=options.seed,
    )
    report = world().from_main(lambda: _saved(selection, options.output))
    print(selection.summary())
    if isinstance(options.output, Path):
        print(f"\ndataset  {options.output / 'dataset'}  (trl dpo --dataset_name {options.output / 'dataset'} …)")
    else:
        print(f"\ndataset  bpo.Selection.load({options.output!r}).dataset")
    print(f"report   {report}")


def _saved(selection: bpo.Selection, output: str | Path) -> str | Path:
    """Saves a selection and its report; returns where the report is."""
    selection.save(output)
    report = joined(output, "report.html")
    if isinstance(report, Path):
        return selection.report(report)
    with tempfile.TemporaryDirectory(prefix="bpo-report-") as scratch:
        Objects(str(output)).put("report.html", selection.report(Path(scratch) / "report.html"))
    return report
