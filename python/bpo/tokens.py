"""Prompts and responses to token ids: the same ids that TRL's ``DPOTrainer`` trains on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data import Candidates, Skipped, Text, report_skipped, warn

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from bpo.config import OnInvalid, TruncationMode


@dataclasses.dataclass(frozen=True)
class TokenizedResponses:
    """Token ids of responses with their prompt in front.

    One *sequence* is a response together with the place where it starts. Both responses of a pair start where the
    first of them parts from the prompt, as in TRL. So where tokens merge across the boundary, a response may start at
    one place in one pair and earlier in another, and is a sequence for each; everywhere else it is a single one.

    Attributes:
        ids: (S,) lists of token ids, prompt and response, cut to ``max_length``.
        prompt_lengths: (S,) int64, tokens of the prompt; the log-probability of a response sums over the rest.
        pairs: (P, 2) int64, the sequences of the preferred and of the other response of each candidate pair.
        response_of: (S,) int64, the response that each sequence is of.
        sequence_ids: (S, 16) uint8, content hash of each sequence: that of the response where it starts as soon as it
            parts from the prompt; else only the first eight bytes are the response's.
        max_length: The window to which sequences were cut; None where nothing was.
        truncated: How many sequences were cut.
    """

    ids: list[list[int]]
    prompt_lengths: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    response_of: npt.NDArray[np.int64]
    sequence_ids: npt.NDArray[np.uint8]
    max_length: int | None
    truncated: int

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(S,) int64, tokens of prompt and response together."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    @functools.cached_property
    def response_lengths(self) -> npt.NDArray[np.int64]:
        """(S,) int64, tokens of the response alone."""
        return self.lengths - self.prompt_lengths

    @functools.cached_property
    def predicted_lengths(self) -> npt.NDArray[np.int64]:
        """(S,) int64, tokens of the response that the model predicts: nothing predicts the first of a sequence."""
        lengths: npt.NDArray[np.int64] = self.response_lengths - (self.prompt_lengths == 0)
        return lengths

    def take(self, rows: npt.NDArray[np.int64]) -> TokenizedResponses:
        """Returns some sequences, in the order given, with the pairs whose two sequences are among them."""
        place = np.full(len(self.ids), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        pairs = place[self.pairs]
        return dataclasses.replace(
            self,
            ids=[self.ids[row] for row in rows],
            prompt_lengths=self.prompt_lengths[rows],
            pairs=pairs[(pairs >= 0).all(axis=1)],
            response_of=self.response_of[rows],
            sequence_ids=self.sequence_ids[rows],
        )

    def keep_pairs(
        self, pair_index: npt.NDArray[np.int64], response_index: npt.NDArray[np.int64]
    ) -> TokenizedResponses:
        """Restricts the sequences as candidates were; takes the second and third result of ``keep_pairs`` there."""
        rows, pairs = np.unique(self.pairs[pair_index], return_inverse=True)
        taken = self.take(rows)
        return dataclasses.replace(
            taken, pairs=pairs.reshape(-1, 2), response_of=np.searchsorted(response_index, taken.response_of)
        )


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
    candidates: Candidates,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    truncation_mode: TruncationMode = "keep_start",
) -> tuple[TokenizedResponses, npt.NDArray[np.bool_], Skipped]:
    """Tokenizes the responses of every candidate pair behind their prompt, as TRL 1.x does for the same rows.

    Conversations go through the chat template; plain text gets the end token. The two responses of a pair start where
    the tokens of the prompt alone and of prompt + response part, at the earlier of both places.

    Args:
        candidates: Prompts and responses.
        processing_class: The tokenizer.
        max_length: Longest sequence, in tokens; None cuts nothing.
        truncation_mode: TRL's word for which end of a longer sequence is kept.

    Returns:
        The sequences; for each pair whether the window has room for its responses ((P,) bool); and which have not.

    Raises:
        ValueError: A tokenizer that cannot do this (see :func:`check_tokenizer`), or a row that it fails on.
    """
    check_tokenizer(processing_class, candidates.conversational)
    uncut: list[list[int]] = []  # (R,)
    starts: list[int] = []  # (R,) where each response parts from its prompt
    prompt_tokens: list[int] = []  # (n,)
    per_prompt = np.bincount(candidates.prompt_of_response, minlength=len(candidates.prompts))
    for index, prompt in enumerate(candidates.prompts):
        row = int(candidates.prompt_rows[index])
        settings = candidates.template_kwargs[index]
        prompt_ids = _ids(processing_class, prompt, row, settings, add_generation_prompt=True)
        prompt_tokens.append(len(prompt_ids))
        for response in candidates.responses[len(uncut) : len(uncut) + per_prompt[index]]:
            ids = _ids(processing_class, _joined(prompt, response, processing_class.eos_token), row, settings)
            if not ids:
                raise ValueError(f"Row {row}: the tokenizer gives no tokens for prompt and response.")
            uncut.append(ids)
            starts.append(_common_prefix_length(prompt_ids, ids))

    response_start = np.array(starts, dtype=np.int64)
    pair_start = response_start[candidates.pairs].min(axis=1)
    _warn_of_moved_starts(candidates, pair_start < np.array(prompt_tokens)[candidates.prompt_of_pair])
    # One sequence for each response and start that some pair asks for, in the order of the responses.
    keys = candidates.pairs * (pair_start.max() + 1) + pair_start[:, None]
    _, first, pairs = np.unique(keys, return_index=True, return_inverse=True)
    pairs = pairs.reshape(-1, 2)
    response_of, start = candidates.pairs.ravel()[first], np.repeat(pair_start, 2)[first]
    lengths = np.array([len(ids) for ids in uncut], dtype=np.int64)[response_of]
    if (lengths <= start).any():
        prompt_of_empty = candidates.prompt_of_response[response_of[lengths <= start][0]]
        raise ValueError(
            f"Row {candidates.prompt_rows[prompt_of_empty]}: no token of a response follows the prompt; look at the "
            "chat template."
        )

    over = np.maximum(lengths - max_length, 0) if max_length is not None else np.zeros_like(lengths)
    keeps_end = truncation_mode == "keep_end"
    fits = np.ones(len(pairs), dtype=bool)
    if max_length is not None and not keeps_end:
        fits = pair_start < max_length
    tokenized = TokenizedResponses(
        ids=[
            uncut[response] if not cut else uncut[response][cut:] if keeps_end else uncut[response][:-cut]
            for response, cut in zip(response_of.tolist(), over.tolist(), strict=True)
        ],
        prompt_lengths=np.maximum(start - over, 0) if keeps_end else np.minimum(start, lengths - over),
        pairs=pairs,
        response_of=response_of,
        sequence_ids=_sequence_ids(candidates, response_of, start, start < response_start[response_of]),
        max_length=max_length,
        truncated=int((over[np.unique(pairs[fits])] > 0).sum()),
    )
    skipped = Skipped()
    for place in dict.fromkeys(
        f"row {candidates.pair_rows[pair]}, {pair_start[pair]} tokens" for pair in np.flatnonzero(~fits)
    ):
        skipped.add(f"prompt fills the window of {max_length} tokens", place)
    return tokenized, fits, skipped


def tokenize_candidates(
    candidates: Candidates,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    truncation_mode: TruncationMode = "keep_start",
    on_invalid: OnInvalid,
) -> tuple[Candidates, TokenizedResponses]:
    """Tokenizes, and sets aside the pairs whose prompt leaves no room for a response, as TRL does.

    Raises:
        ValueError: No pair fits; or one does not and ``on_invalid`` is ``"raise"``.
    """
    tokenized, fits, skipped = tokenize_responses(
        candidates, processing_class, max_length, truncation_mode=truncation_mode
    )
    report_skipped(skipped, on_invalid)
    candidates.skipped.merge(skipped)
    if not fits.any():
        raise ValueError(f"Every prompt fills the window of {max_length} tokens; raise SelectConfig.max_length.")
    if tokenized.truncated:
        warn(f"{tokenized.truncated} of {len(tokenized.ids)} responses are cut to the window of {max_length} tokens.")
    kept, pair_index, response_index = candidates.keep_pairs(fits)
    return kept, tokenized.keep_pairs(pair_index, response_index)


def tokenize_prompts(
    candidates: Candidates,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    truncation_mode: TruncationMode = "keep_start",
) -> list[list[int]]:
    """Returns the token ids of each prompt as generation starts from it, cut to ``max_length``; never an empty list."""
    window = slice(-max_length, None) if max_length and truncation_mode == "keep_end" else slice(max_length)
    prompts = [
        _ids(processing_class, prompt, int(row), settings, add_generation_prompt=True)[window]
        for prompt, row, settings in zip(
            candidates.prompts, candidates.prompt_rows, candidates.template_kwargs, strict=True
        )
    ]
    return [ids or [padding_id(processing_class)] for ids in prompts]


def _warn_of_moved_starts(candidates: Candidates, moved: npt.NDArray[np.bool_]) -> None:
    """Says how many prompts, and pairs, have prompt tokens that do not come back in front of the response."""
    if moved.any():
        warn(
            f"{len(np.unique(candidates.prompt_of_pair[moved]))} of {len(candidates.prompts)} tokenized prompts are "
            f"not a prefix of prompt + response, in {moved.sum()} of {len(moved)} pairs; as in TRL, their responses "
            "start where the two part. End prompts on a token boundary to avoid it."
        )


def _sequence_ids(
    candidates: Candidates,
    response_of: npt.NDArray[np.int64],
    start: npt.NDArray[np.int64],
    special: npt.NDArray[np.bool_],
) -> npt.NDArray[np.uint8]:
    """Returns the hash of the response, and for special sequences one whose second half depends on the rest, too.

    The first half stays, so that a store still knows which data its rows are of.
    """
    ids = candidates.response_ids[response_of]
    for sequence in np.flatnonzero(special):
        digest = hashlib.sha256(ids[sequence].tobytes() + int(start[sequence]).to_bytes(8, "little")).digest()
        ids[sequence, 8:] = np.frombuffer(digest[:8], dtype=np.uint8)
    return ids


def _joined(prompt: Text, response: Text, end: str) -> Text:
    """Prompt and response as one; plain text is closed by the end token, conversations by their template."""
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt + response + ("" if response.endswith(end) else end)
    assert isinstance(prompt, list) and isinstance(response, list)
    return prompt + response


def _ids(
    processing_class: PreTrainedTokenizerBase,
    text: Text,
    row: int,
    settings: dict[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    if isinstance(text, list):
        try:
            encoded = processing_class.apply_chat_template(
                text, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **settings
            )
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
