"""Log-probabilities to the two scalars by which a pair's gradient follows from those of its responses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bpo.config import SelectConfig

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.choices import FDivergence, LossType


# Pairs differentiated at a time: a temporary vector of them takes half a megabyte.
_PAIRS_AT_ONCE = 65536

# Exponentials stay in float64 up to here, with room for a few factors.
_LARGEST_EXPONENT = 700.0

# TRL cuts the exponent of the α-divergence here in float32, and with it the gradient.
_LARGEST_ALPHA_EXPONENT = 80.0


def pair_coefficients(
    logps: npt.NDArray[np.floating],
    ref_logps: npt.NDArray[np.floating],
    pairs: npt.NDArray[np.int64],
    *,
    lengths: npt.NDArray[np.integer] | None = None,
    predicted: npt.NDArray[np.integer] | None = None,
    log_weights: npt.NDArray[np.floating] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns the derivatives of a preference loss by the two log-probabilities of each pair.

    The losses of TRL's ``DPOTrainer`` depend on the model through log π(y_w|x) and log π(y_l|x) alone (but for those
    that sort a batch), so the gradient of a pair's loss ℓ is a·∇log π(y_w|x) + b·∇log π(y_l|x) with
    a = ∂ℓ/∂log π(y_w|x) and b = ∂ℓ/∂log π(y_l|x). For the sigmoid loss of DPO, −log σ(Δ) with
    Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)): a = −β σ(−Δ), b = +β σ(−Δ).

    a and b are the automatic derivatives of the formulas below, in float64: exact, for all pairs at once. The loss is
    that of a batch of one pair; TRL averages it over the pairs of a batch, but the ``sft`` loss over their tokens.

    Args:
        logps: (R,) log π(y|x) of each response, as in the records of a :class:`bpo.GradientStore`.
        ref_logps: (R,) log π_ref(y|x).
        pairs: (P, 2) rows of the preferred and of the other response.
        lengths: (R,) tokens of each response; needed by ``"ipo"`` and ``"sigmoid_norm"``.
        predicted: (R,) those over which log π(y|x) sums; needed by ``"sft"``. One fewer than ``lengths`` where nothing
            stands before the response; by default, ``lengths``.
        log_weights: (R,) mean over the predicted tokens of log π − log Σ_v π_v²; needed by ``use_weighting``.
        config: Uses ``loss_type``, ``loss_weights``, ``beta``, ``label_smoothing``, ``f_divergence_type``,
            ``f_alpha_divergence_coef``, ``discopop_tau`` and ``use_weighting``.

    Returns:
        (P, 2) float32, the columns a and b. Infinite or NaN where the true value is beyond float32 or an argument is
        not finite; :func:`bpo.select` sets such pairs aside and names them. Where TRL's float32 overflows on the way
        to a value that is finite (``"discopop"`` with Δ far below 0), this is that value.

    Raises:
        ValueError: The loss needs an argument that is not given, or is one that :class:`bpo.SelectConfig` refuses.

    Example:
        >>> import numpy as np
        >>> logps, ref_logps, pairs = np.array([-5.0, -9.0]), np.array([-6.0, -7.0]), np.array([[0, 1]])
        >>> pair_coefficients(logps, ref_logps, pairs).round(3).tolist()[0]  # DPO
        [-0.0430..., 0.0430...]
        >>> mixture = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}
        >>> pair_coefficients(logps, ref_logps, pairs, lengths=np.array([4, 5]), config=mixture).round(3).tolist()[0]
        [-0.0839..., 0.0340...]
    """
    config = SelectConfig.of(config)
    names = {name for name, _ in config.weighted_losses}
    predicted = lengths if predicted is None else predicted
    for name, values, needed_by in (
        ("lengths", lengths, names & {"ipo", "sigmoid_norm"}),
        ("predicted (or lengths)", predicted, names & {"sft"}),
        ("log_weights", log_weights, {"use_weighting"} if config.use_weighting else set()),
    ):
        if values is None and needed_by:
            raise ValueError(f"pair_coefficients needs {name} for {', '.join(sorted(needed_by))}")

    coefficients = np.empty((len(pairs), 2), dtype=np.float32)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        block = pairs[start : start + _PAIRS_AT_ONCE]

        def gather(values: npt.NDArray[Any] | None, block: npt.NDArray[np.int64] = block) -> Tensor:
            """(n, 2) float64; zeros for what the loss does not use."""
            return torch.from_numpy(np.zeros(block.shape) if values is None else values[block].astype(np.float64))

        with torch.enable_grad():
            leaf = gather(logps).requires_grad_(True)
            ratios = leaf - gather(ref_logps)
            scores = _SCORES[config.f_divergence_type](ratios, config.f_alpha_divergence_coef)
            batch = _Pairs(leaf, ratios, scores, gather(lengths), gather(predicted))
            loss = _total(batch, gather(log_weights), config)
            (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        coefficients[start : start + len(block)] = gradient.float().numpy()
    return coefficients


def batch_losses(
    logps: Tensor,
    ref_logps: Tensor,
    *,
    lengths: Tensor,
    predicted: Tensor,
    log_weights: Tensor,
    sft_logps: Tensor,
    config: SelectConfig,
) -> Tensor:
    """Returns the loss of each pair of a batch, such that their mean is TRL's loss of the batch.

    Args:
        logps: (n, 2) log π(y|x), chosen and rejected in the columns.
        ref_logps: (n, 2) log π_ref(y|x).
        lengths: (n, 2) tokens of the responses.
        predicted: (n, 2) tokens that ``logps`` sums over.
        log_weights: (n, 2) as in :func:`pair_coefficients`; anything without ``use_weighting``.
        sft_logps: (n, 2) what the ``sft`` loss is of: log π(y|x) where ``logps`` weighs tokens (TRL's ``ld_alpha``).
        config: As in :func:`pair_coefficients`.

    Returns:
        (n,) float64, not differentiable.
    """
    with torch.no_grad():
        given = (logps, ref_logps, lengths, predicted, log_weights, sft_logps)
        logps, ref_logps, lengths, predicted, log_weights, sft_logps = (values.double() for values in given)
        ratios = logps - ref_logps
        scores = _SCORES[config.f_divergence_type](ratios, config.f_alpha_divergence_coef)
        # TRL averages the sft loss over the tokens of the batch.
        predicted = predicted.mean(dim=0, keepdim=True).expand_as(predicted)
        return _total(_Pairs(sft_logps, ratios, scores, lengths, predicted), log_weights, config)


def _total(batch: _Pairs, log_weights: Tensor, config: SelectConfig) -> Tensor:
    """(n,) sum of all losses of a configuration."""
    parts = [weight * _LOSSES[name](batch, config) for name, weight in config.weighted_losses]
    loss = torch.stack(parts).sum(dim=0)
    if config.use_weighting:
        # WPO (arXiv 2406.11827, eq. 2): a constant, the product of the two responses' weights.
        loss = loss * torch.exp(log_weights.sum(dim=1))
    return loss


@dataclasses.dataclass(frozen=True)
class _Pairs:
    """What the loss of n pairs depends on: (n, 2) float64, chosen and rejected in the columns.

    Attributes:
        logps: log π(y|x).
        ratios: log π(y|x) − log π_ref(y|x).
        scores: f′(π/π_ref) of the chosen divergence, the rewards over β; for reverse KL equal to ``ratios``.
        lengths: Tokens of the response.
        predicted: Tokens of the response that ``logps`` sums over.
    """

    logps: Tensor
    ratios: Tensor
    scores: Tensor
    lengths: Tensor
    predicted: Tensor

    @property
    def margin(self) -> Tensor:
        """(n,) difference of the two scores."""
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def token_margin(self) -> Tensor:
        """(n,) difference of the two scores a token."""
        scores = self.scores / self.lengths
        return scores[:, 0] - scores[:, 1]


def _exp(x: Tensor) -> Tensor:
    """Exponential that ends in a huge number with a huge derivative, since ∞ times a factor of 0 would be NaN."""
    return torch.exp(x - (x - _LARGEST_EXPONENT).clamp(min=0).detach())


# Scores: f′(t) of an f-divergence at t = π/π_ref, up to a constant (f-DPO, arXiv 2309.16240).


def _reverse_kl(ratios: Tensor, _: float) -> Tensor:
    """Log t, DPO's own."""
    return ratios


def _forward_kl(ratios: Tensor, _: float) -> Tensor:
    """1 − 1/t."""
    return 1 - _exp(-ratios)


def _js_divergence(ratios: Tensor, _: float) -> Tensor:
    """Log of 2t/(t + 1)."""
    return math.log(2) + F.logsigmoid(ratios)


def _alpha_divergence(ratios: Tensor, alpha: float) -> Tensor:
    """(t^(α−1) − 1)/(α − 1), as TRL has it: cut where the exponent is above 80; its limit at α = 1 is log t."""
    if alpha == 1:
        return ratios
    return torch.expm1(((alpha - 1) * ratios).clamp(max=_LARGEST_ALPHA_EXPONENT)) / (alpha - 1)


_SCORES: dict[FDivergence, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


# Losses: (n,) each, in TRL's parametrisation.


def _sigmoid(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(config.beta * pairs.margin)


def _hinge(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425, with a reference as in RSO, arXiv 2309.06657)."""
    return F.relu(1 - config.beta * pairs.margin)


def _ipo(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17) on log-ratios a token; β is its τ."""
    return (pairs.token_margin - 1 / (2 * config.beta)) ** 2


def _exo_pair(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """EXO (arXiv 2402.00856, eq. 16): KL of the policy's preference from the one smoothed by ε."""
    logits = config.beta * pairs.margin
    smoothing = config.label_smoothing
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))
    return chosen + rejected


def _nca_pair(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """NCA for two responses (arXiv 2402.05369).

    It is also MIO (arXiv 2506.22578) for a pair: the Jensen–Shannon bound of the mutual information, −E softplus(−T)
    − E softplus(T) with T = β log π/π_ref, whose first mean is over preferred responses and whose second is over what
    the base model says, one half preferred and one half not. So say others' notes of the paper, which was not at hand.
    """
    rewards = config.beta * pairs.ratios
    return -F.logsigmoid(rewards[:, 0]) - 0.5 * F.logsigmoid(-rewards).sum(dim=1)


def _robust(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """Robust DPO (arXiv 2403.00409): unbiased under preferences flipped with probability ε."""
    logits = config.beta * pairs.margin
    smoothing = config.label_smoothing
    right, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - smoothing) * right - smoothing * flipped) / (1 - 2 * smoothing)


def _bco_pair(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """BCO (arXiv 2404.04656) without its reward shift, as TRL has it for pairs."""
    rewards = config.beta * pairs.ratios
    return -F.logsigmoid(rewards[:, 0]) - F.logsigmoid(-rewards[:, 1])


def _sppo_hard(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) with a probability of 1 that the chosen one wins; β is its 1/η."""
    half = 0.5 / config.beta
    return (pairs.ratios[:, 0] - half) ** 2 + (pairs.ratios[:, 1] + half) ** 2


def _apo_zero(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7)."""
    rewards = config.beta * pairs.ratios
    return torch.sigmoid(-rewards[:, 0]) + torch.sigmoid(rewards[:, 1])


def _apo_down(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8)."""
    rewards = config.beta * pairs.ratios
    return torch.sigmoid(rewards[:, 0]) + torch.sigmoid(rewards[:, 1] - rewards[:, 0])


def _discopop(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): logistic and exponential loss, mixed by σ(Δ/τ)."""
    logits = config.beta * pairs.margin
    mixing = logits / config.discopop_tau
    # exp(−Δ)·σ(Δ/τ) in one exponential: its factors overflow and vanish together where Δ is far below 0.
    return -F.logsigmoid(logits) * torch.sigmoid(-mixing) + _exp(F.logsigmoid(mixing) - logits)


def _sft(pairs: _Pairs, _: SelectConfig) -> Tensor:
    """Negative log-likelihood of the chosen response, a token (as in MPO, arXiv 2411.10442)."""
    return -pairs.logps[:, 0] / pairs.predicted[:, 0]


def _sigmoid_norm(pairs: _Pairs, config: SelectConfig) -> Tensor:
    """DPO on log-ratios a token (Tülu 3, arXiv 2411.15124)."""
    return -F.logsigmoid(config.beta * pairs.token_margin)


_LOSSES: dict[LossType, Callable[[_Pairs, SelectConfig], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}
