"""The runs of a comparison to means, paired differences and costs, and these to a table."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo.evidence.statistics import clustered_bootstrap, holm, paired, rank_correlation
from bpo.report.wording import MEASURES, STAGES, agreement, interval, p_value, power
from bpo.system.files import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def summarize(
    runs: Sequence[Mapping[str, Any]], untrained: Sequence[Mapping[str, Any]], description: Mapping[str, Any]
) -> dict[str, Any]:
    """Brings the runs of a comparison together.

    Args:
        runs: Finished runs.
        untrained: What the starting policy measures, one a seed.
        description: What the comparison is of: data, arms, baseline, costs.

    Returns:
        Plain values, as JSON has them: ``description``; ``arms``, one entry for each arm and budget with the mean over
        seeds of each measure, its interval, the values of each seed, and mean seconds; and
        ``differences``, one entry for each budget, measure and two arms
        (:class:`bpo.evidence.statistics.Estimate`), over the seeds that both have. Those of a
        ``family``, all arms against the baseline or bpo against all others, are adjusted together by Holm's method.
    """
    share = description["heldout_share"]
    groups: dict[tuple[str, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        groups[run["arm"], run["budget"]].append(run)
    budgets = description["budgets"]
    names = [arm["name"] for arm in description["arms"]]
    arms = [_arm("untrained", 0, untrained, share)]
    arms += [_arm(name, budget, groups[name, budget], share) for budget in budgets for name in names]
    arms = [arm for arm in arms if arm["seeds"]]
    ours = next((arm["name"] for arm in description["arms"] if arm["strategy"] == "bpo"), None)
    differences = []
    for budget in budgets:
        here = {name: {run["seed"]: run for run in groups[name, budget]} for name in names}
        baseline = description["baseline"]
        families = {"baseline": [(name, baseline) for name in names if name != baseline]}
        if ours is not None:
            families["bpo"] = [(ours, name) for name in names if name != ours]
        for family, sides in families.items():
            for measure in MEASURES:
                found = [_difference(here[left], here[right], measure, description) for left, right in sides]
                adjusted = holm([math.nan if entry is None else entry["p_value"] for entry in found])
                for (left, right), entry, adjusted_p in zip(sides, found, adjusted, strict=True):
                    if entry is not None:
                        place = {"budget": budget, "family": family, "measure": measure, "arm": left, "against": right}
                        differences.append({**place, **entry, "p_value_holm": adjusted_p})
    agreement = [_agreement(budget, [run for run in runs if run["budget"] == budget]) for budget in budgets]
    results: dict[str, Any] = _plain(
        {
            "description": dict(description),
            "n_runs": len(runs),
            "arms": arms,
            "differences": differences,
            "agreement": [entry for entry in agreement if entry["runs"]],
        }
    )
    return results


def _agreement(budget: Any, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How the order of arms and runs in the linearised regime agrees with that after training (rank correlations).

    Runs are compared within their seed: what a split makes easier or harder for every arm is taken out of both.
    """
    pairs = [
        (run["seed"], run["arm"], run["measures"]["linearised_accuracy"], run["measures"]["accuracy"])
        for run in runs
        if _is_number(run["measures"].get("linearised_accuracy")) and _is_number(run["measures"].get("accuracy"))
    ]

    def means(key: int) -> dict[Any, Any]:
        groups: dict[Any, list[tuple[float, float]]] = defaultdict(list)
        for entry in pairs:
            groups[entry[key]].append(entry[2:])
        return {name: np.mean(values, axis=0) for name, values in groups.items()}

    arms, seeds = means(1), means(0)
    within = np.array([np.array(entry[2:]) - seeds[entry[0]] for entry in pairs]).reshape(-1, 2)
    by_arm = np.array(list(arms.values())).reshape(-1, 2)
    return {
        "budget": budget,
        "runs": [
            {"seed": seed, "arm": arm, "linearised_accuracy": first, "accuracy": second}
            for seed, arm, first, second in pairs
        ],
        "n_arms": len(arms),
        "correlation_of_arms": rank_correlation(*by_arm.T),
        "correlation_of_runs": rank_correlation(*within.T),
    }


def _arm(name: str, budget: Any, runs: Sequence[Mapping[str, Any]], share: float | None) -> dict[str, Any]:
    runs = sorted(runs, key=lambda run: run["seed"])
    values = {
        measure: [run["measures"][measure] for run in runs]
        for measure in MEASURES
        if runs and all(_is_number(run["measures"].get(measure)) for run in runs)
    }
    trained = [run for run in runs if "seconds" in run]
    return {
        "arm": name,
        "budget": budget,
        "seeds": [run["seed"] for run in runs],
        "measures": {measure: _estimate(each, share) for measure, each in values.items()},
        "n_pairs": float(np.mean([run["n_pairs"] for run in trained])) if trained else 0.0,
        "n_prompts": float(np.mean([run["n_prompts"] for run in trained])) if trained else 0.0,
        "seconds": {
            stage: float(np.mean([run["seconds"][stage] for run in trained]))
            for stage in STAGES
            if trained and all(stage in run["seconds"] for run in trained)
        },
        "same_as": {str(run["seed"]): run["same_as"] for run in trained if run["same_as"]},
        "warnings": sorted({warning for run in trained for warning in run["warnings"]}),
    }


def _estimate(values: list[float], share: float | None) -> dict[str, Any]:
    """A mean with its interval; a test against zero would mean nothing."""
    estimate = paired(values, share)
    return {name: getattr(estimate, name) for name in ("mean", "standard_error", "low", "high")} | {"values": values}


def _difference(
    left: Mapping[int, Mapping[str, Any]],
    right: Mapping[int, Mapping[str, Any]],
    measure: str,
    description: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Left minus right over the seeds of both; None where there is none, or no such measure."""
    seeds = [
        seed
        for seed in sorted(left.keys() & right.keys())
        if all(_is_number(side[seed]["measures"].get(measure)) for side in (left, right))
    ]
    if not seeds:
        return None
    values = [left[seed]["measures"][measure] - right[seed]["measures"][measure] for seed in seeds]
    share = description["heldout_share"]
    entry = {**dataclasses.asdict(paired(values, share)), "seeds": seeds, "values": values, "bootstrap": None}
    prompts = description["heldout_prompt_of_pair"]
    if prompts is not None and measure == "accuracy":
        # The same held-out pairs for every seed: how much the result hangs on which prompts they are of.
        correct = [np.subtract(left[seed]["correct"], right[seed]["correct"]) for seed in seeds]
        entry["bootstrap"] = clustered_bootstrap(np.mean(correct, axis=0), prompts)
    return entry


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load(path: Path) -> dict[str, Any]:
    """Reads the ``results.json`` of a comparison.

    Raises:
        ValueError: It is none.
    """
    try:
        results = read_json(path.read_bytes(), "its text")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); bpo compare writes it anew from the runs.") from None
    if not isinstance(results, dict) or not {"description", "arms", "differences"} <= results.keys():
        raise ValueError(f"{path} holds no results of a comparison.")
    try:
        table(results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); bpo compare writes it anew from the runs."
        ) from None
    return results


def table(results: Mapping[str, Any]) -> str:
    """Returns the results as lines of text: means with intervals, differences of accuracy, and costs."""
    about = results["description"]
    lines = [
        f"{about['n_train_prompts']} training prompts ({about['n_train_pairs']} pairs), {about['n_heldout_prompts']} "
        f"held out ({about['n_heldout_pairs']} pairs), seeds {', '.join(map(str, about['seeds']))}",
        "",
        f"{'arm':<20} {'pairs':>6} {'seeds':>5}  {'accuracy (95 % CI)':<22} {'length-c.':>9} {'margin':>8} "
        f"{'select s':>8} {'train s':>8}",
    ]
    for arm in results["arms"]:
        measures = arm["measures"]
        lines.append(
            f"{arm['arm']:<20} {arm['n_pairs']:>6.0f} {len(arm['seeds']):>5}  {interval(measures['accuracy']):<22} "
            f"{_mean(measures, 'length_controlled_accuracy', '.3f'):>9} {_mean(measures, 'margin', '+.3f'):>8} "
            f"{_second(arm, 'selection'):>8} {_second(arm, 'training'):>8}"
        )
    for family, title in (("baseline", "against the baseline"), ("bpo", "bpo against the others")):
        entries = [
            entry for entry in results["differences"] if entry["family"] == family and entry["measure"] == "accuracy"
        ]
        if entries:
            lines += ["", f"Difference of accuracy, {title} (p adjusted by Holm's method)"]
        for entry in entries:
            lines.append(
                f"{entry['budget']!s:>6} pairs  {entry['arm']} − {entry['against']}: {interval(entry, '+.3f')}  "
                f"{p_value(entry['p_value_holm'])}; {power(entry)}"
            )
    lines += ["", *(agreement(entry) for entry in results["agreement"])]
    once = "; ".join(f"{stage} {seconds:.0f} s" for stage, seconds in about["seconds"].items())
    return "\n".join([*lines, "", f"Once for all arms: {once}"])


def _mean(measures: Mapping[str, Any], name: str, kind: str) -> str:
    return format(measures[name]["mean"], kind) if name in measures else "–"


def _second(arm: Mapping[str, Any], stage: str) -> str:
    return f"{arm['seconds'][stage]:.1f}" if stage in arm["seconds"] else "–"
