"""``select``: the stages of the method, top to bottom."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bpo.breadth import compress_breadth, embed_prompts, embed_with_policy
from bpo.checkpoints import check_checkpoints, cluster_checkpoints, collect_checkpoints, collect_reference
from bpo.clustering import PairGradients, check_memory, cluster_pairs
from bpo.config import SelectConfig
from bpo.data import Candidates, Skipped, Text, read_configured, report_skipped, warn
from bpo.gradients import collect
from bpo.losses import pair_coefficients
from bpo.models import load_policy, load_tokenizer, window
from bpo.precondition import preconditioner_path
from bpo.progress import core_progress
from bpo.reference import Reference
from bpo.selection import SELECTED, Selection
from bpo.store import NONFINITE, GradientStore, StoreMismatchError, with_settings_of
from bpo.strategies import KEEPS_EVERY_PROMPT, NEEDS_GRADIENTS, NEEDS_SCORES, STRATEGIES, Candidacy
from bpo.tokens import padding_id, tokenize_configured, tokenize_prompts

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    import numpy.typing as npt

    from bpo.clustering import PairClusters
    from bpo.config import Strategy
    from bpo.tokens import TokenizedResponses


def select(
    model: Any,
    dataset: Any,
    *,
    budget: int | float,
    processing_class: Any = None,
    breadth: int | float | None = None,
    strategy: Strategy = "bpo",
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
            May be None, without an embedder only with ``breadth=None``, for strategies that use no gradients; and where
            ``store`` holds the gradients already: whatever they depend on is then as it was when they were computed.
        dataset: Preference rows, scored responses or UltraFeedback-like completions, as a ``datasets.Dataset``, a list
            of rows, a file, a directory or a hub id (see :func:`bpo.read_candidates`).
        budget: Pairs to keep: a count, or a fraction (a float in (0, 1]) of the candidate pairs of the kept prompts.
        processing_class: TRL's word for the tokenizer; by default the one saved with the model.
        breadth: Prompts to keep: a count, a fraction, or None for all.
        strategy: ``"bpo"``, ``"uniform"`` (the same depth for every prompt), ``"random"`` or ``"margin"`` (the largest
            score gaps).
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
    strategy: Strategy = "bpo",
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
        earlier=earlier,
    )


def select_at_most(
    model: Any,
    dataset: Any,
    budget: int,
    reference: Reference,
    *,
    processing_class: Any = None,
    strategy: Strategy = "bpo",
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
        reference=reference,
    )


def _select(
    model: Any,
    dataset: Any,
    *,
    budget: int | float,
    processing_class: Any,
    breadth: int | float | None,
    strategy: Strategy,
    store: str | os.PathLike[str] | None,
    config: SelectConfig | Mapping[str, Any] | None,
    seed: int,
    progress: bool,
    earlier: Selection | None = None,
    reference: Reference | None = None,
) -> Selection:
    config = SelectConfig.of(config)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(STRATEGIES)}, got {strategy!r}")
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    seed = int(seed)
    needs_gradients = strategy in NEEDS_GRADIENTS
    embeds_with_policy = breadth is not None and config.embedder is None
    reselects = model is None and needs_gradients and store is not None and config.checkpoints is None
    if model is None and ((needs_gradients and not reselects) or embeds_with_policy):
        raise ValueError(
            f"strategy={strategy!r} with breadth={breadth!r} needs a model; model is None."
            + (" Name the store that holds the gradients, or a model." if needs_gradients and store is None else "")
            + (" Name an embedder for the prompts, or a model." if embeds_with_policy else "")
        )
    preconditioner = None
    present = None
    if reselects:
        assert store is not None
        present = GradientStore.open(store)
        config = with_settings_of(present, config)
    if needs_gradients and config.checkpoints is not None:
        check_checkpoints(config, store)
    elif needs_gradients and present is None:
        preconditioner = preconditioner_path(model, config)

    # What only gradients depend on need not be in the data otherwise.
    reading = config
    if not needs_gradients or present is not None:
        named = config.token_weights if present is not None and isinstance(config.token_weights, str) else None
        reading = dataclasses.replace(config, token_weights=named, ref_model=None)
    candidates = read_configured(dataset, reading)
    if strategy in NEEDS_SCORES and np.isnan(candidates.score_gaps).any():
        raise ValueError(
            f"strategy={strategy!r} needs scores, but {int(np.isnan(candidates.score_gaps).sum())} of "
            f"{len(candidates.pairs)} pairs have none. Give the columns score_chosen and score_rejected, or scored "
            "responses."
        )
    tokenizer = tokenized = longest = lengths = stored = None
    if present is not None:
        candidates, stored = _in_store(candidates, present, config)
        lengths = present.records["length"][stored].astype(np.int64)[candidates.pairs]
    elif model is not None:
        tokenizer = load_tokenizer(model, processing_class, config)
        longest = window(model, config)
        candidates, tokenized = tokenize_configured(candidates, tokenizer, longest, reading)
        lengths = tokenized.response_lengths[tokenized.pairs]
    if earlier is not None:
        kept_prompts = _kept_before(candidates, earlier)
        n_prompts = int(kept_prompts.sum())
    else:
        kept_prompts = np.ones(len(candidates.prompts), dtype=bool)
        n_prompts = len(candidates.prompts) if breadth is None else _count("breadth", breadth, len(candidates.prompts))
    if reference is not None and budget > len(candidates.pairs):
        warn(f"There are {len(candidates.pairs)} candidate pairs, fewer than the {budget} of the rounds before.")
        budget = len(candidates.pairs)
    # No choice of prompts can have more pairs than the deepest ones, so most bad budgets are known by now.
    most_pairs = np.sort(np.bincount(candidates.prompt_of_pair))[::-1][:n_prompts].sum()
    _check_budget(budget, _count("budget", budget, int(most_pairs)), n_prompts, strategy)
    policy = load_policy(model, config) if (needs_gradients and present is None) or embeds_with_policy else None

    # Breadth: representative prompts.
    if earlier is None and n_prompts < len(candidates.prompts):
        if config.embedder is not None:
            embeddings = embed_prompts(candidates.prompts, config.embedder, trust_remote_code=config.trust_remote_code)
        else:
            assert policy is not None and tokenizer is not None
            embeddings = embed_with_policy(
                policy,
                tokenize_prompts(candidates, tokenizer, longest, truncation_mode=config.truncation_mode),
                padding_id(tokenizer),
                tokens_per_batch=config.tokens_per_batch,
            )
        kept_prompts = compress_breadth(embeddings, n_prompts, seed=seed, threads=config.threads).kept
    kept, pair_index, response_index = candidates.keep_prompts(kept_prompts)
    n_pairs = _count("budget", budget, len(kept.pairs))
    _check_budget(budget, n_pairs, n_prompts, strategy)

    if needs_gradients:
        dim = config.sketch_dim * len(config.checkpoints or [None])
        check_memory(len(kept.responses), len(kept.pairs), dim, config)

    # Gradients: one sketch a response; clusters and scores of the pairs.
    clusters = logps = ref_logps = None
    noted = Skipped()
    eligible = np.ones(len(kept.pairs), dtype=bool)
    if present is not None:
        assert stored is not None
        pairs = stored[response_index][kept.pairs]
        clusters, logps, ref_logps = _cluster(present, pairs, kept.weights, config, seed, progress)
    elif needs_gradients:
        assert policy is not None and tokenizer is not None and tokenized is not None
        sequences = tokenized.keep_pairs(pair_index, response_index)
        if earlier is not None:
            reference = _reference_of(earlier, sequences, pair_index)
        inputs = kept, sequences, tokenizer
        if config.checkpoints is None:
            gradients = collect(
                policy,
                *inputs,
                config=config,
                store=store,
                progress=progress,
                preconditioner=preconditioner,
                reference=reference,
            )
            pairs = gradients.rows_of(sequences.sequence_ids)[sequences.pairs]
            clusters, logps, ref_logps = _cluster(gradients, pairs, kept.weights, config, seed, progress)
        else:
            known = collect_reference(policy, sequences, tokenizer, config=config, store=store, progress=progress)
            assert known.known is not None
            ref_logps = known.known[sequences.pairs]
            del policy  # one model in memory at a time
            stores = collect_checkpoints(known, *inputs, config=config, store=store, progress=progress)
            pair_gradients = [
                _pair_gradients(
                    gradients,
                    gradients.rows_of(sequences.sequence_ids)[sequences.pairs],
                    config,
                    weights=kept.weights,
                    progress=progress,
                )
                for gradients in stores
            ]
            with core_progress("Clusters", progress) as report:
                clusters = cluster_checkpoints(
                    pair_gradients,
                    list(config.checkpoints.values()),
                    config=config,
                    store=store,
                    seed=seed,
                    progress=report,
                )
    if clusters is not None:
        eligible = clusters.usable
        _report_unusable(kept, clusters, config)
        noted = _outliers(kept, clusters)

    # Depth: which pairs of each prompt.
    chosen, usefulness = STRATEGIES[strategy](
        Candidacy(kept.prompt_of_pair, kept.score_gaps, eligible, n_pairs, config, seed, clusters)
    )
    if chosen.sum() < n_pairs:
        limits = [] if config.max_depth is None else [f"max_depth={config.max_depth}"]
        limits += [] if eligible.all() else [f"{int((~eligible).sum())} pairs without a usable gradient"]
        warn(f"{int(chosen.sum())} pairs are kept of the {n_pairs} asked for, because of {' and '.join(limits)}.")
    fate = np.full(len(candidates.pairs), "breadth", dtype=object)
    fate[pair_index] = np.where(eligible, np.where(chosen, SELECTED, "depth"), "unusable")
    table = _pair_table(candidates, lengths, fate, pair_index, usefulness, clusters, logps, ref_logps)
    return Selection(
        dataset=_training_set(candidates, table, np.flatnonzero(fate == SELECTED), config),
        pairs=table,
        depth=np.bincount(candidates.prompt_of_pair[fate == SELECTED], minlength=len(kept_prompts)).astype(np.int64),
        strategy=strategy,
        budget=n_pairs,
        seed=seed,
        config=config.to_dict(),
        skipped=candidates.skipped.places,
        noted=noted.places,
    )


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


def _in_store(
    candidates: Candidates, present: GradientStore, config: SelectConfig
) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """Returns the candidate pairs whose two responses a store holds, and the row of each response ((R,) int64)."""
    rows, several = present.rows_of_responses(candidates.response_ids)
    if several.any():
        place = candidates.prompt_rows[candidates.prompt_of_response[np.flatnonzero(several)[0]]]
        raise ValueError(
            f"{present.path} holds {int(several.sum())} responses more than once, such as one of row {place}: with "
            "other token weights, or starting at another token. Pass the model, whose tokenizer tells them apart."
        )
    there: npt.NDArray[np.bool_] = rows[candidates.pairs].min(axis=1) >= 0
    skipped = Skipped()
    for pair in np.flatnonzero(~there):
        skipped.add("pair of a response that the store does not hold", f"row {candidates.pair_rows[pair]}")
    if not there.any():
        raise StoreMismatchError(
            f"The gradient store {present.path} holds the responses of none of the {len(there)} candidate pairs. Pass "
            "the data that it was made with, or the model, which computes what is missing."
        )
    report_skipped(skipped, config.on_invalid)
    candidates.skipped.merge(skipped)
    kept, _, response_index = candidates.keep_pairs(there)
    return kept, rows[response_index]


def _cluster(
    gradients: GradientStore,
    pairs: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float64] | None,
    config: SelectConfig,
    seed: int,
    progress: bool,
) -> tuple[PairClusters, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Clusters and scores pairs of rows of a store; returns their log-probabilities under policy and reference, too."""
    pair_gradients = _pair_gradients(gradients, pairs, config, weights=weights, progress=progress)
    with core_progress("Clusters", progress) as report:
        clusters = cluster_pairs(*pair_gradients, config=config, seed=seed, progress=report)
    return clusters, gradients.records["logp"][pairs], gradients.records["ref_logp"][pairs]


def _pair_gradients(
    gradients: GradientStore,
    pairs: npt.NDArray[np.int64],
    config: SelectConfig,
    *,
    weights: npt.NDArray[np.float64] | None = None,
    progress: bool = False,
) -> PairGradients:
    """Returns the gradients of the pairs in terms of those of the responses; NaN where one of these is unusable."""
    with core_progress("Checksums", progress) as report:
        gradients.check(pairs.ravel(), threads=config.threads, progress=report)
    records = gradients.records
    coefficients = pair_coefficients(
        records["logp"],
        records["ref_logp"],
        pairs,
        lengths=records["length"],
        predicted=gradients.predicted,
        log_weights=records["log_weight"],
        config=config,
    )
    if weights is not None:
        coefficients *= weights[:, None]
    nonfinite = (records["flags"] & NONFINITE != 0)[pairs].any(axis=1)
    coefficients[nonfinite] = np.nan  # which tells them from pairs of zero gradients
    return PairGradients(gradients.rows, pairs, coefficients * gradients.scales[pairs])


def _count(name: str, value: Any, total: int) -> int:
    """Returns a count given as a whole number or as a fraction (a float in (0, 1])."""
    of = {"breadth": "usable prompts", "budget": "candidate pairs of the prompts that can be kept"}[name]
    if isinstance(value, (float, np.floating)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value} is neither a whole number nor a fraction above 0 and at most 1.")
        # A product such as 0.29 * 100 must not lose one to rounding.
        return max(1, int(value * total + 1e-9))
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number or a fraction, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    if value > total:
        raise ValueError(f"{name}={value} is above the {total} {of}; give at most {total}.")
    return int(value)


def _check_budget(budget: Any, n_pairs: int, n_prompts: int, strategy: str) -> None:
    if strategy in KEEPS_EVERY_PROMPT and n_pairs < n_prompts:
        given = f"budget={budget}" + (f", which makes {n_pairs}," if isinstance(budget, float) else "")
        fewer = "breadth" if isinstance(budget, float) else f"breadth={n_pairs}"
        raise ValueError(
            f"{given} is below the {n_prompts} prompts: strategy={strategy!r} keeps at least one pair of each. Give a "
            f"budget of at least {n_prompts} pairs, or keep fewer prompts with {fewer}."
        )


def _report_unusable(kept: Candidates, clusters: PairClusters, config: SelectConfig) -> None:
    """Names the pairs whose gradient is zero or not finite."""
    skipped = Skipped()
    for pair in np.flatnonzero(~clusters.usable):
        zero = clusters.informativeness[pair] == 0
        reason = "pair whose gradient is zero" if zero else "pair whose gradient is NaN or infinite"
        skipped.add(reason, f"row {kept.pair_rows[pair]}")
    report_skipped(skipped, config.on_invalid)
    kept.skipped.merge(skipped)


def _outliers(kept: Candidates, clusters: PairClusters) -> Skipped:
    """Names the pairs whose gradient is far longer than those of the others; they are kept *(ours)*.

    Far is six robust standard deviations (1.4826 times the median absolute deviation) of the logarithm of the norm.
    """
    noted = Skipped()
    index = np.flatnonzero(clusters.usable)
    logs = np.log(clusters.informativeness[index].astype(np.float64))
    distance = logs - np.median(logs)
    spread = 1.4826 * np.median(np.abs(distance))
    for pair, far in zip(index, distance, strict=True):
        if far > 6 * max(spread, 0.1):
            noted.add("pair whose gradient is far longer than the others", f"row {kept.pair_rows[pair]}")
    return noted


def _pair_table(
    candidates: Candidates,
    lengths: npt.NDArray[np.int64] | None,
    fate: npt.NDArray[np.object_],
    pair_index: npt.NDArray[np.int64],
    usefulness: npt.NDArray[np.float64],
    clusters: PairClusters | None,
    logps: npt.NDArray[np.float32] | None,
    ref_logps: npt.NDArray[np.float32] | None,
) -> pa.Table:
    """One row a candidate pair; what a strategy does not use is null."""
    n = len(candidates.pairs)
    chosen, rejected = candidates.pairs[:, 0], candidates.pairs[:, 1]
    first_response = np.searchsorted(candidates.prompt_of_response, candidates.prompt_of_pair)

    def scattered(values: npt.NDArray[Any] | None, kind: pa.DataType) -> pa.Array:
        if values is None:
            return pa.nulls(n, kind)
        full = np.full(n, np.nan)
        full[pair_index] = values
        return pa.array(full, from_pandas=True).cast(kind)

    def cluster_column(name: str) -> pa.Array:
        return scattered(None if clusters is None else getattr(clusters, name), pa.float32())

    labels = None if clusters is None else np.where(clusters.labels < 0, np.nan, clusters.labels)
    columns = {
        "pair": pa.array(np.arange(n)),
        "prompt": pa.array(candidates.prompt_of_pair),
        "row": pa.array(candidates.pair_rows),
        "chosen": pa.array(chosen - first_response),
        "rejected": pa.array(rejected - first_response),
        "score_chosen": pa.array(candidates.pair_scores[:, 0], from_pandas=True),
        "score_rejected": pa.array(candidates.pair_scores[:, 1], from_pandas=True),
        "score_gap": pa.array(candidates.score_gaps, from_pandas=True),
        "length_chosen": pa.nulls(n, pa.int64()) if lengths is None else pa.array(lengths[:, 0]),
        "length_rejected": pa.nulls(n, pa.int64()) if lengths is None else pa.array(lengths[:, 1]),
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
        "fate": pa.array(fate.tolist(), pa.string()),
    }
    return pa.table(columns)


def _training_set(candidates: Candidates, table: pa.Table, index: npt.NDArray[np.int64], config: SelectConfig) -> Any:
    """The selected pairs in TRL's format, with the provenance of each in ``bpo_*`` columns."""
    import datasets

    def texts(rows: npt.NDArray[np.int64]) -> list[Any]:
        return [candidates.responses[row] for row in rows]

    prompts = candidates.prompt_of_pair[index]
    texts_of = {
        "prompt": [candidates.prompts[prompt] for prompt in prompts],
        "chosen": texts(candidates.pairs[index, 0]),
        "rejected": texts(candidates.pairs[index, 1]),
    }
    columns: dict[str, list[Any]] = {}
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
    for name in selected.column_names:
        # A column that the strategy does not use would be all null, which Parquet readers cannot give a type.
        if selected[name].null_count < selected.num_rows:
            columns[f"bpo_{name}"] = selected[name].to_pylist()
    features = None
    if _has_structured_messages(texts_of.values()):
        # Arrow would fill the arguments of every tool call with those of all the others.
        text_features = dict.fromkeys(texts_of, datasets.List(datasets.Json()))
        features = datasets.Features({**text_features, **datasets.Dataset.from_dict(columns).features})
    return datasets.Dataset.from_dict({**texts_of, **columns}, features=features)


def _has_structured_messages(columns: Iterable[list[Text]]) -> bool:
    """Whether a message holds more than text, such as tool calls."""
    return any(
        not isinstance(value, (str, type(None)))
        for texts in columns
        for text in texts
        if isinstance(text, list)
        for message in text
        for value in message.values()
    )
