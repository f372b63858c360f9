"""The linear regime: DPO near the starting policy as logistic regression on the gradients of pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bpo.pairs.pair_gradients import pair_norms
from bpo.store.gradient_store import widened
from bpo.system.optional import import_scipy

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.pairs.pair_gradients import PairGradients
# Rows of the store that are multiplied with the fitted weights at a time.
_ROWS_AT_ONCE = 8192


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

    Raises:
        ImportError: SciPy is missing.
    """
    norms = pair_norms(training, None)
    usable = np.flatnonzero(np.isfinite(norms) & (norms > 0))
    weights = fit_direction(pulls(training.take(usable), norms[usable]), regularization)
    margins = np.nan_to_num(linear_margins(weights[None], heldout)[0])
    correct: npt.NDArray[np.float64] = (np.sign(margins).astype(np.float64) + 1) / 2
    return correct


def fit_direction(
    features: npt.NDArray[np.float32],
    regularization: float,
    pair_weights: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    """Fits Σ v log(1 + exp(−⟨w, x⟩)) + λ/2 ‖w‖² over the rows x with weights v; returns w, (d,)."""
    each = np.ones(len(features)) if pair_weights is None else pair_weights

    def objective(weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        margins = features @ weights.astype(np.float32)
        loss = float(each @ np.logaddexp(0, -margins.astype(np.float64)))
        pull = (each / (1 + np.exp(np.clip(margins, -60, 60)))).astype(np.float32)
        gradient = regularization * weights - (pull @ features).astype(np.float64)
        return loss + 0.5 * regularization * float(weights @ weights), gradient

    # ‖w‖ is at most √n/λ-ish and accuracies depend on its direction, so a loose tolerance is enough.
    minimize = import_scipy("optimize").minimize
    result = minimize(objective, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    weights: npt.NDArray[np.float64] = result.x
    return weights
