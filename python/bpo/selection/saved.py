"""A selection on disk: written whole or not at all, checked when it is read; and its card, where it is published."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

import bpo
from bpo.config import SelectConfig
from bpo.store.objects import Objects
from bpo.system.files import ArrowFile, naming_file, read_json, sync
from bpo.system.locks import locked
from bpo.system.paths import is_url

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import datasets

_FORMAT = "bpo-selection"
_FORMAT_AT = "bpo-selection-at"  # what says which of the selections at an address counts
_FORMAT_VERSION = 2
_DATASET = "dataset/train.parquet"
_PAIRS = "pairs.parquet"
_MANIFEST = "selection.json"
_SAVES = "saves"
_REPORT = "report.html"
_SCRATCH = ".saving-"
_LOCK = ".saving.lock"
_SECONDS_TO_WAIT = 600.0  # for another save, which takes as long as its disk
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

_TITLE = "BPO: Towards Balanced Preference Optimization between Knowledge Breadth and Depth in Alignment"
PAPER = {
    "title": _TITLE,
    "id": "2411.10914",
    "citation": f"""\
@inproceedings{{wang2025bpo,
    title     = {{{{{_TITLE}}}}},
    author    = {{Wang, Sizhe and Tong, Yongqi and Zhang, Hengyuan and Li, Dawei and Zhang, Xin and Chen, Tianlong}},
    year      = 2025,
    booktitle = {{Proceedings of NAACL 2025 (Volume 1: Long Papers)}},
    pages     = {{8811--8826}},
    doi       = {{10.18653/v1/2025.naacl-long.443}},
}}""",
}
"""As TRL's trainers name the paper of their method."""

_HEAD_OF_CARD = (
    "---",
    "tags: [bpo, dpo, preference, trl]",
    "configs:",
    "- config_name: default",
    "  data_files: [{split: train, path: dataset/train.parquet}]",
    "- config_name: candidates",
    "  data_files: [{split: train, path: pairs.parquet}]",
)
_TEXT_OF_CARD = (
    "---",
    "",
    "# Preference pairs chosen by bpo",
    "",
    "Chosen by the package `bpo`, a reconstruction of [the paper](https://arxiv.org/abs/2411.10914) cited below, for",
    "training with TRL's `DPOTrainer`. `load_dataset(...)` gives the training set. The configuration `candidates` has",
    "every pair that there was to choose from, with its scores and what became of it; `bpo.Selection.load` reads the",
    "whole folder.",
    "",
)


class SelectionError(ValueError):
    """A saved selection that cannot be read: not one, of an unknown version, or with a changed file."""


def write_selection(
    directory: str | os.PathLike[str], dataset: datasets.Dataset, pairs: pa.Table, values: Mapping[str, Any]
) -> str | Path:
    """Writes training set, pairs and what else a selection holds; see :meth:`bpo.Selection.save`."""
    if is_url(directory):
        return _send(os.fspath(directory), dataset, pairs, values)
    directory = Path(directory)
    check_directory(directory)
    with locked(directory, _LOCK, "is saving a selection there", wait=_SECONDS_TO_WAIT):
        _check_directory(directory)  # which another process may have used since
        earlier = [path for path in directory.glob(f"{_SCRATCH}*") if not path.is_symlink()]
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
        try:
            _write_files(scratch, directory, dataset, pairs, values)
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
            sync(changed)
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def _write_files(
    scratch: Path, directory: Path, dataset: datasets.Dataset, pairs: pa.Table, values: Mapping[str, Any]
) -> None:
    """Writes everything into a scratch directory, which holds the selection that counts once it has a manifest."""
    (scratch / _DATASET).parent.mkdir()
    for name, write in (
        (_DATASET, dataset.to_parquet),
        (_PAIRS, lambda file: pq.write_table(pairs, file)),
    ):
        with naming_file(directory / name, scratch / name), ArrowFile(scratch / name) as file:
            write(file)
    manifest = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "bpo": bpo.__version__,
        **{
            name: values[name]
            for name in ("strategy", "budget", "seed", "config", "depth", "skipped", "noted", "evidence", "provenance")
        },
        "sha256": {name: _sha256(scratch / name) for name in (_DATASET, _PAIRS)},
    }
    text = json.dumps({**manifest, "checksum": _checksum(manifest)}, indent=1) + "\n"
    with naming_file(directory / _MANIFEST, scratch / "manifest.new"):
        (scratch / "manifest.new").write_text(text, encoding="utf-8")
        sync(scratch / "manifest.new")
        sync(scratch / "dataset")
        (scratch / "manifest.new").replace(scratch / _MANIFEST)
        sync(scratch)
        sync(directory)


def read_selection(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], pa.Table, pa.Table]:
    """Returns manifest, training set and pairs of a saved selection, checked; see :meth:`bpo.Selection.load`."""
    if is_url(directory):
        return _read_objects(Objects(os.fspath(directory)))
    directory = Path(directory)
    while True:
        places = _places(directory)
        seen = _identities(places)
        try:
            return _read_files(places)
        except (SelectionError, FileNotFoundError):
            # Unless someone saved meanwhile, and what was read is half of the one and half of the other.
            if _identities(_places(directory)) == seen:
                raise


def _read_files(places: Mapping[str, Path]) -> tuple[dict[str, Any], pa.Table, pa.Table]:
    """Reads and checks the files of a selection."""
    manifest = _read_manifest(places[_MANIFEST])
    tables = {name: _read_table(places[name], manifest["sha256"].get(name)) for name in (_DATASET, _PAIRS)}
    dataset, pairs = tables[_DATASET], tables[_PAIRS]
    columns = {_DATASET: {"prompt", "chosen", "rejected"}, _PAIRS: {"pair", "prompt", "row", "fate"}}
    for name, needed in columns.items():
        lacking = sorted(needed - set(tables[name].column_names))
        if lacking:
            raise SelectionError(f"{places[name]} has no column {', '.join(lacking)}.")
    kept = [sum(manifest["depth"]), pairs["fate"].to_pylist().count("selected")]
    if kept != [dataset.num_rows] * 2:
        raise SelectionError(
            f"{places[_MANIFEST]} does not belong to the files beside it: {kept[0]} pairs by its depth, {kept[1]} by "
            f"{_PAIRS}, {dataset.num_rows} in {_DATASET}."
        )
    return manifest, dataset, pairs


def _read_table(path: Path, checksum: Any) -> pa.Table:
    """Reads a Parquet file once its checksum is compared, from one and the same open file."""
    if not path.is_file():
        raise SelectionError(f"{path} is missing.")
    with path.open("rb") as file:
        if _sha256(file) != checksum:
            raise SelectionError(f"{path} was changed after it was saved (its SHA-256 differs).")
        file.seek(0)
        try:
            return pq.read_table(file)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise SelectionError(f"{path} cannot be read as Parquet: {error}") from None


def _places(directory: Path) -> dict[str, Path]:
    """Where the files of a selection are: some may still be in the scratch directory of a save that was interrupted."""
    scratch = _latest_scratch(directory)
    places = {
        name: scratch / name if scratch is not None and (scratch / name).is_file() else directory / name
        for name in (_DATASET, _PAIRS, _MANIFEST)
    }
    # A save that goes on may have moved it from the one place to the other just now.
    if not places[_MANIFEST].is_file() and not (directory / _MANIFEST).is_file():
        raise FileNotFoundError(f"{directory} holds no saved selection (no {_MANIFEST}).")
    return places


def _latest_scratch(directory: Path) -> Path | None:
    """Returns the scratch directory of the last save that wrote a manifest and came no further."""
    latest, found = -1, None
    for manifest in directory.glob(f"{_SCRATCH}*/{_MANIFEST}"):
        with contextlib.suppress(FileNotFoundError):  # a save that goes on, and is done with it
            written = manifest.stat().st_mtime_ns
            if written > latest and not manifest.parent.is_symlink():
                latest, found = written, manifest.parent
    return found


def _identities(places: Mapping[str, Path]) -> list[Any]:
    """What tells files from those that took their places."""
    found: list[Any] = []
    for path in places.values():
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((path, stat.st_ino, stat.st_mtime_ns, stat.st_size))
    return found


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a selection."""
    size = path.stat().st_size
    if size > _MAX_MANIFEST_BYTES:
        raise SelectionError(f"{path}: {size} bytes are too many for a manifest.")
    try:
        manifest = read_json(path.read_bytes(), path)
    except ValueError as error:
        raise SelectionError(str(error)) from None
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
    if not isinstance(manifest.get("provenance", {}), dict):
        raise SelectionError(f"{path} has a provenance that is no mapping.")
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


def _send(url: str, dataset: datasets.Dataset, pairs: pa.Table, values: Mapping[str, Any]) -> str:
    """Puts a selection beside an earlier one, then what says which of them counts, and takes the earlier one away."""
    objects = Objects(url)
    earlier = _save_at(objects)
    name = secrets.token_hex(8)
    with tempfile.TemporaryDirectory(prefix="bpo-selection-") as scratch:
        _write_files(Path(scratch), Path(scratch), dataset, pairs, values)
        for file in (_DATASET, _PAIRS, _MANIFEST):
            objects.put(f"{_SAVES}/{name}/{file}", Path(scratch) / file)
    pointer = {"format": _FORMAT_AT, "format_version": _FORMAT_VERSION, "save": name}
    objects.write(_MANIFEST, json.dumps(pointer, indent=1).encode())
    if earlier is not None:
        objects.remove(f"{_SAVES}/{earlier}/{file}" for file in (_MANIFEST, _DATASET, _PAIRS))
    return url


def _read_objects(objects: Objects) -> tuple[dict[str, Any], pa.Table, pa.Table]:
    """Fetches and reads the selection that counts at an address."""
    while True:
        save = _save_at(objects)
        if save is None:
            raise FileNotFoundError(f"{objects.shown} holds no saved selection (no {_MANIFEST}).")
        with tempfile.TemporaryDirectory(prefix="bpo-selection-") as scratch:
            here = Path(scratch) / _SAVES / save
            try:
                objects.get([f"{_SAVES}/{save}/{name}" for name in (_DATASET, _PAIRS, _MANIFEST)], Path(scratch))
                return _read_files({name: here / name for name in (_DATASET, _PAIRS, _MANIFEST)})
            except (SelectionError, FileNotFoundError) as error:
                if _save_at(objects) == save:
                    raise SelectionError(str(error).replace(scratch, objects.shown)) from None


def _save_at(objects: Objects) -> str | None:
    """Returns which save counts at an address; None where a first one may be put.

    Raises:
        FileExistsError: Something else is there.
    """
    there = objects.names()
    if _MANIFEST not in there:
        if not set(there) <= {_SAVES, _REPORT}:
            raise FileExistsError(f"{objects.shown} is not empty and holds no selection; name another address.")
        return None
    try:
        pointer = read_json(objects.read(_MANIFEST, _MAX_MANIFEST_BYTES), _MANIFEST)
        if pointer["format"] == _FORMAT_AT and re.fullmatch("[0-9a-f]{16}", pointer["save"]):
            return str(pointer["save"])
    except (ValueError, LookupError, TypeError):
        pass
    raise FileExistsError(f"{objects.shown}/{_MANIFEST} is not of a selection that bpo saved there.")


def holds_selection(directory: str | os.PathLike[str]) -> bool:
    """Whether a selection was saved in a directory, or at an address."""
    if is_url(directory):
        return _save_at(Objects(os.fspath(directory))) is not None
    return (Path(directory) / _MANIFEST).is_file() or _latest_scratch(Path(directory)) is not None


def check_directory(directory: str | os.PathLike[str]) -> None:
    """Checks that a selection may be saved in a directory, or at an address.

    Raises:
        FileExistsError: It holds something else, or is a file.
        OSError: The address cannot be asked.
    """
    if is_url(directory):
        _save_at(Objects(os.fspath(directory)))
        return
    directory = Path(directory)
    try:
        _check_directory(directory)
    except FileExistsError:
        # The first selection may just be coming into it: whoever saves next looks again once that is done.
        if not (directory / _LOCK).is_file():
            _check_directory(directory)


def _check_directory(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; name a directory.")
    if (directory / "dataset").is_symlink():
        raise FileExistsError(
            f"{directory / 'dataset'} is a link to another directory; remove it, or name another one."
        )
    for name in ("dataset", _DATASET, _PAIRS, _MANIFEST):
        path = directory / name
        if path.exists() and path.is_dir() != (name == "dataset"):
            raise FileExistsError(f"{path} is in the way of a selection; remove it, or name another directory.")
    if (directory / _MANIFEST).is_file():
        try:
            ours = read_json((directory / _MANIFEST).read_bytes(), _MANIFEST).get("format") == _FORMAT
        except (ValueError, AttributeError):
            ours = False
        if not ours:
            raise FileExistsError(f"{directory / _MANIFEST} is not bpo's; name another directory.")
    elif directory.exists():
        # What an interrupted save leaves is ours to replace.
        ours_alone = {_LOCK, *(path.name for path in directory.glob(f"{_SCRATCH}*"))}
        if _latest_scratch(directory) is not None:
            ours_alone |= {"dataset", _PAIRS}
        there = {path.name for path in directory.iterdir()}
        if there - ours_alone == {"dataset"} and not any((directory / "dataset").iterdir()):
            there.remove("dataset")
        if not there <= ours_alone:
            raise FileExistsError(f"{directory} is not empty and holds no selection; name another directory.")


def _sha256(source: Path | BinaryIO) -> str:
    """SHA-256 of a file (hex), from where it is open."""
    digest = hashlib.sha256()
    with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def data_card(
    made: Mapping[str, Any],
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    columns: Sequence[str],
    summary: str,
    license: str | None,
) -> str:
    """Returns the README.md of a data set that holds a selection.

    Args:
        made: Its provenance.
        facts: More to say of it, in the same table.
        config: Its settings.
        columns: Those of the training set.
        summary: Its figures, in lines of text.
        license: Of the data; None takes what ``made`` says.
    """
    license = license or made.get("license")
    default = SelectConfig().to_dict()
    settings = [f"- `{name}={value!r}`" for name, value in config.items() if name in default and value != default[name]]
    return "\n".join(
        [
            *_HEAD_OF_CARD,
            *([f"license: {json.dumps(license)}"] if license else []),
            *_TEXT_OF_CARD,
            *_facts(made, facts, license),
            "",
            *(["Settings that are not the defaults:", "", *settings, ""] if settings else []),
            "## What was chosen",
            "",
            "```text",
            summary,
            "```",
            "",
            f"Columns: {', '.join(f'`{name}`' for name in columns)}.",
            "",
            "## Citation",
            "",
            "```bibtex",
            PAPER["citation"],
            "```",
            "",
        ]
    )


def _facts(made: Mapping[str, Any], facts: Mapping[str, Any], license: str | None) -> list[str]:
    """The rows of a table: what was selected from, and by what."""
    versions = (f"{name} {version}" for name, version in made.get("versions", {}).items())
    rows = {
        **facts,
        "breadth": made.get("breadth", "all prompts"),
        "model": made.get("model"),
        "revision of the model": made.get("model_revision"),
        "data": made.get("data"),
        "fingerprint of responses and pairs": made.get("data_fingerprint"),
        "split": made.get("split"),
        "licence of the data": license or "not known here",
        "made": made.get("created"),
        "versions": ", ".join(versions) or None,
    }
    return ["| | |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in rows.items() if value is not None)]


def published(provenance: dict[str, Any]) -> dict[str, Any]:
    """Returns the provenance for everybody: no command, and of what lies on this machine the name alone."""
    shown = {name: value for name, value in provenance.items() if name != "command"}
    for name in ("model", "data"):
        place = str(shown.get(name, ""))
        if place and not is_url(place) and (Path(place).is_absolute() or Path(place).exists()):
            shown[name] = Path(place).name
    return shown
