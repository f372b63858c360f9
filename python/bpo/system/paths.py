"""Paths that must not lie within each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


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
