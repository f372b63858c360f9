"""Everything that can be chosen about a selection, validated once."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np

from bpo.choices import (
    F_DIVERGENCE_LOSSES,
    NO_MODELS,
    REFUSED_LOSSES,
    BreadthMethod,
    ClusterWeighting,
    DType,
    FDivergence,
    Features,
    LengthControl,
    LossType,
    Metric,
    OnInvalid,
    Order,
    Ranking,
    SketchDType,
    SketchKind,
    TokenWeights,
    TruncationMode,
    Usefulness,
    checked_usefulness,
    is_finite,
    learning_rates,
    number_of_bytes,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Settings of :func:`bpo.select` beyond its arguments.

    Each default marked *(ours)* is a choice of this reconstruction; the paper (arXiv 2411.10914) leaves it open.

    Attributes:
        loss_type: Preference loss whose gradients are clustered, or several that are added up. TRL's names;
            ``"sigmoid"`` is DPO (:func:`bpo.pair_coefficients` says what each is). Kept as a tuple.
        loss_weights: Weight of each loss; ``None`` is 1.0 for each.
        beta: β of the loss (IPO's τ), TRL's default. With the policy as its own reference, DPO's gradients are all
            scaled alike by it.
        label_smoothing: ε of ``"robust"``, the probability that a preference is flipped, below 0.5; and of
            ``"exo_pair"``, above 0. Other losses do not use it.
        f_divergence_type: What keeps policy and reference together: ``"reverse_kl"``, ``"forward_kl"``,
            ``"js_divergence"`` or ``"alpha_divergence"``. Other than ``"reverse_kl"`` only for losses of the difference
            of two rewards.
        f_alpha_divergence_coef: α of ``"alpha_divergence"``.
        discopop_tau: τ of ``"discopop"``.
        use_weighting: Whether each pair's loss is weighted as in WPO, by how probable its responses are.
        ref_model: Reference policy, a model or a path. ``None`` means the policy as given, as in TRL; ``"base"`` the
            policy without its adapter. ``"columns"`` runs none and reads log π_ref from the data (see
            :func:`bpo.read_candidates`). A directory of such a name is written with a slash, as in ``"./base"``.
        reference_logps: Whether ``selection.dataset`` has log π_ref of both responses, as selection used it, in TRL's
            columns ``ref_chosen_logps`` and ``ref_rejected_logps``: training need not run the reference again. For
            strategies that read gradients. Refused where TRL's would be others: with ``token_weights``, and for what is
            cut to the window of the model (see ``docs/data.md``).
        token_weights: Weights w of the tokens of a response, with which its log-probability under policy and reference
            is Σ_t w_t log π(y_t | x, y_<t), as in TIS-DPO (arXiv 2410.04350) and RTO (arXiv 2404.18922). The name under
            which the data gives them (see :func:`bpo.read_candidates`), or a function of the token ids of a prompt and
            of a response, each a list. There is one weight for each token of a response, the end token included,
            counted before sequences are cut; any finite number will do. ``None`` weighs every token 1. Lengths count
            tokens all the same. Training must weigh tokens likewise, as :class:`bpo.WeightedDPOTrainer` does with its
            own ``token_weights`` and TRL's ``DPOTrainer`` does not; :func:`bpo.estimate_token_weights` makes weights.
        weight_column: Column of preference data that says by how much the loss of each pair counts, a finite number of
            at least 0 (see :func:`bpo.read_candidates`); it goes along to :class:`bpo.WeightedDPOTrainer`. The gradient
            of a pair of weight w is w·z: unit length takes w out of what is clustered, informativeness is w‖z‖, and a
            pair of weight 0 is set aside *(ours)*. ``"weight"`` need not be there; ``None`` weighs every pair 1.
        trust: Sets pairs whose label looks wrong (is right with less than ½) aside, counted and named: ``"audit"`` by
            the gradients of the candidates, as :func:`bpo.audit` does, for any strategy; or the column with the
            probability that the label of a row, or of all pairs whose preferred response it holds, is right *(ours)*.
        max_length: Most tokens of prompt and response together, TRL's default. ``None`` cuts nothing. Sequences beyond
            the positions that the model or its reference was made for are cut all the same, which TRL does not do.
        truncation_mode: ``"keep_start"`` cuts a longer sequence at its end, and sets aside pairs whose prompt fills
            ``max_length``; ``"keep_end"``, which TRL deprecates, cuts it at its start and sets nothing aside.
        max_pairs_per_prompt: Most candidate pairs of one prompt, those with the largest score gap first;
            ``None`` keeps all pairs of unequal score *(ours)*.
        on_invalid: ``"skip"`` sets unusable rows aside, counts and names them; ``"raise"`` stops at them.
        embedder: What embeds the prompts for breadth compression: a sentence encoder (path, hub id or a
            ``SentenceTransformer``; see :func:`bpo.embed_prompts`), or ``None`` for the policy's own last hidden states
            *(ours)*.
        prompt_embeddings: Embeddings of the prompts that you have already, in place of an embedder: the name of a
            column of the data with a list of numbers in each row, or an array of one row for each row of the data (for
            :class:`bpo.BPOTrainer`, whose settings are saved as JSON, the name of a column). A prompt of several rows
            has the embedding of its first.
        breadth_method: Which prompts breadth compression keeps: ``"quota"``, ``"representative"`` or ``"diverse"``
            (see :func:`bpo.compress_breadth`).
        duplicate_threshold: Cosine from which a prompt is reported, when breadth is compressed, as nearly the same as
            an earlier one (see :func:`bpo.near_duplicates`). ``None`` does not look.
        features: Parameters whose gradients are the features of a pair. ``"lora"``: the adapter of a ``PeftModel``;
            for a model without one, the B-gradients of a fresh LoRA on every linear layer but the output head.
            ``"full"``: every parameter. ``"embeddings"`` takes no gradients: in place of that of a response stands its
            embedding, the mean of the policy's last hidden states over the positions that predict it. It costs a
            forward alone, and is a control: what gradients add must show against it *(ours)*.
        parameters: Shell patterns, one or several, such as ``"*.mlp.*"``: only parameters whose name matches one are
            differentiated (for a fresh adapter: only weights whose name matches one get an adapter). ``None`` is all.
        factor_dim: With ``features="full"``, the side of a random projection of the inputs and of the output gradients
            of large linear layers and embeddings: d² numbers in place of in × out each, before the sketch. For models
            whose whole gradient cannot be held for one response. ``None`` is exact.
        lora_rank: Rank of the fresh adapter.
        preconditioner: Divides each coordinate of the gradients by Adam's √v̂ + ε, as LESS (arXiv 2402.04333) does but
            with v̂ as saved: the path of a Trainer checkpoint or of its ``optimizer.pt``, of a ``.safetensors`` file of
            {parameter name: v̂}, or ``"checkpoint"`` for the ``optimizer.pt`` beside a model or adapter given by path.
            Of Sophia's state (arXiv 2305.14342), by max(ρBh, abs(m)), which its clipped step comes to *(ours)*.
            What is differentiated must have been trained: not a fresh adapter.
        checkpoints: Checkpoints of a training, {path: average learning rate of its epoch}, as :func:`bpo.warm_up`
            returns them. Gradients are then taken at each of them, and their cosines averaged with the learning rates
            as weights (LESS). The reference is ``ref_model``, else the model given to :func:`bpo.select`, and the
            log-probabilities of the selection are the reference's.
        sketch_seed: Of the sketch and of the fresh adapter's A. Not that of :func:`bpo.select`, so that one store of
            gradients serves every seed.
        sketch_dim: Numbers kept of each gradient (d). The cosine of two gradients is kept to about 1/√d.
        sketch_kind: ``"sparse"`` (rotated blocks), ``"rademacher"`` or ``"normal"`` (dense).
        sketch_nnz: Numbers of the sparse sketch that each coordinate goes to; divides ``sketch_dim``, 256 at most.
        sketch_dtype: How the store keeps the numbers of a sketch: ``"float32"``, ``"float16"`` or ``"bfloat16"`` (half
            the bytes), or ``"int8"`` (a quarter), the latter and float16 with a scale for each response.
            docs/store-format.md has the measured effect of each.
        tokens_per_batch: Tokens, padding included, of one forward and backward; halved where memory does not suffice.
            ``None`` is 1024 on a CPU, and 4096 to 32768 on a GPU, the more the smaller the model.
        bf16: Whether the model runs under bfloat16 autocast, TRL's name and, there, the default. Sketches are float32.
        gradient_checkpointing: Whether a model given by path recomputes its layers on the way back, TRL's name: slower,
            less memory. A model object is used as it is set up.
        dtype: Type in which a model given by path is loaded. A model object is used as it is.
        device: Where a model given by path is put; ``None`` is the first GPU, else the CPU.
        n_clusters: Clusters of pair gradients (k); ``None`` is √(number of pairs), at most 256 *(ours)*.
        metric: ``"euclidean"`` or ``"cosine"`` k-means over the unit-length pair features.
        max_iter: Most k-means iterations.
        ranking: Who is taken first within a cluster: ``"nearest"``, the most useful; ``"softmax"``, drawn in proportion
            to exp(usefulness / temperature), of terms; or the controls ``"farthest"``, the least useful, and
            ``"random"``.
        temperature: Temperature of ``"softmax"``; usefulness is in standard deviations of its terms.
        usefulness: What makes a pair useful: ``"matching"``, what it adds to those that are taken, as the strategy of
            that name has it; or {term: weight} of ``"centrality"`` (cosine with its cluster's centre), ``"alignment"``
            (cosine with the mean gradient, or with those of the target), ``"informativeness"`` (length of the gradient)
            and ``"score_gap"``, each standardised over the candidates, then added up *(ours)*. ``None`` is
            ``"matching"``, the best measured in docs/results.md; under another ``ranking`` centrality + alignment.
        min_depth: Pairs that strategies which keep every prompt give each of them first: 1, or 0 to let whole prompts
            go *(ours)*. ``None`` is 1 where the budget has a pair for each prompt, else 0; with 1 it is refused then.
        max_depth: Most pairs of one prompt; ``None`` for no cap.
        order: Of the rows of the training set: ``"data"``, as the data has them; or ``"easiest_first"``, by held-out
            margin, largest first, as SelectiveDPO (arXiv 2502.09650) trains, whatever chose the pairs *(margins are
            ours)*. Trainers shuffle unless told otherwise: ``DPOConfig(train_sampling_strategy="sequential")``.
        cluster_weighting: Budget of a cluster in proportion to its pairs (``"size"``), or to their summed
            ``"informativeness"`` (gradient norm), ``"centrality"`` (more for clusters whose pairs agree) or
            ``"alignment"`` (more for clusters that pull where all pairs together do) *(ours)*.
        length_control: What is done about preferring responses because they are longer. ``"residual"``: scores are
            replaced by what of them length does not explain (see :func:`bpo.length_effect`), within prompts, before
            gaps are taken; where the other response of a pair is then the better one, the pair is turned round, which
            is counted and named. It needs scores: pairs that are only stated cannot be turned. Responses of equal score
            stay ties. ``"balance"``: chosen pairs are exchanged for others until as many prefer the shorter response as
            the longer one, or nothing is left to exchange: the least useful for the most useful, within a prompt first.
            ``None`` does nothing, and reports length all the same. Lengths are in tokens, or in characters where there
            is no model *(ours)*.
        regularization: λ of ``"d_optimal"``, ``"bald"`` and ``"epig"``, in units of the mean squared length of their
            vectors divided by the dimension *(ours)*.
        max_memory: Memory that the stages after the gradients may take beside the data itself, in bytes or as in
            ``"8GiB"``; below what they and the strategy need, :func:`bpo.select` refuses before the model runs and
            names the least that would do. They read the sketches from the memory map a part at a time; what is left of
            it keeps them in 8 bits from pass to pass, which is faster. ``None`` is what they need and 1 GiB. What a
            strategy of your own takes is not counted. Results do not depend on it.
        threads: Threads of the Rust core; ``None`` is all cores. Results do not depend on it.
        process_timeout: Seconds after which processes of one job name one that does not come, brings nothing or hangs.
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

    loss_type: LossType | Sequence[LossType] = "sigmoid"
    loss_weights: Sequence[float] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: FDivergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    use_weighting: bool = False
    ref_model: Any = None
    reference_logps: bool = False
    token_weights: str | TokenWeights | None = None
    weight_column: str | None = "weight"
    trust: str | None = None
    max_length: int | None = 1024
    truncation_mode: TruncationMode = "keep_start"
    max_pairs_per_prompt: int | None = None
    on_invalid: OnInvalid = "skip"
    embedder: Any = None
    prompt_embeddings: Any = None
    breadth_method: BreadthMethod = "quota"
    duplicate_threshold: float | None = 0.95
    features: Features = "lora"
    parameters: str | Sequence[str] | None = None
    factor_dim: int | None = None
    lora_rank: int = 8
    preconditioner: str | None = None
    checkpoints: Mapping[str, float] | None = None
    sketch_seed: int = 0
    sketch_dim: int = 1024
    sketch_kind: SketchKind = "sparse"
    sketch_nnz: int = 1
    sketch_dtype: SketchDType = "float16"
    tokens_per_batch: int | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    dtype: DType = "float32"
    device: str | None = None
    n_clusters: int | None = None
    metric: Metric = "euclidean"
    max_iter: int = 100
    ranking: Ranking = "nearest"
    temperature: float = 0.5
    usefulness: Usefulness | None = None
    min_depth: int | None = None
    max_depth: int | None = None
    order: Order = "data"
    length_control: LengthControl | None = None
    cluster_weighting: ClusterWeighting = "size"
    regularization: float = 1.0
    max_memory: int | str | None = None
    threads: int | None = None
    process_timeout: float = 1800.0
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._check_words()
        self._check_reference()
        self._check_numbers()
        self._check_embeddings()
        self._check_features()
        self._check_loss()

    def _check_words(self) -> None:
        choices = {
            "truncation_mode": TruncationMode,
            "f_divergence_type": FDivergence,
            "on_invalid": OnInvalid,
            "breadth_method": BreadthMethod,
            "features": Features,
            "sketch_kind": SketchKind,
            "sketch_dtype": SketchDType,
            "dtype": DType,
            "metric": Metric,
            "ranking": Ranking,
            "order": Order,
            "cluster_weighting": ClusterWeighting,
        }
        for name, literal in choices.items():
            value = getattr(self, name)
            if value not in get_args(literal):
                raise ValueError(f"SelectConfig.{name} must be one of {list(get_args(literal))}, got {value!r}")
        for name in ("embedder", "ref_model", "preconditioner"):
            if isinstance(getattr(self, name), os.PathLike):
                path = os.fspath(getattr(self, name))
                object.__setattr__(self, name, f"./{path}" if path in NO_MODELS else path)

    def _check_reference(self) -> None:
        if not (self.token_weights is None or callable(self.token_weights) or isinstance(self.token_weights, str)):
            raise ValueError(
                f"SelectConfig.token_weights must be a name, a function or None, got {self.token_weights!r}"
            )
        if self.token_weights is not None and self.reference_logps:
            raise ValueError(
                "SelectConfig.reference_logps does not go with token_weights: log-probabilities of weighted tokens are "
                "not those that TRL compares with."
            )
        if self.token_weights is not None and self.reads_ref_logps:
            raise ValueError(
                "SelectConfig.token_weights needs a reference that runs: log-probabilities that the data gives "
                "(ref_model='columns') are sums over tokens that cannot be weighted any more."
            )

    def _check_numbers(self) -> None:
        for name in ("beta", "discopop_tau", "temperature", "regularization", "process_timeout"):
            value = getattr(self, name)
            if not is_finite(value) or value <= 0:
                raise ValueError(f"SelectConfig.{name} must be above 0, got {value!r}")
            object.__setattr__(self, name, float(value))
        counts = ("lora_rank", "sketch_dim", "sketch_nnz", "max_iter")
        optional = ("max_length", "max_pairs_per_prompt", "n_clusters", "max_depth", "threads", "factor_dim")
        given = [name for name in (*optional, "tokens_per_batch") if getattr(self, name) is not None]
        for name in (*counts, *given):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"SelectConfig.{name} must be a whole number of at least 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if isinstance(self.min_depth, bool) or self.min_depth not in (0, 1, None):
            raise ValueError(f"SelectConfig.min_depth must be 0, 1 or None, got {self.min_depth!r}")
        object.__setattr__(self, "usefulness", checked_usefulness(self.usefulness))
        if self.usefulness == "matching" and self.ranking != "nearest":
            raise ValueError(
                "SelectConfig.usefulness='matching' is what a pair adds to those that are taken, which no pair has by "
                f"itself; ranking={self.ranking!r} needs terms: usefulness={{'centrality': 1, 'alignment': 1}}."
            )
        object.__setattr__(self, "max_memory", number_of_bytes("SelectConfig.max_memory", self.max_memory))
        seed = self.sketch_seed
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**64:
            raise ValueError(f"SelectConfig.sketch_seed must be a whole number from 0 to 2**64 - 1, got {seed!r}")
        object.__setattr__(self, "sketch_seed", int(seed))
        if self.length_control not in (None, *get_args(LengthControl)):
            raise ValueError(
                f"SelectConfig.length_control must be one of {list(get_args(LengthControl))} or None, got "
                f"{self.length_control!r}"
            )

    def _check_features(self) -> None:
        if self.features == "embeddings":
            for name in ("parameters", "factor_dim", "preconditioner", "checkpoints"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"SelectConfig.{name} is a setting of gradients, and features='embeddings' takes none: leave "
                        "one of the two out."
                    )
        for name in ("device", "preconditioner", "weight_column", "trust"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"SelectConfig.{name} must be text or None, got {value!r}")
        for name in ("use_weighting", "reference_logps", "bf16", "gradient_checkpointing", "trust_remote_code"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"SelectConfig.{name} must be True or False, got {getattr(self, name)!r}")
        if self.parameters is not None:
            patterns = (self.parameters,) if isinstance(self.parameters, str) else tuple(self.parameters)
            if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"SelectConfig.parameters must be one or several patterns, got {self.parameters!r}")
            object.__setattr__(self, "parameters", patterns)
        if self.checkpoints is not None:
            object.__setattr__(self, "checkpoints", learning_rates(self.checkpoints))
        if self.sketch_dim % self.sketch_nnz or (self.sketch_kind != "sparse" and self.sketch_nnz != 1):
            raise ValueError(
                f"SelectConfig.sketch_nnz must divide sketch_dim ({self.sketch_dim}), and be 1 for a dense sketch, got "
                f"{self.sketch_nnz}"
            )

    def _check_loss(self) -> None:
        names = (self.loss_type,) if isinstance(self.loss_type, str) else self.loss_type
        if not isinstance(names, (list, tuple)) or not names:
            raise ValueError(f"SelectConfig.loss_type must be the name of a loss or a list of them, got {names!r}")
        for name in names:
            if str(name) in REFUSED_LOSSES:
                raise ValueError(f"SelectConfig.loss_type {name!r} cannot be selected for: {REFUSED_LOSSES[name]}.")
            if name not in get_args(LossType):
                raise ValueError(f"SelectConfig.loss_type must be one of {list(get_args(LossType))}, got {name!r}")
        object.__setattr__(self, "loss_type", tuple(names))
        weights = self.loss_weights
        if weights is not None:
            if not isinstance(weights, (list, tuple)) or not all(map(is_finite, weights)):
                raise ValueError(f"SelectConfig.loss_weights must be a list of finite numbers, got {weights!r}")
            if len(weights) != len(names):
                raise ValueError(
                    f"SelectConfig.loss_weights must have one weight for each of the {len(names)} losses of loss_type, "
                    f"got {len(weights)}"
                )
            object.__setattr__(self, "loss_weights", tuple(map(float, weights)))
        if not is_finite(self.f_alpha_divergence_coef):
            raise ValueError(
                f"SelectConfig.f_alpha_divergence_coef must be a finite number, got {self.f_alpha_divergence_coef!r}"
            )
        smoothing = self.label_smoothing
        if not is_finite(smoothing) or not 0 <= smoothing < 1:
            raise ValueError(f"SelectConfig.label_smoothing must be at least 0 and below 1, got {smoothing!r}")
        if "robust" in names and smoothing >= 0.5:
            raise ValueError(
                f"SelectConfig.label_smoothing must be below 0.5 for loss_type 'robust', got {smoothing!r}: as many "
                "preferences flipped as not say nothing"
            )
        if "exo_pair" in names and smoothing == 0:
            raise ValueError(
                "SelectConfig.label_smoothing must be above 0 for loss_type 'exo_pair', which takes its logarithm; "
                "arXiv 2402.00856 recommends 1e-3"
            )
        without_form = [name for name in names if name not in F_DIVERGENCE_LOSSES]
        if self.f_divergence_type != "reverse_kl" and without_form:
            raise ValueError(
                f"SelectConfig.f_divergence_type must be 'reverse_kl' for loss_type {without_form[0]!r}, got "
                f"{self.f_divergence_type!r}: other divergences leave a term in each reward that cancels only in the "
                f"difference of two ({', '.join(sorted(F_DIVERGENCE_LOSSES))})"
            )
        for name in ("f_alpha_divergence_coef", "label_smoothing"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def _check_embeddings(self) -> None:
        """Checks what embeds the prompts."""
        if not (self.embedder is None or isinstance(self.embedder, str) or hasattr(self.embedder, "encode")):
            raise ValueError(
                f"SelectConfig.embedder must be text, a SentenceTransformer or None, got {self.embedder!r}"
            )
        given = self.prompt_embeddings
        if given is not None and self.embedder is not None:
            raise ValueError("SelectConfig.prompt_embeddings takes the place of an embedder; give one of the two.")
        if given is not None and not isinstance(given, str):
            try:
                array = np.asarray(given, dtype=np.float32)
            except (TypeError, ValueError):
                array = np.zeros(0, dtype=np.float32)
            if array.ndim != 2:
                raise ValueError(
                    "SelectConfig.prompt_embeddings must be the name of a column or an array of (rows of the data, "
                    f"features), got {type(given).__name__}"
                    + (f" of shape {given.shape}" if hasattr(given, "shape") else "")
                )
            object.__setattr__(self, "prompt_embeddings", array)
        threshold = self.duplicate_threshold
        if threshold is not None and not (is_finite(threshold) and 0 < threshold <= 1):
            raise ValueError(f"SelectConfig.duplicate_threshold must be above 0 and at most 1, got {threshold!r}")

    @property
    def weighted_losses(self) -> list[tuple[LossType, float]]:
        """The losses that are added up, each with its weight."""
        weights = (1.0,) * len(self.loss_type) if self.loss_weights is None else self.loss_weights
        return list(zip(self.loss_type, weights, strict=True))  # type: ignore[arg-type]

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

    @property
    def reads_ref_logps(self) -> bool:
        """Whether log π_ref comes with the data."""
        return isinstance(self.ref_model, str) and self.ref_model == "columns"

    @property
    def trust_column(self) -> str | None:
        """The column that says which labels to trust."""
        return None if self.trust == "audit" else self.trust

    @property
    def usefulness_terms(self) -> Mapping[str, float] | None:
        """What ``usefulness`` weighs; None where it is what a pair adds to those that are taken."""
        if self.usefulness is None:
            return None if self.ranking == "nearest" else {"centrality": 1.0, "alignment": 1.0}
        return None if isinstance(self.usefulness, str) else self.usefulness

    @property
    def memory_limit(self) -> int | None:
        """``max_memory`` in bytes."""
        assert not isinstance(self.max_memory, str)  # read by __post_init__
        return self.max_memory

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as JSON has them: tuples are lists; models, functions and arrays are named only."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        if not isinstance(self.ref_model, (str, type(None))):
            values["ref_model"] = f"<{type(self.ref_model).__name__}>"
        if callable(self.token_weights):
            function = self.token_weights
            name = getattr(function, "__qualname__", type(function).__qualname__)
            values["token_weights"] = f"<{function.__module__}.{name}>"
        if not isinstance(self.embedder, (str, type(None))):
            values["embedder"] = f"<{type(self.embedder).__name__}>"
        if isinstance(self.prompt_embeddings, np.ndarray):
            values["prompt_embeddings"] = f"<array of {' × '.join(map(str, self.prompt_embeddings.shape))}>"
        return values
