"""Prompts to embeddings to the representative prompts that are kept: step 1 of the method."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from bpo import _core
from bpo.data import Text
from bpo.tokens import batches_by_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

_MAX_CLUSTERS = 100
_ENCODER_TOKENS_PER_BATCH = 8192


@dataclasses.dataclass(frozen=True)
class Breadth:
    """Which prompts are kept.

    Attributes:
        kept: (n,) bool.
        labels: (n,) int32, the cluster of each prompt.
        distances: (n,) float32, from the centroid of its cluster.
    """

    kept: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int32]
    distances: npt.NDArray[np.float32]


def compress_breadth(
    embeddings: npt.NDArray[np.floating[Any]], n_prompts: int, *, seed: int = 0, threads: int | None = None
) -> Breadth:
    """Keeps ``n_prompts`` representative prompts: k-means, a quota for each cluster, the nearest to each centroid.

    Clustering and keeping representatives is the paper's (arXiv 2411.10914); ours are k = min(100, n_prompts), unit
    length, and quotas in proportion to the size of the cluster (largest remainder, at least one).

    Args:
        embeddings: (n, e) one row a prompt (:func:`embed_prompts`, or your own).
        n_prompts: How many to keep, 1 to n.
        seed: Of the k-means++ seeding.
        threads: Threads of the Rust core.

    Returns:
        Which prompts are kept.

    Raises:
        ValueError: ``n_prompts`` out of range, or embeddings that are zero or not finite.

    Example:
        >>> points = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [0, 0.9]])
        >>> compress_breadth(points, 2).kept.sum()
        np.int64(2)
    """
    embeddings = np.asarray(embeddings, dtype=np.float32)
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must have two dimensions (prompts, features), got {embeddings.ndim}.")
    if not 1 <= n_prompts <= len(embeddings):
        raise ValueError(f"n_prompts must be between 1 and the {len(embeddings)} prompts, got {n_prompts}.")
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise ValueError(f"The embedding of prompt {bad[0]} is zero or not finite ({len(bad)} such in all).")
    unit = np.ascontiguousarray(embeddings / norms)
    result = _core.kmeans(unit, min(_MAX_CLUSTERS, n_prompts), seed=seed, threads=threads)
    sizes = np.bincount(result.labels, minlength=len(result.centroids))
    quotas = _quotas(sizes, n_prompts)
    kept = np.zeros(len(unit), dtype=bool)
    for cluster, quota in enumerate(quotas):
        members = np.flatnonzero(result.labels == cluster)
        nearest = members[np.argsort(result.distances[members], kind="stable")]
        kept[nearest[:quota]] = True
    return Breadth(kept, result.labels, result.distances)


def _quotas(sizes: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
    """Shares ``total`` in proportion to ``sizes``: largest remainder, at least 1 and at most its size for each."""
    ideal = total * sizes / sizes.sum()
    quotas: npt.NDArray[np.int64] = np.minimum(np.maximum(np.floor(ideal).astype(np.int64), 1), sizes)
    while quotas.sum() != total:
        # One at a time, where the quota is farthest from its ideal; ties go to the lower cluster.
        if quotas.sum() < total:
            quotas[np.argmax(np.where(quotas < sizes, ideal - quotas, -np.inf))] += 1
        else:
            quotas[np.argmax(np.where(quotas > 1, quotas - ideal, -np.inf))] -= 1
    return quotas


def prompt_text(prompt: Text) -> str:
    """Returns a prompt as plain text; the messages of a conversation are joined by line breaks."""
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] or "" for message in prompt)


def embed_prompts(
    prompts: Sequence[Text], embedder: str, *, trust_remote_code: bool = False
) -> npt.NDArray[np.float32]:
    """Embeds prompts with a sentence encoder: the mean of its last hidden states, at unit length.

    Args:
        prompts: Plain text or conversations.
        embedder: Path or hub id of an encoder that ``transformers.AutoModel`` loads, such as all-MiniLM-L6-v2.
        trust_remote_code: Whether code shipped with the encoder may run.

    Returns:
        (n, e) float32.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from bpo.models import check_path, naming

    embedder = check_path(embedder)
    with naming(embedder):
        tokenizer = AutoTokenizer.from_pretrained(embedder, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(embedder, trust_remote_code=trust_remote_code).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 512), 512)
    texts = [prompt_text(prompt) for prompt in prompts]
    lengths = np.array([len(ids) for ids in tokenizer(texts, truncation=True, max_length=longest)["input_ids"]])

    def forward(rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        encoded = tokenizer(
            [texts[row] for row in rows], truncation=True, max_length=longest, padding=True, return_tensors="pt"
        ).to(device)
        return model(**encoded).last_hidden_state, encoded["attention_mask"]

    return _mean_embeddings(lengths, _ENCODER_TOKENS_PER_BATCH, forward)


def embed_with_policy(
    model: Any, prompt_ids: Sequence[Sequence[int]], pad_id: int, *, tokens_per_batch: int = 1024
) -> npt.NDArray[np.float32]:
    """Embeds prompts as the mean of the policy's own last hidden states, at unit length.

    Args:
        model: A causal language model.
        prompt_ids: (n,) token ids of each prompt.
        pad_id: Padding token.
        tokens_per_batch: Padded tokens of one forward.

    Returns:
        (n, e) float32.
    """
    from bpo.logprobs import pad_right
    from bpo.models import base_of, inference_state

    device = model.get_input_embeddings().weight.device
    # The decoder below the output head: logits are not needed.
    decoder = base_of(model).base_model

    def forward(rows: npt.NDArray[np.int64]) -> tuple[Any, Any]:
        ids, mask = (tensor.to(device) for tensor in pad_right([prompt_ids[row] for row in rows], pad_id))
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False)[0], mask

    lengths = np.array([len(ids) for ids in prompt_ids], dtype=np.int64)
    with inference_state(model):
        return _mean_embeddings(lengths, tokens_per_batch, forward)


def _mean_embeddings(
    lengths: npt.NDArray[np.int64],
    tokens_per_batch: int,
    forward: Callable[[npt.NDArray[np.int64]], tuple[Any, Any]],
) -> npt.NDArray[np.float32]:
    """Means over positions of hidden states, at unit length.

    Args:
        lengths: (n,) tokens of each text.
        tokens_per_batch: Padded tokens of one forward.
        forward: From the indices of a batch to its (b, t, e) hidden states and (b, t) attention mask.

    Returns:
        (n, e) float32.
    """
    import torch

    batches = batches_by_tokens(lengths, tokens_per_batch)
    pooled = []
    with torch.inference_mode():
        for rows in batches:
            hidden, mask = forward(rows)
            hidden = hidden.float()
            weights = mask.to(hidden).unsqueeze(-1)
            mean = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            pooled.append(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())
    embeddings = np.empty((len(lengths), pooled[0].shape[1]), dtype=np.float32)
    embeddings[np.concatenate(batches)] = np.concatenate(pooled)
    return embeddings
