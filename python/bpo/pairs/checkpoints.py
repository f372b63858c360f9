"""Gradients at several checkpoints of a training: LESS's influence along it (arXiv 2402.04333).

LESS adds up the cosines of two gradients over the checkpoints i of a warm-up, each weighted by η̄_i, the average
learning rate of its epoch. With √η̄_i · z_i / ‖z_i‖ side by side as the feature of a pair, and Σ η̄_i = 1, that sum is
the inner product of two features, and a feature has unit length: k-means over them clusters by LESS's similarity.

The two responses of a pair weigh differently at each checkpoint, by its log-probabilities and norms, so these features
have to be formed: N·d numbers a pair.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bpo.pairs.clustering import cluster_pairs
from bpo.pairs.pair_gradients import PairGradients, pair_norms
from bpo.store.gradient_store import widened

if TYPE_CHECKING:
    import os

    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.pairs.clustering import PairClusters
    from bpo.system.progress import Progress


# Features are formed for so many pairs at a time that they stay below this.
_BLOCK_BYTES = 64 << 20


def cluster_checkpoints(
    gradients: Sequence[PairGradients],
    learning_rates: Sequence[float],
    *,
    config: SelectConfig,
    store: str | os.PathLike[str] | None,
    seed: int,
    progress: Progress | None,
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
