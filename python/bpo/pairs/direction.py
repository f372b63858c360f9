"""Where gradients point: the influence of pairs on a target, and whether prompts pull in a common direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.pairs.checkpoints import pair_features
from bpo.pairs.pair_gradients import PairGradients, pair_norms, unit_features
from bpo.store.gradient_store import widened

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.pairs.measured import MeasuredPairs
    from bpo.world.shares import Shares

_TESTED_PROMPTS = 1000
_SIGN_DRAWS = 1000
_ROWS_AT_ONCE = 256


def target_features(target: MeasuredPairs, config: SelectConfig) -> tuple[PairGradients, npt.NDArray[np.bool_]]:
    """Returns the unit gradients of a target's T pairs, as those of the candidates are, and which are usable, (T,)."""
    if config.checkpoints is not None:
        rows, norms = pair_features(target.gradients, list(config.checkpoints.values()), threads=config.threads)
        return PairGradients.of_rows(rows), np.isfinite(norms)
    norms = pair_norms(target.gradients[0], config.threads)
    known = np.isfinite(norms) & (norms > 0)
    return unit_features(target.gradients[0], norms, known), known


def influence(
    features: PairGradients,
    usable: npt.NDArray[np.bool_],
    target: PairGradients,
    known: npt.NDArray[np.bool_],
    subtask_of_pair: npt.NDArray[np.int64],
    config: SelectConfig,
    shares: Shares | None = None,
) -> npt.NDArray[np.float32]:
    """Returns the influence of pairs on a target: the mean cosine with a subtask's pairs, the largest over subtasks.

    LESS's (arXiv 2402.04333), with gradients of pairs in place of SFT losses.

    Args:
        features: Of the P pairs, those that they are clustered by.
        usable: (P,) bool.
        target: Unit gradients of the T pairs of the target.
        known: (T,) bool, which of them are usable.
        subtask_of_pair: (T,) int64, the subtask of each of them, from 0.
        config: Uses ``threads``.
        shares: The processes that share the P pairs; all read the target.

    Returns:
        (P,) float32, NaN where not usable.

    Raises:
        ValueError: A subtask without a usable pair.
    """
    best = np.full(len(usable), np.nan, dtype=np.float32)
    index = np.flatnonzero(usable)
    for subtask in range(int(subtask_of_pair.max()) + 1):
        members = np.flatnonzero((subtask_of_pair == subtask) & known)
        if len(members) == 0:
            raise ValueError(f"No pair of subtask {subtask} of the target has a usable gradient.")
        mean = _sum(target.take(members)) / len(members)
        scores = _core.score_pairs(
            features.rows,
            features.pairs[index],
            features.coefficients[index],
            mean[None].astype(np.float32),
            np.zeros(len(index), dtype=np.int32),
            direction=mean.astype(np.float32),
            threads=config.threads,
            processes=shares,
        )
        # The core takes the direction at unit length.
        best[index] = np.fmax(best[index], scores.alignment * np.float32(np.linalg.norm(mean)))
    return best


def _sum(gradients: PairGradients) -> npt.NDArray[np.float64]:
    """Returns the sum of the gradients of pairs, (d,); rows are widened once each, some at a time."""
    rows, place = np.unique(gradients.pairs, return_inverse=True)
    weights = np.bincount(place.ravel(), gradients.coefficients.astype(np.float64).ravel())
    total = np.zeros(gradients.rows.shape[1])
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        total += weights[part] @ widened(gradients.rows[rows[part]])
    return total


def prompts_agree(
    features: PairGradients,
    usable: npt.NDArray[np.bool_],
    prompt_of_pair: npt.NDArray[np.int64],
    seed: int,
    shares: Shares | None = None,
) -> float:
    """Tests whether the gradients of different prompts pull in a common direction.

    Where they do not, there is no optimization direction, and nothing chosen by it carries over to other prompts.
    A sign-flip test *(ours)*: the length of the sum over prompts of their gradients is compared with the lengths that
    the sum has if each prompt's sign is drawn at random.

    Args:
        features: Unit gradients of P pairs, those that they are clustered by.
        usable: (P,) bool.
        prompt_of_pair: (P,) int64. Of more than 1,000 prompts, 1,000 are drawn.
        seed: Of the draws.
        shares: The processes that share the prompts.

    Returns:
        The p-value, 1/1000 at least.
    """
    generator = np.random.default_rng(seed)
    prompts = np.unique(prompt_of_pair[usable])
    if len(prompts) > _TESTED_PROMPTS:
        prompts = np.sort(generator.choice(prompts, _TESTED_PROMPTS, replace=False))
    index = np.flatnonzero(usable & np.isin(prompt_of_pair, prompts))
    place = np.searchsorted(prompts, prompt_of_pair[index])
    own = range(len(prompts)) if shares is None else range(len(prompts))[shares.part(len(prompts))]
    sums = np.zeros((len(own), features.rows.shape[1]))
    for row, prompt in enumerate(own):
        sums[row] = _sum(features.take(index[place == prompt]))
    sums = sums if shares is None else shares.concatenated(sums)
    gram = sums @ sums.T
    signs = generator.choice(np.array([-1.0, 1.0]), (_SIGN_DRAWS - 1, len(prompts)))
    drawn = np.einsum("sp,sp->s", signs @ gram, signs)
    return float((1 + (drawn >= gram.sum()).sum()) / _SIGN_DRAWS)
