"""How well a policy ranks held-out preference pairs, by its log-probabilities of their responses."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.config import SelectConfig
from bpo.data.read import read_candidates
from bpo.data.tokenizers import load_tokenizer
from bpo.data.tokens import tokenize_candidates
from bpo.evidence.length_controlled import length_controlled_accuracy
from bpo.evidence.statistics import clustered_standard_error
from bpo.policy.autograd import check_policy
from bpo.policy.logprobs import Forward, response_logps
from bpo.policy.models import load_policy, window
from bpo.policy.state import inference_state
from bpo.system.progress import token_bar

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.data.tokens import TokenizedResponses


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
        length_controlled_accuracy: Accuracy with the length effect balanced out: the mean of the accuracy on the pairs
            whose preferred response is longer and of that on those whose preferred response is shorter *(ours)*. A
            policy that ranks by length alone has one half. NaN where there are no pairs of one of the two kinds.
        length_controlled_standard_error: Of ``length_controlled_accuracy``, clustered likewise.
        longer_share: Share of pairs whose preferred response is the longer one, in tokens: the accuracy of a ranking by
            length alone.
        n_pairs: Pairs.
        n_prompts: Prompts.
        logps: (S,) float32, log π(response | prompt) of every response of a pair (of every sequence, where the last
            token of the prompt and the first of the response merge).
        response_ids: (S, 16) uint8, content hash of prompt and response, by which a reference is known to fit.
        lengths: (S,) int64, tokens of each response.
        correct: (P,) float64 in {0, ½, 1}, for paired comparison of two policies on the same pairs.
    """

    accuracy: float
    standard_error: float
    margin: float
    likelihood_accuracy: float
    length_controlled_accuracy: float
    length_controlled_standard_error: float
    longer_share: float
    n_pairs: int
    n_prompts: int
    logps: npt.NDArray[np.float32]
    response_ids: npt.NDArray[np.uint8]
    lengths: npt.NDArray[np.int64]
    correct: npt.NDArray[np.float64]

    @classmethod
    def of(
        cls,
        tokenized: TokenizedResponses,
        prompt_of_pair: npt.NDArray[np.int64],
        logps: npt.NDArray[np.float32],
        reference_logps: npt.NDArray[np.float32],
        beta: float,
    ) -> PreferenceEvaluation:
        """Measures log-probabilities of policy and reference that are there already.

        Args:
            tokenized: The responses of the pairs.
            prompt_of_pair: (P,) int64.
            logps: (S,) log π of each sequence.
            reference_logps: (S,) log π_ref likewise.
            beta: β of the implicit rewards.
        """
        chosen, rejected = tokenized.pairs.T
        rewards = beta * (logps - reference_logps)
        margins = rewards[chosen] - rewards[rejected]
        correct = _wins(margins)
        lengths = tokenized.response_lengths
        per_token = logps / lengths
        length_differences = lengths[chosen] - lengths[rejected]
        controlled = length_controlled_accuracy(correct, length_differences, clusters=prompt_of_pair)
        return cls(
            accuracy=float(correct.mean()),
            standard_error=clustered_standard_error(correct, prompt_of_pair),
            margin=float(margins.mean()),
            likelihood_accuracy=float(_wins(per_token[chosen] - per_token[rejected]).mean()),
            length_controlled_accuracy=controlled[0],
            length_controlled_standard_error=controlled[1],
            longer_share=float(_wins(length_differences).mean()),
            n_pairs=len(correct),
            n_prompts=len(np.unique(prompt_of_pair)),
            logps=logps,
            response_ids=tokenized.sequence_ids,
            lengths=lengths,
            correct=correct,
        )


def evaluate_preferences(
    model: Any,
    dataset: Any,
    *,
    reference: PreferenceEvaluation | None = None,
    processing_class: Any = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> PreferenceEvaluation:
    """Ranks every candidate pair of a held-out data set by a policy.

    Args:
        model: Path, hub id, ``PreTrainedModel`` or ``PeftModel``.
        dataset: Preference data in any format of :func:`bpo.select`.
        reference: The reference policy's evaluation on the same data; ``None`` takes the model as its own reference.
        processing_class: The tokenizer; by default the one saved with the model.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        config: Uses ``beta``, ``max_length``, ``truncation_mode``, ``tokens_per_batch``, ``bf16`` and how a model is
            loaded. A reference must have been evaluated with the same ``bf16``.
        progress: Whether to show a progress bar.

    Returns:
        The accuracies.

    Raises:
        ValueError: Unusable data, or a reference of other data.

    Example:
        .. code-block:: python

            before = bpo.evaluate_preferences("my-sft-model", "heldout.jsonl")
            after = bpo.evaluate_preferences("out", "heldout.jsonl", reference=before)
            print(after.accuracy, after.length_controlled_accuracy, after.margin)
    """
    config = SelectConfig.of(config)
    candidates = read_candidates(
        dataset,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        on_invalid=config.on_invalid,
        split=split,
        columns=columns,
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
    logps = policy_logps(policy, tokenized, tokenizer, config, stage="Evaluation", progress=progress)
    bad = np.flatnonzero(~np.isfinite(logps))
    if len(bad):
        row = candidates.prompt_rows[candidates.prompt_of_response[tokenized.response_of[bad[0]]]]
        raise ValueError(f"The log-probabilities of {len(bad)} responses are not finite (the first is of row {row}).")
    reference_logps = logps if reference is None else reference.logps
    return PreferenceEvaluation.of(tokenized, candidates.prompt_of_pair, logps, reference_logps, config.beta)


def policy_logps(
    policy: PreTrainedModel,
    tokenized: TokenizedResponses,
    tokenizer: PreTrainedTokenizerBase,
    config: SelectConfig,
    *,
    stage: str,
    progress: bool,
) -> npt.NDArray[np.float32]:
    """Returns log π of sequences under a policy, which is frozen meanwhile.

    Args:
        policy: The policy.
        tokenized: The S sequences.
        tokenizer: Pads them.
        config: Uses ``tokens_per_batch`` and ``bf16``.
        stage: What a progress bar calls it.
        progress: Whether to show one.

    Returns:
        (S,) float32.

    Raises:
        ValueError: A token that the policy does not know.
        UnsupportedModelError: A policy in which a token sees those after it.
    """
    forward = Forward.of(policy, tokenized, tokenizer, config)
    bar = token_bar(int(tokenized.lengths.sum()), stage, progress)
    with inference_state(policy), bar:
        check_policy(forward)
        return response_logps(forward, tokens_per_batch=config.tokens_per_batch, on_batch=bar.update)


def _wins(differences: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    wins: npt.NDArray[np.float64] = (np.sign(differences).astype(np.float64) + 1) / 2
    return wins
