"""The gradient store, open for writing: rows are added as gradients come, and no crash takes away what is committed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core
from bpo._core import StoreError, StoreLockedError
from bpo.store.gradient_store import RECORD, GradientStore, StoreMismatchError, as_bytes
from bpo.world.world import brief

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy.typing as npt

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

# What an interrupted creation leaves.
_UNFINISHED = re.compile(r"lock|records\.bin|rows\.\w+|manifest(\.copy)?\.new|manifest\.copy\.json")

# Time between two commits, each of which waits for the disk. A crash costs the batches since the last one.
_COMMIT_SECONDS = 1.0


class GradientWriter:
    """A gradient store to which rows may be added; created where there is none.

    Nothing is locked, or written, before :meth:`lock`, so that any number of processes may serve themselves from a
    finished store, also from a read-only directory.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: dict[str, Any],
        present: GradientStore | None,
        temporary: bool,
        check: Callable[[], None] | None = None,
    ) -> None:
        self.path = path
        self._check = check
        self._fingerprint = fingerprint
        self._present = present
        self._writer: _core.StoreWriter | None = None
        self._committed_at = 0.0
        self._taken: set[bytes] = set()
        # Whatever comes in between: an error, an interrupt, the end of the program.
        self._finalizer = weakref.finalize(self, shutil.rmtree, path, ignore_errors=True) if temporary else None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None,
        fingerprint: dict[str, Any],
        known_ids: npt.NDArray[np.uint8],
        wanted_ids: npt.NDArray[np.uint8],
        check: Callable[[], None] | None = None,
    ) -> GradientWriter:
        """Opens a store after checking that it was made with the same things; prepares one where there is none.

        Args:
            path: Directory; ``None`` for a temporary one.
            fingerprint: What the rows depend on; its ``sketch`` says their ``dim`` and ``dtype``.
            known_ids: (·, 16) every response of the data.
            wanted_ids: (·, 16) the rows that will be asked for. Either the responses of the store's rows are all known,
                or those that are wanted are all in the store: anything else is other data.
            check: Called with every commit; raises what makes more rows vain.

        Raises:
            StoreMismatchError: Another model, tokenizer, sketch, version or data.
            bpo.StoreError: The directory holds something else.
        """
        directory = Path(tempfile.mkdtemp(prefix="bpo-store-") if path is None else path)
        present = None
        if (directory / "manifest.json").exists():
            present = GradientStore(directory)
            check_fingerprint(directory, present.fingerprint, fingerprint)
            _check_data(present, known_ids, wanted_ids)
        elif directory.exists() and not (
            directory.is_dir() and all(_UNFINISHED.fullmatch(path.name) for path in directory.iterdir())
        ):
            raise StoreError(f"{directory} is no empty directory and no gradient store; name another directory.")
        return cls(directory, fingerprint, present, path is None, check)

    def rows_of(self, response_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Row of each response that the store held when it was opened, −1 for the others; see GradientStore."""
        if self._present is None:
            return np.full(len(response_ids), -1, dtype=np.int64)
        return self._present.rows_of(response_ids)

    def lacks(self, response_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """(n,) bool, which responses are neither in the store as it was opened nor taken from another one since."""
        lacking: npt.NDArray[np.bool_] = self.rows_of(response_ids) < 0
        if self._taken:
            taken = (key in self._taken for key in as_bytes(response_ids, 16).tolist())
            lacking &= ~np.fromiter(taken, dtype=bool, count=len(lacking))
        return lacking

    def take(self, store: GradientStore) -> None:
        """Adds, and commits, the rows of another store that this one lacks, bytes and all.

        Raises:
            bpo.StoreError: One is damaged.
            OSError: A file cannot be read or written.
        """
        if self._writer is None:
            raise ValueError(f"{self.path}: lock() comes before take()")
        ids = store.records["response_id"]
        wanted = ~store.set_aside & self.lacks(ids)
        self._writer.copy_from(store.reader, wanted)
        self._taken.update(as_bytes(ids[wanted], 16).tolist())

    def again(self) -> GradientWriter:
        """Returns a writer of the same store as it is now."""
        return self.part(self.path)

    def part(self, path: Path) -> GradientWriter:
        """Returns a writer of a store of such rows in another directory, which may be empty."""
        present = GradientStore(path) if (path / "manifest.json").exists() else None
        return GradientWriter(path, self._fingerprint, present, False, self._check)

    def check_ref_logps(self, response_ids: npt.NDArray[np.uint8], ref_logps: npt.NDArray[np.float64] | None) -> None:
        """Checks that the rows which are there already have these reference log-probabilities ((n,) float64), if any.

        Raises:
            StoreMismatchError: One has another.
        """
        if self._present is None or ref_logps is None:
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
        """Appends one row a response, and commits what was appended if the last commit is some time ago.

        Args:
            sketches: (n, d).
            prompt_ids: (n, 16).
            response_ids: (n, 16).
            scores: (n,).
            logps: (n,).
            ref_logps: (n,).
            lengths: (n,).
            flags: (n,).
            log_weights: (n,).

        Raises:
            OSError: A file cannot be written, for example because the disk is full; the message says what is kept.
        """
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
        if time.monotonic() - self._committed_at >= _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Waits until everything appended is on disk."""
        if self._writer is not None:
            self._writer.commit()
            self._committed_at = time.monotonic()
            if self._check is not None:
                self._check()

    @property
    def committed(self) -> int:
        """Rows that no crash takes away, once this has the lock."""
        return 0 if self._writer is None else self._writer.committed

    def lock(self) -> None:
        """Creates the store where there is none, and keeps every other writer out until this one is closed.

        Raises:
            bpo.StoreLockedError: Another process is writing, or added rows since this store was opened.
        """
        if self._present is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sketch = self._fingerprint["sketch"]
            self._writer = _core.StoreWriter.create(
                os.fspath(self.path), sketch["dim"], json.dumps(self._fingerprint), dtype=sketch["dtype"]
            )
            return
        self._writer = _core.StoreWriter.append_to(os.fspath(self.path))
        if len(self._writer) != len(self._present):
            self._writer.close()
            raise StoreLockedError(f"{self.path}: another process added rows just now; run again to go on from there.")

    def settle(self) -> None:
        """Closes a whole store that its last writer was killed before closing, unless another is at it, or none may."""
        if self._writer is None and self._present is not None and not self._present.reader.closed:
            with contextlib.suppress(StoreLockedError, OSError):
                _core.StoreWriter.append_to(os.fspath(self.path)).close()

    def reopen(self) -> GradientStore:
        """Opens for reading what was written; a temporary store lives as long as the returned object."""
        store = GradientStore(self.path)
        if self._finalizer is not None:
            self._finalizer.detach()
            weakref.finalize(store, shutil.rmtree, self.path, ignore_errors=True)
        return store

    def __enter__(self) -> GradientWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, traceback)
        if kind is not None and self._finalizer is not None:
            self._finalizer()


def check_fingerprint(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Checks that a store was made with the same things.

    Raises:
        StoreMismatchError: It was not; the message says with what and what to do.
    """
    for key, (name, remedy) in _MISMATCH.items():
        if stored.get(key) != wanted.get(key):
            raise StoreMismatchError(
                f"The gradient store {path} was made with another {name}: {brief(stored.get(key))} there, "
                f"{brief(wanted.get(key))} here. Name another store directory, or {remedy}."
            )


def _check_data(present: GradientStore, known_ids: npt.NDArray[np.uint8], wanted_ids: npt.NDArray[np.uint8]) -> None:
    # The first half of an id is the response's, wherever it starts and whatever its tokens weigh.
    ids_there = present.records["response_id"][~present.set_aside]
    stored, known, wanted = (set(as_bytes(ids, 8).tolist()) for ids in (ids_there, known_ids, wanted_ids))
    if stored <= known or wanted <= stored:
        return
    keys = as_bytes(present.records["response_id"], 8).tolist()
    foreign = next(row for row in np.flatnonzero(~present.set_aside) if keys[row] not in known)
    raise StoreMismatchError(
        f"The gradient store {present.path} was made with other data: {len(stored - known)} of its {len(stored)} "
        f"responses are not in this data set (the first is row {foreign} of the store), and {len(known - stored)} of "
        "the data set are not in it. Name another store directory, or pass the data it was made with, or more of it."
    )
