"""The one form in which the rest sees preference data, and what of the data was set aside."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.choices import OnInvalid
    from bpo.data.values import Text
    from bpo.system.packed import Packed

_NAMED_ROWS = 5


class InvalidDataWarning(UserWarning):
    """Some rows of the data cannot be used; the message counts and names them."""


@dataclasses.dataclass
class Skipped:
    """What of the data is not used, and why: reason → places, such as ``"row 3"`` or ``"row 3, response 1"``."""

    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Records one place under its reason."""
        self.places.setdefault(reason, []).append(place)

    def merge(self, other: Skipped) -> None:
        """Takes over everything that ``other`` recorded."""
        for reason, places in other.places.items():
            self.places.setdefault(reason, []).extend(places)

    def counts(self) -> dict[str, int]:
        """Returns how many places each reason has."""
        return {reason: len(places) for reason, places in self.places.items()}

    def describe(self) -> str:
        """Returns one line a reason: the count and the first few places."""
        lines = []
        for reason, places in self.places.items():
            named = "; ".join(places[:_NAMED_ROWS]) + ("; …" if len(places) > _NAMED_ROWS else "")
            lines.append(f"{len(places)} × {reason} ({named})")
        return "\n".join(lines)

    def __bool__(self) -> bool:
        return bool(self.places)


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The one form in which the rest of ``bpo`` sees preference data.

    Responses are grouped by prompt; a *row* is the index of a response in that order. Pairs are grouped by prompt, too.
    Texts read as those of a list do, and are on disk where they are many.

    Attributes:
        prompts: (n,) the distinct prompts with at least one candidate pair.
        prompt_rows: (n,) int64, the first row of the data that holds the prompt.
        prompt_ids: (n, 16) uint8, content hash of each prompt.
        template_kwargs: (n,) what the chat template gets beside the messages: ``tools``, and what the data gives as
            ``chat_template_kwargs``. Empty for plain text.
        responses: (R,) the distinct responses, grouped by prompt.
        response_ids: (R, 16) uint8, content hash of prompt and response.
        prompt_of_response: (R,) int64.
        response_places: (R, 2) int64, the first row of the data that holds the response and its position there, counted
            from 0; −1 where it is the row's ``chosen`` or ``rejected``.
        scores: (R,) float64, NaN where the data gives none.
        pairs: (P, 2) int64, rows of the preferred and of the other response.
        prompt_of_pair: (P,) int64.
        pair_rows: (P,) int64, the row of the data that states the pair, or that holds its preferred response.
        pair_scores: (P, 2) float64, scores of the preferred and of the other response, NaN where the data gives none.
        token_weights: Distinct float32 arrays of token weights, in the order of the data; empty where none are read.
        pair_weights: (P, 2) int64, which of ``token_weights`` the preferred and the other response have in the pair.
        pair_ref_logps: (P, 2) float64, log π_ref of the preferred and of the other response, as the data gives them;
            NaN where none are read.
        weights: (P,) float64, by how much the loss of each pair counts, above 0; None where the data does not say.
        known_ids: (·, 16) uint8, content hash of every response of the data, usable or not.
        skipped: What was set aside.
    """

    prompts: Packed[Text]
    prompt_rows: npt.NDArray[np.int64]
    prompt_ids: npt.NDArray[np.uint8]
    template_kwargs: list[dict[str, Any]]
    responses: Packed[Text]
    response_ids: npt.NDArray[np.uint8]
    prompt_of_response: npt.NDArray[np.int64]
    response_places: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    pairs: npt.NDArray[np.int64]
    prompt_of_pair: npt.NDArray[np.int64]
    pair_rows: npt.NDArray[np.int64]
    pair_scores: npt.NDArray[np.float64]
    token_weights: list[npt.NDArray[np.float32]]
    pair_weights: npt.NDArray[np.int64]
    pair_ref_logps: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64] | None
    known_ids: npt.NDArray[np.uint8]
    skipped: Skipped

    @property
    def score_gaps(self) -> npt.NDArray[np.float64]:
        """(P,) float64, how much higher the preferred response scored; NaN where the data gives no scores."""
        return self.pair_scores[:, 0] - self.pair_scores[:, 1]

    @property
    def conversational(self) -> bool:
        """Whether prompts and responses are chat messages."""
        return isinstance(self.prompts[0], list)

    def place(self, side: int) -> str:
        """Says where in the data the response stands that is entry ``side`` of ``pairs``, read row by row."""
        row, position = self.response_places[self.pairs.flat[side]]
        if position < 0:
            return f"Row {self.pair_rows[side // 2]}, {('chosen', 'rejected')[side % 2]}"
        return f"Row {row}, response {position}"

    def keep_prompts(
        self, kept: npt.NDArray[np.bool_]
    ) -> tuple[Candidates, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Restricts the candidates to some prompts ((n,) bool) with all their pairs; else as :meth:`keep_pairs`."""
        return self.keep_pairs(kept[self.prompt_of_pair])

    def keep_pairs(
        self, kept_pairs: npt.NDArray[np.bool_]
    ) -> tuple[Candidates, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Restricts the candidates to some pairs, and to their prompts with all of their responses.

        Args:
            kept_pairs: (P,) bool.

        Returns:
            The restricted candidates, and the index in ``self`` of each of its pairs and of each of its responses
            (int64).
        """
        pair_index = np.flatnonzero(kept_pairs)
        if len(pair_index) == len(self.pairs):
            return self, pair_index, np.arange(len(self.responses))
        kept = np.zeros(len(self.prompts), dtype=bool)
        kept[self.prompt_of_pair[pair_index]] = True
        new_prompt = np.cumsum(kept) - 1
        used = kept[self.prompt_of_response]
        new_response = np.cumsum(used) - 1
        return (
            Candidates(
                prompts=self.prompts.take(np.flatnonzero(kept)),
                prompt_rows=self.prompt_rows[kept],
                prompt_ids=self.prompt_ids[kept],
                template_kwargs=[self.template_kwargs[i] for i in np.flatnonzero(kept)],
                responses=self.responses.take(np.flatnonzero(used)),
                response_ids=self.response_ids[used],
                prompt_of_response=new_prompt[self.prompt_of_response[used]],
                response_places=self.response_places[used],
                scores=self.scores[used],
                pairs=new_response[self.pairs[pair_index]],
                prompt_of_pair=new_prompt[self.prompt_of_pair[pair_index]],
                pair_rows=self.pair_rows[pair_index],
                pair_scores=self.pair_scores[pair_index],
                token_weights=self.token_weights,
                pair_weights=_taken(self.pair_weights, pair_index),
                pair_ref_logps=_taken(self.pair_ref_logps, pair_index),
                weights=None if self.weights is None else self.weights[pair_index],
                known_ids=self.known_ids,
                skipped=self.skipped,
            ),
            pair_index,
            np.flatnonzero(used),
        )


def _taken(values: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """As ``values[rows]``, without memory for values that are all one."""
    return np.broadcast_to(values[:1, :1], (len(rows), 2)) if values.strides == (0, 0) else values[rows]


def report_skipped(skipped: Skipped, on_invalid: OnInvalid) -> None:
    """Warns about what was set aside, or raises where the user asked for that."""
    if not skipped:
        return
    message = f"Some of the data cannot be used:\n{skipped.describe()}"
    if on_invalid == "raise":
        raise ValueError(message)
    warn(message, InvalidDataWarning)
