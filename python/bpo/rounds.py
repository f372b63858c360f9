"""Rounds of selection within one training: where they are kept, and how the pairs change under a running loop."""

from __future__ import annotations

import contextlib
import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from bpo.selection import Selection, SelectionError

if TYPE_CHECKING:
    from collections.abc import Iterator

_DIRECTORY = "rounds"
_MANIFEST = "selection.json"
# What Trainer keeps its state in.
_STATE = "trainer_state.json"


class RowNumbers(Dataset[int]):
    """The numbers 0 to n − 1, for a data loader that draws rows which are looked up when their step begins.

    Loaders fetch ahead, and workers hold copies of a data set: what they draw must not change with it.
    """

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def collate_rows(rows: list[int]) -> dict[str, torch.Tensor]:
    """A batch of row numbers."""
    return {"row": torch.tensor(rows)}


class SavedRounds(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Notes in every checkpoint which selections were saved before it.

    Attributes:
        saved: Number and SHA-256 of each round.
    """

    def __init__(self) -> None:
        self.saved: list[list[Any]] = []

    def state(self) -> dict[str, Any]:
        """What goes into the state of the trainer."""
        return {"args": {}, "attributes": {"saved": self.saved}}


def directory_of(number: int, parent: str | Path) -> Path:
    """Returns the directory of a round within that of all."""
    return Path(parent) / f"round-{number:03d}"


def save_round(selection: Selection, number: int, output_dir: str | Path) -> str:
    """Saves the selection of a round beside the checkpoints; returns its SHA-256 (hex)."""
    directory = directory_of(number, Path(output_dir) / _DIRECTORY)
    directory.parent.mkdir(parents=True, exist_ok=True)
    return _checksum(selection.save(directory))


def load_rounds(checkpoint: str | Path) -> list[tuple[int, Selection, str]]:
    """Loads the rounds that a checkpoint was trained on.

    Returns:
        Number, selection and SHA-256 of each, in order; nothing where the training had no rounds.

    Raises:
        FileNotFoundError: One is not beside the checkpoint.
        bpo.SelectionError: One is of another training, or damaged.
    """
    path = Path(checkpoint)
    if not (path / _STATE).is_file():
        return []
    state = TrainerState.load_from_json(str(path / _STATE)).stateful_callbacks.get(SavedRounds.__name__, {})
    loaded = []
    for number, checksum in state.get("attributes", {}).get("saved", []):
        directory = directory_of(number, path.resolve().parent / _DIRECTORY)
        if not (directory / _MANIFEST).is_file():
            raise FileNotFoundError(
                f"{path} was trained on the selection {directory}, which is not there. Keep the directory "
                f"'{_DIRECTORY}' beside the checkpoints."
            )
        if _checksum(directory) != checksum:
            raise SelectionError(
                f"{directory} is not the selection that {path} was trained on: another training has replaced it, or it "
                "was changed."
            )
        loaded.append((number, Selection.load(directory), checksum))
    return loaded


def _checksum(directory: Path) -> str:
    """SHA-256 of the manifest, which holds those of the other files."""
    return hashlib.sha256((directory / _MANIFEST).read_bytes()).hexdigest()


@contextlib.contextmanager
def untouched_training(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Lets a model in training be used for something else: random states stay, and so does its own arithmetic.

    Accelerate has wrapped its forward pass in mixed precision; selection decides on its precision itself.
    """
    states = random.getstate(), np.random.get_state()
    devices = [] if device.type in ("cpu", "mps") else [device.index or 0]
    wrapped = model.__dict__.get("forward") if hasattr(model, "_original_forward") else None
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        if wrapped is not None:
            model.forward = model._original_forward  # type: ignore[assignment]
        try:
            yield
        finally:
            if wrapped is not None:
                model.forward = wrapped
            random.setstate(states[0])
            np.random.set_state(states[1])
