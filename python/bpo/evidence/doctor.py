"""What a run would do, before hours of compute: what is differentiated, whether it is sound, and what it will cost."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.config import SelectConfig
from bpo.data.candidates import InvalidDataWarning
from bpo.data.read import read_configured
from bpo.data.tokenizers import load_tokenizer
from bpo.data.tokens import tokenize_configured
from bpo.evidence.cost import Load, Stage, measured, stages
from bpo.gradients.choose import choose_features
from bpo.gradients.plan import find_plan, kind_of
from bpo.policy.batches import batch_tokens, batches_by_tokens
from bpo.policy.logprobs import Forward, check_vocabulary
from bpo.policy.models import load_policy, window
from bpo.policy.reference import Reference
from bpo.policy.state import inference_state
from bpo.report.notebook import facts_table
from bpo.report.wording import byte_size, duration
from bpo.sketching.batches import Sketching
from bpo.store.gradient_store import EMBEDDED, RECORD, row_bytes
from bpo.world.world import by_main

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.data.candidates import Candidates
    from bpo.data.tokens import TokenizedResponses
    from bpo.gradients.capture import Plan
    from bpo.gradients.features import Features
    from bpo.sketching.batches import SketchBatch


# Batches whose time is measured, evenly over those of the run, while there is time.
_TIMED = 9

# Above this a gradient depends on its batch: float32 stays below in every model of the tests, bfloat16 does not.
_SENSITIVITY = 1e-3
_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What :func:`bpo.doctor` found. ``print(diagnosis)`` says it in words.

    Attributes:
        prompts: Usable prompts.
        responses: Their responses, one gradient each (two where a response starts at different tokens in two pairs).
        pairs: Candidate pairs.
        skipped: What of the data cannot be used: reason → count.
        tokens: Of all prompts and responses, each response with its prompt.
        longest: Tokens of the longest sequence.
        truncated: Responses cut to the window.
        window: Longest sequence allowed, in tokens; None for no limit.
        warnings: What tokenizing, loading and looking at the model warned of, boundary mismatches included.
        features: What identifies the coordinates.
        coordinates: How many numbers the gradient of a response has.
        parts: Coordinates by kind of parameter, the largest first.
        run_again: Modules that are run again for each sample.
        whole_model: Parameters for which the whole model is run again for each sample.
        zero: Parameters whose gradient was exactly zero for two responses that ran alone.
        unusable: Responses, of those looked at, whose gradient is NaN, infinite or zero.
        looked_at: Responses whose gradient was taken.
        batch_sensitivity: Largest relative difference between a response's sketch in a batch and alone.
        seconds: Estimated time of the gradients of all responses.
        peak_memory_bytes: Estimated largest memory: of the process on a CPU, of the device on a GPU.
        store_bytes: Size of the gradient store.
        elapsed_seconds: Time this took.
        world_size: For how many processes ``stages`` are; None where that was not asked for.
        stages: What each stage of :func:`bpo.select` takes on that many machines or devices like this one, a fifth of
            the pairs chosen; empty where that was not asked for.
    """

    prompts: int
    responses: int
    pairs: int
    skipped: dict[str, int]
    tokens: int
    longest: int
    truncated: int
    window: int | None
    warnings: list[str]
    features: dict[str, Any]
    coordinates: int
    parts: dict[str, int]
    run_again: list[str]
    whole_model: list[str]
    zero: list[str]
    unusable: int
    looked_at: int
    batch_sensitivity: float
    seconds: float
    peak_memory_bytes: int
    store_bytes: int
    elapsed_seconds: float
    world_size: int | None = None
    stages: tuple[Stage, ...] = ()

    @property
    def _noun(self) -> str:
        return "embeddings" if self.features["kind"] == EMBEDDED else "gradients"

    def __repr__(self) -> str:
        return (
            f"Diagnosis({self.prompts} prompts, {self.responses} responses, {self.pairs} pairs, "
            f"{len(self.problems)} problems, about {self.seconds:.0f} s)"
        )

    def _repr_html_(self) -> str:
        return facts_table(
            "Diagnosis",
            [
                ("data", f"{self.prompts:,} prompts, {self.responses:,} responses, {self.pairs:,} candidate pairs"),
                ("features", f"{self.features['kind']}: {self.coordinates:,} coordinates a response"),
                ("time", f"about {self.seconds:,.0f} s"),
                ("memory", byte_size(self.peak_memory_bytes)),
                ("store", byte_size(self.store_bytes)),
                *(("look at", problem) for problem in self.problems),
            ],
        )

    @property
    def problems(self) -> list[str]:
        """What should be looked at before a run, in sentences; empty when all is well."""
        found = []
        if self.unusable:
            found.append(
                f"{self.unusable} of {self.looked_at} {self._noun} are NaN, infinite or zero: their pairs cannot be "
                "used."
            )
        if self.zero:
            found.append(
                f"{len(self.zero)} parameters had a gradient of exactly zero in the two responses that ran alone: "
                f"{_named(self.zero)}."
            )
        if self.whole_model:
            found.append(
                f"The whole model runs again for each response, for the parameters {_named(self.whole_model)}."
            )
        if self.batch_sensitivity > _SENSITIVITY:
            article = "An embedding" if self._noun == "embeddings" else "A gradient"
            found.append(
                f"{article} changes by {self.batch_sensitivity:.1e} of itself with the batch it is in; a wider dtype "
                "changes less."
            )
        if self.truncated > 0.1 * self.responses:
            found.append(f"{self.truncated / self.responses:.0%} of the responses are cut; raise max_length.")
        return found + self.warnings

    def _told(self) -> list[str]:
        """A line for each stage, and one above them."""
        if self.world_size is None:
            return []
        lines = [
            f"processes  {self.world_size}, as fast as this one, on a disk that all see; memory of one, else of all",
            f"           {'stage':8} {'by':6} {'time':>12} {'memory':>12} {'disk':>12} {'network':>12}",
        ]
        for stage in self.stages:
            sizes = map(byte_size, (stage.memory_bytes, stage.disk_bytes, stage.network_bytes))
            cells = " ".join(f"{cell:>12}" for cell in (duration(stage.seconds), *sizes))
            lines.append(f"           {stage.name:8} {stage.by:6} {cells}")
        return lines

    def __str__(self) -> str:
        """Returns a page of text."""
        parts = [f"{name} {count:,}" for name, count in self.parts.items()]
        lines = [
            f"data       {self.prompts:,} prompts, {self.responses:,} responses, {self.pairs:,} candidate pairs",
            *(f"unusable   {count} × {reason}" for reason, count in self.skipped.items()),
            f"tokens     {self.tokens:,}; longest {self.longest:,}, window {self.window or 'without end'}; "
            f"{self.truncated / self.responses:.1%} of the responses cut",
            f"{self._noun:10} {self.features['kind']}: {self.coordinates:,} coordinates a response: {_named(parts)}",
        ]
        if self.run_again:
            lines.append(f"run again  one sample at a time: {_named(self.run_again)}")
        lines += [
            f"checked    {self.looked_at} responses; in a batch and alone their sketches differ by "
            f"{self.batch_sensitivity:.1e}",
            f"estimate   {duration(self.seconds)} for all {self._noun}, {byte_size(self.peak_memory_bytes)} of memory, "
            f"{byte_size(self.store_bytes)} of disk",
            *self._told(),
            *(f"problem    {problem}" for problem in self.problems),
        ]
        if not self.problems:
            lines.append("no problems found")
        return "\n".join(lines)


@by_main
def doctor(
    model: Any,
    dataset: Any,
    *,
    processing_class: Any = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    config: SelectConfig | Mapping[str, Any] | None = None,
    seconds: float = 40.0,
    world_size: int | None = None,
) -> Diagnosis:
    """Says what :func:`bpo.select` would differentiate, whether that is sound, and what it will cost.

    Takes the gradients of a few batches, spread over the lengths of the data, and writes nothing.

    Args:
        model: Path, hub id, ``PreTrainedModel`` or ``PeftModel``.
        dataset: Preference data in any format of :func:`bpo.select`.
        processing_class: The tokenizer; by default the one saved with the model.
        split: Which split of the data is read, such as ``"train_prefs"``; by default that for training.
        columns: What columns of the accepted formats are called in the data, such as ``{"prompt": "question"}``.
        config: Settings, those of the run.
        seconds: Time after which no further batch is begun. The longest batch always runs, for the estimate of memory,
            and so does the shortest.
        world_size: Says of each stage of :func:`bpo.select` what it would take with so many processes *(ours)*: counts
            of the work times what this machine is measured to need for a unit of each (``docs/scaling.md``). None
            leaves that out.

    Returns:
        The diagnosis.

    Raises:
        ValueError: Unusable data or an unsupported model, as :func:`bpo.select` would raise.
        FileNotFoundError: A model path that does not exist.

    Example:
        .. code-block:: python

            print(bpo.doctor("my-sft-model", "responses.jsonl"))
    """
    begin = time.perf_counter()
    config = SelectConfig.of(config)
    if world_size is not None and world_size < 1:
        raise ValueError(f"world_size must be at least 1, got {world_size}.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        candidates = read_configured(dataset, config, split=split, columns=columns)
        skipped = candidates.skipped.counts()
        tokenizer = load_tokenizer(model, processing_class, config)
        policy = load_policy(model, config)
        kept, tokenized = tokenize_configured(candidates, tokenizer, window(policy, config), config)
        check_vocabulary(policy, tokenized.ids)
        features = choose_features(policy, config)
        reference = Reference.of(policy, config)
        with inference_state(policy):
            forward = Forward.of(policy, tokenized, tokenizer, config)
            plan = find_plan(features, forward)
            features.warn_of_gaps(policy)
            trial = _Trial(forward, reference, features, plan, config)
            trial.run(begin + seconds)
    said = [
        str(entry.message)
        for entry in caught
        if issubclass(entry.category, UserWarning) and not issubclass(entry.category, InvalidDataWarning)
    ]
    expected, peak = trial.estimated_seconds(), trial.peak_memory()
    return Diagnosis(
        prompts=len(kept.prompts),
        responses=len(tokenized.ids),
        pairs=len(kept.pairs),
        skipped=skipped,
        tokens=int(tokenized.lengths.sum()),
        longest=int(tokenized.lengths.max()),
        truncated=tokenized.truncated,
        window=tokenized.max_length,
        warnings=said,
        features=features.describe(),
        coordinates=features.dim,
        parts=_parts(features),
        run_again=sorted(plan.replays),
        whole_model=sorted(plan.whole),
        zero=trial.zero(),
        unusable=trial.unusable,
        looked_at=trial.looked_at,
        batch_sensitivity=trial.sensitivity,
        seconds=expected,
        peak_memory_bytes=peak,
        store_bytes=len(tokenized.ids) * (row_bytes(config.sketch_dtype, config.sketch_dim) + RECORD.itemsize),
        elapsed_seconds=time.perf_counter() - begin,
        world_size=world_size,
        stages=() if world_size is None else _foretold(kept, tokenized, features, config, world_size, expected, peak),
    )


def _foretold(
    kept: Candidates,
    tokenized: TokenizedResponses,
    features: Features,
    config: SelectConfig,
    world_size: int,
    seconds: float,
    peak: int,
) -> tuple[Stage, ...]:
    """The stages for a number of processes, of which one alone extracts in so many seconds with so many bytes."""
    load = Load(
        prompts=len(kept.prompts),
        responses=len(tokenized.ids),
        pairs=len(kept.pairs),
        tokens=int(tokenized.lengths.sum()),
        text_bytes=int(kept.prompts.sizes().sum() + kept.responses.sizes().sum()),
        coordinates=features.dim,
        config=config,
        budget=max(1, len(kept.pairs) // 5),
    )
    return tuple(stages(load, measured(config, seconds / load.tokens, peak), world_size))


class _Trial:
    """A few batches of the run, as the run would take them."""

    def __init__(
        self, forward: Forward, reference: Reference, features: Features, plan: Plan, config: SelectConfig
    ) -> None:
        self._forward = forward
        self._reference = reference
        self._features = features
        self._plan = plan
        self._config = config
        tokens = batch_tokens(config.tokens_per_batch, forward.model)
        self._batches = batches_by_tokens(forward.tokenized.lengths, tokens)
        self._timed: dict[int, float] = {}  # index of the batch → seconds
        self._touched: set[int] = set()  # offsets of parameters with a gradient other than zero
        self.looked_at = self.unusable = 0
        self.sensitivity = 0.0

    def run(self, deadline: float) -> None:
        """Runs batches until the time is over, and some responses alone."""
        last = len(self._batches) - 1
        # The shortest batch in which a response is not alone.
        compared = max((index for index in range(last + 1) if len(self._batches[index]) > 1), default=last)
        spread = np.unique([*np.linspace(0, last, _TIMED).astype(int), compared])
        # The shortest for what is cheap to look at, the longest for memory; those between while there is time.
        middle = spread[len(spread) // 2]
        order = sorted(spread, key=lambda index: (index != compared, index != 0, abs(index - middle)))
        with Sketching.of(self._config) as sketching:
            for place, index in enumerate(order):
                if place > 1 and time.perf_counter() > deadline:
                    break
                together = self._time(index, sketching)
                if index == compared:
                    self._compare(self._batches[index], together, sketching)

    def _time(self, index: int, sketching: Sketching) -> npt.NDArray[np.float32]:
        rows = self._batches[index]
        begin = time.perf_counter()
        sketches = sketching.batch(len(rows))
        result = self._features.catch(self._forward, self._plan, rows, sketches.consume)
        self._reference.logps(self._forward, rows, result.logps)
        together = sketches.rows()
        self._timed[index] = time.perf_counter() - begin
        self.looked_at += len(rows)
        self.unusable += int((~np.isfinite(together).all(axis=1) | ~together.any(axis=1)).sum())
        return together

    def _compare(self, rows: npt.NDArray[np.int64], together: npt.NDArray[np.float32], sketching: Sketching) -> None:
        """Runs the first and the last response of a batch alone, against their (n, d) sketches in it."""
        for place in {0, len(rows) - 1}:
            sketches = sketching.batch(1)

            def consume(offset: int, gradients: torch.Tensor, samples: slice, sketches: SketchBatch = sketches) -> None:
                if bool(gradients.any()):
                    self._touched.add(offset)
                sketches.consume(offset, gradients, samples)

            self._features.catch(self._forward, self._plan, rows[place : place + 1], consume)
            alone = sketches.rows()[0]
            norm = float(np.linalg.norm(alone))
            if np.isfinite(norm) and norm > 0:
                self.sensitivity = max(self.sensitivity, float(np.linalg.norm(together[place] - alone)) / norm)

    def zero(self) -> list[str]:
        """Names of parameters whose gradient was zero in every response that ran alone."""
        return [name for name, slot in self._features.slots.items() if slot.offset not in self._touched]

    def estimated_seconds(self) -> float:
        """Time of all batches: that of a padded token, between the lengths at which it was measured."""
        lengths = self._forward.tokenized.lengths
        width = np.array([int(lengths[rows].max()) for rows in self._batches])
        padded = width * [len(rows) for rows in self._batches]
        timed = sorted(self._timed, key=lambda index: width[index])
        each = [self._timed[index] / padded[index] for index in timed]
        return float((np.interp(width, width[timed], each) * padded).sum())

    def peak_memory(self) -> int:
        """Bytes: of the GPU where the model is on one, else of the process."""
        device = self._forward.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        if sys.platform == "win32":
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _parts(features: Features) -> dict[str, int]:
    """The coordinates of each kind of parameter, layers taken together, the largest first."""
    parts: dict[str, int] = {}
    for name, slot in features.slots.items():
        parts[kind_of(name)] = parts.get(kind_of(name), 0) + slot.size
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _named(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
