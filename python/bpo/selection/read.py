"""The first stage: the data, and the target where there is one, to the pool that is chosen from; and where from."""

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

import numpy as np

import bpo
from bpo.data.candidates import Skipped
from bpo.data.pairing import largest_gaps
from bpo.data.read import read_configured
from bpo.data.rows import load_rows
from bpo.selection.inputs import Goal, Pool
from bpo.system.secrets import without_secrets

if TYPE_CHECKING:
    from collections.abc import Sequence

    import datasets
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.data.rows import Origin, Rows
    from bpo.selection.inputs import Inputs
    from bpo.selection.request import Request
    from bpo.selection.sources import Source

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


def read(dataset: Rows, target: Any, source: Source, request: Request) -> Pool:
    """Reads the data, and the target where there is one: steps 1 to 4 of the method are what the data has already.

    Raises:
        ValueError: Unusable data, or pairs without scores where something needs them.
    """
    residual = request.config.length_control == "residual"
    # Which gaps are largest is not known before the length effect.
    reading = dataclasses.replace(source.reading, max_pairs_per_prompt=None) if residual else source.reading
    candidates = read_configured(dataset, reading)
    _check_scores(candidates, request)
    wanted = None
    if target is not None and "gradients" in request.needs:
        target = load_rows(target)
        wanted = read_configured(target, dataclasses.replace(reading, trust=None))
    inputs, noted = source.find(candidates), Skipped()
    effect = inputs.length_effect()
    if residual:
        inputs = _without_length(inputs, effect.slope, request.config, noted)
    goal = None
    if wanted is not None:
        found = source.find(wanted)
        goal = Goal(found, _subtasks(target, found.candidates))
    return Pool(inputs, goal, effect, noted)


def _without_length(inputs: Inputs, slope: float, config: SelectConfig, noted: Skipped) -> Inputs:
    """Takes the length effect out of the scores, names the pairs that turn, and caps the pairs by their gaps."""
    inputs, turned = inputs.without_length(slope)
    for row in inputs.candidates.pair_rows[turned]:
        noted.add("pair turned round, since it was length that made the other response preferred", f"row {row}")
    if config.max_pairs_per_prompt is None:
        return inputs
    candidates, most = inputs.candidates, config.max_pairs_per_prompt
    return inputs.keep_pairs(largest_gaps(candidates.prompt_of_pair, candidates.score_gaps, most))[0]


def _subtasks(target: Any, candidates: Candidates) -> npt.NDArray[np.int64]:
    """The subtask of each pair of the target, (T,) int64: the value of the column ``subtask``, numbered from 0."""
    if "subtask" not in target.column_names:
        return np.zeros(len(candidates.pairs), dtype=np.int64)
    names = [json.dumps(row["subtask"], sort_keys=True, default=str) for row in target]
    return np.unique([names[row] for row in candidates.pair_rows], return_inverse=True)[1]


def _check_scores(candidates: Candidates, request: Request) -> None:
    """Checks that pairs have scores where something needs them."""
    unscored = np.flatnonzero(np.isnan(candidates.score_gaps))
    if len(unscored) == 0:
        return
    if "scores" in request.needs:
        raise ValueError(
            f"strategy={request.strategy!r} needs scores, but {len(unscored)} of {len(candidates.pairs)} pairs have "
            "none. Give the columns score_chosen and score_rejected, or scored responses."
        )
    if request.config.length_control == "residual":
        raise ValueError(
            f"length_control='residual' needs scores, but {len(unscored)} of {len(candidates.pairs)} pairs have none, "
            f"such as that of row {candidates.pair_rows[unscored[0]]}. Give score_chosen and score_rejected, or use "
            "length_control='balance', which needs no scores."
        )


def provenance_of(model: str | None, revision: str | None, told: Told) -> dict[str, Any]:
    """Returns where a selection comes from, as plain values; what is not known is not there."""
    breadth = told.breadth
    found = {
        "model": model,
        "model_revision": revision,
        "data": told.origin.name,
        "data_readable": told.origin.readable,
        "data_fingerprint": told.fingerprint,
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
