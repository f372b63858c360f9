"""What a selection reads: candidate pairs, and where their tokens or their gradients are."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal

import numpy as np

from bpo.pairs.length import character_lengths, fit_length_effect, take_out_length, turn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.data.candidates import Candidates, Skipped
    from bpo.data.tokens import TokenizedResponses
    from bpo.pairs.length import LengthEffect


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Pairs that were read, and where their tokens or their gradients are.

    Attributes:
        candidates: Prompts, responses and P pairs.
        tokenized: Their tokens, where there is a model.
        stored: (P, 2) int64, the rows of the two responses in a store whose gradients are used as they are.
        lengths: (P, 2) int64, tokens of the two responses; None without tokens.
    """

    candidates: Candidates
    tokenized: TokenizedResponses | None = None
    stored: npt.NDArray[np.int64] | None = None
    lengths: npt.NDArray[np.int64] | None = None

    @property
    def length_unit(self) -> Literal["tokens", "characters"]:
        """Unit of ``pair_lengths``."""
        return "characters" if self.lengths is None else "tokens"

    @functools.cached_property
    def pair_lengths(self) -> npt.NDArray[np.int64]:
        """(P, 2), at least 1: tokens, or characters where there are none."""
        return character_lengths(self.candidates) if self.lengths is None else np.maximum(self.lengths, 1)

    def length_effect(self) -> LengthEffect:
        """Measures how scores go with length."""
        return fit_length_effect(self.candidates, self.pair_lengths, self.length_unit)

    def keep_pairs(self, kept: npt.NDArray[np.bool_]) -> tuple[Inputs, npt.NDArray[np.int64]]:
        """Restricts the pairs ((P,) bool); returns also the index of each."""
        candidates, pair_index, response_index = self.candidates.keep_pairs(kept)
        if candidates is self.candidates:
            return self, pair_index
        return (
            Inputs(
                candidates,
                None if self.tokenized is None else self.tokenized.keep_pairs(pair_index, response_index),
                None if self.stored is None else self.stored[pair_index],
                None if self.lengths is None else self.lengths[pair_index],
            ),
            pair_index,
        )

    def without_length(self, slope: float) -> tuple[Inputs, npt.NDArray[np.bool_]]:
        """Takes the length effect out of the scores; returns also which pairs turn round by that ((P,) bool)."""
        candidates, turned = take_out_length(self.candidates, self.pair_lengths, slope)
        return self.turned(candidates, turned), turned

    def turned(self, candidates: Candidates, turned: npt.NDArray[np.bool_]) -> Inputs:
        """The same for candidates of which some pairs ((P,) bool) have turned round."""
        tokenized = self.tokenized
        if tokenized is not None:
            tokenized = dataclasses.replace(tokenized, pairs=turn(tokenized.pairs, turned))
        stored, lengths = (None if each is None else turn(each, turned) for each in (self.stored, self.lengths))
        return Inputs(candidates, tokenized, stored, lengths)


@dataclasses.dataclass(frozen=True)
class Goal:
    """The pairs of a target.

    Attributes:
        inputs: T pairs.
        subtask_of_pair: (T,) int64, from 0.
    """

    inputs: Inputs
    subtask_of_pair: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Pool:
    """What a selection chooses from.

    Attributes:
        inputs: Candidate pairs.
        goal: The pairs of the target, where gradients are compared with one.
        effect: How scores go with length in the data.
        noted: What of the data was used but is worth a look.
    """

    inputs: Inputs
    goal: Goal | None
    effect: LengthEffect
    noted: Skipped

    @property
    def candidates(self) -> Candidates:
        """The candidate pairs and their prompts."""
        return self.inputs.candidates
