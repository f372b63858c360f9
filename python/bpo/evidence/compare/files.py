"""The files of a comparison: where each is, in what format, and how it is written and read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from typing import TYPE_CHECKING, Any

import numpy as np

import bpo
from bpo.system.files import differing, flattened, replacing, write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

HEADER = {"format": "bpo-comparison", "format_version": 1}
"""What every file of ours begins with."""


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
        if output.is_file():
            raise FileExistsError(f"{output} is a file; name a directory.")
        if output.is_dir() and any(output.iterdir()) and not self.manifest.is_file():
            raise FileExistsError(f"{output} is not empty and holds no comparison; name another directory.")

    def check_manifest(self, settings: Mapping[str, Any]) -> None:
        """Writes down what all runs depend on, or compares it with what is there.

        Raises:
            ValueError: Something differs, by name.
        """
        manifest = {**HEADER, "settings": json.loads(json.dumps(settings))}
        if not self.manifest.is_file():
            write(self.manifest, json.dumps(manifest, indent=1) + "\n")
            return
        saved = read(self.manifest)
        there, here = flattened(saved["settings"]), flattened(manifest["settings"])
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
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

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


def read(path: Path) -> dict[str, Any]:
    """Reads one of our JSON files.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it.") from None
    if not isinstance(values, dict) or any(values.get(name) != value for name, value in HEADER.items()):
        raise ValueError(f"{path} is not of a comparison that this bpo {bpo.__version__} reads.")
    return values


def write(path: Path, text: str) -> None:
    """Writes a file, and the directory that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def read_logps(path: Path) -> dict[bytes, float]:
    """Reads log-probabilities of sequences by their content hashes; none where there is no file."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(zip(map(bytes, file["sequence_ids"]), file["logps"], strict=True))


def write_logps(path: Path, logps: Mapping[bytes, float]) -> None:
    """Writes log-probabilities of sequences; the file is replaced whole or not at all."""
    with replacing(path) as scratch:
        np.savez(
            scratch,
            sequence_ids=np.frombuffer(b"".join(logps), dtype=np.uint8).reshape(-1, 16),
            logps=np.array(list(logps.values()), dtype=np.float32),
        )
