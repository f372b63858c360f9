"""What a selection reads: candidate pairs, and where their tokens or their gradients are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bpo.data.length import character_lengths, take_out_length, turn
from bpo.data.tokens import tokenize_configured
from bpo.pairs.measured import in_store, measured
from bpo.pairs.ranks import largest_gaps

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates, Skipped
    from bpo.data.tokens import TokenizedResponses
    from bpo.pairs.measured import MeasuredPairs
    from bpo.selection.strategies import Need
    from bpo.store.gradient_store import GradientStore


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Pairs that were read, and where their tokens or their gradients are.

    Attributes:
        candidates: Prompts, responses and P pairs.
        tokenized: Their tokens, where there is a model.
        stored: (R,) int64, the row of each response in a store whose gradients are used as they are.
        lengths: (P, 2) int64, tokens of the two responses; None without tokens.
    """

    candidates: Candidates
    tokenized: TokenizedResponses | None = None
    stored: npt.NDArray[np.int64] | None = None
    lengths: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        candidates: Candidates,
        *,
        present: GradientStore | None,
        tokenizer: Any,
        longest: int | None,
        config: SelectConfig,
    ) -> Inputs:
        """Finds the pairs in a store, or tokenizes them, or neither."""
        if present is not None:
            candidates, stored = in_store(candidates, present, config)
            lengths = present.records["length"][stored].astype(np.int64)[candidates.pairs]
            return cls(candidates, stored=stored, lengths=lengths)
        if tokenizer is not None:
            candidates, tokenized = tokenize_configured(candidates, tokenizer, longest, config)
            return cls(candidates, tokenized, lengths=tokenized.response_lengths[tokenized.pairs])
        return cls(candidates)

    @property
    def length_unit(self) -> Literal["tokens", "characters"]:
        """Unit of ``pair_lengths``."""
        return "characters" if self.lengths is None else "tokens"

    @property
    def pair_lengths(self) -> npt.NDArray[np.int64]:
        """(P, 2), at least 1: tokens, or characters where there are none."""
        return character_lengths(self.candidates) if self.lengths is None else np.maximum(self.lengths, 1)

    def keep_pairs(self, kept: npt.NDArray[np.bool_]) -> tuple[Inputs, npt.NDArray[np.int64]]:
        """Restricts the pairs ((P,) bool); returns also the index of each."""
        candidates, pair_index, response_index = self.candidates.keep_pairs(kept)
        return (
            Inputs(
                candidates,
                None if self.tokenized is None else self.tokenized.keep_pairs(pair_index, response_index),
                None if self.stored is None else self.stored[response_index],
                None if self.lengths is None else self.lengths[pair_index],
            ),
            pair_index,
        )

    def measured_in(self, present: GradientStore, config: SelectConfig, progress: bool) -> MeasuredPairs:
        """Reads the gradients of pairs that were found in a store."""
        assert self.stored is not None
        rows = self.stored[self.candidates.pairs]
        return measured([present], [rows], config, weights=self.candidates.weights, progress=progress)

    def without_length(self, slope: float, config: SelectConfig, noted: Skipped) -> Inputs:
        """Takes the length effect out of the scores, names the pairs that turn, and caps the pairs by their gaps."""
        candidates, turned = take_out_length(self.candidates, self.pair_lengths, slope)
        for row in candidates.pair_rows[turned]:
            noted.add("pair turned round, since it was length that made the other response preferred", f"row {row}")
        tokenized = self.tokenized
        inputs = dataclasses.replace(
            self,
            candidates=candidates,
            tokenized=None
            if tokenized is None
            else dataclasses.replace(tokenized, pairs=turn(tokenized.pairs, turned)),
            lengths=None if self.lengths is None else turn(self.lengths, turned),
        )
        if config.max_pairs_per_prompt is None:
            return inputs
        return inputs.keep_pairs(largest_gaps(candidates, config.max_pairs_per_prompt))[0]


def reading_settings(config: SelectConfig, needs_gradients: bool, present: GradientStore | None) -> SelectConfig:
    """The settings to read data with: what only gradients depend on need not be in the data otherwise."""
    reading = config
    if not needs_gradients or present is not None:
        named = config.token_weights if present is not None and isinstance(config.token_weights, str) else None
        reading = dataclasses.replace(config, token_weights=named, ref_model=None)
    if config.length_control == "residual":
        reading = dataclasses.replace(reading, max_pairs_per_prompt=None)  # which gaps are largest is not known yet
    return reading


def check_scores(candidates: Candidates, strategy: str, needs: frozenset[Need], config: SelectConfig) -> None:
    """Checks that pairs have scores where something needs them."""
    unscored = np.flatnonzero(np.isnan(candidates.score_gaps))
    if len(unscored) == 0:
        return
    if "scores" in needs:
        raise ValueError(
            f"strategy={strategy!r} needs scores, but {len(unscored)} of {len(candidates.pairs)} pairs have none. "
            "Give the columns score_chosen and score_rejected, or scored responses."
        )
    if config.length_control == "residual":
        raise ValueError(
            f"length_control='residual' needs scores, but {len(unscored)} of {len(candidates.pairs)} pairs have none, "
            f"such as that of row {candidates.pair_rows[unscored[0]]}. Give score_chosen and score_rejected, or use "
            "length_control='balance', which needs no scores."
        )
