"""``bpo sample`` and ``bpo score``: responses to each prompt, and a score for each response."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bpo
from bpo.choices import SEED
from bpo.cli.arguments import (
    add_dataset,
    add_fields,
    add_saying,
    add_server,
    check_dataset,
    check_rows,
    check_writable,
    dataset_of,
    examples,
    fields,
    say,
    server,
    silent,
)
from bpo.system.paths import check_path

if TYPE_CHECKING:
    import argparse

    from bpo.cli.arguments import Commands
    from bpo.cli.parser import Parser

_OUTPUT = "a .jsonl file; an interrupted run goes on in it"


def add_sample(commands: Commands) -> None:
    """Adds the command that samples."""
    command = commands.add_parser(
        "sample",
        help="sample several responses to each prompt, from a model or a server",
        epilog=examples(
            "bpo sample my-sft-model prompts.jsonl --n_responses 4 --output sampled.jsonl",
            "bpo sample http://localhost:8000/v1 prompts.jsonl --model my-sft-model --output sampled.jsonl",
        ),
    )
    command.add_input(
        "source",
        "--model_name_or_path",
        metavar="model_or_url",
        help="path or hub id of the policy, or address of a server",
    )
    add_dataset(command, "file, directory or hub id of prompts, or of preference data")
    command.add_argument("--output", type=Path, required=True, help=_OUTPUT)
    command.add_argument("--n-responses", type=int, default=4, help="responses to each prompt")
    command.add_argument("--temperature", type=float, default=1.0, help="of the softmax that tokens are drawn from")
    command.add_argument("--top-p", type=float, default=0.95, help="share of the probability that is drawn from")
    command.add_argument("--max-new-tokens", type=int, default=512, help="most tokens of a response")
    command.add_argument(
        "--keep",
        action="append",
        default=[],
        choices=["truncated", "refusal"],
        help="keep responses cut at --max-new-tokens, or refusals to answer; repeatable",
    )
    command.add_argument("--keep-existing", action="store_true", help="keep the responses of the data beside new ones")
    command.add_argument("--batch-size", type=int, default=32, help="responses generated at once")
    command.add_argument("--seed", type=int, default=SEED, help="of every random choice")
    add_fields(command, "dtype, device, trust_remote_code or process_timeout")
    command.add_argument("--model", dest="model_name", metavar="NAME", help="with a server: the model's name there")
    add_server(command)
    add_saying(command)
    command.set_defaults(run=_sample, keeps="output")


def add_score(commands: Commands) -> None:
    """Adds the command that scores."""
    command = commands.add_parser(
        "score",
        help="score responses with a reward model, a judge or a function",
        epilog=examples(
            "bpo score sampled.jsonl --reward_model my-reward-model --output responses.jsonl",
            "bpo score sampled.jsonl --judge http://localhost:8000/v1 --model my-judge --output responses.jsonl",
        ),
    )
    add_dataset(command, "what bpo sample wrote, or a file, directory or hub id with responses")
    _add_scorer(command)
    add_server(command)
    add_saying(command)
    command.set_defaults(run=_score, keeps="output")


def _add_scorer(command: Parser) -> None:
    scorer = command.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="PATH", help="path or hub id of a sequence classifier with one logit")
    scorer.add_argument("--judge", metavar="URL", help="address of a server whose model (--model) judges")
    scorer.add_argument("--function", metavar="MODULE:NAME", help="a function of (prompt, response)")
    command.add_argument("--output", type=Path, required=True, help=_OUTPUT)
    command.add_argument("--overwrite", action="store_true", help="replace scores that the data has")
    add_fields(command, "tokens_per_batch, dtype, device, process_timeout, …")
    command.add_argument("--model", dest="model_name", metavar="NAME", help="with --judge: the model's name there")
    command.add_argument("--mode", choices=["rating", "pairwise"], default="rating", help="how the judge scores")
    command.add_argument("--criteria", help="what the judge goes by, in words")
    command.add_argument("--baseline", type=int, help="pairwise: compare each response with the one at this position")
    command.add_argument("--max-tokens", type=int, default=512, help="most tokens of the judge's reply")


def _sample(options: argparse.Namespace) -> None:
    check_rows(options, model=options.source)
    given = fields(options)
    check_writable("--output", options.output, endings=(".jsonl",))
    model = options.source
    if model.startswith(("http://", "https://")):
        model = server(model, options)
    else:
        check_path(model)
    check_dataset(options)
    dataset = bpo.sample_responses(
        model,
        dataset_of(options),
        options.n_responses,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        keep=options.keep,
        keep_existing=options.keep_existing,
        output=options.output,
        batch_size=options.batch_size,
        seed=options.seed,
        config=given,
        progress=not silent(options),
    )
    output = shlex.quote(str(options.output))
    said = f"\n\nresponses  {output}  (bpo score {output} …)"
    say(options, lambda: f"{bpo.describe_responses(dataset)}{said}", lambda: _values(options, dataset))


def _score(options: argparse.Namespace) -> None:
    check_rows(options, **{"--reward-model": options.reward_model})
    config = bpo.SelectConfig.of(fields(options))
    check_writable("--output", options.output, endings=(".jsonl",))
    if options.reward_model:
        check_path(options.reward_model)
    check_dataset(options)
    scorer = _scorer(options)
    dataset = bpo.score_responses(
        dataset_of(options),
        scorer,
        output=options.output,
        overwrite=options.overwrite,
        process_timeout=config.process_timeout,
        progress=not silent(options),
    )
    output = shlex.quote(str(options.output))
    said = [str(bpo.describe_responses(dataset))] if not silent(options) else []
    if options.judge:
        said.append("judge: " + ", ".join(f"{count} {name}" for name, count in scorer.counts.items()))
    said.append(f"\nscores  {output}  (bpo select MODEL {output} …)")
    say(options, lambda: "\n".join(said), lambda: _values(options, dataset))


def _values(options: argparse.Namespace, dataset: Any) -> dict[str, Any]:
    return {"output": options.output, "rows": len(dataset), **vars(bpo.describe_responses(dataset))}


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
    from bpo.responses.scorer import load_function

    return load_function(options.function, "--function")
