"""Prompts to embeddings: by a sentence encoder, by the policy itself, or as the data gives them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bpo.data.rows import load_rows
from bpo.data.values import prompt_text
from bpo.policy.batches import batch_tokens, in_batches, longest_first
from bpo.system.paths import check_path, naming
from bpo.system.warn import warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.data.rows import Rows
    from bpo.data.values import Text

_ENCODER_TOKENS_PER_BATCH = 8192
_SAME_PROMPT = 0.99
"""Least cosine of two embeddings of the same prompt; they differ by rounding only, unless rows are mixed up."""


def embed_prompts(
    prompts: Sequence[Text], embedder: Any, *, trust_remote_code: bool = False, progress: bool = True
) -> npt.NDArray[np.float32]:
    """Embeds prompts with a sentence encoder, pooled as it was trained to be, at unit length.

    How token states become one vector is part of a model: the mean of an encoder that was trained on the first token
    gives embeddings that are worse and look as good. So a model of sentence-transformers (its directory has a
    ``modules.json``) runs as that says, in the package ``sentence-transformers`` (the extra ``embed``). Without the
    package, one that takes the mean of the last hidden states and no more is run here, and any other is refused. Of a
    model that does not say how it pools the mean is taken, with a warning.

    Args:
        prompts: Plain text or conversations, whose messages are joined by line breaks.
        embedder: Path or hub id of an encoder, such as all-MiniLM-L6-v2, or a
            ``sentence_transformers.SentenceTransformer``, whose own settings (``default_prompt_name``,
            ``max_seq_length``, …) hold.
        trust_remote_code: Whether code shipped with the encoder may run.
        progress: Whether to show a progress bar.

    Returns:
        (n, e) float32.

    Raises:
        FileNotFoundError: A path that does not exist.
        OSError: A hub id that cannot be loaded.
        ValueError: An encoder that needs ``sentence-transformers``, which is not installed.

    Example:
        .. code-block:: python

            embeddings = bpo.embed_prompts(["2+2?", "3+3?"], "sentence-transformers/all-MiniLM-L6-v2")
            kept = bpo.compress_breadth(embeddings, 1).kept
    """
    texts = [prompt_text(prompt) for prompt in prompts]
    if not isinstance(embedder, (str, os.PathLike)):
        return _encode(embedder, texts, progress)
    embedder = check_path(os.fspath(embedder))
    modules = _read_json(embedder, "modules.json")
    if modules is not None and importlib.util.find_spec("sentence_transformers") is not None:
        from sentence_transformers import SentenceTransformer

        return _encode(SentenceTransformer(embedder, trust_remote_code=trust_remote_code), texts, progress)
    longest = 512
    if modules is None:
        warn(
            f"{embedder} does not say how its token states become one embedding (it has no modules.json), so the mean "
            "of its last hidden states is taken. If it was trained otherwise, on the first token for example, embed "
            "the prompts yourself and pass them as SelectConfig.prompt_embeddings."
        )
    else:
        longest = _check_mean_pooling(embedder, modules) or longest
    return _mean_of_encoder(embedder, texts, longest, trust_remote_code, progress)


def _encode(encoder: Any, texts: list[str], progress: bool) -> npt.NDArray[np.float32]:
    embeddings: npt.NDArray[np.float32] = encoder.encode(
        texts, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=progress
    )
    return np.asarray(embeddings, dtype=np.float32)


def _read_json(embedder: str, name: str) -> Any:
    """Reads a file of a model, None where it has no such file."""
    from transformers.utils import cached_file

    with naming(embedder):
        path = cached_file(embedder, name, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _check_mean_pooling(embedder: str, modules: Any) -> int | None:
    """Checks that the mean of the last hidden states is all that a model of sentence-transformers takes.

    Returns:
        The longest text that it takes, in tokens, where it says so.

    Raises:
        ValueError: Anything else.
    """
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    pooling: dict[str, Any] = {}
    if kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        pooling = _read_json(embedder, f"{modules[1]['path']}/config.json") or {}
    # Before version 6, a flag for each mode.
    modes = pooling.get(
        "pooling_mode", [name for name in pooling if name.startswith("pooling_mode_") and pooling[name]]
    )
    modes = [modes] if isinstance(modes, str) else list(modes)
    transformer = _read_json(embedder, "sentence_bert_config.json") or {}
    prompt = (_read_json(embedder, "config_sentence_transformers.json") or {}).get("default_prompt_name")
    if modes not in (["mean"], ["pooling_mode_mean_tokens"]) or transformer.get("do_lower_case") or prompt is not None:
        raise ValueError(
            f"{embedder} is a model of sentence-transformers that does more than take the mean of its last hidden "
            f"states ({' → '.join(kinds)}; pooling: {' and '.join(modes) or 'not said'}). Install that package to run "
            "it: pip install 'balanced-preference-optimization[embed]'."
        )
    longest: int | None = transformer.get("max_seq_length")
    return longest


def _mean_of_encoder(
    embedder: str, texts: list[str], longest: int, trust_remote_code: bool, progress: bool
) -> npt.NDArray[np.float32]:
    """Embeds texts as the mean of an encoder's last hidden states, cut to ``longest`` tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    with naming(embedder):
        tokenizer = AutoTokenizer.from_pretrained(embedder, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(embedder, trust_remote_code=trust_remote_code).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", longest), longest)
    lengths = np.array([len(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]])

    def forward(rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        encoded = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=longest, padding=True, return_tensors="pt"
        ).to(device)
        return model(**encoded).last_hidden_state, encoded["attention_mask"]

    return _unit(_means(lengths, _ENCODER_TOKENS_PER_BATCH, forward, progress))


def embed_with_policy(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    pad_id: int,
    *,
    tokens_per_batch: int | None = None,
    progress: bool = True,
) -> npt.NDArray[np.float32]:
    """Embeds prompts as the mean of the policy's own last hidden states, less the mean of all prompts, at unit length.

    Hidden states of a language model share one large direction, which is taken out *(ours)*: by SmolLM2-135M-Instruct,
    half of all pairs of the demo's prompts have a cosine above 0.95 with it; without it, nine in ten are below 0.33.

    Args:
        model: A causal language model.
        prompt_ids: (n,) token ids of each prompt.
        pad_id: Padding token.
        tokens_per_batch: Padded tokens of one forward; ``None`` for what suits the model where it is.
        progress: Whether to show a progress bar.

    Returns:
        (n, e) float32.
    """
    from bpo.policy.checks import base_of
    from bpo.policy.logprobs import check_vocabulary, pad_right
    from bpo.policy.state import inference_state

    # The decoder below the output head: logits are not needed.
    decoder = base_of(model).base_model

    def forward(rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        ids, mask = pad_right(model, [prompt_ids[row] for row in rows], pad_id)
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0], mask

    check_vocabulary(model, prompt_ids)
    lengths = np.array([len(ids) for ids in prompt_ids], dtype=np.int64)
    with inference_state(model):
        means = _means(lengths, batch_tokens(tokens_per_batch, model), forward, progress)
    return _unit(means - means.mean(axis=0, dtype=np.float64))


def _means(
    lengths: npt.NDArray[np.int64],
    tokens_per_batch: int,
    forward: Callable[[npt.NDArray[np.int64]], tuple[Any, Any]],
    progress: bool,
) -> npt.NDArray[np.float32]:
    """Means over positions of hidden states.

    Args:
        lengths: (n,) tokens of each text.
        tokens_per_batch: Padded tokens of one forward.
        forward: From the indices of a batch to its (b, t, e) hidden states and (b, t) attention mask.
        progress: Whether to show a progress bar.

    Returns:
        (n, e) float32.
    """
    import torch

    def run(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        hidden, mask = forward(rows)
        hidden = hidden.float()
        weights = mask.to(hidden).unsqueeze(-1)
        mean: npt.NDArray[np.float32] = ((hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)).cpu().numpy()
        return mean

    batches, pooled = [], []
    bar = tqdm(total=len(lengths), desc="Prompts", unit="prompt", disable=not progress)
    with torch.inference_mode(), bar:
        for rows, mean in in_batches(run, longest_first(lengths), lengths, tokens_per_batch):
            batches.append(rows)
            pooled.append(mean)
            bar.update(len(rows))
    embeddings = np.empty((len(lengths), pooled[0].shape[1]), dtype=np.float32)
    embeddings[np.concatenate(batches)] = np.concatenate(pooled)
    return embeddings


def _unit(rows: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Scales rows to unit length; zeros stay zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
    return unit


def given_embeddings(dataset: Any, candidates: Candidates, given: Any) -> npt.NDArray[np.float32]:
    """Returns the embeddings of prompts that come with the data.

    Args:
        dataset: The data that the candidates were read from.
        candidates: What was read.
        given: ``SelectConfig.prompt_embeddings``: the name of a column with a list of numbers in each row, or an array
            of (rows of the data, e). A prompt of several rows has the embedding of its first.

    Returns:
        (n, e) float32, one row a prompt.

    Raises:
        ValueError: No such column, another number of rows than the data has, rows of unequal length, values that are
            not finite or all zero, or rows of one prompt that differ; the message names the row.
    """
    rows = load_rows(dataset)
    # Every row that has a usable pair or response, and its prompt.
    places = np.unique(
        np.concatenate(
            [
                np.stack([candidates.pair_rows, candidates.prompt_of_pair], axis=1),
                np.stack([candidates.response_places[:, 0], candidates.prompt_of_response], axis=1),
                np.stack([candidates.prompt_rows, np.arange(len(candidates.prompts))], axis=1),
            ]
        ),
        axis=0,
    )
    name = f"column {given!r}" if isinstance(given, str) else "prompt_embeddings"
    vectors: list[npt.NDArray[np.float32]] = []
    for row, value in zip(places[:, 0], _values_at(rows, places[:, 0], given), strict=True):
        try:
            vector = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            vector = np.zeros(0, dtype=np.float32)
        if vector.ndim != 1 or len(vector) == 0:
            raise ValueError(f"Row {row}, {name}: expected a list of numbers, got {type(value).__name__}.")
        if vectors and len(vector) != len(vectors[0]):
            raise ValueError(f"Row {row}, {name}: {len(vector)} numbers, but {len(vectors[0])} in row {places[0, 0]}.")
        if not np.isfinite(vector).all() or not vector.any():
            raise ValueError(f"Row {row}, {name}: the embedding is zero or not finite.")
        vectors.append(vector)
    unit = _unit(np.stack(vectors))
    first = np.searchsorted(places[:, 0], candidates.prompt_rows)
    cosines = (unit * unit[first[places[:, 1]]]).sum(axis=1)
    differing = np.flatnonzero(cosines < _SAME_PROMPT)
    if len(differing):
        row, prompt = places[differing[0]]
        raise ValueError(
            f"Rows {candidates.prompt_rows[prompt]} and {row} hold the same prompt, but their {name} differ (cosine "
            f"{cosines[differing[0]]:.3f}). Give one embedding for each row of the data, in its order."
        )
    return unit[first]


def _values_at(rows: Rows, index: npt.NDArray[np.int64], given: Any) -> Iterable[Any]:
    """Returns the embeddings of some rows of the data, unchecked."""
    if not isinstance(given, str):
        if len(given) != len(rows):
            raise ValueError(
                f"prompt_embeddings has {len(given)} rows, but the data has {len(rows)}: give one for each row of the "
                "data, in its order, not one for each distinct prompt."
            )
        values: npt.NDArray[np.float32] = given[index]
        return values
    if given not in rows.column_names:
        raise ValueError(f"prompt_embeddings={given!r} is no column of the data, which has {rows.column_names}.")
    return rows.take(index.tolist(), given)
