"""Any TRL preference format, or scored responses, to candidates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bpo.data.candidates import report_skipped
from bpo.data.columns import column_error, read_template_kwargs, row_trust, row_weights
from bpo.data.groups import Groups
from bpo.data.preferences import PreferenceReader
from bpo.data.rows import load_rows
from bpo.data.scored import ScoredReader
from bpo.data.values import UnusableError

if TYPE_CHECKING:
    from bpo.choices import OnInvalid
    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates


# Columns that tell a form, the first that are all there, to what reads its rows.
_FORMS: dict[tuple[str, str], Callable[[list[str], str | None, bool], PreferenceReader | ScoredReader]] = {
    ("chosen", "rejected"): PreferenceReader,
    ("prompt", "responses"): functools.partial(ScoredReader, prompt="prompt", responses="responses"),
    ("prompt", "completions"): functools.partial(ScoredReader, prompt="prompt", responses="completions"),
    ("instruction", "completions"): functools.partial(ScoredReader, prompt="instruction", responses="completions"),
}


def read_candidates(
    dataset: Any,
    *,
    max_pairs_per_prompt: int | None = None,
    on_invalid: OnInvalid = "skip",
    token_weights: str | None = None,
    ref_logps: bool = False,
    weight_column: str | None = None,
    trust_column: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Candidates:
    """Reads preference data of any accepted format.

    Rows are grouped by the exact prompt: text or messages, with what the columns ``tools`` and ``chat_template_kwargs``
    give to the chat template, as in TRL. Rows with scored responses give every pair of unequal scores; preference rows
    give the pairs that they state. A prompt is taken out of what ``chosen`` and ``rejected`` have in common, as TRL's
    ``extract_prompt`` does, only where the data has no column of prompts; a row whose prompt is null is not used.

    Args:
        dataset: A ``datasets.Dataset``, as its format or transform shows it; a ``DatasetDict``, or any mapping of
            splits to data sets; an ``IterableDataset``, which is read once, to its end; a list of rows, a generator or
            any other iterable of them; a frame of pandas or Polars; an Arrow table, or whatever gives itself as one; a
            mapping of columns to lists; a .jsonl, .json, .parquet or .csv file (compressed with gzip, bzip2 or xz if
            you like), a directory of such files, or what ``save_to_disk`` wrote; a hub id. Cells of .csv are text as it
            stands there. In a directory whose files are named for splits, those for training are read. Of a pandas
            frame, an index with a name is a column.
        max_pairs_per_prompt: Cap on the pairs of a prompt; the largest score gaps are kept, ties in data order.
        on_invalid: ``"skip"`` warns once with the counts and the places; ``"raise"`` makes that an error.
        token_weights: Name under which the data gives a weight for each token of a response: as lists in the columns
            ``<name>_chosen`` and ``<name>_rejected`` of preference rows; of scored responses as a column with a list of
            lists, or, where responses are records, as an item of each record.
        ref_logps: Whether to read log π_ref of the responses: the columns ``ref_chosen_logps`` and
            ``ref_rejected_logps`` of preference rows, as TRL calls them; a list ``ref_logps`` of scored responses.
        weight_column: Column of numbers of at least 0, by how much the loss of a pair counts (see
            :class:`bpo.WeightedDPOTrainer`); None reads none. A row of scored responses has one number for all pairs
            whose preferred response it holds. Pairs of weight 0 are set aside. ``"weight"`` need not be there.
        trust_column: Column with the probability that the label of a row is right; pairs below ½ are set aside. Of
            scored responses a row has one for all pairs whose preferred response it holds. None trusts every label.
        split: Which split of a ``DatasetDict``, a directory or a data set of the hub is read, such as
            ``"train_prefs"``; None is that for training.
        columns: What columns of the accepted formats are called in the data, where that is something else, such as
            ``{"prompt": "question"}``.

    Returns:
        The :class:`bpo.Candidates`: the distinct ``prompts`` and ``responses``, ``prompt_of_response``, ``scores``,
        ``pairs`` ((P, 2) int64, the preferred response first), ``prompt_of_pair``, ``score_gaps``, where in the data
        each of them stands, and what was set aside (``skipped``).

    Raises:
        ValueError: Missing or misnamed columns, an empty dataset, a file that cannot be read, or no usable pair. A row,
            a response or a score that cannot be used is no error: ``on_invalid`` says what becomes of it.
        FileNotFoundError: A path that does not exist.

    Example:
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "5", "four"], "scores": [1.0, 0.0, 0.5]}]
        >>> candidates = read_candidates(rows)
        >>> candidates.pairs.tolist(), candidates.score_gaps.tolist()
        ([[0, 1], [0, 2], [2, 1]], [1.0, 0.5, 0.5])
    """
    if max_pairs_per_prompt is not None and max_pairs_per_prompt < 1:
        raise ValueError(f"max_pairs_per_prompt must be at least 1 or None, got {max_pairs_per_prompt}.")
    rows = load_rows(dataset, split=split, columns=columns)
    names = list(rows.column_names)
    reader_of = next((reader_of for needed, reader_of in _FORMS.items() if set(needed) <= set(names)), None)
    if reader_of is None:
        raise ValueError(column_error(names))
    reader = reader_of(names, token_weights, ref_logps)
    for column in ("images", "image"):
        if column in names:
            raise ValueError(
                f"The column '{column}' is not supported: bpo reads prompts and responses of text alone. Remove it "
                f"with dataset.remove_columns('{column}') if the responses do not depend on it."
            )
    if len(rows) == 0:
        raise ValueError("The dataset is empty: it has the right columns but no rows.")
    wrong = {index: UnusableError("not a row", why) for index, why in rows.broken.items()}
    template_kwargs = read_template_kwargs(rows, wrong)
    groups = Groups(row_weights(rows, weight_column, wrong), row_trust(rows, trust_column, wrong))
    for index, row in enumerate(rows):
        error = wrong.get(index) or _read_row(reader, index, row, template_kwargs, groups)
        if error is not None:
            groups.skipped.add(error.reason, error.at(f"row {index}"))
    candidates = groups.build(scored=reader.scored, max_pairs_per_prompt=max_pairs_per_prompt)
    report_skipped(candidates.skipped, on_invalid)
    return candidates


def _read_row(
    reader: PreferenceReader | ScoredReader,
    index: int,
    row: dict[str, Any],
    template_kwargs: list[dict[str, Any]],
    groups: Groups,
) -> UnusableError | None:
    """Reads a row into the groups, or returns why it cannot be used."""
    try:
        reader.read(index, row, template_kwargs[index] if template_kwargs else {}, groups)
    except UnusableError as error:
        return error
    return None


def read_configured(
    dataset: Any, config: SelectConfig, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> Candidates:
    """Reads what a configuration asks for, with the weights and reference log-probabilities of the data."""
    return read_candidates(
        dataset,
        split=split,
        columns=columns,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        on_invalid=config.on_invalid,
        token_weights=config.token_weights if isinstance(config.token_weights, str) else None,
        ref_logps=config.reads_ref_logps,
        weight_column=config.weight_column,
        trust_column=config.trust_column,
    )
