"""The page of a selection: whether it can be trusted, what was chosen and what was not, to look at and to read."""

from __future__ import annotations

import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import markupsafe
import numpy as np
import pyarrow.compute as pc

from bpo.data.values import prompt_text
from bpo.report.charts import HEIGHT, WIDTH, column, histogram, pair_axes, scatter
from bpo.report.page import first_places, write_page
from bpo.report.terms import characteristic_terms
from bpo.report.verdict import verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt
    import pyarrow as pa

SCORES = {
    "score_gap": "score gap",
    "score_chosen": "score of the chosen",
    "score_rejected": "score of the rejected",
    "length_chosen": "length of the chosen",
    "length_rejected": "length of the rejected",
    "logp_chosen": "log π of the chosen",
    "logp_rejected": "log π of the rejected",
    "ref_logp_chosen": "log π_ref of the chosen",
    "ref_logp_rejected": "log π_ref of the rejected",
    "usefulness": "usefulness",
    "cluster": "cluster",
    "centrality": "centrality",
    "distance": "distance to the centre",
    "alignment": "alignment",
    "informativeness": "length of the gradient",
    "length_effect": "gap that length explains",
    "trust": "trust in the label",
}
"""What is told of a pair."""

FATES = {
    "selected": "kept",
    "depth": "others of its prompt came first",
    "breadth": "its prompt was left out",
    "unusable": "its gradient cannot be used",
    "untrusted": "its label looks wrong",
}
"""What became of a pair, in words."""

_SHOWN_PAIRS = 5  # of either side of a prompt
# Bytes of texts: of the pairs to read, of those that evidence names, and of prompts typical of clusters.
_MOST_READ, _MOST_NAMED, _MOST_TYPICAL = 500_000, 150_000, 100_000
_MOST_CLUSTERS = 300
_TYPICAL = 2


def write_selection_page(
    path: Path,
    pairs: pa.Table,
    dataset: Any,
    selected: npt.NDArray[np.bool_],
    depth: npt.NDArray[np.int64],
    *,
    skipped: Mapping[str, list[str]],
    noted: Mapping[str, list[str]],
    evidence: Mapping[str, Any],
    provenance: Mapping[str, Any],
    preview: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    **values: Any,
) -> Path:
    """Writes the page.

    Args:
        path: File to write; replaced whole or not at all.
        pairs: One row a candidate pair, as :attr:`bpo.Selection.pairs`.
        dataset: The training set, as :attr:`bpo.Selection.dataset`.
        selected: (P,) bool, which of them are kept.
        depth: (n,) int64, pairs kept of each prompt.
        skipped: What of the data could not be used: reason → places.
        noted: What is worth a look, likewise.
        evidence: As :attr:`bpo.Selection.evidence`.
        provenance: Model, data, command and versions, as far as they are known.
        preview: Records, number of splits and baseline of a preview of the same data.
        audit: In place of the labels of ``evidence``, likewise.
        values: What else the template names.

    Returns:
        The path.
    """
    if audit is not None:
        evidence = {**evidence, "labels": audit}
    texts = _Texts(dataset, evidence.get("texts") or [])
    clusters = _clusters(pairs, selected, texts)
    said = verdict(
        values["strategy"],
        values["budget"],
        evidence,
        preview=preview,
        lengths=values["lengths"],
        clusters=clusters,
        fates=values["fates"],
        noted=first_places(noted),
        provenance=provenance,
    )
    return write_page(
        "selection.html",
        path,
        n_pairs=pairs.num_rows,
        n_prompts=len(depth),
        kept_prompts=int((depth > 0).sum()),
        verdict=said,
        provenance=provenance,
        worth=evidence.get("worth") or {},
        depths=_depths(depth),
        clusters=clusters[:_MOST_CLUSTERS],
        n_clusters=len(clusters),
        scatter=_scatter(pairs, selected),
        size=(WIDTH, HEIGHT),
        distributions=_distributions(pairs, selected),
        sources=evidence.get("sources") or [],
        labels=evidence.get("labels") or {},
        near=evidence.get("near") or {},
        named=_named(pairs, texts, evidence),
        prompts=_prompts(pairs, depth, texts),
        titles=SCORES,
        fate_titles=FATES,
        skipped=first_places(skipped),
        noted=first_places(noted),
        **values,
    )


class _Room:
    """Bytes that a part of the page may still take."""

    def __init__(self, left: int) -> None:
        self._left = left

    def has(self, *texts: str) -> bool:
        """Whether some texts fit, whole; they then take their place."""
        size = sum(len(str(markupsafe.escape(text)).encode(errors="replace")) for text in texts)
        if size > self._left:
            return False
        self._left -= size
        return True


class _Texts:
    """The texts that a selection holds: of the kept pairs, and of the prompts whose responses are all there."""

    def __init__(self, dataset: Any, examples: Sequence[Mapping[str, Any]]) -> None:
        names = dataset.column_names
        self._dataset = dataset
        prompts = np.array(dataset["bpo_prompt"][:] if "bpo_prompt" in names else [], dtype=np.int64)
        self.kept, self._first = np.unique(prompts, return_index=True)
        self._rows = {int(pair): row for row, pair in enumerate(dataset["bpo_pair"][:])} if "bpo_pair" in names else {}
        self.examples = {each["prompt"]: each for each in examples}

    @functools.cached_property
    def prompts(self) -> dict[int, str]:
        """Text of every prompt that keeps a pair, or whose responses are all there."""
        texts = self._dataset.select(self._first)["prompt"][:]
        found = {int(prompt): prompt_text(text) for prompt, text in zip(self.kept, texts, strict=True)}
        return {prompt: each["text"] for prompt, each in self.examples.items()} | found

    def pair(self, pair: Mapping[str, Any]) -> tuple[str, str] | None:
        """The preferred and the other response of a pair, None where the selection does not hold them."""
        row = self._rows.get(pair["pair"])
        if row is not None:
            found = self._dataset[row]
            return prompt_text(found["chosen"]), prompt_text(found["rejected"])
        example = self.examples.get(pair["prompt"])
        if example is None:
            return None
        return example["responses"][pair["chosen"]], example["responses"][pair["rejected"]]


def _depths(depth: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """How many prompts have each depth, none included."""
    counts = np.bincount(depth)
    most = max(int(counts.max(initial=0)), 1)
    return [{"depth": pairs, "prompts": int(count), "share": count / most} for pairs, count in enumerate(counts)]


def _clusters(pairs: pa.Table, selected: npt.NDArray[np.bool_], texts: _Texts) -> list[dict[str, Any]]:
    """Pairs of each cluster, what its prompts are about and the most typical ones, largest first."""
    labels = pairs["cluster"].to_numpy().astype(np.float64)
    known = np.flatnonzero(np.isfinite(labels))
    if len(known) == 0:
        return []
    prompt, chosen = pairs["prompt"].to_numpy(), selected
    centrality = np.nan_to_num(column(pairs, "centrality"), nan=-2.0)
    said = texts.prompts
    # The most central pair first, so that the first prompts of a cluster are its most typical ones.
    order = known[np.lexsort((known, -centrality[known], labels[known]))]
    members: dict[int, dict[int, None]] = {}
    for label, number in zip(labels[order].astype(int).tolist(), prompt[order].tolist(), strict=True):
        found = members.setdefault(label, {})
        if number in said:
            found[number] = None
    terms = characteristic_terms(said, members)
    candidates = Counter(labels[known].astype(int).tolist())
    kept = Counter(labels[known][chosen[known]].astype(int).tolist())
    most, room = max(candidates.values()), _Room(_MOST_TYPICAL)
    return [
        {
            "label": label,
            "candidates": count,
            "kept": kept[label],
            "share": count / most,
            "kept_share": kept[label] / most,
            "terms": terms.get(label, []),
            "typical": [said[each] for each in list(members[label])[:_TYPICAL] if room.has(said[each])],
        }
        for label, count in sorted(candidates.items(), key=lambda item: (-item[1], item[0]))
    ]


def _scatter(pairs: pa.Table, selected: npt.NDArray[np.bool_]) -> dict[str, Any] | None:
    """The first two things that there are to draw, against each other."""
    axes = pair_axes(pairs)
    if len(axes) < 2:
        return None
    (x_title, x), (y_title, y) = axes[:2]
    drawn = scatter(x, y, selected)
    if drawn is None:
        return None
    medians = {
        title: [
            float(np.nanmedian(values[side])) if np.isfinite(values[side]).any() else None
            for side in (selected, ~selected)
        ]
        for title, values in ((x_title, x), (y_title, y))
    }
    return {**drawn, "x_title": x_title, "y_title": y_title, "medians": medians}


def _distributions(pairs: pa.Table, selected: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Length and score gap, of the kept and of all pairs."""
    found = []
    for title, values in pair_axes(pairs):
        drawn = histogram(values, selected)
        if drawn is not None:
            found.append({"title": title, **drawn})
    return found


def _named(pairs: pa.Table, texts: _Texts, evidence: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The pairs that evidence names, with their texts where the selection holds them."""
    labels, near = evidence.get("labels") or {}, evidence.get("near") or {}
    wanted = [pair for pair, _ in labels.get("worst", [])] + [
        pair for each in near.get("pairs", []) for pair in each[:2]
    ]
    found, room = {}, _Room(_MOST_NAMED)
    for pair in dict.fromkeys(wanted):
        if pair < pairs.num_rows:
            row = pairs.slice(pair, 1).to_pylist()[0]
            said, both = texts.prompts.get(row["prompt"]), texts.pair(row)
            if room.has(said or "", *(both or ())):
                found[pair] = {**row, "texts": both, "said": said}
    return found


def _prompts(pairs: pa.Table, depth: npt.NDArray[np.int64], texts: _Texts) -> list[dict[str, Any]]:
    """Prompts with their kept and dropped pairs, within what a page can hold of texts."""
    shown = list(texts.examples) or sorted(texts.kept.tolist(), key=lambda prompt: (-depth[prompt], prompt))[:40]
    room = _Room(_MOST_READ)
    found: list[dict[str, Any]] = []
    for prompt in shown:
        rows = pairs.filter(pc.equal(pairs["prompt"], prompt)).to_pylist()
        sides = {
            side: sorted((row for row in rows if (row["fate"] == "selected") == kept), key=_most_useful_first)
            for side, kept in (("kept", True), ("dropped", False))
        }
        entry = {"prompt": prompt, "text": texts.prompts[prompt], "row": rows[0]["row"], "depth": int(depth[prompt])}
        for side, members in sides.items():
            entry[side] = [{**row, "texts": texts.pair(row)} for row in members[:_SHOWN_PAIRS]]
            entry[f"all_{side}"] = len(members)
            entry[f"fates_{side}"] = dict(Counter(row["fate"] for row in members))
        if room.has(entry["text"], *(text for side in sides for row in entry[side] for text in row["texts"] or ())):
            found.append(entry)
    return found


def _most_useful_first(row: Mapping[str, Any]) -> tuple[bool, float, int]:
    """Order of a prompt's pairs; those that the strategy did not rank, as length control may add some, come last."""
    usefulness = row.get("usefulness")
    return usefulness is None, 0.0 if usefulness is None else -usefulness, row["pair"]
