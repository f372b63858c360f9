"""``select``: the stages of the method, top to bottom."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from bpo.breadth import compress_breadth, embed_prompts, embed_with_policy
from bpo.clustering import cluster_pairs
from bpo.config import SelectConfig
from bpo.data import Candidates, read_candidates, report_skipped
from bpo.gradients import collect
from bpo.losses import pair_coefficients
from bpo.models import load_policy, load_tokenizer, window
from bpo.selection import SELECTED, Selection
from bpo.strategies import KEEPS_EVERY_PROMPT, NEEDS_GRADIENTS, STRATEGIES, Candidacy
from bpo.tokens import TokenizedResponses, padding_id, tokenize_candidates

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from bpo.clustering import PairClusters
    from bpo.config import Strategy
    from bpo.store import GradientStore


def select(
    model: Any,
    dataset: Any,
    *,
    budget: int | float,
    processing_class: Any = None,
    breadth: int | float | None = None,
    strategy: Strategy = "bpo",
    store: str | os.PathLike[str] | None = None,
    config: SelectConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Chooses which preference pairs to train on.

    The stages are those of Balanced Preference Optimization (arXiv 2411.10914): breadth compression, the gradient of
    every response, clusters of pair gradients, usefulness, and the depth of each prompt. All bad input is found before
    the model runs.

    Args:
        model: The policy that will be trained: path, hub id, ``PreTrainedModel`` or ``PeftModel``. It is not changed.
            May be None for strategies that use no gradients, with ``breadth=None``.
        dataset: Preference rows, scored responses or UltraFeedback-like completions, as a ``datasets.Dataset``, a list
            of rows, a file, a directory or a hub id (see :func:`bpo.read_candidates`).
        budget: Pairs to keep: a count, or a fraction (a float in (0, 1]) of the candidate pairs of the kept prompts.
        processing_class: TRL's word for the tokenizer; by default the one saved with the model.
        breadth: Prompts to keep: a count, a fraction, or None for all.
        strategy: ``"bpo"``, ``"uniform"`` (the same depth for every prompt), ``"random"`` or ``"margin"`` (the largest
            score gaps).
        store: Directory of the gradient store, reused and completed when it is there. None computes anew and keeps
            nothing.
        config: Everything else.
        seed: Of every random choice. The same seed gives the same selection for any number of threads, and, up to the
            rounding of the model's own arithmetic, for any batch size.
        progress: Whether to show progress bars.

    Returns:
        The selection; ``selection.dataset`` trains in TRL's ``DPOTrainer`` as it is.

    Raises:
        ValueError: Unusable data, a budget below the number of prompts or above the candidates, a tokenizer without
            padding or chat template, an unsupported model, or a store made with something else.
        FileNotFoundError: A model or data path that does not exist.

    Example:
        >>> import bpo
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "5", "four"], "scores": [1.0, 0.0, 0.5]}]
        >>> selection = bpo.select(None, rows, budget=2, strategy="margin", progress=False)
        >>> selection.dataset["chosen"][:]
        ['4', '4']
        >>> selection.depth.tolist()
        [2]
    """
    config = config or SelectConfig()
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {sorted(STRATEGIES)}, got {strategy!r}")
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2**63 - 1, got {seed!r}")
    seed = int(seed)
    needs_gradients = strategy in NEEDS_GRADIENTS
    if model is None and (needs_gradients or breadth is not None):
        raise ValueError(f"strategy={strategy!r} with breadth={breadth!r} needs a model; model is None.")

    candidates = read_candidates(
        dataset, max_pairs_per_prompt=config.max_pairs_per_prompt, on_invalid=config.on_invalid
    )
    tokenizer = tokenized = None
    if model is not None:
        tokenizer = load_tokenizer(model, processing_class, config)
        candidates, tokenized = tokenize_candidates(
            candidates, tokenizer, window(model, config), on_invalid=config.on_invalid
        )
    n_prompts = len(candidates.prompts) if breadth is None else _count("breadth", breadth, len(candidates.prompts))
    if not isinstance(budget, float):
        _check_budget(_count("budget", budget, len(candidates.pairs)), n_prompts, strategy)
    embeds_with_policy = breadth is not None and config.embedder is None
    policy = load_policy(model, config) if needs_gradients or embeds_with_policy else None

    # Breadth: representative prompts.
    kept_prompts = np.ones(len(candidates.prompts), dtype=bool)
    if n_prompts < len(candidates.prompts):
        assert tokenizer is not None and tokenized is not None
        if config.embedder is not None:
            embeddings = embed_prompts(candidates.prompts, config.embedder, trust_remote_code=config.trust_remote_code)
        else:
            embeddings = embed_with_policy(
                policy,
                _prompt_ids(candidates, tokenized),
                padding_id(tokenizer),
                tokens_per_batch=config.tokens_per_batch,
            )
        kept_prompts = compress_breadth(embeddings, n_prompts, seed=seed, threads=config.threads).kept
    kept, pair_index, rows_kept = candidates.keep_prompts(kept_prompts)
    n_pairs = _count("budget", budget, len(kept.pairs))
    _check_budget(n_pairs, n_prompts, strategy)

    # Gradients: one sketch a response; clusters and scores of the pairs.
    gradients = clusters = None
    eligible = np.ones(len(kept.pairs), dtype=bool)
    rows = np.full(len(kept.responses), -1, dtype=np.int64)
    if needs_gradients:
        assert policy is not None and tokenizer is not None and tokenized is not None
        gradients = collect(
            policy,
            kept,
            tokenized.take(rows_kept),
            tokenizer,
            config=config,
            seed=seed,
            store=store,
            known_response_ids=candidates.response_ids,
            progress=progress,
        )
        rows = gradients.rows_of(kept.response_ids)
        pairs = rows[kept.pairs]
        log_ratios = gradients.records["logp"] - gradients.records["ref_logp"]
        with _core_progress("Clusters", progress) as report:
            clusters = cluster_pairs(
                gradients.rows,
                pairs,
                pair_coefficients(log_ratios, pairs, loss_type=config.loss_type, beta=config.beta),
                config=config,
                seed=seed,
                progress=report,
            )
        eligible = clusters.usable
        n_pairs = _without_unusable(kept, eligible, n_pairs, config)

    # Depth: which pairs of each prompt.
    chosen, usefulness = STRATEGIES[strategy](
        Candidacy(kept.prompt_of_pair, kept.score_gaps, eligible, n_pairs, config, seed, clusters)
    )
    fate = np.full(len(candidates.pairs), "breadth", dtype=object)
    fate[pair_index] = np.where(eligible, np.where(chosen, SELECTED, "depth"), "unusable")
    table = _pair_table(candidates, tokenized, fate, pair_index, usefulness, clusters)
    if gradients is not None:
        table = _with_logps(table, gradients, rows[kept.pairs], pair_index)
    return Selection(
        dataset=_training_set(candidates, table, np.flatnonzero(fate == SELECTED)),
        pairs=table,
        depth=np.bincount(candidates.prompt_of_pair[fate == SELECTED], minlength=len(kept_prompts)).astype(np.int64),
        strategy=strategy,
        budget=n_pairs,
        seed=seed,
        config=config.to_dict(),
        skipped=candidates.skipped.places,
    )


def _prompt_ids(candidates: Candidates, tokenized: TokenizedResponses) -> list[list[int]]:
    """Returns the token ids of each prompt, as they stand in front of its first response."""
    first = np.flatnonzero(np.diff(candidates.prompt_of_response, prepend=-1))
    return [tokenized.ids[row][: max(1, tokenized.prompt_lengths[row])] for row in first]


def _count(name: str, value: Any, total: int) -> int:
    """Returns a count given as a whole number or as a fraction (a float in (0, 1])."""
    of = {"breadth": "usable prompts", "budget": "candidate pairs"}[name]
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
        raise ValueError(f"{name}={value} is above the {total} {of} of the data; give at most {total}.")
    return int(value)


def _check_budget(budget: int, n_prompts: int, strategy: str) -> None:
    if strategy in KEEPS_EVERY_PROMPT and budget < n_prompts:
        raise ValueError(
            f"budget={budget} is below the {n_prompts} prompts: strategy={strategy!r} keeps at least one pair of each. "
            f"Give a budget of at least {n_prompts} pairs, or keep fewer prompts with breadth={budget}."
        )


def _without_unusable(kept: Candidates, usable: npt.NDArray[np.bool_], n_pairs: int, config: SelectConfig) -> int:
    """Names the pairs whose gradient is zero or not finite; returns the budget that the others can fill."""
    from bpo.data import Skipped

    skipped = Skipped()
    for pair in np.flatnonzero(~usable):
        prompt = kept.prompt_of_pair[pair]
        skipped.add("pair whose gradient is zero or not finite", f"row {kept.prompt_rows[prompt]}")
    report_skipped(skipped, config.on_invalid)
    kept.skipped.merge(skipped)
    return min(n_pairs, int(usable.sum()))


def _pair_table(
    candidates: Candidates,
    tokenized: TokenizedResponses | None,
    fate: npt.NDArray[np.object_],
    pair_index: npt.NDArray[np.int64],
    usefulness: npt.NDArray[np.float64],
    clusters: PairClusters | None,
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
    lengths = None if tokenized is None else tokenized.lengths - tokenized.prompt_lengths
    columns = {
        "pair": pa.array(np.arange(n)),
        "prompt": pa.array(candidates.prompt_of_pair),
        "prompt_row": pa.array(candidates.prompt_rows[candidates.prompt_of_pair]),
        "chosen": pa.array(chosen - first_response),
        "rejected": pa.array(rejected - first_response),
        "score_chosen": pa.array(candidates.scores[chosen], from_pandas=True),
        "score_rejected": pa.array(candidates.scores[rejected], from_pandas=True),
        "score_gap": pa.array(candidates.score_gaps, from_pandas=True),
        "length_chosen": pa.nulls(n, pa.int64()) if lengths is None else pa.array(lengths[chosen]),
        "length_rejected": pa.nulls(n, pa.int64()) if lengths is None else pa.array(lengths[rejected]),
        "logp_chosen": pa.nulls(n, pa.float32()),
        "logp_rejected": pa.nulls(n, pa.float32()),
        "informativeness": cluster_column("informativeness"),
        "cluster": scattered(labels, pa.int32()),
        "centrality": cluster_column("centrality"),
        "distance": cluster_column("distance"),
        "alignment": cluster_column("alignment"),
        "usefulness": scattered(usefulness, pa.float64()),
        "fate": pa.array(fate.tolist(), pa.string()),
    }
    return pa.table(columns)


def _with_logps(
    table: pa.Table, gradients: GradientStore, pairs: npt.NDArray[np.int64], pair_index: npt.NDArray[np.int64]
) -> pa.Table:
    for side, name in enumerate(("logp_chosen", "logp_rejected")):
        full = np.full(table.num_rows, np.nan, dtype=np.float32)
        full[pair_index] = gradients.records["logp"][pairs[:, side]]
        table = table.set_column(table.column_names.index(name), name, pa.array(full, from_pandas=True))
    return table


def _training_set(candidates: Candidates, table: pa.Table, index: npt.NDArray[np.int64]) -> Any:
    """The selected pairs in TRL's format, with the provenance of each in ``bpo_*`` columns."""
    import datasets

    def texts(rows: npt.NDArray[np.int64]) -> list[Any]:
        return [candidates.responses[row] for row in rows]

    columns = {
        "prompt": [candidates.prompts[prompt] for prompt in candidates.prompt_of_pair[index]],
        "chosen": texts(candidates.pairs[index, 0]),
        "rejected": texts(candidates.pairs[index, 1]),
    }
    selected = table.take(pa.array(index)).drop_columns(["chosen", "rejected", "fate"])
    for name in selected.column_names:
        # A column that the strategy does not use would be all null, which Parquet readers cannot give a type.
        if selected[name].null_count < selected.num_rows:
            columns[f"bpo_{name}"] = selected[name].to_pylist()
    return datasets.Dataset.from_dict(columns)


@contextlib.contextmanager
def _core_progress(description: str, enabled: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar as the callback that the Rust core takes; None where none is wanted."""
    if not enabled:
        yield None
        return
    with tqdm(desc=description, bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.n = done
            bar.refresh()

        yield report
