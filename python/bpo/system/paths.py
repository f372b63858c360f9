"""Paths that users name: those that must lie apart, and where saved models and adapters lie."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+(::[A-Za-z][\w+.-]+)*://")
_ADDRESS_IN_PATH = re.compile(r"[A-Za-z][\w+.-]+:/[^/]")

# What the loaders of damaged files raise, beside their own kinds of ValueError.
_DAMAGED = (
    SafetensorError,
    json.JSONDecodeError,
    UnicodeError,
    LookupError,
    AttributeError,
    EOFError,
    RecursionError,
    zipfile.BadZipFile,
)


def check_apart(
    written: Mapping[str, Any], read: Mapping[str, Any] | None = None, stores: Mapping[str, Any] | None = None
) -> None:
    """Checks before any work that nothing that will be written lies within, or replaces, anything else.

    Args:
        written: Paths of what will be written, by the names that users know them by.
        read: Paths of what is read; what is no path, or not there, is left aside.
        stores: Gradient stores that are read, so that nothing may be written into them, either.

    Raises:
        ValueError: Two are the same, or one lies within the other.
    """
    outputs, stored = list(_places(written)), list(_places(stores or {}))
    inputs = [*stored, *((name, path) for name, path in _places(read or {}) if path.exists())]
    for index, (name, path) in enumerate(outputs):
        for other, place in [*outputs[index + 1 :], *inputs]:
            if path == place:
                raise ValueError(f"{name} and {other} are the same, {path}; name two different paths.")
            if path in place.parents:
                raise ValueError(f"{other} {place} lies within {name} {path}; name paths that lie apart.")
        check_not_within(name, path, {**dict(outputs[index + 1 :]), **dict(stored)})


def check_not_within(name: str, path: Path, others: Mapping[str, Any]) -> None:
    """Checks that what will be written does not lie within something that is a whole by itself.

    Raises:
        ValueError: It does.
    """
    real = Path(os.path.realpath(path))
    for other, place in _places(others):
        if place in (real, *real.parents):
            raise ValueError(f"{name} {real} lies within {other} {place}; name paths that lie apart.")


def _places(named: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The real path of each that is one; addresses and data in memory are none."""
    for name, value in named.items():
        if isinstance(value, (str, os.PathLike)) and "://" not in os.fspath(value):
            yield name, Path(os.path.realpath(Path(value).expanduser()))


def is_url(path: object) -> bool:
    """Whether a path is an address such as ``s3://bucket/prefix``, and no place in the file system.

    Raises:
        ValueError: A Path that was made of an address, which lost a slash by that.
    """
    if isinstance(path, os.PathLike):
        text = os.fspath(path)
        if isinstance(text, str) and _ADDRESS_IN_PATH.match(text) and not Path(text).exists():
            raise ValueError(f"{text}: pass an address as text, not as a Path, which takes one of its slashes away.")
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def expanded(path: str | os.PathLike[str]) -> str | Path:
    """Returns a path with ``~`` expanded, or the address that it is."""
    return os.fspath(path) if is_url(path) else Path(path).expanduser()


def joined(parent: str | os.PathLike[str], name: str) -> str | Path:
    """Returns what is called so in a directory or below an address."""
    return f"{os.fspath(parent).rstrip('/')}/{name}" if is_url(parent) else Path(parent) / name


def check_path(name: str) -> str:
    """Returns a model path with ``~`` expanded, or a hub id; fails early on a path that cannot be a model's.

    Raises:
        FileNotFoundError: No such directory, or no model in it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(name):
            raise FileNotFoundError(f"{name}: the directory holds no config.json, so it is not a saved model.")
    elif path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such model directory.")
    return str(path) if path.is_dir() else name


def is_adapter(name: str) -> bool:
    """Whether a path holds a saved PEFT adapter."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says which model could not be loaded, which the loader's own message does not.

    Raises:
        OSError: It is not there, or one of its files is damaged.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{name} is no local directory, or not a whole model, and the hub does not give it: {error}"
        ) from error
    except _DAMAGED as error:
        raise OSError(f"{name}: a file of the model is damaged: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:  # as tokenizers raises them
            raise
        raise OSError(f"{name}: a file of the model or its tokenizer is damaged: {error}") from error
