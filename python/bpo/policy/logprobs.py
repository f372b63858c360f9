"""Log-probabilities of responses under a model, in padded batches."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from bpo.data.tokenizers import padding_id
from bpo.policy.batches import batch_tokens, in_batches, longest_first
from bpo.policy.checks import base_of, device_of
from bpo.policy.head import Positions, forget, score_positions
from bpo.policy.sharding import no_graph
from bpo.policy.transfer import sent
from bpo.system.memory import HeapTrimmer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.tokens import TokenizedResponses


_Result = TypeVar("_Result")

# Models that SDPA serves as well without an attention mask, or not; see :func:`try_without_mask`.
_UNMASKED: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()

# Largest relative difference of log π with a mask and without one, by the precision of the arithmetic.
_MASK_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-7}


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
    device = input_device(model)
    input_ids, attention_mask = _padded(model, sequences, pad_id)
    return sent(input_ids, device), sent(attention_mask, device)


def _padded(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on the CPU."""
    width = max(len(sequence) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), known_id(model, pad_id), dtype=torch.long, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for index, sequence in enumerate(sequences):
        input_ids[index, : len(sequence)] = torch.tensor(sequence, dtype=torch.long, device="cpu")
        attention_mask[index, : len(sequence)] = 1
    return input_ids, attention_mask


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

    The output head sees the positions that predict a response and no others, a chunk of them at a time where that is
    known to be the same (see :mod:`bpo.policy.head`). Nothing here waits for a GPU, though transformers' masks may.

    Args:
        model: A causal language model.
        tokenized: Token ids of all responses.
        rows: (n,) which of them form the batch.
        pad_id: Fills the batch at the right.

    Returns:
        The log-probabilities.
    """
    positions, token_logps, agreements = _scored_tokens(model, tokenized, rows, pad_id)
    if tokenized.weights is not None:
        # The first token of a sequence has a weight, too, but nothing predicts it.
        weights = [tokenized.weights[row][int(tokenized.prompt_lengths[row] == 0) :] for row in rows]
        token_logps = token_logps * sent(torch.from_numpy(np.concatenate(weights)), token_logps.device)
    tokens = torch.from_numpy(positions.counts).clamp(min=1)
    return CompletionLogps(
        logps=positions.sums(token_logps),
        log_weights=positions.sums(agreements) / sent(tokens, agreements.device),
    )


def _scored_tokens(
    model: PreTrainedModel, tokenized: TokenizedResponses, rows: npt.NDArray[np.int64], pad_id: int
) -> tuple[Positions, torch.Tensor, torch.Tensor]:
    """Returns the predicting positions of a batch, log π of the token at each, and log π − log Σ_v π_v²."""
    unmasked = _by_sdpa(model) and _UNMASKED.get(model, False)
    if unmasked and pad_id == getattr(base_of(model).config, "pad_token_id", None):
        pad_id = int(pad_id == 0)  # some models warn of pad tokens without a mask
    input_ids, attention_mask = _padded(model, [tokenized.ids[row] for row in rows], pad_id)
    positions = Positions.of(predicting_positions(tokenized, rows))
    targets = input_ids.flatten()[positions.index + 1]
    device = input_device(model)
    inputs = {"input_ids": sent(input_ids, device), "use_cache": False}
    if not unmasked:
        inputs["attention_mask"] = sent(attention_mask, device)
    if takes(model, "position_ids"):
        # A row of positions a sample, since learned position embeddings could not be told apart by sample otherwise.
        first = first_position(model)
        inputs["position_ids"] = torch.arange(first, first + input_ids.shape[1], device=device).expand(len(rows), -1)
    token_logps, agreements = score_positions(model, inputs, positions, targets)
    return positions, token_logps, agreements


def look_anew(model: PreTrainedModel) -> None:
    """Forgets what an earlier run found out about a model, which may have changed since."""
    forget(model)
    _UNMASKED.pop(model, None)


def try_without_mask(forward: Forward, rows: npt.NDArray[np.int64]) -> None:
    """Finds out whether a model needs attention masks, on some short responses; leaves them out from now on if not.

    Padding at the right of causal attention changes nothing before it, but SDPA has its fast kernels for no mask only.

    Args:
        forward: The model, in the state in which it will run.
        rows: (n,) which responses; if they are of one length, nothing is found out.
    """
    model = forward.model
    if model in _UNMASKED or not _by_sdpa(model) or len(set(forward.tokenized.lengths[rows].tolist())) == 1:
        return
    same = False
    try:
        with torch.no_grad():
            masked = forward.logps(rows).logps
            _UNMASKED[model] = True
            tolerance = _MASK_TOLERANCE.get(forward.autocast or model.dtype, 0.02)
            same = torch.allclose(forward.logps(rows).logps, masked, rtol=tolerance, atol=tolerance)
    except Exception:  # a model that has to have one; what else is wrong comes up again
        pass
    finally:
        _UNMASKED[model] = same


def _by_sdpa(model: PreTrainedModel) -> bool:
    return getattr(base_of(model).config, "_attn_implementation", None) == "sdpa"


def takes(model: PreTrainedModel, argument: str) -> bool:
    """Whether a forward pass takes an argument; a patched one that passes all on takes what its class does."""
    base = base_of(model)
    given = inspect.signature(base.forward).parameters
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in given.values())
    return argument in given or (passes_on and argument in inspect.signature(type(base).forward).parameters)


def first_position(model: PreTrainedModel) -> int:
    """The position of the first token: RoBERTa and its kin leave the rows up to that of the pad token out."""
    for name, module in base_of(model).named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


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


def response_token_logps(
    forward: Forward,
    *,
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Returns log π(y_t | x, y_<t) of every token of every response, without gradients.

    Args are those of :func:`response_logps`, which sums these up.

    Returns:
        S arrays of float32, a number for each predicted token of a response; of the tokens as they are, whatever
        weights the data gives.
    """
    found: list[npt.NDArray[np.float32]] = [np.zeros(0, dtype=np.float32)] * len(forward.tokenized.ids)

    def run(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
        with forward.autocasting():
            positions, logps, _ = _scored_tokens(forward.model, forward.tokenized, rows, forward.pad_id)
        return np.split(logps.float().cpu().numpy(), np.cumsum(positions.counts)[:-1])

    def take(rows: npt.NDArray[np.int64], parts: list[npt.NDArray[np.float32]]) -> None:
        for row, part in zip(rows, parts, strict=True):
            found[row] = part

    _run_all(forward, run, take, tokens_per_batch, on_batch)
    return found


def response_logps(
    forward: Forward,
    *,
    tokens_per_batch: int | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns log π(response | prompt) of every response, without gradients.

    Args:
        forward: A model that :func:`bpo.policy.autograd.check_policy` lets pass, and S responses.
        tokens_per_batch: Padded tokens of one forward; ``None`` for what suits the model where it is.
        on_batch: Called after each batch with its tokens.

    Returns:
        (S,) float32.
    """
    logps = np.zeros(len(forward.tokenized.ids), dtype=np.float32)

    def run(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = forward.logps(rows).logps.cpu().numpy()
        return found

    _run_all(forward, run, logps.__setitem__, tokens_per_batch, on_batch)
    return logps


def _run_all(
    forward: Forward,
    run: Callable[[npt.NDArray[np.int64]], _Result],
    take: Callable[[npt.NDArray[np.int64], _Result], object],
    tokens_per_batch: int | None,
    on_batch: Callable[[int], object] | None,
) -> None:
    """Runs all responses without gradients, the longest first, and hands over the rows of each batch and its result."""
    model, lengths = forward.model, forward.tokenized.lengths
    look_anew(model)
    if len(lengths):
        try_without_mask(forward, np.argsort(lengths, kind="stable")[[0, len(lengths) // 2]])
    trim = HeapTrimmer()
    with no_graph(model):
        for rows, result in in_batches(run, longest_first(lengths), lengths, batch_tokens(tokens_per_batch, model)):
            take(rows, result)
            if on_batch is not None:
                on_batch(int(lengths[rows].sum()))
            trim()
