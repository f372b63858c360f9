"""Model and responses to a store of sketched gradients (or embeddings): batches in, one row a response out."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import bpo
from bpo.config import SelectConfig
from bpo.data.read import read_configured
from bpo.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from bpo.data.tokens import tokenize_configured
from bpo.gradients.choose import choose_features
from bpo.gradients.extract import Extraction, add_in_step, add_rows
from bpo.gradients.plan import find_plan
from bpo.gradients.preconditioner import load_preconditioner, preconditioner_path
from bpo.policy.batches import BatchTokens, batch_tokens, blocks_of, storage_order
from bpo.policy.logprobs import Forward, check_vocabulary
from bpo.policy.models import load_policy, model_fingerprint, window
from bpo.policy.reference import Reference
from bpo.policy.sharding import arithmetic, is_sharded, lost
from bpo.policy.state import inference_state
from bpo.sketching.batches import Sketching
from bpo.store.parts import Parts, check_shared
from bpo.store.shards import Shard, check_shard
from bpo.store.upload import writing
from bpo.store.writer import GradientWriter
from bpo.system.progress import token_bar
from bpo.world.world import world

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt
    from tqdm.auto import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.data.candidates import Candidates
    from bpo.data.tokens import TokenizedResponses
    from bpo.gradients.features import Features
    from bpo.gradients.preconditioner import Preconditioner
    from bpo.store.gradient_store import GradientStore
    from bpo.world.world import World


def collect_gradients(
    model: Any,
    dataset: Any,
    *,
    processing_class: Any = None,
    store: str | os.PathLike[str] | None = None,
    shard: tuple[int, int] | str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GradientStore:
    """Sketches the gradient of log π(response | prompt) of every response of a data set.

    With ``features="embeddings"`` the store holds embeddings of the responses in place of gradients (see
    :class:`bpo.SelectConfig`), and is used in the same ways.

    Args:
        model: Path, hub id, ``PreTrainedModel`` or ``PeftModel``.
        dataset: Preference data in any format of :func:`bpo.select`.
        processing_class: The tokenizer; by default the one saved with the model.
        store: Directory or address of the gradient store. Responses that it already holds are not computed again.
            ``None`` is a temporary directory that goes with the returned object.
        shard: Which share of the responses, of how many, such as ``(2, 4)`` or ``"2/4"``: for machines that see no disk
            in common. :func:`bpo.gather_stores` puts all shares together. ``None`` for all.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        config: Settings; ``checkpoints`` must be None, since a store is that of one model.
        progress: Whether to show a progress bar.

    Returns:
        The store: one row a response.

    Raises:
        ValueError: Unusable data, an unsupported model, or a store made with something else.
        FileNotFoundError: A model path that does not exist.

    Example:
        .. code-block:: python

            store = bpo.collect_gradients("my-sft-model", "responses.jsonl", store="gradients")
            selection = bpo.select(None, "responses.jsonl", budget=500, store="gradients")
    """
    config = SelectConfig.of(config)
    share = None if shard is None else Shard.of(shard)
    if config.checkpoints is not None:
        raise ValueError("collect_gradients serves one model: give it a checkpoint as the model, and checkpoints=None.")
    preconditioner = preconditioner_path(model, config)
    candidates = read_configured(dataset, config, split=split, columns=columns)
    tokenizer = load_tokenizer(model, processing_class, config)
    policy = load_policy(model, config)
    kept, tokenized = tokenize_configured(candidates, tokenizer, window(policy, config), config)
    return collect(
        policy,
        kept,
        tokenized,
        tokenizer,
        config=config,
        store=store,
        progress=progress,
        preconditioner=preconditioner,
        shard=share,
    )


def collect(
    model: PreTrainedModel,
    candidates: Candidates,
    tokenized: TokenizedResponses,
    processing_class: PreTrainedTokenizerBase,
    *,
    config: SelectConfig,
    store: str | os.PathLike[str] | None,
    progress: bool,
    preconditioner: str | None = None,
    reference: Reference | None = None,
    shard: Shard | None = None,
) -> GradientStore:
    """Adds the sketched gradient (or embedding) of every response (every sequence) that the store lacks.

    Args:
        model: The policy.
        candidates: Prompts and responses.
        tokenized: Their token ids.
        processing_class: The tokenizer.
        config: Settings.
        store: Directory or address; ``None`` is a temporary one.
        progress: Whether to show a progress bar.
        preconditioner: File of second moments (:func:`bpo.gradients.preconditioner.preconditioner_path`).
        reference: The reference's log-probabilities; None computes them with ``config.ref_model``, else takes the
            policy's own.
        shard: The share of the sequences; None for all.

    Returns:
        The store, open for reading.
    """
    with writing(store, world(), config.process_timeout) as (directory, check):
        return _collect(
            model,
            candidates,
            tokenized,
            processing_class,
            config=config,
            store=directory,
            check=check,
            progress=progress,
            preconditioner=preconditioner,
            reference=reference,
            shard=shard,
        )


def _collect(
    model: PreTrainedModel,
    candidates: Candidates,
    tokenized: TokenizedResponses,
    processing_class: PreTrainedTokenizerBase,
    *,
    config: SelectConfig,
    store: Path | None,
    check: Callable[[], None],
    progress: bool,
    preconditioner: str | None,
    reference: Reference | None,
    shard: Shard | None,
) -> GradientStore:
    check_vocabulary(model, tokenized.ids)
    # Decided before freezing, since what is trainable says what the features are.
    features = choose_features(model, config)
    precondition = None if preconditioner is None else load_preconditioner(preconditioner, model, features)
    reference = Reference.of(model, config) if reference is None else reference
    reference.check_vocabulary(tokenized)
    made_with = _made_with(model, tokenized, processing_class, config, features, precondition, reference)
    order = storage_order(tokenized.lengths, candidates.prompt_of_response[tokenized.response_of])
    blocks = blocks_of(order, tokenized.lengths, config.tokens_per_batch)
    if shard is not None:
        made_with["shard"] = shard.describe(blocks, tokenized.sequence_ids)
        blocks = shard.cut(blocks)
        order = np.concatenate(blocks)
    shared = world()
    if shared.size > 1:
        _meet(shared, store, tokenized, config, made_with)

    def opened() -> tuple[GradientWriter, Parts]:
        check_shard(store, made_with.get("shard"))
        writer = GradientWriter.open(store, made_with, candidates.known_ids, tokenized.sequence_ids[order], check)
        writer.check_ref_logps(tokenized.sequence_ids, tokenized.ref_logps)
        return writer, Parts(writer, blocks, tokenized.sequence_ids)

    sharded = is_sharded(model)
    if shared.size > 1:
        shared.from_main(lambda: opened()[1].take_leftovers() if sharded else opened()[1].share())
    writer, parts = opened()
    if shared.size == 1 and parts.take_leftovers():
        writer, parts = opened()
    missing = order[writer.lacks(tokenized.sequence_ids)[order]]
    bar = _progress_bar(tokenized.lengths, order, missing, features.noun, progress and shared.is_main)
    with contextlib.ExitStack() as stack:
        for context in (writer, bar, lost(shared), inference_state(model)):
            stack.enter_context(context)
        if len(missing):
            # Before any work that another writer would make useless.
            todo = shared.from_main(lambda: _lock(writer, parts, sharded)) if sharded or shared.size == 1 else []
            parts.check_seen(shared.name)
            forward = Forward.of(model, tokenized, processing_class, config)
            plan = find_plan(features, forward)
            features.warn_of_gaps(model)
            sketching = stack.enter_context(Sketching.of(config, shared.local_size))
            tokens = BatchTokens(batch_tokens(config.tokens_per_batch, model))
            extraction = Extraction(forward, reference, features, plan, candidates, sketching, precondition, tokens)
            if sharded:
                add_in_step(writer, extraction, todo, shared, bar)
                return writer.reopen()
            work = parts.in_order()
            if shared.size > 1:

                def found(rows: npt.NDArray[np.int64]) -> None:
                    bar.update(int(tokenized.lengths[rows].sum()))

                first = shared.rank * len(blocks) // shared.size
                work = parts.claimed(first, shared.name, config.process_timeout, found)
            for target, rows in stack.enter_context(contextlib.closing(work)):
                add_rows(target, extraction, rows, bar)
        elif shared.is_main:
            writer.settle()
    return writer.reopen()


def _meet(
    shared: World,
    store: Path | None,
    tokenized: TokenizedResponses,
    config: SelectConfig,
    made_with: Mapping[str, Any],
) -> None:
    """Waits for the others, which must be about to do the same."""
    check_shared(store)
    data = hashlib.sha256(tokenized.sequence_ids.tobytes()).hexdigest()
    same = {"data set": data, "tokens_per_batch": config.tokens_per_batch, **made_with}
    shared.check_same(same, config.process_timeout)


def _lock(writer: GradientWriter, parts: Parts, sharded: bool) -> list[npt.NDArray[np.int64]]:
    """Keeps others out of the store; returns what its blocks lack, for processes that share the model out."""
    writer.lock()
    parts.check_idle()
    return [rows for _, rows in parts.in_order()] if sharded else []


def _made_with(
    model: PreTrainedModel,
    tokenized: TokenizedResponses,
    processing_class: PreTrainedTokenizerBase,
    config: SelectConfig,
    features: Features,
    precondition: Preconditioner | None,
    reference: Reference,
) -> dict[str, Any]:
    """The fingerprint of a store: everything that its rows depend on beside the responses."""
    return {
        "bpo": bpo.__version__,
        "model": model_fingerprint(model),
        "reference": reference.fingerprint,
        "tokenizer": tokenizer_fingerprint(processing_class),
        "features": {**features.describe(), "seed": config.sketch_seed},
        "preconditioner": None if precondition is None else precondition.fingerprint(),
        "sketch": {
            "kind": config.sketch_kind,
            "dim": config.sketch_dim,
            "nnz": config.sketch_nnz,
            "seed": config.sketch_seed,
            "dtype": config.sketch_dtype,
        },
        "max_length": tokenized.max_length,
        "truncation_mode": config.truncation_mode,
        "dtype": str(arithmetic(model) or model.dtype).removeprefix("torch.")
        + (" under bfloat16 autocast" if config.bf16 else ""),
    }


def _progress_bar(
    lengths: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.int64],
    missing: npt.NDArray[np.int64],
    noun: str,
    progress: bool,
) -> tqdm[Any]:
    """A bar that starts at what is there."""
    total, n_present = int(lengths[wanted].sum()), len(wanted) - len(missing)
    there = f" ({n_present} of {len(wanted)} responses are there)" if n_present else ""
    return token_bar(total, noun.capitalize() + there, progress, total - int(lengths[missing].sum()))
