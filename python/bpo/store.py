"""The gradient store: a directory with one row a response, written as the gradients come and memory-mapped to read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core

if TYPE_CHECKING:
    from types import TracebackType

    import numpy.typing as npt

RECORD = np.dtype(
    [
        ("prompt_id", "u1", 16),
        ("response_id", "u1", 16),
        ("score", "<f8"),
        ("logp", "<f4"),
        ("ref_logp", "<f4"),
        ("length", "<u4"),
        ("flags", "<u4"),
        ("log_weight", "<f4"),
        ("crc32", "<u4"),
    ]
)
"""One sequence (:class:`bpo.tokens.TokenizedResponses`): content hashes of prompt and sequence, score,
log-probabilities, tokens of the response, flags, checksum of row and record.

``log_weight`` is the mean over the predicted tokens of log π − log Σ_v π_v², v running over the vocabulary: the
logarithm of WPO's weight (arXiv 2406.11827, eq. 2).
"""

NONFINITE = 1
"""Flag: the gradient or a log-probability is NaN, infinite or beyond float32; its row is stored as zeros."""
ZERO = 2
"""Flag: the gradient is exactly zero."""
FIRST_UNPREDICTED = 4
"""Flag: the response starts the sequence, so nothing predicts its first token."""

_MISMATCH = {
    "bpo": ("version of bpo", "install that version"),
    "model": ("model", "pass the model it was made with"),
    "reference": ("reference", "use the ref_model it was made with"),
    "tokenizer": ("tokenizer or chat template", "pass the tokenizer it was made with"),
    "features": ("set of differentiated parameters, or seed", "use the same features, lora_rank and sketch_seed"),
    "preconditioner": ("preconditioner", "use the same preconditioner"),
    "sketch": ("sketch", "use the same sketch settings and sketch_seed"),
    "max_length": ("max_length", "use the same max_length"),
    "truncation_mode": ("truncation_mode", "use the same truncation_mode"),
    "dtype": ("compute type", "load the model in that type"),
}


class StoreMismatchError(ValueError):
    """A store was made with another model, data, sketch or version than it is now asked to serve."""


class GradientStore:
    """A gradient store, open for reading.

    Attributes:
        path: Its directory.
        fingerprint: What it was made with: model, tokenizer, features, sketch, version.
        rows: (R, d) float32, read-only and memory-mapped: the sketch of ∇log π(response | prompt).
        records: (R,) structured array of dtype :data:`RECORD`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not (Path(path) / "manifest.json").is_file():
            raise FileNotFoundError(f"{path} holds no gradient store (no manifest.json).")
        reader = _core.StoreReader(os.fspath(path))
        self.path = Path(path)
        self.fingerprint: dict[str, Any] = json.loads(reader.fingerprint_json)
        self.records = reader.records().view(RECORD)
        shape = (len(reader), reader.dim)
        self.rows: npt.NDArray[np.float32] = (
            np.memmap(reader.rows_path, dtype="<f4", mode="r", shape=shape)
            if shape[0]
            else np.zeros(shape, dtype=np.float32)  # an empty file cannot be mapped
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GradientStore:
        """Opens a store for reading.

        Raises:
            FileNotFoundError: No store there.
            bpo.StoreError: Not a store, or one of an unknown format version.
        """
        return cls(path)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(R,) int64, the tokens over which the log-probability of each response sums."""
        lengths: npt.NDArray[np.int64] = self.records["length"].astype(np.int64)
        lengths[self.records["flags"] & FIRST_UNPREDICTED != 0] -= 1
        return lengths

    def rows_of(self, response_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Finds responses by content hash.

        Args:
            response_ids: (n, 16) uint8.

        Returns:
            (n,) int64 row of each, −1 where the store lacks it.
        """
        known = {identifier.tobytes(): row for row, identifier in enumerate(self.records["response_id"])}
        return np.array([known.get(identifier.tobytes(), -1) for identifier in response_ids], dtype=np.int64)

    def verify(self) -> npt.NDArray[np.int64]:
        """Reads everything and returns the rows whose checksum does not match (int64, empty when all is well)."""
        return _core.StoreReader(os.fspath(self.path)).verify()


class GradientWriter:
    """A gradient store to which rows may be added; created where there is none.

    Nothing is locked, or written, before :meth:`lock`, so that any number of processes may serve themselves from a
    finished store, also from a read-only directory.
    """

    def __init__(
        self, path: Path, dim: int, fingerprint: dict[str, Any], present: GradientStore | None, temporary: bool
    ) -> None:
        self.path = path
        self._dim = dim
        self._fingerprint = fingerprint
        self._present = present
        self._writer: _core.StoreWriter | None = None
        self._temporary = temporary

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None,
        dim: int,
        fingerprint: dict[str, Any],
        known_ids: npt.NDArray[np.uint8],
        wanted_ids: npt.NDArray[np.uint8],
    ) -> GradientWriter:
        """Opens a store after checking that it was made with the same things; prepares one where there is none.

        Args:
            path: Directory; ``None`` for a temporary one.
            dim: Numbers a row.
            fingerprint: What the rows depend on.
            known_ids: (·, 16) every response of the data.
            wanted_ids: (·, 16) the rows that will be asked for. Either the responses of the store's rows are all known,
                or those that are wanted are all in the store: anything else is other data.

        Raises:
            StoreMismatchError: Another model, tokenizer, sketch, version or data.
            bpo.StoreError: The directory holds something else.
        """
        directory = Path(tempfile.mkdtemp(prefix="bpo-store-") if path is None else path)
        present = None
        if (directory / "manifest.json").exists():
            present = GradientStore(directory)
            _check_fingerprint(directory, present.fingerprint, fingerprint)
            _check_data(present, known_ids, wanted_ids)
        elif directory.exists() and not (
            directory.is_dir() and {path.name for path in directory.iterdir()} <= {"lock"}
        ):
            raise _core.StoreError(f"{directory} is no empty directory and no gradient store; name another directory.")
        return cls(directory, dim, fingerprint, present, temporary=path is None)

    def rows_of(self, response_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Row of each response that the store held when it was opened, −1 for the others; see GradientStore."""
        if self._present is None:
            return np.full(len(response_ids), -1, dtype=np.int64)
        return self._present.rows_of(response_ids)

    def check_ref_logps(self, response_ids: npt.NDArray[np.uint8], ref_logps: npt.NDArray[np.float64]) -> None:
        """Checks that the rows which are there already have these reference log-probabilities ((n,) float64).

        Raises:
            StoreMismatchError: One has another.
        """
        if self._present is None:
            return
        rows = self._present.rows_of(response_ids)
        given = ref_logps[rows >= 0].astype(np.float32)
        stored = self._present.records["ref_logp"][rows[rows >= 0]]
        other = np.flatnonzero(given != stored)
        if len(other):
            raise StoreMismatchError(
                f"The gradient store {self.path} was made with other reference log-probabilities: {len(other)} of "
                f"{len(given)} responses differ, such as row {rows[rows >= 0][other[0]]} of the store with "
                f"{stored[other[0]]}, which is {given[other[0]]} in the data. Name another store directory."
            )

    def append(
        self,
        sketches: npt.NDArray[np.float32],
        *,
        prompt_ids: npt.NDArray[np.uint8],
        response_ids: npt.NDArray[np.uint8],
        scores: npt.NDArray[np.float64],
        logps: npt.NDArray[np.float32],
        ref_logps: npt.NDArray[np.float32],
        lengths: npt.NDArray[np.int64],
        flags: npt.NDArray[np.int64],
        log_weights: npt.NDArray[np.float32],
    ) -> None:
        """Appends one row a response; all arguments have the same first dimension."""
        records = np.zeros(len(sketches), dtype=RECORD)
        records["prompt_id"] = prompt_ids
        records["response_id"] = response_ids
        records["score"] = scores
        records["logp"] = logps
        records["ref_logp"] = ref_logps
        records["length"] = lengths
        records["flags"] = flags
        records["log_weight"] = log_weights
        if self._writer is None:
            raise ValueError(f"{self.path}: lock() comes before append()")
        self._writer.append(sketches, records)

    def lock(self) -> None:
        """Creates the store where there is none, and keeps every other writer out until this one is closed.

        Raises:
            bpo.StoreError: Another process is writing, or has been since this store was opened.
        """
        if self._present is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = _core.StoreWriter.create(os.fspath(self.path), self._dim, json.dumps(self._fingerprint))
            return
        self._writer = _core.StoreWriter.append_to(os.fspath(self.path))
        if len(self._writer) != len(self._present):
            self._writer.close()
            raise _core.StoreError(f"{self.path}: another process added rows just now; run again to go on from there.")

    def reopen(self) -> GradientStore:
        """Opens for reading what was written; a temporary store lives as long as the returned object."""
        store = GradientStore(self.path)
        if self._temporary:
            weakref.finalize(store, shutil.rmtree, self.path, ignore_errors=True)
        return store

    def __enter__(self) -> GradientWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()
        if kind is not None and self._temporary:
            shutil.rmtree(self.path, ignore_errors=True)


def _check_fingerprint(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, (name, remedy) in _MISMATCH.items():
        if stored.get(key) != wanted[key]:
            raise StoreMismatchError(
                f"The gradient store {path} was made with another {name}: {_brief(stored.get(key))} there, "
                f"{_brief(wanted[key])} here. Name another store directory, or {remedy}."
            )


def _brief(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def _check_data(present: GradientStore, known_ids: npt.NDArray[np.uint8], wanted_ids: npt.NDArray[np.uint8]) -> None:
    # The first half of an id is the response's, wherever it starts and whatever its tokens weigh.
    stored, known, wanted = (
        {identifier[:8].tobytes() for identifier in ids}
        for ids in (present.records["response_id"], known_ids, wanted_ids)
    )
    if stored <= known or wanted <= stored:
        return
    foreign = next(row for row, key in enumerate(present.records["response_id"]) if key[:8].tobytes() not in known)
    raise StoreMismatchError(
        f"The gradient store {present.path} was made with other data: {len(stored - known)} of its {len(stored)} "
        f"responses are not in this data set (the first is row {foreign} of the store), and {len(known - stored)} of "
        "the data set are not in it. Name another store directory, or pass the data it was made with, or more of it."
    )
