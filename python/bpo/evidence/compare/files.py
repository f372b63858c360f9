"""The files of a comparison: where each is, in what format, and how it is written and read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

import bpo
from bpo.system.files import differing, flattened, read_json, replacing, write_whole
from bpo.system.locks import locked

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

HEADER = {"format": "bpo-comparison", "format_version": 1}
"""What every file of ours begins with."""

_LOCK = ".comparing.lock"


@dataclasses.dataclass(frozen=True)
class ComparisonFiles:
    """Where the files of a comparison are.

    Attributes:
        directory: The directory that holds all of them.
    """

    directory: Path

    @property
    def manifest(self) -> Path:
        """What all runs depend on."""
        return self.directory / "comparison.json"

    @property
    def store(self) -> Path:
        """The gradient store, where none was there before."""
        return self.directory / "store"

    @property
    def reference(self) -> Path:
        """Log-probabilities of the reference."""
        return self.directory / "reference.npz"

    @property
    def costs(self) -> Path:
        """Seconds of what was computed once."""
        return self.directory / "costs.json"

    @property
    def results(self) -> Path:
        """What the comparison found."""
        return self.directory / "results.json"

    @property
    def responses(self) -> Path:
        """Directory of the responses that were sampled."""
        return self.directory / "responses"

    @property
    def verdicts(self) -> Path:
        """What a judge said of responses."""
        return self.directory / "verdicts.jsonl"

    def start_responses(self, seed: int) -> Path:
        """The starting policy's responses to the held-out prompts of a seed."""
        return self.responses / f"seed{seed}-start.json"

    def run(self, name: str) -> Path:
        """A finished run."""
        return self.directory / "runs" / f"{name}.json"

    def runs_of(self, seed: int) -> list[Path]:
        """The finished runs of a seed, by name."""
        return sorted((self.directory / "runs").glob(f"seed{seed}-*.json"))

    def errors(self, name: str) -> Path:
        """The traceback of a run that failed."""
        return self.directory / "errors" / f"{name}.txt"

    def check_directory(self) -> None:
        """Checks that the directory is new, empty, or that of a comparison.

        Raises:
            FileExistsError: It is not.
        """
        output = self.directory
        if output.exists() and not output.is_dir():
            raise FileExistsError(f"{output} is a file; name a directory.")
        there = {path.name for path in output.iterdir()} - {_LOCK} if output.is_dir() else set()
        if there and not self.manifest.is_file():
            raise FileExistsError(f"{output} is not empty and holds no comparison; name another directory.")

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keeps every other comparison out of the directory.

        Raises:
            BlockingIOError: One is at work there.
        """
        return locked(self.directory, _LOCK, "is comparing there; wait until it is done, or name another output.")

    def check_manifest(self, settings: Mapping[str, Any]) -> None:
        """Writes down what all runs depend on, or compares it with what is there.

        Raises:
            ValueError: Something differs, by name.
        """
        settings = json.loads(json.dumps(settings, default=_refuse))
        if not self.manifest.is_file():
            write(self.manifest, json.dumps({**HEADER, "settings": settings}, indent=1) + "\n")
            return
        saved = read(self.manifest, {"settings": dict})
        there, here = flattened(saved["settings"]), flattened(settings)
        changed = differing(there, here)
        if changed:
            raise ValueError(
                f"{self.directory} holds a comparison with another {', '.join(changed)}: {changed[0]} is "
                f"{there.get(changed[0])!r} there and {here.get(changed[0])!r} here. Name another output."
            )


class Costs:
    """Seconds of each stage, kept over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.is_file():
            try:
                there = read_json(path.read_bytes(), "its text")
            except ValueError as error:
                raise damaged(path, error) from None
            if not isinstance(there, dict) or not all(isinstance(value, (int, float)) for value in there.values()):
                raise damaged(path, "it does not map stages to seconds")
            self.seconds = there

    @contextlib.contextmanager
    def add(self, stage: str) -> Iterator[None]:
        """Adds the time of a block."""
        try:
            with timed(self.seconds, stage):
                yield
        finally:
            write(self.path, json.dumps(self.seconds) + "\n")


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time of a block to the seconds of its stage."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def read(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Reads one of our JSON files.

    Args:
        path: The file.
        fields: Names that it must have, and their types.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    try:
        values = read_json(path.read_bytes(), "its text")
    except ValueError as error:
        raise damaged(path, error) from None
    if not isinstance(values, dict) or any(values.get(name) != value for name, value in HEADER.items()):
        raise ValueError(f"{path} is not of a comparison that this bpo {bpo.__version__} reads.")
    wrong = [name for name, kind in fields.items() if not isinstance(values.get(name), kind)]
    if wrong:
        raise damaged(path, f"it has no {', '.join(wrong)}, or in another type")
    return values


def damaged(path: Path, reason: object) -> ValueError:
    """Returns the error for a file that is not as it was written; without it, what it held is computed anew."""
    return ValueError(f"{path} is damaged ({reason}); remove it, and it is made again.")


def _refuse(value: object) -> None:
    """What JSON calls with a value that it has no form for, such as a date of YAML."""
    raise ValueError(f"{value!r} in the settings cannot be saved as JSON; write it as text or as a number")


def write(path: Path, text: str) -> None:
    """Writes a file, and the directory that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def read_logps(path: Path) -> dict[bytes, float]:
    """Reads log-probabilities of sequences by their content hashes; none where there is no file.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, logps = file["sequence_ids"], file["logps"]
    except (ValueError, LookupError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, error) from None
    if ids.dtype != np.uint8 or ids.ndim != 2 or ids.shape[1] != 16 or logps.shape != ids.shape[:1]:
        raise damaged(path, f"its arrays are {ids.dtype} {ids.shape} and {logps.dtype} {logps.shape}")
    if logps.dtype != np.float32 or not np.isfinite(logps).all():
        raise damaged(path, "its log-probabilities are not finite numbers")
    return dict(zip(map(bytes, ids), logps, strict=True))


def write_logps(path: Path, logps: Mapping[bytes, float]) -> None:
    """Writes log-probabilities of sequences; the file is replaced whole or not at all."""
    with replacing(path) as scratch:
        np.savez(
            scratch,
            sequence_ids=np.frombuffer(b"".join(logps), dtype=np.uint8).reshape(-1, 16),
            logps=np.array(list(logps.values()), dtype=np.float32),
        )
