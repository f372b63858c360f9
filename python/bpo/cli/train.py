"""``bpo train``: select, then train with TRL."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.arguments import (
    add_dataset,
    add_fields,
    add_model,
    check_dataset,
    check_writable,
    dataset_of,
    examples,
    place,
    settings,
)
from bpo.cli.parser import did_you_mean
from bpo.cli.select import add_choice, check_needs, store_beside
from bpo.system.paths import check_apart, check_path

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Sequence

    from bpo.cli.arguments import Commands

# The files that declare what HfArgumentParser makes options of.
_DECLARED = {
    "bpo": ["training/config.py", "training/weighting.py"],
    "trl": ["trainer/base_config.py", "trainer/dpo_config.py", "trainer/model_config.py"],
    "transformers": ["training_args.py"],
}


def add_train(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser(
        "train",
        help="select, then train with TRL's DPOTrainer on what was selected",
        description="Beside the options below it takes those of TRL's DPOConfig and ModelConfig, such as "
        "--learning_rate 1e-6, --beta 0.05, --use_peft or --reselect_strategy epoch (trl dpo --help has all).",
        epilog=examples(
            "bpo train my-sft-model responses.jsonl --budget 5000 --output_dir out",
            "bpo train my-sft-model responses.jsonl --budget 0.2 --output_dir out --use_peft --learning_rate 1e-5",
        ),
    )
    command.passes_on = True
    add_model(command)
    add_dataset(command)
    add_choice(command)
    command.add_argument("--output_dir", required=True, help="directory for the trained model")
    command.add_argument(
        "--store", type=place, help="of the gradients (default: beside --output_dir, as OUTPUT_DIR-gradients)"
    )
    add_fields(command, "a field of bpo.SelectConfig that TRL has no option for; repeatable")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if known := declared_options():  # before TRL is imported, which takes a dozen seconds
        _check_spelling(options.more, known)
    if options.store is None:
        options.store = store_beside(options.output_dir)
    check_apart(
        {"--output_dir": options.output_dir, "--store": options.store},
        {"dataset": options.dataset, "model": options.model, "--target": options.target},
    )
    check_needs(options, settings(options))
    check_writable("--output_dir", options.output_dir)
    check_path(options.model)
    check_dataset(options)
    args, model = _read(options)
    from trl import get_peft_config, get_quantization_config

    own = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
    args.model_init_kwargs = {
        **{name: value for name, value in own.items() if value is not None},
        **(args.model_init_kwargs or {}),
    }
    trainer = bpo.BPOTrainer(
        options.model,
        args=args,
        train_dataset=dataset_of(options),
        target=options.target,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    if trainer.accelerator.is_main_process:
        print(trainer.selection.summary())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if trainer.accelerator.is_main_process:
        print(f"\nmodel    {shlex.quote(str(args.output_dir))}")


def _check_spelling(words: Sequence[str], known: Collection[str]) -> None:
    """Checks that each option is among those that there are.

    Raises:
        ValueError: One that neither bpo nor TRL has.
    """
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name.removeprefix("no_") not in known:
            raise ValueError(f"--{name}: neither bpo train nor TRL has such an option{did_you_mean(name, known)}")


def declared_options() -> set[str]:
    """Returns the fields of the configurations that TRL reads, as their source declares them, or none."""
    names: set[str] = set()
    for package, files in _DECLARED.items():
        spec = importlib.util.find_spec(package)
        for file in files:
            path = Path(spec.submodule_search_locations[0], file) if spec and spec.submodule_search_locations else None
            if path is None or not path.is_file():
                return set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
    return names


def _read(options: argparse.Namespace) -> Any:
    """Reads the options of TRL.

    Raises:
        ValueError: One that neither bpo nor TRL has.
    """
    from transformers import HfArgumentParser
    from trl import ModelConfig

    kinds = (bpo.BPOConfig, ModelConfig)
    _check_spelling(options.more, [field.name for kind in kinds for field in dataclasses.fields(kind)])
    given = {"output_dir": options.output_dir, "budget": options.budget, "strategy": options.strategy}
    given |= {"store": options.store, "breadth": options.breadth, "model_name_or_path": options.model}
    words = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    if options.set:
        from bpo.cli.arguments import fields

        words += ["--select_config", json.dumps(fields(options))]
    more = []
    for word in options.more:
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        more.append(f"--{name}{equals}{value}" if word.startswith("--") else word)
    args, model, rest = HfArgumentParser(kinds).parse_args_into_dataclasses(
        [*words, *more], return_remaining_strings=True
    )
    if rest:
        raise ValueError(f"{rest[0]}: is one argument too many for bpo train")
    return args, model
