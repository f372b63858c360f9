"""From gradient stores to the gradients of pairs, and to what strategies read of them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.checkpoints import cluster_checkpoints, pair_features
from bpo.clustering import PairClusters, PairGradients, cluster_pairs, pair_norms
from bpo.data import Candidates, Skipped, report_skipped
from bpo.losses import pair_coefficients
from bpo.progress import core_progress
from bpo.store import NONFINITE, GradientStore, StoreMismatchError, widened

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import numpy.typing as npt

    from bpo.config import SelectConfig


_TESTED_PROMPTS = 1000
_SIGN_DRAWS = 1000


@dataclasses.dataclass(frozen=True)
class MeasuredPairs:
    """P pairs of responses whose gradients are known.

    Attributes:
        gradients: Of the pairs, at each checkpoint; of one model a single entry.
        logps: (P, 2) float32, log π of the preferred and of the other response; None with several checkpoints.
        ref_logps: (P, 2) float32, log π_ref likewise.
        differences: h_w − h_l of the pairs; None with several checkpoints.
    """

    gradients: list[PairGradients]
    logps: npt.NDArray[np.float32] | None
    ref_logps: npt.NDArray[np.float32]
    differences: PairGradients | None

    def margins(self, config: SelectConfig) -> npt.NDArray[np.float64] | None:
        """Returns Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)), (P,) float64; None with several checkpoints."""
        if self.logps is None:
            return None
        rewards = config.beta * (self.logps.astype(np.float64) - self.ref_logps.astype(np.float64))
        return rewards[:, 0] - rewards[:, 1]


def in_store(
    candidates: Candidates, present: GradientStore, config: SelectConfig
) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """Returns the candidate pairs whose two responses a store holds, and the row of each response ((R,) int64).

    Raises:
        ValueError: Responses that it holds more than once.
        StoreMismatchError: It holds the responses of no pair.
    """
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


def measured(
    stores: Sequence[GradientStore],
    pairs: Sequence[npt.NDArray[np.int64]],
    config: SelectConfig,
    *,
    ref_logps: npt.NDArray[np.float32] | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    progress: bool = False,
) -> MeasuredPairs:
    """Reads what stores hold of pairs, and compares the rows of their responses with the checksums.

    Args:
        stores: One, or that of each checkpoint.
        pairs: (P, 2) int64 for each store, the rows of the preferred and of the other response.
        config: Uses what :func:`bpo.pair_coefficients` does, and ``threads``.
        ref_logps: (P, 2) float32, log π_ref of the responses; by default that of the store.
        weights: (P,) float64, what the loss of each pair is multiplied with; None for 1.
        progress: Whether to show a progress bar.

    Raises:
        StoreDamagedError: A row that is not as it was written.
    """
    gradients = [
        _pair_gradients(store, rows, config, weights, progress) for store, rows in zip(stores, pairs, strict=True)
    ]
    if len(stores) > 1 or config.checkpoints is not None:
        assert ref_logps is not None
        return MeasuredPairs(gradients, None, ref_logps, None)
    records, scales = stores[0].records, stores[0].scales[pairs[0]]
    differences = np.array([1, -1], dtype=np.float32) * scales
    return MeasuredPairs(
        gradients,
        records["logp"][pairs[0]],
        records["ref_logp"][pairs[0]] if ref_logps is None else ref_logps,
        PairGradients(stores[0].rows, pairs[0], differences),
    )


def _pair_gradients(
    store: GradientStore,
    pairs: npt.NDArray[np.int64],
    config: SelectConfig,
    weights: npt.NDArray[np.float64] | None,
    progress: bool,
) -> PairGradients:
    """Returns the gradients of the pairs in terms of those of the responses; NaN where one of these is unusable."""
    with core_progress("Checksums", progress) as report:
        store.check(pairs.ravel(), threads=config.threads, progress=report)
    records = store.records
    coefficients = pair_coefficients(
        records["logp"],
        records["ref_logp"],
        pairs,
        lengths=records["length"],
        predicted=store.predicted,
        log_weights=records["log_weight"],
        config=config,
    )
    if weights is not None:
        coefficients *= weights[:, None]
    nonfinite = (records["flags"] & NONFINITE != 0)[pairs].any(axis=1)
    coefficients[nonfinite] = np.nan  # which tells them from pairs of zero gradients
    return PairGradients(store.rows, pairs, coefficients * store.scales[pairs])


def clustered(
    pairs: MeasuredPairs,
    config: SelectConfig,
    *,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> tuple[PairClusters, PairGradients]:
    """Clusters and scores pairs; returns their features, too: the gradients at unit length (NaN where unusable).

    Args:
        pairs: The pairs.
        config: As for :func:`bpo.cluster_pairs`.
        seed: Of the k-means++ seeding.
        store: Directory in which the features of several checkpoints are kept for as long.
        progress: Whether to show a progress bar.
    """
    with core_progress("Clusters", progress) as report:
        if config.checkpoints is not None:
            rates = list(config.checkpoints.values())
            return cluster_checkpoints(pairs.gradients, rates, config=config, store=store, seed=seed, progress=report)
        clusters = cluster_pairs(*pairs.gradients[0], config=config, seed=seed, progress=report)
    return clusters, unit_features(pairs.gradients[0], clusters.informativeness, clusters.usable)


def unit_features(
    gradients: PairGradients, norms: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_]
) -> PairGradients:
    """Returns gradients at unit length, NaN where they are not usable."""
    scale = np.full(len(norms), np.nan, dtype=np.float32)
    scale[usable] = 1 / norms[usable]
    return gradients._replace(coefficients=gradients.coefficients * scale[:, None])


def influence(
    features: PairGradients,
    usable: npt.NDArray[np.bool_],
    target: MeasuredPairs,
    subtask_of_pair: npt.NDArray[np.int64],
    config: SelectConfig,
) -> npt.NDArray[np.float32]:
    """Returns the influence of pairs on a target: the mean cosine with a subtask's pairs, the largest over subtasks.

    LESS's (arXiv 2402.04333), with gradients of pairs in place of SFT losses.

    Args:
        features: Of the P pairs, from :func:`clustered`.
        usable: (P,) bool.
        target: The pairs of the target, of the same stores.
        subtask_of_pair: (T,) int64, the subtask of each of them, from 0.
        config: Uses ``checkpoints`` and ``threads``.

    Returns:
        (P,) float32, NaN where not usable.

    Raises:
        ValueError: A subtask without a usable pair.
    """
    if config.checkpoints is not None:
        rows, norms = pair_features(target.gradients, list(config.checkpoints.values()), threads=config.threads)
        wanted = PairGradients.of_rows(rows)
        known = np.isfinite(norms)
    else:
        norms = pair_norms(target.gradients[0], config.threads)
        known = np.isfinite(norms) & (norms > 0)
        wanted = unit_features(target.gradients[0], norms, known)
    best = np.full(len(usable), np.nan, dtype=np.float32)
    index = np.flatnonzero(usable)
    for subtask in range(int(subtask_of_pair.max()) + 1):
        members = np.flatnonzero((subtask_of_pair == subtask) & known)
        if len(members) == 0:
            raise ValueError(f"No pair of subtask {subtask} of the target has a usable gradient.")
        weights, places = wanted.coefficients[members].astype(np.float64) / len(members), wanted.pairs[members]
        first, second = (weights[:, side] @ widened(wanted.rows[places[:, side]]) for side in (0, 1))
        mean = first + second
        scores = _core.score_pairs(
            features.rows,
            features.pairs[index],
            features.coefficients[index],
            mean[None].astype(np.float32),
            np.zeros(len(index), dtype=np.int32),
            direction=mean.astype(np.float32),
            threads=config.threads,
        )
        # The core takes the direction at unit length.
        best[index] = np.fmax(best[index], scores.alignment * np.float32(np.linalg.norm(mean)))
    return best


def prompts_agree(
    features: PairGradients, usable: npt.NDArray[np.bool_], prompt_of_pair: npt.NDArray[np.int64], seed: int
) -> float:
    """Tests whether the gradients of different prompts pull in a common direction.

    Where they do not, there is no optimization direction, and nothing chosen by it carries over to other prompts.
    A sign-flip test *(ours)*: the length of the sum over prompts of their gradients is compared with the lengths that
    the sum has if each prompt's sign is drawn at random.

    Args:
        features: Unit gradients of P pairs, from :func:`clustered`.
        usable: (P,) bool.
        prompt_of_pair: (P,) int64. Of more than 1,000 prompts, 1,000 are drawn.
        seed: Of the draws.

    Returns:
        The p-value, 1/1000 at least.
    """
    generator = np.random.default_rng(seed)
    prompts = np.unique(prompt_of_pair[usable])
    if len(prompts) > _TESTED_PROMPTS:
        prompts = np.sort(generator.choice(prompts, _TESTED_PROMPTS, replace=False))
    index = np.flatnonzero(usable & np.isin(prompt_of_pair, prompts))
    place = np.searchsorted(prompts, prompt_of_pair[index])
    rows, pairs = features.rows, features.pairs[index]
    sums = np.zeros((len(prompts), rows.shape[1]))
    for prompt in range(len(prompts)):
        members = np.flatnonzero(place == prompt)
        weights = features.coefficients[index[members]].astype(np.float64)
        for side in (0, 1):
            sums[prompt] += weights[:, side] @ widened(rows[pairs[members, side]])
    gram = sums @ sums.T
    signs = generator.choice(np.array([-1.0, 1.0]), (_SIGN_DRAWS - 1, len(prompts)))
    drawn = np.einsum("sp,sp->s", signs @ gram, signs)
    return float((1 + (drawn >= gram.sum()).sum()) / _SIGN_DRAWS)
