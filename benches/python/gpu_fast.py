"""How fast extraction is, and what it takes: part `fast` of benches/python/gpu.py.

A rate counts real tokens, no padding. The share of the card's rate counts 4 FLOP a token for each parameter that is
multiplied with it: those of the layers for every token, those of the output head for the tokens that are predicted. The
embedding is looked up and counts nothing, attention's own products are left out. (Forward 2, backward to the inputs 2:
the base is frozen.)
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

import bpo
from bpo import _core
from bpo.gradients.choose import choose_features
from bpo.gradients.plan import find_plan
from bpo.policy.logprobs import Forward, pad_right, try_without_mask
from bpo.policy.state import inference_state
from bpo.policy.transfer import Fetched
from bpo.sketching.batches import SketchBatch, Sketching
from extraction import RANK, Batches, Methods, evenly
from gpu_right import guarded, with_adapter
from gpu_setting import SHAPES, Card, Data, Measurement, Shape, settings
from table import Row, optional, peak_memory, spread

ROUNDS = 5
TOKENS_PER_BATCH = 16384
FACTOR_DIM = 16  # of every parameter; bergson's 16 x 16 a layer

OURS = {"extract": "fresh LoRA", "extract_full": "every parameter, factored", "extract_trained": "trained LoRA"}
# What takes long is measured less often, or on fewer responses.
FEWER_ROUNDS = {"stored": 3, "bergson": 3, "bergson_frozen": 3}
FEWER_RESPONSES = {"one_by_one": 24}


@dataclasses.dataclass(frozen=True)
class Against:
    """What one of our methods is held against, and the ratio of rates (ours over theirs) that is asked for."""

    ours: str
    peer: str
    name: str
    goal: float | None = None


PEERS = (
    Against("extract", "plain", "PEFT, a backward a batch", 1 / 1.05),
    Against("extract_full", "plain", "PEFT, a backward a batch", 1 / 1.10),
    Against("extract_trained", "plain", "PEFT, a backward a batch", 1 / 1.05),
    Against("extract", "dpo_step", "TRL's DPO step, reference included"),
    Against("extract", "one_by_one", "PEFT, a backward a response"),
    Against("extract", "bergson", "bergson, 16 x 16 a layer, in memory"),
    Against("extract", "bergson_frozen", "the same, embeddings frozen", 1.5),
)


# What is compared


class CardMethods(Methods):
    """Those of extraction.py and more, on a model of random weights. Each takes batches and goes through them once."""

    def __init__(self, card: Card, shape: Shape, data: Data, *, four_bits: bool = False, liger: bool = False) -> None:
        dtype = card.choose("bfloat16", "float32")
        super().__init__(data, dtype, argparse.Namespace(threads=None, model=None))
        self.card, self.shape, self.four_bits, self.liger = card, shape, four_bits, liger
        self._chosen: dict[str, tuple[Any, Any, Any]] = {}
        self._directory = tempfile.TemporaryDirectory()

    def _load(self) -> Any:
        model = self.shape.build(self.device, getattr(torch, self.dtype))
        if self.liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False)
        return in_four_bits(model) if self.four_bits else model

    @functools.cached_property
    def adapted(self) -> Any:
        """With an adapter in the type of the model, in which PEFT is faster than in its own choice of float32."""
        adapted = with_adapter(self._load())
        shortest = np.argsort(self.data.tokenized.lengths, kind="stable")
        # As fast as it can be: what bpo leaves out, it leaves out here, too.
        try_without_mask(Forward(adapted, self.data.tokenized, self.data.pad_id), shortest[[0, len(shortest) // 2]])
        return adapted

    def now(self) -> float:
        return self.card.now()

    def extract(self, batches: Batches) -> None:
        self._go_through("extract", self.model, batches, sketched=True)

    def extract_trained(self, batches: Batches) -> None:
        self._go_through("extract_trained", self.adapted, batches, sketched=True)

    def extract_full(self, batches: Batches) -> None:
        self._go_through("extract_full", self.model, batches, sketched=True)

    def capture(self, batches: Batches) -> None:
        """Gradients of a fresh adapter, formed and thrown away."""
        self._go_through("extract", self.model, batches, sketched=False)

    def _plan(self, method: str, model: Any) -> tuple[Any, Any, Any]:
        """Features and plan, which are made once."""
        if method not in self._chosen:
            changes = {"features": "full", "factor_dim": FACTOR_DIM} if method == "extract_full" else {}
            config = settings(lora_rank=RANK, **changes)
            features = choose_features(model, config)
            with inference_state(model):
                plan = find_plan(features, Forward(model, self.data.tokenized, self.data.pad_id))
            self._chosen[method] = features, plan, _core.Sketcher(1024)
        return self._chosen[method]

    def _go_through(self, method: str, model: Any, batches: Batches, *, sketched: bool) -> None:
        """What gradients.collect does, but for the store: a batch is waited for once the next has gone through."""
        features, plan, sketcher = self._plan(method, model)
        with inference_state(model), Sketching(sketcher, None) as sketching:
            previous, forward = None, Forward(model, batches.tokenized, self.data.pad_id)
            for rows in batches:
                sketches = sketching.batch(len(rows))
                result = features.catch(forward, plan, rows, sketches.consume if sketched else lambda *_: None)
                sketches.finish()
                here = sketches, Fetched(result.logps)
                if previous is not None:
                    self._wait(*previous)
                previous = here
            self._wait(*previous)

    def _wait(self, sketches: SketchBatch, logps: Fetched) -> None:
        sketches.rows()
        logps.numpy()

    def stored(self, batches: Batches) -> float:
        """bpo.collect_gradients, store on disk; returns the seconds from its first whole batch to its end.

        What comes before is done once: hashing the model, and a plan on the two shortest responses.
        """
        began: list[float] = []
        longest = int(self.data.tokenized.lengths.max())

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not began and kwargs.get("input_ids", next(iter(args), torch.empty(0))).numel() >= longest:
                began.append(time.perf_counter())

        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with tempfile.TemporaryDirectory() as directory:
                bpo.collect_gradients(
                    self.model,
                    self.data.rows,
                    processing_class=self.data.tokenizer,
                    store=Path(directory) / "store",
                    config=bpo.SelectConfig(lora_rank=RANK, max_length=None, tokens_per_batch=batches.tokens_per_batch),
                    progress=False,
                )
                return self.now() - began[0]
        finally:
            handle.remove()

    def dpo_step(self, batches: Batches) -> None:
        """TRL's loss of pairs, and its gradient: the policy with a fresh adapter, and without it as the reference."""
        trainer = self._trainer
        for rows in batches:
            even = np.resize(rows, len(rows) + len(rows) % 2)  # each has an other one
            model = trainer.model
            input_ids, attention_mask = pad_right(model, [batches.tokenized.ids[row] for row in even], self.data.pad_id)
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            prompts = torch.from_numpy(batches.tokenized.prompt_lengths[even]).to(input_ids.device)
            inputs = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "completion_mask": (positions >= prompts[:, None]).long() * attention_mask,
            }
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.card.there):
                loss = trainer.compute_loss(trainer.model, inputs)
            loss.backward()
            model.zero_grad()

    @functools.cached_property
    def _trainer(self) -> Any:
        """TRL's trainer, of which only the loss is used."""
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        row = self.data.rows[0]
        pair = {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]}
        arguments = DPOConfig(
            output_dir=self._directory.name,
            report_to="none",
            bf16=self.card.there,
            use_cpu=not self.card.there,
            gradient_checkpointing=False,
            max_length=None,
        )
        return DPOTrainer(
            self._load(),
            args=arguments,
            train_dataset=Dataset.from_list([pair]),
            processing_class=self.data.tokenizer,
            peft_config=peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
        )

    def flops(self, tokenized: Any) -> float:
        """By the formula at the top of this file."""
        head = self.model.get_output_embeddings()
        layers = sum(
            module.in_features * module.out_features
            for module in self.model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        )
        predicted = int(tokenized.predicted_lengths.sum())
        return 4.0 * (layers * int(tokenized.lengths.sum()) + head.in_features * head.out_features * predicted)


def in_four_bits(model: Any) -> Any:
    """The model with bitsandbytes' NF4 layers in place of its linear ones, but for the head."""
    import bitsandbytes

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            weight = bitsandbytes.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
            layer.weight = weight
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, layer.to(module.weight.device))
            del module.weight
    return model


# Rates


def rates(
    card: Card,
    shape: Shape,
    lengths: str,
    methods: tuple[str, ...],
    *,
    tokens: int,
    seconds: float,
    per_batch: int = TOKENS_PER_BATCH,
    goal: float | None = None,
    **load: bool,
) -> Iterator[Row]:
    """Rates of several methods that take turns, and the peak memory of each over the first batch."""
    shape, end = shape.on(card), time.time() + min(seconds, card.left)
    data = Data.make(card, shape, lengths, tokens=card.choose(tokens, 400))
    sides = CardMethods(card, shape, data, **load)
    all_batches = Batches(lengths, data.tokenized, card.choose(per_batch, 256))
    place = f"{shape.name}, {lengths}" + "".join(f", {name}" for name in load)
    yield Row(f"{place}: batches", f"{len(list(all_batches))} of {all_batches.tokens_per_batch}", "", str(all_batches))
    peaks: dict[str, float] = {}
    for method in methods:
        with guarded(f"{place}: {method}") as rows:
            peaks[method] = peak(card, sides, method, all_batches)
        yield from rows
    found = take_turns(sides, tuple(peaks), all_batches, end)
    yield from compared(card, place, sides, found, goal)
    yield from peaks_compared(card, place, peaks)
    yield from shares(card, place, found)


def with_liger(shape: Shape, card: Card, **settings: Any) -> Iterator[Row]:
    """Rates of a model with Liger's kernels, which are put into the code of its class, too, and taken out again."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    try:
        yield from rates(card, shape, methods=("plain", "extract"), liger=True, **settings)
    finally:
        vars(modeling_llama).update(before)


def part_of(batches: Batches, method: str) -> Batches:
    """What a slow method gets: some of the responses, evenly over their lengths."""
    responses = len(batches.tokenized.ids)
    taken = min(FEWER_RESPONSES.get(method, responses), responses)
    order = np.argsort(batches.tokenized.lengths, kind="stable")
    return dataclasses.replace(batches, tokenized=batches.tokenized.take(evenly(order, taken)))


def take_turns(
    sides: CardMethods, methods: tuple[str, ...], batches: Batches, end: float
) -> dict[str, list[tuple[float, int, float]]]:
    """(seconds, tokens, FLOP) of each method in each round, until five rounds are done or time is out.

    Back and forth, so that nobody always follows the same one; first the two that matter most, then the others. Before,
    each goes through all of its batches once: the first of a shape takes long.
    """
    parts = {method: part_of(batches, method) for method in methods}
    found: dict[str, list[tuple[float, int, float]]] = {method: [] for method in methods}
    for some in (methods[:2], methods[2:]):
        for method in some:
            getattr(sides, method)(parts[method])
        for turn in range(sides.card.choose(ROUNDS, 2)):
            for method in some[:: -1 if turn % 2 else 1]:
                if turn >= FEWER_ROUNDS.get(method, ROUNDS) or (turn and time.time() > end):
                    continue
                start = sides.now()
                told = getattr(sides, method)(parts[method])
                seconds = sides.now() - start if told is None else told
                tokenized = parts[method].tokenized
                found[method].append((seconds, int(tokenized.lengths.sum()), sides.flops(tokenized)))
    return found


def compared(
    card: Card, place: str, sides: CardMethods, found: dict[str, list[tuple[float, int, float]]], goal: float | None
) -> Iterator[Row]:
    """Rates against the peers', and against that of the card."""
    for against in PEERS:
        if against.ours not in found:
            continue
        name = f"{place}: {OURS[against.ours]}"
        if against.peer.startswith("bergson") and not optional("bergson"):
            if against.peer == "bergson":
                yield Row(name, rate(found[against.ours]), against.name, "not installed")
            continue
        if against.peer not in found:
            continue
        ratios = [
            (ours[1] / ours[0]) / (theirs[1] / theirs[0])
            for ours, theirs in zip(found[against.ours], found[against.peer], strict=False)
        ]
        shown = rate(found[against.ours]), against.name, rate(found[against.peer])
        yield Row(name, *shown, spread(ratios), card.goal(against.goal))
    for method, runs in found.items():
        if method in (*OURS, "plain"):
            reached = [flops / seconds / card.matmul_rate for seconds, _, flops in runs]
            name = f"{place}: {OURS.get(method, method)}, share of the card's bf16 rate"
            limit = f"{card.matmul_rate / 1e12:.0f} TFLOP/s"
            wanted = card.goal(goal) if method == "extract" else None
            yield Row(name, f"{statistics.median(reached):.1%}", "a large product", limit, spread(reached), wanted)


def rate(runs: list[tuple[float, int, float]]) -> str:
    median = statistics.median(tokens / seconds for seconds, tokens, _ in runs)
    return f"{median:,.0f} tokens/s, {len(runs)} rounds"


def shares(card: Card, place: str, found: dict[str, list[tuple[float, int, float]]]) -> Iterator[Row]:
    """Where the time of an extraction goes, by differences of what does less of it."""

    def per_token(method: str) -> list[float]:
        return [seconds / tokens for seconds, tokens, _ in found[method]]

    if "capture" in found and "extract" in found:
        cut = [1 - less / more for less, more in zip(per_token("capture"), per_token("extract"), strict=False)]
        yield share_row(card, f"{place}: share of sketches and their copies", cut, 0.03)
    if "plain" in found and "capture" in found:
        ratios = [theirs / ours for ours, theirs in zip(per_token("capture"), per_token("plain"), strict=False)]
        yield Row(
            f"{place}: capture alone", rate(found["capture"]), PEERS[0].name, rate(found["plain"]), spread(ratios)
        )
    if "stored" in found and "extract" in found:
        ratios = [less / more for less, more in zip(per_token("extract"), per_token("stored"), strict=False)]
        shown = rate(found["stored"]), "without a store", rate(found["extract"])
        yield Row(f"{place}: store on disk", *shown, spread(ratios), card.goal(0.95))
        yield share_row(card, f"{place}: share of the store", [1 - each for each in ratios], 0.02)


def share_row(card: Card, name: str, found: list[float], most: float) -> Row:
    """A share of the time; the ratio is that of what it may be to it."""
    ratio = spread([min(most / max(share, 1e-6), 999.0) for share in found])
    return Row(name, f"{statistics.median(found):.1%}", "the whole", f"at most {most:.0%}", ratio, card.goal(1.0))


# Memory


def peak(card: Card, sides: CardMethods, method: str, batches: Batches) -> float:
    """Bytes at most in use over the first batch, of which one model; what is made once is made before."""
    order = np.argsort(batches.tokenized.lengths, kind="stable")
    getattr(sides, method)(dataclasses.replace(batches, tokenized=batches.tokenized.take(order[:4])))
    first = dataclasses.replace(batches, tokenized=batches.tokenized.take(next(iter(batches))))
    model = sum(parameter.nbytes for parameter in sides.model.parameters())
    if method in ("stored", *FEWER_RESPONSES):  # other data, or other batches
        return math.nan
    if not card.there:
        before = peak_memory()
        getattr(sides, method)(first)
        return model + 1e6 * (peak_memory() - before)
    card.free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    getattr(sides, method)(first)
    return model + torch.cuda.max_memory_allocated() - before


def peaks_compared(card: Card, place: str, peaks: dict[str, float]) -> Iterator[Row]:
    for ours, (peer, goal) in itertools.product(OURS, (("dpo_step", 1.0), ("plain", None))):
        if ours in peaks and peer in peaks:
            shown = [f"{peaks[method] / 1e9:.2f} GB" for method in (ours, peer)]
            named = {"dpo_step": "TRL's DPO step", "plain": "PEFT, a backward a batch"}[peer]
            ratio = spread([peaks[peer] / peaks[ours]])
            yield Row(f"{place}: peak memory, {OURS[ours]}", shown[0], named, shown[1], ratio, card.goal(goal))


# Batch sizes


def batch_sizes(card: Card, shape: Shape, lengths: str, *, tokens: int, sizes: tuple[int, ...]) -> Iterator[Row]:
    """The best rate of each side over sizes of batches."""
    shape = shape.on(card)
    data = Data.make(card, shape, lengths, tokens=card.choose(tokens, 400))
    sides = CardMethods(card, shape, data)
    best: dict[str, float] = {}
    for size in sizes:
        for method in ("extract", "plain"):
            name = f"{shape.name}, {lengths}: {method} in batches of {size}"
            with guarded(name) as rows:
                batches = Batches(lengths, data.tokenized, card.choose(size, size // 64))
                getattr(sides, method)(batches)
                found = take_turns(sides, (method,), batches, time.time() + min(4, card.left))[method]
                rows.append(Row(name, rate(found), "", ""))
                reached = statistics.median(tokens / seconds for seconds, tokens, _ in found)
                best[method] = max(best.get(method, 0.0), reached)
            yield from rows
            card.free()
    if len(best) == 2:
        shown = [f"{best[method]:,.0f} tokens/s" for method in ("extract", "plain")]
        ratio = (best["extract"] / best["plain"],) * 3
        name = f"{shape.name}, {lengths}: fresh LoRA, best size of each"
        yield Row(name, shown[0], PEERS[0].name, shown[1], ratio, card.goal(1 / 1.05))


# Profile


def profile(card: Card, shape: Shape, lengths: str, *, tokens: int) -> Iterator[Row]:
    """One extraction under torch.profiler: the largest kernels to a file, and how busy the device is."""
    name, shape = shape.name, shape.on(card)
    data = Data.make(card, shape, lengths, tokens=card.choose(tokens, 400))
    sides = CardMethods(card, shape, data)
    batches = Batches(lengths, data.tokenized, card.choose(TOKENS_PER_BATCH, 256))
    sides.extract(batches)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities[: 1 + card.there]) as profiler:
        start = sides.now()
        sides.extract(batches)
        wall = 1e6 * (sides.now() - start)
    events = profiler.key_averages()
    kernels = [event for event in events if str(event.device_type).endswith("CUDA")]
    busy = sum(event.self_device_time_total for event in kernels)
    copies = sum(event.self_device_time_total for event in kernels if "Memcpy" in event.key)
    launched = sum(event.count for event in kernels)
    order = "self_device_time_total" if card.there else "self_cpu_time_total"
    text = f"{shape.name}, {batches}\n{wall / 1e6:.3f} s, device busy {busy / wall:.1%}, copies {copies / wall:.1%}\n\n"
    text += str(events.table(sort_by=order, row_limit=15, max_name_column_width=100))
    only = sorted(kernels, key=lambda event: -event.self_device_time_total)[:15]
    text += "\n\nkernels alone\n" + "\n".join(
        f"{event.self_device_time_total / wall:7.2%} {event.count:7d} {event.key[:150]}" for event in only
    )
    (card.output / f"profile-{name}.txt").write_text(text + "\n")
    place = f"{shape.name}, {lengths}, under the profiler"
    yield Row(f"{place}: device busy", f"{busy / wall:.1%}", "", f"{launched} launches in {wall / 1e6:.2f} s")
    yield Row(f"{place}: copies", f"{copies / wall:.1%}", "", f"profile-{name}.txt")


EVERYTHING = ("plain", "extract", "capture", "extract_full", "extract_trained", "stored", "one_by_one", "dpo_step")


def measurements() -> dict[str, Measurement]:
    """By name, the most important first."""
    bergson = ("bergson", "bergson_frozen") if optional("bergson") else ()
    whole, short = (*EVERYTHING[:-1], *bergson, "dpo_step"), ("plain", "extract", "extract_full", "capture")
    one, small, half, seven = (SHAPES[name] for name in ("1B", "135M", "0.5B", "7B"))

    def measure(shape: Shape, lengths: str, methods: tuple[str, ...], **chosen: Any) -> Callable[[Card], Iterator[Row]]:
        return functools.partial(rates, shape=shape, lengths=lengths, methods=methods, **chosen)

    found = {
        "1B long": measure(one, "long", whole, tokens=49_000, seconds=85, goal=0.45),
        "profile 1B": functools.partial(profile, shape=one, lengths="long", tokens=30_000),
        "135M demo": measure(small, "demo", whole, tokens=98_000, seconds=45, goal=0.20),
        "7B long": measure(seven, "long", (*short, "dpo_step"), tokens=16_000, seconds=30, per_batch=4096, goal=0.45),
        "profile 135M": functools.partial(profile, shape=small, lengths="demo", tokens=50_000),
        "1B long, with Liger": functools.partial(with_liger, one, lengths="long", tokens=49_000, seconds=20),
        "batch sizes 135M": functools.partial(
            batch_sizes, shape=small, lengths="demo", tokens=130_000, sizes=(16384, 32768, 65536)
        ),
        "0.5B long": measure(half, "long", whole, tokens=49_000, seconds=35),
        "1B demo": measure(one, "demo", (*short, "dpo_step"), tokens=65_000, seconds=20, goal=0.45),
        "135M long": measure(small, "long", short, tokens=100_000, seconds=15, goal=0.20),
        "batch sizes 1B": functools.partial(
            batch_sizes, shape=one, lengths="long", tokens=65_000, sizes=(8192, 16384, 32768)
        ),
    }
    if not torch.cuda.is_available():  # one of each kind
        return {name: found[name] for name in ("1B long", "profile 1B", "0.5B long", "7B long", "batch sizes 1B")}
    if not optional("liger_kernel"):
        del found["1B long, with Liger"]
    if optional("bitsandbytes"):
        found["7B in 4 bits, long"] = measure(
            seven, "long", ("plain", "extract"), tokens=16_000, seconds=20, per_batch=4096, four_bits=True
        )
    return found
