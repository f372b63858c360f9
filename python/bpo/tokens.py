"""Prompts and responses to token ids: the same ids that TRL's ``DPOTrainer`` trains on."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data import Candidates, Skipped, Text, report_skipped, warn

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from bpo.config import OnInvalid


@dataclasses.dataclass(frozen=True)
class TokenizedResponses:
    """Token ids of every response with its prompt in front.

    Attributes:
        ids: (R,) lists of token ids, prompt and response, cut to ``max_length``.
        prompt_lengths: (R,) int64, tokens of the prompt; the log-probability of a response sums over the rest.
        truncated: How many responses were cut at their end.
        max_length: The window to which sequences were cut.
    """

    ids: list[list[int]]
    prompt_lengths: npt.NDArray[np.int64]
    max_length: int
    truncated: int

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(R,) int64, tokens of prompt and response together."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @functools.cached_property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """(R,) int64, tokens of the response alone."""
        return self.lengths - self.prompt_lengths

    def take(self, rows: npt.NDArray[np.int64]) -> TokenizedResponses:
        """Returns those of some responses."""
        return dataclasses.replace(self, ids=[self.ids[row] for row in rows], prompt_lengths=self.prompt_lengths[rows])


def check_tokenizer(processing_class: PreTrainedTokenizerBase, conversational: bool) -> None:
    """Checks that the tokenizer can do what training will ask of it.

    Raises:
        ValueError: No padding or end token, or no chat template for conversational rows.
    """
    if processing_class.pad_token_id is None and processing_class.eos_token_id is None:
        raise ValueError(
            "The tokenizer has neither a pad_token nor an eos_token, so batches cannot be padded. Set "
            "tokenizer.pad_token to a token of its vocabulary."
        )
    if conversational and getattr(processing_class, "chat_template", None) is None:
        raise ValueError(
            "The rows are conversations but the tokenizer has no chat template. Use the tokenizer of a chat model, set "
            "tokenizer.chat_template, or give prompt and responses as plain text."
        )
    if not conversational and processing_class.eos_token is None:
        raise ValueError("The tokenizer has no eos_token, which ends every plain-text response. Set one.")


def padding_id(processing_class: PreTrainedTokenizerBase) -> int:
    """Returns the id that fills batches: the pad token, else, as in TRL, the end token."""
    pad = processing_class.pad_token_id
    return int(processing_class.eos_token_id if pad is None else pad)


def tokenize_responses(
    candidates: Candidates, processing_class: PreTrainedTokenizerBase, max_length: int
) -> tuple[TokenizedResponses, npt.NDArray[np.bool_], Skipped]:
    """Tokenizes every response behind its prompt, as TRL 1.x does for the same rows.

    Conversations go through the chat template; plain text gets the end token. A response starts where the tokens of
    the prompt alone and of prompt + response part, the earliest such place over the responses of a prompt (TRL takes
    the earliest over the two of a pair, which differs only where tokens merge across the boundary). Sequences are cut
    to ``max_length`` from the start (``truncation_mode="keep_start"``).

    Args:
        candidates: Prompts and responses.
        processing_class: The tokenizer.
        max_length: Longest sequence, in tokens.

    Returns:
        The token ids; for each prompt whether it fits the window with room for a response ((n,) bool); and which do
        not fit.

    Raises:
        ValueError: A tokenizer that cannot do this (see :func:`check_tokenizer`).
    """
    check_tokenizer(processing_class, candidates.conversational)
    fits = np.ones(len(candidates.prompts), dtype=bool)
    skipped = Skipped()
    all_ids: list[list[int]] = []
    prompt_lengths = np.zeros(len(candidates.responses), dtype=np.int64)
    truncated = moved = row = 0
    per_prompt = np.bincount(candidates.prompt_of_response, minlength=len(candidates.prompts))
    for index, prompt in enumerate(candidates.prompts):
        data_row = int(candidates.prompt_rows[index])
        prompt_ids = _ids(processing_class, prompt, data_row, add_generation_prompt=True)
        sequences = [
            _ids(processing_class, _joined(prompt, response, processing_class.eos_token), data_row)
            for response in candidates.responses[row : row + per_prompt[index]]
        ]
        if not all(sequences):
            raise ValueError(f"Row {data_row}: the tokenizer gives no tokens for prompt and response.")
        boundary = min(_common_prefix_length(prompt_ids, sequence) for sequence in sequences)
        if any(len(sequence) <= boundary for sequence in sequences):
            raise ValueError(f"Row {data_row}: no token of a response follows the prompt; look at the chat template.")
        moved += boundary < len(prompt_ids)
        if boundary >= max_length:
            fits[index] = False
            place = f"row {data_row}, {boundary} tokens"
            skipped.add(f"prompt fills the window of {max_length} tokens", place)
        truncated += sum(len(sequence) > max_length for sequence in sequences) if fits[index] else 0
        all_ids.extend(sequence[:max_length] for sequence in sequences)
        prompt_lengths[row : row + len(sequences)] = min(boundary, max_length)
        row += len(sequences)
    if moved:
        warn(
            f"{moved} of {len(candidates.prompts)} tokenized prompts are not a prefix of prompt + response; as in TRL, "
            "their response starts where the two part. End prompts on a token boundary to avoid it."
        )
    return TokenizedResponses(all_ids, prompt_lengths, max_length, truncated), fits, skipped


def tokenize_candidates(
    candidates: Candidates, processing_class: PreTrainedTokenizerBase, max_length: int, *, on_invalid: OnInvalid
) -> tuple[Candidates, TokenizedResponses]:
    """Tokenizes, and sets aside the prompts that leave no room for a response, as TRL does.

    Raises:
        ValueError: No prompt fits; or one does not and ``on_invalid`` is ``"raise"``.
    """
    tokenized, fits, skipped = tokenize_responses(candidates, processing_class, max_length)
    report_skipped(skipped, on_invalid)
    candidates.skipped.merge(skipped)
    if not fits.any():
        raise ValueError(f"Every prompt fills the window of {max_length} tokens; raise SelectConfig.max_length.")
    if tokenized.truncated:
        warn(f"{tokenized.truncated} of {len(tokenized.ids)} responses are cut to the window of {max_length} tokens.")
    kept, _, rows = candidates.keep_prompts(fits)
    return kept, tokenized.take(rows)


def _joined(prompt: Text, response: Text, end: str) -> Text:
    """Prompt and response as one; plain text is closed by the end token, conversations by their template."""
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt + response + ("" if response.endswith(end) else end)
    assert isinstance(prompt, list) and isinstance(response, list)
    return prompt + response


def _ids(processing_class: PreTrainedTokenizerBase, text: Text, row: int, **template: Any) -> list[int]:
    if isinstance(text, list):
        try:
            encoded = processing_class.apply_chat_template(text, tokenize=True, return_dict=True, **template)
        except Exception as error:  # templates are programs: they raise what they like
            roles = [message["role"] for message in text]
            raise ValueError(f"Row {row}: the chat template fails on the roles {roles}: {error}") from error
        return list(encoded["input_ids"])
    return list(processing_class(text=text)["input_ids"])


def _common_prefix_length(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def batches_by_tokens(lengths: npt.NDArray[np.int64], tokens_per_batch: int) -> list[npt.NDArray[np.int64]]:
    """Cuts sequences, longest first, into batches of at most ``tokens_per_batch`` padded tokens.

    Longest first means that memory peaks in the first batch. The order does not depend on the batch size, so a store
    filled in this order has the same rows in the same places whatever the batches.

    Args:
        lengths: (R,) tokens of each sequence.
        tokens_per_batch: Budget; a longer sequence forms a batch of its own.

    Returns:
        Index arrays that together cover all sequences once.

    Example:
        >>> [batch.tolist() for batch in batches_by_tokens(np.array([3, 9, 4, 4]), 9)]
        [[1], [2, 3], [0]]
    """
    order = longest_first(lengths)
    batches = []
    while len(order):
        size = first_batch(lengths[order], tokens_per_batch)
        batches.append(order[:size])
        order = order[size:]
    return batches


def longest_first(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the order of falling length; of equal ones the earlier first."""
    return np.argsort(-lengths, kind="stable")


def first_batch(lengths: npt.NDArray[np.int64], tokens_per_batch: int) -> int:
    """Returns how many of sequences of falling length make up a batch of at most ``tokens_per_batch`` padded tokens."""
    return min(len(lengths), max(1, tokens_per_batch // max(int(lengths[0]), 1)))
