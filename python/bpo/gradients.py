"""Model and responses to a store of sketched gradients: batches in, one row a response out."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

import bpo
from bpo import _core
from bpo.capture import choose_features, sum_gradients
from bpo.config import SelectConfig
from bpo.data import Candidates, read_candidates
from bpo.logprobs import check_vocabulary, completion_logps
from bpo.models import (
    inference_state,
    load_policy,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
    window,
)
from bpo.store import NONFINITE, ZERO, GradientStore, GradientWriter
from bpo.tokens import TokenizedResponses, batches_by_tokens, padding_id, tokenize_candidates

if TYPE_CHECKING:
    import os

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def collect(
    model: PreTrainedModel,
    candidates: Candidates,
    tokenized: TokenizedResponses,
    processing_class: PreTrainedTokenizerBase,
    *,
    config: SelectConfig,
    store: str | os.PathLike[str] | None,
    progress: bool,
) -> GradientStore:
    """Adds the sketched gradient of every response that the store lacks.

    Args:
        model: The policy.
        candidates: Prompts and responses.
        tokenized: Their token ids.
        processing_class: The tokenizer.
        config: Settings.
        store: Directory; ``None`` is a temporary one.
        progress: Whether to show a progress bar.

    Returns:
        The store, open for reading.
    """
    check_vocabulary(model, tokenized)
    # Decided before freezing, since what is trainable says what the features are.
    features = choose_features(model, config)
    reference = None if config.ref_model is None else load_policy(config.ref_model, config)
    if reference is not None:
        check_vocabulary(reference, tokenized)
    sketcher = _core.Sketcher(
        config.sketch_dim, seed=config.sketch_seed, kind=config.sketch_kind, nnz=config.sketch_nnz
    )
    fingerprint = {
        "bpo": bpo.__version__,
        "model": model_fingerprint(model),
        "reference": "the policy" if reference is None else model_fingerprint(reference),
        "tokenizer": tokenizer_fingerprint(processing_class),
        "features": {**features.describe(), "seed": config.sketch_seed},
        "sketch": {
            "kind": config.sketch_kind,
            "dim": config.sketch_dim,
            "nnz": config.sketch_nnz,
            "seed": config.sketch_seed,
        },
        "max_length": tokenized.max_length,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    writer = GradientWriter.open(store, config.sketch_dim, fingerprint, candidates.known_ids)
    missing = np.flatnonzero(writer.rows_of(candidates.response_ids) < 0)
    pad_id = padding_id(processing_class)
    # In tokens, since the longest responses go first: counted in responses, the time left would be far too long.
    bar = tqdm(
        total=int(tokenized.lengths.sum()),
        initial=int(tokenized.lengths.sum() - tokenized.lengths[missing].sum()),
        desc="Gradients",
        unit="token",
        unit_scale=True,
        disable=not progress,
    )
    with contextlib.ExitStack() as stack:
        for context in (writer, bar, inference_state(model)):
            stack.enter_context(context)
        if reference is not None:
            stack.enter_context(inference_state(reference))
        if len(missing):
            writer.lock()  # before any work that another writer would make useless
            features.self_check(tokenized, pad_id)
        for batch in batches_by_tokens(tokenized.lengths[missing], config.tokens_per_batch):
            rows = missing[batch]
            sketch = np.zeros((len(rows), config.sketch_dim), dtype=np.float32)

            def consume(
                offset: int,
                gradients: torch.Tensor,
                samples: slice,
                sketch: npt.NDArray[np.float32] = sketch,
            ) -> None:
                sketcher.sketch(gradients.contiguous().cpu().numpy(), offset, sketch[samples], threads=config.threads)

            logps = sum_gradients(model, features, tokenized, rows, pad_id, consume).cpu().numpy()
            if reference is None:
                ref_logps = logps
            else:
                with torch.inference_mode():
                    ref_logps = completion_logps(reference, tokenized, rows, pad_id).cpu().numpy()
            # A row whose squared norm overflows is as useless to k-means as an infinite one.
            with np.errstate(over="ignore", invalid="ignore"):
                finite = np.isfinite(np.square(sketch).sum(axis=1)) & np.isfinite(logps) & np.isfinite(ref_logps)
            flags = NONFINITE * ~finite + ZERO * ~sketch.any(axis=1)
            sketch[~finite] = 0.0
            writer.append(
                sketch,
                prompt_ids=candidates.prompt_ids[candidates.prompt_of_response[rows]],
                response_ids=candidates.response_ids[rows],
                scores=candidates.scores[rows],
                logps=logps,
                ref_logps=ref_logps,
                lengths=tokenized.response_lengths[rows],
                flags=flags,
            )
            bar.update(int(tokenized.lengths[rows].sum()))
    if len(missing):
        features.warn_of_gaps(model)
    return writer.reopen()


def collect_gradients(
    model: Any,
    dataset: Any,
    *,
    processing_class: Any = None,
    store: str | os.PathLike[str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> GradientStore:
    """Sketches the gradient of log π(response | prompt) of every response of a data set.

    Args:
        model: Path, hub id, ``PreTrainedModel`` or ``PeftModel``.
        dataset: Preference data in any format of :func:`bpo.select`.
        processing_class: The tokenizer; by default the one saved with the model.
        store: Directory of the gradient store. Responses that it already holds are not computed again. ``None`` is a
            temporary directory that goes with the returned object.
        config: Settings.
        progress: Whether to show a progress bar.

    Returns:
        The store: one row a response.

    Raises:
        ValueError: Unusable data, an unsupported model, or a store made with something else.
        FileNotFoundError: A model path that does not exist.
    """
    config = SelectConfig.of(config)
    candidates = read_candidates(
        dataset, max_pairs_per_prompt=config.max_pairs_per_prompt, on_invalid=config.on_invalid
    )
    tokenizer = load_tokenizer(model, processing_class, config)
    policy = load_policy(model, config)
    kept, tokenized = tokenize_candidates(candidates, tokenizer, window(policy, config), on_invalid=config.on_invalid)
    return collect(
        policy,
        kept,
        tokenized,
        tokenizer,
        config=config,
        store=store,
        progress=progress,
    )
