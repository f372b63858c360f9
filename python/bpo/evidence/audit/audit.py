"""``audit``: pairs of a store, the margins that the rest of the data gives them, and who stated the suspects."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.config import SelectConfig
from bpo.data.read import read_configured
from bpo.data.rows import load_rows
from bpo.data.values import prompt_text
from bpo.evidence.audit.results import Audit
from bpo.evidence.preview.data import PreviewData
from bpo.evidence.statistics import clustered_standard_error
from bpo.pairs.left_out import left_out_margins
from bpo.pairs.size import ChoiceSize
from bpo.pairs.wrong_labels import wrong_labels
from bpo.selection.sources import StoreAlone
from bpo.store.gradient_store import GradientStore
from bpo.world.world import by_main

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.data.rows import Rows

# Columns that say where a label comes from, grouped by where the data has them.
_SOURCES = ("source", "scorer", "judge", "annotator", "dataset", "model", "category")
_NORMAL = 1.959964  # of a 95 % interval


@by_main
def audit(
    store: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    dataset: Any,
    *,
    by: str | Sequence[str] | None = None,
    wrong_share: float | None = None,
    worst: int = 50,
    processing_class: Any = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Audit:
    """Says which labels look wrong, straight from a gradient store *(ours)*.

    Each label is held against the others: a regression of preferences on the gradients of responses, from which its own
    prompt is left out, gives it a margin; where labels of one prompt contradict each other, as votes do, those testify
    too. Margins become probabilities by what agreement comes to where they are large. It needs no model, no clean data
    and no random numbers; it cannot tell a wrong label from a taste that the rest of the data does not share, and says
    so where gradients tell nothing. ``docs/audit.md`` has what it found where labels were turned on purpose.

    Args:
        store: Gradient store of the data, or several, such as those of checkpoints, whose gradients stand side by side.
        dataset: The data it was made with, or a part of it, in any format of :func:`bpo.select`.
        by: Columns of the data by whose values labels are grouped; None for those that say where labels come from
            (``source``, ``scorer``, ``judge``, ``annotator``, ``dataset``, ``model``, ``category``) and are there.
        wrong_share: The share of wrong labels, above 0 and below ½, where it is known, as from labels that were given
            twice; None estimates it, which weak gradients allow only roughly.
        worst: How many pairs are kept with their texts, to be read.
        processing_class: As of :func:`bpo.preview`.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        config: Settings; of these, how data is read, and ``max_memory``.
        progress: Whether to show a progress bar.

    Returns:
        The audit: ``summary()``, ``report(path)``, ``pairs``.

    Raises:
        ValueError: Pairs of one prompt only, no usable gradient, a column that is not there, an argument out of range,
            or a ``max_memory`` below what d numbers of all stores take (48 bytes for each of d × d).
        FileNotFoundError: No store there.
        bpo.StoreError: As :func:`bpo.select`.

    Example:
        .. code-block:: python

            found = bpo.audit("gradients", "responses.jsonl")
            print(found.summary())
            found.report("audit.html")
    """
    start = time.perf_counter()
    if wrong_share is not None and not (_is_number(wrong_share) and 0 < wrong_share < 0.5):
        raise ValueError(f"wrong_share must be above 0 and below 0.5, or None, got {wrong_share!r}")
    if not isinstance(worst, int) or isinstance(worst, bool) or worst < 0:
        raise ValueError(f"worst must be a whole number of at least 0, got {worst!r}")
    given = [store] if isinstance(store, (str, os.PathLike)) else list(store)
    paths = [os.fspath(path) for path in given]
    if not paths or len(set(paths)) < len(paths):
        raise ValueError(f"store must be one gradient store or several different ones, got {store!r}")
    settings = SelectConfig.of(dict(config) if isinstance(config, Mapping) else config)
    rows = load_rows(dataset, split=split, columns=columns)
    sources = _columns(by, rows)
    data = _read(paths, rows, settings, processing_class, progress)

    index = np.flatnonzero(data.usable)
    prompts = data.candidates.prompt_of_pair[index]
    gradients = [data.pairs[name].gradients[0].take(index) for name in data.sources]
    dim = sum(each.rows.shape[1] for each in gradients)
    alone = dataclasses.replace(settings, n_clusters=1)
    ChoiceSize(len(data.candidates.responses), len(index), dim, alone, audited=True).check()
    left_out = left_out_margins(gradients, prompts)
    found = wrong_labels(left_out, prompts, wrong_share)
    pairs = _pair_table(data, index, left_out.margins, found.probability)
    return Audit(
        pairs=pairs,
        prompts=_prompt_table(pairs, data.candidates),
        groups=[record for column in sources for record in _groups(column, rows, pairs)],
        worst=_worst(data.candidates, pairs, worst),
        wrong_share=found.share,
        low=found.low,
        high=found.high,
        agreement=found.agreement,
        p_value=found.p_value,
        tells=found.tells,
        one_by_one=left_out.one_by_one,
        circles=left_out.circles,
        n_rows=len(rows),
        skipped=data.candidates.skipped.places,
        seconds=time.perf_counter() - start,
        settings={"stores": paths, "wrong_share": wrong_share, "penalty": left_out.penalty, "worth": left_out.worth},
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _columns(by: str | Sequence[str] | None, rows: Rows) -> list[str]:
    """The columns to group by."""
    there = list(rows.column_names)
    if by is None:
        return [name for name in _SOURCES if name in there]
    wanted = [by] if isinstance(by, str) else list(by)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise ValueError(f"by names {', '.join(map(str, missing))}, but the columns are {there}.")
    return wanted


def _read(paths: Sequence[str], rows: Rows, config: SelectConfig, processing_class: Any, progress: bool) -> PreviewData:
    """Reads the pairs that every store holds.

    Raises:
        ValueError: None of them has a usable gradient, or all of these are of one prompt.
    """
    names = [None, *paths[1:]]
    sources = {
        name: StoreAlone(GradientStore.open(path), config, processing_class)
        for name, path in zip(names, paths, strict=True)
    }
    reading = dataclasses.replace(sources[None].config, token_weights=None, ref_model=None)
    data = PreviewData.of(read_configured(rows, reading), sources, progress)
    n_prompts = len(np.unique(data.candidates.prompt_of_pair[data.usable]))
    if n_prompts < 2:
        raise ValueError(
            "A label is held against those of other prompts, so an audit needs pairs of two prompts at least whose "
            f"gradients are usable, and there are those of {n_prompts}."
        )
    return data


def _pair_table(
    data: PreviewData, index: npt.NDArray[np.int64], margins: npt.NDArray[np.float64], wrong: npt.NDArray[np.float64]
) -> pa.Table:
    candidates, lengths = data.candidates, data.lengths[index]
    prompts, sides = candidates.prompt_of_pair[index], candidates.pairs[index]
    within = sides - np.searchsorted(candidates.prompt_of_response, prompts)[:, None]
    scores = candidates.pair_scores[index]
    return pa.table(
        {
            "pair": index,
            "prompt": prompts,
            "row": candidates.pair_rows[index],
            "chosen": within[:, 0],
            "rejected": within[:, 1],
            "score_chosen": pa.array(scores[:, 0], from_pandas=True),
            "score_rejected": pa.array(scores[:, 1], from_pandas=True),
            "score_gap": pa.array(scores[:, 0] - scores[:, 1], from_pandas=True),
            "length_chosen": lengths[:, 0],
            "length_rejected": lengths[:, 1],
            "margin": margins,
            "wrong": wrong,
            "trust": 1 - wrong,
        }
    )


def _prompt_table(pairs: pa.Table, candidates: Candidates) -> pa.Table:
    prompts, index = np.unique(pairs["prompt"].to_numpy(), return_inverse=True)
    counts = np.bincount(index)
    contradicted = np.bincount(index, weights=pairs["margin"].to_numpy() < 0)
    return pa.table(
        {
            "prompt": prompts,
            "row": candidates.prompt_rows[prompts],
            "pairs": counts,
            "contradicted": contradicted / counts,
            "wrong": np.bincount(index, weights=pairs["wrong"].to_numpy()) / counts,
        }
    )


def _groups(column: str, rows: Rows, pairs: pa.Table) -> list[dict[str, Any]]:
    """What became of the labels of each value of a column, the largest group first."""
    values = [_shown(value) for value in rows.column(column)]
    of_pair = np.array(values, dtype=object)[pairs["row"].to_numpy()]
    prompts, wrong = pairs["prompt"].to_numpy(), pairs["wrong"].to_numpy()
    contradicted = (pairs["margin"].to_numpy() < 0).astype(np.float64)
    records = []
    for value in sorted(set(of_pair)):
        own = of_pair == value
        _, clusters = np.unique(prompts[own], return_inverse=True)
        n_prompts, share = int(clusters.max()) + 1, float(contradicted[own].mean())
        half = None
        if n_prompts > 1:
            error = clustered_standard_error(contradicted[own], clusters)
            half = _NORMAL * error * (n_prompts / (n_prompts - 1)) ** 0.5
        records.append(
            {
                "column": column,
                "value": value,
                "pairs": int(own.sum()),
                "prompts": n_prompts,
                "contradicted": share,
                "low": None if half is None else max(0.0, share - half),
                "high": None if half is None else min(1.0, share + half),
                "wrong": float(wrong[own].mean()),
                "suspects": int((wrong[own] > 0.5).sum()),
            }
        )
    return sorted(records, key=lambda record: (-record["pairs"], record["value"]))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True, ensure_ascii=False)


def _worst(candidates: Candidates, pairs: pa.Table, count: int) -> list[dict[str, Any]]:
    """The pairs that look worst, with their texts; of equals the first in the data."""
    order = np.lexsort((pairs["margin"].to_numpy(), -pairs["wrong"].to_numpy()))[:count]
    records: list[dict[str, Any]] = pairs.take(pa.array(order)).to_pylist()
    for record in records:
        chosen, rejected = candidates.pairs[record["pair"]]
        record.pop("chosen")
        record["prompt_text"] = prompt_text(candidates.prompts[record["prompt"]])
        record["chosen"], record["rejected"] = (prompt_text(candidates.responses[i]) for i in (chosen, rejected))
    return records
