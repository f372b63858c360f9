"""What several commands read alike: FIELD=VALUE, counts and fractions, and how to reach a server."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.system.files import read_json
from bpo.system.paths import check_apart, is_url

if TYPE_CHECKING:
    from typing import TypeAlias

    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]


def place(text: str) -> str | Path:
    """Reads a directory, or an address such as ``s3://bucket/prefix``."""
    return text if is_url(text) else Path(text)


def count_or_fraction(text: str) -> int | float:
    """Reads ``500`` as a count and ``0.5`` as a fraction."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def add_fields(command: argparse.ArgumentParser, description: str) -> None:
    """Adds ``--set FIELD=VALUE``."""
    command.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=description)


def fields(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what ``--set`` gave, by name."""
    return dict(map(field, options.set))


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


def add_server(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that say how to talk to a server."""
    group = command.add_argument_group("server")
    group.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable that holds the key")
    group.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: 8)")
    group.add_argument("--requests-per-minute", type=float)
    group.add_argument("--timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    group.add_argument("--max-retries", type=int, default=6, help="attempts after the first (default: 6)")
    wait = "longest Retry-After that is waited for, in seconds (default: 600)"
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
