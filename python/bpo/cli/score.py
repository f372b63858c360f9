"""``bpo score``: a score for each response, from a reward model, a judge or a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.cli.arguments import add_fields, add_server, check_rows, fields, server
from bpo.responses.scorer import load_function

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands


def add_score(commands: Commands) -> None:
    """Adds the command."""
    command = commands.add_parser("score", help="score responses with a reward model, a judge or a function")
    command.add_argument("dataset", help="what bpo sample wrote, or a file, directory or hub id with responses")
    scorer = command.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="PATH", help="path or hub id of a sequence classifier with one logit")
    scorer.add_argument("--judge", metavar="URL", help="address of a server whose model (--model) judges")
    scorer.add_argument("--function", metavar="MODULE:NAME", help="a function of (prompt, response)")
    command.add_argument("--output", type=Path, required=True, help="a .jsonl file; an interrupted run goes on in it")
    command.add_argument("--overwrite", action="store_true", help="replace scores that the data has")
    add_fields(command, "tokens_per_batch, dtype, device, process_timeout, …")
    command.add_argument("--model", dest="model_name", metavar="NAME", help="with --judge: the model's name there")
    command.add_argument("--mode", choices=["rating", "pairwise"], default="rating", help="how the judge scores")
    command.add_argument("--criteria", help="what the judge goes by, in words")
    command.add_argument("--baseline", type=int, help="pairwise: compare each response with the one at this position")
    command.add_argument("--max-tokens", type=int, default=512, help="most tokens of the judge's reply (default: 512)")
    add_server(command)
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    check_rows(options, **{"--reward-model": options.reward_model})
    scorer = _scorer(options)
    dataset = bpo.score_responses(
        options.dataset,
        scorer,
        output=options.output,
        overwrite=options.overwrite,
        process_timeout=bpo.SelectConfig.of(fields(options)).process_timeout,
    )
    print(bpo.describe_responses(dataset))
    if options.judge:
        print("judge: " + ", ".join(f"{count} {name}" for name, count in scorer.counts.items()))
    print(f"\nscores  {options.output}  (bpo select MODEL {options.output} …)")


def _scorer(options: argparse.Namespace) -> Any:
    """Returns the reward model, the judge or the function that was asked for."""
    if options.reward_model:
        return bpo.RewardModel(options.reward_model, config=fields(options))
    if options.judge:
        criteria = {} if options.criteria is None else {"criteria": options.criteria}
        return bpo.Judge(
            server(options.judge, options),
            options.mode,
            baseline=options.baseline,
            max_tokens=options.max_tokens,
            **criteria,
        )
    return load_function(options.function, "--function")
