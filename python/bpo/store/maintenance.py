"""Looking after gradient stores: describe, verify, repair, merge and export them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bpo import _core
from bpo._core import StoreDamagedError, StoreRepair
from bpo.store.gradient_store import NONFINITE, RECORD, ZERO, GradientStore, StoreMismatchError, check_described
from bpo.store.mirror import Mirror, described
from bpo.store.snapshot import latest
from bpo.store.upload import writing
from bpo.store.writer import check_fingerprint
from bpo.system.files import ArrowFile, replacing
from bpo.system.paths import check_apart, is_url
from bpo.system.progress import core_progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.choices import SketchDType

_CHECKSUMS = {"row_crc32", "crc32", "scale"}
_EXPORTED = [name for name in RECORD.names or () if name not in _CHECKSUMS]
_NAMED_ROWS = 20

# Sketches that are converted at a time.
_BLOCK_BYTES = 64 << 20


def describe_store(path: str | os.PathLike[str]) -> str:
    """Returns a few lines: what a store holds, how, and what it was made with.

    Args:
        path: Its directory, or its address, from which the sketches are not fetched.

    Raises:
        FileNotFoundError: No store there.
        bpo.StoreError: A store that is damaged or of another version.
    """
    with described(path) as directory:
        return _described(GradientStore.open(directory), os.fspath(path))


def _described(store: GradientStore, path: str) -> str:
    flags, aside = store.records["flags"], store.set_aside
    counted = {
        "set aside by a repair": aside,
        "with a zero gradient": flags & ZERO != 0,
        "with a gradient that is not finite": flags & NONFINITE != 0,
    }
    size = store.rows.nbytes + store.records.nbytes
    rows = [f"{len(store)} responses of {len(np.unique(store.records['prompt_id'][~aside], axis=0))} prompts"]
    rows += [f"{int(which.sum())} {what}" for what, which in counted.items() if which.any()]
    lines = [
        f"store     {path}",
        f"rows      {', '.join(rows)}",
        f"sketches  {store.rows.shape[1]} numbers in {store.dtype}, {size / 2**20:,.1f} MiB with their records",
    ]
    if store.tail_bytes:
        lines.append(
            f"tail      {store.tail_bytes:,} bytes of a writer at work or one that died; they count for nothing"
        )
    return "\n".join([*lines, "made with", json.dumps(store.fingerprint, indent=1)])


def verify_store(path: str | os.PathLike[str], *, threads: int | None = None, progress: bool = True) -> list[str]:
    """Reads a whole store and compares it with its checksums: of one at an address every object, and nothing local.

    Args:
        path: Its directory or address.
        threads: Threads of the Rust core; None for all cores.
        progress: Whether to show a progress bar.

    Returns:
        What is wrong, in sentences that name file and place; empty when all is well.

    Raises:
        FileNotFoundError: No store there.
        bpo.StoreVersionError: A store of another version.
        OSError: A file cannot be read.
    """
    problems: list[str] = []
    if is_url(path):
        return _verify_objects(Mirror(os.fspath(path)))
    try:
        store = GradientStore.open(path)
    except StoreDamagedError as error:
        problems.append(str(error))
        try:
            store = GradientStore.open(path, skip_damaged=True)
        except StoreDamagedError:
            return problems  # without header or manifest, nothing says what the rows are
    with core_progress("Checksums", progress) as report:
        damaged = store.verify(threads=threads, progress=report)
    if len(damaged):
        problems.append(f"{path}: {len(damaged)} of {len(store)} rows are damaged: {name_rows(damaged)}")
    return problems


def _verify_objects(mirror: Mirror) -> list[str]:
    try:
        snapshot = latest(mirror.objects)
    except StoreDamagedError as error:
        return [str(error)]
    if snapshot is None:
        raise FileNotFoundError(f"{mirror.objects.shown} holds no gradient store.")
    return list(mirror.damaged(snapshot))


def name_rows(rows: npt.NDArray[np.int64]) -> str:
    """Returns the first of some rows as a message names them."""
    return ", ".join(map(str, rows[:_NAMED_ROWS])) + (", …" if len(rows) > _NAMED_ROWS else "")


def repair_store(path: str | os.PathLike[str], *, threads: int | None = None, progress: bool = True) -> StoreRepair:
    """Mends a store as far as it can be.

    Sound rows stay as they are. Damaged ones are set aside, and the next run computes them anew; so it does with rows
    that a file cut short has lost. The manifest is restored from its copy. What is written is written beside the old
    file first, so an interrupted repair can be repeated. A store at an address is mended from its local copy, as far as
    that is sound, and sent anew.

    Args:
        path: Its directory or address.
        threads: Threads of the Rust core; None for all cores.
        progress: Whether to show a progress bar.

    Returns:
        What was done: ``mended`` (names of files), ``set_aside`` (rows, int64), ``lost`` (number of rows),
        ``cut_bytes`` and ``count``.

    Raises:
        FileNotFoundError: No store there.
        bpo.StoreError: Nothing says any more what the rows are, or a process is writing to the store.
        OSError: A file cannot be read or written. Rows that cannot be read are not given up: they may be readable from
            another machine, or after the disk was copied.
    """
    with writing(path, anew=True) as (directory, _), core_progress("Repair", progress) as report:
        return _core.repair_store(directory or path, threads=threads, progress=report)


def merge_stores(
    output: str | os.PathLike[str],
    stores: Sequence[str | os.PathLike[str]],
    *,
    dtype: SketchDType | None = None,
    progress: bool = True,
) -> GradientStore:
    """Copies the rows of several stores, made with the same things, into one: of shards, or to another ``dtype``.

    Every row is compared with its checksums. A response that several stores hold is taken from the first of them; rows
    that are set aside are left behind. Interrupted, the same call goes on where it ended.

    Args:
        output: Directory or address of the result; a store there is added to.
        stores: Directories or addresses of the stores.
        dtype: How the result keeps its numbers; by default as ``output`` does, or the first store.
        progress: Whether to show progress bars.

    Returns:
        The result, open for reading.

    Raises:
        FileNotFoundError: No store there.
        bpo.StoreMismatchError: Stores made with different things; the message says which.
        bpo.StoreError: One is damaged; ``output`` keeps what was copied before.
        OSError: A file cannot be read or written, for example because the disk is full.
    """
    if not stores:
        raise ValueError("merge_stores needs at least one store to copy from.")
    check_apart({"output": output}, stores={f"store {number}": path for number, path in enumerate(stores, start=1)})
    if os.fspath(output) in [os.fspath(store) for store in stores]:
        raise ValueError(f"output and one of the stores are the same, {output}; name two different addresses.")
    opened = [GradientStore.open(path) for path in stores]
    with writing(output) as (directory, _):
        return _merged(directory or Path(output), opened, dtype, progress)


def _merged(output: Path, opened: list[GradientStore], dtype: SketchDType | None, progress: bool) -> GradientStore:
    for store in opened:
        check_described(store)
    there = GradientStore.open(output) if (output / "manifest.json").exists() else None
    first = opened[0] if there is None else there
    if there is not None and dtype not in (None, there.dtype):
        raise StoreMismatchError(
            f"{output} keeps its numbers in {there.dtype}, not in {dtype}; name another directory."
        )
    fingerprint = _with_dtype(first.fingerprint, dtype or first.dtype)
    for store in opened:
        check_fingerprint(store.path, _with_dtype(store.fingerprint, dtype or first.dtype), fingerprint)
    if there is None:
        output.parent.mkdir(parents=True, exist_ok=True)
        dim = first.rows.shape[1]
        writer = _core.StoreWriter.create(output, dim, json.dumps(fingerprint), dtype=dtype or first.dtype)
    else:
        writer = _core.StoreWriter.append_to(output)
    with writer:
        known = set() if there is None else set(_response_ids(there))
        for store in opened:
            wanted = ~store.set_aside
            ids = _response_ids(store)
            wanted[wanted] = [identifier not in known for identifier in ids]
            known.update(ids)
            with core_progress(store.path.name, progress) as report:
                writer.copy_from(store.reader, wanted, progress=report)
    return GradientStore.open(output)


def export_store(store: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Writes the rows of a store for other programs, without those that are set aside.

    Args:
        store: Directory or address of the store.
        path: A new file: ``.npz`` (arrays, read with ``numpy.load``) or ``.parquet`` (columns). Each has the sketches
            as float32 and every field of the records.

    Returns:
        The path.

    Raises:
        ValueError: Another ending.
        FileExistsError: The file is there already.
        bpo.StoreError: A row is damaged, or the directory is no store.
        OSError: A file cannot be read or written.
    """
    path = Path(path)
    writers = {".npz": _write_npz, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise ValueError(f"{path}: the ending says the format; give one of {', '.join(writers)}")
    check_apart({"path": path}, stores={"store": store})
    if path.exists():
        raise FileExistsError(f"{path} is there already; name another file.")
    opened = GradientStore.open(store)
    rows = np.flatnonzero(~opened.set_aside)
    opened.check(rows)
    with replacing(path) as scratch:
        writers[path.suffix](opened, rows, scratch)
    return path


def _write_npz(store: GradientStore, rows: npt.NDArray[np.int64], path: Path) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), store.rows.shape[1])}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in _EXPORTED:
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, store.records[name][rows], allow_pickle=False)
        with archive.open("sketch.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for _, sketches in _blocks(store, rows):
                file.write(sketches.astype("<f4", copy=False).data)


def _write_parquet(store: GradientStore, rows: npt.NDArray[np.int64], path: Path) -> None:
    ids = pa.binary(16)
    kinds = {name: ids if RECORD[name].shape else pa.from_numpy_dtype(RECORD[name]) for name in _EXPORTED}
    schema = pa.schema([*kinds.items(), ("sketch", pa.list_(pa.float32(), store.rows.shape[1]))])
    with ArrowFile(path) as file, pq.ParquetWriter(file, schema) as writer:
        for index, sketches in _blocks(store, rows):
            columns = [
                pa.array([row.tobytes() for row in store.records[name][index]], ids)
                if kinds[name] == ids
                else pa.array(store.records[name][index])
                for name in _EXPORTED
            ]
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(sketches.ravel()), store.rows.shape[1]))
            writer.write_table(pa.table(columns, schema=schema))
            file.check()


def _blocks(
    store: GradientStore, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Some rows at a time, with their sketches."""
    step = max(1, _BLOCK_BYTES // (4 * store.rows.shape[1]))
    for begin in range(0, len(rows), step):
        index = rows[begin : begin + step]
        yield index, store.sketches(index)


def _with_dtype(fingerprint: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {**fingerprint, "sketch": {**fingerprint["sketch"], "dtype": dtype}}


def _response_ids(store: GradientStore) -> list[bytes]:
    """The ids of the rows that are not set aside."""
    return [identifier.tobytes() for identifier in store.records["response_id"][~store.set_aside]]
