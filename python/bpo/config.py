"""Everything that can be chosen about a selection, validated once."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

Strategy = Literal["bpo", "uniform", "random", "margin"]
Ranking = Literal["nearest", "softmax", "farthest", "random"]
Features = Literal["lora", "full"]
SketchKind = Literal["sparse", "rademacher", "normal"]
Metric = Literal["euclidean", "cosine"]
ClusterWeighting = Literal["size", "informativeness"]
OnInvalid = Literal["skip", "raise"]
LossType = Literal["sigmoid"]
TruncationMode = Literal["keep_start", "keep_end"]
DType = Literal["float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Settings of :func:`bpo.select` beyond its arguments.

    Each default marked *(ours)* is a choice of this reconstruction; the paper (arXiv 2411.10914) leaves it open.

    Attributes:
        loss_type: Preference loss whose gradients are clustered. TRL's name; ``"sigmoid"`` is DPO.
        beta: DPO's β, TRL's default. With the policy as its own reference it scales every gradient alike.
        ref_model: Reference policy, a model or a path. ``None`` means the policy as given, as in TRL.
        max_length: Most tokens of prompt and response together, TRL's default. ``None`` cuts nothing. Sequences beyond
            the positions that the model or its reference was made for are cut all the same, which TRL does not do.
        truncation_mode: ``"keep_start"`` cuts a longer sequence at its end, and sets aside pairs whose prompt fills
            ``max_length``; ``"keep_end"``, which TRL deprecates, cuts it at its start and sets nothing aside.
        max_pairs_per_prompt: Most candidate pairs of one prompt, those with the largest score gap first;
            ``None`` keeps all pairs of unequal score *(ours)*.
        on_invalid: ``"skip"`` sets unusable rows aside, counts and names them; ``"raise"`` stops at them.
        embedder: What embeds the prompts for breadth compression: a sentence encoder (path or hub id, mean pooling),
            or ``None`` for the mean of the policy's own last hidden states *(ours)*.
        features: Parameters whose gradients are the features of a pair. ``"lora"``: the adapter of a ``PeftModel``;
            for a model without one, the B-gradients of a fresh LoRA on every linear layer but the output head.
            ``"full"``: every parameter.
        parameters: Shell patterns, one or several, such as ``"*.mlp.*"``: only parameters whose name matches one are
            differentiated (for a fresh adapter: only weights whose name matches one get an adapter). ``None`` is all.
        factor_dim: With ``features="full"``, the side of a random projection of the inputs and of the output gradients
            of large linear layers and embeddings: d² numbers in place of in × out each, before the sketch. For models
            whose whole gradient cannot be held for one response. ``None`` is exact.
        lora_rank: Rank of the fresh adapter.
        preconditioner: Divides each coordinate of the gradients by Adam's √v̂ + ε, as LESS (arXiv 2402.04333) does but
            with v̂ as saved: the path of a Trainer checkpoint or of its ``optimizer.pt``, of a ``.safetensors`` file of
            {parameter name: v̂}, or ``"checkpoint"`` for the ``optimizer.pt`` beside a model or adapter given by path.
            What is differentiated must have been trained: not a fresh adapter.
        sketch_seed: Of the sketch and of the fresh adapter's A. Not that of :func:`bpo.select`, so that one store of
            gradients serves every seed.
        sketch_dim: Numbers kept of each gradient (d). The cosine of two gradients is kept to about 1/√d.
        sketch_kind: ``"sparse"`` (rotated blocks), ``"rademacher"`` or ``"normal"`` (dense).
        sketch_nnz: Numbers of the sparse sketch that each coordinate goes to; divides ``sketch_dim``.
        tokens_per_batch: Tokens, padding included, of one forward and backward. On a CPU twice as many were no faster
            and took half as much memory again; raise it on a GPU.
        bf16: Whether the model runs under bfloat16 autocast, TRL's name and, there, the default. Sketches are float32.
        gradient_checkpointing: Whether a model given by path recomputes its layers on the way back, TRL's name: slower,
            less memory. A model object is used as it is set up.
        dtype: Type in which a model given by path is loaded. A model object is used as it is.
        device: Where a model given by path is put; ``None`` is the first GPU, else the CPU.
        n_clusters: Clusters of pair gradients (k); ``None`` is √(number of pairs), at most 256 *(ours)*.
        metric: ``"euclidean"`` or ``"cosine"`` k-means over the unit-length pair features.
        max_iter: Most k-means iterations.
        ranking: Who is taken first within a cluster: ``"nearest"`` to the centre, ``"softmax"`` (sampled in proportion
            to exp(centrality / temperature)), or the controls ``"farthest"`` and ``"random"``.
        temperature: Temperature of ``"softmax"``.
        max_depth: Most pairs of one prompt; ``None`` for no cap.
        cluster_weighting: Budget of a cluster in proportion to its pairs (``"size"``) or to their summed gradient norm
            (``"informativeness"``).
        threads: Threads of the Rust core; ``None`` is all cores. Results do not depend on it.
        trust_remote_code: Whether code shipped with a model may run. Off unless asked for.

    Raises:
        ValueError: A value outside its range; the message names the field.

    Example:
        >>> import bpo
        >>> bpo.SelectConfig(sketch_dim=512).sketch_dim
        512
        >>> bpo.SelectConfig(beta=-1)
        Traceback (most recent call last):
        ...
        ValueError: SelectConfig.beta must be above 0, got -1
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    ref_model: Any = None
    max_length: int | None = 1024
    truncation_mode: TruncationMode = "keep_start"
    max_pairs_per_prompt: int | None = None
    on_invalid: OnInvalid = "skip"
    embedder: str | None = None
    features: Features = "lora"
    parameters: str | Sequence[str] | None = None
    factor_dim: int | None = None
    lora_rank: int = 8
    preconditioner: str | None = None
    sketch_seed: int = 0
    sketch_dim: int = 1024
    sketch_kind: SketchKind = "sparse"
    sketch_nnz: int = 1
    tokens_per_batch: int = 1024
    bf16: bool = False
    gradient_checkpointing: bool = False
    dtype: DType = "float32"
    device: str | None = None
    n_clusters: int | None = None
    metric: Metric = "euclidean"
    max_iter: int = 100
    ranking: Ranking = "nearest"
    temperature: float = 0.1
    max_depth: int | None = None
    cluster_weighting: ClusterWeighting = "size"
    threads: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        choices = {
            "loss_type": LossType,
            "truncation_mode": TruncationMode,
            "on_invalid": OnInvalid,
            "features": Features,
            "sketch_kind": SketchKind,
            "dtype": DType,
            "metric": Metric,
            "ranking": Ranking,
            "cluster_weighting": ClusterWeighting,
        }
        for name, literal in choices.items():
            value = getattr(self, name)
            if value not in get_args(literal):
                raise ValueError(f"SelectConfig.{name} must be one of {list(get_args(literal))}, got {value!r}")
        for name in ("embedder", "ref_model", "preconditioner"):
            if isinstance(getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for name in ("beta", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < float("inf"):
                raise ValueError(f"SelectConfig.{name} must be above 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        counts = ("lora_rank", "sketch_dim", "sketch_nnz", "tokens_per_batch", "max_iter")
        optional_counts = ("max_length", "max_pairs_per_prompt", "n_clusters", "max_depth", "threads", "factor_dim")
        for name in counts + optional_counts:
            value = getattr(self, name)
            if value is None and name in optional_counts:
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SelectConfig.{name} must be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        seed = self.sketch_seed
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
            raise ValueError(f"SelectConfig.sketch_seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
        object.__setattr__(self, "sketch_seed", int(seed))
        for name in ("embedder", "device", "preconditioner"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"SelectConfig.{name} must be text or None, got {value!r}")
        for name in ("trust_remote_code", "bf16", "gradient_checkpointing"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"SelectConfig.{name} must be True or False, got {getattr(self, name)!r}")
        if self.parameters is not None:
            patterns = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
            if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"SelectConfig.parameters must be one or several patterns, got {self.parameters!r}")
            object.__setattr__(self, "parameters", patterns)
        if self.sketch_dim % self.sketch_nnz or (self.sketch_kind != "sparse" and self.sketch_nnz != 1):
            raise ValueError(
                f"SelectConfig.sketch_nnz must divide sketch_dim ({self.sketch_dim}), and be 1 for a dense sketch, got "
                f"{self.sketch_nnz}"
            )

    @classmethod
    def of(cls, value: SelectConfig | Mapping[str, Any] | None) -> SelectConfig:
        """Returns a configuration given as such, as a mapping, or not at all.

        Raises:
            TypeError: Anything else.
            ValueError: A name that is not a field, or a value out of range.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        raise TypeError(f"config must be a bpo.SelectConfig or a mapping of its fields, not {type(value).__name__}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SelectConfig:
        """Builds a configuration from a mapping, for example one read from JSON or YAML.

        Args:
            values: Field names and values; fields left out keep their defaults.

        Returns:
            The validated configuration.

        Raises:
            ValueError: A name that is not a field, or a value out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(str(name) for name in set(values) - known)
        if unknown:
            raise ValueError(f"SelectConfig has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values; a model object is named by its class."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if not isinstance(self.ref_model, (str, type(None))):
            values["ref_model"] = f"<{type(self.ref_model).__name__}>"
        return values
