"""What a selection returns: the training set, every candidate pair with its fate, and the depth of each prompt."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bpo.data.candidates import Skipped
from bpo.report.figures import draw_selection
from bpo.report.notebook import facts_table
from bpo.report.selection_page import write_selection_page
from bpo.selection.saved import data_card, published, read_selection, write_selection
from bpo.selection.tables import FATES, SELECTED, UNTRUSTED, labels_record

if TYPE_CHECKING:
    import datasets
    import numpy.typing as npt

_PLAIN = ("strategy", "budget", "seed", "config", "skipped", "noted", "provenance", "evidence")


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
            :func:`bpo.length_effect`). With ``trust="audit"`` also ``trust``, the probability that the label is right.
            What a strategy does not use is null. With ``length_control="residual"`` scores
            and gaps are without that part.
        depth: (n,) int64, pairs kept of each prompt.
        strategy: Its name.
        budget: Pairs asked for, as a count.
        seed: Of every random choice but the sketch.
        config: The settings, as plain values.
        skipped: What of the data could not be used: reason → places.
        noted: What was used but is worth a look, such as gradients far longer than the others: reason → places.
        provenance: Where the selection comes from, as far as that is known: ``model`` (path, hub id, or the fingerprint
            that a store alone knows), ``model_revision``, ``data`` (path, hub id or kind), ``data_readable`` (whether
            it is a path or id), ``data_fingerprint`` (SHA-256 of its responses and pairs), ``split``, ``license`` (of
            the data), ``breadth``, ``command`` (of bpo's commands), ``versions`` (package → version) and ``created``
            (ISO 8601, UTC; that of the environment variable ``SOURCE_DATE_EPOCH`` where it is set).
        evidence: What was measured beside the choice, as plain values, from which the report says whether it can be
            trusted; empty with ``evidence=False`` and for a selection of an earlier version.
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
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    evidence: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return (
            f"Selection({len(self)} of {self.pairs.num_rows} pairs, {int((self.depth > 0).sum())} of {len(self.depth)} "
            f"prompts, strategy={self.strategy!r}, seed={self.seed})"
        )

    def _repr_html_(self) -> str:
        kept = self.depth[self.depth > 0]
        fates = self.fates()
        return facts_table(
            "Selection",
            [
                ("strategy", f"{self.strategy}, budget {self.budget:,}, seed {self.seed}"),
                ("pairs", f"{fates[SELECTED]:,} kept of {self.pairs.num_rows:,}"),
                ("prompts", f"{len(kept):,} kept of {len(self.depth):,}, {kept.mean():.2f} pairs each"),
                *((f"not kept: {fate}", f"{count:,}") for fate, count in fates.items() if fate != SELECTED and count),
                ("unusable", f"{sum(map(len, self.skipped.values())):,}" if self.skipped else None),
                ("worth a look", f"{sum(map(len, self.noted.values())):,}" if self.noted else None),
            ],
        )

    def with_ref_logps(self) -> datasets.Dataset:
        """Returns ``dataset`` with log π_ref of both responses, as ``ref_chosen_logps`` and ``ref_rejected_logps``.

        They are those that the selection used, so the reference need not run again. :class:`bpo.BPOTrainer` and
        :class:`bpo.WeightedDPOTrainer` take them with ``precompute_ref_log_probs=True``. TRL's ``DPOTrainer`` would
        compute its own then and fail on columns that are there already, which is why ``dataset`` is without, unless
        ``SelectConfig.reference_logps`` asks for them; tell it once it is made::

            trainer = DPOTrainer(model, args=DPOConfig(...), train_dataset=selection.with_ref_logps())
            trainer.precompute_ref_logps = True

        Raises:
            ValueError: The strategy uses no gradients, so no log-probabilities were computed.
        """
        if not has_ref_logps(self.dataset):
            raise ValueError(f"strategy={self.strategy!r} computes no log-probabilities; use strategy='bpo'.")
        return add_ref_logps(self.dataset)

    @property
    def _selected(self) -> npt.NDArray[np.bool_]:
        """(P,) bool, which candidate pairs are kept."""
        selected: npt.NDArray[np.bool_] = pc.equal(self.pairs["fate"], SELECTED).to_numpy()
        return selected

    def fates(self) -> dict[str, int]:
        """Returns how many candidate pairs met each fate; ``"untrusted"`` only where labels were audited."""
        counted = {entry["values"]: entry["counts"] for entry in self.pairs["fate"].value_counts().to_pylist()}
        audited = "trust" in self.pairs.column_names
        return {fate: counted.get(fate, 0) for fate in FATES if fate != UNTRUSTED or audited}

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
        selected = self._selected
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
            f"{fates['breadth']} by breadth, {fates['unusable']} with an unusable gradient"
            + (f", {fates[UNTRUSTED]} whose label looks wrong" if UNTRUSTED in fates else ""),
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

    def report(self, path: str | os.PathLike[str], *, preview: Any = None, audit: Any = None) -> Path:
        """Writes one self-contained HTML page: whether this selection can be trusted, and what was chosen.

        It runs no script but its own, which searches and sorts, and asks no network. ``docs/report.md`` says how to
        read it.

        Args:
            path: File to write; replaced whole or not at all.
            preview: A :class:`bpo.Preview` of the same data, whose verdict is then the first thing that the page says.
            audit: A :class:`bpo.Audit` of it, in place of what the selection itself knows of its labels.

        Returns:
            The path.
        """
        selected = self._selected
        return write_selection_page(
            Path(path),
            self.pairs,
            self.dataset,
            selected,
            self.depth,
            skipped=self.skipped,
            noted=self.noted,
            evidence=self.evidence,
            provenance=self.provenance,
            preview=None
            if preview is None
            else {"records": preview.table(), "baseline": preview.baseline, "splits": preview.accuracy.shape[2]},
            audit=None if audit is None else _labels_of(audit, selected),
            strategy=self.strategy,
            seed=self.seed,
            budget=self.budget,
            config=self.config,
            fates=self.fates(),
            lengths=self.lengths(),
            length_control=self.config.get("length_control"),
        )

    def figure(self, path: str | os.PathLike[str]) -> Path:
        """Draws what the page shows, for a paper, into a .svg, .png or .pdf file; needs matplotlib.

        Depth of all prompts, every kept pair over the density of the others, how the lengths of both responses go, and
        the choice against others at the same budget, where that was measured.

        Returns:
            The path.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: A name that ends otherwise.
        """
        return draw_selection(self.pairs, self._selected, self.depth, self.evidence.get("worth") or {}, path)

    def save(self, directory: str | os.PathLike[str]) -> str | Path:
        """Saves the selection as Parquet and JSON.

        ``DIRECTORY/dataset`` is what ``trl dpo --dataset_name`` takes. Everything is written, and on disk, before the
        first file of an earlier selection is replaced; :meth:`load` finds the earlier selection or this one, whenever
        the process or the machine dies. Other files of the directory stay.

        Args:
            directory: A new or empty directory, or one with an earlier selection; or an address such as
                ``s3://bucket/prefix``.

        Returns:
            The directory, or the address.

        Raises:
            FileExistsError: The directory holds something else, or is a file.
            OSError: A file cannot be written, for example because the disk is full; an earlier selection is kept.
        """
        values = {name: getattr(self, name) for name in _PLAIN}
        return write_selection(directory, self.dataset, self.pairs, {**values, "depth": self.depth.tolist()})

    def card(self, license: str | None = None) -> str:
        """Returns the data card: how the selection was made, its figures and columns, and what to cite.

        As ``README.md`` beside what :meth:`save` writes it also says which files are which, so that ``load_dataset``
        reads the directory: the training set, or every candidate with the configuration ``"candidates"``.

        Args:
            license: Of the data that was selected from, as the hub names it, such as ``"mit"``; by default what the
                data itself says.
        """
        facts = {"strategy": self.strategy, "budget": f"{self.budget} pairs", "seed": self.seed}
        return data_card(
            self.provenance, facts, self.config, self.dataset.column_names, self.summary(), license=license
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Publishes the selection as a data set of the hub, with its card.

        What is there afterwards is what :meth:`save` writes and the card: ``load_dataset(repo_id, split="train")``
        gives the training set, and :meth:`load` the whole from a downloaded copy. ``provenance`` goes without the
        command and without the directories of this machine, ``evidence`` without texts, so that no response is
        published but those of the chosen pairs; ``config`` as it is.

        Args:
            repo_id: ``owner/name``; made where it is not there, and an earlier selection is replaced.
            license: As of :meth:`card`.
            private: Whether a new one is private; None leaves that to the hub.
            revision: Branch, made where it is not there; None is the main one.
            commit_message: Of the commit.
            token: As of ``huggingface_hub``; None is the one that is logged in.

        Returns:
            The address of the commit.

        Raises:
            OSError: The hub cannot be reached, or refuses; huggingface_hub says why.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        evidence = {name: value for name, value in self.evidence.items() if name != "texts"}
        shown = dataclasses.replace(self, provenance=published(self.provenance), evidence=evidence)
        with tempfile.TemporaryDirectory(prefix="bpo-selection-") as scratch:
            shown.save(scratch)
            (Path(scratch) / "README.md").write_text(shown.card(license), encoding="utf-8")
            repo = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo, branch=revision, repo_type="dataset", exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=scratch,
                repo_type="dataset",
                revision=revision,
                commit_message=commit_message or f"Selection of {len(self)} pairs by {self.strategy}",
                ignore_patterns=[".*"],
            )
        return str(commit)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Selection:
        """Loads a saved selection from a directory or an address, and checks its files.

        Nothing is unpickled, and no file is read before its checksum is compared.

        Raises:
            FileNotFoundError: No selection there.
            SelectionError: An unknown version, or a file that changed since it was saved; the message names it.
        """
        import datasets

        manifest, dataset, pairs = read_selection(directory)
        return cls(
            dataset=datasets.Dataset(dataset),
            pairs=pairs,
            depth=np.array(manifest["depth"], dtype=np.int64),
            strategy=manifest["strategy"],
            budget=manifest["budget"],
            seed=manifest["seed"],
            config=manifest["config"],
            skipped=manifest["skipped"],
            noted=manifest["noted"],
            provenance=manifest.get("provenance", {}),
            evidence=manifest.get("evidence", {}),
        )


def _mean(values: npt.NDArray[np.float64]) -> float:
    """Mean of the numbers that are there, NaN where none is."""
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else float("nan")


def _labels_of(audit: Any, selected: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """What an audit says of the kept pairs, as :attr:`Selection.evidence` has it.

    Raises:
        ValueError: It is of other data.
    """
    pairs, wrong = audit.pairs["pair"].to_numpy(), audit.pairs["wrong"].to_numpy()
    if len(pairs) and pairs.max() >= len(selected):
        raise ValueError(f"The audit has pair {pairs.max()}, of {len(selected)} candidates: it is of other data.")
    kept = selected[pairs]
    return labels_record(audit.tells, pairs[kept], wrong[kept])


def has_ref_logps(dataset: Any) -> bool:
    """Whether a selected data set has the log-probabilities of the reference among its provenance."""
    return {"bpo_ref_logp_chosen", "bpo_ref_logp_rejected"} <= set(getattr(dataset, "column_names", None) or [])


def add_ref_logps(dataset: datasets.Dataset) -> datasets.Dataset:
    """Returns a selected data set with the log-probabilities of the reference under TRL's names, too."""
    for side in ("chosen", "rejected"):
        if f"ref_{side}_logps" not in dataset.column_names:
            dataset = dataset.add_column(f"ref_{side}_logps", list(dataset[f"bpo_ref_logp_{side}"]))
    return dataset
