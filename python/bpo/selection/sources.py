"""Where the gradients of pairs come from: the policy, a store alone, checkpoints, or an earlier selection's policy."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bpo.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from bpo.data.tokens import tokenize_configured
from bpo.gradients.checkpoints import check_checkpoints, collect_checkpoints, collect_reference
from bpo.gradients.collect import collect
from bpo.gradients.preconditioner import preconditioner_path
from bpo.pairs.measured import MeasuredPairs, in_store, measured
from bpo.pairs.size import ChoiceSize
from bpo.policy.models import load_policy, window
from bpo.policy.reference import Reference
from bpo.selection.inputs import Inputs
from bpo.store.gradient_store import GradientStore, StoreMismatchError, with_settings_of
from bpo.world.world import world

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.candidates import Candidates
    from bpo.data.tokens import TokenizedResponses
    from bpo.selection.inputs import Goal
    from bpo.selection.request import Request
    from bpo.selection.selection import Selection
    from bpo.world.shares import Shares

Filled = Sequence[Sequence[GradientStore]]
"""The stores of each part: one, or one for each checkpoint."""

Measured = tuple[MeasuredPairs | None, MeasuredPairs | None]
"""What was measured of the candidates and of the target; None where nothing was."""


class Source(Protocol):
    """What can find candidate pairs and measure them."""

    @property
    def config(self) -> SelectConfig:
        """Settings; those of the gradients are as the source has them."""

    @property
    def policy(self) -> Policy | None:
        """The policy, where one is given."""

    @property
    def named(self) -> tuple[str | None, str | None]:
        """Where the model is from, and its commit on the hub; its fingerprint where only a store knows it."""

    @property
    def reading(self) -> SelectConfig:
        """The settings to read data with: what only gradients depend on need not be in the data otherwise."""

    def find(self, candidates: Candidates) -> Inputs:
        """Returns the pairs that can be used, with their tokens or their rows in a store."""

    def fill(self, parts: Sequence[Inputs], progress: bool) -> Filled:
        """Computes what of the parts no store holds yet, by all processes of a job together; returns the stores."""

    def read(
        self, filled: Filled, parts: Sequence[Inputs], progress: bool, shares: Shares | None = None
    ) -> list[MeasuredPairs]:
        """Returns the gradients and log-probabilities of the pairs of each part, whose rows processes may share."""


class Policy:
    """The policy that is given, loaded when it is first needed, and its tokenizer.

    Args:
        model: Path, hub id or model object.
        processing_class: The tokenizer; None for that of the model.
        config: How models are loaded, and the longest sequence.
    """

    def __init__(self, model: Any, processing_class: Any, config: SelectConfig) -> None:
        self._given = model
        self._processing_class = processing_class
        self._config = config
        self._loaded: PreTrainedModel | None = None
        self._revision: str | None = None

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return load_tokenizer(self._given, self._processing_class, self._config)

    @property
    def named(self) -> tuple[str | None, str | None]:
        """Where the model is from, a path or a hub id, and its commit on the hub, as far as it has said so."""
        config = getattr(self._given, "config", None)
        path = isinstance(self._given, (str, os.PathLike))
        name = os.fspath(self._given) if path else getattr(config, "_name_or_path", None)
        return name or None, self._revision or getattr(config, "_commit_hash", None)

    @functools.cached_property
    def window(self) -> int | None:
        """Longest sequence in tokens; None for any."""
        return window(self._given, self._config)

    def load(self) -> PreTrainedModel:
        """Returns the model, kept until :meth:`let_go`."""
        if self._loaded is None:
            self._loaded = load_policy(self._given, self._config)
            self._revision = getattr(self._loaded.config, "_commit_hash", None)
        return self._loaded

    def let_go(self) -> None:
        """Lets the memory of the model be used for another one."""
        self._loaded = None

    def tokenize(self, candidates: Candidates, config: SelectConfig) -> Inputs:
        """Returns the pairs whose tokens can be used."""
        candidates, tokenized = tokenize_configured(candidates, self.tokenizer, self.window, config)
        return Inputs(candidates, tokenized, lengths=tokenized.response_lengths[tokenized.pairs])


@dataclasses.dataclass(frozen=True)
class Unmeasured:
    """Pairs whose gradients nothing asks for; with a policy, their lengths are in tokens."""

    policy: Policy | None
    config: SelectConfig

    @property
    def named(self) -> tuple[str | None, str | None]:
        """That of the policy, if there is one."""
        return (None, None) if self.policy is None else self.policy.named

    @property
    def reading(self) -> SelectConfig:
        """Without what only gradients depend on; named token weights go along to the training."""
        named = self.config.token_weights if isinstance(self.config.token_weights, str) else None
        return dataclasses.replace(self.config, token_weights=named, ref_model=None)

    def find(self, candidates: Candidates) -> Inputs:
        """Tokenizes the pairs where there is a tokenizer."""
        return Inputs(candidates) if self.policy is None else self.policy.tokenize(candidates, self.reading)

    def fill(self, parts: Sequence[Inputs], progress: bool) -> Filled:
        """Nothing is computed."""
        raise AssertionError("the strategy reads no gradients")

    def read(
        self, filled: Filled, parts: Sequence[Inputs], progress: bool, shares: Shares | None = None
    ) -> list[MeasuredPairs]:
        """Nothing is measured."""
        raise AssertionError("the strategy reads no gradients")


class StoreAlone:
    """Gradients that a store holds, taken as they are: no model is there."""

    policy = None

    def __init__(self, store: GradientStore, config: SelectConfig, processing_class: Any = None) -> None:
        self.store = store
        self.config = with_settings_of(store, config)
        self._tokenizer = None if processing_class is None else load_tokenizer(None, processing_class, config)
        if self._tokenizer and tokenizer_fingerprint(self._tokenizer) != store.fingerprint.get("tokenizer"):
            raise StoreMismatchError(
                f"{store.path} was made with another tokenizer than processing_class. Pass the one that it was made "
                "with, or none where each response has one row."
            )

    @property
    def named(self) -> tuple[str | None, str | None]:
        """By what the store knows it."""
        known = self.store.fingerprint.get("model")
        return (None if known is None else f"fingerprint {known}", None)

    @property
    def reading(self) -> SelectConfig:
        """Without what the store knows."""
        named = self.config.token_weights if isinstance(self.config.token_weights, str) else None
        return dataclasses.replace(self.config, token_weights=named, ref_model=None)

    def find(self, candidates: Candidates) -> Inputs:
        """Finds the pairs whose responses the store holds."""
        candidates, stored = in_store(candidates, self.store, self.config, self._tokenizer)
        return Inputs(candidates, stored=stored, lengths=self.store.records["length"][stored].astype(np.int64))

    def fill(self, parts: Sequence[Inputs], progress: bool) -> Filled:
        """Everything is there."""
        return [[self.store]] * len(parts)

    def read(
        self, filled: Filled, parts: Sequence[Inputs], progress: bool, shares: Shares | None = None
    ) -> list[MeasuredPairs]:
        """Reads the rows of the pairs."""
        found = []
        for stores, part in zip(filled, parts, strict=True):
            assert part.stored is not None
            weights = part.candidates.weights
            found.append(
                measured(stores, [part.stored], self.config, weights=weights, progress=progress, shares=shares)
            )
        return found

    def of_tokens(self, tokenized: TokenizedResponses) -> MeasuredPairs | None:
        """Reads pairs whose tokens are known; None where the store lacks one of their responses."""
        rows = self.store.rows_of(tokenized.sequence_ids)[tokenized.pairs]
        return None if (rows < 0).any() else measured([self.store], [rows], self.config)


class _Tokenizing:
    """What sources with a policy share: pairs are found by tokenizing them."""

    def __init__(self, policy: Policy, request: Request) -> None:
        self.policy = policy
        self.config = request.config
        self._store = request.store

    @property
    def named(self) -> tuple[str | None, str | None]:
        """That of the policy."""
        return self.policy.named

    @property
    def reading(self) -> SelectConfig:
        """Everything that the gradients depend on."""
        return self.config

    def find(self, candidates: Candidates) -> Inputs:
        """Tokenizes the pairs."""
        return self.policy.tokenize(candidates, self.config)


class FromPolicy(_Tokenizing):
    """Gradients of the policy, computed but for what a store holds already."""

    def __init__(
        self, policy: Policy, request: Request, preconditioner: str | None, reference: Reference | None
    ) -> None:
        super().__init__(policy, request)
        self._preconditioner = preconditioner
        self._reference = reference

    def fill(self, parts: Sequence[Inputs], progress: bool) -> Filled:
        """Completes the store."""
        return [
            [
                collect(
                    self.policy.load(),
                    candidates,
                    tokenized,
                    self.policy.tokenizer,
                    config=self.config,
                    store=self._store,
                    progress=progress,
                    preconditioner=self._preconditioner,
                    reference=self._reference_of(tokenized),
                )
            ]
            for candidates, tokenized in _of_one_store(parts)
        ]

    def read(
        self, filled: Filled, parts: Sequence[Inputs], progress: bool, shares: Shares | None = None
    ) -> list[MeasuredPairs]:
        """Reads the pairs from the store."""
        return [
            _read_pairs(stores, part, self.config, progress, shares=shares)
            for stores, part in zip(filled, parts, strict=True)
        ]

    def _reference_of(self, tokenized: TokenizedResponses) -> Reference | None:
        """What the policy is compared with; None where the settings say it."""
        return self._reference


class FromEarlier(FromPolicy):
    """Gradients of a policy that was trained since an earlier selection, which knows log π_ref of the same pairs."""

    def __init__(self, policy: Policy, request: Request, preconditioner: str | None, earlier: Selection) -> None:
        super().__init__(policy, request, preconditioner, None)
        self._earlier = earlier

    def _reference_of(self, tokenized: TokenizedResponses) -> Reference:
        """Returns log π_ref of all sequences as the earlier selection computed it."""
        kept = np.array(self._earlier.pairs["fate"]) != "breadth"
        logps = np.full(len(tokenized.ids), np.nan, dtype=np.float32)
        for side, name in enumerate(("ref_logp_chosen", "ref_logp_rejected")):
            logps[tokenized.pairs[:, side]] = self._earlier.pairs[name].to_numpy().astype(np.float32)[kept]
        return Reference("known", hashlib.sha256(logps.tobytes()).hexdigest(), known=logps)


class FromCheckpoints(_Tokenizing):
    """Gradients at several checkpoints of a training, with one model in memory at a time."""

    def __init__(self, policy: Policy, request: Request) -> None:
        check_checkpoints(request.config, request.store)
        super().__init__(policy, request)
        self._ref_logps: list[npt.NDArray[np.float32] | None] = []

    def fill(self, parts: Sequence[Inputs], progress: bool) -> Filled:
        """Runs the reference once, and completes the store of each checkpoint."""
        shared: dict[str, Any] = {"config": self.config, "store": self._store, "progress": progress}
        tokenizer = self.policy.tokenizer
        texts = _of_one_store(parts)
        references = [collect_reference(self.policy.load(), tokens, tokenizer, **shared) for _, tokens in texts]
        self.policy.let_go()
        self._ref_logps = [reference.known for reference in references]
        return [
            collect_checkpoints(reference, *text, tokenizer, **shared)
            for reference, text in zip(references, texts, strict=True)
        ]

    def read(
        self, filled: Filled, parts: Sequence[Inputs], progress: bool, shares: Shares | None = None
    ) -> list[MeasuredPairs]:
        """Reads the pairs from the stores of the checkpoints."""
        return [
            _read_pairs(stores, part, self.config, progress, logps, shares=shares)
            for stores, part, logps in zip(filled, parts, self._ref_logps, strict=True)
        ]


def source_of(
    request: Request,
    model: Any,
    processing_class: Any,
    *,
    breadth: Any = None,
    earlier: Selection | None = None,
    reference: Reference | None = None,
) -> Source:
    """Chooses where gradients come from, and checks that what that takes is there.

    Raises:
        ValueError: Something needs a model, and none is given.
        FileNotFoundError: A store, a checkpoint or an optimizer state that is not there.
        bpo.StoreError: A store that cannot be read, or was made with other settings.
    """
    config = request.config
    needs_gradients = "gradients" in request.needs
    embeds_with_policy = breadth is not None and config.embedder is None and config.prompt_embeddings is None
    source: Source | None = None
    if model is None and needs_gradients and request.store is not None and config.checkpoints is None:
        source = StoreAlone(GradientStore.open(request.store), config, processing_class)
    if model is None:
        _check_without_model(request, breadth, needs_gradients and source is None, embeds_with_policy)
        return source or Unmeasured(None, config)
    policy = Policy(model, processing_class, config)
    if not needs_gradients:
        return Unmeasured(policy, config)
    if config.checkpoints is not None:
        return FromCheckpoints(policy, request)
    preconditioner = preconditioner_path(model, config)
    if earlier is not None and reference is None:
        return FromEarlier(policy, request, preconditioner, earlier)
    return FromPolicy(policy, request, preconditioner, reference)


def extract(kept: Inputs, goal: Goal | None, source: Source, request: Request, budget: int) -> Filled | None:
    """Has the gradients of candidates, and of the target where there is one, in stores: step 5 of the method.

    All processes of a job do it together. None where the strategy reads no gradients.

    Raises:
        ValueError: What follows takes more than ``SelectConfig.max_memory``.
    """
    if "gradients" not in request.needs:
        return None
    dim = request.config.sketch_dim * len(request.config.checkpoints or [None])
    parts = _parts(kept, goal)
    n_rows, n_pairs = (sum(len(getattr(part.candidates, name)) for part in parts) for name in ("responses", "pairs"))
    ChoiceSize(n_rows, n_pairs, dim, request.clustering, request.strategy, budget, world().size).check()
    return source.fill(parts, request.progress)


def measure(
    filled: Filled | None,
    kept: Inputs,
    goal: Goal | None,
    source: Source,
    request: Request,
    shares: Shares | None = None,
) -> Measured:
    """Reads what was extracted of the candidates, and of the target if any, by the processes that share it."""
    if filled is None:
        return None, None
    found = source.read(filled, _parts(kept, goal), request.progress, shares)
    return found[0], found[1] if len(found) > 1 else None


def _parts(kept: Inputs, goal: Goal | None) -> list[Inputs]:
    return [kept] if goal is None else [kept, goal.inputs]


def _check_without_model(request: Request, breadth: Any, lacks_gradients: bool, embeds_with_policy: bool) -> None:
    """Checks that nothing needs the model that was not given."""
    if lacks_gradients or embeds_with_policy:
        no_store = lacks_gradients and request.store is None
        raise ValueError(
            f"strategy={request.strategy!r} with breadth={breadth!r} needs a model; model is None."
            + (" Name the store that holds the gradients, or a model." if no_store else "")
            + (" Name an embedder for the prompts, or give their embeddings or a model." if embeds_with_policy else "")
        )


def _of_one_store(parts: Sequence[Inputs]) -> list[tuple[Candidates, TokenizedResponses]]:
    """Texts and tokens of each part; a store is told from that of other data by all that may be in it."""
    known_ids = np.concatenate([part.candidates.known_ids for part in parts])
    return [
        (dataclasses.replace(part.candidates, known_ids=known_ids), part.tokenized)
        for part in parts
        if part.tokenized is not None
    ]


def _read_pairs(
    stores: Sequence[GradientStore],
    part: Inputs,
    config: SelectConfig,
    progress: bool,
    ref_logps: npt.NDArray[np.float32] | None = None,
    *,
    shares: Shares | None,
) -> MeasuredPairs:
    """Reads the pairs of a part from a store, or from that of each checkpoint with (S,) log π_ref of all."""
    tokenized = part.tokenized
    assert tokenized is not None
    return measured(
        stores,
        [store.rows_of(tokenized.sequence_ids)[tokenized.pairs] for store in stores],
        config,
        ref_logps=None if ref_logps is None else ref_logps[tokenized.pairs],
        weights=part.candidates.weights,
        progress=progress,
        shares=shares,
    )
