"""The gradient store, open for reading: a directory with one row a response, memory-mapped."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core
from bpo._core import StoreError
from bpo.config import SelectConfig
from bpo.report.notebook import facts_table
from bpo.store.mirror import local

if TYPE_CHECKING:
    from collections.abc import Callable

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
        ("scale", "<f4"),
        ("row_crc32", "<u4"),
        ("crc32", "<u4"),
    ]
)
"""One sequence (:class:`bpo.data.tokens.TokenizedResponses`): content hashes of prompt and sequence, score,
log-probabilities, tokens of the response, flags, the scale of its row, checksums of row and record.

``log_weight`` is the mean over the predicted tokens of log π − log Σ_v π_v², v running over the vocabulary: the
logarithm of WPO's weight (arXiv 2406.11827, eq. 2).
"""


NONFINITE = 1
"""Flag: the gradient or a log-probability is NaN, infinite or beyond float32; its row is stored as zeros."""

ZERO = 2
"""Flag: the gradient is exactly zero."""

FIRST_UNPREDICTED = 4
"""Flag: the response starts the sequence, so nothing predicts its first token."""

SET_ASIDE = 8
"""Flag: the row was damaged and is void; its ids are zero."""


EMBEDDED = "mean last hidden state"
"""Kind of features, in a fingerprint, of rows that are embeddings of the responses, not gradients."""


# bfloat16, for which NumPy has no type, is mapped as its bits.
_NUMPY_TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "i1"}


class StoreMismatchError(StoreError):
    """A store was made with another model, data, sketch or version than it is now asked to serve."""


class GradientStore:
    """A gradient store, open for reading.

    The sketch of response i is ``scales[i] * rows[i]``, with bfloat16 widened; :meth:`sketches` returns it. Rows that
    were damaged and set aside by a repair are still counted; :meth:`rows_of` never finds them. A pickle or a copy, such
    as a worker of a data loader gets, opens the store anew by its absolute path, with rows that were added meanwhile.

    Attributes:
        path: Its directory; of a store at an address that of the local copy.
        fingerprint: What it was made with: model, tokenizer, features, sketch, version.
        dtype: How the numbers are kept: ``"float32"``, ``"float16"``, ``"bfloat16"`` or ``"int8"``.
        rows: (R, d), read-only and memory-mapped, of that type; of bfloat16 the bits, as uint16.
        records: (R,) structured array of dtype :data:`RECORD`.
        reader: What the Rust core reads it with.
        tail_bytes: Bytes behind the last row, of a writer at work or of one that died; they count for nothing.
    """

    def __init__(self, path: str | os.PathLike[str], *, skip_damaged: bool = False) -> None:
        path = local(path)
        try:
            self.reader = _core.StoreReader(os.fspath(path), skip_damaged=skip_damaged)
        except FileNotFoundError as error:
            if Path(str(error.filename)).name != "manifest.json":
                raise
            raise FileNotFoundError(f"{path} holds no gradient store (no manifest.json).") from None
        self.path = Path(path)
        self.fingerprint: dict[str, Any] = json.loads(self.reader.fingerprint_json)
        self.dtype = self.reader.dtype
        self.tail_bytes = self.reader.tail_bytes
        self.records = self.reader.records().view(RECORD)
        shape = (len(self.reader), self.reader.dim)
        kind = np.dtype(_NUMPY_TYPES[self.dtype])
        self.rows: npt.NDArray[Any] = (
            np.memmap(self.reader.rows_path, dtype=kind, mode="r", shape=shape)
            if shape[0]
            else np.zeros(shape, dtype=kind)  # an empty file cannot be mapped
        )

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, skip_damaged: bool = False) -> GradientStore:
        """Opens a store for reading.

        Args:
            path: Its directory, or an address such as ``s3://bucket/prefix``, of which what is lacking here is fetched.
            skip_damaged: Whether to open a store of which some records are damaged or some rows lost: those then count
                as set aside. Sketches are not read; see :meth:`verify`.

        Raises:
            FileNotFoundError: No store there.
            bpo.StoreDamagedError: A file is not as it was written; the message names it and the place.
            bpo.StoreVersionError: A store of another format version.
            bpo.StoreError: Not a store.
        """
        return cls(path, skip_damaged=skip_damaged)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (str(self.path.absolute()), self.reader.skip_damaged)

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"GradientStore({str(self.path)!r}: {len(self)} responses of {self.rows.shape[1]} {self.dtype})"

    def _repr_html_(self) -> str:
        made = {name: self.fingerprint.get(name) for name in ("model", "features", "sketch", "bpo")}
        return facts_table(
            f"GradientStore {self.path}",
            [
                ("responses", f"{len(self):,}"),
                ("numbers a response", f"{self.rows.shape[1]:,} {self.dtype}"),
                ("set aside", int(self.set_aside.sum()) or None),
                *((name, None if value is None else str(value)[:120]) for name, value in made.items()),
            ],
        )

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """(R,) float32, by which each row is multiplied."""
        scales: npt.NDArray[np.float32] = self.records["scale"]
        return scales

    @property
    def set_aside(self) -> npt.NDArray[np.bool_]:
        """(R,) bool, whether a row was damaged and is void."""
        aside: npt.NDArray[np.bool_] = self.records["flags"] & SET_ASIDE != 0
        return aside

    @property
    def predicted(self) -> npt.NDArray[np.int64]:
        """(R,) int64, the tokens over which the log-probability of each response sums."""
        lengths: npt.NDArray[np.int64] = self.records["length"].astype(np.int64)
        lengths[self.records["flags"] & FIRST_UNPREDICTED != 0] -= 1
        return lengths

    def sketches(self, index: Any = slice(None)) -> npt.NDArray[np.float32]:
        """Returns the sketches of some rows.

        Args:
            index: A slice, or (n,) rows.

        Returns:
            (n, d) float32, in memory.
        """
        sketches: npt.NDArray[np.float32] = widened(self.rows[index]) * self.scales[index, None]
        return sketches

    def rows_of(self, response_ids: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Finds responses by content hash.

        Args:
            response_ids: (n, 16) uint8.

        Returns:
            (n,) int64 row of each, −1 where the store lacks it.
        """
        return self._found(response_ids, 16)[0]

    def rows_of_responses(
        self, response_ids: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds responses whose start and token weights are not known, as without a tokenizer.

        Args:
            response_ids: (n, 16) uint8, as :func:`bpo.read_candidates` gives them.

        Returns:
            (n,) int64, a row of each response, −1 where the store has none, and (n,) bool, whether it has several: for
            other starts or weights of its tokens.
        """
        return self._found(response_ids, 8)

    def _found(self, ids: npt.NDArray[np.uint8], n_bytes: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Finds rows by the first bytes of their ids: the first row of each, or −1, and whether there are more."""
        known = as_bytes(self.records["response_id"][self._by_id], n_bytes)
        wanted = as_bytes(ids, n_bytes)
        first, end = (np.searchsorted(known, wanted, side) for side in ("left", "right"))
        rows = np.full(len(wanted), -1, dtype=np.int64)
        rows[end > first] = self._by_id[first[end > first]]
        return rows, end - first > 1

    @functools.cached_property
    def _by_id(self) -> npt.NDArray[np.int64]:
        """(·,) int64, the rows that are not set aside in the order of their ids, and so of the first bytes of these."""
        present = np.flatnonzero(~self.set_aside)
        return present[np.argsort(as_bytes(self.records["response_id"][present], 16), kind="stable")]

    def verify(
        self,
        rows: npt.NDArray[np.int64] | None = None,
        *,
        threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Reads rows and compares them with their checksums.

        Args:
            rows: (n,) int64, which; None for all.
            threads: Threads of the Rust core; None for all cores.
            progress: Called with (done, total) now and then.

        Returns:
            (m,) int64, the damaged rows, ascending; empty when all is well.

        Raises:
            OSError: A file cannot be read.
        """
        wanted = None if rows is None else self._mask(rows)
        return self.reader.verify(wanted, threads=threads, progress=progress)

    def check(
        self,
        rows: npt.NDArray[np.int64],
        *,
        threads: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Checks that some rows are as they were written; see :meth:`verify`.

        Raises:
            bpo.StoreDamagedError: One is not.
        """
        self.reader.check(self._mask(rows), threads=threads, progress=progress)

    def _mask(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        mask = np.zeros(len(self), dtype=bool)
        mask[rows] = True
        return mask


def _reopened(path: str, skip_damaged: bool) -> GradientStore:
    return GradientStore(path, skip_damaged=skip_damaged)


def check_described(store: GradientStore) -> None:
    """Checks that a store says what its rows are of, as those do that bpo fills with gradients.

    Raises:
        bpo.StoreError: It does not.
    """
    sketch, features = store.fingerprint.get("sketch"), store.fingerprint.get("features")
    lacking = [name for name in ("model", "dtype", "max_length", "truncation_mode") if name not in store.fingerprint]
    if not isinstance(sketch, dict) or not {"kind", "dim", "nnz", "seed", "dtype"} <= sketch.keys():
        lacking.append("sketch")
    if not isinstance(features, dict) or "kind" not in features:
        lacking.append("features")
    if lacking:
        raise StoreError(
            f"{store.path / 'manifest.json'} does not say of what its rows are ({', '.join(lacking)}), so it is not "
            "that of a store that bpo filled."
        )


def row_bytes(dtype: str, dim: int) -> int:
    """Returns the bytes of a sketch of ``dim`` numbers of a type."""
    return np.dtype(_NUMPY_TYPES[dtype]).itemsize * dim


def widened(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Returns stored rows as float32, without their scale; uint16 is the bits of bfloat16."""
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def as_bytes(ids: npt.NDArray[np.uint8], n_bytes: int) -> npt.NDArray[np.bytes_]:
    """(n, 16) uint8 as (n,) byte strings of the first bytes, which NumPy can sort; all are of the same length."""
    return np.ascontiguousarray(ids[:, :n_bytes]).view(f"S{n_bytes}").reshape(-1)


def with_settings_of(store: GradientStore, config: SelectConfig) -> SelectConfig:
    """Returns a configuration that says of the gradients what the store says, for a selection without a model.

    Raises:
        StoreMismatchError: A setting of the gradients that is neither its default nor that of the store.
    """
    check_described(store)
    sketch, features = store.fingerprint["sketch"], store.fingerprint["features"]
    stored = {
        **{f"sketch_{name}": sketch[name] for name in ("kind", "dim", "nnz", "seed", "dtype")},
        "max_length": store.fingerprint["max_length"],
        "truncation_mode": store.fingerprint["truncation_mode"],
        "factor_dim": features.get("factor_dim"),
        **({"lora_rank": features["rank"]} if "rank" in features else {}),
        **({"features": "embeddings"} if features["kind"] == EMBEDDED else {}),
    }
    if config.features == "embeddings" and features["kind"] != EMBEDDED:
        raise StoreMismatchError(
            f"The gradient store {store.path} holds gradients ({features['kind']}), and config asks for "
            "features='embeddings'. Name a store that was made with that, or leave the setting out."
        )
    for name, value in stored.items():
        asked = getattr(config, name)
        if asked not in (value, getattr(SelectConfig(), name)):
            raise StoreMismatchError(
                f"The gradient store {store.path} was made with {name}={value!r}, and config asks for {asked!r}. "
                "Without a model its gradients are taken as they are: leave the setting out, or pass the model and "
                "another store."
            )
    return dataclasses.replace(config, **stored)
