"""``select``: the stages of the method, top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.choices import SEED
from bpo.data.columns import other_columns
from bpo.data.rows import load_alike, load_rows
from bpo.selection.choice import choose, in_order, warn_of_fewer
from bpo.selection.prompts import Limits, keep_prompts
from bpo.selection.read import Told, provenance_of, read
from bpo.selection.request import Request
from bpo.selection.scored import look_at, look_at_labels, score, toward, trust
from bpo.selection.selection import Selection
from bpo.selection.sources import extract, measure, source_of
from bpo.selection.tables import SELECTED, UNTRUSTED, check_uncut, pair_table, training_set
from bpo.selection.worth import look
from bpo.system.processes import cores
from bpo.world.shares import sharing
from bpo.world.world import world

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Skipped
    from bpo.data.rows import Rows
    from bpo.policy.reference import Reference
    from bpo.selection.inputs import Pool
    from bpo.selection.prompts import Kept
    from bpo.selection.scored import ScoredPairs
    from bpo.selection.sources import Filled, Source
    from bpo.world.shares import Shares
    from bpo.world.world import World


def select(
    model: Any,
    dataset: Any,
    *,
    budget: int | float,
    processing_class: Any = None,
    breadth: int | float | None = None,
    strategy: str = "bpo",
    target: Any = None,
    store: str | os.PathLike[str] | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    seed: int = SEED,
    progress: bool = True,
    evidence: bool = True,
) -> Selection:
    """Chooses which preference pairs to train on.

    The stages are those of Balanced Preference Optimization (arXiv 2411.10914): breadth compression, the gradient of
    every response, clusters of pair gradients, usefulness, and the depth of each prompt. All bad input is found before
    the model runs.

    Args:
        model: The policy that will be trained: path, hub id, ``PreTrainedModel`` or ``PeftModel``. It is not changed.
            May be None for strategies that use no gradients; and where ``store`` holds the gradients already: whatever
            they depend on is then as it was when they were computed. With a breadth, only if ``config`` has an embedder
            or the embeddings of the prompts.
        dataset: Preference rows, scored responses or UltraFeedback-like completions, as a data set, streamed or not, a
            frame of pandas or Polars, an Arrow table, a list or generator of rows, a file, a directory or a hub id (see
            :func:`bpo.read_candidates`). Its other columns, such as ``id`` or ``source``, go along into
            ``selection.dataset``.
        budget: Pairs to keep: a count, or a fraction (a float in (0, 1]) of the candidate pairs of the kept prompts.
        processing_class: TRL's word for the tokenizer; by default the one saved with the model. With a store alone,
            that which the store was made with, asked for where responses begin at different tokens in different pairs.
        breadth: Prompts to keep: a count, a fraction, or None for all.
        strategy: ``"bpo"``; ``"matching"`` (pairs whose sum points where training on all of them leads); ``"random"``,
            ``"uniform"`` (the same depth for every prompt) or ``"best_worst"`` (one pair a prompt); a rule of another
            paper, such as ``"easiest"`` or ``"less"`` (``docs/strategies.md`` has all, with their sources and what they
            need); or what :func:`bpo.register_strategy` made known.
        target: A few pairs that say where to go, as a dataset of its own: ``"less"`` needs it; ``"matching"``,
            ``"lossdiff"`` and ``"epig"`` go by it; and ``alignment`` is then the influence on it. Rows with the same
            value in a column ``subtask`` are a subtask. Its gradients go to the same ``store``.
        store: Directory or address of the gradient store, reused and completed when it is there; with
            ``SelectConfig.checkpoints``, of one store for each. None computes anew and keeps nothing. Strategies
            without gradients leave it alone. The rows that are used are compared with their checksums.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``; where
            the target has them, too, they are called so there.
        config: Everything else, as a :class:`bpo.SelectConfig` or a mapping of its fields.
        seed: Of every random choice but the sketch (``SelectConfig.sketch_seed``), by default that of TRL's
            ``DPOConfig``. The same seed gives the same
            selection for any number of threads, and, up to the rounding of the model's own arithmetic, for any batch
            size.
        progress: Whether to show progress bars.
        evidence: Whether to measure, beside the choice and within seconds, what the report tells of it: whether the
            strategy beats a random choice of as many pairs on prompts that are held out, which labels look wrong, which
            pairs are nearly the same *(ours)*. False where many selections are made and none is looked at.

    Returns:
        The selection; ``selection.dataset`` trains in TRL's ``DPOTrainer`` as it is.

    Raises:
        ValueError: Unusable data, a budget below the number of prompts or above the candidates, a tokenizer without
            padding or chat template, or an unsupported model.
        bpo.StoreError: A store made with something else (:class:`bpo.StoreMismatchError`), damaged
            (``StoreDamagedError``), in use (``StoreLockedError``) or of another version (``StoreVersionError``).
        FileNotFoundError: A model, data or store path that does not exist.
        OSError: A file that cannot be read or written; the gradients committed so far are kept.

    Example:
        >>> import bpo
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "5", "four"], "scores": [1.0, 0.0, 0.5]}]
        >>> selection = bpo.select(None, rows, budget=2, strategy="margin", progress=False)
        >>> selection.dataset["chosen"][:]
        ['4', '4']
        >>> selection.depth.tolist()
        [2]
    """
    request = Request.of(strategy, config, seed, target=target, store=store, progress=progress)
    source = source_of(request, model, processing_class, breadth=breadth)
    if target is not None and "gradients" in request.needs:
        target = load_alike(target, columns)
    rows = load_rows(dataset, split=split, columns=columns)
    return _select(request, source, rows, budget, breadth=breadth, target=target, looks=evidence)


def _select(
    request: Request,
    source: Source,
    rows: Rows,
    budget: int | float,
    *,
    breadth: int | float | None = None,
    target: Any = None,
    earlier: Selection | None = None,
    at_most: bool = False,
    looks: bool = False,
) -> Selection:
    """The stages.

    An ``earlier`` selection says which prompts are kept; ``at_most`` takes all of few pairs; only where someone
    ``looks`` is more measured than the choice needs.
    """
    processes = world()
    request = dataclasses.replace(request, config=source.config, progress=request.progress and processes.is_main)

    # Read: candidate pairs, with their tokens or their rows in a store, and those of the target.
    pool = read(rows, target, source, request)
    limits = Limits.of(breadth, budget, pool, request, earlier=earlier, at_most=at_most)
    data = hashlib.sha256(np.ascontiguousarray(pool.candidates.known_ids).data)
    data.update(np.ascontiguousarray(pool.candidates.pairs).data)
    fingerprint = data.hexdigest()
    if "gradients" in request.needs:
        asked = {"strategy": request.strategy, "seed": request.seed, "budget": budget, "breadth": breadth}
        processes.check_same({"data set": fingerprint, **asked}, request.config.process_timeout)

    # Keep prompts: breadth.
    kept = keep_prompts(pool, limits, rows, source, request)

    # What else the data says of its rows waits in Arrow, and nothing else of them.
    others = rows.table(other_columns(rows.column_names, request.config))
    told = Told(others, rows.origin, fingerprint, breadth)
    del rows

    # Extract: one sketched gradient a response, by all processes of a job together.
    filled = extract(kept.inputs, pool.goal, source, request, kept.n_pairs)
    choose_by = functools.partial(_choose, source, pool, kept, filled, looks)
    tell = functools.partial(_tell, request, source, pool, kept, told, looks)
    if filled is None:
        return tell(choose_by(request))
    with sharing(processes, request.config.process_timeout) as shares:
        if shares is None:
            return tell(choose_by(request))
        if request.config.checkpoints is not None:
            # Their features are a file of the process that makes them.
            return shares.from_main(lambda: tell(choose_by(request)))
        choice = choose_by(_beside(request, processes), shares)
        return shares.from_main(lambda: tell(choice))


def _beside(request: Request, processes: World) -> Request:
    """What is asked of one process that has others beside it on its machine: its part of the cores."""
    if request.config.threads is not None or processes.local_size == 1:
        return request
    threads = max(1, cores() // processes.local_size)
    return dataclasses.replace(request, config=dataclasses.replace(request.config, threads=threads))


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What became of P' pairs of kept prompts.

    Attributes:
        scored: Their scores.
        chosen: (P',) bool.
        usefulness: (P',) float64, what they were ranked by.
        order: (S,) int64, the chosen ones in the order of the training set.
        noted: What of them is worth a look.
        agreement: The p-value of prompts that have no direction in common, where someone looks.
    """

    scored: ScoredPairs
    chosen: npt.NDArray[np.bool_]
    usefulness: npt.NDArray[np.float64]
    order: npt.NDArray[np.int64]
    noted: Skipped
    agreement: float | None


def _choose(
    source: Source,
    pool: Pool,
    kept: Kept,
    filled: Filled | None,
    looks: bool,
    request: Request,
    shares: Shares | None = None,
) -> _Choice:
    """The stages after the gradients, by all processes that share these."""
    # Measure: two scalars a pair.
    candidates = kept.inputs.candidates
    measured, wanted = measure(filled, kept.inputs, pool.goal, source, request, shares)

    # Cluster: gradients of pairs at unit length, and what they are worth.
    scored = score(candidates, kept.inputs.pair_lengths, measured, request, shares=shares)
    noted = look_at(scored, candidates, request)
    agreement = scored.agreement if looks and scored.features is not None else None
    scored = trust(toward(scored, pool.goal, wanted, request.config), request.config)
    noted.merge(look_at_labels(scored, candidates))

    # Choose: which pairs of each prompt, and so its depth.
    chosen, usefulness = choose(scored, kept.n_pairs, request)
    warn_of_fewer(chosen, scored, kept.n_pairs, request)
    check_uncut(kept.inputs, chosen, request.config)
    order = in_order(np.flatnonzero(chosen), scored, request.config)
    return _Choice(scored, chosen, usefulness, order, noted, agreement)


def _tell(
    request: Request, source: Source, pool: Pool, kept: Kept, told: Told, looks: bool, choice: _Choice
) -> Selection:
    """What became of each candidate."""
    scored, chosen = choice.scored, choice.chosen
    fate = np.full(len(pool.candidates.pairs), "breadth", dtype=object)
    fate[kept.pair_index] = np.where(scored.eligible, np.where(chosen, SELECTED, "depth"), "unusable")
    if scored.audit is not None:
        fate[kept.pair_index[scored.audit.untrusted]] = UNTRUSTED
    table = pair_table(pool, fate, kept.pair_index, choice.usefulness, scored, with_labels="clusters" in request.needs)
    for found in (kept.noted, choice.noted):
        pool.noted.merge(found)
    selected = kept.pair_index[choice.order]
    return Selection(
        dataset=training_set(pool.candidates, table, selected, request.config, told.columns),
        pairs=table,
        depth=np.bincount(pool.candidates.prompt_of_pair[selected], minlength=len(pool.candidates.prompts)),
        strategy=request.strategy,
        budget=kept.n_pairs,
        seed=request.seed,
        config=request.config.to_dict(),
        skipped=pool.candidates.skipped.places,
        noted=pool.noted.places,
        provenance=provenance_of(*source.named, told),
        evidence=look(told.columns, pool.candidates, kept, scored, chosen, request, agreement=choice.agreement)
        if looks
        else {},
    )


def select_again(
    model: Any,
    dataset: Any,
    earlier: Selection,
    *,
    processing_class: Any = None,
    strategy: str = "bpo",
    target: Any = None,
    reference: Reference | None = None,
    store: str | os.PathLike[str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    seed: int = SEED,
    progress: bool = True,
) -> Selection:
    """Chooses again from the same data, once the policy was trained on an earlier choice.

    The budget, the prompts that breadth compression kept and the log-probabilities of the reference are those of the
    earlier selection *(ours)*, so the reference does not run; gradients and log π are the policy's own.

    Args:
        model: The policy as it is now.
        dataset: What was selected from.
        earlier: The selection before any training. Strategies with gradients need one of a strategy with gradients.
        processing_class: As in :func:`select`, and so are the others.
        strategy: Likewise.
        target: Likewise; it needs a ``reference``.
        reference: What the policy is compared with. None takes log π_ref of the earlier selection, which knows those of
            the data, but not those of a target.
        store: Likewise; another than that of the earlier selection, since gradients are those of one policy.
        config: Likewise; ``checkpoints`` and ``ref_model`` play no part.
        seed: Likewise.
        progress: Likewise.

    Returns:
        The selection.

    Raises:
        ValueError: Other data than that of the earlier selection.
    """
    request = Request.of(strategy, config, seed, target=target, store=store, progress=progress)
    source = source_of(request, model, processing_class, earlier=earlier, reference=reference)
    return _select(request, source, load_rows(dataset), earlier.budget, target=target, earlier=earlier)


def select_at_most(
    model: Any,
    dataset: Any,
    budget: int,
    reference: Reference,
    *,
    processing_class: Any = None,
    strategy: str = "bpo",
    target: Any = None,
    store: str | os.PathLike[str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    seed: int = SEED,
    progress: bool = True,
) -> Selection:
    """Chooses from new responses once the policy was trained: as many pairs as before, or all where there are fewer.

    Args:
        model: The policy as it is now.
        dataset: Its responses, scored.
        budget: Most pairs.
        reference: What the policy is compared with; ``SelectConfig.ref_model`` plays no part.
        processing_class: As in :func:`select`, and so are the others.
        strategy: Likewise.
        target: Likewise.
        store: Likewise.
        config: Likewise.
        seed: Likewise.
        progress: Likewise.

    Returns:
        The selection.

    Raises:
        ValueError: Not one pair, or what :func:`select` refuses.
    """
    request = Request.of(strategy, config, seed, target=target, store=store, progress=progress)
    source = source_of(request, model, processing_class, reference=reference)
    return _select(request, source, load_rows(dataset), budget, target=target, at_most=True)
