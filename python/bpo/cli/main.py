"""The ``bpo`` command: its commands put together, and errors turned into exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.system.signals import Told, ending_when_told
from bpo.world.world import world

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Its exit status: 0, 1 for an error in what was given or found, 128 and the number of the signal where it was
        told to end: 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # What is printed holds the texts and paths of users, which the encoding of a pipe may lack.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with ending_when_told():
            return _run(arguments)
    except BrokenPipeError:  # whoever reads has read enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted; what was finished is kept, the same command goes on from there", 130)
    except Told as told:
        return _failed(
            f"ended by {told.signum.name}; what was finished is kept, the same command goes on from there",
            128 + told.signum,
        )


def _run(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    processes = world()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.showwarning = _print_warning if processes.is_main else lambda *_, **__: None
        if not processes.is_main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        # What all processes of a job do not work at together, the first of them does.
        together = options.command in ("select", "reselect", "collect", "sample", "score", "compare")
        status = int((options.run(options) if together else processes.from_main(lambda: options.run(options))) or 0)
    if sys.stdout is not None:
        sys.stdout.flush()  # now, when it can still be told that it fails
    return status


def _failed(reason: object, status: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"bpo: {reason}", file=sys.stderr, flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    """Each command adds its arguments, and as ``run`` the function that takes them."""
    # Imported here, since that takes a moment in which Ctrl-C is to be answered as in any other.
    from bpo.cli.audit import add_audit
    from bpo.cli.collect import add_collect
    from bpo.cli.compare import add_compare
    from bpo.cli.doctor import add_doctor
    from bpo.cli.preview import add_preview
    from bpo.cli.sample import add_sample
    from bpo.cli.score import add_score
    from bpo.cli.select import add_reselect, add_select
    from bpo.cli.show import add_show
    from bpo.cli.store import add_store

    parser = argparse.ArgumentParser(prog="bpo", description=bpo.__doc__.splitlines()[0] if bpo.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"bpo {bpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    # In the order of --help.
    add_select(commands)
    add_reselect(commands)
    add_collect(commands)
    add_preview(commands)
    add_audit(commands)
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
