"""Responses through the model, batch by batch, and their rows into a store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.policy.batches import in_batches
from bpo.policy.transfer import Fetched
from bpo.store.gradient_store import FIRST_UNPREDICTED, NONFINITE, ZERO
from bpo.system.memory import HeapTrimmer

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from tqdm.auto import tqdm

    from bpo.data.candidates import Candidates
    from bpo.data.tokens import TokenizedResponses
    from bpo.gradients.capture import Plan
    from bpo.gradients.features import Features
    from bpo.gradients.preconditioner import Preconditioner
    from bpo.policy.batches import BatchTokens
    from bpo.policy.logprobs import Forward
    from bpo.policy.reference import Reference
    from bpo.sketching.batches import SketchBatch, Sketching
    from bpo.store.writer import GradientWriter


@dataclasses.dataclass(frozen=True)
class Done:
    """One batch that went through the model, or is on its way there; its numbers may still be under way."""

    rows: npt.NDArray[np.int64]
    sketches: SketchBatch
    logps: Fetched
    ref_logps: Fetched
    log_weights: Fetched


@dataclasses.dataclass
class Extraction:
    """Responses through the model, in batches that memory allows."""

    forward: Forward
    reference: Reference
    features: Features
    plan: Plan
    candidates: Candidates
    sketching: Sketching
    precondition: Preconditioner | None
    tokens: BatchTokens

    def run(self, missing: npt.NDArray[np.int64]) -> Iterator[Done]:
        """Yields the batches in the order given.

        One whose sketches are under way comes once the next one has gone through the model, or is on its way there.
        """
        lengths = self.forward.tokenized.lengths
        previous: Done | None = None
        for _, done in in_batches(self._batch, missing, lengths, self.tokens, self._name):
            if previous is not None:
                yield previous
            previous = done
            if not done.sketches.under_way:
                yield done
                previous = None
        if previous is not None:
            yield previous

    def _name(self, sequence: np.int64) -> str:
        prompt = self.candidates.prompt_of_response[self.forward.tokenized.response_of[sequence]]
        return f" (row {self.candidates.prompt_rows[prompt]})"

    def _batch(self, rows: npt.NDArray[np.int64]) -> Done:
        sketches = self.sketching.batch(len(rows))

        def consume(offset: int, gradients: torch.Tensor, samples: slice) -> None:
            if self.precondition is not None:
                gradients = self.precondition(offset, gradients)
            sketches.consume(offset, gradients, samples)

        result = self.features.catch(self.forward, self.plan, rows, consume)
        sketches.finish()
        ref_logps = self.reference.logps(self.forward, rows, result.logps)
        return Done(rows, sketches, Fetched(result.logps), Fetched(ref_logps), Fetched(result.log_weights))


def add_rows(writer: GradientWriter, extraction: Extraction, missing: npt.NDArray[np.int64], bar: tqdm[Any]) -> None:
    """Adds, and commits, the rows of some sequences; the bar counts the tokens of those that no crash takes away."""
    lengths = extraction.forward.tokenized.lengths[missing]
    trim = HeapTrimmer()
    before, shown = writer.committed, 0

    def show() -> None:
        nonlocal shown
        committed = writer.committed - before
        bar.update(int(lengths[shown:committed].sum()))
        shown = committed

    for done in extraction.run(missing):
        _append(writer, done, extraction.candidates, extraction.forward.tokenized)
        show()
        trim()
    writer.commit()
    show()


def _append(writer: GradientWriter, done: Done, candidates: Candidates, tokenized: TokenizedResponses) -> None:
    """Appends one row a response of a batch."""
    rows, sketch = done.rows, done.sketches.rows()
    responses = tokenized.response_of[rows]
    logps, ref_logps = done.logps.numpy(), done.ref_logps.numpy()
    # A row whose squared norm overflows is as useless to k-means as an infinite one.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.square(sketch).sum(axis=1)) & np.isfinite(logps) & np.isfinite(ref_logps)
    flags = NONFINITE * ~finite + ZERO * ~sketch.any(axis=1)
    flags += FIRST_UNPREDICTED * (tokenized.prompt_lengths[rows] == 0)
    sketch[~finite] = 0.0
    writer.append(
        sketch,
        prompt_ids=candidates.prompt_ids[candidates.prompt_of_response[responses]],
        response_ids=tokenized.sequence_ids[rows],
        scores=candidates.scores[responses],
        logps=logps,
        ref_logps=ref_logps,
        lengths=tokenized.response_lengths[rows],
        flags=flags,
        log_weights=done.log_weights.numpy(),
    )
