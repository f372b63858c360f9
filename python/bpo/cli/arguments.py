"""What several commands read alike: data sets, FIELD=VALUE, counts and fractions, outputs, and servers."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.parser import Parser, did_you_mean, field_names
from bpo.system.files import read_json
from bpo.system.paths import check_apart, is_url

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from bpo.config import SelectConfig

    Commands: TypeAlias = argparse._SubParsersAction[Parser]


def place(text: str) -> str | Path:
    """Reads a directory, or an address such as ``s3://bucket/prefix``."""
    return text if is_url(text) else Path(text)


def count_or_fraction(text: str) -> int | float:
    """Reads ``500`` as a count and ``0.5`` as a fraction."""
    try:
        value = float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        value = 0
    if value <= 0 or (isinstance(value, float) and value > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no count such as 500, nor a fraction such as 0.5 or 1.0")
    return value


def examples(*lines: str) -> str:
    """Returns the end of a help text."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def add_model(command: Parser, text: str = "path or hub id of the policy") -> None:
    """Adds the model, by its position or as TRL's ``--model_name_or_path``."""
    command.add_input("model", "--model_name_or_path", help=text)


def add_dataset(command: Parser, text: str = "file, directory or hub id of the preference data") -> None:
    """Adds the data set, by its position or as TRL's ``--dataset_name``, and which part of it is meant."""
    command.add_input("dataset", "--dataset_name", help=f"{text}; - reads JSON lines from the standard input")
    group = command.add_argument_group("dataset")
    group.add_argument("--dataset_config", metavar="NAME", help="configuration of a data set of the hub")
    group.add_argument(
        "--split", "--dataset_train_split", metavar="NAME", help="split of a data set that has several (default: train)"
    )
    group.add_argument(
        "--column",
        action="append",
        default=[],
        type=_column,
        metavar="NAME=YOURS",
        help="the column NAME of the accepted formats is called YOURS in the data, as in prompt=question; repeatable",
    )


def _column(text: str) -> tuple[str, str]:
    name, equals, theirs = text.partition("=")
    if not (name and equals and theirs):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=YOURS, as in prompt=question")
    return name, theirs


def dataset_of(options: argparse.Namespace) -> Any:
    """Returns the data set that was named, for the functions of bpo: as it was named where that says all.

    Raises:
        FileNotFoundError: No such path or data set.
        ValueError: It cannot be read, or has no such split, configuration or column.
    """
    asked = {"split": options.split, "name": options.dataset_config, "columns": dict(options.column)}
    if options.dataset != "-" and not any(asked.values()):
        return options.dataset
    from bpo.data.files import read_stream
    from bpo.data.rows import ListRows, load_rows

    if options.dataset != "-":
        return load_rows(options.dataset, **asked)
    if options.split or options.dataset_config:
        raise ValueError("--split and --dataset_config belong to data sets of several parts, which - is not")
    return load_rows(ListRows(*read_stream(sys.stdin.buffer)), columns=asked["columns"])


def check_dataset(options: argparse.Namespace) -> None:
    """Checks before anything is loaded that the data set can be one.

    Raises:
        FileNotFoundError: No such path, and not the form of a hub id.
    """
    if options.dataset != "-":
        from bpo.data.files import check_named

        check_named(options.dataset)


def check_stores(*stores: str | Path) -> None:
    """Checks before anything is loaded that gradient stores can be there; addresses are left to their store.

    Raises:
        FileNotFoundError: One is no directory.
    """
    for store in stores:
        if not is_url(store) and not Path(store).is_dir():
            raise FileNotFoundError(f"{store} holds no gradient store: there is no such directory")


def add_fields(command: Parser, description: str) -> None:
    """Adds ``--set FIELD=VALUE`` and ``--config``."""
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=description)
    command.add_argument(
        "--config", metavar="FILE", help="YAML file of options by their names; those of the command line come after"
    )


def fields(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what ``--set`` gave, by name.

    Raises:
        ValueError: No FIELD=VALUE, or a name that is not a field.
    """
    given = dict(map(field, options.set))
    for name in given:
        if name not in field_names():
            raise ValueError(f"--set {name}=…: there is no such field{did_you_mean(name, field_names())}")
    return given


def settings(options: argparse.Namespace) -> SelectConfig:
    """Returns the settings that ``--set`` gave, checked."""
    from bpo.config import SelectConfig

    return SelectConfig.from_dict(fields(options))


def field(text: str) -> tuple[str, Any]:
    """Reads ``FIELD=VALUE``: a value of JSON, or else text.

    Raises:
        ValueError: There is no ``=``.
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text}: write FIELD=VALUE")
    try:
        return name, read_json(value, name)
    except ValueError:
        return name, value


def add_saying(command: Parser) -> None:
    """Adds ``--quiet`` and ``--json``."""
    said = command.add_mutually_exclusive_group()
    said.add_argument("--quiet", action="store_true", help="no progress bars, and no summary at the end")
    said.add_argument("--json", action="store_true", help="no progress bars, and one JSON object in place of a summary")


def add_tokenizer(command: Parser) -> None:
    """Adds ``--processing_class``, for what knows no model."""
    command.add_argument(
        "--processing_class",
        metavar="PATH",
        help="path or hub id of a model with the tokenizer that the store was made with; only asked for where "
        "responses begin at different tokens in different pairs",
    )


def silent(options: argparse.Namespace) -> bool:
    """Whether no progress is shown."""
    return bool(options.quiet or options.json)


def say(options: argparse.Namespace, text: Callable[[], str], values: Callable[[], dict[str, Any]]) -> None:
    """Prints a summary as text, or its values as JSON, as was asked for."""
    if options.json:
        print(json.dumps(values(), default=str))
    elif not options.quiet:
        print(text())


def check_writable(name: str, path: str | Path | None, *, endings: tuple[str, ...] = ()) -> None:
    """Checks before any work that something can be written at a path; addresses are left to their store.

    Args:
        name: The option that named it.
        path: What will be written; None is nothing.
        endings: Those that its name may have.

    Raises:
        ValueError: Another ending.
        OSError: It is a directory where a file is wanted, or nothing can be written there.
    """
    if path is None or is_url(path):
        return
    path = Path(path).expanduser()
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{name} {path}: the name must end in {' or '.join(endings)}")
    if endings and path.is_dir():
        raise IsADirectoryError(f"{name} {path}: is a directory; name a file")
    there = next(parent for parent in [*([] if endings else [path]), *path.absolute().parents] if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{name} {path}: {there} is no directory")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{name}: nothing can be written there: {error.strerror}", str(there)) from None


def add_server(command: Parser) -> None:
    """Adds the arguments that say how to talk to a server."""
    group = command.add_argument_group("server")
    group.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable that holds the key")
    group.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    group.add_argument("--requests-per-minute", type=float, help="at most so many; no limit by default")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for one request")
    group.add_argument("--max-retries", type=int, default=6, help="attempts after the first")
    wait = "longest Retry-After that is waited for, in seconds"
    group.add_argument("--max-retry-after", type=float, default=600.0, metavar="SECONDS", help=wait)
    group.add_argument("--proxy", metavar="URL", help="HTTP proxy; no environment variable names one")
    group.add_argument("--ca-file", type=Path, help="PEM file of certificates to trust in place of the system's")
    group.add_argument("--cache", type=Path, help="a .jsonl file of replies, which are not asked for twice")
    group.add_argument("--extra-body", type=_extra_body, metavar="JSON", help="more fields of every request")


def check_rows(options: argparse.Namespace, **read: Any) -> None:
    """Checks that the files that rows and replies are written to are no others that are written or read.

    Raises:
        ValueError: They are.
    """
    check_apart(
        {
            "--output": options.output,
            "the manifest of --output": options.output.with_suffix(".manifest.json"),
            "--cache": options.cache,
        },
        {"dataset": options.dataset, **read},
    )


def _extra_body(text: str) -> Any:
    """Reads JSON, in words that argparse prints."""
    try:
        return read_json(text, "it")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def server(url: str, options: argparse.Namespace) -> bpo.ChatServer:
    """Returns the server at an address, with the model that ``--model`` names.

    Raises:
        ValueError: No ``--model``, or no such environment variable.
    """
    if not options.model_name:
        raise ValueError(f"--model is needed: the name of the model at {url}.")
    key = None
    if options.api_key_env:
        key = os.environ.get(options.api_key_env)
        if not key:
            raise ValueError(f"--api-key-env: there is no environment variable {options.api_key_env}.")
    return bpo.ChatServer(
        url,
        options.model_name,
        key,
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        timeout=options.timeout,
        max_retries=options.max_retries,
        max_retry_after=options.max_retry_after,
        proxy=options.proxy,
        ca_file=options.ca_file,
        cache=options.cache,
        extra_body=options.extra_body,
    )
