"""Log-probabilities to the two scalars by which a pair's gradient follows from those of its responses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import LossType


def pair_coefficients(
    log_ratios: npt.NDArray[np.floating],
    pairs: npt.NDArray[np.int64],
    *,
    loss_type: LossType = "sigmoid",
    beta: float = 0.1,
) -> npt.NDArray[np.float32]:
    """Returns the derivatives of a preference loss by the two log-probabilities of each pair.

    A margin loss ℓ depends on the model through log π(y_w|x) and log π(y_l|x) alone, so its gradient is
    a·∇log π(y_w|x) + b·∇log π(y_l|x) with a = ∂ℓ/∂log π(y_w|x) and b = ∂ℓ/∂log π(y_l|x). For the sigmoid loss of DPO
    (Rafailov et al. 2023, arXiv 2305.18290, section 4), −log σ(Δ) with the implicit-reward margin
    Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)): a = −β σ(−Δ), b = +β σ(−Δ).

    Args:
        log_ratios: (R,) log π(y|x) − log π_ref(y|x) of each response.
        pairs: (P, 2) rows of the preferred and of the other response.
        loss_type: TRL's name of the loss.
        beta: β of the loss.

    Returns:
        (P, 2) float32, the columns a and b.

    Raises:
        ValueError: A loss that is not supported.

    Example:
        >>> pair_coefficients(np.zeros(2), np.array([[0, 1]]), beta=0.1).round(3).tolist()
        [[-0.05000000074505806, 0.05000000074505806]]
    """
    if loss_type != "sigmoid":
        raise ValueError(f"loss_type {loss_type!r} is not supported; use 'sigmoid'")
    margins = beta * (log_ratios[pairs[:, 0]] - log_ratios[pairs[:, 1]]).astype(np.float64)
    # σ(−Δ) = exp(−log(1 + exp(Δ))), without overflow for large |Δ|.
    weights = beta * np.exp(-np.logaddexp(0.0, margins))
    return np.stack([-weights, weights], axis=1).astype(np.float32)
