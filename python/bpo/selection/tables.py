"""The tables of a selection: every candidate pair, and the training set."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.system.packed import as_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import datasets
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.data.values import Text
    from bpo.selection.inputs import Inputs, Pool
    from bpo.selection.scored import ScoredPairs

SELECTED = "selected"
UNTRUSTED = "untrusted"
# Rows of a table that are made at once.
_PIECE = 1 << 14
# The numbers of a training set are as Python has them.
_WIDE = {pa.float32(): pa.float64(), pa.int32(): pa.int64()}
_NAMED_LABELS, _DOUBTFUL = 20, 0.3
FATES = (SELECTED, "depth", "breadth", "unusable", UNTRUSTED)
"""Fates of a pair: selected, or what it fell to: the depth of its prompt, breadth compression, an unusable gradient, or
a label that is more likely wrong than right."""


def labels_record(tells: bool, pairs: npt.NDArray[np.int64], wrong: npt.NDArray[np.float64]) -> dict[str, Any]:
    """What a selection says of the labels of its pairs, as plain values.

    Args:
        tells: Whether the rest of the data says anything of them.
        pairs: (K,) those whose labels were looked at.
        wrong: (K,) the probability that each is wrong.
    """
    worst = np.argsort(-wrong, kind="stable")[:_NAMED_LABELS]
    return {
        "tells": bool(tells),
        "suspects": int((wrong > 0.5).sum()),
        "expected": float(wrong.sum()),
        "known": len(pairs),
        "worst": [[int(pairs[at]), float(wrong[at])] for at in worst if wrong[at] > _DOUBTFUL],
    }


def pair_table(
    pool: Pool,
    fate: npt.NDArray[np.object_],
    pair_index: npt.NDArray[np.int64],
    usefulness: npt.NDArray[np.float64],
    scored: ScoredPairs,
    *,
    with_labels: bool,
) -> pa.Table:
    """One row a candidate pair; what a strategy does not use is null.

    Args:
        pool: All P candidate pairs.
        fate: (P,) one of :data:`FATES`.
        pair_index: (P',) int64, which of them ``scored`` and ``usefulness`` are of.
        usefulness: (P',) float64, what the strategy ranked by.
        scored: The pairs of the kept prompts.
        with_labels: Whether the strategy reads clusters.
    """
    n = len(pool.candidates.pairs)
    first_response = np.searchsorted(pool.candidates.prompt_of_response, np.arange(len(pool.candidates.prompts)))
    pieces = (
        _piece(
            slice(first, min(first + _PIECE, n)),
            pool,
            fate,
            pair_index,
            usefulness,
            scored,
            first_response,
            with_labels,
        )
        for first in range(0, n, _PIECE)
    )
    first = next(pieces)
    return as_table(first.schema, itertools.chain([first], pieces))


def _piece(
    rows: slice,
    pool: Pool,
    fate: npt.NDArray[np.object_],
    pair_index: npt.NDArray[np.int64],
    usefulness: npt.NDArray[np.float64],
    scored: ScoredPairs,
    first_response: npt.NDArray[np.int64],
    with_labels: bool,
) -> pa.RecordBatch:
    """Some rows of the table of pairs; ``first_response`` is the place of each prompt's first response, (n,) int64."""
    inputs, pairs, clusters = pool.inputs, scored.measured, scored.clusters
    candidates, lengths = inputs.candidates, inputs.lengths
    n = rows.stop - rows.start
    begin, end = np.searchsorted(pair_index, [rows.start, rows.stop])
    chosen, rejected = candidates.pairs[rows].T
    logps, ref_logps = (None, None) if pairs is None else (pairs.logps, pairs.ref_logps)
    ratios = inputs.pair_lengths[rows, 0] / inputs.pair_lengths[rows, 1]
    prompts, pair_scores = candidates.prompt_of_pair[rows], candidates.pair_scores[rows]

    def scattered(values: npt.NDArray[Any] | None, kind: pa.DataType) -> pa.Array:
        if values is None:
            return pa.nulls(n, kind)
        full = np.full(n, np.nan)
        full[pair_index[begin:end] - rows.start] = values[begin:end]
        return pa.array(full, from_pandas=True).cast(kind)

    def cluster_column(name: str) -> pa.Array:
        return scattered(None if clusters is None else getattr(clusters, name), pa.float32())

    labels = np.where(clusters.labels < 0, np.nan, clusters.labels) if clusters is not None and with_labels else None
    columns = {
        "pair": pa.array(np.arange(rows.start, rows.stop)),
        "prompt": pa.array(prompts),
        "row": pa.array(candidates.pair_rows[rows]),
        "chosen": pa.array(chosen - first_response[prompts]),
        "rejected": pa.array(rejected - first_response[prompts]),
        "score_chosen": pa.array(pair_scores[:, 0], from_pandas=True),
        "score_rejected": pa.array(pair_scores[:, 1], from_pandas=True),
        "score_gap": pa.array(pair_scores[:, 0] - pair_scores[:, 1], from_pandas=True),
        "length_chosen": pa.nulls(n, pa.int64()) if lengths is None else pa.array(lengths[rows, 0]),
        "length_rejected": pa.nulls(n, pa.int64()) if lengths is None else pa.array(lengths[rows, 1]),
        "logp_chosen": scattered(None if logps is None else logps[:, 0], pa.float32()),
        "logp_rejected": scattered(None if logps is None else logps[:, 1], pa.float32()),
        "ref_logp_chosen": scattered(None if ref_logps is None else ref_logps[:, 0], pa.float32()),
        "ref_logp_rejected": scattered(None if ref_logps is None else ref_logps[:, 1], pa.float32()),
        "informativeness": cluster_column("informativeness"),
        "cluster": scattered(labels, pa.int32()),
        "centrality": cluster_column("centrality"),
        "distance": cluster_column("distance"),
        "alignment": cluster_column("alignment"),
        "usefulness": scattered(usefulness, pa.float64()),
        "fate": pa.array(fate[rows].tolist(), pa.string()),
        "length_ratio": pa.array(ratios),
        "length_effect": pa.array(pool.effect.slope * np.log(ratios), from_pandas=True),
    }
    if scored.audit is not None:
        columns["trust"] = scattered(scored.audit.trust, pa.float64())
    return pa.record_batch(columns)


def training_set(
    candidates: Candidates,
    table: pa.Table,
    index: npt.NDArray[np.int64],
    config: SelectConfig,
    others: datasets.Dataset,
) -> datasets.Dataset:
    """The selected pairs in TRL's format, with how each was selected in ``bpo_*`` columns.

    Args:
        candidates: Prompts and responses.
        table: All pairs; see :func:`pair_table`.
        index: Which of them are selected, in the order of the rows.
        config: Names of the columns with weights.
        others: What other columns of the data go along, of all its rows.
    """
    import datasets

    prompts = candidates.prompt_of_pair[index]
    texts_of: dict[str, Sequence[Text]] = {
        "prompt": candidates.prompts.take(prompts),
        "chosen": candidates.responses.take(candidates.pairs[index, 0]),
        "rejected": candidates.responses.take(candidates.pairs[index, 1]),
    }
    columns: dict[str, Any] = {}
    settings = [dict(candidates.template_kwargs[prompt]) for prompt in prompts]
    tools = [kwargs.pop("tools", None) for kwargs in settings]
    if any(tool is not None for tool in tools):
        # As JSON, which TRL takes: Arrow would fill every tool with the keys of all the others.
        columns["tools"] = [None if tool is None else json.dumps(tool) for tool in tools]
    if any(settings):
        columns["chat_template_kwargs"] = settings
    if candidates.token_weights:
        for side, name in enumerate(("chosen", "rejected")):
            weights = candidates.pair_weights[index, side]
            columns[f"{config.token_weights}_{name}"] = [candidates.token_weights[i].tolist() for i in weights]
    if candidates.weights is not None and config.weight_column is not None:
        columns[config.weight_column] = candidates.weights[index].tolist()
    selected = table.take(pa.array(index)).drop_columns(["chosen", "rejected", "fate"])
    if config.reference_logps:
        for name in ("chosen", "rejected"):
            columns[f"ref_{name}_logps"] = _known(selected, name)
    for name in selected.column_names:
        # A column that the strategy does not use would be all null, which Parquet readers cannot give a type.
        if selected[name].null_count < selected.num_rows:
            columns[f"bpo_{name}"] = selected[name].cast(_WIDE.get(selected[name].type, selected[name].type))
    parts = [_texts(texts_of), datasets.Dataset.from_dict(columns)]
    if others.column_names:
        taken = _rows_of(others, candidates.pair_rows[index])
        parts.insert(1, datasets.Dataset(taken, info=datasets.DatasetInfo(features=others.features)))
    return datasets.concatenate_datasets(parts, axis=1)


def _texts(texts_of: Mapping[str, Sequence[Text]]) -> datasets.Dataset:
    """Columns of texts as a data set, which is on disk where it is large."""
    import datasets

    features, n = _features(texts_of), len(texts_of["prompt"])
    pieces = (
        datasets.Dataset.from_dict({name: texts[first : first + _PIECE] for name, texts in texts_of.items()}, features)
        for first in range(0, n, _PIECE)
    )
    first = next(pieces)
    batches = (batch for piece in itertools.chain([first], pieces) for batch in piece.data.table.to_batches())
    return datasets.Dataset(
        as_table(first.data.table.schema, batches), info=datasets.DatasetInfo(features=first.features)
    )


def _rows_of(data: datasets.Dataset, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Some rows of a data set, taken a batch at a time: one by one, as data sets do it, takes twenty times as long."""
    if data._indices is not None:  # rows that were shuffled or selected before
        rows = data._indices.column(0).take(pa.array(rows)).to_numpy()
    order = np.argsort(rows, kind="stable")
    ascending, start, parts = rows[order], 0, []
    for batch in data.data.table.to_batches():
        first, last = np.searchsorted(ascending, [start, start + batch.num_rows])
        if first < last:
            parts.append(batch.take(pa.array(ascending[first:last] - start)))
        start += batch.num_rows
    taken = pa.Table.from_batches(parts)
    return taken if (order[1:] > order[:-1]).all() else taken.take(pa.array(np.argsort(order)))


def _known(selected: pa.Table, side: str) -> list[float]:
    """Log π_ref of one side of the selected pairs.

    Raises:
        ValueError: One is not known.
    """
    logps: list[float | None] = selected[f"ref_logp_{side}"].to_pylist()
    for row, logp in zip(selected["row"].to_pylist(), logps, strict=True):
        if logp is None:
            raise ValueError(f"reference_logps: of the pair of row {row} no log-probability of the reference is known.")
    return logps  # type: ignore[return-value]


def check_uncut(kept: Inputs, chosen: npt.NDArray[np.bool_], config: SelectConfig) -> None:
    """Checks that log π_ref of chosen pairs ((P,) bool) is of the tokens that TRL trains on.

    Raises:
        ValueError: A sequence fills the window of the model, where it is cut and TRL would not cut it.
    """
    tokenized = kept.tokenized
    if not config.reference_logps or tokenized is None or tokenized.max_length in (None, config.max_length):
        return
    full = chosen & (tokenized.lengths[tokenized.pairs].max(axis=1) >= tokenized.max_length)
    if full.any():
        row = kept.candidates.pair_rows[np.flatnonzero(full)[0]]
        raise ValueError(
            f"reference_logps: {int(full.sum())} of the chosen pairs, such as that of row {row}, fill the window of "
            f"{tokenized.max_length} tokens of the model, where bpo cuts and TRL does not: set max_length="
            f"{tokenized.max_length} in SelectConfig and in DPOConfig."
        )


def _features(texts_of: Mapping[str, Sequence[Text]]) -> datasets.Features | None:
    """The types of texts; None where they are plain."""
    import datasets

    if _has_structured_messages(texts_of.values()):
        # Arrow would fill the arguments of every tool call with those of all the others.
        return datasets.Features(dict.fromkeys(texts_of, datasets.List(datasets.Json())))
    if isinstance(texts_of["prompt"][0], str):
        return None
    # In the order of the messages, as chat templates may print them: older versions of Arrow sort them by name.
    return datasets.Features(
        {
            name: datasets.List(dict.fromkeys((key for text in texts for message in text for key in message), string))
            for name, texts in texts_of.items()
            for string in [datasets.Value("string")]
        }
    )


def _has_structured_messages(columns: Iterable[Sequence[Text]]) -> bool:
    """Whether a message holds more than text, such as tool calls."""
    return any(
        not isinstance(value, (str, type(None)))
        for texts in columns
        for text in texts
        if isinstance(text, list)
        for message in text
        for value in message.values()
    )
