"""Responses through the model, batch by batch, and their rows into a store."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.policy.batches import batches_in_order, in_batches
from bpo.policy.sharding import in_step
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
    from bpo.world.world import World


@dataclasses.dataclass(frozen=True)
class Done:
    """One batch that went through the model, or is on its way there; its numbers may still be under way."""

    rows: npt.NDArray[np.int64]
    sketches: SketchBatch
    logps: Fetched
    ref_logps: Fetched
    log_weights: Fetched

    def fetched(self) -> Rows:
        """Waits for its numbers."""
        numbers = (fetched.numpy() for fetched in (self.logps, self.ref_logps, self.log_weights))
        return Rows(self.rows, self.sketches.rows(), *numbers)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What one batch of n responses came to: their sketches (n, d), and (n,) float32 each of the others."""

    rows: npt.NDArray[np.int64]
    sketches: npt.NDArray[np.float32]
    logps: npt.NDArray[np.float32]
    ref_logps: npt.NDArray[np.float32]
    log_weights: npt.NDArray[np.float32]


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

    def run(self, missing: npt.NDArray[np.int64]) -> Iterator[Rows]:
        """Yields the batches in the order given.

        One whose sketches are under way comes once the next one has gone through the model, or is on its way there.
        """
        lengths = self.forward.tokenized.lengths
        previous: Done | None = None
        for _, done in in_batches(self._batch, missing, lengths, self.tokens, self._name):
            if previous is not None:
                yield previous.fetched()
            previous = done
            if not done.sketches.under_way:
                yield done.fetched()
                previous = None
        if previous is not None:
            yield previous.fetched()

    def run_one(self, rows: npt.NDArray[np.int64]) -> Rows:
        """Runs one batch, and waits for it."""
        return self._batch(rows).fetched()

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
    """Adds, and commits, the rows of some sequences."""
    add_batches(writer, extraction, extraction.run(missing), missing, bar)


def add_batches(
    writer: GradientWriter,
    extraction: Extraction,
    batches: Iterable[Rows],
    missing: npt.NDArray[np.int64],
    bar: tqdm[Any],
) -> None:
    """Adds, and commits, batches of some sequences; the bar counts the tokens of those that no crash takes away."""
    lengths = extraction.forward.tokenized.lengths[missing]
    trim = HeapTrimmer()
    before, shown = writer.committed, 0

    def show() -> None:
        nonlocal shown
        committed = writer.committed - before
        bar.update(int(lengths[shown:committed].sum()))
        shown = committed

    for done in batches:
        _append(writer, done, extraction.candidates, extraction.forward.tokenized)
        show()
        trim()
    writer.commit()
    show()


def add_in_step(
    writer: GradientWriter,
    extraction: Extraction,
    todo: Sequence[npt.NDArray[np.int64]],
    processes: World,
    bar: tqdm[Any],
) -> None:
    """Adds, and commits, what blocks of a store lack, by processes that share the model out; the first one writes.

    Batches are those of one process. A process takes each n-th of them, whatever the block.
    """
    lengths, tokens = extraction.forward.tokenized.lengths, extraction.tokens.limit
    batches = [batch for rows in todo for batch in batches_in_order(rows, lengths, tokens)]
    found = in_step(extraction.run_one, batches, processes)
    if processes.is_main:
        add_batches(writer, extraction, found, np.concatenate([*todo, np.zeros(0, np.int64)]), bar)
    else:
        collections.deque(found, maxlen=0)
    processes.from_main(writer.commit)  # nobody reads before that


def _append(writer: GradientWriter, done: Rows, candidates: Candidates, tokenized: TokenizedResponses) -> None:
    """Appends one row a response of a batch."""
    rows, sketch, logps, ref_logps = done.rows, done.sketches, done.logps, done.ref_logps
    responses = tokenized.response_of[rows]
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
        log_weights=done.log_weights,
    )
