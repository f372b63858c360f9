"""The ``bpo`` command."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for an error in what was given, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="bpo", description=bpo.__doc__.splitlines()[0] if bpo.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"bpo {bpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    select = commands.add_parser("select", help="choose the pairs to train on")
    select.add_argument("model", help="path or hub id of the policy")
    select.add_argument("dataset", help="file, directory or hub id of the preference data")
    select.add_argument("--budget", type=count_or_fraction, required=True, help="pairs to keep: a count or a fraction")
    select.add_argument("--breadth", type=count_or_fraction, help="prompts to keep, likewise; all by default")
    select.add_argument("--strategy", default="bpo", help="bpo, uniform, random or margin")
    select.add_argument("--store", type=Path, help="directory of the gradient store, reused when it is there")
    select.add_argument("--output", type=Path, required=True, help="directory for the selection")
    select.add_argument("--seed", type=int, default=0)
    select.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of bpo.SelectConfig; repeatable"
    )
    select.set_defaults(run=_select)

    doctor = commands.add_parser("doctor", help="before a run: what is differentiated, is it sound, what will it cost")
    doctor.add_argument("model", help="path or hub id of the policy")
    doctor.add_argument("dataset", help="file, directory or hub id of the preference data")
    doctor.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as for select")
    doctor.set_defaults(run=_doctor)

    show = commands.add_parser("show", help="summarise a saved selection or a gradient store")
    show.add_argument("path", type=Path)
    show.set_defaults(run=_show)

    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            options.run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"bpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bpo: interrupted; what the store holds is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _select(options: argparse.Namespace) -> None:
    from bpo.selection import check_directory

    check_directory(options.output)
    selection = bpo.select(
        options.model,
        options.dataset,
        budget=options.budget,
        breadth=options.breadth,
        strategy=options.strategy,
        store=options.store,
        config=bpo.SelectConfig.from_dict(dict(map(_field, options.set))),
        seed=options.seed,
    )
    selection.save(options.output)
    report = selection.report(options.output / "report.html")
    print(selection.summary())
    print(f"\ndataset  {options.output / 'dataset'}  (trl dpo --dataset_name {options.output / 'dataset'} …)")
    print(f"report   {report}")


def _doctor(options: argparse.Namespace) -> None:
    config = bpo.SelectConfig.from_dict(dict(map(_field, options.set)))
    print(bpo.doctor(options.model, options.dataset, config=config))


def _show(options: argparse.Namespace) -> None:
    if (options.path / "selection.json").is_file():
        print(bpo.Selection.load(options.path).summary())
        return
    store = bpo.GradientStore.open(options.path)
    print(f"{len(store)} responses of {store.rows.shape[1]} numbers")
    print(json.dumps(store.fingerprint, indent=1))


def count_or_fraction(text: str) -> int | float:
    """Reads ``500`` as a count and ``0.5`` as a fraction."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _field(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text}: write FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"bpo: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
