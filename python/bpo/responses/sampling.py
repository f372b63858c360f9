"""Sampling responses from the policy or from a server: step 2 of the method."""

from __future__ import annotations

import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm.auto import tqdm

from bpo.choices import SEED
from bpo.config import SelectConfig
from bpo.data.values import content_id
from bpo.responses.client import ChatError, ChatServer
from bpo.responses.prompts import lay_out, lay_out_again, need_messages, read_responses, to_dataset
from bpo.responses.rowblocks import Work, check_same_rows, fill
from bpo.responses.rowfile import RowFile, check_output
from bpo.responses.sources import ServerSource
from bpo.system.warn import warn
from bpo.world.world import world

if TYPE_CHECKING:
    import os
    from collections.abc import Generator

    import datasets

    from bpo.data.values import Text
    from bpo.responses.prompts import PromptResponses
    from bpo.responses.sources import Sampled, Source

Kept = Literal["truncated", "refusal"]
_REASONS = ("empty", "truncated", "refusal", "duplicate", "failed")


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
    seed: int = SEED,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
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
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
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
    settings: dict[str, Any] = {
        "n_responses": int(n_responses),
        "temperature": float(temperature),
        "top_p": float(top_p),
        "max_new_tokens": int(max_new_tokens),
        "keep": sorted(keep),
        "keep_existing": keep_existing,
        "seed": int(seed),
    }

    def sampled() -> datasets.Dataset:
        rows = read_responses(prompts, prompts_only=not keep_existing, split=split, columns=columns)
        source: Source
        if isinstance(model, ChatServer):
            source = ServerSource(model, settings)
        else:
            from bpo.responses.generation import ModelSource  # not for servers, which need no torch

            source = ModelSource(model, processing_class, config, settings, batch_size)
        same = {"batch_size": batch_size}
        return _sampled(source, source.fitting(rows), settings, same, output, config.process_timeout, progress)

    # One process asks a server, as it keeps to the concurrency and the rate that were asked for.
    return world().from_main(sampled) if isinstance(model, ChatServer) else sampled()


def _sampled(
    source: Source,
    rows: list[PromptResponses],
    settings: dict[str, Any],
    same: dict[str, Any],
    output: Any,
    timeout: float,
    progress: bool,
) -> datasets.Dataset:
    """Samples responses to what is lacking, and returns all."""
    job = world()
    count, keep, keep_existing = settings["n_responses"], settings["keep"], settings["keep_existing"]
    described = {"model": source.describe(), **settings} if output is not None or job.size > 1 else settings
    ids = [_row_id(row) for row in rows]
    check_same_rows(job, rows, ids, {**same, **described}, output, timeout)
    as_messages = need_messages(rows)
    file = RowFile(output, "responses", described, ids, _is_whole)
    bar = tqdm(total=len(rows) * count, desc="Sampling", unit="response", disable=not (progress and job.is_main))

    def known() -> list[int]:
        for row, row_id in zip(rows, ids, strict=True):
            if row_id in file.rows:
                file.replace(row_id, lay_out_again(row, file.rows[row_id], as_messages=as_messages))
        # What a server failed at is tried again.
        todo = [i for i, name in enumerate(ids) if name not in file.rows or file.rows[name]["dropped"]["failed"]]
        bar.n = max(bar.n, (len(rows) - len(todo)) * count)
        bar.refresh()
        return sorted(
            todo, key=lambda i: ids[i] in file.rows
        )  # what was not tried first: a failure for good stops none

    def make(todo: Sequence[int]) -> Generator[tuple[int, dict[str, Any]], None, None]:
        for index, sampled in source.sample(rows, todo, bar.update):
            row = rows[index]
            responses, dropped = _sift(row, sampled, keep)
            scores = {"scores": row.scores + [None] * (len(responses) - len(row.scores))} if keep_existing else {}
            yield index, lay_out(row, responses, as_messages=as_messages, **scores, dropped=dropped)

    with bar:
        work = Work(source.blocks(rows), known, make, lambda found: bar.update(count * len(found)))
        finished = fill(file, work, job, timeout)
    _report(finished, source.failures, settings["max_new_tokens"], job.is_main)
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


def _report(rows: Sequence[dict[str, Any]], failures: Sequence[str], max_new_tokens: int, is_main: bool) -> None:
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
    if not is_main:  # the first process warns for all
        return
    single = sum(len(row["responses"]) < 2 for row in rows if len(row["responses"]) + sum(row["dropped"].values()) > 1)
    if single:
        warn(f"{single} of {len(rows)} prompts have fewer than two responses, so no pair; dropped: {said}.{hint}")
    elif dropped["failed"]:
        warn(f"{dropped['failed']} requests failed, and are tried again by the same call; dropped: {said}.{hint}")


# How refusals begin, in languages that models often refuse in (ours); case and curly apostrophes do not matter.
_CANNOT = r"(can't|cannot|can not|won't|will not|am unable|'m unable|am not able|'m not able|am not going|must decline)"
_HELP = (
    r"(help|assist|answer|comply|provide|fulfil|fulfill|do that|do this|support|engage|create|generate|discuss|write|"
    r"participate|share|offer)"
)
REFUSAL_PATTERNS: tuple[str, ...] = (
    # English
    rf"(i'?m|i am) ((really|very|so|truly) )?sorry[,.]? (but )?(as an? [^.!?\n]{{0,40}},? )?i ?{_CANNOT}",
    rf"(sorry|apologies|unfortunately)[,.]? (but )?i ?{_CANNOT}",
    rf"i (apologize|apologise|regret),? (but|that) i ?{_CANNOT}",
    rf"i ?{_CANNOT} (to )?{_HELP}",
    rf"as an? (ai|artificial intelligence|language model)\b[^.!?\n]{{0,40}},? i ?{_CANNOT}",
    # German
    r"(es )?tut mir (sehr )?leid,? (aber |doch )?(ich (kann|darf|werde)|dabei|das kann)",
    r"(leider|entschuldigung,?( aber)?) (kann|darf) ich [^.!?\n]{0,60}\b(nicht|keine?n?)\b",
    r"ich (kann|darf|werde) (dir|ihnen|dabei|das|diese[nmrs]?|darauf)\b[^.!?\n]{0,60}\bnicht (weiter)?(helfen|"
    r"beantworten|unterstützen|erfüllen)",
    # French
    r"(je suis )?(vraiment )?(désolée?|navrée?),? (mais )?je ne (peux|suis|vais)",
    r"je ne (peux|suis) pas (en mesure|vous aider|t'aider|répondre|fournir|capable|autorisé)",
    # Spanish
    r"lo (siento|lamento)( mucho)?,? (pero )?no (puedo|estoy|me es)",
    r"no puedo (ayudar|responder|proporcionar|cumplir|asistir|ofrecer)",
    # Portuguese
    r"(sinto muito|desculpe|lamento),? (mas )?(eu )?não (posso|consigo|sou)",
    r"(eu )?não (posso|consigo) (ajudar|responder|fornecer|atender|auxiliar)",
    # Italian
    r"(mi dispiace|spiacente),? (ma )?non (posso|sono)",
    r"non posso (aiutar|risponder|fornir|soddisfar|assister)",
    # Russian
    r"(извините|простите|к сожалению),? (но )?(я )?не (могу|смогу)",
    r"я не могу (помочь|ответить|предоставить|выполнить)",
    # Chinese
    r"(很|非常|十分)?(抱歉|对不起|對不起)[,，。!！ ]{0,2}(但)?(我|作为|作為)?[^。!！\n]{0,12}"
    r"(不能|无法|無法|不会|不會)",
    r"我(不能|无法|無法)(帮|幫|协助|協助|回答|提供|满足|滿足|为您|為您)",
    # Japanese
    r"(大変)?(申し訳(ありません|ございません|ない)|すみません|ごめんなさい)[^\n]{0,60}"
    r"(できません|できかねます|いたしかねます|お答えできない)",
    # Korean
    r"(죄송합니다|죄송하지만|미안하지만)[^\n]{0,60}(수 없습니다|수 없어요|어렵습니다)",
)
_REFUSAL = re.compile("|".join(f"(?:{pattern})" for pattern in REFUSAL_PATTERNS), re.IGNORECASE)
_LEADING = " \t\n\"'“”‘’*_>#-"


def is_refusal(text: str) -> bool:
    """Whether a response begins as a refusal to answer (:data:`REFUSAL_PATTERNS`).

    It is a list of phrases: one that refuses in other words, or later on, is not found.

    Example:
        >>> is_refusal("I’m sorry, but I can't help with that."), is_refusal("I cannot recommend this film enough!")
        (True, False)
        >>> is_refusal("Es tut mir leid, aber ich kann dabei nicht helfen."), is_refusal("抱歉，我无法回答这个问题。")
        (True, True)
    """
    return _REFUSAL.match(text.lstrip(_LEADING).replace("’", "'")) is not None
