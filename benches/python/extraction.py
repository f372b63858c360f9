"""Gradients of every response of a real model beside the ways to get them without bpo, in one run: prints one table.

    python benches/python/extraction.py            # some 15 minutes on 2 cores
    python benches/python/extraction.py --short    # under 90 seconds
    python benches/python/extraction.py --only equal --rounds 9 --json FILE

The model is SmolLM2-135M-Instruct with LoRA (r = 8) on every linear layer but the head, in float32 on the CPU; where
there is a GPU, there in float32 and in bfloat16. Every side gets the same batches of the same tokens. The sides take
turns; a ratio is the median over the rounds, with the least and the greatest, of the peer's time (or memory) over ours,
so that more is better everywhere: to cost at most 1.08 times as much as a peer is to have a ratio of at least 1 / 1.08.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers

import bpo
from bpo import _core
from bpo.data.tokenizers import padding_id
from bpo.data.tokens import TokenizedResponses, tokenize_candidates
from bpo.gradients.capture import Plan, sum_gradients
from bpo.gradients.choose import choose_features
from bpo.gradients.plan import find_plan
from bpo.policy.batches import batches_by_tokens
from bpo.policy.logprobs import Forward, completion_logps
from bpo.policy.state import inference_state
from bpo.sketching.batches import Sketching
from table import Row, optional, peak_memory, printed, shown_time, spread

DEMO = Path(__file__).resolve().parents[2] / "demo"
# All that bergson needs beyond what bpo does; a plain install asks for much more.
BERGSON = "pip install --no-deps bergson simple-parsing docstring-parser jaxtyping ml-dtypes petname"
RANK = 8


# Data


@dataclass(frozen=True, eq=False)
class Batches:
    """Responses in the batches that bpo makes of them."""

    name: str
    tokenized: TokenizedResponses
    tokens_per_batch: int

    def __str__(self) -> str:
        return f"{self.name}: {len(self.tokenized.ids)} responses, {self.tokenized.lengths.sum()} tokens"

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(batches_by_tokens(self.tokenized.lengths, self.tokens_per_batch))


class Data:
    """The demo's prompts and what the model really answered."""

    def __init__(self, model: str) -> None:
        lines = (DEMO / "data" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
        records = [{key: json.loads(line)[key] for key in ("prompt", "responses", "scores")} for line in lines]
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.pad_id = padding_id(tokenizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bpo.InvalidDataWarning)
            candidates = bpo.read_candidates(records)
            self.candidates, self.tokenized = tokenize_candidates(candidates, tokenizer, 1024, on_invalid="skip")

    def equal(self, count: int, width: int) -> Batches:
        """One batch of sequences of one length, every token of which counts but the first."""
        stream = list(itertools.chain.from_iterable(self.tokenized.ids))
        ids = [stream[index * width : (index + 1) * width] for index in range(count)]
        tokenized = dataclasses.replace(
            self.tokenized.take(np.arange(count)), ids=ids, prompt_lengths=np.ones(count, dtype=np.int64)
        )
        return Batches(f"{count} x {width}", tokenized, count * width)

    def mix(self, count: int, tokens_per_batch: int) -> Batches:
        """Responses from evenly over the data."""
        rows = evenly(np.arange(len(self.tokenized.ids)), count)
        return Batches("demo", self.tokenized.take(rows), tokens_per_batch)

    def prompts(self, count: int, responses: int) -> Batches:
        """The first responses of prompts from evenly over those that have so many; a prompt's are neighbours."""
        prompts = self.candidates.prompt_of_response[self.tokenized.response_of]
        enough = np.flatnonzero(np.bincount(prompts) >= responses)
        rows = [np.flatnonzero(prompts == prompt)[:responses] for prompt in evenly(enough, count)]
        name = f"{count} prompts of the demo, {responses * (responses - 1) // 2} pairs each"
        return Batches(name, self.tokenized.take(np.concatenate(rows)), 1024)


def evenly(values: np.ndarray, count: int) -> np.ndarray:
    return values[np.arange(count) * len(values) // count]


# What is compared


class Methods:
    """Each takes batches and goes through them once."""

    def __init__(self, data: Data, dtype: str, settings: argparse.Namespace) -> None:
        self.data, self.dtype, self.threads, self._path = data, dtype, settings.threads, settings.model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.sketching = 0.0  # seconds spent with sketches since last set to 0
        self._plans: dict[Any, Plan] = {}

    def _load(self) -> Any:
        dtype = getattr(torch, self.dtype)
        return transformers.AutoModelForCausalLM.from_pretrained(self._path, dtype=dtype).to(self.device).eval()

    @functools.cached_property
    def model(self) -> Any:
        return self._load()

    @functools.cached_property
    def adapted(self) -> Any:
        """The model with a LoRA adapter on every linear layer but the head, B not zero, as after some training."""
        settings = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        adapted = peft.get_peft_model(self._load(), settings).eval()
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=1e-3)
        return adapted

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def extract(self, batches: Batches) -> None:
        """Gradients of a fresh adapter's B, sketched."""
        self._extract(self.model, batches)

    def extract_trained(self, batches: Batches) -> None:
        """Gradients of A and B of the adapter that the model has, sketched."""
        self._extract(self.adapted, batches)

    def _extract(self, model: Any, batches: Batches) -> None:
        """What gradients.collect does, but for the store."""
        if model not in self._plans:
            config = bpo.SelectConfig(lora_rank=RANK)
            features = choose_features(model, config)
            with inference_state(model):
                self._plans[model] = find_plan(features, Forward(model, self.data.tokenized, self.data.pad_id))
        with inference_state(model), Sketching(_core.Sketcher(1024), self.threads) as sketching:
            previous, forward = None, Forward(model, batches.tokenized, self.data.pad_id)
            for rows in batches:
                sketches = sketching.batch(len(rows))
                consume = functools.partial(self._timed, sketches.consume)
                sum_gradients(forward, self._plans[model], rows, consume)
                if previous is not None:
                    self._timed(previous.rows)
                previous = sketches
            self._timed(previous.rows)

    def _timed(self, run: Callable[..., object], *arguments: Any) -> None:
        start = time.perf_counter()
        run(*arguments)
        self.sketching += time.perf_counter() - start

    def plain(self, batches: Batches) -> None:
        """One forward and backward a batch, as in training: one gradient of the adapter for the whole batch."""
        for rows in batches:
            self._backward(batches, rows)

    def one_by_one(self, batches: Batches) -> None:
        """A forward and backward a response."""
        for row in range(len(batches.tokenized.ids)):
            self._backward(batches, np.array([row]))

    def _backward(self, batches: Batches, rows: np.ndarray) -> None:
        completion_logps(self.adapted, batches.tokenized, rows, self.data.pad_id).logps.sum().backward()
        self.adapted.zero_grad()

    def dpo_pairs(self, batches: Batches) -> None:
        """A forward and backward a pair of each four responses, with DPO's loss; the reference is taken as known."""
        for first in range(0, len(batches.tokenized.ids), 4):
            for pair in itertools.combinations(range(first, first + 4), 2):
                logps = completion_logps(self.adapted, batches.tokenized, np.array(pair), self.data.pad_id).logps
                margin = logps[0] - logps[1]
                (-F.logsigmoid(0.1 * (margin - margin.detach()))).backward()
                self.adapted.zero_grad()

    def bergson(self, batches: Batches) -> None:
        """bergson's gradients of the same layers' weights, randomly projected to 16 x 16 a layer, kept in memory.

        The embeddings require a gradient, as bergson has it, so that its hooks are called.
        """
        with inference_state(self.model):
            self.model.get_input_embeddings().requires_grad_(True)
            self._bergson(batches)()

    def bergson_frozen(self, batches: Batches) -> None:
        """The same without the cost of that gradient: the embedded tokens require one in place of their table."""
        table = self.model.get_input_embeddings()
        with inference_state(self.model):
            table.requires_grad_(True)
            run = self._bergson(batches)
            table.requires_grad_(False)
            handle = table.register_forward_hook(lambda _module, _args, output: output.requires_grad_(True))
            run()
            handle.remove()

    @functools.cached_property
    def _bergson_projections(self) -> Any:
        from bergson import GradientProcessor

        return GradientProcessor(projection_dim=16)

    @functools.cache  # noqa: B019
    def _bergson(self, batches: Batches) -> Callable[[], None]:
        from bergson import IndexConfig, InMemoryCollector
        from bergson.collector.collector import fwd_bwd_factory
        from bergson.data import pad_and_tensor
        from datasets import Dataset

        ids, prompt_lengths = batches.tokenized.ids, batches.tokenized.prompt_lengths
        labels = [[-100] * length + row[length:] for row, length in zip(ids, prompt_lengths, strict=True)]
        config = IndexConfig(run_path="unused", projection_dim=16, loss_reduction="sum")
        collector = InMemoryCollector(
            model=self.model.base_model,  # without the head
            data=Dataset.from_dict({"input_ids": ids, "labels": labels}),
            cfg=config,
            processor=self._bergson_projections,
        )
        forward_backward = fwd_bwd_factory(config)

        def run() -> None:
            for rows in batches:
                inputs, targets, _, mask = pad_and_tensor(
                    [ids[row] for row in rows],
                    [labels[row] for row in rows],
                    device=self.model.device,
                    sync_max_len=False,
                )
                with collector.with_batch(mask):
                    losses = forward_backward(self.model, inputs, targets, {})
                collector.process_batch(rows.tolist(), losses=losses)

        return run


# Measuring


@dataclass(frozen=True)
class Peer:
    """What one of our methods is held against, and the ratio that is asked for."""

    method: str
    name: str
    goal: float | None = None
    ours: str = "extract"


BATCH_PEERS = [
    Peer("plain", "PEFT, a backward a batch", 1 / 1.08),
    Peer("one_by_one", "PEFT, a backward a response", 1.3),
    Peer("bergson", "bergson, 16 x 16 a layer", 1.0),
    Peer("bergson_frozen", "the same, embeddings frozen"),
    Peer("plain", "PEFT, a backward a batch", 1 / 1.08, ours="extract_trained"),
]
PAIR_PEERS = [Peer("dpo_pairs", "PEFT, a DPO backward a pair", 2.5)]
MEMORY_PEERS = [
    Peer("plain", "PEFT, a backward a batch", 1 / 1.2),
    Peer("bergson", "bergson, 16 x 16 a layer"),
    Peer("plain", "PEFT, a backward a batch", 1 / 1.2, ours="extract_trained"),
]
OURS = {"extract": "fresh LoRA", "extract_trained": "trained LoRA"}


def installed(peers: list[Peer]) -> list[Peer]:
    return [peer for peer in peers if not peer.method.startswith("bergson") or optional("bergson")]


def methods_of(peers: list[Peer]) -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable((peer.ours, peer.method) for peer in peers)))


def times(batches: Batches, peers: list[Peer], methods: Methods, rounds: int) -> Iterator[Row]:
    """One row a peer, and one for the share of the sketches in our own time."""
    present = installed(peers)
    taking_turns = methods_of(present)
    seconds: dict[str, list[float]] = {method: [] for method in taking_turns}
    sketching: dict[str, list[float]] = {method: [] for method in taking_turns}
    for method in taking_turns:
        getattr(methods, method)(methods.data.equal(4, 16))  # what is made at the first call
    for turn in range(rounds):
        # Back and forth, so that nobody always follows the same one.
        for method in taking_turns[:: -1 if turn % 2 else 1]:
            methods.sketching = 0.0
            start = methods.now()
            getattr(methods, method)(batches)
            seconds[method].append(methods.now() - start)
            sketching[method].append(methods.sketching / seconds[method][-1])
    for ours in dict.fromkeys(peer.ours for peer in peers):
        name = f"{batches}, {OURS[ours]}"
        for peer in (peer for peer in peers if peer.ours == ours):
            if peer not in present:
                yield Row(name, "", peer.name, f"not installed: {BERGSON}")
                continue
            ratios = [theirs / mine for mine, theirs in zip(seconds[ours], seconds[peer.method], strict=True)]
            shown = shown_time(seconds[ours]), peer.name, shown_time(seconds[peer.method])
            yield Row(name, *shown, spread(ratios), peer.goal)
        yield Row(name, f"{statistics.median(sketching[ours]):.1%}", "share of the sketch", "")


def memory(methods: Methods, settings: argparse.Namespace) -> Iterator[Row]:
    """By how much each method raises the peak of a process of its own, over one batch of 8 x 128 tokens."""
    peers = installed(MEMORY_PEERS[:1] if settings.short else MEMORY_PEERS)
    # glibc otherwise keeps freed blocks for later, and how many is left to chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    peaks = {}
    for method in methods_of(peers):
        command = [sys.executable, __file__, "--peak", method, methods.dtype]
        command += ["--model", settings.model, "--threads", str(settings.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        peaks[method] = float(done.stdout)
    for peer in peers:
        ours, theirs = peaks[peer.ours], peaks[peer.method]
        name = f"peak memory of {methods.data.equal(8, 128)}, {OURS[peer.ours]}"
        yield Row(name, f"{ours:.0f} MB", peer.name, f"{theirs:.0f} MB", spread([theirs / ours]), peer.goal)


def peak(method: str, batches: Batches, methods: Methods) -> float:
    """Megabytes that a run over batches takes on top of the loaded model."""
    run = getattr(methods, method)
    run(methods.data.equal(1, 8))  # what is made at the first call, and weights that are read when first used
    if methods.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batches)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = peak_memory()
    run(batches)
    return peak_memory() - before


# The table


def equal(methods: Methods, settings: argparse.Namespace) -> Iterator[Row]:
    if settings.short:
        return times(methods.data.equal(4, 64), BATCH_PEERS[:3], methods, settings.rounds)
    return times(methods.data.equal(8, 128), BATCH_PEERS, methods, settings.rounds)


def demo(methods: Methods, settings: argparse.Namespace) -> Iterator[Row]:
    return times(methods.data.mix(25, 1024), BATCH_PEERS, methods, settings.rounds)


def pairs(methods: Methods, settings: argparse.Namespace) -> Iterator[Row]:
    return times(methods.data.prompts(1 if settings.short else 4, 4), PAIR_PEERS, methods, settings.rounds)


CASES = {"equal": equal, "demo": demo, "pairs": pairs, "memory": memory}
# Left to the full mode.
LONG = {"demo"}


def default_model() -> str:
    """The demo's policy, made on first use."""
    sys.path.insert(0, str(DEMO))
    import models

    return str(models.policy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer tokens and rounds, under 90 seconds")
    parser.add_argument("--only", default="", metavar="PATTERN", help=f"cases to run, of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, help="how often each side is timed; 3 in short mode, else 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side; all cores by default")
    parser.add_argument("--model", help="another causal language model, by path")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    settings.model = settings.model or default_model()
    settings.rounds = settings.rounds or (3 if settings.short else 5)
    torch.set_num_threads(settings.threads)
    logging.disable(logging.INFO)  # bergson's list of layers
    transformers.utils.logging.disable_progress_bar()
    data = Data(settings.model)
    if settings.peak:
        method, dtype = settings.peak
        print(peak(method, data.equal(8, 128), Methods(data, dtype, settings)))
        return
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"The machine is busy (load {load:.1f}): do not trust these ratios.", file=sys.stderr)
    rows = []
    for dtype in ("float32", "bfloat16") if torch.cuda.is_available() else ("float32",):
        methods = Methods(data, dtype, settings)
        for name, case in CASES.items():
            if re.search(settings.only, name) and not (settings.short and name in LONG):
                start = time.perf_counter()
                rows += [dataclasses.replace(row, name=f"{row.name}, {dtype}") for row in case(methods, settings)]
                print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(printed(rows))
    if settings.json:
        report = {
            "device": methods.device,
            "load_before": load,
            "threads": settings.threads,
            "short": settings.short,
            "versions": {package: version(package) for package in ("bpo", "torch", "transformers", "peft", "bergson")},
            "rows": [{**dataclasses.asdict(row), "met": row.met} for row in rows],
        }
        Path(settings.json).write_text(json.dumps(report, indent=1))


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


if __name__ == "__main__":
    main()
