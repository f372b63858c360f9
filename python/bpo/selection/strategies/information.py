"""The pairs that tell most, by the posterior of the logistic model that DPO is near its start.

w has the prior N(0, I/λ), and a pair of unit gradient x with slope s = μ(1−μ), μ = σ(m) at its held-out margin m,
adds s·x xᵀ to the precision of the posterior (Laplace's approximation). λ is
``SelectConfig.regularization`` times mean s / d, as that of ``"d_optimal"`` *(ours)*. Labels play no part but by s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.pairs.linear import PairRegression, linear_margins, pulls
from bpo.pairs.size import INFORMATION_BYTES
from bpo.selection.strategies.taking import picked

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.pairs.pair_gradients import PairGradients
    from bpo.selection.strategies.candidacy import Candidacy, Choice

# Pairs whose prediction the others are to tell about: so many, or as few where they would take too much memory.
_MOST_TARGETS, _LEAST_TARGETS = 256, 16
# Pairs whose gain is computed at a time.
_PAIRS_AT_ONCE = 4096


def bald(candidacy: Candidacy) -> Choice:
    """The pairs that tell most of w, one after another (BALD, arXiv 1112.5745, by Laplace's approximation).

    Each turn takes the largest ½ log(1 + s xᵀΣx), Σ being the covariance after the pairs before; that is what it is
    ranked by. ``"d_optimal"`` is the same of gradients at their own length and at the policy as given.
    """
    assert candidacy.features is not None
    config = candidacy.config
    index = np.flatnonzero(candidacy.eligible)
    features, slopes = candidacy.features.take(index), _slopes(candidacy, index)
    picks, gains = _core.d_optimal(
        features.rows,
        features.pairs,
        (features.coefficients * np.sqrt(slopes)[:, None]).astype(np.float32),
        candidacy.budget,
        regularization=_prior(candidacy, slopes),
        prompts=candidacy.prompt_of_pair[index],
        max_depth=config.max_depth,
        threads=config.threads,
    )
    return picked(candidacy, index[picks], gains / 2)


def epig(candidacy: Candidacy) -> Choice:
    """The pairs that tell most of the predictions of others, one after another (EPIG, arXiv 2304.08151).

    Each turn takes the pair of the largest mean of −½ log(1 − ρ²), ρ being the correlation, after the pairs before, of
    the pair's label with a target's margin, in the Gaussian approximation where the label is the margin under noise
    of variance 1/s. Targets are the ``target``'s pairs, or the candidates; of more than 256, or fewer where the
    candidates are more than 65,536, so many are drawn *(ours)*.
    """
    assert candidacy.features is not None
    index = np.flatnonzero(candidacy.eligible)
    features, slopes = candidacy.features.take(index), _slopes(candidacy, index)
    prompts, most = candidacy.prompt_of_pair[index], candidacy.config.max_depth
    targets, prior = _targets(candidacy, features), _prior(candidacy, slopes)
    posterior = _Posterior(features, slopes, targets, prior, candidacy.budget, candidacy.config.threads)
    waiting, taken = np.ones(len(index), dtype=bool), np.zeros(int(prompts.max()) + 1, dtype=np.int64)
    picks: list[int] = []
    gains: list[float] = []
    while len(picks) < candidacy.budget and waiting.any():
        gain = np.where(waiting, posterior.gains(), -np.inf)
        best = int(gain.argmax())
        picks.append(best)
        gains.append(float(gain[best]))
        posterior.take(best)
        waiting[best] = False
        taken[prompts[best]] += 1
        if most is not None and taken[prompts[best]] == most:
            waiting &= prompts != prompts[best]
    return picked(candidacy, index[picks], np.array(gains))


class _Posterior:
    """Variances of the margins of P pairs and of T targets, and their covariances, as pairs are taken.

    Args:
        features: Unit gradients of the pairs.
        slopes: (P,) s.
        targets: (T, d) float32, x of the targets.
        prior: λ.
        most: Pairs that are taken at most.
        threads: Of the core.
    """

    def __init__(
        self,
        features: PairGradients,
        slopes: npt.NDArray[np.float64],
        targets: npt.NDArray[np.float32],
        prior: float,
        most: int,
        threads: int | None,
    ) -> None:
        self._features, self._targets, self._prior = features, targets.astype(np.float64), prior
        self._regression = PairRegression(features, None, threads)
        self._noise = 1 / slopes
        self._covariances = linear_margins(self._targets, features).T / np.float32(prior)
        self._variances = np.full(len(slopes), 1 / prior)
        self._of_targets = (self._targets**2).sum(axis=1) / prior
        # What was taken: Σ = I/λ − Σ u uᵀ.
        self._removed, self._taken = np.empty((most, targets.shape[1])), 0

    def gains(self) -> npt.NDArray[np.float64]:
        """What each pair's label would tell of the targets' margins, in nats, (P,)."""
        found = np.empty(len(self._variances))
        for at in range(0, len(found), _PAIRS_AT_ONCE):
            part = slice(at, at + _PAIRS_AT_ONCE)
            spread = (self._variances[part] + self._noise[part])[:, None] * self._of_targets
            # A pair that is a target itself, and without noise all but decides it: its correlation stays below 1.
            square = np.minimum(self._covariances[part].astype(np.float64) ** 2 / spread, 1 - 1e-12)
            found[part] = -0.5 * np.log1p(-square).mean(axis=1)
        return found

    def take(self, pair: int) -> None:
        """Conditions on the label of a pair."""
        x = pulls(self._features.take(np.array([pair])), np.float32(1))[0].astype(np.float64)
        removed = self._removed[: self._taken]
        toward = (x / self._prior - (removed @ x) @ removed) / np.sqrt(self._variances[pair] + self._noise[pair])
        self._removed[self._taken] = toward
        self._taken += 1
        of_pairs, of_targets = self._regression.margins(toward), self._targets @ toward
        self._variances = np.maximum(self._variances - of_pairs**2, 0)
        self._of_targets = np.maximum(self._of_targets - of_targets**2, np.finfo(np.float64).tiny)
        for at in range(0, len(of_pairs), _PAIRS_AT_ONCE):
            part = slice(at, at + _PAIRS_AT_ONCE)
            self._covariances[part] -= np.outer(of_pairs[part], of_targets).astype(np.float32)


def _slopes(candidacy: Candidacy, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The s of some pairs, (n,)."""
    assert candidacy.heldout_margins is not None
    # μ(1−μ) = 1 / (2 cosh(m/2))², as for d_optimal.
    slopes: npt.NDArray[np.float64] = 0.25 / np.cosh(np.minimum(np.abs(candidacy.heldout_margins[index]) / 2, 300)) ** 2
    return slopes


def _prior(candidacy: Candidacy, slopes: npt.NDArray[np.float64]) -> float:
    """λ."""
    assert candidacy.features is not None
    return float(candidacy.config.regularization * slopes.mean() / candidacy.features.rows.shape[1])


def _targets(candidacy: Candidacy, features: PairGradients) -> npt.NDArray[np.float32]:
    """The x of the pairs whose predictions count, (T, d)."""
    wanted = features if candidacy.target is None else candidacy.target
    most = max(_LEAST_TARGETS, min(_MOST_TARGETS, INFORMATION_BYTES // (4 * len(features.pairs))))
    index = np.arange(len(wanted.pairs))
    if len(index) > most:
        index = np.sort(np.random.default_rng(candidacy.seed).permutation(index)[:most])
    return pulls(wanted.take(index), np.float32(1))
