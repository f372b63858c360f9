"""``bpo select`` and ``bpo reselect``: choose the pairs to train on."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.choices import SEED
from bpo.cli.arguments import (
    add_dataset,
    add_fields,
    add_model,
    add_saying,
    add_tokenizer,
    check_dataset,
    check_writable,
    count_or_fraction,
    dataset_of,
    examples,
    place,
    say,
    settings,
    silent,
)
from bpo.cli.gradients import add_dry_run, say_costs
from bpo.cli.parser import did_you_mean
from bpo.system.paths import check_apart, check_path, is_url, joined
from bpo.world.world import world

if TYPE_CHECKING:
    from bpo.cli.arguments import Commands
    from bpo.cli.parser import Parser
    from bpo.config import SelectConfig

# What `trl dpo` must be told to train for the loss that was selected for; all of them have TRL's defaults here, too.
_OF_THE_LOSS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "use_weighting",
    "max_length",
    "truncation_mode",
)


def add_select(commands: Commands) -> None:
    """Adds the command that chooses with a model."""
    command = commands.add_parser(
        "select",
        help="choose the pairs to train on",
        epilog=examples(
            "bpo select my-sft-model responses.jsonl --budget 5000 --breadth 0.5 --output selection",
            "bpo select my-sft-model HuggingFaceH4/ultrafeedback_binarized --split train_prefs --budget 0.2 "
            "--output selection",
        ),
    )
    add_model(command)
    _add_selection(command)
    stored = command.add_mutually_exclusive_group()
    stored.add_argument(
        "--store",
        type=place,
        help="directory or address of the gradient store, reused when it is there (default: beside --output, as "
        "OUTPUT-gradients)",
    )
    stored.add_argument("--no_store", action="store_true", help="keep no gradients")
    command.set_defaults(run=_run, processing_class=None)


def add_reselect(commands: Commands) -> None:
    """Adds the command that chooses from a gradient store alone."""
    command = commands.add_parser(
        "reselect",
        help="choose again from a gradient store, without the model",
        epilog=examples(
            "bpo reselect gradients responses.jsonl --budget 1000 --output again",
            "bpo reselect gradients responses.jsonl --budget 1000 --strategy matching --output matching",
        ),
    )
    command.add_argument("store", type=place, help="directory or address of the gradient store")
    _add_selection(command)
    add_tokenizer(command)
    command.set_defaults(run=_run, model=None, no_store=False)


def add_choice(command: Parser) -> None:
    """Adds how many pairs of how many prompts are kept, and by what."""
    command.add_argument("--budget", type=count_or_fraction, required=True, help="pairs to keep: a count or a fraction")
    command.add_argument("--breadth", type=count_or_fraction, help="prompts to keep, likewise; all by default")
    command.add_argument(
        "--strategy",
        type=_strategy,
        default="bpo",
        help="bpo, uniform, random, best_worst, matching, margin, two_sigma, air, fused_margin, alignment_potential, "
        "irm, lossdiff, lossdiff_irm, easiest, smallest_margin, bees, less, largest_norm, smallest_norm, coreset, "
        "d_optimal, bald, epig",
    )
    where = "pairs that say where to go, for less, matching, lossdiff and epig: file, directory or hub id"
    command.add_argument("--target", help=where)


def _add_selection(command: Parser) -> None:
    add_dataset(command)
    add_choice(command)
    command.add_argument(
        "--output", "--output_dir", type=place, required=True, help="directory or address for the selection"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the selection that is at --output")
    command.add_argument("--seed", type=_seed, default=SEED, help="of every random choice but the sketch")
    add_fields(command, "a field of bpo.SelectConfig; repeatable")
    add_dry_run(command)
    add_saying(command)


def _strategy(name: str) -> str:
    from bpo.selection.strategies.register import STRATEGIES

    if name not in STRATEGIES:
        meant = did_you_mean(name, STRATEGIES) or f"; there are {', '.join(STRATEGIES)}"
        raise argparse.ArgumentTypeError(f"{name!r} is no strategy{meant}")
    return name


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 2**63 - 1")
    return int(text)


def check_needs(options: argparse.Namespace, config: SelectConfig) -> None:
    """Checks that the strategy has what it needs.

    Raises:
        ValueError: It needs a target.
    """
    from bpo.selection.request import Request

    Request.of(options.strategy, config, 0, target=options.target, store=None, progress=False)


def store_beside(output: str | Path) -> str | Path:
    """Returns where the gradients are kept unless something else is asked for."""
    if is_url(output):
        return f"{os.fspath(output).rstrip('/')}-gradients"
    path = Path(output)
    path = path if path.name else path.resolve()
    return path.with_name(f"{path.name}-gradients")


def _run(options: argparse.Namespace) -> None:
    writes, reads = {"--output": options.output}, {"dataset": options.dataset, "--target": options.target}
    if options.command == "select":
        if options.store is None and not options.no_store:
            options.store = store_beside(options.output)
        check_apart({**writes, "--store": options.store}, {**reads, "model": options.model})
        check_path(options.model)
    else:
        check_apart(writes, reads, {"store": options.store})
    config = settings(options)
    check_needs(options, config)
    check_writable("--output", options.output)
    check_dataset(options)
    if options.dry_run:
        say_costs(options, config)
        return
    world().from_main(lambda: _check_output(options))
    selection = bpo.select(
        options.model,
        dataset_of(options),
        budget=options.budget,
        breadth=options.breadth,
        strategy=options.strategy,
        target=options.target,
        store=options.store,
        processing_class=options.processing_class,
        config=config,
        seed=options.seed,
        progress=not silent(options),
    )
    report = world().from_main(lambda: _saved(selection, options.output))
    places = _places(options, config, report)
    said = "\n".join(f"{name:8} {place if name == 'train' else shlex.quote(place)}" for name, place in places.items())
    say(options, lambda: f"{selection.summary()}\n\n{said}", lambda: {**_values(selection), **places})


def _check_output(options: argparse.Namespace) -> None:
    """Checks that a selection may be saved there, and that none is replaced unasked.

    Raises:
        FileExistsError: There is one, or something else.
    """
    from bpo.selection.saved import check_directory, holds_selection

    check_directory(options.output)
    if not options.overwrite and holds_selection(options.output):
        raise FileExistsError(
            f"--output {shlex.quote(str(options.output))} holds an earlier selection: name another directory, or add "
            "--overwrite to replace it"
        )


def _places(options: argparse.Namespace, config: SelectConfig, report: str | Path) -> dict[str, str]:
    """Where everything is, and how to train on it."""
    if isinstance(options.output, Path):
        dataset = options.output / "dataset"
        places = {"dataset": str(dataset), "train": _trl_command(options, config, dataset)}
    else:
        places = {"selection": str(options.output)}
    if isinstance(options.store, Path) and options.store.exists():
        places["store"] = str(options.store)
    return {**places, "report": str(report)}


def _trl_command(options: argparse.Namespace, config: SelectConfig, dataset: Path) -> str:
    """The command that trains on a selection, for the loss that it was made for, on a machine such as this."""
    from transformers.utils import is_torch_bf16_gpu_available

    # load_dataset takes a path of one part for the id of a data set of the hub, unless it is a directory, as this is.
    words = ["trl", "dpo", "--dataset_name", str(dataset)]
    words += ["--model_name_or_path", options.model or "MODEL", "--output_dir", f"{options.output}-dpo"]
    default = bpo.SelectConfig()
    for name in _OF_THE_LOSS:
        value = getattr(config, name)
        if value != getattr(default, name) and value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    if not is_torch_bf16_gpu_available():  # bfloat16 is what TRL takes unless told otherwise, and refuses then
        words += ["--bf16", "False"]
    return shlex.join(words)


def _values(selection: bpo.Selection) -> dict[str, Any]:
    kept = selection.depth[selection.depth > 0]
    return {
        "strategy": selection.strategy,
        "budget": selection.budget,
        "seed": selection.seed,
        "pairs": selection.fates(),
        "candidates": selection.pairs.num_rows,
        "prompts": len(selection.depth),
        "kept_prompts": len(kept),
        "mean_depth": float(kept.mean()),
        "skipped": {reason: len(places) for reason, places in selection.skipped.items()},
    }


def _saved(selection: bpo.Selection, output: str | Path) -> str | Path:
    """Saves a selection and its report; returns where the report is."""
    selection.save(output)
    report = joined(output, "report.html")
    if isinstance(report, Path):
        return selection.report(report)
    from bpo.store.objects import Objects

    with tempfile.TemporaryDirectory(prefix="bpo-report-") as scratch:
        Objects(str(output)).put("report.html", selection.report(Path(scratch) / "report.html"))
    return report
