"""Whether a selection can be trusted, in words that claim no more than was measured."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from bpo.report.page import percent as plain_percent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SURE = 0.05
_LONGER_SHIFT = 0.1  # of the share of pairs that prefer the longer response
_LENGTH_SHARE = 0.3  # of the mean score gap
_SOURCE_SHIFT = 0.15
_NEAR_SHARE = 0.02


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a page says first.

    Attributes:
        answer: Whether the selection is better than random, in a few words.
        level: ``"good"``, ``"bad"`` or ``"open"``.
        because: What that rests on, in sentences.
        look: What to look at: text and the part of the page that shows it.
    """

    answer: str
    level: str
    because: list[str]
    look: list[tuple[str, str]]


def verdict(
    strategy: str,
    budget: int,
    evidence: Mapping[str, Any],
    *,
    preview: Mapping[str, Any] | None,
    lengths: Mapping[str, Mapping[str, float]] | None,
    clusters: Sequence[Mapping[str, Any]],
    fates: Mapping[str, int],
    noted: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> Verdict:
    """Says whether a selection beats a random one, how sure that is, and what to look at.

    Args:
        strategy: Its name.
        budget: Pairs that were asked for.
        evidence: As :attr:`bpo.Selection.evidence` holds it, or empty.
        preview: Records of a preview of the same data, with ``splits`` and ``baseline``; it is believed before
            ``evidence``, since it has more splits.
        lengths: As :meth:`bpo.Selection.lengths` returns them.
        clusters: One record a cluster, with ``candidates`` and ``kept``.
        fates: Pairs by fate.
        noted: Reasons to look at the data.
        provenance: What is known of the run.
    """
    found = _of_preview(strategy, budget, preview) or _of_worth(strategy, evidence.get("worth") or {})
    if found is None:
        found = _untold(strategy, budget, evidence, provenance)
    answer, level, because = found
    agreement = evidence.get("agreement")
    if agreement is not None and agreement > _SURE:
        because = [
            *because,
            f"The gradients of different prompts have no direction in common (p = {agreement:.2f}): what is learned "
            "from one prompt may not carry over to others, whichever pairs are chosen.",
        ]
    look = [
        *_labels(evidence),
        *_near(evidence, fates),
        *_length(lengths),
        *_spread(clusters, fates),
        *_shift(evidence),
    ]
    if noted:
        look.append((f"{sum(count for count, _ in noted.values())} notes on the data.", "noted"))
    return Verdict(answer, level, because, look)


def _of_preview(strategy: str, budget: int, preview: Mapping[str, Any] | None) -> tuple[str, str, list[str]] | None:
    """What a preview says of the strategy, at the budget that is nearest."""
    rows = [] if preview is None else [row for row in preview["records"] if row["arm"] == strategy]
    rows = [row for row in rows if row["difference"] is not None and row["low"] == row["low"]]
    if preview is None or not rows or preview["baseline"] != "random":
        return None
    row = min(rows, key=lambda each: abs(each["budget"] - budget))
    random = next(each for each in preview["records"] if (each["arm"], each["budget"]) == ("random", row["budget"]))
    answer, level = _judged(row["low"], row["high"])
    tried = len({each["arm"] for each in preview["records"]}) - 1
    adjusted = ""
    if level != "open" and row["p"] >= _SURE:  # the preview adjusts for all of its arms, and this is one of them
        answer, level = _judged(-1, 1)
        adjusted = f" That is one of {tried} comparisons; with all of them taken into account, p = {row['p']:.3f}."
    return (
        answer,
        level,
        [
            f"A preview of this strategy at {row['budget']:,} pairs: {_accuracies(row, random['accuracy'])}, over "
            f"{preview['splits']} splits.{adjusted}",
            _LINEARISED,
        ],
    )


_LINEARISED = (
    "That is the linearised regime: a logistic regression on the gradients stands for training, and the strategy chose "
    "anew on each split; it is not a training on these very pairs, which bpo compare would do."
)


def _of_worth(strategy: str, worth: Mapping[str, Any]) -> tuple[str, str, list[str]] | None:
    """What was measured beside the choice, if anything was."""
    if "arms" not in worth:
        return None
    arms = {arm["name"]: arm for arm in worth["arms"]}
    own, random = arms[strategy], arms["random"]
    answer, level = (
        ("The same as random in every split", "open") if own["low"] is None else _judged(own["low"], own["high"])
    )
    of = f"{worth['prompts']:,} prompts"
    if worth["prompts"] < worth["all_prompts"]:
        of += f", drawn from {worth['all_prompts']:,}, with as many pairs fewer"
    because = [
        f"On prompts that were held out, after {own['pairs']:,} pairs of the others: "
        f"{_accuracies(own, random['accuracy'])}, over {worth['splits']} splits of {of}.",
        _LINEARISED,
    ]
    simple = arms.get("best_worst")
    if simple is not None and strategy != "best_worst" and simple["accuracy"] >= own["accuracy"]:
        because.append(
            f"The best against the worst response of each prompt ({simple['pairs']:,} pairs) did no worse: "
            f"{percent(simple['accuracy'])}. Whether the two differ by more than chance was not tested."
        )
    return answer, level, because


def percent(share: float) -> str:
    """A share that is not torn from its sign at the end of a line."""
    return plain_percent(share).replace(" ", "\N{NO-BREAK SPACE}")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _judged(low: float, high: float) -> tuple[str, str]:
    if low > 0:
        return "Better than random here", "good"
    if high < 0:
        return "Worse than random here", "bad"
    return "Not to be told from random here", "open"


def _accuracies(row: Mapping[str, Any], random: float) -> str:
    """An accuracy against that of random pairs, and their difference."""
    text = f"{percent(row['accuracy'])} of the pairs are ranked as labelled, {percent(random)} after random ones"
    if row["low"] is None:
        return text
    return (
        f"{text}; a difference of {_points(row['difference'])} points, 95 % interval {_points(row['low'])} to "
        f"{_points(row['high'])}"
    )


def _untold(
    strategy: str, budget: int, evidence: Mapping[str, Any], provenance: Mapping[str, Any]
) -> tuple[str, str, list[str]]:
    """What is said where nothing was measured."""
    if strategy == "random":
        return "This is the random choice", "open", ["It is what others are compared with."]
    reason = (evidence.get("worth") or {}).get("reason", "nothing was measured beside this selection")
    data = shlex.quote(provenance["data"]) if provenance.get("data_readable") else "DATA"
    ask = f"bpo preview GRADIENTS {data} --budget {budget} --arm {strategy}"
    return (
        "Whether it is better than random was not measured",
        "open",
        [f"The reason: {reason}.", f"With the gradients of the data, this measures it without training: {ask}"],
    )


def _labels(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = evidence.get("labels") or {}
    if not labels.get("known"):
        return []
    if not labels["tells"]:
        return [
            ("Labels: the rest of the data agrees with them no more than chance would; none can be doubted.", "labels")
        ]
    if labels["suspects"]:
        return [(f"Of the kept labels, {labels['suspects']:,} more likely wrong than right.", "labels")]
    return []


def _near(evidence: Mapping[str, Any], fates: Mapping[str, int]) -> list[tuple[str, str]]:
    near = evidence.get("near") or {}
    count = near.get("count", 0)
    if count <= _NEAR_SHARE * fates["selected"]:
        return []
    return [
        (
            f"{count:,} of the kept pairs have nearly the gradient of another one (cosine ≥ {near['threshold']:g}).",
            "near",
        )
    ]


def _length(lengths: Mapping[str, Mapping[str, float]] | None) -> list[tuple[str, str]]:
    if lengths is None:
        return []
    kept, every = lengths["kept"], lengths["all"]
    found = []
    if abs(kept["longer_share"] - every["longer_share"]) > _LONGER_SHIFT:
        found.append(
            f"Length: the preferred response is the longer one in {percent(kept['longer_share'])} of the kept pairs, "
            f"in {percent(every['longer_share'])} of all."
        )
    if kept["gap"] > 0 and 1 - kept["controlled_gap"] / kept["gap"] > _LENGTH_SHARE:
        share = min(1.0, 1 - kept["controlled_gap"] / kept["gap"])
        found.append(f"Length: {percent(share)} of the mean score gap of the kept pairs goes with length.")
    return [(text, "length") for text in found]


def _spread(clusters: Sequence[Mapping[str, Any]], fates: Mapping[str, int]) -> list[tuple[str, str]]:
    found = []
    missed = sum(1 for cluster in clusters if not cluster["kept"])
    if missed:
        found.append((f"{missed:,} of {len(clusters):,} clusters keep no pair.", "clusters"))
    if fates.get("unusable"):
        found.append((f"{fates['unusable']:,} pairs have an unusable gradient.", "unusable"))
    if fates.get("untrusted"):
        found.append((f"{fates['untrusted']:,} pairs were left out since their label looks wrong.", "labels"))
    return found


def _shift(evidence: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for source in evidence.get("sources") or []:
        moved = 0.0
        totals = {side: max(1, sum(value[side] for value in source["values"])) for side in ("all", "kept")}
        for value in source["values"]:
            moved += abs(value["kept"] / totals["kept"] - value["all"] / totals["all"]) / 2
        if moved > _SOURCE_SHIFT:
            found.append(
                (
                    f"{percent(moved)} of the kept pairs come from another “{source['column']}” than in the data.",
                    "sources",
                )
            )
    return found
