"""Responses and pairs, collected by exact prompt."""

from __future__ import annotations

import array
import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.candidates import Candidates, Skipped
from bpo.data.pairing import largest_gaps, pairs_of_scores
from bpo.data.values import (
    UnusableError,
    add_text,
    as_weights,
    content_hash,
    most_are_messages,
    pack_text,
    unpack_text,
)
from bpo.system.packed import Packed

if TYPE_CHECKING:
    import hashlib

    import numpy.typing as npt

    from bpo.data.values import Text

OTHER_COLUMNS = " with other token weights or reference log-probabilities"
OTHER_WEIGHT = " with another weight"
UNTRUSTED = "pair whose label is more likely wrong than right"
_FORMS = ("plain text", "chat messages")
_NO_SETTINGS: dict[str, Any] = {}  # one for all prompts

Group = tuple[int, "hashlib._Hash"]
"""Which prompt, of those that rows gave one after another, and the hash that those of its responses go on from."""


class Groups:
    """Collects responses by exact prompt, in columns: an object a response would take ten times the memory.

    Texts are packed, and on disk where they are many.

    Readers add *entries*: a response as a row gives it, be it new or not. Of preference rows two entries after one
    another are a pair. What is the same is found out at the end, prompts included.
    """

    def __init__(
        self, row_weights: npt.NDArray[np.float64] | None = None, row_trust: npt.NDArray[np.float64] | None = None
    ) -> None:
        self.skipped = Skipped()
        self._row_weights = row_weights
        # Why pairs of which rows are set aside.
        self._barred = {} if row_weights is None else {"pair of weight 0": row_weights == 0}
        if row_trust is not None:
            self._barred[UNTRUSTED] = row_trust < 0.5
        self._prompts = Packed(pack_text, unpack_text)
        self._template_kwargs: dict[int, dict[str, Any]] = {}
        self._prompt_rows: Any = array.array("q")
        self._prompt_ids = bytearray()
        self._chat: Any = bytearray()  # of each prompt, whether it is messages
        self._responses = Packed(pack_text, unpack_text)
        self._ids = bytearray()
        self._prompt_of_entry = array.array("q")
        self._scores = array.array("d")
        self._places = array.array("q")
        self._weights = array.array("q")
        self._ref_logps = array.array("d")
        self._token_weights: dict[bytes, int] = {}
        self._known = bytearray()

    def group(self, row: int, prompt: Text, template_kwargs: dict[str, Any]) -> Group:
        """Returns the group of a prompt, whose identity the settings of its chat template are part of."""
        digest = content_hash(prompt)
        if template_kwargs and isinstance(prompt, list):
            # As JSON in the order given, in which a template renders it.
            add_text(digest, json.dumps(template_kwargs))
        key = digest.digest()[:16]
        if not self._prompt_ids.endswith(key):
            self._prompt_ids += key
            self._prompts.append(prompt)
            self._prompt_rows.append(row)
            self._chat.append(isinstance(prompt, list))
            if template_kwargs and isinstance(prompt, list):
                self._template_kwargs[len(self._prompts) - 1] = template_kwargs
        return len(self._prompts) - 1, digest

    def add(
        self, group: Group, response: Text, score: float, row: int, position: int, weights: int, ref_logp: float
    ) -> None:
        """Adds a response as a row gives it; −1 and NaN where it gives no position, token weights or numbers."""
        self._responses.append(response)
        self._ids += add_text(group[1].copy(), response).digest()[:16]
        self._prompt_of_entry.append(group[0])
        self._scores.append(score)
        self._places.extend((row, position))
        # Every row has these, or none.
        if weights >= 0:
            self._weights.append(weights)
        if ref_logp == ref_logp:
            self._ref_logps.append(ref_logp)

    def keep_known(self, group: Group, responses: Iterable[Text]) -> None:
        """Notes responses that cannot be used; a store still knows them as ones of this data."""
        for response in responses:
            self._known += add_text(group[1].copy(), response).digest()[:16]

    def weights_index(self, value: Any, column: str) -> int:
        """Returns the index of an array of token weights among the distinct ones.

        Raises:
            UnusableError: No list of finite numbers.
        """
        try:
            weights = as_weights(value)
        except UnusableError as error:
            raise UnusableError(f"column '{column}': {error.reason}", error.got) from None
        return self._token_weights.setdefault(weights.tobytes(), len(self._token_weights))

    def build(self, *, scored: bool, max_pairs_per_prompt: int | None) -> Candidates:
        """Returns what was collected, with at most so many pairs of each prompt, the largest score gaps.

        Args:
            scored: Whether all pairs of unequal scores are meant, not those that two entries state.
            max_pairs_per_prompt: None is all.

        Raises:
            ValueError: There is no pair.
        """
        prompt_ids, entries = self._entries()
        usable = self._of_one_form(entries.prompts, entries.places[:, 0])
        same = _first_of_same(entries.ids)
        first = np.flatnonzero((same == np.arange(len(same))) & usable)
        # The distinct responses, by prompt, each where it was met first.
        first = first[np.argsort(entries.prompts[first], kind="stable")]
        if scored:
            self._name_repeated(entries, same, usable)
            pairs = self._scored_pairs(entries, first, max_pairs_per_prompt)
            stated = first[pairs]
        else:
            stated = self._stated_pairs(entries, same, usable)
            place = np.empty(len(same), dtype=np.int64)
            place[first] = np.arange(len(first))
            pairs = place[same[stated]]
            if max_pairs_per_prompt is not None:
                gaps = entries.scores[stated[:, 0]] - entries.scores[stated[:, 1]]
                kept = largest_gaps(entries.prompts[stated[:, 0]], gaps, max_pairs_per_prompt)
                pairs, stated = pairs[kept], stated[kept]
        if not len(pairs):
            raise ValueError(
                "No prompt has two responses of which one is preferred, so there is nothing to select.\n"
                + self.skipped.describe()
            )
        return self._candidates(entries, prompt_ids, first, pairs, stated)

    def _entries(self) -> tuple[npt.NDArray[np.uint8], _Entries]:
        """Returns the (n, 16) ids of the distinct prompts, which are all that is left of them, and the entries."""
        ids = _id_array([self._prompt_ids])
        same = _first_of_same(ids)
        new = same == np.arange(len(same))
        first = np.flatnonzero(new)
        self._prompts = self._prompts.take(first)
        self._prompt_rows = np.frombuffer(self._prompt_rows, dtype=np.int64)[first]
        self._chat = np.frombuffer(self._chat, dtype=np.uint8)[first].astype(bool)
        place_of = (np.cumsum(new) - 1)[same]
        self._template_kwargs = {
            int(place_of[place]): settings for place, settings in self._template_kwargs.items() if new[place]
        }
        n = len(self._responses)
        return ids[first], _Entries(
            ids=np.frombuffer(self._ids, dtype=np.uint8).reshape(-1, 16),
            prompts=place_of[np.frombuffer(self._prompt_of_entry, dtype=np.int64)],
            scores=np.frombuffer(self._scores, dtype=np.float64),
            places=np.frombuffer(self._places, dtype=np.int64).reshape(-1, 2),
            weights=np.frombuffer(self._weights, dtype=np.int64) if self._weights else np.broadcast_to(-1, n),
            ref_logps=np.frombuffer(self._ref_logps) if self._ref_logps else np.broadcast_to(np.nan, n),
        )

    def _of_one_form(self, prompts: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which entries have prompts of the form that most have, (E,) bool; names the rows of the others."""
        chat = self._chat[prompts]
        most = most_are_messages(chat)
        for row in np.unique(rows[chat != most]).tolist():
            self.skipped.add(f"the prompt is {_FORMS[not most]}, but most are {_FORMS[most]}", f"row {row}")
        usable: npt.NDArray[np.bool_] = chat == most
        return usable

    def _name_repeated(self, entries: _Entries, same: npt.NDArray[np.int64], usable: npt.NDArray[np.bool_]) -> None:
        """Names the responses that a prompt has more than once."""
        for entry in np.flatnonzero((same != np.arange(len(same))) & usable).tolist():
            earlier, (row, position) = int(same[entry]), entries.places[entry]
            if entries.scores[earlier] != entries.scores[entry]:
                reason = "duplicate response with another score than before"
            else:
                reason = "duplicate response of the same prompt" + OTHER_COLUMNS * (not entries.alike(earlier, entry))
            self.skipped.add(reason, f"row {row}, response {position}")

    def _scored_pairs(self, entries: _Entries, first: npt.NDArray[np.int64], most: int | None) -> npt.NDArray[np.int64]:
        """Returns the pairs of unequal scores as places among the distinct responses; says where there are none."""
        scores, prompts = entries.scores[first], entries.prompts[first]
        starts = np.searchsorted(prompts, np.arange(len(self._prompts)))
        ends = np.append(starts[1:], len(prompts))
        for prompt in np.flatnonzero(ends - starts < 2).tolist():
            self.skipped.add("prompt with fewer than two usable responses", f"row {self._prompt_rows[prompt]}")
        there = np.flatnonzero(ends > starts)
        if len(there):
            highest, lowest = (extreme.reduceat(scores, starts[there]) for extreme in (np.maximum, np.minimum))
            for prompt in there[(highest == lowest) & (ends - starts > 1)[there]].tolist():
                self.skipped.add("prompt whose responses all have equal scores", f"row {self._prompt_rows[prompt]}")
        barred, rows = np.zeros(len(first), dtype=bool), entries.places[first, 0]
        for reason, of_row in self._barred.items():
            for place in np.flatnonzero(of_row[rows] & ~barred):
                within = scores[starts[prompts[place]] : ends[prompts[place]]]
                for _ in range(int((within < scores[place]).sum())):
                    self.skipped.add(reason, f"row {rows[place]}")
            barred |= of_row[rows]
        return pairs_of_scores(scores, prompts, most, barred=barred)

    def _stated_pairs(
        self, entries: _Entries, same: npt.NDArray[np.int64], usable: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Returns the entries of the pairs that rows state, by prompt, (P, 2); names those stated before."""
        stated = np.arange(len(same)).reshape(-1, 2)[usable[::2]]
        responses = same[stated]
        earlier = _first_of_same(np.sort(responses, axis=1))
        for pair in np.flatnonzero(earlier != np.arange(len(stated))):
            before, now = stated[earlier[pair]], stated[pair]
            row, row_before = (int(entries.places[entry[0], 0]) for entry in (now, before))
            if (responses[pair] != responses[earlier[pair]]).any():
                self.skipped.add("contradicts an earlier pair", f"row {row}, against row {row_before}")
                continue
            alike = all(entries.alike(one, other) for one, other in zip(before, now, strict=True))
            weights = self._row_weights
            other_weight = weights is not None and bool(weights[row] != weights[row_before])
            self.skipped.add(
                "duplicate of an earlier pair" + OTHER_COLUMNS * (not alike) + OTHER_WEIGHT * other_weight, f"row {row}"
            )
        stated = stated[earlier == np.arange(len(stated))]
        for reason, of_row in self._barred.items():
            barred = of_row[entries.places[stated[:, 0], 0]]
            for row in entries.places[stated[barred, 0], 0].tolist():
                self.skipped.add(reason, f"row {row}")
            stated = stated[~barred]
        order = np.argsort(entries.prompts[stated[:, 0]], kind="stable")
        by_prompt: npt.NDArray[np.int64] = stated[order]
        return by_prompt

    def _candidates(
        self,
        entries: _Entries,
        prompt_ids: npt.NDArray[np.uint8],
        first: npt.NDArray[np.int64],
        pairs: npt.NDArray[np.int64],
        stated: npt.NDArray[np.int64],
    ) -> Candidates:
        """Lays out the prompts that have pairs, all of their responses, and the pairs.

        Args:
            entries: What was read.
            prompt_ids: (n, 16), all prompts.
            first: (R,) the entry of each distinct response, by prompt.
            pairs: (P, 2) as places in ``first``.
            stated: (P, 2) the entries that say what a pair has: its scores, weights, numbers and row.
        """
        paired = np.zeros(len(self._prompts), dtype=bool)
        paired[entries.prompts[first[pairs[:, 0]]]] = True
        prompts = np.flatnonzero(paired)
        kept = paired[entries.prompts[first]]
        responses = first[kept]
        renumbered = (np.cumsum(paired) - 1).astype(np.int64)
        prompt_of_response = renumbered[entries.prompts[responses]]
        pairs = (np.cumsum(kept) - 1)[pairs]
        pair_rows = entries.places[stated[:, 0], 0]
        ids, known = entries.ids[responses], _id_array([self._known])
        return Candidates(
            prompts=self._prompts.take(prompts),
            prompt_rows=self._prompt_rows[prompts],
            prompt_ids=prompt_ids[prompts],
            template_kwargs=[self._template_kwargs.get(prompt, _NO_SETTINGS) for prompt in prompts.tolist()],
            responses=self._responses.take(responses),
            response_ids=ids,
            prompt_of_response=prompt_of_response,
            response_places=entries.places[responses],
            scores=entries.scores[responses],
            pairs=pairs,
            prompt_of_pair=prompt_of_response[pairs[:, 0]],
            pair_rows=pair_rows,
            pair_scores=entries.scores[stated],
            token_weights=[np.frombuffer(data, dtype=np.float32) for data in self._token_weights],
            pair_weights=_taken(entries.weights, stated),
            pair_ref_logps=_taken(entries.ref_logps, stated),
            weights=None if self._row_weights is None else self._row_weights[pair_rows],
            known_ids=ids if kept.all() and not self._known else np.concatenate([entries.ids[first], known]),
            skipped=self.skipped,
        )


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Responses as the rows give them, in the order of the data, the same one as often as it is there.

    Attributes:
        ids: (E, 16) uint8, content hash of prompt and response.
        prompts: (E,) int64.
        scores: (E,) float64.
        places: (E, 2) int64, row and position.
        weights: (E,) int64, which token weights.
        ref_logps: (E,) float64.
    """

    ids: npt.NDArray[np.uint8]
    prompts: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    places: npt.NDArray[np.int64]
    weights: npt.NDArray[np.int64]
    ref_logps: npt.NDArray[np.float64]

    def alike(self, one: int, other: int) -> bool:
        """Whether token weights and reference log-probabilities of two entries are the same."""
        same_number = np.array_equal(self.ref_logps[one], self.ref_logps[other], equal_nan=True)
        return bool(self.weights[one] == self.weights[other]) and same_number


def _first_of_same(rows: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Returns, for each row of 16 bytes, the first one that is the same, (E,) int64."""
    halves = np.ascontiguousarray(rows).view(np.uint64).reshape(-1, 2)
    order = np.argsort(halves[:, 1], kind="stable")
    begins = np.ones(len(order), dtype=bool)
    ordered = halves[order, 1]
    begins[1:] = ordered[1:] != ordered[:-1]
    del ordered
    # Hashes of which one half is the same are the same; pairs of numbers need not be.
    within = order[~begins]
    if (halves[within, 0] != halves[order[np.flatnonzero(~begins) - 1], 0]).any():
        order = np.lexsort((halves[:, 0], halves[:, 1]))
        begins[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    # The sort is stable: the first of a run is the first in the data.
    firsts = np.empty(len(order), dtype=np.int64)
    firsts[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return firsts


def _taken(values: npt.NDArray[Any], index: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """As ``values[index]``, without memory for values that are all one."""
    return np.broadcast_to(values[:1].reshape(()), index.shape) if values.strides == (0,) else values[index]


def _id_array(ids: Iterable[bytes | bytearray]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(ids), dtype=np.uint8).reshape(-1, 16)
