"""Preference data as a comparison needs it: every pair a row, its tokens, and what the reference makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.columns import template_columns
from bpo.data.pairing import ranks_in_prompts
from bpo.data.read import read_configured
from bpo.data.tokens import tokenize_configured
from bpo.system.warn import warn

if TYPE_CHECKING:
    from collections.abc import Collection

    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.data.rows import Rows
    from bpo.data.tokens import TokenizedResponses


@dataclasses.dataclass(frozen=True, eq=False)
class ComparedPairs:
    """All candidate pairs of a data set, one row each, with what the starting policy makes of them.

    Attributes:
        rows: (P,) preference rows with scores, as :func:`bpo.select` takes them.
        prompt_of_pair: (P,) int64.
        prompt_ids: (n, 16) uint8.
        score_gaps: (P,) float64, NaN where there are no scores.
        tokenized: The responses.
        ref_logps: (S,) float32, log π_ref of each sequence.
        weights: (P,) float64, by how much the loss of each pair counts; None where the data does not say. They are in
            the rows, too.
    """

    rows: list[dict[str, Any]]
    prompt_of_pair: npt.NDArray[np.int64]
    prompt_ids: npt.NDArray[np.uint8]
    score_gaps: npt.NDArray[np.float64]
    tokenized: TokenizedResponses
    ref_logps: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float64] | None = None

    @classmethod
    def read(
        cls,
        data: Rows,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        config: SelectConfig,
        columns: Collection[str] = (),
    ) -> ComparedPairs:
        """Reads every pair of a data set, with more of its columns, of which a prompt has the values of its first row.

        The reference has not run yet.

        Raises:
            ValueError: Unusable data, or a column that is not there.
        """
        missing = set(columns) - set(data.column_names)
        if missing:
            raise ValueError(f"{sorted(missing)[0]!r} is no column of the data, which has {list(data.column_names)}.")
        more = [{name: row[name] for name in columns} for row in data] if columns else []
        reading = dataclasses.replace(config, max_pairs_per_prompt=None)  # of which each arm has its own
        candidates, tokenized = tokenize_configured(read_configured(data, reading), tokenizer, max_length, reading)
        rows = _rows(candidates, config.weight_column)
        if more:
            rows = [
                row | more[candidates.prompt_rows[prompt]]
                for row, prompt in zip(rows, candidates.prompt_of_pair, strict=True)
            ]
        return cls(
            rows=rows,
            prompt_of_pair=candidates.prompt_of_pair,
            prompt_ids=candidates.prompt_ids,
            score_gaps=candidates.score_gaps,
            tokenized=tokenized,
            ref_logps=np.full(len(tokenized.ids), np.nan, dtype=np.float32),
            weights=candidates.weights,
        )

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the pairs, their tokens, scores and weights (hex)."""
        digest = hashlib.sha256()
        arrays = [self.tokenized.sequence_ids[self.tokenized.pairs], self.tokenized.lengths, self.score_gaps]
        for array in arrays if self.weights is None else [*arrays, self.weights]:
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def of_prompts(self, prompts: npt.NDArray[np.int64], most: int | None = None) -> npt.NDArray[np.int64]:
        """Returns the pairs of some prompts, ascending; at most ``most`` of each, the largest score gaps first."""
        wanted = np.zeros(len(self.prompt_ids), dtype=bool)
        wanted[prompts] = True
        pairs = np.flatnonzero(wanted[self.prompt_of_pair])
        if most is None:
            return pairs
        return pairs[ranks_in_prompts(self.prompt_of_pair[pairs], -self.score_gaps[pairs]) < most]

    def responses(self, pairs: npt.NDArray[np.int64]) -> tuple[TokenizedResponses, npt.NDArray[np.float32]]:
        """Returns the sequences of some pairs and log π_ref of each."""
        sequences, places = np.unique(self.tokenized.pairs[pairs], return_inverse=True)
        taken = dataclasses.replace(self.tokenized.take(sequences), pairs=places.reshape(-1, 2))
        return taken, self.ref_logps[sequences]

    def without(self, heldout: ComparedPairs) -> ComparedPairs:
        """Takes out the prompts that are held out.

        Raises:
            ValueError: None is left.
        """
        known = {bytes(identity) for identity in heldout.prompt_ids}
        kept = np.array([bytes(identity) not in known for identity in self.prompt_ids])
        if kept.all():
            return self
        if not kept.any():
            raise ValueError("heldout holds every prompt of dataset, so none is left to train on.")
        warn(f"{int((~kept).sum())} prompts of dataset are in heldout, too, and are not trained on.")
        pairs = np.flatnonzero(kept[self.prompt_of_pair])
        tokenized, ref_logps = self.responses(pairs)
        return ComparedPairs(
            rows=[self.rows[pair] for pair in pairs],
            prompt_of_pair=(np.cumsum(kept) - 1)[self.prompt_of_pair[pairs]],
            prompt_ids=self.prompt_ids[kept],
            score_gaps=self.score_gaps[pairs],
            tokenized=tokenized,
            ref_logps=ref_logps,
            weights=None if self.weights is None else self.weights[pairs],
        )


def _rows(candidates: Candidates, weight_column: str | None) -> list[dict[str, Any]]:
    """Returns every candidate pair as a preference row."""
    scored = bool(np.isfinite(candidates.pair_scores).all())
    rows = []
    for pair, (chosen, rejected) in enumerate(candidates.pairs):
        prompt = candidates.prompt_of_pair[pair]
        row: dict[str, Any] = {
            "prompt": candidates.prompts[prompt],
            "chosen": candidates.responses[chosen],
            "rejected": candidates.responses[rejected],
        }
        if scored:
            row["score_chosen"], row["score_rejected"] = map(float, candidates.pair_scores[pair])
        row |= template_columns(candidates.template_kwargs[prompt])
        if candidates.weights is not None and weight_column is not None:
            row[weight_column] = float(candidates.weights[pair])
        rows.append(row)
    return rows
