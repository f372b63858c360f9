"""Gradients at several checkpoints of a training: LESS's influence along it (arXiv 2402.04333).

LESS adds up the cosines of two gradients over the checkpoints i of a warm-up, each weighted by η̄_i, the average
learning rate of its epoch. With √η̄_i · z_i / ‖z_i‖ side by side as the feature of a pair, and Σ η̄_i = 1, that sum is
the inner product of two features, and a feature has unit length: k-means over them clusters by LESS's similarity.

The two responses of a pair weigh differently at each checkpoint, by its log-probabilities and norms, so these features
have to be formed: N·d numbers a pair.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bpo.clustering import PairClusters, PairGradients, cluster_pairs, pair_norms
from bpo.gradients import collect
from bpo.logprobs import Forward
from bpo.models import check_path, load_policy, tokenizer_fingerprint
from bpo.precondition import preconditioner_path
from bpo.reference import Reference
from bpo.store import GradientStore, widened
from bpo.tokens import batches_by_tokens

if TYPE_CHECKING:
    import os

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.clustering import Progress
    from bpo.config import SelectConfig
    from bpo.data import Candidates
    from bpo.tokens import TokenizedResponses

# Features are formed for so many pairs at a time that they stay below this.
_BLOCK_BYTES = 64 << 20


def check_checkpoints(config: SelectConfig, store: str | os.PathLike[str] | None) -> None:
    """Checks that every checkpoint of ``SelectConfig.checkpoints`` and its optimizer state are there.

    Raises:
        FileNotFoundError: A checkpoint, or its optimizer state, that is not.
        ValueError: A ``store`` that is the store of one model.
    """
    for checkpoint in config.checkpoints or {}:
        check_path(checkpoint)
        preconditioner_path(checkpoint, config)
    if store is not None and (Path(store) / "manifest.json").exists():
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
        if directory is None or not (directory / "manifest.json").is_file():
            continue
        present = GradientStore.open(directory)
        if all(present.fingerprint.get(key) == value for key, value in made_with.items()):
            rows = present.rows_of(tokenized.sequence_ids)
            logps[rows >= 0] = present.records["ref_logp"][rows[rows >= 0]]
            missing &= rows < 0
    if missing.any():
        index = np.flatnonzero(missing)
        forward = Forward.of(model, tokenized, processing_class, config)
        bar = tqdm(
            total=int(tokenized.lengths[index].sum()),
            desc="Reference",
            unit="token",
            unit_scale=True,
            disable=not progress,
        )
        with bar:
            for batch in batches_by_tokens(tokenized.lengths[index], config.tokens_per_batch):
                rows = index[batch]
                logps[rows] = source.logps(forward, rows)
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


def cluster_checkpoints(
    gradients: Sequence[PairGradients],
    learning_rates: Sequence[float],
    *,
    config: SelectConfig,
    store: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[PairClusters, PairGradients]:
    """Clusters pairs by their gradients at several checkpoints (see the top of this file).

    Args:
        gradients: Of the same P pairs, at each checkpoint.
        learning_rates: η̄ of each checkpoint, the average learning rate of its epoch.
        config: As for :func:`bpo.cluster_pairs`.
        store: Existing directory in which the features are kept for as long; None for the system's temporary one.
        seed: Of the k-means++ seeding.
        progress: Called with (done, total) now and then.

    Returns:
        Clusters and scores, and the features. ``informativeness`` is √(Σ η̄_i ‖z_i‖²), with Σ η̄_i = 1. A pair is usable
        if it is at every checkpoint.

    Raises:
        ValueError: No usable pair.
        OSError: No room on the disk for the features of all pairs.
    """
    features, informativeness = pair_features(
        gradients, learning_rates, None if store is None else Path(store), threads=config.threads
    )
    pairs = PairGradients.of_rows(features)
    clusters = cluster_pairs(*pairs, config=config, seed=seed, progress=progress)
    return dataclasses.replace(clusters, informativeness=informativeness), pairs


def pair_features(
    gradients: Sequence[PairGradients],
    learning_rates: Sequence[float],
    directory: Path | None = None,
    *,
    threads: int | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Puts the gradients of each pair at N checkpoints side by side, at unit length and weighted.

    Args:
        gradients: Of the same P pairs, at each checkpoint.
        learning_rates: η̄ of each checkpoint; only their proportions count.
        directory: Where the temporary file that holds them is made; None for the system's.
        threads: Threads of the Rust core.

    Returns:
        (P, N·d) float32 features, √η̄_i · z_i / ‖z_i‖ in columns i·d to (i + 1)·d, read-only and memory-mapped;
        and (P,) float32, √(Σ η̄_i ‖z_i‖²). Where z_i is zero or not finite at some checkpoint: zeros, and NaN.

    Raises:
        OSError: No room for them on the disk.
    """
    weights = np.asarray(learning_rates, dtype=np.float64) / np.sum(learning_rates)
    norms = np.stack([pair_norms(at_one, threads) for at_one in gradients])  # (N, P)
    usable = np.isfinite(norms.sum(axis=0)) & (norms.min(axis=0) > 0)
    scales = np.zeros(norms.shape, dtype=np.float32)
    scales[:, usable] = np.sqrt(weights)[:, None] / norms[:, usable]
    informativeness = np.full(norms.shape[1], np.nan, dtype=np.float32)
    informativeness[usable] = np.sqrt(weights @ np.square(norms[:, usable], dtype=np.float64))

    def block(part: slice) -> npt.NDArray[np.float32]:
        columns = []
        for (rows, pairs, coefficients), scale in zip(gradients, scales, strict=True):
            unit = np.where(usable[part, None], coefficients[part] * scale[part, None], np.float32(0))
            columns.append(unit[:, :1] * widened(rows[pairs[part, 0]]) + unit[:, 1:] * widened(rows[pairs[part, 1]]))
        return np.hstack(columns)

    shape = norms.shape[1], len(gradients) * gradients[0].rows.shape[1]
    directory = Path(tempfile.gettempdir()) if directory is None else directory
    size, free = 4 * shape[0] * shape[1], shutil.disk_usage(directory).free
    if size > free:
        raise OSError(
            f"The gradients of {shape[0]} pairs at {len(gradients)} checkpoints take {size / 1e9:.3g} GB, and "
            f"{directory} has {free / 1e9:.3g} GB free. Name a store on a larger disk, or take fewer checkpoints, a "
            "smaller sketch_dim, fewer prompts (breadth) or fewer pairs (max_pairs_per_prompt)."
        )
    # The file has no name, so it goes with the array, however the process ends.
    with tempfile.TemporaryFile(dir=directory) as file:
        step = max(1, _BLOCK_BYTES // (4 * shape[1]))
        for start in range(0, shape[0], step):
            file.write(block(slice(start, start + step)).data)
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r", shape=shape), informativeness


def _directories(config: SelectConfig, store: str | os.PathLike[str] | None) -> list[Path | None]:
    """Directory of each checkpoint's store."""
    names = [re.sub(r"[^\w.-]", "_", Path(checkpoint).name) for checkpoint in config.checkpoints or {}]
    return [None if store is None else Path(store) / f"{position}-{name}" for position, name in enumerate(names)]
