"""The ``bpo`` command: its commands put together, and errors turned into exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.signals import Told, ending_when_told
from bpo.system.optional import DISTRIBUTION, missing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bpo.cli.parser import Parser

# What all processes of a job work at together; the rest the first of them does.
_TOGETHER = ("select", "reselect", "collect", "sample", "score", "compare", "train")
# Versions that --version tells of.
_TOLD = ("numpy", "torch", "transformers", "trl", "peft", "datasets")


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
    given: list[argparse.Namespace] = []
    try:
        with ending_when_told():
            return _run(arguments, given)
    except BrokenPipeError:  # whoever reads has read enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        return _failed(missing(f"bpo {given[0].command}" if given else "bpo", error), 1)
    except OSError as error:
        return _failed(_named(error), 1)
    except (ValueError, TypeError, ImportError, MemoryError) as error:
        return _failed(in_words_of_the_shell(str(error)) or type(error).__name__, 1)
    except KeyboardInterrupt:
        return _failed(f"interrupted; {_kept(given)}", 130)
    except Told as told:
        return _failed(f"ended by {told.signum.name}; {_kept(given)}", 128 + told.signum)


def _run(arguments: Sequence[str] | None, given: list[argparse.Namespace]) -> int:
    _check_ours()
    try:
        options = _parsed(arguments)
    except SystemExit:  # help was asked for and printed, or what is wrong was
        _flush()
        raise
    given.append(options)
    from bpo.world.world import world

    processes = world()
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.showwarning = _print_warning if processes.is_main else lambda *_, **__: None
        if not processes.is_main:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        if getattr(options, "quiet", False) or getattr(options, "json", False):
            stack.enter_context(_without_bars())
        together = options.command in _TOGETHER
        status = int((options.run(options) if together else processes.from_main(lambda: options.run(options))) or 0)
    _flush()
    return status


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Has libraries that are imported from here on show no progress bars of their own."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _flush() -> None:
    """Has what was printed go out now, when it can still be told that it fails."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _named(error: OSError) -> str:
    """An error of the system in words; one that names no file and was raised in this room is of a ``print``."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    here = place is not None and Path(place.tb_frame.f_code.co_filename).parent == Path(__file__).parent
    if error.errno is not None and error.filename is None and error.strerror and here:
        return f"the standard output cannot be written: {error.strerror}"
    return in_words_of_the_shell(str(error))


def _check_ours() -> None:
    """Checks that ``bpo`` is this package still, which another of the same name can be installed over.

    Raises:
        ImportError: It is not.
    """
    if not hasattr(bpo, "_LAZY"):
        raise ImportError(
            f"Another package has replaced bpo/__init__.py in {Path(__file__).parents[2]}: pip uninstall --yes bpo && "
            f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
        )


def in_words_of_the_shell(message: str) -> str:
    """Returns a message of the package with its arguments as options of the command."""
    message = re.sub(r"\bSelectConfig\.(\w+)", r"--set \1", message)
    return re.sub(r"(?<![\w./-])(budget|breadth|strategy|target|seeds?)=(['\"]?)([\w.…-]+)\2", r"--\1 \3", message)


def _kept(given: list[argparse.Namespace]) -> str:
    """What is kept of a command that was ended, in words."""
    options = given[0] if given else None
    kept = None if options is None else getattr(options, getattr(options, "keeps", "store"), None)
    if kept is None or options is None or options.command in ("reselect", "preview") or not Path(kept).exists():
        return "nothing is kept"
    return f"what was finished is kept in {shlex.quote(str(kept))}, and the same command goes on from there"


def _failed(reason: object, status: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"bpo: {reason}", file=sys.stderr, flush=True)
    return status


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = build_parser()
    options: argparse.Namespace
    options, more = parser.parse_known_args(arguments)
    if more and options.command != "train":  # which leaves what it does not know to TRL
        parser.error(f"{more[0]}: is one argument too many for bpo {options.command}")
    options.more = more
    return options


def build_parser() -> Parser:
    """Each command adds its arguments, and as ``run`` the function that takes them."""
    # Imported here, since that takes a moment in which Ctrl-C is to be answered as in any other.
    from bpo.cli.audit import add_audit
    from bpo.cli.gradients import add_collect, add_doctor
    from bpo.cli.parser import Parser
    from bpo.cli.preview import add_preview
    from bpo.cli.responses import add_sample, add_score
    from bpo.cli.results import add_compare, add_report, add_show
    from bpo.cli.select import add_reselect, add_select
    from bpo.cli.store import add_store
    from bpo.cli.train import add_train

    parser = Parser(
        prog="bpo",
        description=bpo.__doc__.splitlines()[0] if bpo.__doc__ else None,
        epilog="bpo COMMAND --help has examples. Long options may be written with dashes or underscores.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="print the versions of bpo and of what it stands on"
    )
    parser.add_argument(
        "--print_completion",
        action=_Completion,
        choices=["bash", "zsh", "tcsh"],
        help="print what has a shell complete commands and options (needs the extra completion)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # In the order of --help.
    add_doctor(commands)
    add_select(commands)
    add_train(commands)
    add_reselect(commands)
    add_collect(commands)
    add_preview(commands)
    add_audit(commands)
    add_compare(commands)
    add_sample(commands)
    add_score(commands)
    add_show(commands)
    add_report(commands)
    add_store(commands)
    return parser


class _Completion(argparse.Action):
    """Prints a script for a shell."""

    def __call__(self, parser: argparse.ArgumentParser, _: Any, value: Any, *__: Any) -> None:
        print(parser.completion(value))  # type: ignore[attr-defined]
        parser.exit()


class _Version(argparse.Action):
    """Prints the versions of what takes part, which are looked up for this alone."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import platform
        from importlib import metadata

        from bpo import _core

        told = [f"{platform.python_implementation()} {platform.python_version()}"]
        told += [f"{platform.system()} {platform.machine()}, kernels for {_core.simd()}"]
        for name in _TOLD:
            try:
                told.append(f"{name} {metadata.version(name)}")
            except metadata.PackageNotFoundError:  # noqa: PERF203
                told.append(f"no {name}")
        print(f"bpo {bpo.__version__}\n{', '.join(told)}")
        parser.exit()


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"bpo: {in_words_of_the_shell(str(message))}", file=sys.stderr)
