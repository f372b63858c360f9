"""Gradients at several checkpoints of a training, one store each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.tokenizers import tokenizer_fingerprint
from bpo.gradients.collect import collect
from bpo.gradients.preconditioner import preconditioner_path
from bpo.policy.batches import batch_tokens, in_batches, longest_first
from bpo.policy.logprobs import Forward
from bpo.policy.models import load_policy
from bpo.policy.reference import Reference
from bpo.store.gradient_store import GradientStore
from bpo.store.mirror import holds_store
from bpo.system.paths import check_path, joined
from bpo.system.progress import token_bar

if TYPE_CHECKING:
    import os

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.data.tokens import TokenizedResponses


def check_checkpoints(config: SelectConfig, store: str | os.PathLike[str] | None) -> None:
    """Checks that every checkpoint of ``SelectConfig.checkpoints`` and its optimizer state are there.

    Raises:
        FileNotFoundError: A checkpoint, or its optimizer state, that is not.
        ValueError: A ``store`` that is the store of one model.
    """
    for checkpoint in config.checkpoints or {}:
        check_path(checkpoint)
        preconditioner_path(checkpoint, config)
    if store is not None and holds_store(store):
        raise ValueError(
            f"{store} is the gradient store of one model, and those of checkpoints are directories in one of their "
            "own: name another store."
        )


def collect_reference(
    model: PreTrainedModel,
    tokenized: TokenizedResponses,
    processing_class: PreTrainedTokenizerBase,
    *,
    config: SelectConfig,
    store: str | os.PathLike[str] | None,
    progress: bool,
) -> Reference:
    """Computes log π_ref of every response once for all checkpoints, but for what their stores hold already.

    Args:
        model: The policy before the warm-up, the reference unless ``config.ref_model`` is another.
        tokenized: Token ids of the responses.
        processing_class: The tokenizer.
        config: Settings.
        store: Directory of the checkpoints' stores, None for temporary ones.
        progress: Whether to show a progress bar.

    Returns:
        The log-probabilities, and what they are of.
    """
    source = Reference.by(model) if config.ref_model is None else Reference.of(model, config)
    source.check_vocabulary(tokenized)
    made_with: dict[str, Any] = {
        "reference": source.fingerprint,
        "tokenizer": tokenizer_fingerprint(processing_class),
        "max_length": tokenized.max_length,
        "truncation_mode": config.truncation_mode,
    }
    logps = np.zeros(len(tokenized.ids), dtype=np.float32)
    missing = np.ones(len(logps), dtype=bool)
    for directory in _directories(config, store):
        if directory is None or not holds_store(directory):
            continue
        present = GradientStore.open(directory)
        if all(present.fingerprint.get(key) == value for key, value in made_with.items()):
            rows = present.rows_of(tokenized.sequence_ids)
            logps[rows >= 0] = present.records["ref_logp"][rows[rows >= 0]]
            missing &= rows < 0
    if missing.any():
        index = np.flatnonzero(missing)
        forward = Forward.of(model, tokenized, processing_class, config)
        with token_bar(int(tokenized.lengths[index].sum()), "Reference", progress) as bar:

            def run(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
                found: npt.NDArray[np.float32] = source.logps(forward, rows).cpu().numpy()
                return found

            order = index[longest_first(tokenized.lengths[index])]
            tokens = batch_tokens(config.tokens_per_batch, model)
            for rows, done in in_batches(run, order, tokenized.lengths, tokens):
                logps[rows] = done
                bar.update(int(tokenized.lengths[rows].sum()))
    return Reference("known", source.fingerprint, known=logps)


def collect_checkpoints(
    reference: Reference,
    candidates: Candidates,
    tokenized: TokenizedResponses,
    processing_class: PreTrainedTokenizerBase,
    *,
    config: SelectConfig,
    store: str | os.PathLike[str] | None,
    progress: bool,
) -> list[GradientStore]:
    """Completes the gradient store of each checkpoint, with one model in memory at a time.

    Args:
        reference: Log-probabilities of the reference.
        candidates: Prompts and responses.
        tokenized: Their token ids.
        processing_class: The tokenizer.
        config: Settings.
        store: Directory in which each checkpoint has its store, ``<position>-<name>``; None for temporary ones.
        progress: Whether to show progress bars.

    Returns:
        The stores, in the order of ``config.checkpoints``.
    """
    return [
        collect(
            load_policy(checkpoint, config),
            candidates,
            tokenized,
            processing_class,
            config=config,
            store=directory,
            progress=progress,
            preconditioner=preconditioner_path(checkpoint, config),
            reference=reference,
        )
        for checkpoint, directory in zip(config.checkpoints or {}, _directories(config, store), strict=True)
    ]


def _directories(config: SelectConfig, store: str | os.PathLike[str] | None) -> list[str | Path | None]:
    """Directory of each checkpoint's store."""
    names = [re.sub(r"[^\w.-]", "_", Path(checkpoint).name) for checkpoint in config.checkpoints or {}]
    return [None if store is None else joined(store, f"{position}-{name}") for position, name in enumerate(names)]
