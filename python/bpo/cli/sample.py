"""``bpo sample``: several responses to each prompt, from a model or a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import bpo
from bpo.cli.arguments import add_fields, add_server, check_rows, fields, server

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_sample(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("sample", help="sample several responses to each prompt, from a model or a server")
    command.add_argument("source", metavar="model_or_url", help="path or hub id of the policy, or address of a server")
    command.add_argument("dataset", help="file, directory or hub id of prompts, or of preference data")
    command.add_argument("--output", type=Path, required=True, help="a .jsonl file; an interrupted run goes on in it")
    command.add_argument("--n-responses", type=int, default=4, help="responses to each prompt (default: 4)")
    command.add_argument("--temperature", type=float, default=1.0, help="(default: 1.0)")
    command.add_argument("--top-p", type=float, default=0.95, help="(default: 0.95)")
    command.add_argument("--max-new-tokens", type=int, default=512, help="most tokens of a response (default: 512)")
    command.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=["truncated", "refusal"],
        help="keep responses cut at --max-new-tokens, or refusals to answer; repeatable",
    )
    command.add_argument("--keep-existing", action="store_true", help="keep the responses of the data beside new ones")
    command.add_argument("--batch-size", type=int, default=32, help="responses generated at once (default: 32)")
    command.add_argument("--seed", type=int, default=0)
    add_fields(command, "dtype, device, trust_remote_code or process_timeout")
    command.add_argument("--model", dest="model_name", metavar="NAME", help="with a server: the model's name there")
    add_server(command)
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    check_rows(options, model=options.source)
    model = options.source
    if model.startswith(("http://", "https://")):
        model = server(model, options)
    dataset = bpo.sample_responses(
        model,
        options.dataset,
        options.n_responses,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        keep=options.keep,
        keep_existing=options.keep_existing,
        output=options.output,
        batch_size=options.batch_size,
        seed=options.seed,
        config=fields(options),
    )
    print(bpo.describe_responses(dataset))
    print(f"\nresponses  {options.output}  (bpo score {options.output} …)")
