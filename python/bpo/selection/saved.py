"""A selection on disk: written whole or not at all, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

import bpo

if TYPE_CHECKING:
    from collections.abc import Mapping

    import datasets
    import pyarrow as pa


_FORMAT = "bpo-selection"
_FORMAT_VERSION = 2
_DATASET = "dataset/train.parquet"
_PAIRS = "pairs.parquet"
_MANIFEST = "selection.json"
_SCRATCH = ".saving-"
_FIELDS = {
    "strategy": str,
    "budget": int,
    "seed": int,
    "config": dict,
    "depth": list,
    "skipped": dict,
    "noted": dict,
    "sha256": dict,
    "checksum": str,
}
_MAX_MANIFEST_BYTES = 1 << 30


class SelectionError(ValueError):
    """A saved selection that cannot be read: not one, of an unknown version, or with a changed file."""


def write_selection(
    directory: str | os.PathLike[str], dataset: datasets.Dataset, pairs: pa.Table, values: Mapping[str, Any]
) -> Path:
    """Writes training set, pairs and what else a selection holds; see :meth:`bpo.Selection.save`."""
    directory = check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in directory.glob(f"{_SCRATCH}*") if not path.is_symlink()]
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
    try:
        (scratch / _DATASET).parent.mkdir()
        dataset.to_parquet(str(scratch / _DATASET))
        pq.write_table(pairs, scratch / _PAIRS)
        for name in (_DATASET, _PAIRS):
            _sync(scratch / name)
        manifest = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "bpo": bpo.__version__,
            **{name: values[name] for name in ("strategy", "budget", "seed", "config", "depth", "skipped", "noted")},
            "sha256": {name: _sha256(scratch / name) for name in (_DATASET, _PAIRS)},
        }
        text = json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1) + "\n"
        # From the moment that the scratch directory has a manifest, it holds the selection that counts.
        (scratch / "manifest.new").write_text(text, encoding="utf-8")
        _sync(scratch / "manifest.new")
        (scratch / "manifest.new").replace(scratch / _MANIFEST)
        _sync(scratch)
        _sync(directory)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    for stale in earlier:
        (stale / _MANIFEST).unlink(missing_ok=True)  # first, so that it counts no more
        shutil.rmtree(stale, ignore_errors=True)
    (directory / _DATASET).parent.mkdir(exist_ok=True)
    for name in (_DATASET, _PAIRS, _MANIFEST):
        (scratch / name).replace(directory / name)
    for changed in (directory / "dataset", directory):
        _sync(changed)
    shutil.rmtree(scratch, ignore_errors=True)
    return directory


def read_selection(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], pa.Table, pa.Table]:
    """Returns manifest, training set and pairs of a saved selection, checked; see :meth:`bpo.Selection.load`."""
    directory = Path(directory)
    places = _places(directory)
    manifest = _read_manifest(places[_MANIFEST])
    for name in (_DATASET, _PAIRS):
        if not places[name].is_file():
            raise SelectionError(f"{places[name]} is missing.")
        if _sha256(places[name]) != manifest["sha256"].get(name):
            raise SelectionError(f"{places[name]} was changed after it was saved (its SHA-256 differs).")
    return manifest, pq.read_table(places[_DATASET]), pq.read_table(places[_PAIRS])


def _places(directory: Path) -> dict[str, Path]:
    """Where the files of a selection are: some may still be in the scratch directory of a save that was interrupted."""
    manifests = (path for path in directory.glob(f"{_SCRATCH}*/{_MANIFEST}") if not path.parent.is_symlink())
    latest = max(manifests, key=lambda path: path.stat().st_mtime_ns, default=directory / _MANIFEST)
    scratch = latest.parent
    places = {
        name: scratch / name if (scratch / name).is_file() else directory / name
        for name in (_DATASET, _PAIRS, _MANIFEST)
    }
    if not places[_MANIFEST].is_file():
        raise FileNotFoundError(f"{directory} holds no saved selection (no {_MANIFEST}).")
    return places


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a selection."""
    size = path.stat().st_size
    if size > _MAX_MANIFEST_BYTES:
        raise SelectionError(f"{path}: {size} bytes are too many for a manifest.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SelectionError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict):
        raise SelectionError(f"{path} holds no manifest.")
    if manifest.get("format") != _FORMAT or manifest.get("format_version") != _FORMAT_VERSION:
        raise SelectionError(
            f"{path}: format {manifest.get('format')!r} version {manifest.get('format_version')!r} is not {_FORMAT!r} "
            f"version {_FORMAT_VERSION}, which this bpo {bpo.__version__} reads."
        )
    missing = [name for name in _FIELDS if not isinstance(manifest.get(name), _FIELDS[name])]
    if missing:
        raise SelectionError(f"{path} lacks {', '.join(sorted(missing))}, or has them in another type.")
    checksum = manifest.pop("checksum")
    if checksum != _checksum(manifest):
        raise SelectionError(f"{path} was changed after it was saved (its checksum differs).")
    if not all(isinstance(depth, int) and 0 <= depth < 2**31 for depth in manifest["depth"]):
        raise SelectionError(f"{path}: depth must be whole numbers.")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest, whatever its layout (hex)."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_directory(directory: str | os.PathLike[str]) -> Path:
    """Returns the directory if a selection may be saved there.

    Raises:
        FileExistsError: It holds something else, or is a file.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; name a directory.")
    if (directory / "dataset").is_symlink():
        raise FileExistsError(
            f"{directory / 'dataset'} is a link to another directory; remove it, or name another one."
        )
    if (directory / _MANIFEST).is_file():
        try:
            ours = json.loads((directory / _MANIFEST).read_text(encoding="utf-8")).get("format") == _FORMAT
        except (ValueError, AttributeError):
            ours = False
        if not ours:
            raise FileExistsError(f"{directory / _MANIFEST} is not bpo's; name another directory.")
    elif directory.exists():
        # What an interrupted save leaves is ours to replace.
        left = {"dataset", _PAIRS, *(path.name for path in directory.glob(f"{_SCRATCH}*"))}
        if not {path.name for path in directory.iterdir()} <= left:
            raise FileExistsError(f"{directory} is not empty and holds no selection; name another directory.")
    return directory


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
