"""The parser of the command line: TRL's names beside positions, underscores as dashes, and words that were meant."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bpo.system.optional import DISTRIBUTION

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def did_you_mean(word: str, known: Collection[str]) -> str:
    """Returns ``"; did you mean X?"`` where one of the known words is close, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def field_names() -> list[str]:
    """Returns what ``--set`` takes."""
    import dataclasses

    from bpo.config import SelectConfig

    return [field.name for field in dataclasses.fields(SelectConfig)]


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples as they stand, and the default of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, argparse.SUPPRESS) or isinstance(action.default, (bool, list))
        if plain or action.help is None or "default" in action.help:
            return action.help
        return f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser that names what was probably meant, before anything else is looked at.

    Long options may be written with dashes or underscores. What :meth:`add_input` adds may be given by its position or
    by name. ``--config`` names a YAML file of options, where the parser has that option.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, **settings)
        self._inputs: list[tuple[str, str, dict[str, Any]]] = []
        self._passed_on: list[str] = []
        self.passes_on = False
        """Whether options that it does not know are left to another parser."""

    def add_input(self, name: str, option: str, **settings: Any) -> None:
        """Adds something that must be given, by its position or as an option."""
        self._inputs.append((name, option, settings))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Reads arguments, once each option is known to be one."""
        given = list(sys.argv[1:] if args is None else args)
        if self._subparsers is not None:
            return super().parse_known_args(self._spelt_before_command(given), namespace)
        given = self._spelt(given)
        given = [*self._from_file(given), *given]
        self._place_inputs(given)
        options, more = super().parse_known_args(given, namespace)
        return options, [*self._passed_on, *more]

    def error(self, message: str) -> NoReturn:
        """Ends with one sentence, and where to find more."""
        self.exit(2, f"{self.prog}: {message}\nSee {self.prog} --help.\n")

    def format_help(self) -> str:
        """The help, with what can be given in two ways."""
        self._place_inputs(None)
        return super().format_help()

    def completion(self, shell: str) -> str:
        """Returns the script by which a shell completes commands and options.

        Raises:
            ImportError: shtab is missing.
        """
        try:
            import shtab
        except ImportError as error:
            raise ImportError(
                f"Completion needs shtab, which is not installed: pip install '{DISTRIBUTION}[completion]'"
            ) from error
        self._place_all()
        return str(shtab.complete(self, shell))

    def _place_all(self) -> None:
        self._place_inputs(None)
        for action in self._actions:
            for command in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                command._place_all()

    def _place_inputs(self, given: Sequence[str] | None) -> None:
        """Has each input read from its option if that was given, else from its position; None is to show both."""
        for name, option, settings in self._inputs:
            named = given is not None and any(word == option or word.startswith(f"{option}=") for word in given)
            if not named:
                self.add_argument(name, **settings)
            shown = {**settings, "help": f"the same as the positional argument {settings.get('metavar', name)}"}
            if given is not None and named:
                self.add_argument(option, dest=name, required=True, **{**shown, "metavar": name.upper()})
            elif given is None or not named:
                self.add_argument(
                    option,
                    dest=name,
                    default=argparse.SUPPRESS,
                    **{**shown, "metavar": settings.get("metavar", name).upper()},
                )
        self._inputs = []

    def _options(self) -> dict[str, str]:
        """Every long option, by its name in dashes."""
        known = [*self._option_string_actions, *(option for _, option, _ in self._inputs)]
        return {option.replace("_", "-"): option for option in known if option.startswith("--")}

    def _spelt(self, given: Sequence[str], place: str = "") -> list[str]:
        """Returns the arguments with each option as it is known here."""
        known = self._options()
        spelt: list[str] = []
        for index, word in enumerate(given):
            name, equals, value = word.partition("=")
            if word == "--":
                return [*spelt, *given[index:]]
            if not word.startswith("--"):
                spelt.append(word)
                continue
            canonical = name.replace("_", "-")
            if canonical in known:
                spelt.append(known[canonical] + equals + value)
            elif not self.passes_on and not any(option.startswith(canonical) for option in known):
                self.error(f"{place}{name}: there is no such option{self._meant(canonical, known)}")
            else:
                spelt.append(word)
        return spelt

    def _meant(self, name: str, known: Mapping[str, str]) -> str:
        if "--set" in known:
            field = name.removeprefix("--").replace("-", "_")
            if field in field_names():
                return f"; did you mean --set {field}=…?"
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        return f"; did you mean {known[close[0]]}?" if close else ""

    def _spelt_before_command(self, given: Sequence[str]) -> list[str]:
        """Returns the arguments with each option before the command as it is known here; checks the command."""
        commands = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction)).choices
        known, spelt = self._options(), list(given)
        places = iter(range(len(given)))
        for place in places:
            name, equals, value = given[place].partition("=")
            if not name.startswith("-"):
                if given[place] not in commands:
                    close = did_you_mean(given[place], commands) or f"; there are {', '.join(commands)}"
                    self.error(f"{given[place]}: there is no such command{close}")
                return spelt
            canonical = name.replace("_", "-")
            if canonical in known:
                spelt[place] = known[canonical] + equals + value
                if not equals and self._option_string_actions[known[canonical]].nargs is None:
                    next(places, None)  # its value
            elif name.startswith("--") and not any(option.startswith(canonical) for option in known):
                self.error(f"{name}: there is no such option before a command")
        return spelt

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            words = [str(choice) for choice in action.choices]
            meant = did_you_mean(str(value), words) or f"; it takes {', '.join(words)}"
            raise argparse.ArgumentError(action, f"{value!r} is not among its values{meant}")

    def _from_file(self, given: Sequence[str]) -> list[str]:
        """Returns the options of the file that ``--config`` names, which those of the command line come after."""
        if "--config" not in self._option_string_actions:
            return []
        path = None
        for word, following in zip(given, [*given[1:], ""], strict=True):
            if word == "--config" and following:
                path = following
            elif word.startswith("--config="):
                path = word.partition("=")[2]
        if path is None:
            return []
        return self._spelt(self._read(Path(path)), f"--config {path}: ")

    def _read(self, path: Path) -> list[str]:
        import yaml

        try:
            values = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeError) as error:
            self.error(f"--config {path}: cannot be read: {getattr(error, 'strerror', None) or error}")
        except yaml.YAMLError as error:
            self.error(f"--config {path}: no YAML: {' '.join(str(error).split())}")
        if not isinstance(values, Mapping):
            self.error(f"--config {path}: expected options and their values, as in budget: 500")
        known, words = self._options(), []
        for name, value in values.items():
            option = f"--{name}"
            items = value if isinstance(value, list) else [value]
            if isinstance(value, Mapping):
                items = [f"{key}={_text(item)}" for key, item in value.items()]
            if value is None:
                continue
            if option.replace("_", "-") not in known and self.passes_on:  # as transformers reads it
                self._passed_on += [option, *map(_text, items)]
            elif value is True:
                words.append(option)
            elif value is not False:
                words += [f"{option}={_text(item)}" for item in items]
        return words


def _text(value: Any) -> str:
    """A value of YAML as the command line has it: what is no text as JSON."""
    return value if isinstance(value, str) else json.dumps(value)
