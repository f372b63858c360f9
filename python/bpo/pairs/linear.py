"""The linear regime: DPO near the starting policy as logistic regression on the gradients of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core
from bpo.pairs.pair_gradients import pair_norms
from bpo.store.gradient_store import widened

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from bpo.pairs.pair_gradients import PairGradients
    from bpo.world.shares import Shares
# Rows of the store that are multiplied with the fitted weights at a time.
_ROWS_AT_ONCE = 8192
# Among which the penalty is chosen: the largest first, whose fit is where the next one starts.
_PENALTIES = (1000.0, 100.0, 10.0, 1.0)
_FOLDS = 5
N_FITS = (_FOLDS - 1) * len(_PENALTIES)
"""Fits of all the pairs that the penalty is chosen by, together: each fold leaves one part out."""
VALIDATED_PAIRS = 20_000
"""Pairs that the penalty is chosen by; it is a property of the gradients, not of how many there are."""


def pulls(gradients: PairGradients, scale: npt.NDArray[np.float32] | np.float32) -> npt.NDArray[np.float32]:
    """What training on pairs pulls towards, (n, d): −z divided by a scale."""
    rows, pairs, coefficients = gradients
    signed = (-coefficients / np.reshape(scale, (-1, 1))).astype(np.float32)
    first, second = (signed[:, [side]] * widened(rows[pairs[:, side]]) for side in (0, 1))
    features: npt.NDArray[np.float32] = first + second
    return features


def linear_margins(weights: npt.NDArray[np.float64], gradients: PairGradients) -> npt.NDArray[np.float32]:
    """⟨w, −z⟩ of pairs for each of several weights (W, d): (W, n)."""
    rows, pairs, coefficients = gradients
    used, places = np.unique(pairs, return_inverse=True)
    products = np.empty((len(weights), len(used)), dtype=np.float32)
    columns = np.ascontiguousarray(weights.T, dtype=np.float32)
    for at in range(0, len(used), _ROWS_AT_ONCE):
        products[:, at : at + _ROWS_AT_ONCE] = (widened(rows[used[at : at + _ROWS_AT_ONCE]]) @ columns).T
    places = places.reshape(pairs.shape)
    first, second = (coefficients[:, side] * products[:, places[:, side]] for side in (0, 1))
    margins: npt.NDArray[np.float32] = -(first + second)
    return margins


def linearised_correct(
    training: PairGradients, heldout: PairGradients, *, regularization: float = 1.0
) -> npt.NDArray[np.float64]:
    """Says which held-out pairs the linearised regime would rank rightly after training on some pairs.

    As :func:`bpo.preview` does it: a logistic regression on the unit gradients of the training pairs.

    Args:
        training: Gradients of the pairs trained on; unusable ones play no part.
        heldout: Gradients of the held-out pairs, of the same store.
        regularization: As of :func:`bpo.preview`.

    Returns:
        (P,) float64, 1, 0, or ½ for a tie or an unusable pair.
    """
    norms = pair_norms(training, None)
    usable = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    weights = fit_direction(pulls(training.take(usable), norms[usable]), regularization)
    margins = np.nan_to_num(linear_margins(weights[None], heldout)[0])
    correct: npt.NDArray[np.float64] = (np.sign(margins).astype(np.float64) + 1) / 2
    return correct


def training_direction(
    features: PairGradients,
    prompt_of_pair: npt.NDArray[np.int64],
    seed: int,
    shares: Shares | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.float64]:
    """Returns where training on all of some pairs leads in the linear regime *(ours)*.

    That is the solution w of the logistic regression Σ log(1 + exp(⟨w, ẑ⟩)) + λ/2 ‖w‖² on the unit gradients ẑ of the
    pairs, what DPO is near its start; λ is the one of 1000, 100, 10 and 1 that ranks most pairs of prompts that were
    left out rightly, in five folds, the largest of several. Likelihood in place of accuracy would choose by how sure
    the margins are, and where labels are wrong by how well they are learned by heart.

    Args:
        features: Unit gradients of n ≥ 1 pairs, all finite.
        prompt_of_pair: (n,) int64. Folds keep prompts together; of very many pairs the prompts of about 20,000 are
            drawn.
        seed: Of the folds.
        shares: The processes that share the rows.
        threads: Of the core; None is all cores.

    Returns:
        (d,) float64.
    """
    penalty = _penalty(features, prompt_of_pair, seed, shares, threads)
    return PairRegression(features, shares, threads).fit(penalty)


def cross_fitted_margins(
    features: PairGradients,
    prompt_of_pair: npt.NDArray[np.int64],
    seed: int,
    shares: Shares | None = None,
    threads: int | None = None,
) -> npt.NDArray[np.float64]:
    """Returns ⟨w, −ẑ⟩ of each pair, w being fitted to the pairs of the other prompts of five folds *(ours)*.

    What training on the rest of the data makes of a pair: positive where it would be ranked as it is labelled. The
    fits are those of :func:`training_direction`, with its λ.

    Args:
        features: Unit gradients of n pairs, all finite.
        prompt_of_pair: (n,) int64, of two prompts or more.
        seed: Of the folds.
        shares: The processes that share the rows.
        threads: Of the core; None is all cores.

    Returns:
        (n,) float64.

    Raises:
        ValueError: All pairs are of one prompt.
    """
    folds = _folds(prompt_of_pair, seed)
    if folds.max(initial=0) == 0:
        raise ValueError("Margins of left-out prompts need pairs of two prompts at least, and these are all of one.")
    penalty = _penalty(features, prompt_of_pair, seed, shares, threads)
    regression, margins = PairRegression(features, shares, threads), np.empty(len(folds))
    weights: npt.NDArray[np.float64] | None = None
    for left_out in range(int(folds.max()) + 1):
        weights = regression.fit(penalty, start=weights, among=folds != left_out)
        margins[folds == left_out] = regression.margins(weights)[folds == left_out]
    return margins


def _folds(prompt_of_pair: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The fold of each pair, whole prompts together: prompts in a random order, dealt out in turn."""
    order = _order(prompt_of_pair, seed)
    return order % min(_FOLDS, int(order.max()) + 1)


def _order(prompt_of_pair: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The place of each pair's prompt, from 0 on, in a random order of the prompts."""
    prompts, place = np.unique(prompt_of_pair, return_inverse=True)
    order: npt.NDArray[np.int64] = np.random.default_rng(seed).permutation(len(prompts))[place]
    return order


def _penalty(
    features: PairGradients,
    prompt_of_pair: npt.NDArray[np.int64],
    seed: int,
    shares: Shares | None,
    threads: int | None,
) -> float:
    """The penalty that ranks most pairs of left-out prompts rightly; the largest where one prompt is all there is."""
    order = _order(prompt_of_pair, seed)
    n_folds = min(_FOLDS, int(order.max()) + 1)
    if n_folds == 1:
        return _PENALTIES[0]
    n_drawn = max(_FOLDS, int(np.searchsorted(np.cumsum(np.bincount(order)), VALIDATED_PAIRS, side="right")))
    drawn: npt.NDArray[np.bool_] = order < n_drawn
    regression = PairRegression(features.take(np.flatnonzero(drawn)), shares, threads)
    fold = order[drawn] % n_folds
    right = []
    fitted: list[npt.NDArray[np.float64] | None] = [None] * n_folds
    for penalty in _PENALTIES:
        n_right = 0
        for left_out in range(n_folds):
            weights = fitted[left_out] = regression.fit(penalty, start=fitted[left_out], among=fold != left_out)
            n_right += int((regression.margins(weights)[fold == left_out] > 0).sum())
        right.append(n_right)
    return _PENALTIES[int(np.argmax(right))]


def fit_direction(
    features: npt.NDArray[np.float32],
    regularization: float,
    pair_weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    """Fits Σ v log(1 + exp(−⟨w, x⟩)) + λ/2 ‖w‖² over the rows x with weights v; returns w, (d,)."""
    each = np.ones(len(features)) if pair_weights is None else pair_weights
    return _fit(
        lambda weights: features @ weights.astype(np.float32),
        lambda pull: (pull.astype(np.float32) @ features).astype(np.float64),
        each,
        np.zeros(features.shape[1]),
        regularization,
    )


class PairRegression:
    """The same fit over pairs whose gradients are never formed: a pass reads the rows of the responses, twice.

    Args:
        features: The unit gradients z of n pairs, all finite; what is fitted is x = −z.
        shares: The processes that share the rows, a range of the used ones each; what is added up over all of them is
            so part by part, and in the order of the parts.
        threads: Of the core; None is all cores. Results do not depend on it.
    """

    def __init__(self, features: PairGradients, shares: Shares | None = None, threads: int | None = None) -> None:
        self._rows = features.rows
        self._shares = shares
        self._threads = threads
        self._used, places = np.unique(features.pairs, return_inverse=True)
        self._places = places.reshape(features.pairs.shape)
        self._coefficients = -features.coefficients.astype(np.float64)

    def fit(
        self,
        regularization: float,
        *,
        start: npt.NDArray[np.float64] | None = None,
        among: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.float64]:
        """Returns w, (d,), fitted to all pairs or to those of a (n,) bool, from a start on."""
        each = np.ones(len(self._places)) if among is None else among.astype(np.float64)
        begin = np.zeros(self._rows.shape[1]) if start is None else start
        return _fit(self.margins, self._transposed, each, begin, regularization, self._shares)

    def margins(self, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """⟨w, x⟩ of each pair, (n,)."""
        products = [
            _core.row_products(self._rows, self._used[part], weights, threads=self._threads) for part in self._parts
        ]
        margins: npt.NDArray[np.float64] = (self._coefficients * self._of_all(products, ())[self._places]).sum(axis=1)
        return margins

    def _transposed(self, pull: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Σ p·x over the pairs, (d,)."""
        weights = (self._coefficients * pull[:, None]).ravel()
        of_row = np.bincount(self._places.ravel(), weights, len(self._used)).astype(np.float64, copy=False)
        sums = [
            _core.row_sum(self._rows, self._used[part], of_row[part], threads=self._threads)[None]
            for part in self._parts
        ]
        total = np.zeros(self._rows.shape[1])
        for own in self._of_all(sums, total.shape):
            total += own
        return total

    @property
    def _parts(self) -> list[slice]:
        """The parts of this process."""
        every = range(0, len(self._used), _ROWS_AT_ONCE)
        own = every if self._shares is None else every[self._shares.part(len(every))]
        return [slice(at, at + _ROWS_AT_ONCE) for at in own]

    def _of_all(self, parts: list[npt.NDArray[np.float64]], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
        """Puts parts of this process and of the others, (n, *shape) each, one after the other."""
        own = np.concatenate([np.empty((0, *shape)), *parts])
        return own if self._shares is None else self._shares.concatenated(own)


def _fit(
    margins_of: Callable[[npt.NDArray[np.float64]], npt.NDArray[Any]],
    sum_of: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
    each: npt.NDArray[np.float64],
    start: npt.NDArray[np.float64],
    regularization: float,
    shares: Shares | None = None,
) -> npt.NDArray[np.float64]:
    def objective(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        margins = margins_of(weights)
        loss = float(each @ np.logaddexp(0, -margins.astype(np.float64)))
        pull = each / (1 + np.exp(np.clip(margins, -60, 60)))
        return loss + 0.5 * regularization * float(weights @ weights), regularization * weights - sum_of(pull)

    # ‖w‖ is at most √n/λ-ish and accuracies depend on its direction, so a loose tolerance is enough.
    def search(evaluate: Callable[[npt.NDArray[np.float64]], Any]) -> npt.NDArray[np.float64]:
        from scipy.optimize import minimize

        found: npt.NDArray[np.float64] = minimize(
            evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}
        ).x
        return found

    # One process searches for all: where the numbers of others differed by a bit, they would not stop together.
    return search(objective) if shares is None else shares.led(search, objective)
