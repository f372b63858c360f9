"""How often a scorer prefers what a trained policy answers to what the starting policy answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.data.columns import template_columns
from bpo.evidence.length_controlled import length_controlled_win_rate
from bpo.responses.client import ChatServer
from bpo.responses.judge import Judge
from bpo.responses.prompts import read_responses
from bpo.responses.reward import RewardModel
from bpo.responses.sampling import sample_responses
from bpo.responses.scorer import Scorer, load_function
from bpo.responses.scoring import score_responses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.responses.prompts import PromptResponses

_SAMPLING = {"n_responses": 1, "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 256, "batch_size": 32}
_JUDGE = ("model", "mode", "criteria", "max_tokens", "concurrency", "requests_per_minute")


@dataclasses.dataclass(frozen=True)
class ScorerConfig:
    """What scores the responses of two policies, and how they are sampled.

    Attributes:
        kind: ``"function"``, ``"reward_model"`` or ``"judge"``.
        source: ``MODULE:FUNCTION``, path or hub id, or the address of the judge's server.
        judge: Settings of the judge.
        sampling: Settings of :func:`bpo.sample_responses`.
    """

    kind: str
    source: str
    judge: dict[str, Any]
    sampling: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ScorerConfig:
        """Reads a mapping with one of ``function``, ``reward_model`` and ``judge``.

        Raises:
            ValueError: A field that is none, or a value out of range.
        """
        kinds = [kind for kind in ("function", "reward_model", "judge") if given.get(kind) is not None]
        if len(kinds) != 1:
            raise ValueError("scorer must have one of function, reward_model and judge")
        kind = kinds[0]
        known = {kind, *_SAMPLING, *(_JUDGE if kind == "judge" else ())}
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"scorer.{unknown[0]} is no field; there are {', '.join(sorted(known))}")
        if not isinstance(given[kind], str):
            raise ValueError(f"scorer.{kind} must be text, got {given[kind]!r}")
        sampling = {**_SAMPLING, **{name: value for name, value in given.items() if name in _SAMPLING}}
        for name in ("n_responses", "max_new_tokens", "batch_size"):
            if isinstance(sampling[name], bool) or not isinstance(sampling[name], int) or sampling[name] < 1:
                raise ValueError(f"scorer.{name} must be a whole number of at least 1, got {sampling[name]!r}")
        for name, most in (("temperature", float("inf")), ("top_p", 1.0)):
            value = sampling[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
                raise ValueError(f"scorer.{name} must be above 0 and at most {most}, got {value!r}")
        judge = {name: given[name] for name in _JUDGE if given.get(name) is not None}
        if kind == "judge" and not isinstance(judge.get("model"), str):
            raise ValueError("scorer.model must be given with a judge: the model's name at its server")
        return cls(kind, given[kind], judge, sampling)

    def build(self, cache: Path) -> Any:
        """Returns what :func:`bpo.score_responses` takes.

        Args:
            cache: File of the verdicts that a judge gave before.

        Raises:
            ValueError: A function that is not there.
            OSError: A reward model that cannot be loaded.
        """
        if self.kind == "reward_model":
            return RewardModel(self.source)
        if self.kind == "function":
            return load_function(self.source, "scorer.function")
        settings = dict(self.judge)
        server = {name: settings.pop(name) for name in ("concurrency", "requests_per_minute") if name in settings}
        return Judge(ChatServer(self.source, settings.pop("model"), cache=cache, **server), **settings)

    def sample(
        self,
        policy: PreTrainedModel,
        prompts: Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        output: Path | None = None,
    ) -> list[dict[str, Any]]:
        """Samples responses, cut ones and refusals included; two policies with one seed share their random numbers."""
        settings = dict(self.sampling)
        sampled = sample_responses(
            policy,
            [dict(prompt) for prompt in prompts],
            settings.pop("n_responses"),
            **settings,
            keep=("truncated", "refusal"),
            processing_class=tokenizer,
            seed=seed,
            output=output,
            progress=False,
        )
        return [dict(row) for row in sampled]


@dataclasses.dataclass(frozen=True)
class Wins:
    """Comparisons of two policies' responses.

    Attributes:
        measures: ``win_rate`` and ``length_controlled_win_rate``.
        rows: One a prompt: both policies' responses with their scores, and the share of wins.
    """

    measures: dict[str, float]
    rows: list[dict[str, Any]]


def compare_responses(start: Sequence[Mapping[str, Any]], trained: Sequence[Mapping[str, Any]], scorer: Any) -> Wins:
    """Scores the responses of two policies to the same prompts, and counts how often the second one wins.

    Every response of the one is compared with every response of the other; equal scores, and equal responses, are half
    a win. What has no score is left out.

    Args:
        start: Rows of the starting policy, as :func:`bpo.sample_responses` returns them; with ``scores`` where they
            are known.
        trained: Rows of the trained policy, likewise.
        scorer: What :func:`bpo.score_responses` takes.

    Returns:
        The wins. Lengths are in characters.

    Raises:
        ValueError: Nothing could be compared.
    """
    first, second = ({row.key: row for row in read_responses(list(map(dict, rows)))} for rows in (start, trained))
    shared = [key for key in first if key in second]
    rows = [_both(first[key], second[key]) for key in shared]
    scored = {row.key: row for row in read_responses(score_responses(rows, scorer, progress=False))}
    wins, lengths, clusters, told = [], [], [], []
    for number, key in enumerate(shared):
        score = dict(zip(map(_text, scored[key].responses), scored[key].scores, strict=True))
        ours, theirs = (list(map(_text, side[key].responses)) for side in (second, first))
        here = []
        for mine in ours:
            for other in theirs:
                left, right = score[mine], score[other]
                if left is not None and right is not None:
                    here.append((1 + (left > right) - (left < right)) / 2)
                    lengths.append(len(mine) - len(other))
                    clusters.append(number)
        wins += here
        told.append(
            {
                "prompt": scored[key].prompt,
                "start": [{"text": text, "score": score[text]} for text in theirs],
                "trained": [{"text": text, "score": score[text]} for text in ours],
                "wins": sum(here) / len(here) if here else None,
            }
        )
    if not wins:
        raise ValueError("No response of the trained policy could be compared with one of the starting policy.")
    rate = length_controlled_win_rate(wins, lengths, clusters=clusters)
    return Wins({"win_rate": rate.raw_win_rate, "length_controlled_win_rate": rate.win_rate}, told)


def score_start(rows: list[dict[str, Any]], scorer: Any, output: Path) -> list[dict[str, Any]]:
    """Scores the starting policy's responses once for all arms, unless scores compare the responses of a prompt."""
    if isinstance(scorer, Scorer) and scorer.relative:
        return rows
    return [dict(row) for row in score_responses(rows, scorer, output=output, progress=False)]


def _both(start: PromptResponses, trained: PromptResponses) -> dict[str, Any]:
    """Returns a row of both policies' responses to a prompt, with the scores that are known; equal ones once."""
    known = dict(zip(map(_text, start.responses), start.scores, strict=True))
    responses = [*start.responses, *(text for text in trained.responses if _text(text) not in known)]
    conversational = isinstance(start.prompt, list)
    return {
        "prompt": start.prompt,
        "responses": [start.messages(text) if conversational else text for text in responses],
        "scores": [known.get(_text(text)) for text in responses],
        **template_columns(start.template_kwargs),
    }


def _text(response: Any) -> str:
    """A response as plain text."""
    return response if isinstance(response, str) else "\n".join(message.get("content") or "" for message in response)
