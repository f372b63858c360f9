"""The ``bpo`` command: its commands put together, and errors turned into exit statuses."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.compare import add_compare
from bpo.cli.doctor import add_doctor
from bpo.cli.preview import add_preview
from bpo.cli.sample import add_sample
from bpo.cli.score import add_score
from bpo.cli.select import add_reselect, add_select
from bpo.cli.show import add_show
from bpo.cli.store import add_store

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for an error in what was given or found, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return int(options.run(options) or 0)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bpo: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    """Each command adds its arguments, and as ``run`` the function that takes them."""
    parser = argparse.ArgumentParser(prog="bpo", description=bpo.__doc__.splitlines()[0] if bpo.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"bpo {bpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # In the order of --help.
    add_select(commands)
    add_reselect(commands)
    add_preview(commands)
    add_sample(commands)
    add_score(commands)
    add_doctor(commands)
    add_compare(commands)
    add_show(commands)
    add_store(commands)
    return parser


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"bpo: {message}", file=sys.stderr)
