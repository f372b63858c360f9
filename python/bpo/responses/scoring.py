"""Scoring responses: step 3 of the method, with a function, a reward model or a judge."""

from __future__ import annotations

import dataclasses
import json
import numbers
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from bpo.data.values import content_id
from bpo.responses.prompts import lay_out, need_messages, read_responses, to_dataset
from bpo.responses.rowblocks import Work, check_same_rows, fill, in_blocks
from bpo.responses.rowfile import ROW_ID, RowFile, check_output
from bpo.responses.scorer import FunctionScorer, Score, Scorer, reason_of, scores_of
from bpo.system.warn import warn
from bpo.world.world import world

if TYPE_CHECKING:
    import os

    import datasets

    from bpo.responses.prompts import PromptResponses


# Rows that fail alike, before any is scored, after which a scorer is given up.
_ALIKE = 3


def score_responses(
    dataset: Any,
    scorer: Callable[..., Any] | Scorer,
    *,
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    process_timeout: float = 1800.0,
    progress: bool = True,
) -> datasets.Dataset:
    """Gives every response a score.

    A failure is kept as what it is, a score that is null, with its reason; :func:`bpo.select` sets such responses
    aside. Equal scores stay equal: no pair is made of them.

    Args:
        dataset: What :func:`bpo.sample_responses` returned, its file, or any format of :func:`bpo.select`, with or
            without scores. Equal prompts are brought together.
        scorer: A :class:`bpo.RewardModel`; a :class:`bpo.Judge`; or a function of (prompt, response) that returns a
            number (also as an array or a tensor of one), or None where it has none. It gets both as the data has them,
            and of a plain answer in a conversation the text. Whatever else it returns, and what it raises, is a failure
            of that response; where no response at all has a score, what it raised first is the cause of the error.
        output: A .jsonl file to which each prompt goes as soon as it is finished. The same call goes on from there,
            and tries again what failed; one with other settings, which stand in a manifest beside it, or with another
            function is refused. A function is known by its code and the values that it holds, unless it has a
            ``describe()`` that returns what its scores depend on. Other columns are those that are given now.
        overwrite: Whether scores that the data has are replaced; by default they stay. A judge that compares gives new
            ones to all responses of a prompt as soon as one has none.
        batch_size: Lets a function take lists of about so many prompts and responses and return a list of scores. One
            over which it raises is given again, one by one.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        process_timeout: Seconds after which processes of one job (``docs/scaling.md``) name one that does not come, or
            brings nothing.
        progress: Whether to show a progress bar.

    Returns:
        Rows of ``prompt``, ``responses``, ``scores`` and ``score_errors`` (null where there is a score), and the other
        columns of the data.

    Raises:
        ValueError: Unusable data, other settings than those of ``output``, or not one score.
        TypeError: Something that does not score, or a function that takes other arguments.
        BlockingIOError: Another process is writing ``output``.
        OSError: It cannot be written; rows that were finished are kept.

    Example:
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "It is 4", "5"]}]
        >>> scored = score_responses(rows, lambda prompt, response: float("4" in response), progress=False)
        >>> scored["scores"][0]
        [1.0, 1.0, 0.0]
    """
    check_output(output)  # before a model reads anything
    if isinstance(scorer, Scorer):
        if batch_size is not None:
            raise ValueError("batch_size is for functions; a reward model has config['tokens_per_batch'].")
        judge = scorer
    elif callable(scorer):
        judge = FunctionScorer(scorer, batch_size)
    else:
        raise TypeError(f"scorer must be a function, a bpo.RewardModel or a bpo.Judge, not {type(scorer).__name__}.")

    def scored() -> datasets.Dataset:
        rows = read_responses(dataset, split=split, columns=columns)
        return _scored(judge, rows, overwrite, batch_size, output, process_timeout, progress)

    return scored() if judge.share else world().from_main(scored)


def _scored(
    judge: Scorer,
    rows: Sequence[PromptResponses],
    overwrite: bool,
    batch_size: int | None,
    output: Any,
    timeout: float,
    progress: bool,
) -> datasets.Dataset:
    """Scores what is lacking, and returns all."""
    job = world()
    ids = [_row_id(row, judge.reads_columns) for row in rows]

    def settings() -> dict[str, Any]:
        return {"scorer": judge.describe(), "overwrite": overwrite}

    described = {} if output is None and job.size == 1 else settings()
    check_same_rows(job, rows, ids, {"batch_size": batch_size, **described}, output, timeout)
    counts = {row_id: len(row.responses) for row_id, row in zip(ids, rows, strict=True)}
    file = RowFile(output, "scores", described, ids, lambda row: _is_whole(row, counts))
    with tqdm(total=0, desc="Scoring", unit="response", disable=not (progress and job.is_main)) as bar:
        scoring = _Scoring(judge, rows, file, overwrite, bar)
        now = settings if output is not None and isinstance(judge, FunctionScorer) else None
        work = Work(scoring.blocks(), scoring.known, scoring.make, scoring.found, now)
        finished = fill(file, work, job, timeout)
    _report(finished, judge, job.is_main)
    return to_dataset(finished)


class _Scoring:
    """Rows, and the scores that a file has of them."""

    def __init__(
        self, judge: Scorer, rows: Sequence[PromptResponses], file: RowFile, overwrite: bool, bar: tqdm[Any]
    ) -> None:
        self._judge = judge
        self._rows = rows
        self._file = file
        self._overwrite = overwrite
        self._bar = bar
        self._as_messages = need_messages(rows)

    def blocks(self) -> list[list[int]]:
        """Cuts the rows that the data has not all scores of as one process gives them to the scorer."""
        places = {index: self._lacking(index, None) for index in range(len(self._rows))}
        fresh = [index for index in places if self._overwrite or None in self._rows[index].scores]
        pieces = self._judge.pieces([self._part(index, places[index]) for index in fresh])
        return in_blocks([[fresh[place] for place in piece] for piece in pieces])

    def known(self) -> list[int]:
        """Lays out what has its scores already; returns which rows have not."""
        first = not self._bar.total
        if first and self._file.rows and (unknown := self._file.not_compared()):
            warn(
                f"{self._file.path} goes on with a scorer of which nobody can say whether {', '.join(unknown)} is what "
                "it was before; give it a describe() that returns what its scores depend on."
            )
        todo = _lay_out_known(self._rows, self._file, self._overwrite, self._as_messages)
        if first:
            self._bar.reset(sum(len(self._lacking_now(index)) for index in todo))
        return todo

    def make(self, todo: Sequence[int]) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """Scores rows."""
        wanted = [self._lacking_now(index) for index in todo]
        parts = [self._part(index, places) for index, places in zip(todo, wanted, strict=True)]
        for number, given in _each_once(self._judge, parts):
            index = todo[number]
            scores = [Score(score) for score in self._present(index, self._earlier(index))]
            for place, score in zip(wanted[number], given, strict=True):
                scores[place] = score
            yield index, _laid_out(self._rows[index], scores, self._as_messages)
            self._bar.update(len(given))

    def found(self, indices: Sequence[int]) -> None:
        """Counts what other processes scored."""
        self._bar.update(sum(len(self._lacking_now(index)) for index in indices))

    def _part(self, index: int, places: Sequence[int]) -> PromptResponses:
        row = self._rows[index]
        return dataclasses.replace(row, responses=[row.responses[place] for place in places])

    def _earlier(self, index: int) -> dict[str, Any] | None:
        return self._file.rows.get(self._file.ids[index])

    def _lacking_now(self, index: int) -> list[int]:
        return self._lacking(index, self._earlier(index))

    def _lacking(self, index: int, earlier: dict[str, Any] | None) -> list[int]:
        """Which responses of a row are scored: those without a score, or all."""
        present = self._present(index, earlier)
        return [place for place, score in enumerate(present) if self._judge.relative or score is None]

    def _present(self, index: int, earlier: dict[str, Any] | None) -> list[float | None]:
        """Returns the scores that stay: those of an earlier run, else those of the data."""
        if earlier is not None:
            return list(earlier["scores"])
        row = self._rows[index]
        return [None] * len(row.responses) if self._overwrite else row.scores


def _row_id(row: PromptResponses, with_columns: bool) -> str:
    """A hash of what the scores of a row are made from."""
    columns = [json.dumps(row.columns, sort_keys=True)] if with_columns and row.columns else []
    return content_id(row.key.hex(), [*row.responses, *map(str, row.scores)], *columns).hex()  # type: ignore[list-item]


def _is_whole(row: dict[str, Any], counts: Mapping[str, int]) -> bool:
    """Whether a row of the file has a score, or the reason for none, of each response."""
    scores, errors = row.get("scores"), row.get("score_errors")
    if not isinstance(scores, list) or not isinstance(errors, list) or len(scores) != len(errors):
        return False
    if not all(score is None or type(score) in (int, float) for score in scores):
        return False
    return len(scores) == counts.get(row[ROW_ID], len(scores))


def _lay_out_known(rows: Sequence[PromptResponses], file: RowFile, overwrite: bool, as_messages: bool) -> list[int]:
    """Lays out what has its scores already, with the columns as they are now; returns which rows have not."""
    todo = []
    for index, (row, row_id) in enumerate(zip(rows, file.ids, strict=True)):
        if row_id in file.rows:
            earlier = file.rows[row_id]
            # A score that is no number is none, whoever wrote it.
            scores = [
                score if (score := Score.of(value)).value is not None else Score(None, error or score.error)
                for value, error in zip(earlier["scores"], earlier["score_errors"], strict=True)
            ]
            file.replace(row_id, _laid_out(row, scores, as_messages))
            if any(score.value is None for score in scores):
                todo.append(index)  # what failed is tried again
        elif overwrite or any(score is None for score in row.scores):
            todo.append(index)
        else:
            file.replace(row_id, _laid_out(row, [Score(score) for score in row.scores], as_messages))
    return todo


def _each_once(judge: Scorer, parts: Sequence[PromptResponses]) -> Iterator[tuple[int, list[Score]]]:
    """Yields every row with a score, or the reason for none, of each of its responses, whatever the scorer does."""
    left = dict(enumerate(parts))
    scored = False
    try:
        for index, scores in _checked(judge, left, list(left)):
            scored = scored or any(score.value is not None for score in scores)
            yield index, scores
        return
    except (OSError, MemoryError):
        raise
    except Exception as error:
        reasons = [reason_of(error)]
    # Some row is what stopped it: one by one, so that it stops no other.
    for index in list(left):
        alone = _alone(judge, left, index)
        if isinstance(alone, Exception):
            reasons.append(reason_of(alone))
            if not scored and len(reasons) > _ALIKE and len(set(reasons)) == 1:
                raise alone  # it is not the rows
            alone = [Score(None, reasons[-1])] * len(parts[index].responses)
        scored = scored or any(score.value is not None for score in alone)
        yield index, alone


def _alone(judge: Scorer, left: dict[int, PromptResponses], index: int) -> list[Score] | Exception:
    """Returns the scores of one row, or what the scorer raises over it."""
    try:
        [(_, scores)] = _checked(judge, left, [index])
    except (OSError, MemoryError):
        raise
    except Exception as error:
        return error
    return scores


def _checked(
    judge: Scorer, left: dict[int, PromptResponses], indices: Sequence[int]
) -> Iterator[tuple[int, list[Score]]]:
    """Yields what a scorer yields for rows, as one score a response, and takes them from those that are left."""
    for place, given in judge.scores([left[index] for index in indices]):
        index = indices[place] if isinstance(place, numbers.Integral) and 0 <= place < len(indices) else None
        if index is None or index not in left:
            raise ValueError(
                f"{type(judge).__name__}.scores yielded the index {place!r}, which is none of the {len(indices)} rows "
                "that it was given, or one that it has yielded before."
            )
        yield index, scores_of(given, len(left.pop(index).responses))
    for index in indices:
        if index in left:
            yield index, [Score(None, "the scorer yielded no scores of this prompt")] * len(left.pop(index).responses)


def _laid_out(row: PromptResponses, scores: Sequence[Score], as_messages: bool) -> dict[str, Any]:
    return lay_out(
        row,
        row.responses,
        as_messages=as_messages,
        scores=[score.value for score in scores],
        score_errors=[score.error for score in scores],
    )


def _report(rows: Sequence[dict[str, Any]], judge: Scorer, is_main: bool) -> None:
    """Warns of failures; refuses a result of nothing else, with what the function raised first as the cause."""
    errors = [error for row in rows for error in row["score_errors"] if error is not None]
    total = sum(len(row["scores"]) for row in rows)
    if total and len(errors) == total:
        raise ValueError(f"Not one of the {total} responses could be scored; the first: {errors[0]}.") from getattr(
            judge, "first_error", None
        )
    if errors and is_main:  # the first process warns for all
        warn(
            f"{len(errors)} of {total} responses have no score, and bpo.select sets them aside; the first: {errors[0]}."
        )
