"""``bpo collect`` and ``bpo doctor``: the gradients of all responses into a store, and what that will cost."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.arguments import (
    add_dataset,
    add_fields,
    add_model,
    add_saying,
    check_dataset,
    check_writable,
    dataset_of,
    examples,
    say,
    settings,
    silent,
)
from bpo.system.paths import check_apart, check_path

if TYPE_CHECKING:
    from bpo.cli.arguments import Commands
    from bpo.config import SelectConfig


def add_collect(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "collect",
        help="extract the gradients of all responses into a store",
        epilog=examples(
            "bpo collect my-sft-model responses.jsonl --store gradients",
            "bpo collect my-sft-model responses.jsonl --store share-2 --shard 2/4",
        ),
    )
    add_model(command)
    add_dataset(command)
    command.add_argument("--store", type=Path, required=True, help="directory of the gradient store")
    command.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only share I of N, for machines that see no disk in common; bpo store gather joins the shares",
    )
    add_fields(command, "a field of bpo.SelectConfig; repeatable")
    add_dry_run(command)
    add_saying(command)
    command.set_defaults(run=_collect)


def add_doctor(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "doctor",
        help="before a run: what is differentiated, is it sound, what will it cost",
        epilog=examples(
            "bpo doctor my-sft-model responses.jsonl",
            "bpo doctor my-sft-model responses.jsonl --set dtype=bfloat16 --world-size 64",
        ),
    )
    add_model(command)
    add_dataset(command)
    command.add_argument(
        "--world-size",
        "--world_size",
        type=int,
        metavar="N",
        help="say what each stage of select takes with N processes like this one: time, memory, disk, network",
    )
    add_fields(command, "as for select")
    add_saying(command)
    command.set_defaults(run=_doctor)


def add_dry_run(command: argparse.ArgumentParser) -> None:
    """Adds ``--dry_run``."""
    command.add_argument(
        "--dry_run", action="store_true", help="read the data and say what a run would take, without running the model"
    )


def _shard(text: str) -> tuple[int, int]:
    """Reads ``2/4``."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 2/4")
    return int(found[1]), int(found[2])


def _collect(options: argparse.Namespace) -> None:
    check_apart({"--store": options.store}, {"dataset": options.dataset, "model": options.model})
    config = settings(options)
    check_writable("--store", options.store)
    check_path(options.model)
    check_dataset(options)
    if options.dry_run:
        say_costs(options, config)
        return
    store = bpo.collect_gradients(
        options.model,
        dataset_of(options),
        store=options.store,
        shard=options.shard,
        config=config,
        progress=not silent(options),
    )
    say(options, lambda: str(store), lambda: {"store": options.store, "responses": len(store)})


def _doctor(options: argparse.Namespace) -> None:
    config = settings(options)
    check_path(options.model)
    check_dataset(options)
    diagnosis = bpo.doctor(options.model, dataset_of(options), config=config, world_size=options.world_size)
    say(options, lambda: str(diagnosis), lambda: {**dataclasses.asdict(diagnosis), "problems": diagnosis.problems})


def say_costs(options: argparse.Namespace, config: SelectConfig) -> None:
    """Says what of a run is known without the model: rows, tokens, memory of the weights, disk, the least time."""
    from bpo.data.read import read_configured
    from bpo.data.tokenizers import load_tokenizer
    from bpo.data.tokens import tokenize_configured
    from bpo.policy.models import window
    from bpo.store.gradient_store import RECORD, row_bytes

    candidates = read_configured(dataset_of(options), dataclasses.replace(config, token_weights=None))
    costs: dict[str, Any] = {"skipped": candidates.skipped.counts()}
    if options.model is None:
        responses = len(candidates.responses)
    else:
        tokenizer = load_tokenizer(options.model, None, config)
        candidates, tokenized = tokenize_configured(candidates, tokenizer, window(options.model, config), config)
        responses = len(tokenized.ids)
        costs |= {"tokens": int(tokenized.lengths.sum()), "longest": int(tokenized.lengths.max())}
        costs |= {"truncated": tokenized.truncated, "parameters": _parameters(Path(options.model).expanduser())}
    costs |= {"prompts": len(candidates.prompts), "responses": responses, "pairs": len(candidates.pairs)}
    costs["store_bytes"] = responses * (row_bytes(config.sketch_dtype, config.sketch_dim) + RECORD.itemsize)
    if costs.get("parameters"):
        costs["weights_bytes"] = costs["parameters"] * (4 if config.dtype == "float32" else 2)
        costs["matmul_flops"] = _matmul_flops(config)
        # A forward is 2 FLOP a parameter and token, and so is a backward to the activations alone.
        costs["least_seconds"] = 4 * costs["parameters"] * costs["tokens"] / costs["matmul_flops"]
    say(options, lambda: _costs(options, costs), lambda: costs)


def _matmul_flops(config: SelectConfig) -> float:
    """The rate of products of large matrices on the device that the model would run on, in FLOP a second."""
    import torch

    from bpo.policy.models import device_for

    device = device_for(config)
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    rate, begin = 0.0, time.perf_counter()
    while time.perf_counter() < begin + 0.5:
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # which waits for it
        rate = max(rate, 2 * size**3 / (time.perf_counter() - start))
    return rate


def _parameters(model: Path) -> int | None:
    """The parameters of a saved model, by the headers of its files; None where it has none."""
    from safetensors import safe_open

    count = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118, for it is no mapping
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                count += size
    return count or None


def _costs(options: argparse.Namespace, costs: dict[str, Any]) -> str:
    from bpo.report.wording import byte_size, duration

    lines = [
        f"data     {costs['prompts']:,} prompts, {costs['responses']:,} responses, {costs['pairs']:,} candidate pairs",
        *(f"unusable {count} × {reason}" for reason, count in costs["skipped"].items()),
    ]
    if "tokens" in costs:
        lines.append(f"tokens   {costs['tokens']:,}; longest {costs['longest']:,}; {costs['truncated']} responses cut")
    if "weights_bytes" in costs:
        lines.append(
            f"memory   {byte_size(costs['weights_bytes'])} for the {costs['parameters']:,} parameters, and what a "
            "batch takes"
        )
    lines.append(f"disk     {byte_size(costs['store_bytes'])} for the gradients")
    if options.model is not None:
        measure = f"bpo doctor {shlex.quote(options.model)} {shlex.quote(options.dataset)}"
        least = "as the model runs, which this did not"
        if "least_seconds" in costs:
            rate = f"{costs['matmul_flops'] / 1e9:,.0f} GFLOP/s"
            least = f"at least {duration(costs['least_seconds'])}, what products of matrices take at {rate}"
        lines.append(f"time     {least}; {measure} measures it within a minute")
    return "\n".join(lines)
