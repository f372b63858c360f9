"""Log-probabilities of responses under a model, in padded batches."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from bpo.models import base_of
from bpo.tokens import TokenizedResponses, batches_by_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (n, t) int64 token ids and attention mask; causal attention keeps padding at the right from mattering."""
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for index, sequence in enumerate(sequences):
        input_ids[index, : len(sequence)] = torch.tensor(sequence)
        attention_mask[index, : len(sequence)] = 1
    return input_ids, attention_mask


def completion_logps(
    model: PreTrainedModel, tokenized: TokenizedResponses, rows: npt.NDArray[np.int64], pad_id: int
) -> torch.Tensor:
    """Runs the model once over some responses.

    Args:
        model: A causal language model.
        tokenized: Token ids of all responses.
        rows: (n,) which of them form the batch.
        pad_id: Fills the batch at the right.

    Returns:
        (n,) float32: log π(response | prompt), summed over the tokens of the response.
    """
    input_ids, attention_mask = pad_right([tokenized.ids[row] for row in rows], pad_id)
    size, width = input_ids.shape
    prompt_lengths = torch.from_numpy(tokenized.prompt_lengths[rows])
    completion_mask = attention_mask.bool() & (torch.arange(width) >= prompt_lengths[:, None])
    # No token predicts the first one; logits before the shortest prompt's end are never needed.
    start = max(int(prompt_lengths.min()), 1) - 1
    device = model.get_input_embeddings().weight.device
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    accepted = _forward_arguments(model)
    if "position_ids" in accepted:
        # A row of positions a sample, since learned position embeddings could not be told apart by sample otherwise.
        inputs["position_ids"] = torch.arange(width, device=device).expand(size, -1)
    if "logits_to_keep" in accepted:
        logits = model(**inputs, logits_to_keep=width - start).logits
    else:
        logits = model(**inputs).logits[:, start:]
    mask = completion_mask[:, start + 1 :].to(logits.device)  # (n, width - start - 1)
    targets = input_ids[:, start + 1 :].to(logits.device)[mask]
    token_logps = -F.cross_entropy(logits[:, :-1][mask].float(), targets, reduction="none")
    padded = torch.zeros(mask.shape, device=logits.device).masked_scatter(mask, token_logps)
    return padded.sum(dim=1)


def _forward_arguments(model: PreTrainedModel) -> Collection[str]:
    return inspect.signature(base_of(model).forward).parameters.keys()


def check_vocabulary(model: PreTrainedModel, tokenized: TokenizedResponses) -> None:
    """Checks that the model knows every token.

    Raises:
        ValueError: A token id beyond the model's embeddings: the tokenizer belongs to another model.
    """
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(max(ids) for ids in tokenized.ids)
    if largest >= known:
        raise ValueError(
            f"The tokenizer gives token {largest}, but {type(model).__name__} has embeddings for {known} tokens only: "
            "pass the tokenizer of this model as processing_class."
        )


def response_logps(
    model: PreTrainedModel,
    tokenized: TokenizedResponses,
    pad_id: int,
    *,
    tokens_per_batch: int = 1024,
    on_batch: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns log π(response | prompt) of every response, without gradients.

    Args:
        model: A causal language model.
        tokenized: Token ids of the responses.
        pad_id: Padding token.
        tokens_per_batch: Padded tokens of one forward.
        on_batch: Called after each batch with its tokens.

    Returns:
        (R,) float32.
    """
    check_vocabulary(model, tokenized)
    logps = np.zeros(len(tokenized.ids), dtype=np.float32)
    with torch.inference_mode():
        for rows in batches_by_tokens(tokenized.lengths, tokens_per_batch):
            logps[rows] = completion_logps(model, tokenized, rows, pad_id).cpu().numpy()
            if on_batch is not None:
                on_batch(int(tokenized.lengths[rows].sum()))
    return logps
