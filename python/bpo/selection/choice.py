"""The fifth stage: a strategy chooses pairs, and where that is asked for they are exchanged to balance length."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from bpo.data.pairing import ranks_in_prompts
from bpo.selection.scored import trust
from bpo.selection.strategies.candidacy import Candidacy, UnsuitedError
from bpo.selection.strategies.register import run_strategy
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.config import SelectConfig
    from bpo.selection.request import Request
    from bpo.selection.scored import ScoredPairs


def choose(
    scored: ScoredPairs, n_pairs: int, request: Request
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Chooses so many pairs: step 8 of the method, which gives every prompt its depth.

    Of processes that share the rows, the first runs a strategy that has no way to run over shares.

    Returns:
        Which pairs are chosen, (P,) bool, and what they were ranked by, (P,) float64.

    Raises:
        UnsuitedError: The strategy can tell nothing of these pairs.
    """
    scored = trust(scored, request.config)
    reason = unsuited(scored, request)
    if reason is not None:
        raise UnsuitedError(reason)
    config, measured = request.config, scored.measured
    if config.min_depth is None:
        each = len(np.unique(scored.prompt_of_pair[scored.eligible])) <= n_pairs
        config = dataclasses.replace(config, min_depth=int(each))
    logps = None if measured is None else measured.logps
    candidacy = Candidacy(
        prompt_of_pair=scored.prompt_of_pair,
        score_gaps=scored.score_gaps,
        pair_scores=scored.pair_scores,
        lengths=scored.lengths,
        scores=scored.scores,
        prompt_of_response=scored.prompt_of_response,
        eligible=scored.eligible,
        budget=min(n_pairs, int(scored.eligible.sum())),
        config=config,
        seed=request.seed,
        clusters=scored.clusters,
        features=scored.features,
        target=scored.target,
        heldout_margins=scored.heldout_margins if "heldout" in request.needs else None,
        differences=None if measured is None else measured.differences,
        logps=None if logps is None else logps.astype(np.float64),
        margins=None if measured is None else measured.margins(config),
        shares=scored.shares if request.rule.shares_rows else None,
    )
    if scored.shares is None or request.rule.shares_rows:
        return _chosen(candidacy, request.strategy)
    return scored.shares.from_main(lambda: _chosen(candidacy, request.strategy))


def _chosen(candidacy: Candidacy, strategy: str) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Which pairs a strategy chooses, once lengths are balanced where that is asked for."""
    chosen, usefulness = run_strategy(strategy, candidacy)
    if candidacy.config.length_control == "balance":
        chosen = balance_lengths(
            chosen,
            usefulness,
            candidacy.eligible,
            candidacy.prompt_of_pair,
            candidacy.lengths[:, 0] - candidacy.lengths[:, 1],
            max_depth=candidacy.config.max_depth,
        )
    return chosen, usefulness


def unsuited(scored: ScoredPairs, request: Request) -> str | None:
    """Why what is asked for says nothing on these pairs; None if it does."""
    if "heldout" in request.needs and len(np.unique(scored.prompt_of_pair[scored.eligible])) < 2:
        asked = f"strategy={request.strategy!r}"
        if "heldout" not in request.rule.needs:
            asked = f"order={request.config.order!r}"
        return f"{asked} leaves each prompt out in turn and trains on the others, and here is one prompt only."
    if "reference" in request.needs:
        margins = None if scored.measured is None else scored.measured.margins(request.config)
        if margins is None or not margins[scored.eligible].any():
            return (
                f"strategy={request.strategy!r} compares the policy with its reference, and here it is its own: all "
                "implicit margins are 0. Give ref_model, or select with a policy that was trained."
            )
    return None


def in_order(chosen: npt.NDArray[np.int64], scored: ScoredPairs, config: SelectConfig) -> npt.NDArray[np.int64]:
    """Puts chosen pairs, given as indices in the order of the data, into the order of the training set."""
    if config.order == "data":
        return chosen
    return chosen[np.argsort(-scored.heldout_margins[chosen], kind="stable")]


def warn_of_fewer(chosen: npt.NDArray[np.bool_], scored: ScoredPairs, n_pairs: int, request: Request) -> None:
    """Says why fewer pairs are chosen than were asked for."""
    if chosen.sum() >= n_pairs:
        return
    most, eligible = request.config.max_depth, scored.eligible
    limits = [] if most is None else [f"max_depth={most}"]
    doubted = 0 if scored.audit is None else int(scored.audit.untrusted.sum())
    unusable = int((~eligible).sum()) - doubted
    limits += [f"{unusable} pairs without a usable gradient"] if unusable else []
    limits += [f"{doubted} pairs whose label looks wrong"] if doubted else []
    because = " and ".join(limits) or f"strategy={request.strategy!r}, which chooses no more"
    warn(f"{int(chosen.sum())} pairs are kept of the {n_pairs} asked for, because of {because}.")


def balance_lengths(
    chosen: npt.NDArray[np.bool_],
    usefulness: npt.NDArray[np.float64],
    eligible: npt.NDArray[np.bool_],
    prompt_of_pair: npt.NDArray[np.int64],
    length_differences: npt.NDArray[np.int64],
    *,
    max_depth: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Exchanges chosen pairs until as many prefer the longer response as the shorter one *(ours)*.

    Of the commoner kind the least useful pairs go, and for each comes the most useful unchosen pair of the other kind:
    first of the same prompt, where that loses least, so that no depth changes; then of other prompts, in place of pairs
    whose prompt keeps at least one. So any strategy can have chosen, the budget stays what it is, and no prompt is
    lost. A prompt whose pairs are all of one kind keeps at least one of them and may give the others away.

    Args:
        chosen: (P,) bool, by a strategy.
        usefulness: (P,) float64, what the strategy ranked by, larger first; NaN counts as least.
        eligible: (P,) bool; the others are not chosen.
        prompt_of_pair: (P,) int64.
        length_differences: (P,) of the preferred response less the other; pairs of equal lengths are left alone.
        max_depth: Most pairs of one prompt.

    Returns:
        (P,) bool, as many as before. It warns where there was not enough to exchange.
    """
    kinds = np.sign(length_differences)
    chosen = _exchanged(chosen.copy(), kinds, usefulness, eligible, prompt_of_pair, max_depth)
    longer, shorter = int((kinds[chosen] > 0).sum()), int((kinds[chosen] < 0).sum())
    if abs(longer - shorter) > 1:
        warn(
            f"{longer} of the kept pairs prefer the longer response and {shorter} the shorter one: nothing is left to "
            "exchange for length_control='balance'. A smaller budget leaves more to choose from."
        )
    return chosen


def _exchanged(
    chosen: npt.NDArray[np.bool_],
    kinds: npt.NDArray[np.int64],
    usefulness: npt.NDArray[np.float64],
    eligible: npt.NDArray[np.bool_],
    prompt_of_pair: npt.NDArray[np.int64],
    max_depth: int | None,
) -> npt.NDArray[np.bool_]:
    """Exchanges chosen pairs in place until as many are of kind 1 as of kind −1, or none can come; see above."""
    surplus = int(kinds[chosen].sum())
    kind, wanted = np.sign(surplus), abs(surplus) // 2
    keys = np.nan_to_num(usefulness, nan=-1e300, posinf=1e300, neginf=-1e300)
    leaving, coming = _within_prompts(
        chosen & (kinds == kind), ~chosen & eligible & (kinds == -kind), keys, prompt_of_pair
    )
    cheapest = np.argsort(keys[leaving] - keys[coming], kind="stable")[:wanted]
    chosen[leaving[cheapest]] = False
    chosen[coming[cheapest]] = True

    wanted -= len(cheapest)
    depth = np.bincount(prompt_of_pair[chosen], minlength=int(prompt_of_pair.max()) + 1)
    waiting = np.flatnonzero(~chosen & eligible & (kinds == -kind))
    leaving = np.flatnonzero(chosen & (kinds == kind))
    leaving = leaving[np.argsort(keys[leaving], kind="stable")]
    for comer in waiting[np.argsort(-keys[waiting], kind="stable")]:
        spare = leaving[depth[prompt_of_pair[leaving]] > 1]
        if wanted == 0 or len(spare) == 0:
            break
        if max_depth is not None and depth[prompt_of_pair[comer]] >= max_depth:
            continue
        chosen[spare[0]], chosen[comer] = False, True
        depth[prompt_of_pair[spare[0]]] -= 1
        depth[prompt_of_pair[comer]] += 1
        leaving = leaving[leaving != spare[0]]
        wanted -= 1
    return chosen


def _within_prompts(
    leaving: npt.NDArray[np.bool_],
    coming: npt.NDArray[np.bool_],
    keys: npt.NDArray[np.float64],
    prompts: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs off what may leave, worst first, with what may come, best first, within each prompt."""
    sides = []
    for mask, order_by in ((leaving, keys), (coming, -keys)):
        index = np.flatnonzero(mask)
        sides.append((index, prompts[index] * len(prompts) + ranks_in_prompts(prompts[index], order_by[index])))
    _, first, second = np.intersect1d(sides[0][1], sides[1][1], assume_unique=True, return_indices=True)
    return sides[0][0][first], sides[1][0][second]
