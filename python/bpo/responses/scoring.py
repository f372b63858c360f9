"""Scoring responses: step 3 of the method, with a function, a reward model or a judge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from bpo.data.values import content_id
from bpo.responses.prompts import lay_out, need_messages, read_responses, to_dataset
from bpo.responses.rowfile import RowFile
from bpo.responses.scorer import FunctionScorer, Score, Scorer
from bpo.system.warn import warn

if TYPE_CHECKING:
    import os

    import datasets

    from bpo.responses.prompts import PromptResponses


def score_responses(
    dataset: Any,
    scorer: Callable[..., Any] | Scorer,
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """Gives every response a score.

    A failure is kept as what it is, a score that is null, with its reason; :func:`bpo.select` sets such responses
    aside. Equal scores stay equal: no pair is made of them.

    Args:
        dataset: What :func:`bpo.sample_responses` returned, its file, or any format of :func:`bpo.select`, with or
            without scores. Equal prompts are brought together.
        scorer: A :class:`bpo.RewardModel`; a :class:`bpo.Judge`; or a function of (prompt, response) that returns a
            number, or None where it has none. It gets both as the data has them, and of a plain answer in a
            conversation the text. What it raises is a failure of that response.
        output: A .jsonl file to which each prompt goes as soon as it is finished. The same call goes on from there,
            and tries again what failed; one with other settings, which stand in a manifest beside it, is refused.
        overwrite: Whether scores that the data has are replaced; by default they stay. A judge that compares gives new
            ones to all responses of a prompt as soon as one has none.
        batch_size: Lets a function take lists of about so many prompts and responses and return a list of scores.
        progress: Whether to show a progress bar.

    Returns:
        Rows of ``prompt``, ``responses``, ``scores`` and ``score_errors`` (null where there is a score), and the other
        columns of the data.

    Raises:
        ValueError: Unusable data, other settings than those of ``output``, or not one score.
        TypeError: Something that does not score.

    Example:
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "It is 4", "5"]}]
        >>> scored = score_responses(rows, lambda prompt, response: float("4" in response), progress=False)
        >>> scored["scores"][0]
        [1.0, 1.0, 0.0]
    """
    if isinstance(scorer, Scorer):
        if batch_size is not None:
            raise ValueError("batch_size is for functions; a reward model has config['tokens_per_batch'].")
        judge = scorer
    elif callable(scorer):
        judge = FunctionScorer(scorer, batch_size)
    else:
        raise TypeError(f"scorer must be a function, a bpo.RewardModel or a bpo.Judge, not {type(scorer).__name__}.")
    rows = read_responses(dataset)
    ids = [content_id(row.key.hex(), [*row.responses, *map(str, row.scores)]).hex() for row in rows]  # type: ignore[list-item]
    settings = {} if output is None else {"scorer": judge.describe(), "overwrite": overwrite}
    file = RowFile(output, "scores", settings, ids)
    todo: list[int] = []
    for index, (row, row_id) in enumerate(zip(rows, ids, strict=True)):
        if row_id in file.rows:
            if any(score is None for score in file.rows[row_id]["scores"]):
                todo.append(index)  # what failed is tried again
        elif overwrite or any(score is None for score in row.scores):
            todo.append(index)
        else:
            file.add(row_id, _laid_out(row, [Score(score) for score in row.scores], need_messages(rows)))
    # Which responses of a row are scored: those without a score, or all.
    wanted = [
        [
            place
            for place, score in enumerate(_present(rows[index], file.rows.get(ids[index]), overwrite))
            if judge.relative or score is None
        ]
        for index in todo
    ]
    parts = [
        dataclasses.replace(rows[index], responses=[rows[index].responses[place] for place in places])
        for index, places in zip(todo, wanted, strict=True)
    ]
    as_messages = need_messages(rows)
    with tqdm(total=sum(map(len, wanted)), desc="Scoring", unit="response", disable=not progress) as bar:
        for part, given in judge.scores(parts):
            index = todo[part]
            present = _present(rows[index], file.rows.get(ids[index]), overwrite)
            scores = [Score(score, None) for score in present]
            for place, score in zip(wanted[part], given, strict=True):
                scores[place] = score
            file.add(ids[index], _laid_out(rows[index], scores, as_messages))
            bar.update(len(given))
    finished = file.finish()
    _report(finished)
    return to_dataset(finished)


def _present(row: PromptResponses, earlier: dict[str, Any] | None, overwrite: bool) -> list[float | None]:
    """Returns the scores that stay: those of an earlier run, else those of the data."""
    if earlier is not None:
        return list(earlier["scores"])
    return [None] * len(row.responses) if overwrite else row.scores


def _laid_out(row: PromptResponses, scores: Sequence[Score], as_messages: bool) -> dict[str, Any]:
    return lay_out(
        row,
        row.responses,
        as_messages=as_messages,
        scores=[score.value for score in scores],
        score_errors=[score.error for score in scores],
    )


def _report(rows: Sequence[dict[str, Any]]) -> None:
    """Warns of failures; refuses a result of nothing else."""
    errors = [error for row in rows for error in row["score_errors"] if error is not None]
    total = sum(len(row["scores"]) for row in rows)
    if total and len(errors) == total:
        raise ValueError(f"Not one of the {total} responses could be scored; the first: {errors[0]}.")
    if errors:
        warn(
            f"{len(errors)} of {total} responses have no score, and bpo.select sets them aside; the first: {errors[0]}."
        )
