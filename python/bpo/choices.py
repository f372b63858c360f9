"""The words that settings take, how they write sizes, and which losses can be selected for."""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

SEED = 42
"""The default of every ``seed``, as of TRL's ``DPOConfig``."""

Order = Literal["data", "easiest_first"]
Ranking = Literal["nearest", "softmax", "farthest", "random"]
Features = Literal["lora", "full", "embeddings"]
SketchKind = Literal["sparse", "rademacher", "normal"]
Metric = Literal["euclidean", "cosine"]
ClusterWeighting = Literal["size", "informativeness", "centrality", "alignment"]
OnInvalid = Literal["skip", "raise"]
LengthControl = Literal["residual", "balance"]
BreadthMethod = Literal["quota", "representative", "diverse"]
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
TokenWeights = Callable[[list[int], list[int]], Sequence[float]]
"""Token ids of a prompt and of a response to a weight for each token of the response."""

TruncationMode = Literal["keep_start", "keep_end"]
USEFULNESS_TERMS = ("centrality", "alignment", "informativeness", "score_gap")
"""What ``SelectConfig.usefulness`` can weigh."""

Usefulness = Mapping[str, float] | Literal["matching"]
"""Weights of such terms, or what a pair adds to those that are taken."""

NO_MODELS = ("base", "columns")
"""What ``ref_model`` can be besides a model and a path."""

DType = Literal["float32", "bfloat16", "float16"]
SketchDType = Literal["float32", "float16", "bfloat16", "int8"]

_SORTS_THE_BATCH = "it sorts the log-ratios of a whole batch, so its gradient is not a sum over pairs"
REFUSED_LOSSES = {"aot": _SORTS_THE_BATCH, "aot_unpaired": _SORTS_THE_BATCH}
"""Losses of TRL that no gradient of a pair belongs to, and why."""


# Rewards under another divergence are known up to β·log Z(x), which only the difference of two rewards is free of
# (arXiv 2309.16240); sft has no reward.
F_DIVERGENCE_LOSSES = {"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm"}


def number_of_bytes(name: str, value: Any) -> int | None:
    """Reads a number of bytes, given as such or with a unit, as in ``"8GiB"``; None is none.

    Raises:
        ValueError: Something else; the message begins with the name.
    """
    if value is None:
        return None
    size = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else 0.0
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", value, re.IGNORECASE)
        if found:
            size = float(found[1]) * float(1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")
    if not 1 <= size < 2**63:
        raise ValueError(f"{name} must be a number of bytes, as 8_000_000_000 or '8GiB', got {value!r}")
    return int(size)


def checked_usefulness(weights: Any) -> Usefulness | None:
    """Checks ``SelectConfig.usefulness``."""
    if weights is None:
        return None
    if isinstance(weights, str) and weights == "matching":
        return "matching"
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError(f"SelectConfig.usefulness must be 'matching', or map terms to weights, got {weights!r}")
    for name, weight in weights.items():
        if name not in USEFULNESS_TERMS:
            raise ValueError(f"SelectConfig.usefulness has no term {name!r}; it has {', '.join(USEFULNESS_TERMS)}")
        if not is_finite(weight):
            raise ValueError(f"SelectConfig.usefulness must have finite weights, got {weight!r} for {name!r}")
    return {name: float(weight) for name, weight in weights.items()}


def is_finite(value: Any) -> bool:
    """Whether something is a finite number."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def learning_rates(checkpoints: Any) -> dict[str, float]:
    """Checks ``SelectConfig.checkpoints``."""
    if not isinstance(checkpoints, Mapping) or not checkpoints:
        raise ValueError(f"SelectConfig.checkpoints must map paths to learning rates, got {checkpoints!r}")
    for path, rate in checkpoints.items():
        if not isinstance(path, (str, os.PathLike)) or not is_finite(rate) or rate <= 0:
            raise ValueError(
                f"SelectConfig.checkpoints must map paths to learning rates above 0, got {path!r}: {rate!r}"
            )
    return {os.fspath(path): float(rate) for path, rate in checkpoints.items()}
