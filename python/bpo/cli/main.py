"""The ``bpo`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import bpo
from bpo.config import SketchDType
from bpo.selection.strategies import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 1 for an error in what was given or found, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="bpo", description=bpo.__doc__.splitlines()[0] if bpo.__doc__ else None)
    parser.add_argument("--version", action="version", version=f"bpo {bpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    select = commands.add_parser("select", help="choose the pairs to train on")
    select.add_argument("model", help="path or hub id of the policy")
    _add_selection(select)
    select.add_argument("--store", type=Path, help="directory of the gradient store, reused when it is there")
    select.set_defaults(run=_select)

    reselect = commands.add_parser("reselect", help="choose again from a gradient store, without the model")
    reselect.add_argument("store", type=Path, help="directory of the gradient store")
    _add_selection(reselect)
    reselect.set_defaults(run=_select, model=None)

    preview = commands.add_parser("preview", help="what a selection is worth, before training, from a gradient store")
    preview.add_argument("store", type=Path, help="directory of the gradient store")
    preview.add_argument("dataset", help="file, directory or hub id of the preference data")
    preview.add_argument("--budget", type=int, action="append", required=True, help="pairs to train on; repeatable")
    preview.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="ARM",
        help="name of a strategy, or JSON with name, strategy, breadth, select and store; repeatable",
    )
    preview.add_argument("--baseline", default="random", help="arm that the others are compared with")
    preview.add_argument("--heldout", default="0.25", help="share of the prompts held out, or a data set of its own")
    preview.add_argument("--seeds", type=int, default=100, help="splits")
    preview.add_argument("--output", type=Path, help="file for the results, .json")
    preview.add_argument("--figure", type=Path, help="file for a figure, .svg, .png or .pdf")
    preview.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as for select")
    preview.set_defaults(run=_preview)

    sample = commands.add_parser("sample", help="sample several responses to each prompt, from a model or a server")
    _add_sampling(sample)
    sample.set_defaults(run=_sample)

    score = commands.add_parser("score", help="score responses with a reward model, a judge or a function")
    _add_scoring(score)
    score.set_defaults(run=_score)

    doctor = commands.add_parser("doctor", help="before a run: what is differentiated, is it sound, what will it cost")
    doctor.add_argument("model", help="path or hub id of the policy")
    doctor.add_argument("dataset", help="file, directory or hub id of the preference data")
    doctor.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as for select")
    doctor.set_defaults(run=_doctor)

    compare = commands.add_parser("compare", help="train on the pairs of several strategies, and compare the policies")
    compare.add_argument("config", type=Path, help="YAML file of the fields of bpo.CompareConfig")
    compare.add_argument("--output", type=Path, required=True, help="directory for runs, results and report")
    compare.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the threads")
    compare.set_defaults(run=_compare)

    show = commands.add_parser("show", help="summarise a saved selection, gradient store, comparison or preview")
    show.add_argument("path", type=Path)
    show.set_defaults(run=_show)

    store = commands.add_parser("store", help="describe, verify, repair, merge and export gradient stores")
    tasks = store.add_subparsers(dest="task", required=True)
    for name, run, text in (
        ("info", _show, "what a store holds and what it was made with"),
        ("verify", _verify, "compare a store with its checksums; the exit status is 1 if something is wrong"),
        ("repair", _repair, "mend what can be mended; damaged rows are set aside and computed anew by the next run"),
    ):
        task = tasks.add_parser(name, help=text)
        task.add_argument("path", type=Path)
        task.set_defaults(run=run)
    merge = tasks.add_parser("merge", help="copy the rows of several stores into one")
    merge.add_argument("output", type=Path, help="directory of the result; a store there is added to")
    merge.add_argument("stores", type=Path, nargs="+")
    merge.add_argument("--dtype", choices=get_args(SketchDType), help="keep the numbers in this type")
    merge.set_defaults(run=_merge)
    export = tasks.add_parser("export", help="write the rows for other programs")
    export.add_argument("path", type=Path)
    export.add_argument("output", type=Path, help="a new file, .npz or .parquet")
    export.set_defaults(run=_export)

    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return int(options.run(options) or 0)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"bpo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bpo: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


def _add_selection(command: argparse.ArgumentParser) -> None:
    """The arguments that say what to select from what."""
    command.add_argument("dataset", help="file, directory or hub id of the preference data")
    command.add_argument("--budget", type=count_or_fraction, required=True, help="pairs to keep: a count or a fraction")
    command.add_argument("--breadth", type=count_or_fraction, help="prompts to keep, likewise; all by default")
    command.add_argument("--strategy", default="bpo", help=", ".join(STRATEGIES))
    command.add_argument("--target", help="pairs that say where to go, for less: file, directory or hub id")
    command.add_argument("--output", type=Path, required=True, help="directory for the selection")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of bpo.SelectConfig; repeatable"
    )


def _select(options: argparse.Namespace) -> None:
    from bpo.selection.saved import check_directory

    check_directory(options.output)
    selection = bpo.select(
        options.model,
        options.dataset,
        budget=options.budget,
        breadth=options.breadth,
        strategy=options.strategy,
        target=options.target,
        store=options.store,
        config=bpo.SelectConfig.from_dict(dict(map(_field, options.set))),
        seed=options.seed,
    )
    selection.save(options.output)
    report = selection.report(options.output / "report.html")
    print(selection.summary())
    print(f"\ndataset  {options.output / 'dataset'}  (trl dpo --dataset_name {options.output / 'dataset'} …)")
    print(f"report   {report}")


def _preview(options: argparse.Namespace) -> None:
    arms: dict[str, Any] = {"arms": [_arm(text) for text in options.arm]} if options.arm else {}
    try:
        heldout: Any = float(options.heldout)
    except ValueError:
        heldout = options.heldout
    found = bpo.preview(
        options.store,
        options.dataset,
        budget=options.budget,
        baseline=options.baseline,
        heldout=heldout,
        seeds=options.seeds,
        config=dict(map(_field, options.set)),
        **arms,
    )
    print(found.summary())
    if options.output is not None:
        print(f"\nresults  {found.save(options.output)}")
    if options.figure is not None:
        print(f"figure   {found.figure(options.figure)}")


def _arm(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--arm {text}: {error}") from None


def _add_sampling(command: argparse.ArgumentParser) -> None:
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
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="dtype, device or trust_remote_code"
    )
    command.add_argument("--model", dest="model_name", metavar="NAME", help="with a server: the model's name there")
    _add_server(command)


def _add_scoring(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset", help="what bpo sample wrote, or a file, directory or hub id with responses")
    scorer = command.add_mutually_exclusive_group(required=True)
    scorer.add_argument("--reward-model", metavar="PATH", help="path or hub id of a sequence classifier with one logit")
    scorer.add_argument("--judge", metavar="URL", help="address of a server whose model (--model) judges")
    scorer.add_argument("--function", metavar="MODULE:NAME", help="a function of (prompt, response)")
    command.add_argument("--output", type=Path, required=True, help="a .jsonl file; an interrupted run goes on in it")
    command.add_argument("--overwrite", action="store_true", help="replace scores that the data has")
    command.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="tokens_per_batch, dtype, device, …"
    )
    command.add_argument("--model", dest="model_name", metavar="NAME", help="with --judge: the model's name there")
    command.add_argument("--mode", choices=["rating", "pairwise"], default="rating", help="how the judge scores")
    command.add_argument("--criteria", help="what the judge goes by, in words")
    command.add_argument("--baseline", type=int, help="pairwise: compare each response with the one at this position")
    command.add_argument("--max-tokens", type=int, default=512, help="most tokens of the judge's reply (default: 512)")
    _add_server(command)


def _add_server(command: argparse.ArgumentParser) -> None:
    """The arguments that say how to talk to a server."""
    server = command.add_argument_group("server")
    server.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable that holds the key")
    server.add_argument("--concurrency", type=int, default=8, help="requests at a time (default: 8)")
    server.add_argument("--requests-per-minute", type=float)
    server.add_argument("--timeout", type=float, default=120.0, help="seconds for one request (default: 120)")
    server.add_argument("--max-retries", type=int, default=6, help="attempts after the first (default: 6)")
    server.add_argument("--cache", type=Path, help="a .jsonl file of replies, which are not asked for twice")
    server.add_argument("--extra-body", type=json.loads, metavar="JSON", help="more fields of every request")


def _server(url: str, options: argparse.Namespace) -> bpo.ChatServer:
    if not options.model_name:
        raise ValueError(f"--model is needed: the name of the model at {url}.")
    key = None
    if options.api_key_env:
        key = os.environ.get(options.api_key_env)
        if not key:
            raise ValueError(f"--api-key-env: there is no environment variable {options.api_key_env}.")
    return bpo.ChatServer(
        url,
        options.model_name,
        key,
        concurrency=options.concurrency,
        requests_per_minute=options.requests_per_minute,
        timeout=options.timeout,
        max_retries=options.max_retries,
        cache=options.cache,
        extra_body=options.extra_body,
    )


def _sample(options: argparse.Namespace) -> None:
    model = options.source
    if model.startswith(("http://", "https://")):
        model = _server(model, options)
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
        config=dict(map(_field, options.set)),
    )
    print(bpo.describe_responses(dataset))
    print(f"\nresponses  {options.output}  (bpo score {options.output} …)")


def _score(options: argparse.Namespace) -> None:
    scorer: Any
    if options.reward_model:
        scorer = bpo.RewardModel(options.reward_model, config=dict(map(_field, options.set)))
    elif options.judge:
        criteria = {} if options.criteria is None else {"criteria": options.criteria}
        server = _server(options.judge, options)
        scorer = bpo.Judge(server, options.mode, baseline=options.baseline, max_tokens=options.max_tokens, **criteria)
    else:
        from bpo.responses.scoring import load_function

        scorer = load_function(options.function, "--function")
    dataset = bpo.score_responses(options.dataset, scorer, output=options.output, overwrite=options.overwrite)
    print(bpo.describe_responses(dataset))
    if options.judge:
        print("judge: " + ", ".join(f"{count} {name}" for name, count in scorer.counts.items()))
    print(f"\nscores  {options.output}  (bpo select MODEL {options.output} …)")


def _doctor(options: argparse.Namespace) -> None:
    config = bpo.SelectConfig.from_dict(dict(map(_field, options.set)))
    print(bpo.doctor(options.model, options.dataset, config=config))


def _compare(options: argparse.Namespace) -> int:
    comparison = bpo.compare(options.config, options.output, jobs=options.jobs)
    print(comparison.summary())
    print(f"\nreport   {comparison.report}")
    return int(bool(comparison.failures))


def _show(options: argparse.Namespace) -> None:
    path: Path = options.path
    if path.is_file():
        print(bpo.Preview.load(path).summary())
    elif (path / "selection.json").is_file():
        print(bpo.Selection.load(path).summary())
    elif (path / "results.json").is_file():
        from bpo.evidence.results import load, table

        print(table(load(path / "results.json")))
    else:
        print(bpo.describe_store(path))


def _verify(options: argparse.Namespace) -> int:
    problems = bpo.verify_store(options.path)
    for problem in problems:
        print(f"bpo: {problem}", file=sys.stderr)
    if not problems:
        print(f"{options.path}: all {len(bpo.GradientStore.open(options.path))} rows are as they were written")
    return int(bool(problems))


def _repair(options: argparse.Namespace) -> None:
    from bpo.store.maintenance import name_rows

    done = bpo.repair_store(options.path)
    said = [f"written anew: {', '.join(done.mended)}"] if done.mended else []
    if len(done.set_aside):
        said.append(f"{len(done.set_aside)} damaged rows set aside: {name_rows(done.set_aside)}")
    if done.lost:
        said.append(f"{done.lost} rows were lost with the end of a file")
    if done.cut_bytes:
        said.append(f"{done.cut_bytes} bytes behind the last row cut off")
    print(f"{options.path}: {'; '.join(said) or 'nothing to mend'}")
    print(f"{done.count} rows; the next run computes anew what is missing")


def _merge(options: argparse.Namespace) -> None:
    print(bpo.merge_stores(options.output, options.stores, dtype=options.dtype))


def _export(options: argparse.Namespace) -> None:
    print(bpo.export_store(options.path, options.output))


def count_or_fraction(text: str) -> int | float:
    """Reads ``500`` as a count and ``0.5`` as a fraction."""
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _field(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text}: write FIELD=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _print_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"bpo: {message}", file=sys.stderr)
