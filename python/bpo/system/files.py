"""Text files that are there whole or not at all, and the settings in them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any


def write_whole(path: Path, text: str) -> Path:
    """Writes or replaces a text file; whoever reads it, or whatever interrupts this, finds the old text or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8", newline="\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings within settings under dotted names such as ``scorer.mode``, tuples as the lists of JSON."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat.update({f"{name}.{inner}": item for inner, item in flattened(value).items()})
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Returns the names whose values differ, or that one of the two lacks where the other's value is not None."""
    return [name for name in {**there, **here} if there.get(name) != here.get(name)]
