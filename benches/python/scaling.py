"""How extraction scales with processes, on the cores of this machine: ``python benches/python/scaling.py``.

Strong: as many responses for any number of processes. Weak: as many for each. A thread of PyTorch and one of the core
for each process, so that no more than the cores of the machine should be asked for. The time is that from when all
processes have come until the store is whole, with whatever each does for itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests/python/helpers"))

from job import context, environment, free_port

WORDS = "red green blue one two three cat dog bird sun moon star tea milk bread north south east west".split()  # noqa: SIM905


def data(n_prompts: int) -> list[dict]:
    """Eight responses to each prompt, of 5 to 60 words."""
    generator = np.random.default_rng(0)

    def sentence(low: int, high: int) -> str:
        return " ".join(generator.choice(WORDS, generator.integers(low, high)))

    return [
        {
            "prompt": f"{index} {sentence(5, 40)}?",
            "responses": [f" {number} {sentence(5, 60)}" for number in range(8)],
            "scores": generator.permutation(8).astype(float).tolist(),
        }
        for index in range(n_prompts)
    ]


def model_and_tokenizer():
    """A Llama of 8M parameters with random weights."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        pad_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def member(rank: int, size: int, port: int, n_prompts: int, store: str, found: multiprocessing.SimpleQueue) -> None:
    """One process of a job; tells the seconds from when all have come."""
    os.environ.update(environment(rank, size, port))
    import torch

    import bpo
    from bpo.world.world import world

    torch.set_num_threads(1)
    model, tokenizer = model_and_tokenizer()
    rows = data(n_prompts)
    config = bpo.SelectConfig(tokens_per_batch=256, threads=1)  # blocks of 2048 tokens
    world().check_same({}, 600)
    begin = time.perf_counter()
    bpo.collect_gradients(model, rows, processing_class=tokenizer, store=store, config=config, progress=False)
    found.put(time.perf_counter() - begin)


def seconds(size: int, n_prompts: int) -> float:
    """The time of the slowest process."""
    server = context()  # has imported everything
    found = server.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        given = (size, free_port(), n_prompts, str(Path(directory) / "store"), found)
        members = [server.Process(target=member, args=(rank, *given)) for rank in range(size)]
        for each in members:
            each.start()
        for each in members:
            each.join()
        if any(each.exitcode for each in members):
            raise SystemExit("a process failed")
        return max(found.get() for _ in members)


def main() -> None:
    """Prints a line for each number of processes, and a JSON of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one round of few prompts")
    options = parser.parse_args()
    if options.short:
        options.prompts, options.rounds = 12, 1
    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(options.rounds):  # in turns, as machines are noisy
        for size in options.processes:
            strong = seconds(size, options.prompts)
            weak = strong if size == 1 else seconds(size, options.prompts * size)
            times.setdefault(("strong", size), []).append(strong)
            times.setdefault(("weak", size), []).append(weak)
    lines = []
    for (kind, size), found in sorted(times.items()):
        ones = times[kind, options.processes[0]]
        ideal = size / options.processes[0] if kind == "strong" else 1.0
        speedup = statistics.median(one / other for one, other in zip(ones, found, strict=True))
        lines.append({"kind": kind, "processes": size, "seconds": statistics.median(found), "share": speedup / ideal})
        print(
            f"{kind:6} {size:3} processes {lines[-1]['seconds']:8.2f} s   {lines[-1]['share']:.2f} of the ideal",
            flush=True,
        )
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
