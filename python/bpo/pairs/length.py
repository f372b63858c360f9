"""How much of a preference is length, and scores without that part."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bpo.config import SelectConfig
from bpo.data.read import read_configured
from bpo.data.tokenizers import load_tokenizer
from bpo.data.tokens import tokenize_candidates
from bpo.data.values import prompt_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from bpo.data.candidates import Candidates


@dataclasses.dataclass(frozen=True)
class LengthEffect:
    """How scores and preferences go with the length of a response.

    Attributes:
        slope: b, by how much the score grows with the natural logarithm of the length, within a prompt: b·ln 2 for a
            response of twice the length. NaN where the data gives no scores, 0 where no prompt has two lengths.
        correlation: Of score and log length within prompts; NaN where either does not vary.
        longer_share: Share of candidate pairs whose preferred response is the longer one; equal lengths count one half.
        n_responses: Responses with a score, from which ``slope`` and ``correlation`` are.
        n_pairs: Candidate pairs.
        unit: ``"tokens"`` or ``"characters"``.
    """

    slope: float
    correlation: float
    longer_share: float
    n_responses: int
    n_pairs: int
    unit: Literal["tokens", "characters"]


def length_effect(
    dataset: Any,
    *,
    processing_class: Any = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
) -> LengthEffect:
    """Measures how scores and preferences go with the length of a response.

    Judges, and people, tend to prefer what is longer, and DPO learns it. The score s of response y to prompt x is
    regressed on its log length within prompts, s(x, y) = a(x) + b ln len(y) + ε, so that
    b = Σ (ln len − mean)(s − mean) / Σ (ln len − mean)² with the means of each prompt. To control for length by a
    regression is the idea of length-controlled AlpacaEval (arXiv 2404.04475); this one is *(ours)*. The slope is an
    association: where longer answers are better ones, it holds that, too.

    Args:
        dataset: Preference data in any format of :func:`bpo.select`.
        processing_class: A tokenizer, or the path of one: lengths are then in tokens, as in training. ``None`` counts
            characters.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        config: Uses what says how data is read.

    Returns:
        The effect.

    Raises:
        ValueError: Unusable data.

    Example:
        >>> rows = [{"prompt": "2+2?", "responses": ["4", "It is 4.", "5"], "scores": [0.6, 1.0, 0.0]}]
        >>> effect = length_effect(rows)
        >>> round(effect.slope, 3), round(effect.longer_share, 3)
        (0.337, 0.833)
    """
    config = SelectConfig.of(config)
    reading = dataclasses.replace(config, token_weights=None, ref_model=None)
    candidates = read_configured(dataset, reading, split=split, columns=columns)
    if processing_class is None:
        return fit_length_effect(candidates, character_lengths(candidates), "characters")
    tokenizer = load_tokenizer(None, processing_class, config)
    candidates, tokenized = tokenize_candidates(candidates, tokenizer, None, on_invalid=config.on_invalid)
    return fit_length_effect(candidates, tokenized.response_lengths[tokenized.pairs], "tokens")


def character_lengths(candidates: Candidates) -> npt.NDArray[np.int64]:
    """Returns the characters of the two responses of each pair, (P, 2) int64, at least 1."""
    characters = np.fromiter((max(len(prompt_text(text)), 1) for text in candidates.responses), dtype=np.int64)
    return characters[candidates.pairs]


def fit_length_effect(
    candidates: Candidates, lengths: npt.NDArray[np.int64], unit: Literal["tokens", "characters"]
) -> LengthEffect:
    """As :func:`length_effect`, of candidates whose pairs have ``lengths`` ((P, 2) int64, at least 1)."""
    logs, used = _log_lengths(candidates, lengths)
    used &= np.isfinite(candidates.scores)
    prompts = candidates.prompt_of_response
    x, y = (_centred(values, prompts, used)[used] for values in (logs, candidates.scores))
    xx, xy, yy = float(x @ x), float(x @ y), float(y @ y)
    slope = float("nan") if not used.any() else xy / xx if xx > 0 else 0.0
    wins = (np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2
    return LengthEffect(
        slope=slope,
        correlation=float(xy / np.sqrt(xx * yy)) if xx * yy > 0 else float("nan"),
        longer_share=float(wins.mean()),
        n_responses=int(used.sum()),
        n_pairs=len(lengths),
        unit=unit,
    )


def take_out_length(
    candidates: Candidates, lengths: npt.NDArray[np.int64], slope: float
) -> tuple[Candidates, npt.NDArray[np.bool_]]:
    """Replaces scores by what of them length does not explain, and turns pairs whose other response is better then.

    s'(x, y) = s(x, y) − b (ln len(y) − mean over the responses to x) *(ours)*. Responses of equal score stay ties:
    being shorter does not make one of them better.

    Args:
        candidates: With scores.
        lengths: (P, 2) int64, of the two responses of each pair.
        slope: b.

    Returns:
        The candidates, and which of their pairs were turned round ((P,) bool).
    """
    logs, used = _log_lengths(candidates, lengths)
    effects = slope * _centred(logs, candidates.prompt_of_response, used)
    means = slope * logs - effects
    pair_scores = candidates.pair_scores - (slope * np.log(lengths) - means[candidates.pairs])
    turned = pair_scores[:, 0] < pair_scores[:, 1]
    pairs = turn(candidates.pairs, turned)
    # Scored responses state no pairs: the row is that of the preferred response.
    rows, positions = candidates.response_places[pairs[:, 0]].T
    return (
        dataclasses.replace(
            candidates,
            scores=np.where(used, candidates.scores - effects, candidates.scores),
            pairs=pairs,
            pair_rows=np.where(turned & (positions >= 0), rows, candidates.pair_rows),
            pair_scores=turn(pair_scores, turned),
            pair_weights=turn(candidates.pair_weights, turned),
            pair_ref_logps=turn(candidates.pair_ref_logps, turned),
        ),
        turned,
    )


def turn(values: npt.NDArray[Any], turned: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Exchanges the two columns of some rows."""
    return np.where(turned[:, None], values[:, ::-1], values)


def _log_lengths(
    candidates: Candidates, lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """(R,) log length of each response and whether it is in a pair, and so has one."""
    logs = np.zeros(len(candidates.responses))
    used = np.zeros(len(candidates.responses), dtype=bool)
    # Backwards, so that the first pair decides where tokens of a response differ by pair.
    logs[candidates.pairs.ravel()[::-1]] = np.log(lengths.ravel()[::-1])
    used[candidates.pairs.ravel()] = True
    return logs, used


def _centred(
    values: npt.NDArray[np.float64], groups: npt.NDArray[np.int64], used: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """Values less the mean of the used ones of their group; 0 where not used."""
    n = int(groups.max()) + 1
    sums = np.bincount(groups[used], weights=values[used], minlength=n)
    means = sums / np.maximum(np.bincount(groups[used], minlength=n), 1)
    return np.where(used, np.where(used, values, 0) - means[groups], 0.0)
