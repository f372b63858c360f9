"""Prompts and responses to token ids: the same ids that TRL's ``DPOTrainer`` trains on."""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from bpo.data.candidates import Skipped, report_skipped
from bpo.data.tokenizers import check_tokenizer, joined, padding_id, token_ids
from bpo.data.values import UnusableError, as_weights
from bpo.system.packed import Packed
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from bpo.choices import OnInvalid, TokenWeights, TruncationMode
    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates

_NAMED_TOKENS = 40

# Absolute and relative; a model in bfloat16 differs from itself in another batch by up to 2 %.
_REF_TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class TokenizedResponses:
    """Token ids of responses with their prompt in front.

    One *sequence* is a response together with the place where it starts. Both responses of a pair start where the
    first of them parts from the prompt, as in TRL. So where tokens merge across the boundary, a response may start at
    one place in one pair and earlier in another, and is a sequence for each; everywhere else it is a single one. The
    same holds for a response to whose tokens preference rows give other weights in another pair.

    Attributes:
        ids: (S,) lists of token ids, prompt and response, cut to ``max_length``; on disk where they are many.
        prompt_lengths: (S,) int64, tokens of the prompt; the log-probability of a response sums over the rest.
        pairs: (P, 2) int64, the sequences of the preferred and of the other response of each candidate pair.
        response_of: (S,) int64, the response that each sequence is of.
        sequence_ids: (S, 16) uint8, content hash of each sequence: that of the response where it starts as soon as it
            parts from the prompt and its tokens have no weights; else only the first eight bytes are the response's.
        weights: (S,) float32 arrays, the weight of each token of the response in its log-probability; None where each
            counts once.
        ref_logps: (S,) float64, log π_ref of each sequence as the data gives it; None where it does not.
        max_length: The window to which sequences were cut; None where nothing was.
        truncated: How many sequences were cut.
    """

    ids: Packed[list[int]]
    prompt_lengths: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    response_of: npt.NDArray[np.int64]
    sequence_ids: npt.NDArray[np.uint8]
    weights: list[npt.NDArray[np.float32]] | None
    ref_logps: npt.NDArray[np.float64] | None
    max_length: int | None
    truncated: int

    @functools.cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(S,) int64, tokens of prompt and response together."""
        return self.ids.sizes() // 4

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
            ids=self.ids.take(rows),
            prompt_lengths=self.prompt_lengths[rows],
            pairs=pairs[(pairs >= 0).all(axis=1)],
            response_of=self.response_of[rows],
            sequence_ids=self.sequence_ids[rows],
            weights=None if self.weights is None else [self.weights[row] for row in rows],
            ref_logps=None if self.ref_logps is None else self.ref_logps[rows],
        )

    def cut(self, max_length: int | None, truncation_mode: TruncationMode) -> TokenizedResponses:
        """Returns the sequences cut to ``max_length``, without their responses where prompts fill the window."""
        if max_length is None:
            return self
        keeps_end = truncation_mode == "keep_end"
        over = np.maximum(self.lengths - max_length, 0)
        ids = self.ids
        if over.any():
            cut = (
                (row[count:] if keeps_end else row[:max_length]) if count else row
                for row, count in zip(ids, over, strict=True)
            )
            ids = packed_ids(cut)
        weights = self.weights
        if weights is not None:
            lost = np.maximum(over - self.prompt_lengths, 0) if keeps_end else np.minimum(over, self.response_lengths)
            weights = [
                array[count:] if keeps_end else array[: len(array) - count]
                for array, count in zip(weights, lost, strict=True)
            ]
        tokenized = dataclasses.replace(
            self,
            ids=ids,
            prompt_lengths=np.maximum(self.prompt_lengths - over, 0)
            if keeps_end
            else np.minimum(self.prompt_lengths, max_length),
            weights=weights,
            max_length=max_length,
        )
        return dataclasses.replace(tokenized, truncated=int(((over > 0) & (tokenized.response_lengths > 0)).sum()))

    def keep_pairs(
        self, pair_index: npt.NDArray[np.int64], response_index: npt.NDArray[np.int64]
    ) -> TokenizedResponses:
        """Restricts the sequences as candidates were; takes the second and third result of ``keep_pairs`` there."""
        rows, pairs = np.unique(self.pairs[pair_index], return_inverse=True)
        taken = self.take(rows)
        return dataclasses.replace(
            taken, pairs=pairs.reshape(-1, 2), response_of=np.searchsorted(response_index, taken.response_of)
        )


def packed_ids(rows: Iterable[list[int]] = ()) -> Packed[list[int]]:
    """Returns lists of token ids, four bytes each."""
    return Packed(_pack_ids, _unpack_ids, rows)


def _pack_ids(ids: list[int]) -> bytes:
    return array.array("i", ids).tobytes()


def _unpack_ids(data: bytes) -> list[int]:
    return memoryview(data).cast("i").tolist()


def tokenize_responses(
    candidates: Candidates,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    truncation_mode: TruncationMode = "keep_start",
    token_weights: TokenWeights | None = None,
) -> tuple[TokenizedResponses, npt.NDArray[np.bool_], Skipped]:
    """Tokenizes the responses of every candidate pair behind their prompt, as TRL 1.x does for the same rows.

    Conversations go through the chat template; plain text gets the end token. The two responses of a pair start where
    the tokens of the prompt alone and of prompt + response part, at the earlier of both places.

    Args:
        candidates: Prompts and responses.
        processing_class: The tokenizer.
        max_length: Longest sequence, in tokens; None cuts nothing.
        truncation_mode: TRL's word for which end of a longer sequence is kept.
        token_weights: Gives the weights of the tokens of a response, where the candidates do not bring them along.

    Returns:
        The sequences; for each pair whether it can be used ((P,) bool); and which cannot: the window has no room for
        their responses, or reference log-probabilities that the data gives are not those of these tokens.

    Raises:
        ValueError: A tokenizer that cannot do this (see :func:`check_tokenizer`), a row that it fails on, or token
            weights of another number than the tokens.
    """
    check_tokenizer(processing_class, candidates.conversational)
    whole, response_start = _tokenize(candidates, processing_class)
    pair_start = response_start[candidates.pairs].min(axis=1)
    # One sequence for each response, start and weights that some pair asks for, in the order of the responses.
    keys = candidates.pairs * (pair_start.max() + 1) + pair_start[:, None]
    if candidates.token_weights:
        ranks = np.unique(keys, return_inverse=True)[1].reshape(-1, 2)
        keys = ranks * len(candidates.token_weights) + candidates.pair_weights
    _, sides, pairs = np.unique(keys, return_index=True, return_inverse=True)
    response_of, start = candidates.pairs.ravel()[sides], np.repeat(pair_start, 2)[sides]
    weights = None
    if token_weights is not None or candidates.token_weights:
        weights = [
            _sequence_weights(candidates, processing_class, token_weights, whole[response], begin, side)
            for response, begin, side in zip(response_of, start.tolist(), sides.tolist(), strict=True)
        ]
    uncut = TokenizedResponses(
        ids=whole.take(response_of),
        prompt_lengths=start,
        pairs=pairs.reshape(-1, 2),
        response_of=response_of,
        sequence_ids=_sequence_ids(candidates.response_ids[response_of], start, response_start[response_of], weights),
        weights=weights,
        ref_logps=None,
        max_length=None,
        truncated=0,
    )
    empty = np.flatnonzero(uncut.response_lengths <= 0)
    if len(empty):
        place = candidates.place(int(sides[empty[0]]))
        raise ValueError(f"{place}: no token of the response follows the prompt; look at the chat template.")
    tokenized = uncut.cut(max_length, truncation_mode)
    usable = tokenized.response_lengths[tokenized.pairs].min(axis=1) > 0
    skipped = Skipped()
    for place in dict.fromkeys(
        f"row {candidates.pair_rows[pair]}, {pair_start[pair]} tokens" for pair in np.flatnonzero(~usable)
    ):
        skipped.add(f"prompt fills the window of {max_length} tokens", place)
    if not np.isnan(candidates.pair_ref_logps).all():
        moved = pair_start[:, None] < response_start[candidates.pairs]
        ref_logps, known = _sequence_ref_logps(candidates, tokenized, moved, skipped)
        tokenized, usable = dataclasses.replace(tokenized, ref_logps=ref_logps), usable & known
    return tokenized, usable, skipped


def tokenize_candidates(
    candidates: Candidates,
    processing_class: PreTrainedTokenizerBase,
    max_length: int | None,
    *,
    truncation_mode: TruncationMode = "keep_start",
    token_weights: TokenWeights | None = None,
    on_invalid: OnInvalid,
) -> tuple[Candidates, TokenizedResponses]:
    """Tokenizes, and sets aside the pairs that cannot be used: TRL drops those whose prompt leaves a response no room.

    Raises:
        ValueError: No pair can be used; or one cannot and ``on_invalid`` is ``"raise"``.
    """
    tokenized, usable, skipped = tokenize_responses(
        candidates, processing_class, max_length, truncation_mode=truncation_mode, token_weights=token_weights
    )
    report_skipped(skipped, on_invalid)
    candidates.skipped.merge(skipped)
    if not usable.any():
        raise ValueError(f"No pair can be used; if prompts fill the window, raise max_length.\n{skipped.describe()}")
    if tokenized.truncated:
        warn(f"{tokenized.truncated} of {len(tokenized.ids)} responses are cut to the window of {max_length} tokens.")
    kept, pair_index, response_index = candidates.keep_pairs(usable)
    return kept, tokenized.keep_pairs(pair_index, response_index)


def tokenize_configured(
    candidates: Candidates, processing_class: PreTrainedTokenizerBase, max_length: int | None, config: SelectConfig
) -> tuple[Candidates, TokenizedResponses]:
    """Tokenizes as a configuration asks for; see :func:`tokenize_candidates`."""
    return tokenize_candidates(
        candidates,
        processing_class,
        max_length,
        truncation_mode=config.truncation_mode,
        token_weights=config.token_weights if callable(config.token_weights) else None,
        on_invalid=config.on_invalid,
    )


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
        token_ids(processing_class, prompt, int(row), settings, add_generation_prompt=True)[window]
        for prompt, row, settings in zip(
            candidates.prompts, candidates.prompt_rows, candidates.template_kwargs, strict=True
        )
    ]
    return [ids or [padding_id(processing_class)] for ids in prompts]


def _tokenize(
    candidates: Candidates, processing_class: PreTrainedTokenizerBase
) -> tuple[Packed[list[int]], npt.NDArray[np.int64]]:
    """Returns the token ids of every response behind its prompt, and where they part from those of the prompt alone."""
    whole = packed_ids()
    starts, lengths = array.array("q"), array.array("q")  # the latter (n,) of the prompts
    per_prompt = np.bincount(candidates.prompt_of_response, minlength=len(candidates.prompts))
    for index, prompt in enumerate(candidates.prompts):
        row = int(candidates.prompt_rows[index])
        settings = candidates.template_kwargs[index]
        prompt_ids = token_ids(processing_class, prompt, row, settings, add_generation_prompt=True)
        lengths.append(len(prompt_ids))
        for response in candidates.responses[len(whole) : len(whole) + per_prompt[index]]:
            ids = token_ids(processing_class, joined(prompt, response, processing_class.eos_token), row, settings)
            if not ids:
                raise ValueError(f"Row {row}: the tokenizer gives no tokens for prompt and response.")
            whole.append(ids)
            starts.append(_common_prefix_length(prompt_ids, ids))
    response_start = np.frombuffer(starts, dtype=np.int64)
    moved = (
        response_start[candidates.pairs].min(axis=1) < np.frombuffer(lengths, dtype=np.int64)[candidates.prompt_of_pair]
    )
    if moved.any():
        warn(
            f"{len(np.unique(candidates.prompt_of_pair[moved]))} of {len(candidates.prompts)} tokenized prompts are "
            f"not a prefix of prompt + response, in {moved.sum()} of {len(moved)} pairs; as in TRL, their responses "
            "start where the two part. End prompts on a token boundary to avoid it."
        )
    return whole, response_start


def _sequence_weights(
    candidates: Candidates,
    processing_class: PreTrainedTokenizerBase,
    token_weights: TokenWeights | None,
    ids: list[int],
    start: int,
    side: int,
) -> npt.NDArray[np.float32]:
    """Returns the weights of the tokens of one response, from the function or else from the data."""
    if token_weights is None:
        weights = candidates.token_weights[int(candidates.pair_weights.flat[side])]
    else:
        try:
            weights = as_weights(token_weights(ids[:start], ids[start:]))
        except UnusableError as error:
            raise ValueError(f"{candidates.place(side)}: {error}.") from None
    if len(weights) != len(ids) - start:
        tokens = processing_class.convert_ids_to_tokens(ids[start:])
        named = ", ".join(map(repr, tokens[:_NAMED_TOKENS])) + (", …" if len(tokens) > _NAMED_TOKENS else "")
        raise ValueError(
            f"{candidates.place(side)}: {len(weights)} token weights for {len(tokens)} tokens; give one for each "
            f"token of the response, the end token included: {named}."
        )
    return weights


def _sequence_ref_logps(
    candidates: Candidates, tokenized: TokenizedResponses, moved: npt.NDArray[np.bool_], skipped: Skipped
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Returns log π_ref of each sequence as the data gives it, and for each pair whether that is so.

    Preference rows give the value of the sequence in the pair, and several rows may give that of the same sequence.
    Scored responses have one value, so it cannot be that of a pair that starts before the response parts from the
    prompt: ``moved`` ((P, 2) bool).
    """
    given = candidates.pair_ref_logps
    values = np.full(len(tokenized.ids), np.nan)
    values[tokenized.pairs.ravel()[::-1]] = given.ravel()[::-1]  # the first of several
    same = np.isclose(given, values[tokenized.pairs], rtol=_REF_TOLERANCE, atol=_REF_TOLERANCE).min(axis=1)
    moved = (moved & (candidates.response_places[candidates.pairs, 1] >= 0)).max(axis=1)
    for row in candidates.pair_rows[~same]:
        skipped.add("reference log-probability differs from that of the same response in an earlier row", f"row {row}")
    for row in candidates.pair_rows[moved]:
        skipped.add("pair that starts before the response, where ref_logps does not hold", f"row {row}")
    return values, same & ~moved


def _sequence_ids(
    response_ids: npt.NDArray[np.uint8],
    start: npt.NDArray[np.int64],
    response_start: npt.NDArray[np.int64],
    weights: list[npt.NDArray[np.float32]] | None,
) -> npt.NDArray[np.uint8]:
    """Returns the hash of the response; one whose second half depends on the rest, too, where there is something else.

    The first half stays, so that a store still knows which data its rows are of.
    """
    ids: npt.NDArray[np.uint8] = response_ids.copy()
    for sequence in np.flatnonzero((start != response_start) | (weights is not None)):
        digest = hashlib.sha256(ids[sequence].tobytes() + int(start[sequence]).to_bytes(8, "little"))
        if weights is not None:
            digest.update(weights[sequence].astype("<f4").tobytes())
        ids[sequence, 8:] = np.frombuffer(digest.digest()[:8], dtype=np.uint8)
    return ids


def _common_prefix_length(left: list[int], right: list[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
