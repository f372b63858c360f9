"""What a selection returns: the training set, every candidate pair with its fate, and the depth of each prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import bpo
from bpo.data import Skipped

if TYPE_CHECKING:
    import datasets
    import numpy.typing as npt

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

SELECTED = "selected"
FATES = (SELECTED, "depth", "breadth", "unusable")
"""Fates of a pair: selected, or what it fell to: the depth of its prompt, breadth compression, an unusable gradient."""


class SelectionError(ValueError):
    """A saved selection that cannot be read: not one, of an unknown version, or with a changed file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """The pairs to train on, and why.

    Attributes:
        dataset: ``datasets.Dataset`` for TRL's ``DPOTrainer``: ``prompt``, ``chosen``, ``rejected`` (text or messages,
            as in the data), ``tools``, ``chat_template_kwargs``, weights and token weights where the data has them, and
            the provenance in ``bpo_*`` columns.
        pairs: ``pyarrow.Table``, one row a candidate pair: ``pair``, ``prompt``, ``row`` (of the data),
            ``chosen`` and ``rejected`` (positions among the prompt's responses), ``score_chosen``, ``score_rejected``,
            ``score_gap``, ``length_chosen`` and ``length_rejected`` (tokens), ``logp_chosen``, ``logp_rejected``,
            ``ref_logp_chosen``, ``ref_logp_rejected``, ``informativeness``, ``cluster``, ``centrality``, ``distance``,
            ``alignment``, ``usefulness`` (what the strategy ranked by, larger first), ``fate``, ``length_ratio`` (of
            the preferred response to the other, in tokens, or in characters where there was no model) and
            ``length_effect`` (the part of the score gap in the data that length explains, see
            :func:`bpo.length_effect`). What a strategy does not use is null. With ``length_control="residual"`` scores
            and gaps are without that part.
        depth: (n,) int64, pairs kept of each prompt.
        strategy: Its name.
        budget: Pairs asked for, as a count.
        seed: Of every random choice but the sketch.
        config: The settings, as plain values.
        skipped: What of the data could not be used: reason → places.
        noted: What was used but is worth a look, such as gradients far longer than the others: reason → places.
    """

    dataset: datasets.Dataset
    pairs: pa.Table
    depth: npt.NDArray[np.int64]
    strategy: str
    budget: int
    seed: int
    config: dict[str, Any]
    skipped: dict[str, list[str]]
    noted: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return (
            f"Selection({len(self)} of {self.pairs.num_rows} pairs, {int((self.depth > 0).sum())} of {len(self.depth)} "
            f"prompts, strategy={self.strategy!r}, seed={self.seed})"
        )

    def with_ref_logps(self) -> datasets.Dataset:
        """Returns ``dataset`` with log π_ref of both responses, as ``ref_chosen_logps`` and ``ref_rejected_logps``.

        They are those that the selection used, so the reference need not run again. :class:`bpo.BPOTrainer` sees to
        that by itself with ``precompute_ref_log_probs=True``. TRL's ``DPOTrainer`` would compute its own then and fail
        on columns that are there already, which is why ``dataset`` is without; tell it once it is made::

            trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=selection.with_ref_logps())
            trainer.precompute_ref_logps = True

        Raises:
            ValueError: The strategy uses no gradients, so no log-probabilities were computed.
        """
        if not has_ref_logps(self.dataset):
            raise ValueError(f"strategy={self.strategy!r} computes no log-probabilities; use strategy='bpo'.")
        return add_ref_logps(self.dataset)

    def fates(self) -> dict[str, int]:
        """Returns how many candidate pairs met each fate."""
        counted = {entry["values"]: entry["counts"] for entry in self.pairs["fate"].value_counts().to_pylist()}
        return {fate: counted.get(fate, 0) for fate in FATES}

    def lengths(self) -> dict[str, dict[str, float]] | None:
        """Returns how preferences go with length, of the pairs ``"kept"`` and of ``"all"`` candidates.

        Each with ``longer_share``, the share of pairs whose preferred response is the longer one (equal lengths count
        one half), and, NaN without scores, the mean score gap with (``gap``) and without the length effect
        (``controlled_gap``). None for a selection that was saved by an earlier version.
        """
        if "length_ratio" not in self.pairs.column_names:
            return None
        ratio, gap, effect = (
            self.pairs[name].to_numpy().astype(np.float64) for name in ("length_ratio", "score_gap", "length_effect")
        )
        taken_out = self.config.get("length_control") == "residual"
        gaps = (
            {"gap": gap + effect, "controlled_gap": gap} if taken_out else {"gap": gap, "controlled_gap": gap - effect}
        )
        every = {"longer_share": (np.sign(ratio - 1) + 1) / 2, **gaps}
        selected = pc.equal(self.pairs["fate"], SELECTED).to_numpy()
        return {
            "kept": {name: _mean(values[selected]) for name, values in every.items()},
            "all": {name: _mean(values) for name, values in every.items()},
        }

    def summary(self) -> str:
        """Returns a few lines: what was kept, how depth is spread, and what could not be used."""
        kept = self.depth[self.depth > 0]
        fates = self.fates()
        lines = [
            f"strategy {self.strategy}, budget {self.budget}, seed {self.seed}",
            f"pairs    {fates[SELECTED]} kept of {self.pairs.num_rows}; not kept: {fates['depth']} by depth, "
            f"{fates['breadth']} by breadth, {fates['unusable']} with an unusable gradient",
            f"prompts  {len(kept)} kept of {len(self.depth)}",
            f"depth    {kept.min()} to {kept.max()} pairs a prompt, mean {kept.mean():.2f}",
        ]
        selected = self.pairs.filter(pc.equal(self.pairs["fate"], SELECTED))
        if self.pairs["cluster"].null_count < self.pairs.num_rows:
            clusters = pc.count_distinct(self.pairs["cluster"]).as_py()
            lines.append(
                f"clusters {pc.count_distinct(selected['cluster']).as_py()} of {clusters} represented; mean centrality "
                f"{pc.mean(selected['centrality']).as_py():.3f} kept, {pc.mean(self.pairs['centrality']).as_py():.3f} "
                "all"
            )
        if selected["score_gap"].null_count < selected.num_rows:
            lines.append(
                f"gap      mean score gap {pc.mean(selected['score_gap']).as_py():.3f} kept, "
                f"{pc.mean(self.pairs['score_gap']).as_py():.3f} all"
            )
        lengths = self.lengths()
        if lengths is not None:
            chosen, every = lengths["kept"], lengths["all"]
            line = (
                f"length   preferred response longer in {chosen['longer_share']:.1%} of pairs kept, "
                f"{every['longer_share']:.1%} of all"
            )
            if np.isfinite(chosen["gap"]):
                line += (
                    f"; mean score gap with its effect {chosen['gap']:.3f} kept, {every['gap']:.3f} all, without "
                    f"{chosen['controlled_gap']:.3f} and {every['controlled_gap']:.3f}"
                )
            lines.append(line)
        lines.extend(f"unusable {line}" for line in Skipped(self.skipped).describe().splitlines())
        lines.extend(f"noted    {line}" for line in Skipped(self.noted).describe().splitlines())
        return "\n".join(lines)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Writes one self-contained HTML page of what was chosen; returns its path."""
        from bpo.report import write_report

        return write_report(self, path)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Saves the selection as Parquet and JSON.

        ``DIRECTORY/dataset`` is what ``trl dpo --dataset_name`` takes. Everything is written, and on disk, before the
        first file of an earlier selection is replaced; :meth:`load` finds the earlier selection or this one, whenever
        the process or the machine dies. Other files of the directory stay.

        Args:
            directory: A new or empty directory, or one with an earlier selection.

        Returns:
            The directory.

        Raises:
            FileExistsError: The directory holds something else, or is a file.
            OSError: A file cannot be written, for example because the disk is full; an earlier selection is kept.
        """
        directory = check_directory(directory)
        directory.mkdir(parents=True, exist_ok=True)
        earlier = [path for path in directory.glob(f"{_SCRATCH}*") if not path.is_symlink()]
        scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=directory))
        try:
            (scratch / _DATASET).parent.mkdir()
            self.dataset.to_parquet(str(scratch / _DATASET))
            pq.write_table(self.pairs, scratch / _PAIRS)
            for name in (_DATASET, _PAIRS):
                _sync(scratch / name)
            manifest = {
                "format": _FORMAT,
                "format_version": _FORMAT_VERSION,
                "bpo": bpo.__version__,
                "strategy": self.strategy,
                "budget": self.budget,
                "seed": self.seed,
                "config": self.config,
                "depth": self.depth.tolist(),
                "skipped": self.skipped,
                "noted": self.noted,
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

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Selection:
        """Loads a saved selection and checks its files.

        Nothing is unpickled, and no file is read before its checksum is compared.

        Raises:
            FileNotFoundError: No selection there.
            SelectionError: An unknown version, or a file that changed since it was saved; the message names it.
        """
        import datasets

        directory = Path(directory)
        places = _places(directory)
        manifest = _read_manifest(places[_MANIFEST])
        for name in (_DATASET, _PAIRS):
            if not places[name].is_file():
                raise SelectionError(f"{places[name]} is missing.")
            if _sha256(places[name]) != manifest["sha256"].get(name):
                raise SelectionError(f"{places[name]} was changed after it was saved (its SHA-256 differs).")
        return cls(
            dataset=datasets.Dataset(pq.read_table(places[_DATASET])),
            pairs=pq.read_table(places[_PAIRS]),
            depth=np.array(manifest["depth"], dtype=np.int64),
            strategy=manifest["strategy"],
            budget=manifest["budget"],
            seed=manifest["seed"],
            config=manifest["config"],
            skipped=manifest["skipped"],
            noted=manifest["noted"],
        )


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Mean of the numbers that are there, NaN where none is."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


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


def has_ref_logps(dataset: Any) -> bool:
    """Whether a selected data set has the log-probabilities of the reference among its provenance."""
    return {"bpo_ref_logp_chosen", "bpo_ref_logp_rejected"} <= set(getattr(dataset, "column_names", None) or [])


def add_ref_logps(dataset: datasets.Dataset) -> datasets.Dataset:
    """Returns a selected data set with the log-probabilities of the reference under TRL's names, too."""
    for side in ("chosen", "rejected"):
        dataset = dataset.add_column(f"ref_{side}_logps", list(dataset[f"bpo_ref_logp_{side}"]))
    return dataset


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
