"""What is measured beside a choice, for the report: whether it beats a random one, and what a reader should see."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.data.values import prompt_text
from bpo.pairs.linear import fit_direction, linear_margins, pulls
from bpo.pairs.pair_gradients import pair_norms
from bpo.pairs.size import ChoiceSize
from bpo.selection.choice import choose
from bpo.selection.request import Request
from bpo.selection.scored import score
from bpo.selection.strategies.candidacy import UnsuitedError
from bpo.selection.strategies.register import STRATEGIES, is_ours
from bpo.selection.tables import labels_record

if TYPE_CHECKING:
    import datasets
    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.selection.inputs import Inputs
    from bpo.selection.prompts import Kept
    from bpo.selection.scored import ScoredPairs

SOURCES = ("source", "scorer", "judge", "annotator", "dataset", "model", "category", "kind")
"""Columns that say where a row comes from."""

_SPLITS = 10
_HELDOUT = 0.25
_RANDOM_DRAWS = 4  # a split, so that the control is not one lucky choice
_FEWEST_PROMPTS = 40
# Multiplications of all splits together, a few seconds; more prompts than that allows are drawn from at random.
_MOST_WORK = 1e10
# Passes over the gradients of strategies that fit: a penalty is chosen in folds, where others only cluster.
_PASSES_OF_A_FIT = 200
_MOST_LABEL_WORK = 3e9
_MOST_COSINE_WORK = 1e10
_NEAR = 0.95
_NAMED_PAIRS = 20
_SHOWN_PROMPTS = 32
_SHOWN_WITHOUT_PAIRS = 8
_SHOWN_CHARACTERS = 400_000
_MOST_VALUES = 20


def look(
    columns: datasets.Dataset,
    candidates: Candidates,
    kept: Kept,
    scored: ScoredPairs,
    chosen: npt.NDArray[np.bool_],
    request: Request,
    *,
    agreement: float | None,
) -> dict[str, Any]:
    """Measures what a report tells beyond the pairs themselves, within a bounded amount of work.

    Args:
        columns: The other columns of the data, of all its rows.
        candidates: All prompts and P candidate pairs.
        kept: The P' pairs of the prompts that breadth compression kept.
        scored: Their scores.
        chosen: (P',) bool.
        request: What was asked for.
        agreement: The p-value of prompts that have no direction in common; None where there are no gradients.

    Returns:
        Plain values: ``worth`` (the choice against others on held-out prompts, or the ``reason`` why not),
        ``agreement``, ``labels`` and ``near`` (likewise), ``texts`` (prompts with all their responses, to be read) and
        ``sources`` (how often each value of a column is among all and among the kept pairs).
    """
    index = kept.pair_index[chosen]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to say of the choice itself was said
        return {
            "worth": _worth(kept.inputs, scored, int(chosen.sum()), request),
            "agreement": agreement,
            "labels": _labels(kept, scored, chosen, request),
            "near": _near(kept, scored, chosen),
            "texts": _texts(candidates, index, request.seed),
            "sources": _sources(columns, candidates, index),
        }


def _worth(inputs: Inputs, scored: ScoredPairs, budget: int, request: Request) -> dict[str, Any]:
    """Held-out accuracy in the linear regime of the strategy and of controls, each choosing anew in every split."""
    reason = _not_comparable(scored, request)
    if reason is not None:
        return {"reason": reason}
    features = scored.features
    assert scored.measured is not None and features is not None
    prompts = np.unique(scored.prompt_of_pair[scored.eligible])
    there = _affordable(prompts, scored, request)
    if len(there) < _FEWEST_PROMPTS:
        few = len(prompts) < _FEWEST_PROMPTS
        return {
            "reason": f"{len(prompts)} prompts are too few to hold some out" if few else "it would take too long here"
        }
    budget = max(1, round(budget * len(there) / len(prompts)))
    arms = _arms(scored, request)
    accuracy: dict[str, list[float]] = {name: [] for name in arms}
    n_pairs: dict[str, list[int]] = {name: [] for name in arms}
    n_heldout = round(_HELDOUT * len(there))
    for split in range(_SPLITS):
        order = np.random.default_rng([request.seed, split]).permutation(there)
        train, test = (
            np.flatnonzero(scored.eligible & np.isin(scored.prompt_of_pair, part))
            for part in (order[n_heldout:], order[:n_heldout])
        )
        here = max(1, round(budget * (1 - n_heldout / len(there))))
        for name, requests in arms.items():
            weights, sizes = [], []
            for asked in requests:
                asked = dataclasses.replace(asked, seed=asked.seed + 1000 * split)
                try:
                    picked = _picked(inputs, scored, train, here, asked)
                except UnsuitedError as error:
                    return {"reason": str(error)}
                weights.append(_fitted(scored, picked, inputs.candidates.weights))
                sizes.append(len(picked))
            margins = linear_margins(np.stack(weights), features.take(test))
            accuracy[name].append(float(((np.sign(margins) + 1) / 2).mean()))
            n_pairs[name].append(round(float(np.mean(sizes))))
    return {
        "prompts": len(there),
        "all_prompts": len(prompts),
        "splits": _SPLITS,
        "heldout_share": n_heldout / len(there),
        "draws": _RANDOM_DRAWS,
        "arms": [
            {
                "name": name,
                "pairs": round(float(np.mean(n_pairs[name]))),
                "accuracy": float(np.mean(values)),
                **_difference(np.array(values) - np.array(accuracy["random"]), n_heldout / len(there)),
            }
            for name, values in accuracy.items()
        ],
    }


def _not_comparable(scored: ScoredPairs, request: Request) -> str | None:
    """Why a choice cannot be made anew on some prompts and judged on the others; None if it can."""
    if scored.measured is None or scored.features is None:
        return f"strategy={request.strategy!r} needs no gradients, so none were computed"
    if request.config.checkpoints is not None:
        return "it goes by gradients of several checkpoints"
    if scored.target is not None:
        return "it goes by a target, which prompts of the data do not stand for"
    if scored.audit is not None:
        return "labels that look wrong were set aside by means of all prompts"
    if not is_ours(request.strategy):
        return f"strategy={request.strategy!r} is your own, and is run once only"
    return None


def _fits(request: Request) -> bool:
    """Whether a choice fits regressions, or is as much work."""
    matches = request.strategy == "matching" or (
        request.rule.weighs_usefulness and request.config.usefulness_terms is None
    )
    return matches or "heldout" in request.needs or request.strategy in ("coreset", "d_optimal")


def _affordable(prompts: npt.NDArray[np.int64], scored: ScoredPairs, request: Request) -> npt.NDArray[np.int64]:
    """All prompts, or as many of them, drawn at random, as the work of all splits allows."""
    assert scored.features is not None
    n_pairs, dim = int(scored.eligible.sum()), scored.features.rows.shape[1]
    counts = [len(prompts) * part // 32 for part in range(32, 0, -1)]
    counts += [counts[-1] >> halvings for halvings in range(1, counts[-1].bit_length())]
    for n_prompts in counts:
        pairs = max(1, n_pairs * n_prompts // len(prompts))
        passes = 40.0  # of the fits on what was chosen
        if "clusters" in request.needs:
            passes += request.config.n_clusters or math.isqrt(pairs)
        passes += _PASSES_OF_A_FIT * _fits(request)
        if _SPLITS * passes * pairs * dim <= _MOST_WORK:
            drawn = np.random.default_rng([request.seed, _SPLITS]).permutation(prompts)[:n_prompts]
            return np.sort(drawn)
    return prompts[:0]


def _arms(scored: ScoredPairs, request: Request) -> dict[str, list[Request]]:
    """What chooses in each split: the strategy, several random choices, and the best against the worst response."""
    config = dataclasses.replace(request.config, order="data", length_control=None)
    own = dataclasses.replace(request.config, order="data")
    arms = {request.strategy: [Request(request.strategy, own, request.seed)]}
    arms["random"] = [Request("random", config, request.seed + draw) for draw in range(1, _RANDOM_DRAWS + 1)]
    if "best_worst" not in arms and np.isfinite(scored.score_gaps).all():
        arms["best_worst"] = [Request("best_worst", config, request.seed)]
    return arms


def _picked(
    inputs: Inputs, scored: ScoredPairs, train: npt.NDArray[np.int64], budget: int, request: Request
) -> npt.NDArray[np.int64]:
    """Which of some pairs a strategy chooses that sees nothing of the others."""
    measured = scored.measured.take(train) if scored.measured and "gradients" in request.needs else None
    part = score(inputs.candidates, inputs.pair_lengths[train], measured, request, train)
    if STRATEGIES[request.strategy].keeps_every_prompt:
        budget = max(budget, (request.config.min_depth or 0) * len(np.unique(part.prompt_of_pair)))
    return train[choose(part, min(budget, len(train)), request)[0]]


def _fitted(
    scored: ScoredPairs, index: npt.NDArray[np.int64], pair_weights: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    """Where training on some pairs leads in the linear regime, (d,)."""
    assert scored.measured is not None
    gradients = scored.measured.gradients[0].take(index)
    each = None if pair_weights is None else pair_weights[index]
    return fit_direction(pulls(gradients, pair_norms(gradients, None)), 1.0, each)


def _difference(values: npt.NDArray[np.float64], heldout_share: float) -> dict[str, float | None]:
    """Mean of a difference over re-splits, its 95 % interval and p-value; unknown where all splits are the same.

    They are those of the corrected resampled t-test (Nadeau & Bengio 2003), since re-splits overlap.
    """
    from scipy import stats

    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    if deviation <= 1e-12:
        return {"difference": mean, "low": None, "high": None, "p": None}
    error = deviation * math.sqrt(1 / len(values) + heldout_share / (1 - heldout_share))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    return {"difference": mean, "low": mean - half, "high": mean + half, "p": p}


def _labels(kept: Kept, scored: ScoredPairs, chosen: npt.NDArray[np.bool_], request: Request) -> dict[str, Any]:
    """Which of the chosen pairs have a label that the rest of the data contradicts."""
    if scored.measured is None or scored.features is None:
        return {"reason": "no gradients were computed"}
    audit = scored.audit
    if audit is None:
        rows, dim = scored.features.rows, scored.features.rows.shape[1]
        if len(np.unique(scored.prompt_of_pair[scored.eligible])) < _FEWEST_PROMPTS:
            return {"reason": "there are too few prompts"}
        if float(len(rows)) * dim * dim * len(scored.measured.gradients) > _MOST_LABEL_WORK:
            return {"reason": "it would take too long here"}
        wide = sum(each.rows.shape[1] for each in scored.measured.gradients)
        size = ChoiceSize(len(rows), len(scored.eligible), wide, request.clustering, audited=True)
        if not size.fits:
            return {"reason": "it would take more than max_memory"}
        audit = scored.labels
    known = np.flatnonzero(chosen & np.isfinite(audit.trust))
    record = labels_record(audit.tells, kept.pair_index[known], 1 - audit.trust[known])
    return {**record, "worst": [[pair, round(wrong, 4)] for pair, wrong in record["worst"]]}


def _near(kept: Kept, scored: ScoredPairs, chosen: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Which of the chosen pairs have nearly the same gradient as another one."""
    if scored.features is None:
        return {"reason": "no gradients were computed"}
    index = np.flatnonzero(chosen)
    dim = scored.features.rows.shape[1]
    if float(len(index)) ** 2 * dim > _MOST_COSINE_WORK:
        return {"reason": "it would take too long here"}
    unit = pulls(scored.features.take(index), np.float32(1))
    cosines = np.triu(unit @ unit.T, k=1)
    first, second = np.nonzero(cosines >= _NEAR)
    order = np.argsort(-cosines[first, second], kind="stable")
    named = [
        [
            *(int(kept.pair_index[index[side[at]]]) for side in (first, second)),
            round(float(cosines[first, second][at]), 4),
        ]
        for at in order[:_NAMED_PAIRS]
    ]
    return {"threshold": _NEAR, "count": len(np.unique(np.concatenate([first, second]))), "pairs": named}


def _texts(candidates: Candidates, index: npt.NDArray[np.int64], seed: int) -> list[dict[str, Any]]:
    """Prompts with all their responses, whole: the deepest ones, and some that keep no pair."""
    depth = np.bincount(candidates.prompt_of_pair[index], minlength=len(candidates.prompts))
    order = np.argsort(-depth, kind="stable")
    without = np.random.default_rng(seed).permutation(np.flatnonzero(depth == 0))[:_SHOWN_WITHOUT_PAIRS]
    starts = np.searchsorted(candidates.prompt_of_response, np.arange(len(candidates.prompts) + 1))
    found: list[dict[str, Any]] = []
    left = _SHOWN_CHARACTERS
    wanted = order[: min(_SHOWN_PROMPTS, int((depth > 0).sum()))]
    for prompt in (*wanted[:3], *without, *wanted[3:]):
        texts = [prompt_text(text) for text in candidates.responses[starts[prompt] : starts[prompt + 1]]]
        said = prompt_text(candidates.prompts[prompt])
        left -= len(said) + sum(map(len, texts))
        if left < 0 and found:
            break
        found.append({"prompt": int(prompt), "text": said, "responses": texts})
    return sorted(found, key=lambda each: (-int(depth[each["prompt"]]), int(each["prompt"])))


def _sources(columns: datasets.Dataset, candidates: Candidates, index: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """How many candidate and how many kept pairs have each value of the columns that say where rows come from."""
    found: list[dict[str, Any]] = []
    for column in SOURCES:
        if column not in columns.column_names:
            continue
        values = np.array([str(value) for value in columns[column]], dtype=object)[candidates.pair_rows]
        names, place = np.unique(values.astype(str), return_inverse=True)
        if not 1 < len(names) <= len(values) // 2:
            continue
        every, kept = np.bincount(place, minlength=len(names)), np.bincount(place[index], minlength=len(names))
        order = np.argsort(-every, kind="stable")[:_MOST_VALUES]
        shares = [{"value": str(names[at]), "all": int(every[at]), "kept": int(kept[at])} for at in order]
        found.append({"column": column, "values": shares, "more": len(names) - len(order)})
    return found
