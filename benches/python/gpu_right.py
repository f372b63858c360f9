"""Whether what comes from the GPU is right: part `right` of benches/python/gpu.py."""

from __future__ import annotations

import contextlib
import copy
import functools
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import peft
import torch

import bpo
from bpo import _core
from bpo.gradients.choose import choose_features
from bpo.policy.autograd import differentiate
from bpo.policy.logprobs import Forward
from bpo.policy.state import inference_state
from bpo.sketching.batches import Sketching
from extraction import RANK
from gpu_setting import SHAPES, Card, Data, Measurement, Shape, extracted, failed, settings, twins
from table import Row

# Largest error of a sketch relative to its length. bfloat16 keeps 8 bits, TF32 11.
TOLERANCE = {"float32": 1e-3, "TF32": 2e-2, "bfloat16": 2e-1, "bfloat16 autocast": 2e-1}


# Sketches


def sketches(card: Card) -> Iterator[Row]:
    """Bits of the sketches of gradients on the device, on each way, against those of the core."""
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 7, 1000, 4608, card.choose(10_000_019, 10_007))
    parts = [torch.randn(5, size, generator=generator) for size in sizes]
    for kind, nnz in (("sparse", 1), ("sparse", 4), ("rademacher", 1), ("normal", 1)):
        if kind != "sparse":  # slow by their nature
            parts = [part[:, :4608].contiguous() for part in parts]
        sketcher = _core.Sketcher(1024, seed=3, kind=kind, nnz=nnz)
        expected = np.zeros((5, 1024), dtype=np.float32)
        offset = 11
        for part in parts:
            sketcher.sketch(part.numpy(), offset, expected)
            offset += part.shape[1]
        ways = {"on the device": True, "through pinned memory": False}
        if kind != "sparse" or not card.there:
            del ways["on the device"]  # there is no such way
        for way, on_device in ways.items():
            name = f"sketch {way}, {kind}, {nnz} a coordinate"
            sketching = Sketching(sketcher, None, on_device=on_device, beside=True)
            with guarded(name) as rows, sketching:
                found = sketched(sketching, parts, card.device)
                different = int((found.view(np.uint32) != expected.view(np.uint32)).sum())
                rows.append(exact(name, f"{different} of {expected.size} numbers differ", "the core", different == 0))
            yield from rows


def sketched(sketching: Sketching, parts: list[torch.Tensor], device: str) -> np.ndarray:
    """The sketches of gradients that come in two parts of the batch, one range of coordinates after the other."""
    batch = sketching.batch(5)
    offset = 11
    for part in parts:
        for samples in (slice(0, 2), slice(2, 5)):
            batch.consume(offset, part[samples].to(device), samples)
        offset += part.shape[1]
    return batch.rows()


# Gradients


def reference(model: Any, data: Data, **changes: Any) -> np.ndarray:
    """(S, d) sketches of what autograd finds, one backward a response."""
    config = settings(**changes)
    features = choose_features(model, config)
    sketcher = _core.Sketcher(config.sketch_dim, seed=config.sketch_seed)
    out = np.zeros((len(data.tokenized.ids), config.sketch_dim), dtype=np.float32)
    forward = Forward(model, data.tokenized, data.pad_id)
    with inference_state(model):
        for row in range(len(out)):

            def keep(name: str, gradient: torch.Tensor, row: int = row) -> None:
                slot = features.slots[name]
                sketcher.sketch(slot.keep(gradient).contiguous().cpu().numpy(), slot.offset, out[row : row + 1])

            differentiate(forward, list(features.slots), np.array([row]), keep)
    return out


def precisions(card: Card, shape: Shape) -> Iterator[Row]:
    """Sketches from the GPU in each precision against autograd's in float64 on the CPU."""
    shape = shape.on(card)
    exactly, model = twins(shape, card.device)
    data = Data.make(card, shape, "demo", prompts=2)
    expected = reference(exactly, data)
    for precision, tolerance in TOLERANCE.items():
        name = f"gradients of {shape.name} in {precision}"
        with guarded(name) as rows, arithmetic(precision):
            used = in_bfloat16(model) if precision == "bfloat16" else model
            found = extracted(used, data, bf16="autocast" in precision, tokens_per_batch=1024)
            rows.append(near(name, found, expected, "float64 on the CPU", tolerance))
        yield from rows


def features(card: Card, shape: Shape) -> Iterator[Row]:
    """Every parameter, whole and factored, and a trained adapter, against one backward a response in float64."""
    shape = shape.on(card)
    exactly, model = twins(shape, card.device)
    data = Data.make(card, shape, "demo", prompts=1)
    kinds: dict[str, dict[str, Any]] = {"every parameter, factored": {"features": "full", "factor_dim": 16}}
    if shape.hidden < 100:
        kinds["every parameter, whole"] = {"features": "full"}
    for name, changes in kinds.items():
        with guarded(f"{name} of {shape.name}") as rows, arithmetic("float32"):
            found = extracted(model, data, tokens_per_batch=1024, **changes)
            expected = reference(exactly, data, **changes)
            rows.append(near(f"{name} of {shape.name}", found, expected, "a float64 backward a response", 1e-3))
        yield from rows
    with guarded(f"trained LoRA of {shape.name}") as rows, arithmetic("float32"):
        adapted = with_adapter(copy.deepcopy(exactly))
        expected = reference(adapted, data)
        found = extracted(adapted.float().to(card.device), data, tokens_per_batch=1024)
        rows.append(near(f"trained LoRA of {shape.name}", found, expected, "a float64 backward a response", 1e-3))
    yield from rows


def in_bfloat16(model: Any) -> Any:
    """A copy whose weights are in bfloat16; the frequencies of positions stay as they are, as in a model so loaded."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.bfloat16()
    return copied


def with_adapter(model: Any, *, autocast_adapter_dtype: bool = False) -> Any:
    """The model with an adapter on every linear layer but the head, B not zero, as after some training."""
    chosen = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    adapted = peft.get_peft_model(model, chosen, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 1e-3
            parameter.data.copy_(drawn.bfloat16())
        elif ".lora_A." in name:
            parameter.data.copy_(parameter.data.bfloat16())
    return adapted


def batches(card: Card, shape: Shape) -> Iterator[Row]:
    """The same rows from batches of one response, of some and of many, with checkpointing, and twice."""
    shape = shape.on(card)
    model = twins(shape, card.device)[1]
    data = Data.make(card, shape, "demo", prompts=4)
    for precision, tolerance in (("float32", 1e-3), ("bfloat16", 2e-1)):
        place = f"{shape.name} in {precision}"
        with guarded(f"batch sizes of {place}") as rows, arithmetic(precision):
            used = in_bfloat16(model) if precision == "bfloat16" else model
            alone = extracted(used, data, tokens_per_batch=1)
            mixed = extracted(used, data, tokens_per_batch=300)
            large = extracted(used, data, tokens_per_batch=16384)
            rows.append(near(f"batches of 300 tokens, {place}", mixed, alone, "a batch a response", tolerance))
            rows.append(near(f"batches of 16,384 tokens, {place}", large, alone, "a batch a response", tolerance))
            again = extracted(used, data, tokens_per_batch=300)
            same = bool((again.view(np.uint32) == mixed.view(np.uint32)).all())
            rows.append(exact(f"a second run, {place}", f"largest difference {distance(again, mixed):.1e}", "", same))
            saving = copy.deepcopy(used)
            saving.gradient_checkpointing_enable()
            checked = extracted(saving, data, tokens_per_batch=300)
            rows.append(near(f"gradient checkpointing, {place}", checked, mixed, "without", tolerance))
        yield from rows


def selection(card: Card, shape: Shape) -> Iterator[Row]:
    """The pairs that bpo.select takes by gradients of the GPU and of the CPU."""
    shape = shape.on(card)
    model = twins(shape, card.device)[1]
    data = Data.make(card, shape, "demo", prompts=card.choose(12, 6))

    def pairs(model: Any, **changes: Any) -> set[tuple[int, int]]:
        chosen = bpo.select(
            model,
            data.rows,
            processing_class=data.tokenizer,
            budget=len(data.rows) * 2,
            config=settings(tokens_per_batch=1024, **changes),
            progress=False,
        )
        return {(row["prompt"], row["chosen"], row["rejected"]) for row in chosen.dataset}

    with arithmetic("float32"):
        expected = pairs(copy.deepcopy(model).cpu())
    for precision in TOLERANCE:
        with guarded(f"pairs of {shape.name} in {precision}") as rows, arithmetic(precision):
            used = in_bfloat16(model) if precision == "bfloat16" else model
            share = len(expected & pairs(used, bf16="autocast" in precision)) / len(expected)
            goal = 1.0 if precision == "float32" else None
            name = f"pairs selected by {shape.name} in {precision}"
            rows.append(Row(name, f"{share:.1%} the same", "float32 on the CPU", "", (share,) * 3, goal))
        yield from rows


def halving(card: Card, shape: Shape) -> Iterator[Row]:
    """Memory that does not suffice for a batch: it is halved, and the rows are what they were."""
    name = f"batches halved for want of memory, {shape.name}"
    if not card.there:
        yield Row(name, "skipped", "", "needs a GPU")
        return
    model = shape.build(card.device, torch.bfloat16)
    data = Data.make(card, shape, "long", prompts=8)
    expected = extracted(model, data, tokens_per_batch=4096)
    peaks = {}
    for tokens in (4096, 32768):
        card.free()
        torch.cuda.reset_peak_memory_stats()
        extracted(model, data, tokens_per_batch=tokens)
        peaks[tokens] = torch.cuda.max_memory_allocated()
    card.free()
    total = torch.cuda.get_device_properties(0).total_memory
    # Half way between what small batches take, with room for what the allocator cannot use, and what large ones do.
    limit = (1.2 * peaks[4096] + peaks[32768]) / 2
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = extracted(model, data, tokens_per_batch=32768)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        card.free()
    halved = sum("Memory does not suffice" in str(warning.message) for warning in caught)
    shown = f"{halved} times, to fit into {limit / 1e9:.1f} of {peaks[32768] / 1e9:.1f} GB"
    yield exact(name, shown, "at least once", halved > 0)
    yield near(f"rows from halved batches, {shape.name}", found, expected, "batches of 4,096 tokens", 2e-1)


# Rows


def near(name: str, found: np.ndarray, expected: np.ndarray, peer: str, tolerance: float) -> Row:
    """Largest relative error and smallest cosine of the rows; the ratio is that of the tolerance to the error."""
    error = distance(found, expected)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((found * expected).sum(axis=1) / np.maximum(norms, 1e-30)).min())
    ratio = min(tolerance / max(error, 1e-12), 999.0)
    return Row(name, f"{error:.1e}, cosine {cosine:.7f}", peer, f"at most {tolerance:.0e}", (ratio,) * 3, 1.0)


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance of a row from what is expected, by the length of that; not a number where one is not."""
    lengths = np.maximum(np.linalg.norm(expected, axis=1), 1e-30)
    return float((np.linalg.norm(found - expected, axis=1) / lengths).max())


def exact(name: str, shown: str, peer: str, right: bool) -> Row:
    return Row(name, shown, peer, "", (float(right),) * 3, 1.0)


@contextlib.contextmanager
def guarded(name: str) -> Iterator[list[Row]]:
    """A list for the rows of one measurement, to which an error adds one of its own."""
    rows: list[Row] = []
    try:
        yield rows
    except Exception as error:
        traceback.print_exc(limit=-4)
        rows.append(failed(name, error))


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Whether products of float32 matrices are taken in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measurements() -> dict[str, Measurement]:
    """By name, the most important first."""
    tiny, small = SHAPES["tiny"], SHAPES["135M"]
    if not torch.cuda.is_available():  # both would be tiny
        small = tiny
    measured = {"sketches": sketches}
    for shape in dict.fromkeys((tiny, small)):
        parts = {"features": features, "precisions": precisions, "batches": batches, "selection": selection}
        measured |= {f"{name} {shape.name}": functools.partial(part, shape=shape) for name, part in parts.items()}
        measured.setdefault("halving", functools.partial(halving, shape=small))
    return measured
