"""Shares of a store, for machines that see no disk in common: each fills one, and all are put together."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.store.gradient_store import GradientStore, StoreMismatchError, as_bytes, check_described
from bpo.store.writer import GradientWriter, check_fingerprint
from bpo.system.paths import check_apart

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class Shard:
    """A share of the blocks of a store, those that follow one another in its order.

    Attributes:
        number: Which, from 1 on.
        count: How many there are.
    """

    number: int
    count: int

    @classmethod
    def of(cls, value: Any) -> Shard:
        """Reads a share as users give it: (2, 4) or ``"2/4"``.

        Raises:
            ValueError: It is none.

        Example:
            >>> Shard.of("2/4")
            Shard(number=2, count=4)
        """
        given = tuple(map(int, value.split("/"))) if isinstance(value, str) and _SHARD.fullmatch(value) else value
        if (
            not isinstance(given, (tuple, list))
            or len(given) != 2
            or not all(isinstance(each, int) and not isinstance(each, bool) for each in given)
            or not 1 <= given[0] <= given[1]
        ):
            raise ValueError(f"shard must be a share of how many, such as (2, 4) or '2/4', got {value!r}")
        return cls(*given)

    def cut(self, blocks: Sequence[npt.NDArray[np.int64]]) -> list[npt.NDArray[np.int64]]:
        """Returns the blocks of the share.

        Raises:
            ValueError: There are fewer blocks than shares.
        """
        if len(blocks) < self.count:
            raise ValueError(
                f"The data makes {len(blocks)} blocks, too few for {self.count} shares: ask for at most {len(blocks)}."
            )
        first, end = ((number * len(blocks)) // self.count for number in (self.number - 1, self.number))
        return list(blocks[first:end])

    def describe(self, blocks: Sequence[npt.NDArray[np.int64]], ids: npt.NDArray[np.uint8]) -> dict[str, str | int]:
        """Returns what the fingerprint of a share says of it.

        Args:
            blocks: Of all data.
            ids: (S, 16) of all sequences.
        """
        rows = ids[np.concatenate(self.cut(blocks))]
        return {
            "number": self.number,
            "count": self.count,
            "rows": len(rows),
            "ids": _digest(rows),
            "data": hashlib.sha256(b"".join(ids[block].tobytes() + b"|" for block in blocks)).hexdigest(),
        }


_SHARD = re.compile(r"\d+/\d+")


def _digest(ids: npt.NDArray[np.uint8]) -> str:
    """A hash of ids in whatever order they are."""
    return hashlib.sha256(np.sort(as_bytes(ids, 16)).tobytes()).hexdigest()


def check_shard(path: str | os.PathLike[str] | None, wanted: dict[str, Any] | None) -> None:
    """Checks that a store, if it is there, is that share of the data, or no share.

    Raises:
        bpo.StoreMismatchError: It is not; the message says what it is.
    """
    if path is None or not (Path(path) / "manifest.json").exists():
        return
    there = GradientStore(Path(path)).fingerprint.get("shard")
    if there == wanted:
        return
    if there is None:
        raise StoreMismatchError(f"The gradient store {path} is no share of one. Name another directory for the share.")
    what = f"The gradient store {path} is share {there['number']} of {there['count']}"
    if wanted is None:
        raise StoreMismatchError(f"{what}; put all shares together with bpo store gather, and name what that makes.")
    if (there["number"], there["count"]) != (wanted["number"], wanted["count"]):
        raise StoreMismatchError(f"{what}, not {wanted['number']} of {wanted['count']}. Name another directory.")
    raise StoreMismatchError(f"{what} of other data, or of another tokens_per_batch. Name another directory.")


def gather_stores(output: str | os.PathLike[str], shards: Sequence[str | os.PathLike[str]]) -> GradientStore:
    """Puts the shares of a store together, which ``bpo.collect_gradients(…, shard=…)`` made, into that of one run.

    Where the arithmetic was the same and no share was repaired, the rows are those that one process writes, byte for
    byte, in the same order. Every row is compared with its checksums. Interrupted, the same call goes on where it
    ended. The shares stay as they are.

    Args:
        output: Directory of the store.
        shards: Directories of all shares, in any order.

    Returns:
        The store, open for reading.

    Raises:
        ValueError: A share is missing, unfinished or given twice; names it.
        FileNotFoundError: No store there.
        bpo.StoreMismatchError: Shares of different data, settings or versions; the message says which.
        bpo.StoreError: One is damaged; ``output`` keeps what was copied before.
        OSError: A file cannot be read or written, for example because the disk is full.

    Example:
        .. code-block:: python

            bpo.collect_gradients("my-sft-model", "responses.jsonl", store="share-1", shard="1/2")  # on one machine
            bpo.collect_gradients("my-sft-model", "responses.jsonl", store="share-2", shard="2/2")  # on another
            store = bpo.gather_stores("gradients", ["share-1", "share-2"])
    """
    if not shards:
        raise ValueError("gather_stores needs the directories of all shares.")
    check_apart({"output": output}, stores={f"share {place}": path for place, path in enumerate(shards, start=1)})
    ordered = _in_order([GradientStore.open(path) for path in shards])
    fingerprint = {name: value for name, value in ordered[0].fingerprint.items() if name != "shard"}
    check_shard(output, None)
    ids = np.concatenate([store.records["response_id"][~store.set_aside] for store in ordered])
    with GradientWriter.open(output, fingerprint, ids, ids) as writer:
        if writer.lacks(ids).any():
            writer.lock()
            for store in ordered:
                writer.take(store)
    return GradientStore.open(output)


def _in_order(stores: Sequence[GradientStore]) -> list[GradientStore]:
    """Checks that shares are those of one store, whole and all there; returns them in its order."""
    found: dict[int, GradientStore] = {}
    first = stores[0]
    for store in stores:
        check_described(store)
        shard = store.fingerprint.get("shard")
        if shard is None:
            raise ValueError(f"{store.path} is no share of a store, as bpo collect --shard makes; see bpo store merge.")
        check_fingerprint(store.path, store.fingerprint, first.fingerprint)
        number, count, ours = shard["number"], shard["count"], first.fingerprint["shard"]
        if count != ours["count"]:
            raise StoreMismatchError(
                f"{store.path} is share {number} of {count}, and {first.path} is share {ours['number']} of "
                f"{ours['count']}: all must be shares of as many."
            )
        if shard["data"] != ours["data"]:
            raise StoreMismatchError(
                f"{store.path} and {first.path} are shares of other data, or of another tokens_per_batch."
            )
        if number in found:
            raise ValueError(
                f"{found[number].path} and {store.path} are both share {number} of {count}; give each once."
            )
        ids = store.records["response_id"][~store.set_aside]
        if len(ids) != shard["rows"] or _digest(ids) != shard["ids"]:
            raise ValueError(
                f"{store.path}, share {number} of {count}, has {len(ids)} of its {shard['rows']} responses: run "
                f"bpo collect --shard {number}/{count} with it to the end."
            )
        found[number] = store
    missing = [str(number) for number in range(1, first.fingerprint["shard"]["count"] + 1) if number not in found]
    if missing:
        raise ValueError(
            f"Of {first.fingerprint['shard']['count']} shares {len(missing)} are missing: {', '.join(missing[:20])}"
            f"{', …' if len(missing) > 20 else ''}."
        )
    return [found[number] for number in sorted(found)]
