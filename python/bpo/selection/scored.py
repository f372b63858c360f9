"""The fourth stage: measured pairs to clusters, scores and features, and what of them is worth a look."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.candidates import Skipped, report_skipped
from bpo.data.groups import UNTRUSTED
from bpo.pairs.checkpoints import cluster_checkpoints
from bpo.pairs.clustering import clustered
from bpo.pairs.direction import influence, prompts_agree, target_features
from bpo.pairs.left_out import left_out_margins
from bpo.pairs.linear import cross_fitted_margins
from bpo.pairs.pair_gradients import unit_features
from bpo.pairs.wrong_labels import wrong_labels
from bpo.system.progress import core_progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.pairs.clustering import PairClusters
    from bpo.pairs.measured import MeasuredPairs
    from bpo.pairs.pair_gradients import PairGradients
    from bpo.selection.inputs import Goal
    from bpo.selection.request import Request
    from bpo.world.shares import Shares

# A p-value above which gradients are said to have no direction in common.
_DISAGREEING = 0.05


@dataclasses.dataclass(frozen=True)
class ScoredPairs:
    """P candidate pairs with what strategies read of them.

    Attributes:
        prompt_of_pair: (P,) int64.
        score_gaps: (P,) float64, NaN where the data gives no scores.
        pair_scores: (P, 2) float64, scores of the preferred and of the other response, likewise.
        scores: (R,) float64, scores of all responses of the data, in a pair or not; likewise.
        prompt_of_response: (R,) int64, their prompts.
        lengths: (P, 2) int64, of the preferred and of the other response.
        seed: Of the folds of held-out margins.
        eligible: (P,) bool, false where a gradient is needed and cannot be used.
        measured: Gradients and log-probabilities; None where no gradients are needed, and so are the next two.
        clusters: Clusters and scores.
        features: Gradients at unit length (NaN where unusable).
        target: Those of the target's pairs, usable ones only, where there is a target.
        audit: What was found of the labels; pairs whose label looks wrong are then not eligible. None where all are
            trusted.
        shares: The processes of a job that share the rows; they ask for what is not known yet all together.
        threads: Of the core.
    """

    prompt_of_pair: npt.NDArray[np.int64]
    score_gaps: npt.NDArray[np.float64]
    pair_scores: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    prompt_of_response: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    seed: int
    eligible: npt.NDArray[np.bool_]
    measured: MeasuredPairs | None = None
    clusters: PairClusters | None = None
    features: PairGradients | None = None
    target: PairGradients | None = None
    audit: LabelAudit | None = None
    shares: Shares | None = None
    threads: int | None = None

    @functools.cached_property
    def heldout_margins(self) -> npt.NDArray[np.float64]:
        """(P,) what training on the pairs of other prompts makes of each pair; NaN where unusable."""
        assert self.features is not None
        index = np.flatnonzero(self.eligible)
        margins = np.full(len(self.eligible), np.nan)
        features, prompts = self.features.take(index), self.prompt_of_pair[index]
        margins[index] = cross_fitted_margins(features, prompts, self.seed, self.shares, self.threads)
        return margins

    @functools.cached_property
    def agreement(self) -> float:
        """The p-value of the gradients of different prompts having no direction in common."""
        assert self.features is not None
        return prompts_agree(self.features, self.eligible, self.prompt_of_pair, self.seed, self.shares)

    @functools.cached_property
    def labels(self) -> LabelAudit:
        """What the eligible pairs say of each other's labels."""
        assert self.measured is not None
        right = np.full(len(self.eligible), np.nan)
        index = np.flatnonzero(self.eligible)
        prompts = self.prompt_of_pair[index]
        if len(np.unique(prompts)) < 2:
            return LabelAudit(right, False)
        left_out = left_out_margins([each.take(index) for each in self.measured.gradients], prompts)
        found = wrong_labels(left_out, prompts)
        right[index] = 1 - found.probability
        return LabelAudit(right, found.tells)


@dataclasses.dataclass(frozen=True)
class LabelAudit:
    """Which labels look wrong.

    Attributes:
        trust: (P,) float64, the probability that each label is right; NaN where no gradient tells.
        tells: Whether labels could be told from each other at all.
    """

    trust: npt.NDArray[np.float64]
    tells: bool

    @property
    def untrusted(self) -> npt.NDArray[np.bool_]:
        """(P,) bool, labels that are more likely wrong than right."""
        return self.trust < 0.5


def trust(scored: ScoredPairs, config: SelectConfig) -> ScoredPairs:
    """Sets pairs aside whose label is more likely wrong than right, where the settings ask for that.

    Of several processes the first finds out.
    """
    if config.trust != "audit" or scored.audit is not None:
        return scored
    audit = scored.labels if scored.shares is None else scored.shares.from_main(lambda: scored.labels)
    return dataclasses.replace(scored, eligible=scored.eligible & ~audit.untrusted, audit=audit)


def look_at_labels(scored: ScoredPairs, kept: Candidates) -> Skipped:
    """Reports the pairs that are not trusted; returns whether labels could not be told at all."""
    noted, skipped = Skipped(), Skipped()
    if scored.audit is None:
        return noted
    if not scored.audit.tells:
        noted.add(
            "label audit that cannot tell: the rest of the data agrees with the labels no more than chance would",
            f"all {len(kept.prompts)} prompts",
        )
    for pair in np.flatnonzero(scored.audit.untrusted):
        skipped.add(UNTRUSTED, f"row {kept.pair_rows[pair]}")
    report_skipped(skipped, "skip")  # it was asked for, so that it is no error
    kept.skipped.merge(skipped)
    return noted


def score(
    candidates: Candidates,
    lengths: npt.NDArray[np.int64],
    measured: MeasuredPairs | None,
    request: Request,
    index: npt.NDArray[np.int64] | None = None,
    shares: Shares | None = None,
) -> ScoredPairs:
    """Clusters and scores pairs that were measured: steps 6 and 7 of the method; leaves others as they are.

    Args:
        candidates: Prompts, responses and pairs.
        lengths: (P, 2) int64, of those of the pairs that are meant, and so is ``measured``.
        measured: None where no gradients are needed.
        request: Uses what clusters depend on, and the seed.
        index: (P,) int64, which of the pairs are meant; None for all.
        shares: The processes that share the rows.
    """
    taken = slice(None) if index is None else index
    given: dict[str, Any] = {
        "prompt_of_pair": candidates.prompt_of_pair[taken],
        "score_gaps": candidates.score_gaps[taken],
        "pair_scores": candidates.pair_scores[taken],
        "scores": candidates.scores,
        "prompt_of_response": candidates.prompt_of_response,
        "lengths": lengths,
        "seed": request.seed,
        "threads": request.config.threads,
    }
    if measured is None:
        return ScoredPairs(**given, eligible=np.ones(len(lengths), dtype=bool))
    clusters, features = _clustered(measured, request, shares)
    given |= {"measured": measured, "clusters": clusters, "features": features, "shares": shares}
    return ScoredPairs(**given, eligible=clusters.usable)


def _clustered(pairs: MeasuredPairs, request: Request, shares: Shares | None) -> tuple[PairClusters, PairGradients]:
    """Clusters, scores and features of pairs, at one model or over several checkpoints."""
    config, seed = request.clustering, request.seed
    with core_progress("Clusters", request.progress) as report:
        if config.checkpoints is not None:
            rates, store = list(config.checkpoints.values()), request.store
            return cluster_checkpoints(pairs.gradients, rates, config=config, store=store, seed=seed, progress=report)
        clusters = clustered(pairs.gradients[0], config, seed, report, shares)
    return clusters, unit_features(pairs.gradients[0], clusters.informativeness, clusters.usable)


def toward(scored: ScoredPairs, goal: Goal | None, target: MeasuredPairs | None, config: SelectConfig) -> ScoredPairs:
    """Puts the influence on the target in the place of ``alignment``, where there is a target."""
    if goal is None or target is None:
        return scored
    assert scored.clusters is not None and scored.features is not None
    wanted, known = target_features(target, config)
    influences = influence(scored.features, scored.eligible, wanted, known, goal.subtask_of_pair, config, scored.shares)
    clusters = dataclasses.replace(scored.clusters, alignment=influences)
    return dataclasses.replace(scored, clusters=clusters, target=wanted.take(np.flatnonzero(known)))


def look_at(scored: ScoredPairs, kept: Candidates, request: Request) -> Skipped:
    """Reports pairs without a usable gradient; returns what of the others is worth a look."""
    noted = Skipped()
    if scored.clusters is not None and scored.features is not None:
        _report_unusable(kept, scored.clusters, request.config)
        noted.merge(_outliers(kept, scored.clusters))
        noted.merge(_disagreement(kept, scored.agreement))
    return noted


def _report_unusable(kept: Candidates, clusters: PairClusters, config: SelectConfig) -> None:
    """Names the pairs whose gradient is zero or not finite."""
    skipped = Skipped()
    for pair in np.flatnonzero(~clusters.usable):
        zero = clusters.informativeness[pair] == 0
        reason = "pair whose gradient is zero" if zero else "pair whose gradient is NaN or infinite"
        skipped.add(reason, f"row {kept.pair_rows[pair]}")
    report_skipped(skipped, config.on_invalid)
    kept.skipped.merge(skipped)


def _disagreement(kept: Candidates, agree: float) -> Skipped:
    """Says where the gradients of different prompts have no direction in common."""
    noted = Skipped()
    if agree > _DISAGREEING:
        noted.add(
            f"selection by gradients that may be no better than a random one: those of different prompts have no "
            f"direction in common (p = {agree:.2f})",
            f"all {len(kept.prompts)} prompts",
        )
    return noted


def _outliers(kept: Candidates, clusters: PairClusters) -> Skipped:
    """Names the pairs whose gradient is far longer than those of the others; they are kept *(ours)*.

    Far is six robust standard deviations (1.4826 times the median absolute deviation) of the logarithm of the norm.
    """
    noted = Skipped()
    index = np.flatnonzero(clusters.usable)
    logs = np.log(clusters.informativeness[index].astype(np.float64))
    distance = logs - np.median(logs)
    spread = 1.4826 * np.median(np.abs(distance))
    for pair, far in zip(index, distance, strict=True):
        if far > 6 * max(spread, 0.1):
            noted.add("pair whose gradient is far longer than the others", f"row {kept.pair_rows[pair]}")
    return noted
