"""Log-probabilities of responses under a model, in padded batches."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from bpo.tokens import TokenizedResponses, batches_by_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import numpy.typing as npt
    from transformers import PreTrainedModel


def completion_logps(
    model: PreTrainedModel, tokenized: TokenizedResponses, rows: npt.NDArray[np.int64], pad_id: int
) -> torch.Tensor:
    """Runs the model once over some responses.

    Args:
        model: A causal language model.
        tokenized: Token ids of all responses.
        rows: (n,) which of them form the batch.
        pad_id: Fills the batch at the right, where causal attention keeps it from mattering.

    Returns:
        (n,) float32: log π(response | prompt), summed over the tokens of the response.
    """
    ids = [tokenized.ids[row] for row in rows]
    width = max(len(sequence) for sequence in ids)
    input_ids = torch.full((len(ids), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(ids), width), dtype=torch.long)
    completion_mask = torch.zeros((len(ids), width), dtype=torch.bool)
    for index, (row, sequence) in enumerate(zip(rows, ids, strict=True)):
        input_ids[index, : len(sequence)] = torch.tensor(sequence)
        attention_mask[index, : len(sequence)] = 1
        completion_mask[index, int(tokenized.prompt_lengths[row]) : len(sequence)] = True
    # No token predicts the first one; logits before the shortest prompt's end are never needed.
    start = max(int(tokenized.prompt_lengths[rows].min()), 1) - 1
    device = model.get_input_embeddings().weight.device
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    accepted = _forward_arguments(model)
    if "position_ids" in accepted:
        # A row of positions a sample, since learned position embeddings could not be told apart by sample otherwise.
        inputs["position_ids"] = torch.arange(width, device=device).expand(len(ids), -1)
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
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(base.forward).parameters.keys()


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
