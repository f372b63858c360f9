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

from bpo.data.rows import load_rows
from bpo.policy.models import model_fingerprint
from bpo.responses.sampling import sample_responses
from bpo.responses.scoring import score_responses
from bpo.selection.saved import SelectionError
from bpo.selection.selection import Selection

if TYPE_CHECKING:
    from collections.abc import Iterator


# Trainer's push_to_hub leaves out what begins with an underscore: it shall publish a model, not its data.
_DIRECTORY = "_rounds"
_MANIFEST = "selection.json"
RESAMPLING = {"temperature", "top_p", "max_new_tokens", "keep", "keep_existing", "batch_size"}
"""What a training may say about responses that it samples anew, beside how many."""

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

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Makes room in the state of a checkpoint whose training had no rounds, where Trainer looks for it."""
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())


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


def file_of(number: int, output_dir: str | Path) -> Path:
    """Returns the beginning of the names of the files with the responses of a round."""
    return directory_of(number, Path(output_dir) / _DIRECTORY)


def kept_rows(dataset: Any, selection: Selection) -> list[dict[str, Any]]:
    """Returns the rows of the data with pairs of prompts that breadth compression kept."""
    kept = np.array(selection.pairs["fate"]) != "breadth"
    wanted = set(selection.pairs["row"].to_numpy()[kept].tolist())
    return [dict(row) for index, row in enumerate(load_rows(dataset)) if index in wanted]


def resample(
    model: Any, rows: list[dict[str, Any]], scorer: Any, *, file: Path, progress: bool, **settings: Any
) -> list[dict[str, Any]]:
    """Samples responses to the prompts of some rows from a policy and scores them.

    Args:
        model: The policy.
        rows: Rows with prompts.
        scorer: What scores.
        file: Beginning of the names of two files that an interrupted round goes on from. They have the weights of the
            policy in their names, since responses of others are of no use.
        progress: Whether to show progress bars.
        **settings: Of :func:`bpo.sample_responses`.

    Returns:
        Rows of prompts, responses and scores.
    """
    name = f"{file.name}-{model_fingerprint(model)[:8]}"
    sampled = sample_responses(
        model, rows, output=file.with_name(f"{name}-responses.jsonl"), progress=progress, **settings
    )
    scored = score_responses(sampled, scorer, output=file.with_name(f"{name}-scores.jsonl"), progress=progress)
    listed: list[dict[str, Any]] = scored.to_list()
    return listed


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
