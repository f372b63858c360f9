"""Sampling responses from the policy or from a server: step 2 of the method."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm.auto import tqdm

from bpo.config import SelectConfig
from bpo.data.values import content_id
from bpo.responses.client import ChatError, ChatServer
from bpo.responses.prompts import lay_out, lay_out_again, need_messages, read_responses, to_dataset
from bpo.responses.refusals import is_refusal
from bpo.responses.rowfile import RowFile, check_output
from bpo.responses.sources import ServerSource
from bpo.system.warn import warn
from bpo.world.world import by_main

if TYPE_CHECKING:
    import os

    import datasets

    from bpo.data.values import Text
    from bpo.responses.prompts import PromptResponses
    from bpo.responses.sources import Sampled, Source

Kept = Literal["truncated", "refusal"]
_REASONS = ("empty", "truncated", "refusal", "duplicate", "failed")


@by_main
def sample_responses(
    model: Any,
    prompts: Any,
    n_responses: int = 4,
    *,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    keep: Collection[Kept] = (),
    keep_existing: bool = False,
    output: str | os.PathLike[str] | None = None,
    processing_class: Any = None,
    batch_size: int = 32,
    seed: int = 0,
    config: SelectConfig | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> datasets.Dataset:
    """Samples several responses to each prompt.

    Sampling from the policy is the paper's (arXiv 2411.10914); ours are m = 4, temperature 1.0, top-p 0.95 (Holtzman et
    al., arXiv 1904.09751), and that what no pair should be made of is dropped: responses that are empty, cut at
    ``max_new_tokens`` (trained on, they would teach to stop there), refusals to answer
    (told by how they begin), and those that the prompt has already. Nothing is drawn in their place.

    Response i to a prompt is drawn with random numbers of its own, which follow from (``seed``, prompt, i). So it
    depends neither on the other prompts nor on their order, ``n_responses`` or where a run was interrupted, and the
    random state of PyTorch is left alone. What remains is arithmetic: another ``batch_size`` pads prompts otherwise,
    which moves the logits by rounding. In float32 that is rarely enough to change a token (SmolLM2-135M on a CPU: none
    of 63 responses of up to 48 tokens in batches of 4, 16 and 64); in bfloat16 most responses part at some token (6
    and 22 of the 63 were those of batches of 16). With the same ``batch_size``, an interrupted run that goes on gives
    the same bytes. Servers get a seed for each response; what they make of it is theirs.

    Args:
        model: Path, hub id, ``PreTrainedModel`` or ``PeftModel``, which is left as it was found, in training or not; or
            a :class:`bpo.ChatServer`. The distribution is the model's own: of its generation settings only the end
            tokens are used, no penalties and no top-k.
        prompts: A list of prompts, text or messages; a data set with a ``prompt`` column; or any format of
            :func:`bpo.select`. Equal prompts are sampled once. Text is continued by a model. A server takes chats, so
            there it is asked as the user's turn, and the result has messages for prompts.
        n_responses: Responses to each prompt (m).
        temperature: Divides the logits; above 0.
        top_p: Smallest probability mass that is sampled from, above 0 and at most 1, which is everything.
        max_new_tokens: Most tokens of a response.
        keep: What is kept, and not counted as dropped: ``"truncated"``, ``"refusal"``.
        keep_existing: Whether responses of the data, with their scores, stay in front of the new ones.
        output: A .jsonl file to which each prompt goes as soon as it is finished. The same call goes on from there; one
            with other settings, which stand in a manifest beside it, is refused.
        processing_class: The tokenizer; by default the one saved with the model.
        batch_size: Responses generated at once, rounded to whole prompts; halved where memory does not suffice. Not
            used with a server, which has a ``concurrency``.
        seed: Of everything that is random.
        config: Uses ``dtype``, ``device`` and ``trust_remote_code``: how a model given by path is loaded.
        progress: Whether to show a progress bar.

    Returns:
        Rows of ``prompt``, ``responses`` (text; messages where the data has such) and ``dropped`` (counts by reason),
        ``scores`` with ``keep_existing``, and the other columns of the data. :func:`bpo.describe_responses` adds up the
        counts; :func:`bpo.score_responses` comes next.

    Raises:
        ValueError: A setting out of range, unusable data, other settings than those of ``output``, or not one response.
        FileNotFoundError, OSError: A model that cannot be loaded, a server that cannot be reached.

    Example:
        >>> import bpo
        >>> bpo.sample_responses("my-sft-model", ["What is 2+2?"], temperature=0)
        Traceback (most recent call last):
        ...
        ValueError: temperature must be above 0, got 0
    """
    _check(n_responses, temperature, top_p, max_new_tokens, batch_size, seed, keep)
    config = SelectConfig.of(config)
    check_output(output)  # before a model is loaded
    rows = read_responses(prompts, prompts_only=not keep_existing)
    settings: dict[str, Any] = {
        "n_responses": int(n_responses),
        "temperature": float(temperature),
        "top_p": float(top_p),
        "max_new_tokens": int(max_new_tokens),
        "keep": sorted(keep),
        "keep_existing": keep_existing,
        "seed": int(seed),
    }
    source: Source
    if isinstance(model, ChatServer):
        source = ServerSource(model, settings)
    else:
        from bpo.responses.generation import ModelSource  # not for servers, which need no torch

        source = ModelSource(model, processing_class, config, settings, batch_size)
    rows = source.fitting(rows)
    if output is not None:
        settings = {"model": source.describe(), **settings}
    ids = [_row_id(row) for row in rows]
    as_messages = need_messages(rows)
    bar = tqdm(total=len(rows) * n_responses, desc="Sampling", unit="response", disable=not progress)
    with RowFile(output, "responses", settings, ids, _is_whole) as file, bar:
        for row, row_id in zip(rows, ids, strict=True):
            if row_id in file.rows:
                file.replace(row_id, lay_out_again(row, file.rows[row_id], as_messages=as_messages))
        # What a server failed at is tried again.
        todo = [i for i, name in enumerate(ids) if name not in file.rows or file.rows[name]["dropped"]["failed"]]
        todo.sort(key=lambda index: ids[index] in file.rows)  # first what was not tried: a failure for good stops none
        bar.update((len(rows) - len(todo)) * n_responses)
        for index, sampled in source.sample(rows, todo, bar.update):
            row = rows[index]
            responses, dropped = _sift(row, sampled, keep)
            scores = {"scores": row.scores + [None] * (len(responses) - len(row.scores))} if keep_existing else {}
            file.add(ids[index], lay_out(row, responses, as_messages=as_messages, **scores, dropped=dropped))
        finished = file.finish()
    _report(finished, source.failures, max_new_tokens)
    return to_dataset(finished)


def _check(
    n_responses: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    keep: Collection[str],
) -> None:
    for name, count in (("n_responses", n_responses), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise ValueError(f"seed must be a whole number, got {seed!r}")
    if isinstance(keep, str) or not set(keep) <= set(get_args(Kept)):
        raise ValueError(f"keep must be a list of {list(get_args(Kept))}, got {keep!r}")


def _row_id(row: PromptResponses) -> str:
    """A hash of what the row is made from, existing responses and scores included."""
    existing: Any = [row.responses, row.scores]
    return content_id(row.key.hex(), *([existing] if row.responses else [])).hex()


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of the file has what this writes."""
    dropped = row.get("dropped")
    counts = [dropped.get(reason) for reason in _REASONS] if isinstance(dropped, dict) else [None]
    return isinstance(row.get("responses"), list) and all(type(count) is int for count in counts)


def _sift(
    row: PromptResponses, sampled: Sequence[Sampled | ChatError], keep: Collection[str]
) -> tuple[list[Text], dict[str, int]]:
    """Returns the responses of a prompt, the existing ones first, and how many were dropped for which reason."""
    responses: list[Text] = list(row.responses)
    seen = {response.strip() if isinstance(response, str) else None for response in responses}
    dropped = dict.fromkeys(_REASONS, 0)
    for item in sampled:
        if isinstance(item, ChatError):
            dropped["failed"] += 1
            continue
        text = item.text
        if not text.strip():
            dropped["empty"] += 1
        elif item.truncated and "truncated" not in keep:
            dropped["truncated"] += 1
        elif (item.refused or is_refusal(text)) and "refusal" not in keep:
            dropped["refusal"] += 1
        elif text.strip() in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(text.strip())
            responses.append(text)
    return responses, dropped


def _report(rows: Sequence[dict[str, Any]], failures: Sequence[str], max_new_tokens: int) -> None:
    """Warns where prompts cannot form pairs, and of requests that failed."""
    dropped = {reason: sum(row["dropped"][reason] for row in rows) for reason in _REASONS}
    said = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count) or "nothing"
    hint = (
        f" Those that were cut at {max_new_tokens} tokens can be had with a larger max_new_tokens or "
        "keep=['truncated']."
        if dropped["truncated"]
        else ""
    )
    if failures:
        said += f"; the first failure: {failures[0]}"
    if not any(row["responses"] for row in rows):
        raise ValueError(f"Not one response is left of all that were sampled; dropped: {said}.{hint}")
    single = sum(len(row["responses"]) < 2 for row in rows if len(row["responses"]) + sum(row["dropped"].values()) > 1)
    if single:
        warn(f"{single} of {len(rows)} prompts have fewer than two responses, so no pair; dropped: {said}.{hint}")
    elif failures:
        warn(f"{dropped['failed']} requests failed, and are tried again by the same call; dropped: {said}.{hint}")
