"""Responses and pairs, collected by exact prompt."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.candidates import Candidates, Skipped
from bpo.data.values import as_weights, content_id

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.data.values import Text

OTHER_COLUMNS = " with other token weights or reference log-probabilities"
OTHER_WEIGHT = " with another weight"


class Groups:
    """Collects responses and pairs by exact prompt."""

    def __init__(self, row_weights: npt.NDArray[np.float64] | None = None) -> None:
        self.row_weights = row_weights
        self.prompts: dict[bytes, Group] = {}
        self.skipped = Skipped()
        self.conversational: bool | None = None
        self.token_weights: dict[bytes, int] = {}

    def group(self, index: int, prompt: Text, template_kwargs: dict[str, Any]) -> Group:
        """Returns the group of a prompt, whose identity the settings of its chat template are part of."""
        conversational = isinstance(prompt, list)
        if self.conversational is None:
            self.conversational = conversational
        elif self.conversational != conversational:
            kinds = ("chat messages", "plain text")
            raise ValueError(
                f"Row {index}: the prompt is {kinds[not conversational]}, but earlier rows hold {kinds[conversational]}"
                ". Bring all rows into one form."
            )
        # As JSON in the order given, in which a template renders it.
        settings = [json.dumps(template_kwargs)] if conversational and template_kwargs else []
        key = content_id(prompt, *settings)
        if key not in self.prompts:
            self.prompts[key] = Group(prompt, settings, index, key)
        return self.prompts[key]

    def weights_index(self, value: Any, place: str) -> int:
        """Returns the index of an array of token weights among the distinct ones."""
        return self.token_weights.setdefault(as_weights(value, place).tobytes(), len(self.token_weights))

    def weigh_alike(self, row: int, other: int) -> bool:
        """Whether two rows have the same weight."""
        return self.row_weights is None or bool(self.row_weights[row] == self.row_weights[other])

    def set_aside(self, group: Group, responses: Iterable[Text], reason: str, place: str) -> None:
        """Names what cannot be used of a prompt; a store still knows its responses as ones of this data."""
        self.skipped.add(reason, place)
        group.set_aside += [group.response_id(response) for response in responses]

    def _weighing(self, pairs: list[Pair]) -> list[Pair]:
        """Sets pairs of weight 0 aside, which would teach nothing."""
        if self.row_weights is None:
            return pairs
        for pair in pairs:
            if self.row_weights[pair.row] == 0:
                self.skipped.add("pair of weight 0", f"row {pair.row}")
        return [pair for pair in pairs if self.row_weights[pair.row] > 0]

    def build(self, max_pairs_per_prompt: int | None) -> Candidates:
        """Returns what was collected, with at most so many pairs of each prompt, the largest score gaps."""
        groups: list[Group] = []
        kept_pairs: list[list[Pair]] = []
        for group in self.prompts.values():
            pairs = self._weighing(group.candidate_pairs(self.skipped))
            if max_pairs_per_prompt is not None and len(pairs) > max_pairs_per_prompt:
                # NaN gaps (no scores) keep the order of the data: the sort is stable.
                order = sorted(range(len(pairs)), key=lambda index: -gap if (gap := pairs[index].gap) == gap else 0.0)
                pairs = [pairs[index] for index in sorted(order[:max_pairs_per_prompt])]
            if pairs:
                groups.append(group)
                kept_pairs.append(pairs)
        if not groups:
            raise ValueError(
                "No prompt has two responses of which one is preferred, so there is nothing to select.\n"
                + self.skipped.describe()
            )
        offsets = np.cumsum([0] + [len(group.responses) for group in groups])
        flat = [pair for pairs in kept_pairs for pair in pairs]
        prompt_of_pair = np.repeat(np.arange(len(groups)), [len(pairs) for pairs in kept_pairs]).astype(np.int64)
        pairs_in_prompt = np.array([(pair.chosen, pair.rejected) for pair in flat], dtype=np.int64)
        pair_rows = np.array([pair.row for pair in flat], dtype=np.int64)
        known = [key for group in self.prompts.values() for key in (*group.keys, *group.set_aside)]
        return Candidates(
            prompts=[group.prompt for group in groups],
            prompt_rows=np.array([group.row for group in groups], dtype=np.int64),
            prompt_ids=_id_array([group.key for group in groups]),
            template_kwargs=[json.loads(group.settings[0]) if group.settings else {} for group in groups],
            responses=[response for group in groups for response in group.responses],
            response_ids=_id_array([key for group in groups for key in group.keys]),
            prompt_of_response=np.repeat(np.arange(len(groups)), np.diff(offsets)).astype(np.int64),
            response_places=np.array([place for group in groups for place in group.places], dtype=np.int64),
            scores=np.array([score for group in groups for score in group.scores], dtype=np.float64),
            pairs=pairs_in_prompt + offsets[prompt_of_pair, None],
            prompt_of_pair=prompt_of_pair,
            pair_rows=pair_rows,
            pair_scores=np.array([(pair.score_chosen, pair.score_rejected) for pair in flat], dtype=np.float64),
            token_weights=[np.frombuffer(data, dtype=np.float32) for data in self.token_weights],
            pair_weights=np.array([pair.weights for pair in flat], dtype=np.int64),
            pair_ref_logps=np.array([pair.ref_logps for pair in flat], dtype=np.float64),
            weights=None if self.row_weights is None else self.row_weights[pair_rows],
            known_ids=_id_array(known),
            skipped=self.skipped,
        )


def _id_array(ids: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Positions of two responses among those of the prompt, their scores (NaN if unknown), and the row of the data.

    ``weights`` and ``ref_logps`` are −1 and NaN where none are read.
    """

    chosen: int
    rejected: int
    score_chosen: float
    score_rejected: float
    row: int
    weights: tuple[int, int]
    ref_logps: tuple[float, float]

    def same_columns(self, other: Pair) -> bool:
        """Whether token weights and reference log-probabilities are the same."""
        return self.weights == other.weights and np.array_equal(self.ref_logps, other.ref_logps, equal_nan=True)

    @property
    def gap(self) -> float:
        """How much higher the preferred response scored, NaN without scores."""
        return self.score_chosen - self.score_rejected


class Group:
    """One prompt: its distinct responses and, where the data states them, its pairs."""

    def __init__(self, prompt: Text, settings: list[str], row: int, key: bytes) -> None:
        self.prompt = prompt
        self.settings = settings
        self.row = row
        self.key = key
        self.responses: list[Text] = []
        self.keys: list[bytes] = []
        self.scores: list[float] = []
        self.places: list[tuple[int, int]] = []
        self.weights: list[int] = []
        self.ref_logps: list[float] = []
        self.stated: dict[tuple[int, int], Pair] = {}
        self.scored = False
        self.set_aside: list[bytes] = []
        self._index: dict[bytes, int] = {}

    def add(
        self,
        response: Text,
        score: float,
        row: int,
        position: int = -1,
        weights: int = -1,
        ref_logp: float = math.nan,
    ) -> tuple[int, bool]:
        """Returns the index of the response in the group and whether it is new."""
        key = self.response_id(response)
        if key in self._index:
            return self._index[key], False
        self._index[key] = len(self.responses)
        self.responses.append(response)
        self.keys.append(key)
        self.scores.append(score)
        self.places.append((row, position))
        self.weights.append(weights)
        self.ref_logps.append(ref_logp)
        return self._index[key], True

    def response_id(self, response: Text) -> bytes:
        """Returns the content hash of prompt and response."""
        return content_id(self.prompt, *self.settings, response)

    def candidate_pairs(self, skipped: Skipped) -> list[Pair]:
        """Returns the pairs that the data states, or those of unequal scores; says where there are none."""
        if not self.scored:
            return list(self.stated.values())
        place = f"row {self.row}"
        if len(self.responses) < 2:
            skipped.add("prompt with fewer than two usable responses", place)
            return []
        pairs = [
            Pair(
                chosen,
                rejected,
                self.scores[chosen],
                self.scores[rejected],
                self.places[chosen][0],
                (self.weights[chosen], self.weights[rejected]),
                (self.ref_logps[chosen], self.ref_logps[rejected]),
            )
            for chosen in range(len(self.responses))
            for rejected in range(len(self.responses))
            if self.scores[chosen] > self.scores[rejected]
        ]
        if not pairs:
            skipped.add("prompt whose responses all have equal scores", place)
        return pairs
