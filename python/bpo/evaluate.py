"""How well a policy ranks held-out preference pairs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bpo.config import SelectConfig
from bpo.data import read_candidates
from bpo.logprobs import response_logps
from bpo.models import inference_state, load_policy, load_tokenizer, window
from bpo.tokens import padding_id, tokenize_candidates

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class PreferenceEvaluation:
    """Preference accuracy on held-out pairs; a tie counts one half.

    Attributes:
        accuracy: Share of pairs whose preferred response has the larger implicit reward
            β(log π − log π_ref), DPO's own measure (arXiv 2305.18290). One half for the reference itself.
        standard_error: Of ``accuracy``, with the pairs of a prompt counted as one cluster.
        margin: Mean difference of the implicit rewards.
        likelihood_accuracy: Share of pairs whose preferred response has the larger mean log-probability a token: what
            the policy prefers without a reference.
        n_pairs: Pairs.
        n_prompts: Prompts.
        logps: (S,) float32, log π(response | prompt) of every response of a pair (of every sequence, where tokens merge
            across the boundary: see :class:`bpo.tokens.TokenizedResponses`).
        response_ids: (S, 16) uint8, content hash of prompt and response, by which a reference is known to fit.
        lengths: (S,) int64, tokens of each response.
        correct: (P,) float64 in {0, ½, 1}, for paired comparison of two policies on the same pairs.
    """

    accuracy: float
    standard_error: float
    margin: float
    likelihood_accuracy: float
    n_pairs: int
    n_prompts: int
    logps: npt.NDArray[np.float32]
    response_ids: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    correct: npt.NDArray[np.float64]


def evaluate_preferences(
    model: Any,
    dataset: Any,
    *,
    reference: PreferenceEvaluation | None = None,
    processing_class: Any = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PreferenceEvaluation:
    """Ranks every candidate pair of a held-out data set by a policy.

    Args:
        model: Path, hub id, ``PreTrainedModel`` or ``PeftModel``.
        dataset: Preference data in any format of :func:`bpo.select`.
        reference: The reference policy's evaluation on the same data; ``None`` takes the model as its own reference.
        processing_class: The tokenizer; by default the one saved with the model.
        config: Uses ``beta``, ``max_length``, ``truncation_mode``, ``tokens_per_batch`` and how a model is loaded.
        progress: Whether to show a progress bar.

    Returns:
        The accuracies.

    Raises:
        ValueError: Unusable data, or a reference of other data.
    """
    config = SelectConfig.of(config)
    candidates = read_candidates(
        dataset, max_pairs_per_prompt=config.max_pairs_per_prompt, on_invalid=config.on_invalid
    )
    tokenizer = load_tokenizer(model, processing_class, config)
    candidates, tokenized = tokenize_candidates(
        candidates,
        tokenizer,
        window(model, config),
        truncation_mode=config.truncation_mode,
        on_invalid=config.on_invalid,
    )
    lengths = tokenized.response_lengths
    if reference is not None and not isinstance(reference, PreferenceEvaluation):
        raise TypeError("reference must be what evaluate_preferences returned for the reference policy.")
    if reference is not None and not (
        np.array_equal(reference.response_ids, tokenized.sequence_ids) and np.array_equal(reference.lengths, lengths)
    ):
        raise ValueError(
            f"The reference was evaluated on {len(reference.logps)} other responses, or other tokens of them, than the "
            f"{len(tokenized.ids)} of this data; evaluate both on the same data with the same tokenizer and max_length."
        )
    policy = load_policy(model, config)
    bar = tqdm(
        total=int(tokenized.lengths.sum()), desc="Evaluation", unit="token", unit_scale=True, disable=not progress
    )
    with inference_state(policy), bar:
        logps = response_logps(
            policy,
            tokenized,
            padding_id(tokenizer),
            tokens_per_batch=config.tokens_per_batch,
            on_batch=bar.update,
        )
    bad = np.flatnonzero(~np.isfinite(logps))
    if len(bad):
        row = candidates.prompt_rows[candidates.prompt_of_response[tokenized.response_of[bad[0]]]]
        raise ValueError(f"The log-probabilities of {len(bad)} responses are not finite (the first is of row {row}).")
    reference_logps = logps if reference is None else reference.logps
    chosen, rejected = tokenized.pairs.T
    rewards = config.beta * (logps - reference_logps)
    margins = rewards[chosen] - rewards[rejected]
    correct = _wins(margins)
    per_token = logps / lengths
    return PreferenceEvaluation(
        accuracy=float(correct.mean()),
        standard_error=_clustered_standard_error(correct, candidates.prompt_of_pair),
        margin=float(margins.mean()),
        likelihood_accuracy=float(_wins(per_token[chosen] - per_token[rejected]).mean()),
        n_pairs=len(correct),
        n_prompts=len(candidates.prompts),
        logps=logps,
        response_ids=tokenized.sequence_ids,
        lengths=lengths,
        correct=correct,
    )


def _wins(differences: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    wins: npt.NDArray[np.float64] = (np.sign(differences).astype(np.float64) + 1) / 2
    return wins


def _clustered_standard_error(values: npt.NDArray[np.float64], clusters: npt.NDArray[np.int64]) -> float:
    """Standard error of a mean whose observations are independent between clusters only (Liang & Zeger 1986)."""
    residuals = np.bincount(clusters, weights=values - values.mean())
    return float(np.sqrt((residuals**2).sum()) / len(values))
