"""Pairs of steps: a tree of shared prefixes, of which each place where it branches is a prompt of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bpo.data.read import read_configured
from bpo.data.rows import load_rows
from bpo.data.tokenizers import load_tokenizer
from bpo.data.tokens import tokenize_responses
from bpo.data.values import UnusableError, as_score, as_text
from bpo.training.weights.batches import weight_columns
from bpo.training.weights.tokens import every_pair, plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets

    from bpo.config import SelectConfig


def step_pairs(
    dataset: Any,
    processing_class: Any,
    *,
    name: str = "step_tokens",
    leaves_end: bool = True,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
) -> datasets.Dataset:
    """Makes preference pairs of single steps, as in Step-DPO (arXiv 2406.18629), from trees of steps.

    Where a tree branches, its prompt and the steps so far are the prompt of a row, and the steps that follow are its
    responses: the loss of a pair is that of log π(s_w | x, s_<k) and log π(s_l | x, s_<k), and its gradient is that of
    the steps alone. TRL closes every response of plain text with the end token, which would teach the policy to stop
    after each step; so that of a step which goes on has the weight 0 *(ours)*, and all other tokens the weight 1.

    A row of the data has a ``prompt``, text or messages, and ``steps``, a list of nodes. A node is {``text``,
    ``score``, ``steps``}: what is said, how good it is, and the nodes that follow. One without a score has the mean of
    those that follow it, as a step is worth what can be made of it *(ours)*; steps of equal score make no pair.
    Messages are put through the chat template, so that the rows are plain text.

    Args:
        dataset: Rows with trees, in any form of :func:`bpo.select`.
        processing_class: The tokenizer, or the path of it or of the model.
        name: What the weights of the tokens are to be called.
        leaves_end: Whether a node without steps ends the response. A node may say otherwise: ``"ends": False``.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns are called in the data, such as ``{"prompt": "question"}``.
        config: Uses ``max_pairs_per_prompt``, ``on_invalid`` and ``trust_remote_code``.

    Returns:
        A row for each pair of steps: ``prompt``, ``chosen``, ``rejected``, ``score_chosen``, ``score_rejected``,
        ``tree`` (the row of the data), ``step`` (how many steps stand before it) and the weights, ``<name>_chosen`` and
        ``<name>_rejected``, for ``token_weights`` of :class:`bpo.SelectConfig` and :class:`bpo.WeightedDPOConfig`.

    Raises:
        ValueError: A node that is none, steps without any score, or trees without a pair; the message names the place.

    Example:
        .. code-block:: python

            wrong, right = {"text": " 2+2 is 5.", "score": 0}, {"text": " 2+2 is 4.", "score": 1}
            pairs = bpo.step_pairs([{"prompt": "2+2+1?", "steps": [right, wrong]}], "my-sft-model", leaves_end=False)
            args = bpo.WeightedDPOConfig("out", token_weights="step_tokens")
            bpo.WeightedDPOTrainer("my-sft-model", args=args, train_dataset=pairs).train()
    """
    settings = plain(config)
    tokenizer = load_tokenizer(None, processing_class, settings)
    rows: list[dict[str, Any]] = []
    ends: dict[tuple[str, str], bool] = {}
    for index, row in enumerate(load_rows(dataset, split=split, columns=columns)):
        place = f"Row {index}"
        if not isinstance(row, Mapping) or not {"prompt", "steps"} <= set(row):
            raise ValueError(f"{place}: a tree has a prompt and steps.")
        prompt = _prompt_of(row["prompt"], tokenizer, place)
        for step, prefix, branches in _branches(prompt, row["steps"], place, 0):
            texts = [node["text"] for node in branches]
            scores = [_score(node, place) for node in branches]
            rows.append({"prompt": prefix, "responses": texts, "scores": scores, "tree": index, "step": step})
            for node in branches:
                ends[prefix, node["text"]] = bool(node.get("ends", leaves_end and not node.get("steps")))
    if not rows:
        raise ValueError("No step of the trees has another beside it, so there is nothing to compare.")
    pairs = every_pair(load_rows(rows), settings, weight_columns(name))
    candidates = read_configured(pairs, settings)
    tokenized = tokenize_responses(candidates, tokenizer, None)[0]
    for column, side, which in zip(weight_columns(name), ("chosen", "rejected"), tokenized.pairs.T, strict=True):
        weights: list[list[float]] = [[]] * len(pairs)
        for row, sequence in zip(candidates.pair_rows.tolist(), which, strict=True):
            text = pairs[row][side]
            goes_on = not (ends[pairs[row]["prompt"], text] or text.endswith(tokenizer.eos_token))
            weights[row] = [1.0] * (int(tokenized.response_lengths[sequence]) - goes_on) + [0.0] * goes_on
        pairs = pairs.add_column(column, weights)
    return pairs


def _prompt_of(prompt: Any, tokenizer: Any, place: str) -> str:
    """Returns the text that the first step goes on from."""
    try:
        text = as_text(prompt, "prompt")
    except UnusableError as error:
        raise ValueError(f"{place}: {error}.") from None
    if isinstance(text, str):
        return text
    rendered: str = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
    begin = tokenizer.bos_token
    # The tokenizer puts it in front of plain text itself.
    if begin and rendered.startswith(begin) and tokenizer(text="a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        rendered = rendered[len(begin) :]
    return rendered


def _branches(prefix: str, nodes: Any, place: str, step: int) -> Iterator[tuple[int, str, list[Mapping[str, Any]]]]:
    """Yields every place of a tree with several steps to go on by: how deep, the text before it, and the steps."""
    if not isinstance(nodes, (list, tuple)):
        raise ValueError(f"{place}: steps must be a list of nodes, got {type(nodes).__name__}.")
    for at, node in enumerate(nodes):
        if not isinstance(node, Mapping) or not isinstance(node.get("text"), str) or not node["text"]:
            raise ValueError(f"{place}, step {at}: a node is a mapping with a text, got {node!r:.80}.")
    if len(nodes) > 1:
        yield step, prefix, list(nodes)
    for at, node in enumerate(nodes):
        if node.get("steps"):
            yield from _branches(prefix + node["text"], node["steps"], f"{place}, step {at}", step + 1)


def _score(node: Mapping[str, Any], place: str) -> float:
    """Returns the score of a node, or the mean of those that follow it."""
    if node.get("score") is not None:
        try:
            return as_score(node["score"])
        except UnusableError as error:
            raise ValueError(f"{place}, step {node['text']!r:.60}: {error}.") from None
    if not node.get("steps"):
        raise ValueError(f"{place}, step {node['text']!r:.60}: it has no score, and no step follows that has one.")
    return math.fsum(_score(child, place) for child in node["steps"]) / len(node["steps"])
