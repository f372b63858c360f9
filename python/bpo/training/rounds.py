"""Rounds of selection within one training: saved beside its checkpoints, and loaded by whoever resumes."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from bpo.selection.saved import SelectionError
from bpo.selection.selection import Selection
from bpo.system.files import read_json
from bpo.system.paths import joined

# Trainer's push_to_hub leaves out what begins with an underscore: it shall publish a model, not its data.
_DIRECTORY = "_rounds"
_MANIFEST = "selection.json"

# What Trainer keeps its state in.
_STATE = "trainer_state.json"


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
    return Path(parent) / _name_of(number)


def store_of(number: int, parent: str) -> str | Path:
    """Returns the gradient store of a round within the directory, or below the address, of all."""
    return joined(parent, _name_of(number))


def _name_of(number: int) -> str:
    return f"round-{number:03d}"


def save_round(selection: Selection, number: int, output_dir: str | Path) -> str:
    """Saves the selection of a round beside the checkpoints; returns its SHA-256 (hex)."""
    directory = directory_of(number, Path(output_dir) / _DIRECTORY)
    directory.parent.mkdir(parents=True, exist_ok=True)
    selection.save(directory)
    return _checksum(directory)


def last_whole_checkpoint(output_dir: str | Path) -> str | None:
    """Returns the last checkpoint that is whole: Trainer writes its state last, and a kill may leave half of it."""
    found = []
    for state in Path(output_dir).glob(f"checkpoint-*/{_STATE}"):
        with contextlib.suppress(ValueError):
            read_json(state.read_bytes(), state)
            found.append((int(state.parent.name.rpartition("-")[2]), str(state.parent)))
    return max(found)[1] if found else None


def load_rounds(checkpoint: str | Path) -> list[tuple[int, Selection, str]]:
    """Loads the rounds that a checkpoint was trained on.

    Returns:
        Number, selection and SHA-256 of each, in order; nothing where the training had no rounds.

    Raises:
        FileNotFoundError: One is not beside the checkpoint.
        bpo.SelectionError: One is of another training, or damaged.
        ValueError: The state of the checkpoint is damaged.
    """
    path = Path(checkpoint)
    if not (path / _STATE).is_file():
        return []
    try:
        state = read_json((path / _STATE).read_bytes(), "its text")["stateful_callbacks"].get(SavedRounds.__name__, {})
        saved = [(int(number), str(checksum)) for number, checksum in state.get("attributes", {}).get("saved", [])]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path / _STATE} is damaged ({error}); resume from an earlier checkpoint.") from None
    loaded = []
    for number, checksum in saved:
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
