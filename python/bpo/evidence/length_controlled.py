"""Accuracies and win rates with the effect of length balanced out."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from bpo.evidence.statistics import clustered_standard_error

if TYPE_CHECKING:
    import numpy.typing as npt


def length_controlled_accuracy(
    correct: npt.ArrayLike, length_differences: npt.ArrayLike, *, clusters: npt.ArrayLike | None = None
) -> tuple[float, float]:
    """Accuracy with the length effect balanced out *(ours)*.

    The mean of two accuracies: on the pairs whose preferred response is longer, and on those whose preferred response
    is shorter. Pairs of equal length are in neither.

    Args:
        correct: (P,) whether the preferred response was ranked first: 1, 0, or ½ for a tie.
        length_differences: (P,) length of the preferred response less that of the other.
        clusters: (P,) such as the prompt of each pair; observations are independent between clusters only. ``None``
            takes each pair by itself.

    Returns:
        The accuracy and its standard error (Liang & Zeger 1986); both NaN where one of the two kinds has no pair.

    Raises:
        ValueError: Arrays of unequal length, or values that are not finite.

    Example:
        >>> correct, differences = [1, 1, 1, 0, 0, 1], [5, 9, 2, -3, -1, -4]
        >>> length_controlled_accuracy(correct, differences)[0]  # (3/3 + 1/3) / 2, where 4 of 6 are correct
        0.6666666666666666
    """
    correct, differences, clusters = _aligned("correct", correct, length_differences, clusters)
    groups = [differences > 0, differences < 0]
    if not all(group.any() for group in groups):
        return float("nan"), float("nan")
    influence = np.zeros(len(correct))
    means = []
    for group in groups:
        means.append(correct[group].mean())
        influence[group] = (correct[group] - means[-1]) / group.sum() / 2
    return float(np.mean(means)), float(np.sqrt((np.bincount(clusters, weights=influence) ** 2).sum()))


@dataclasses.dataclass(frozen=True)
class WinRate:
    """How often one policy beats another, with and without the length effect.

    Attributes:
        win_rate: Length-controlled, in [0, 1].
        standard_error: Of ``win_rate``.
        raw_win_rate: Mean of the wins.
        raw_standard_error: Of ``raw_win_rate``.
        length_effect: φ, by how much the log-odds of a win grow with the tanh of the standardised length difference.
    """

    win_rate: float
    standard_error: float
    raw_win_rate: float
    raw_standard_error: float
    length_effect: float


def length_controlled_win_rate(
    wins: npt.ArrayLike,
    length_differences: npt.ArrayLike,
    *,
    clusters: npt.ArrayLike | None = None,
    penalty: float = 0.01,
) -> WinRate:
    """The win rate that is expected of responses as long as those of the other policy.

    Logistic regression of the wins, P(win) = σ(θ + φ tanh(Δ / sd(Δ))) with Δ the length difference, read at Δ = 0:
    σ(θ). That is length-controlled AlpacaEval (arXiv 2404.04475) without its term for the difficulty of an instruction,
    which needs other policies' results on the same prompts; the ridge on φ is *(ours)*, where AlpacaEval picks one by
    cross-validation.

    Args:
        wins: (N,) 1 for a win, 0 for a loss, ½ for a tie; probabilities will do, too.
        length_differences: (N,) length of the policy's response less that of the other's, in tokens or characters.
        clusters: (N,) such as the prompt of each comparison, where one has several. ``None`` takes each by itself.
        penalty: λ of the term ½λφ² that keeps φ finite where the longer response wins every time.

    Returns:
        The win rates, with standard errors clustered by ``clusters`` (of ``win_rate`` by the delta method).
        ``win_rate`` and ``length_effect`` are NaN where all differences are the same but not zero, so that length and
        quality cannot be told apart. If all comparisons are won, or all lost, so they are at equal length, and
        ``length_effect`` is NaN.

    Raises:
        ValueError: No comparison, arrays of unequal length, values that are not finite, or wins outside [0, 1].

    Example:
        >>> wins, differences = [1, 1, 1, 0, 1, 0, 0, 1], [40, 55, 30, 10, -5, -20, -35, 60]
        >>> rate = length_controlled_win_rate(wins, differences)
        >>> rate.raw_win_rate, round(rate.win_rate, 2)
        (0.625, 0.48)
    """
    wins, differences, clusters = _aligned("wins", wins, length_differences, clusters)
    if len(wins) == 0 or wins.min() < 0 or wins.max() > 1:
        raise ValueError("wins must be at least one number, each from 0 to 1.")
    raw, raw_error = float(wins.mean()), clustered_standard_error(wins, clusters)
    if raw in (0.0, 1.0):
        return WinRate(raw, 0.0, raw, raw_error, float("nan"))
    if np.ptp(differences) == 0:
        if differences[0] != 0:
            return WinRate(float("nan"), float("nan"), raw, raw_error, float("nan"))
        return WinRate(raw, raw_error, raw, raw_error, 0.0)
    design = np.stack([np.ones(len(wins)), np.tanh(differences / differences.std())], axis=1)
    parameters = _logistic_regression(design, wins, np.array([0.0, penalty]))
    probabilities = _sigmoid(design @ parameters)
    hessian = _logistic_hessian(design, probabilities, np.array([0.0, penalty]))
    scores = design * (wins - probabilities)[:, None]
    sums = np.stack([np.bincount(clusters, weights=column) for column in scores.T], axis=1)
    inverse = np.linalg.inv(hessian)
    variance = (inverse @ (sums.T @ sums) @ inverse)[0, 0]
    rate = float(_sigmoid(parameters[0]))
    return WinRate(rate, float(rate * (1 - rate) * np.sqrt(variance)), raw, raw_error, float(parameters[1]))


def _logistic_regression(
    design: npt.NDArray[np.float64], targets: npt.NDArray[np.float64], penalties: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Fits a logistic regression by Newton's method with halved steps.

    Args:
        design: (N, q).
        targets: (N,) in [0, 1].
        penalties: (q,) of half the square of each parameter.

    Returns:
        (q,) parameters.
    """

    def loss(parameters: npt.NDArray[np.float64]) -> float:
        logits = design @ parameters
        return float((np.logaddexp(0, logits) - targets * logits).sum() + (penalties * parameters**2).sum() / 2)

    parameters = np.zeros(design.shape[1])
    current = loss(parameters)
    for _ in range(100):
        probabilities = _sigmoid(design @ parameters)
        gradient = design.T @ (probabilities - targets) + penalties * parameters
        step = np.linalg.solve(_logistic_hessian(design, probabilities, penalties), gradient)
        size = 1.0
        while size > 1e-10 and (tried := loss(parameters - size * step)) >= current:
            size /= 2
        if size <= 1e-10:
            break  # as low as rounding lets it go
        parameters, current = parameters - size * step, tried
    return parameters


def _logistic_hessian(
    design: npt.NDArray[np.float64], probabilities: npt.NDArray[np.float64], penalties: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    hessian: npt.NDArray[np.float64] = (design.T * (probabilities * (1 - probabilities))) @ design
    return hessian + np.diag(penalties)


def _sigmoid(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    probabilities: npt.NDArray[np.float64] = np.exp(-np.logaddexp(0, -logits))
    return probabilities


def _aligned(
    name: str, values: npt.ArrayLike, length_differences: npt.ArrayLike, clusters: npt.ArrayLike | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Checks what belongs together, one entry a comparison; numbers the clusters from 0."""
    columns = {name: np.asarray(values, dtype=np.float64)}
    columns["length_differences"] = np.asarray(length_differences, dtype=np.float64)
    n = columns[name].size
    groups = np.arange(n) if clusters is None else np.asarray(clusters)
    for column, array in (*columns.items(), ("clusters", groups)):
        if array.shape != (n,):
            raise ValueError(f"{column} must have one entry for each of the {n} {name}, got shape {array.shape}.")
    for column, array in columns.items():
        bad = np.flatnonzero(~np.isfinite(array))
        if len(bad):
            raise ValueError(f"{column}[{bad[0]}] is {array[bad[0]]}; all must be finite.")
    numbered: npt.NDArray[np.int64] = np.unique(groups, return_inverse=True)[1]
    return columns[name], columns["length_differences"], numbered.ravel()
