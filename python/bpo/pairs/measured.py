"""From gradient stores to pairs whose gradients and log-probabilities are known."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from bpo.data.candidates import Skipped, report_skipped
from bpo.data.tokens import tokenize_configured
from bpo.pairs.losses import pair_coefficients
from bpo.pairs.pair_gradients import PairGradients
from bpo.store.gradient_store import NONFINITE, StoreMismatchError
from bpo.system.progress import core_progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.store.gradient_store import GradientStore
    from bpo.world.shares import Shares


@dataclasses.dataclass(frozen=True)
class MeasuredPairs:
    """P pairs of responses whose gradients are known.

    Attributes:
        gradients: Of the pairs, at each checkpoint; of one model a single entry.
        logps: (P, 2) float32, log π of the preferred and of the other response; None with several checkpoints.
        ref_logps: (P, 2) float32, log π_ref likewise.
        differences: h_w − h_l of the pairs; None with several checkpoints.
    """

    gradients: list[PairGradients]
    logps: npt.NDArray[np.float32] | None
    ref_logps: npt.NDArray[np.float32]
    differences: PairGradients | None

    def take(self, index: npt.NDArray[np.int64]) -> MeasuredPairs:
        """Some of the pairs, over the same rows."""
        return MeasuredPairs(
            [gradients.take(index) for gradients in self.gradients],
            None if self.logps is None else self.logps[index],
            self.ref_logps[index],
            None if self.differences is None else self.differences.take(index),
        )

    def margins(self, config: SelectConfig) -> npt.NDArray[np.float64] | None:
        """Returns Δ = β(log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)), (P,) float64; None with several checkpoints."""
        if self.logps is None:
            return None
        rewards = config.beta * (self.logps.astype(np.float64) - self.ref_logps.astype(np.float64))
        return rewards[:, 0] - rewards[:, 1]


def in_store(
    candidates: Candidates,
    present: GradientStore,
    config: SelectConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Candidates, npt.NDArray[np.int64]]:
    """Returns the candidate pairs whose two responses a store holds, and their rows ((P, 2) int64).

    Args:
        candidates: The pairs.
        present: The store.
        config: Settings, with those of the store.
        tokenizer: The tokenizer that the store was made with, which tells the rows of a response apart; None where each
            has one.

    Raises:
        ValueError: Responses that it holds more than once, and no tokenizer.
        StoreMismatchError: It holds the responses of no pair.
    """
    if tokenizer is None:
        rows = _rows_without_tokens(candidates, present)
    else:
        candidates, tokenized = tokenize_configured(candidates, tokenizer, config.max_length, config)
        rows = present.rows_of(tokenized.sequence_ids)[tokenized.pairs]
    there: npt.NDArray[np.bool_] = rows.min(axis=1) >= 0
    skipped = Skipped()
    for pair in np.flatnonzero(~there):
        skipped.add("pair of a response that the store does not hold", f"row {candidates.pair_rows[pair]}")
    if not there.any():
        raise StoreMismatchError(
            f"The gradient store {present.path} holds the responses of none of the {len(there)} candidate pairs. Pass "
            "the data that it was made with, or the model, which computes what is missing."
        )
    report_skipped(skipped, config.on_invalid)
    candidates.skipped.merge(skipped)
    return candidates.keep_pairs(there)[0], rows[there]


def _rows_without_tokens(candidates: Candidates, present: GradientStore) -> npt.NDArray[np.int64]:
    """Returns the rows of each pair, −1 where there is none, of responses that begin at the same token in all pairs."""
    rows, several = present.rows_of_responses(candidates.response_ids)
    if several.any():
        place = candidates.prompt_rows[candidates.prompt_of_response[np.flatnonzero(several)[0]]]
        raise ValueError(
            f"{present.path} holds {int(several.sum())} responses more than once, such as one of row {place}: starting "
            "at another token, where the end of a prompt and another response merge, or with other token weights. Pass "
            "the tokenizer that it was made with as processing_class, which tells them apart."
        )
    found: npt.NDArray[np.int64] = rows[candidates.pairs]
    return found


def measured(
    stores: Sequence[GradientStore],
    pairs: Sequence[npt.NDArray[np.int64]],
    config: SelectConfig,
    *,
    ref_logps: npt.NDArray[np.float32] | None = None,
    weights: npt.NDArray[np.float64] | None = None,
    progress: bool = False,
    shares: Shares | None = None,
) -> MeasuredPairs:
    """Reads what stores hold of pairs, and compares the rows of their responses with the checksums.

    Args:
        stores: One, or that of each checkpoint.
        pairs: (P, 2) int64 for each store, the rows of the preferred and of the other response.
        config: Uses what :func:`bpo.pair_coefficients` does, and ``threads``.
        ref_logps: (P, 2) float32, log π_ref of the responses; by default that of the store.
        weights: (P,) float64, what the loss of each pair is multiplied with; None for 1.
        progress: Whether to show a progress bar.
        shares: The processes that share the rows, each of which compares a range of them.

    Raises:
        StoreDamagedError: A row that is not as it was written.
    """
    gradients = [
        _pair_gradients(store, rows, config, weights, progress, shares)
        for store, rows in zip(stores, pairs, strict=True)
    ]
    if len(stores) > 1 or config.checkpoints is not None:
        assert ref_logps is not None
        return MeasuredPairs(gradients, None, ref_logps, None)
    records, scales = stores[0].records, stores[0].scales[pairs[0]]
    differences = np.array([1, -1], dtype=np.float32) * scales
    return MeasuredPairs(
        gradients,
        records["logp"][pairs[0]],
        records["ref_logp"][pairs[0]] if ref_logps is None else ref_logps,
        PairGradients(stores[0].rows, pairs[0], differences),
    )


def _pair_gradients(
    store: GradientStore,
    pairs: npt.NDArray[np.int64],
    config: SelectConfig,
    weights: npt.NDArray[np.float64] | None,
    progress: bool,
    shares: Shares | None,
) -> PairGradients:
    """Returns the gradients of the pairs in terms of those of the responses; NaN where one of these is unusable."""
    compared = pairs.ravel()
    if shares is not None:
        compared = np.unique(compared)
        compared = compared[shares.part(len(compared))]
    with core_progress("Checksums", progress) as report:
        store.check(compared, threads=config.threads, progress=report)
    records = store.records
    coefficients = pair_coefficients(
        records["logp"],
        records["ref_logp"],
        pairs,
        lengths=records["length"],
        predicted=store.predicted,
        log_weights=records["log_weight"],
        config=config,
    )
    if weights is not None:
        coefficients *= weights[:, None]
    nonfinite = (records["flags"] & NONFINITE != 0)[pairs].any(axis=1)
    coefficients[nonfinite] = np.nan  # which tells them from pairs of zero gradients
    return PairGradients(store.rows, pairs, coefficients * store.scales[pairs])
