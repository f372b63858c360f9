"""Weights of tokens in a training: checked, laid beside the tokens of a batch, and put into what a model gives."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import datasets
import torch

from bpo.data.values import UnusableError, as_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

TOKENS_KEY = "token_weights"
"""Where a batch holds the weights of its tokens."""

_NAMED_TOKENS = 40


def weight_columns(name: str) -> tuple[str, str]:
    """Returns the columns with the token weights of the chosen and of the rejected responses."""
    return f"{name}_chosen", f"{name}_rejected"


def check_token_weights(dataset: Any, name: str, which: str) -> bool:
    """Checks the token weights of a data set as the user gave it; returns whether it has any.

    Raises:
        ValueError: One of the two columns alone, or what is no list of finite numbers; the message names the row.
    """
    there = set(getattr(dataset, "column_names", None) or [])
    missing = [column for column in weight_columns(name) if column not in there]
    if len(missing) == 2:
        return False
    if missing:
        raise ValueError(f"{which} has token weights of one response of each pair alone; '{missing[0]}' is missing.")
    if "ref_chosen_logps" in there:
        raise ValueError(
            f"{which} has ref_chosen_logps, which are of tokens that count once, and token_weights={name!r}; remove "
            "the columns ref_chosen_logps and ref_rejected_logps, and the reference runs."
        )
    if isinstance(dataset, datasets.Dataset):
        plain = dataset.with_format(None)
        for column in weight_columns(name):
            for row, value in enumerate(plain[column]):
                _checked(value, f"{which}, row {row}, column '{column}'")
    return True


def _checked(value: Any, place: str) -> npt.NDArray[np.float32]:
    try:
        return as_weights(value)
    except UnusableError as error:
        raise ValueError(f"{place}: {error}.") from None


def check_counts(dataset: Any, name: str, which: str, processing_class: Any) -> None:
    """Checks that each token of a tokenized data set has a weight.

    Raises:
        ValueError: Another number; the message names the tokens.
    """
    if not isinstance(dataset, datasets.Dataset) or weight_columns(name)[0] not in dataset.column_names:
        return
    plain = dataset.with_format(None)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    for column, ids in zip(weight_columns(name), ("chosen_ids", "rejected_ids"), strict=True):
        for row, (weights, tokens) in enumerate(zip(plain[column], plain[ids], strict=True)):
            if len(weights) != len(tokens):
                named = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(tokens[:_NAMED_TOKENS])))
                raise ValueError(
                    f"{which}, column '{column}', row {row} of those that are trained on: {len(weights)} token weights "
                    f"for {len(tokens)} tokens; give one for each token of the response, the end token included: "
                    f"{named}{', …' if len(tokens) > _NAMED_TOKENS else ''}."
                )


@dataclasses.dataclass
class WithTokenWeights:
    """A collator that adds the weights of the tokens, where all examples have them.

    Attributes:
        collator: Makes the batch.
        name: Name of the token weights.
        keeps_end: Which end of a longer sequence the collator keeps.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    name: str
    keeps_end: bool

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the batch."""
        batch = self.collator(examples)
        columns = weight_columns(self.name)
        if all(column in example for example in examples for column in columns):
            weights = [example[column] for column in columns for example in examples]
            batch[TOKENS_KEY] = _laid_out(weights, batch["completion_mask"], self.keeps_end)
        return batch


def _laid_out(weights: Sequence[Sequence[float]], mask: torch.Tensor, keeps_end: bool) -> torch.Tensor:
    """Returns (2n, t) float32: the weights of the tokens that were kept of each response, 1 beside them."""
    laid_out = torch.ones(mask.shape, dtype=torch.float32)
    for row, given in enumerate(weights):
        places = torch.nonzero(mask[row])[:, 0]
        array = torch.from_numpy(_checked(given, "A row of the data"))  # streamed data sets are not checked before
        if len(array) < len(places):
            raise ValueError(f"{len(array)} token weights for a response of {len(places)} tokens.")
        laid_out[row, places] = array[len(array) - len(places) :] if keeps_end else array[: len(places)]
    return laid_out


@contextlib.contextmanager
def weighing_tokens(models: Iterable[torch.nn.Module], weights: torch.Tensor) -> Iterator[None]:
    """Has models give w_t log π(y_t | x, y_<t) in place of log π(y_t | x, y_<t).

    Args:
        models: The policy and its reference, as they are within what an accelerator has wrapped around them.
        weights: (2n, t) of the tokens of the batch.

    Raises:
        RuntimeError: No model gave log-probabilities of tokens.
    """
    weighed = False

    def on_forward(_: Any, __: Any, outputs: Any) -> Any:
        nonlocal weighed
        logps = getattr(outputs, "log_probs", None)
        if logps is None:  # a further pass, for the logits
            return outputs
        weighed = True
        # The first token of a sequence is not predicted; virtual tokens of prompt learning stand before all others.
        factors = torch.ones_like(logps)
        factors[:, logps.shape[1] - weights.shape[1] + 1 :] = weights[:, 1:].to(logps.device, logps.dtype)
        outputs.log_probs = logps * factors
        squares = getattr(outputs, "log_sum_sq_probs", None)
        if squares is not None:  # WPO's weights, of log π − log Σ_v π_v², are of the tokens as they are
            outputs.log_sum_sq_probs = squares + (outputs.log_probs - logps).detach()
        return outputs

    handles = [model.register_forward_hook(on_forward) for model in {id(model): model for model in models}.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not weighed:
        raise RuntimeError(
            "This version of TRL takes no log-probabilities of tokens from the model; token_weights needs a newer one."
        )
