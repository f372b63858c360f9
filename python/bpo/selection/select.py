"""``select``: the stages of the method, top to bottom."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.breadth.compress import compress_breadth
from bpo.breadth.embed import embed_prompts, embed_with_policy, given_embeddings
from bpo.config import SelectConfig
from bpo.data.candidates import Skipped
from bpo.data.length import fit_length_effect
from bpo.data.read import read_configured
from bpo.data.rows import load_rows
from bpo.data.tokenizers import load_tokenizer, padding_id
from bpo.data.tokens import tokenize_prompts
from bpo.gradients.checkpoints import check_checkpoints, collect_checkpoints, collect_reference
from bpo.gradients.collect import collect
from bpo.gradients.preconditioner import preconditioner_path
from bpo.pairs.clustering import check_memory
from bpo.pairs.direction import influence
from bpo.pairs.measured import measured
from bpo.policy.models import load_policy, window
from bpo.policy.reference import Reference
from bpo.selection.balance import balance_lengths
from bpo.selection.budgets import check_budget, counted
from bpo.selection.inputs import Inputs, check_scores, reading_settings
from bpo.selection.notes import note_disagreement, note_near_duplicates, note_outliers, report_unusable
from bpo.selection.scored import clustered
from bpo.selection.selection import Selection
from bpo.selection.strategies import STRATEGIES, Candidacy, choose
from bpo.selection.tables import SELECTED, pair_table, training_set
from bpo.store.gradient_store import GradientStore, with_settings_of
from bpo.system.warn import warn

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.data.tokens import TokenizedResponses
    from bpo.pairs.measured import MeasuredPairs


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
    config: SelectConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
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
        dataset: Preference rows, scored responses or UltraFeedback-like completions, as a ``datasets.Dataset``, a list
            of rows, a file, a directory or a hub id (see :func:`bpo.read_candidates`).
        budget: Pairs to keep: a count, or a fraction (a float in (0, 1]) of the candidate pairs of the kept prompts.
        processing_class: TRL's word for the tokenizer; by default the one saved with the model.
        breadth: Prompts to keep: a count, a fraction, or None for all.
        strategy: ``"bpo"``, ``"uniform"`` (the same depth for every prompt), ``"random"``, ``"best_worst"`` (one pair a
            prompt), ``"margin"`` (the largest score gaps), ``"fused_margin"`` (and implicit margins), ``"less"`` (the
            influence on a target), ``"coreset"`` or ``"d_optimal"``, each a function of :mod:`bpo.strategies`; or what
            :func:`bpo.register_strategy` made known.
        target: A few pairs that say where to go, as a dataset of its own: ``"less"`` needs it, and ``alignment`` is
            then the influence on it. Rows with the same value in a column ``subtask`` are a subtask. Its gradients go
            to the same ``store``.
        store: Directory of the gradient store, reused and completed when it is there; with
            ``SelectConfig.checkpoints``, of one store for each. None computes anew and keeps nothing. Strategies
            without gradients leave it alone. The rows that are used are compared with their checksums.
        config: Everything else, as a :class:`bpo.SelectConfig` or a mapping of its fields.
        seed: Of every random choice but the sketch (``SelectConfig.sketch_seed``). The same seed gives the same
            selection for any number of threads, and, up to the rounding of the model's own arithmetic, for any batch
            size.
        progress: Whether to show progress bars.

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
    return _select(
        model,
        dataset,
        budget=budget,
        processing_class=processing_class,
        breadth=breadth,
        strategy=strategy,
        target=target,
        store=store,
        config=config,
        seed=seed,
        progress=progress,
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
    seed: int = 0,
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
    return _select(
        model,
        dataset,
        budget=earlier.budget,
        processing_class=processing_class,
        breadth=None,
        strategy=strategy,
        store=store,
        config=config,
        seed=seed,
        progress=progress,
        target=target,
        earlier=earlier,
        reference=reference,
    )


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
    seed: int = 0,
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
    return _select(
        model,
        dataset,
        budget=budget,
        processing_class=processing_class,
        breadth=None,
        strategy=strategy,
        store=store,
        config=config,
        seed=seed,
        progress=progress,
        target=target,
        reference=reference,
    )


def _select(
    model: Any,
    dataset: Any,
    *,
    budget: int | float,
    processing_class: Any,
    breadth: int | float | None,
    strategy: str,
    store: str | os.PathLike[str] | None,
    config: SelectConfig | Mapping[str, Any] | None,
    seed: int,
    progress: bool,
    target: Any = None,
    earlier: Selection | None = None,
    reference: Reference | None = None,
) -> Selection:
    config = SelectConfig.of(config)
    seed = _check_choice(strategy, target, config, seed)
    rule = STRATEGIES[strategy]
    needs = rule.needs_of(config)
    needs_gradients = "gradients" in needs
    embeds_with_policy = breadth is not None and config.embedder is None and config.prompt_embeddings is None
    present = None
    if model is None:
        if needs_gradients and store is not None and config.checkpoints is None:
            present = GradientStore.open(store)
            config = with_settings_of(present, config)
        _check_without_model(strategy, breadth, store, needs_gradients and present is None, embeds_with_policy)
    preconditioner = None
    if needs_gradients and config.checkpoints is not None:
        check_checkpoints(config, store)
    elif needs_gradients and present is None:
        preconditioner = preconditioner_path(model, config)

    # The data: candidate pairs, and where their tokens or gradients are.
    reading = reading_settings(config, needs_gradients, present)
    candidates = read_configured(dataset, reading)
    check_scores(candidates, strategy, needs, config)
    wanted = None
    if target is not None and needs_gradients:
        target = load_rows(target)
        wanted = read_configured(target, reading)
    tokenizer = longest = None
    if model is not None:
        tokenizer = load_tokenizer(model, processing_class, config)
        longest = window(model, config)
    find = functools.partial(Inputs.of, present=present, tokenizer=tokenizer, longest=longest, config=reading)
    inputs, goal = find(candidates), None
    noted = Skipped()
    effect = fit_length_effect(inputs.candidates, inputs.pair_lengths, inputs.length_unit)
    if config.length_control == "residual":
        inputs = inputs.without_length(effect.slope, config, noted)
    if wanted is not None:
        goal = find(wanted)
    candidates = inputs.candidates

    # Whether the budget can be met, as far as can be told before any work.
    if earlier is not None:
        kept_prompts = _kept_before(candidates, earlier)
        n_prompts = int(kept_prompts.sum())
    else:
        kept_prompts = np.ones(len(candidates.prompts), dtype=bool)
        n_prompts = len(candidates.prompts) if breadth is None else counted("breadth", breadth, len(candidates.prompts))
    if reference is not None and budget > len(candidates.pairs):
        warn(f"There are {len(candidates.pairs)} candidate pairs, fewer than the {budget} of the rounds before.")
        budget = len(candidates.pairs)
    # No choice of prompts can have more pairs than the deepest ones, so most bad budgets are known by now.
    most_pairs = np.sort(np.bincount(candidates.prompt_of_pair))[::-1][:n_prompts].sum()
    floor = config.min_depth * n_prompts if rule.keeps_every_prompt else 0
    check_budget(budget, counted("budget", budget, int(most_pairs)), floor, strategy)

    # Breadth: representative prompts.
    embeddings = None
    if breadth is not None and config.prompt_embeddings is not None:
        embeddings = given_embeddings(dataset, candidates, config.prompt_embeddings)
    # In a list, so that it can be let go where several checkpoints follow it.
    policies = [load_policy(model, config)] if (needs_gradients and present is None) or embeds_with_policy else []
    if earlier is None and n_prompts < len(candidates.prompts):
        if embeddings is None:
            embeddings = _embed(candidates, config, policies, tokenizer, longest, progress)
        kept_prompts = compress_breadth(
            embeddings,
            n_prompts,
            method=config.breadth_method,
            seed=seed,
            threads=config.threads,
            progress=progress,
        ).kept
        noted.merge(note_near_duplicates(candidates, embeddings, config, progress))
    kept, pair_index = inputs.keep_pairs(kept_prompts[candidates.prompt_of_pair])
    n_pairs = counted("budget", budget, len(pair_index))
    check_budget(budget, n_pairs, floor, strategy)

    # Gradients: one sketch a response.
    pairs = target_pairs = None
    if needs_gradients:
        dim = config.sketch_dim * len(config.checkpoints or [None])
        clustering = config if "clusters" in needs else dataclasses.replace(config, n_clusters=1)
        check_memory(len(kept.candidates.responses), len(pair_index), dim, clustering)
        if earlier is not None and reference is None and kept.tokenized is not None:
            reference = _reference_of(earlier, kept.tokenized, pair_index)
        parts = [kept] if goal is None else [kept, goal]
        if present is not None:
            found = [part.measured_in(present, config, progress) for part in parts]
        else:
            found = _measure(policies, parts, tokenizer, config, store, preconditioner, reference, progress)
        pairs, target_pairs = found[0], found[1] if len(found) > 1 else None

    # Clusters and scores of the pairs.
    clusters = features = None
    eligible = np.ones(len(pair_index), dtype=bool)
    if pairs is not None:
        clusters, features = clustered(pairs, clustering, seed=seed, store=store, progress=progress)
        eligible = clusters.usable
        report_unusable(kept.candidates, clusters, config)
        noted.merge(note_outliers(kept.candidates, clusters))
        noted.merge(note_disagreement(kept.candidates, features, eligible, seed))
        if goal is not None and target_pairs is not None:
            subtasks = _subtasks(target, goal.candidates)
            influences = influence(features, eligible, target_pairs, subtasks, config)
            clusters = dataclasses.replace(clusters, alignment=influences)

    # Depth: which pairs of each prompt.
    candidacy = Candidacy(
        prompt_of_pair=kept.candidates.prompt_of_pair,
        score_gaps=kept.candidates.score_gaps,
        eligible=eligible,
        budget=min(n_pairs, int(eligible.sum())),
        config=config,
        seed=seed,
        clusters=clusters,
        features=features,
        differences=None if pairs is None else pairs.differences,
        margins=None if pairs is None else pairs.margins(config),
    )
    chosen, usefulness = choose(strategy, candidacy)
    if config.length_control == "balance":
        differences = kept.pair_lengths[:, 0] - kept.pair_lengths[:, 1]
        chosen = balance_lengths(
            chosen, usefulness, eligible, candidacy.prompt_of_pair, differences, max_depth=config.max_depth
        )
    if chosen.sum() < n_pairs:
        limits = [] if config.max_depth is None else [f"max_depth={config.max_depth}"]
        limits += [] if eligible.all() else [f"{int((~eligible).sum())} pairs without a usable gradient"]
        because = " and ".join(limits) or f"strategy={strategy!r}, which chooses no more"
        warn(f"{int(chosen.sum())} pairs are kept of the {n_pairs} asked for, because of {because}.")

    # What becomes of each candidate.
    fate = np.full(len(candidates.pairs), "breadth", dtype=object)
    fate[pair_index] = np.where(eligible, np.where(chosen, SELECTED, "depth"), "unusable")
    if clusters is not None and "clusters" not in needs:
        clusters = dataclasses.replace(clusters, labels=np.full_like(clusters.labels, -1))
    table = pair_table(inputs, effect.slope, fate, pair_index, usefulness, clusters, pairs)
    return Selection(
        dataset=training_set(candidates, table, np.flatnonzero(fate == SELECTED), config),
        pairs=table,
        depth=np.bincount(candidates.prompt_of_pair[fate == SELECTED], minlength=len(kept_prompts)).astype(np.int64),
        strategy=strategy,
        budget=n_pairs,
        seed=seed,
        config=config.to_dict(),
        skipped=candidates.skipped.places,
        noted=noted.places,
    )


def _check_choice(strategy: str, target: Any, config: SelectConfig, seed: Any) -> int:
    """Checks what is known of a strategy before any data; returns the seed as an int."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(STRATEGIES)}, got {strategy!r}")
    needs = STRATEGIES[strategy].needs_of(config)
    if "target" in needs and target is None:
        raise ValueError(f"strategy={strategy!r} needs a target: pairs that say where to go, as target=…")
    if "differences" in needs and config.checkpoints is not None:
        raise ValueError(f"strategy={strategy!r} needs the gradients of one model: leave out SelectConfig.checkpoints.")
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    return int(seed)


def _check_without_model(
    strategy: str, breadth: Any, store: Any, lacks_gradients: bool, embeds_with_policy: bool
) -> None:
    """Checks that nothing needs the model that was not given."""
    if lacks_gradients or embeds_with_policy:
        raise ValueError(
            f"strategy={strategy!r} with breadth={breadth!r} needs a model; model is None."
            + (" Name the store that holds the gradients, or a model." if lacks_gradients and store is None else "")
            + (" Name an embedder for the prompts, or give their embeddings or a model." if embeds_with_policy else "")
        )


def _embed(
    candidates: Candidates,
    config: SelectConfig,
    policies: list[Any],
    tokenizer: Any,
    longest: int | None,
    progress: bool,
) -> npt.NDArray[np.float32]:
    """Embeds the prompts, with the encoder if one is named and else with the policy: (n, e)."""
    if config.embedder is not None:
        return embed_prompts(
            candidates.prompts, config.embedder, trust_remote_code=config.trust_remote_code, progress=progress
        )
    return embed_with_policy(
        policies[0],
        tokenize_prompts(candidates, tokenizer, longest, truncation_mode=config.truncation_mode),
        padding_id(tokenizer),
        tokens_per_batch=config.tokens_per_batch,
        progress=progress,
    )


def _measure(
    policies: list[Any],
    inputs: list[Inputs],
    tokenizer: Any,
    config: SelectConfig,
    store: str | os.PathLike[str] | None,
    preconditioner: str | None,
    reference: Reference | None,
    progress: bool,
) -> list[MeasuredPairs]:
    """Takes the gradients of the candidates, and of the target where there is one, at the policy or at checkpoints."""
    # One store holds all parts, and is told apart from that of other data by all that may be in it.
    known_ids = np.concatenate([part.candidates.known_ids for part in inputs])
    parts = [
        (dataclasses.replace(part.candidates, known_ids=known_ids), part.tokenized)
        for part in inputs
        if part.tokenized is not None
    ]
    shared: dict[str, Any] = {"config": config, "store": store, "progress": progress}
    known: list[Any] = [None] * len(parts)
    if config.checkpoints is None:
        shared |= {"preconditioner": preconditioner, "reference": reference}
        stores = [[collect(policies[0], *part, tokenizer, **shared)] for part in parts]
    else:
        references = [collect_reference(policies[0], sequences, tokenizer, **shared) for _, sequences in parts]
        policies.clear()  # one model in memory at a time
        stores = [
            collect_checkpoints(reference, *part, tokenizer, **shared)
            for reference, part in zip(references, parts, strict=True)
        ]
        known = [reference.known for reference in references]
    return [
        measured(
            of_part,
            [gradients.rows_of(sequences.sequence_ids)[sequences.pairs] for gradients in of_part],
            config,
            ref_logps=None if ref_logps is None else ref_logps[sequences.pairs],
            weights=candidates.weights,
            progress=progress,
        )
        for of_part, ref_logps, (candidates, sequences) in zip(stores, known, parts, strict=True)
    ]


def _subtasks(target: Any, candidates: Candidates) -> npt.NDArray[np.int64]:
    """The subtask of each pair of the target, (T,) int64: the value of the column ``subtask``, numbered from 0."""
    if "subtask" not in target.column_names:
        return np.zeros(len(candidates.pairs), dtype=np.int64)
    names = [json.dumps(row["subtask"], sort_keys=True, default=str) for row in target]
    return np.unique([names[row] for row in candidates.pair_rows], return_inverse=True)[1]


def _kept_before(candidates: Candidates, earlier: Selection) -> npt.NDArray[np.bool_]:
    """(n,) bool, the prompts that the breadth compression of an earlier selection kept."""
    if not np.array_equal(candidates.pair_rows, earlier.pairs["row"].to_numpy()):
        raise ValueError(
            f"The data has {len(candidates.pairs)} candidate pairs, others than the {earlier.pairs.num_rows} of the "
            "earlier selection; select again from the same data with the same settings."
        )
    kept = np.zeros(len(candidates.prompts), dtype=bool)
    kept[candidates.prompt_of_pair[np.array(earlier.pairs["fate"]) != "breadth"]] = True
    return kept


def _reference_of(earlier: Selection, sequences: TokenizedResponses, pair_index: npt.NDArray[np.int64]) -> Reference:
    """Returns log π_ref of all sequences as an earlier selection computed it."""
    logps = np.full(len(sequences.ids), np.nan, dtype=np.float32)
    for side, name in enumerate(("ref_logp_chosen", "ref_logp_rejected")):
        values = earlier.pairs[name].to_numpy().astype(np.float32)
        logps[sequences.pairs[:, side]] = values[pair_index]
    return Reference("known", hashlib.sha256(logps.tobytes()).hexdigest(), known=logps)
