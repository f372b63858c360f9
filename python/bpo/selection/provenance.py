"""What a selection was made of and with, and the card that tells of it where it is published."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import numbers
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.config import SelectConfig
from bpo.system.paths import is_url
from bpo.system.secrets import without_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import datasets

    from bpo.data.rows import Origin

_TITLE = "BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment"
PAPER = {
    "title": _TITLE,
    "id": "2411.10914",
    "citation": f"""\
@inproceedings{{wang2025bpo,
    title     = {{{{{_TITLE}}}}},
    author    = {{Wang, Sizhe and Tong, Yongqi and Zhang, Hengyuan and Li, Dawei and Zhang, Xin and Chen, Tianlong}},
    year      = 2025,
    booktitle = {{Proceedings of NAACL 2025 (Volume 1: Long Papers)}},
    pages     = {{8811--8826}},
    doi       = {{10.18653/v1/2025.naacl-long.443}},
}}""",
}
"""As TRL's trainers name the paper of their method."""

_HEAD_OF_CARD = (
    "---",
    "tags: [bpo, dpo, preference, trl]",
    "configs:",
    "- config_name: default",
    "  data_files: [{split: train, path: dataset/train.parquet}]",
    "- config_name: candidates",
    "  data_files: [{split: train, path: pairs.parquet}]",
)
_TEXT_OF_CARD = (
    "---",
    "",
    "# Preference pairs chosen by bpo",
    "",
    "Chosen by the package `bpo`, a reconstruction of [the paper](https://arxiv.org/abs/2411.10914) cited below, for",
    "training with TRL's `DPOTrainer`. `load_dataset(...)` gives the training set. The configuration `candidates` has",
    "every pair that there was to choose from, with its scores and what became of it; `bpo.Selection.load` reads the",
    "whole folder.",
    "",
)

# What results may depend on.
_PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "pyarrow")
_COMMANDS = ("bpo", "balanced-preference-optimization")


@dataclasses.dataclass(frozen=True)
class Told:
    """What a selection tells beside what it is made of.

    Attributes:
        columns: The other columns of the data, of all its rows.
        origin: Where the data comes from.
        fingerprint: SHA-256 of its responses and pairs (hex).
        breadth: What was asked for.
    """

    columns: datasets.Dataset
    origin: Origin
    fingerprint: str
    breadth: int | float | None


def provenance_of(model: str | None, revision: str | None, told: Told) -> dict[str, Any]:
    """Returns where a selection comes from, as plain values; what is not known is not there."""
    breadth = told.breadth
    found = {
        "model": model,
        "model_revision": revision,
        "data": f"{told.origin.name}, fingerprint {told.fingerprint[:16]}",
        "split": told.origin.split,
        "license": told.origin.license,
        "breadth": int(breadth) if isinstance(breadth, numbers.Integral) else breadth and float(breadth),
        "command": _command(sys.argv),
        "versions": _versions(),
        "created": _now(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _versions() -> dict[str, str]:
    versions = {"bpo": bpo.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        # Without what says its version where it was copied into place.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _now() -> str:
    """The time in UTC, to the second; that of SOURCE_DATE_EPOCH where builds are to be the same each time."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    zone = datetime.timezone.utc
    now = datetime.datetime.fromtimestamp(int(epoch), zone) if epoch.isdecimal() else datetime.datetime.now(zone)
    return now.isoformat(timespec="seconds")


def _command(words: Sequence[str]) -> str | None:
    """The command line, without what looks like a secret; None for a program that is not bpo's command."""
    program = Path(words[0]) if words else Path()
    if program.name != "__main__.py" and program.stem in _COMMANDS:
        program = Path(program.stem)
    elif program.parts[-2:] == ("bpo", "__main__.py"):
        program = Path("bpo")
    else:
        return None
    shown, name = [str(program)], ""
    for word in words[1:]:
        option, equals, value = word.partition("=") if word.startswith("--") else (name, "", word)
        hidden = without_secrets({option.lstrip("-"): value})[0][option.lstrip("-")]
        shown.append(f"{option}{equals}{hidden}" if word.startswith("--") else hidden)
        name = word if word.startswith("--") and not equals else ""
    return shlex.join(shown)


def data_card(
    made: Mapping[str, Any],
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    columns: Sequence[str],
    summary: str,
    license: str | None,
) -> str:
    """Returns the README.md of a data set that holds a selection.

    Args:
        made: Its provenance.
        facts: More to say of it, in the same table.
        config: Its settings.
        columns: Those of the training set.
        summary: Its figures, in lines of text.
        license: Of the data; None takes what ``made`` says.
    """
    license = license or made.get("license")
    default = SelectConfig().to_dict()
    settings = [f"- `{name}={value!r}`" for name, value in config.items() if name in default and value != default[name]]
    return "\n".join(
        [
            *_HEAD_OF_CARD,
            *([f"license: {json.dumps(license)}"] if license else []),
            *_TEXT_OF_CARD,
            *_facts(made, facts, license),
            "",
            *(["Settings that are not the defaults:", "", *settings, ""] if settings else []),
            "## What was chosen",
            "",
            "```text",
            summary,
            "```",
            "",
            f"Columns: {', '.join(f'`{name}`' for name in columns)}.",
            "",
            "## Citation",
            "",
            "```bibtex",
            PAPER["citation"],
            "```",
            "",
        ]
    )


def _facts(made: Mapping[str, Any], facts: Mapping[str, Any], license: str | None) -> list[str]:
    """The rows of a table: what was selected from, and by what."""
    versions = (f"{name} {version}" for name, version in made.get("versions", {}).items())
    rows = {
        **facts,
        "breadth": made.get("breadth", "all prompts"),
        "model": made.get("model"),
        "revision of the model": made.get("model_revision"),
        "data": made.get("data"),
        "split": made.get("split"),
        "licence of the data": license or "not known here",
        "made": made.get("created"),
        "versions": ", ".join(versions) or None,
    }
    return ["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows.items() if value is not None)]


def published(provenance: dict[str, Any]) -> dict[str, Any]:
    """Returns the provenance for everybody: no command, and of what lies on this machine the name alone."""
    shown = {name: value for name, value in provenance.items() if name != "command"}
    for name in ("model", "data"):
        place, comma, rest = str(shown.get(name, "")).partition(", fingerprint ")
        if place and not is_url(place) and (Path(place).is_absolute() or Path(place).exists()):
            shown[name] = f"{Path(place).name}{comma}{rest}"
    return shown
