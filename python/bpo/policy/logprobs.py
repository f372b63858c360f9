"""Log-probabilities of responses under a model, in padded batches."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.data.tokenizers import padding_id
from bpo.policy.batches import in_batches, longest_first
from bpo.policy.checks import base_of, device_of
from bpo.system.memory import HeapTrimmer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.tokens import TokenizedResponses


# Rows of logits that are widened to float32 at a time: 64 MB for a vocabulary of 128,000.
_LOGIT_ROWS = 128


@dataclasses.dataclass(frozen=True)
class CompletionLogps:
    """What one forward says of the n responses of a batch.

    Attributes:
        logps: (n,) float32, log π(response | prompt), the sum over its tokens (each times its weight, where the data
            gives token weights). Differentiable.
        log_weights: (n,) float32, the mean over the tokens of log π − log Σ_v π_v², the logarithm of WPO's weight of
            the response (arXiv 2406.11827, eq. 2). Not differentiable.
    """

    logps: torch.Tensor
    log_weights: torch.Tensor


def pad_right(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (n, t) int64 token ids and attention mask, where the model takes them.

    Causal attention keeps padding at the right from mattering, so that any token may fill the place of a ``pad_id``
    that the model has no embedding for.
    """
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), known_id(model, pad_id), dtype=torch.long, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for index, sequence in enumerate(sequences):
        input_ids[index, : len(sequence)] = torch.tensor(sequence, dtype=torch.long, device="cpu")
        attention_mask[index, : len(sequence)] = 1
    device = input_device(model)
    return input_ids.to(device), attention_mask.to(device)


def known_id(model: PreTrainedModel, pad_id: int) -> int:
    """Returns the id that fills batches in place of a pad token, which a tokenizer may have beyond the embeddings."""
    return pad_id if 0 <= pad_id < vocabulary(model) else 0


def vocabulary(model: PreTrainedModel) -> int:
    """Returns for how many tokens a model has embeddings."""
    size: int = model.get_input_embeddings().weight.shape[0]
    return size


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns where a model takes its token ids."""
    table = model.get_input_embeddings()
    return device_of(table, table.weight)


def predicting_positions(tokenized: TokenizedResponses, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """Returns (n, t − 1) bool: the positions of a padded batch whose output predicts a token of the response.

    No position predicts the first token of a sequence.
    """
    positions = torch.arange(1, int(tokenized.lengths[rows].max()))
    prompt_lengths = torch.from_numpy(tokenized.prompt_lengths[rows])[:, None]
    lengths = torch.from_numpy(tokenized.lengths[rows])[:, None]
    return (positions >= prompt_lengths) & (positions < lengths)


@dataclasses.dataclass(frozen=True)
class Forward:
    """A model and the responses that it is run over, and in what arithmetic.

    Attributes:
        model: A causal language model.
        tokenized: Token ids of all responses.
        pad_id: Fills batches at the right.
        autocast: Type of the arithmetic under autocast; None for that of the weights.
    """

    model: PreTrainedModel
    tokenized: TokenizedResponses
    pad_id: int
    autocast: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenized: TokenizedResponses,
        processing_class: PreTrainedTokenizerBase,
        config: SelectConfig,
    ) -> Forward:
        """Returns the forward pass that a configuration asks for."""
        return cls(model, tokenized, padding_id(processing_class), torch.bfloat16 if config.bf16 else None)

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return input_device(self.model)

    def autocasting(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of the pass, as a context."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    def logps(self, rows: npt.NDArray[np.int64]) -> CompletionLogps:
        """Runs the model once over some responses ((n,) of them)."""
        with self.autocasting():
            return completion_logps(self.model, self.tokenized, rows, self.pad_id)


def completion_logps(
    model: PreTrainedModel, tokenized: TokenizedResponses, rows: npt.NDArray[np.int64], pad_id: int
) -> CompletionLogps:
    """Runs the model once over some responses.

    The output head sees the positions that predict a response and no others, so that no logits of prompts or padding
    are computed or kept.

    Args:
        model: A causal language model.
        tokenized: Token ids of all responses.
        rows: (n,) which of them form the batch.
        pad_id: Fills the batch at the right.

    Returns:
        The log-probabilities.
    """
    input_ids, attention_mask = pad_right(model, [tokenized.ids[row] for row in rows], pad_id)
    size, width = input_ids.shape
    predicting = predicting_positions(tokenized, rows)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if takes(model, "position_ids"):
        # A row of positions a sample, since learned position embeddings could not be told apart by sample otherwise.
        inputs["position_ids"] = torch.arange(width, device=input_ids.device).expand(size, -1)
    with _head_sees_only(model, predicting):
        logits = model(**inputs).logits
    predicting = predicting.to(logits.device)
    # Some models reach their logits in another way than through their output head.
    reduced = logits.shape[:2] == (1, int(predicting.sum()))
    logits = logits[0] if reduced else logits[:, :-1][predicting]
    targets = input_ids[:, 1:].to(logits.device)[predicting]
    token_logps, agreements = score_tokens(logits, targets)
    if tokenized.weights is not None:
        # The first token of a sequence has a weight, too, but nothing predicts it.
        weights = [tokenized.weights[row][int(tokenized.prompt_lengths[row] == 0) :] for row in rows]
        token_logps = token_logps * torch.from_numpy(np.concatenate(weights)).to(logits.device)
    zeros = torch.zeros(predicting.shape, dtype=torch.float32, device=logits.device)
    # Summed row by row of a padded matrix, which is deterministic on a GPU, too.
    tokens = predicting.sum(dim=1).clamp(min=1)
    return CompletionLogps(
        logps=zeros.masked_scatter(predicting, token_logps).sum(dim=1),
        log_weights=zeros.masked_scatter(predicting, agreements).sum(dim=1) / tokens,
    )


@contextlib.contextmanager
def _head_sees_only(model: PreTrainedModel, predicting: torch.Tensor) -> Iterator[None]:
    """Reduces the (n, t, features) input of the output head to (1, predicting positions, features)."""

    def reduce(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[:-1] != (predicting.shape[0], predicting.shape[1] + 1):
            return None
        return (hidden[:, :-1][predicting.to(hidden.device)][None], *args[1:])

    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(reduce)
    try:
        yield
    finally:
        handle.remove()


class _TokenLogps(torch.autograd.Function):
    """Log-softmax at the targets, in float32 but without a float32 copy of the logits.

    Beside the logits themselves, only their gradient is ever as large as they are.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes (m, vocabulary) logits and (m,) targets; returns log π and log π − log Σ_v π_v², (m,) float32."""
        normalizer = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        agreement = torch.empty_like(normalizer)  # log Σ_v π_v²
        for start in range(0, len(logits), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            wide = logits[part].float()
            largest = wide.amax(dim=-1, keepdim=True)
            powers = wide.sub(largest).exp_()
            total = powers.sum(dim=-1).log()
            normalizer[part] = largest[:, 0] + total
            agreement[part] = powers.square_().sum(dim=-1).log() - 2 * total
        logps = logits.gather(-1, targets[:, None])[:, 0].float() - normalizer
        weights = logps - agreement
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.mark_non_differentiable(weights)
        return logps, weights

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        """∂ log π(target) / ∂ logits = one-hot(target) − π."""
        logits, targets, normalizer = ctx.saved_tensors
        out = torch.empty_like(logits)
        for start in range(0, len(logits), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            wide = torch.exp(logits[part].float() - normalizer[part, None]).mul_(-gradient[part, None])
            wide.scatter_add_(1, targets[part, None], gradient[part, None].float())
            out[part] = wide
        return out, None


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns log π and log π − log Σ_v π_v² of (m,) targets under (m, vocabulary) logits, (m,) float32 each."""
    logps, weights = _TokenLogps.apply(logits, targets)
    return logps, weights


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether a forward pass takes an argument; a patched one that passes all on takes what its class does."""
    base = base_of(model)
    given = inspect.signature(base.forward).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in given.values())
    return argument in given or (passes_on and argument in inspect.signature(type(base).forward).parameters)


def check_vocabulary(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
    """Checks that the model knows every token.

    Raises:
        ValueError: A token id beyond the model's embeddings: the tokenizer belongs to another model.
    """
    known = vocabulary(model)
    largest = max((max(ids, default=0) for ids in sequences), default=0)
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
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns log π(response | prompt) of every response, without gradients.

    Args:
        model: A causal language model.
        tokenized: Token ids of the responses.
        pad_id: Padding token.
        tokens_per_batch: Padded tokens of one forward; ``None`` for what suits the device.
        autocast: Type of the arithmetic under autocast; None for that of the weights.
        on_batch: Called after each batch with its tokens.

    Returns:
        (R,) float32.

    Raises:
        ValueError: A token that the model does not know.
    """
    check_vocabulary(model, tokenized.ids)
    forward = Forward(model, tokenized, pad_id, autocast)
    logps = np.zeros(len(tokenized.ids), dtype=np.float32)
    trim = HeapTrimmer()
    lengths = tokenized.lengths

    def run(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = forward.logps(rows).logps.cpu().numpy()
        return found

    with torch.inference_mode():
        for rows, found in in_batches(run, longest_first(lengths), lengths, tokens_per_batch, forward.device):
            logps[rows] = found
            if on_batch is not None:
                on_batch(int(lengths[rows].sum()))
            trim()
    return logps
