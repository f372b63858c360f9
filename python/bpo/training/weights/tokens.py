"""Weights of tokens from two policies that disagree about them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from bpo.config import SelectConfig
from bpo.data.read import read_configured
from bpo.data.rows import load_rows
from bpo.data.tokenizers import load_tokenizer
from bpo.data.tokens import tokenize_responses
from bpo.policy.autograd import check_policy
from bpo.policy.logprobs import Forward, response_token_logps
from bpo.policy.models import load_policy, window
from bpo.policy.state import inference_state
from bpo.selection.select import select
from bpo.system.progress import token_bar
from bpo.training.weights.batches import weight_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    import datasets
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from bpo.data.tokens import TokenizedResponses

TokenRule = Literal["tis_dpo", "rto"]

# Scale, and bounds of what it is applied to ("tis_dpo") or of what it comes to ("rto").
_DEFAULTS: dict[str, tuple[float, tuple[float, float]]] = {"tis_dpo": (1.0, (-0.5, 1.5)), "rto": (0.05, (-0.05, 0.05))}


def estimate_token_weights(
    dataset: Any,
    positive: Any,
    negative: Any,
    *,
    rule: TokenRule = "tis_dpo",
    scale: float | None = None,
    bounds: tuple[float, float] | None = None,
    name: str = "token_weights",
    processing_class: Any = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """Weighs each token of every candidate pair by what two policies make of it.

    With d_t = log π⁺(y_t | x, y_<t) − log π⁻(y_t | x, y_<t) the weight of a token is

    - ``"tis_dpo"``, of TIS-DPO (arXiv 2410.04350): scale · exp(clamp(d_t)) in the preferred response and
      scale · exp(−clamp(d_t)) in the other, so that each is full of what is good, or bad, in it. Of the paper's ways to
      π⁺ and π⁻ this is the best one if they were trained by DPO, π⁺ on the pairs and π⁻ on the pairs turned round.
      The form is that of notes on a later paper that takes it up (CTPD, arXiv 2601.11865), the signs are those of the
      authors' code, which has a line in place of the exponential; the paper was not at hand. The bounds are *(ours)*.
    - ``"rto"``, of RTO (arXiv 2404.18922): clamp(scale · d_t) in the preferred response and minus that in the other,
      with π⁺ trained by DPO and π⁻ its reference: the reward that RTO gives to a token, scaled and clamped as in the
      authors' script. RTO goes on to maximise it by PPO. Here it is the weight of the token, so that training raises
      what has a reward above 0 and lowers what has one below, in either response, once *(ours)*.

    The columns go into :func:`bpo.select` as ``config={"token_weights": name}``, and into
    :class:`bpo.WeightedDPOTrainer` and :class:`bpo.BPOTrainer` as ``token_weights=name``.

    Args:
        dataset: Preference data in any format of :func:`bpo.select`.
        positive: π⁺: path, hub id, ``PreTrainedModel`` or ``PeftModel``.
        negative: π⁻, likewise; ``"base"`` is ``positive`` without its adapter.
        rule: Which of the two.
        scale: By default 1 for ``"tis_dpo"`` and 0.05 for ``"rto"``.
        bounds: Of the clamp; by default (−0.5, 1.5) and (−0.05, 0.05).
        name: What the weights are to be called.
        processing_class: The tokenizer; by default the one saved with ``positive``.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        config: Uses ``max_length`` and ``truncation_mode``, which should be those of the training, ``on_invalid``,
            ``max_pairs_per_prompt``, ``weight_column``, ``tokens_per_batch``, ``bf16`` and how a model is loaded.
        progress: Whether to show a progress bar.

    Returns:
        A row for each candidate pair: ``prompt``, ``chosen``, ``rejected``, ``score_chosen`` and ``score_rejected``
        where there are scores, the other columns of the data, and ``<name>_chosen`` and ``<name>_rejected``, lists of
        float32, one for each token of the response, the end token included. For tokens that are cut, or that nothing
        predicts, d_t is 0.

    Raises:
        ValueError: Unusable data, settings or models; a name that the data has already; or log-probabilities that are
            not finite (the message names the row).
        UnsupportedModelError: A policy in which a token sees those after it.

    Example:
        .. code-block:: python

            pairs = bpo.estimate_token_weights("pairs.jsonl", "dpo-model", "reverse-dpo-model", name="importance")
            args = bpo.WeightedDPOConfig("out", token_weights="importance")
            bpo.WeightedDPOTrainer("my-sft-model", args=args, train_dataset=pairs).train()
    """
    scale, bounds = _checked(rule, scale, bounds)
    reading = plain(config)
    pairs = every_pair(load_rows(dataset, split=split, columns=columns), reading, weight_columns(name))
    candidates = read_configured(pairs, reading)
    tokenizer = load_tokenizer(positive, processing_class, reading)
    whole = tokenize_responses(candidates, tokenizer, None)[0]
    gaps = _differences((positive, negative), whole, tokenizer, reading, progress=progress)
    for pair, sides in zip(candidates.pair_rows, whole.pairs, strict=True):
        if not all(np.isfinite(gaps[side]).all() for side in sides):
            raise ValueError(f"The log-probabilities of tokens are not finite (row {pair} of the pairs).")
    for column, sides, sign in zip(weight_columns(name), whole.pairs.T, (1.0, -1.0), strict=True):
        weights: list[list[float]] = [[]] * len(pairs)
        for row, side in zip(candidates.pair_rows, sides, strict=True):
            weights[row] = _weights(gaps[side], rule, scale, bounds, sign).tolist()
        pairs = pairs.add_column(column, weights)
    return pairs


def _checked(
    rule: TokenRule, scale: float | None, bounds: tuple[float, float] | None
) -> tuple[float, tuple[float, float]]:
    """Returns scale and bounds, those of the rule where none are given."""
    if rule not in get_args(TokenRule):
        raise ValueError(f"rule must be one of {', '.join(map(repr, get_args(TokenRule)))}, got {rule!r}")
    scale = _DEFAULTS[rule][0] if scale is None else scale
    low, high = _DEFAULTS[rule][1] if bounds is None else bounds
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be a finite number above 0, got {scale!r}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"bounds must be two finite numbers, the lower one first, got {bounds!r}")
    return scale, (low, high)


def plain(config: SelectConfig | Mapping[str, Any] | None) -> SelectConfig:
    """Returns the settings by which every pair of some data is read, without those of a selection or a reference."""
    return dataclasses.replace(
        SelectConfig.of(config),
        token_weights=None,
        ref_model=None,
        reference_logps=False,
        length_control=None,
        trust=None,
        order="data",
        max_depth=None,
    )


def every_pair(rows: Any, config: SelectConfig, wanted: tuple[str, str]) -> datasets.Dataset:
    """Returns every candidate pair as TRL takes it, with its scores and the other columns of the data.

    Raises:
        ValueError: Unusable data, or a column that is to be added is there already.
    """
    taken = [column for column in wanted if column in rows.column_names]
    if taken:
        raise ValueError(f"The data has a column '{taken[0]}' already; call the weights something else (name).")
    chosen = select(None, rows, budget=1.0, strategy="random", config=config, progress=False, evidence=False).dataset
    scores = {f"bpo_score_{side}": f"score_{side}" for side in ("chosen", "rejected")}
    pairs = chosen.rename_columns({ours: name for ours, name in scores.items() if ours in chosen.column_names})
    return pairs.remove_columns([column for column in pairs.column_names if column.startswith("bpo_")])


def _differences(
    models: tuple[Any, Any],
    whole: TokenizedResponses,
    tokenizer: PreTrainedTokenizerBase,
    config: SelectConfig,
    *,
    progress: bool,
) -> list[npt.NDArray[np.float32]]:
    """Returns log π⁺ − log π⁻ of each token of each of S whole responses, 0 where one is cut or nothing predicts it."""
    base = isinstance(models[1], str) and models[1] == "base"
    longest = [window(model, config) for model in (models[:1] if base else models)]
    # Of both alike, so that no token has one of the two alone.
    cut = whole.cut(min((length for length in longest if length), default=None), config.truncation_mode)
    rows = np.flatnonzero(cut.response_lengths > 0)
    first = _logps(models[0], cut.take(rows), tokenizer, config, progress)
    second = _logps(models[0] if base else models[1], cut.take(rows), tokenizer, config, progress, adapted=not base)
    found = [np.zeros(length, dtype=np.float32) for length in whole.response_lengths]
    for row, left, right in zip(rows, first, second, strict=True):
        cut_off = len(found[row]) - int(cut.response_lengths[row]) if config.truncation_mode == "keep_end" else 0
        start = cut_off + int(cut.prompt_lengths[row] == 0)
        found[row][start : start + len(left)] = left - right
    return found


def _logps(
    model: Any,
    tokenized: TokenizedResponses,
    tokenizer: PreTrainedTokenizerBase,
    config: SelectConfig,
    progress: bool,
    *,
    adapted: bool = True,
) -> list[npt.NDArray[np.float32]]:
    """Returns log π of each predicted token under a model, or under it without its adapter."""
    policy = load_policy(model, config)
    if not (adapted or hasattr(policy, "disable_adapter")):
        raise ValueError(
            "negative='base' is positive without its adapter, but it has none. Pass the reference; a directory is "
            "'./base'."
        )
    label = Path(model).name if isinstance(model, (str, Path)) else type(policy).__name__
    forward = Forward.of(policy, tokenized, tokenizer, config)
    bar = token_bar(int(tokenized.lengths.sum()), f"Tokens by {label}", progress)
    with contextlib.nullcontext() if adapted else policy.disable_adapter(), inference_state(policy), bar:
        check_policy(forward)
        return response_token_logps(forward, tokens_per_batch=config.tokens_per_batch, on_batch=bar.update)


def _weights(
    gaps: npt.NDArray[np.float32], rule: TokenRule, scale: float, bounds: tuple[float, float], sign: float
) -> npt.NDArray[np.float32]:
    if rule == "tis_dpo":
        weights = scale * np.exp(sign * np.clip(gaps, *bounds))
    else:
        weights = sign * np.clip(scale * gaps, *bounds)
    narrow: npt.NDArray[np.float32] = weights.astype(np.float32)
    return narrow
