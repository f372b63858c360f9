"""``compare``: the same training on the pairs of several strategies, over several seeds, and what it was good for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
import transformers
from tqdm.auto import tqdm

import bpo
from bpo.config import SelectConfig
from bpo.data.length import turn
from bpo.data.tokenizers import load_tokenizer, padding_id, tokenizer_fingerprint
from bpo.evidence.compare_config import UNTRAINED, CompareConfig
from bpo.evidence.compare_data import ComparedPairs
from bpo.evidence.evaluate import PreferenceEvaluation
from bpo.evidence.results import summarize, table
from bpo.evidence.win_rates import compare_responses, score_start
from bpo.gradients.collect import collect_gradients
from bpo.pairs.linear import linearised_correct
from bpo.pairs.measured import measured
from bpo.policy.logprobs import response_logps
from bpo.policy.models import inference_state, load_policy, model_fingerprint, window
from bpo.report.comparison_page import write_report
from bpo.selection.request import count_of
from bpo.selection.select import select
from bpo.selection.strategies import STRATEGIES, registered
from bpo.store.gradient_store import GradientStore, StoreMismatchError, with_settings_of
from bpo.system.files import differing, flattened, write_whole
from bpo.system.optional import import_matplotlib, import_scipy
from bpo.system.processes import cores, in_processes
from bpo.training.dpo import dpo_config, train_on_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import numpy.typing as npt
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bpo.data.tokens import TokenizedResponses
    from bpo.evidence.compare_config import Arm
    from bpo.pairs.pair_gradients import PairGradients
    from bpo.selection.strategies import Strategy

_FORMAT = "bpo-comparison"
_FORMAT_VERSION = 1
_MANIFEST = "comparison.json"
_REFERENCE = "reference.npz"
_COSTS = "costs.json"
_RUNS = "runs"
_RESPONSES = "responses"
_VERDICTS = "verdicts.jsonl"
_ERRORS = "errors"

# Keeps the draw of a split apart from those of the selection with the same seed.
_SPLIT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison found.

    Attributes:
        output: Its directory.
        results: As in ``results.json``: for each arm and budget the mean over seeds of each measure, the paired
            differences, and what everything cost.
        failures: Runs that failed, and why.
    """

    output: Path
    results: dict[str, Any]
    failures: dict[str, str]

    def __repr__(self) -> str:
        return f"Comparison({str(self.output)!r}: {self.results['n_runs']} runs, {len(self.failures)} failed)"

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.output / "report.html"

    def summary(self) -> str:
        """Returns the means, the paired differences and the costs as a table."""
        lines = [table(self.results)]
        lines += [f"failed   {run}: {reason}" for run, reason in self.failures.items()]
        return "\n".join(lines)


def compare(config: Any, output: str | os.PathLike[str], *, jobs: int = 1, progress: bool = True) -> Comparison:
    """Trains on the pairs of several strategies at equal number, over several seeds, and compares the policies.

    For each seed the prompts are split (unless the held-out data is given), every arm selects from the same training
    prompts, TRL trains on what it selected with the same settings and seed, and the policies rank the same held-out
    pairs. Gradients and the reference's log-probabilities are computed once for all. Runs go seed by seed, so that a
    comparison that is not finished is a paired one, too. Each finished run is a small file of its own and is never
    repeated: the same call goes on where it was interrupted, and more seeds, budgets or arms can be added to what is
    there. Two arms that select the same pairs with the same seed are trained once. No trained weights are kept.

    Training is TRL's, and its arithmetic depends on the machine and on its threads, so a repeated run agrees to
    rounding only.

    Args:
        config: A :class:`bpo.CompareConfig`, a mapping of its fields, or a YAML file of them.
        output: Directory for runs, store, results and report: a new or empty one, or one with the same comparison.
        jobs: Runs at a time, each in a process of its own with its share of the threads: on a CPU two runs of one
            thread each beat one of two threads. Scripts that ask for more than one need the usual
            ``if __name__ == "__main__":``.
        progress: Whether to show progress bars.

    Returns:
        The results. A run that failed does not stop the others and is named in ``failures``.

    Raises:
        ValueError: A bad setting, by the name of its field; unusable data; an ``output`` with other settings; or, with
            several jobs, a strategy of your own that other processes cannot import.
        FileNotFoundError: A path that does not exist.
        FileExistsError: An ``output`` that holds something else.
        ImportError: SciPy or matplotlib is missing: ``pip install 'bpo[compare]'``.

    Example:
        .. code-block:: python

            comparison = bpo.compare("compare.yaml", "comparison")
            print(comparison.summary())
    """
    config = CompareConfig.of(config)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a whole number of at least 1, got {jobs!r}")
    # Before hours of work whose results could not be told.
    import_scipy("stats")
    import_matplotlib()
    output = Path(output)
    _check_directory(output)
    own = registered(arm.strategy for arm in config.arms)
    if jobs > 1:
        _check_reachable(own)
    plan = _prepare(config, output, progress)
    tasks = [_Task(seed, arm, budget) for seed in config.seeds for budget in config.budget for arm in config.arms]
    for task in tasks:
        plan.check(task)
    missing = [task for task in tasks if not plan.path(task).is_file()]
    failures: dict[str, str] = {}
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(missing), desc="Runs", unit="run", disable=not progress)
    with bar:
        attempt = functools.partial(_attempt, plan)
        if jobs == 1 or len(missing) < 2:
            finished: Iterable[tuple[_Task, str | None]] = ((task, attempt(task)) for task in missing)
        else:
            threads = max(1, cores() // jobs)
            finished = in_processes(
                functools.partial(_attempt_elsewhere, dataclasses.replace(plan, threads=threads), own), missing, jobs
            )
        for task, error in finished:
            errors = output / _ERRORS / f"{task.name}.txt"
            if error is None:
                errors.unlink(missing_ok=True)
            else:
                failures[task.name] = error.strip().splitlines()[-1]
                _write(errors, error)
            bar.update()
    runs = [_read_run(plan.path(task)) for task in tasks if plan.path(task).is_file()]
    _foretell(plan, runs)
    results = summarize(runs, [plan.untrained(seed) for seed in config.seeds], plan.description())
    _write(output / "results.json", json.dumps(results, indent=1) + "\n")
    write_report(results, failures, output)
    return Comparison(output, results, failures)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One run: a seed, an arm and a budget."""

    seed: int
    arm: Arm
    budget: int | float

    @property
    def name(self) -> str:
        return f"seed{self.seed}-{self.arm.name}-{self.budget}"


@dataclasses.dataclass(frozen=True, eq=False)
class _Split:
    """The pairs of one seed, each ascending: to select from, to evaluate on, and to select toward."""

    train: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]
    target: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Everything that runs share.

    Attributes:
        config: Settings.
        output: Directory of the comparison.
        pool: Pairs that training and, where ``heldout`` is None, held-out pairs are drawn from.
        heldout: Pairs of held-out data that is given.
        train_ref_logps: (S,) log π_ref of each sequence of ``pool`` in the precision of training, which may be another
            than that of evaluation; None where it is not known, so that TRL runs the reference.
        store: Gradient store; None where there is none and no arm needs it.
        costs: Seconds of what was computed once, by stage.
        threads: Of one run; None for all.
    """

    config: CompareConfig
    output: Path
    pool: ComparedPairs
    heldout: ComparedPairs | None
    train_ref_logps: npt.NDArray[np.float32] | None
    store: Path | None
    costs: dict[str, float]
    threads: int | None = None

    @property
    def evaluated(self) -> ComparedPairs:
        """Where held-out pairs are."""
        return self.pool if self.heldout is None else self.heldout

    def prompts(self, pairs: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """Returns the prompts of held-out pairs, with what the chat template gets beside them."""
        data = self.evaluated
        _, first = np.unique(data.prompt_of_pair[pairs], return_index=True)
        names = ("prompt", "tools", "chat_template_kwargs")
        return [{name: data.rows[pair][name] for name in names if name in data.rows[pair]} for pair in pairs[first]]

    def split(self, seed: int) -> _Split:
        """Draws the prompts of a seed."""
        config = self.config
        order = np.random.default_rng([seed, _SPLIT]).permutation(len(self.pool.prompt_ids))
        n_train, n_heldout = self.counts()
        most = config.evaluate["max_pairs_per_prompt"]
        if self.heldout is None:
            heldout, order = self.pool.of_prompts(order[:n_heldout], most), order[n_heldout:]
        else:
            heldout = self.heldout.of_prompts(np.arange(n_heldout), most)
        n_target = config.target_prompts or 0
        train = self.pool.of_prompts(order[n_target : n_target + n_train])
        return _Split(train, heldout, self.pool.of_prompts(order[:n_target]))

    def counts(self) -> tuple[int, int]:
        """Returns the numbers of training and of held-out prompts.

        Raises:
            ValueError: More than there are.
        """
        config, n = self.config, len(self.pool.prompt_ids)
        if self.heldout is None:
            n_heldout = config.heldout_prompts or max(1, round(config.heldout * n))
            n_rest = n - n_heldout
        else:
            there = len(self.heldout.prompt_ids)
            n_heldout, n_rest = config.heldout_prompts or there, n
            if n_heldout > there:
                raise ValueError(f"heldout_prompts={n_heldout} is above the {there} prompts of heldout.")
        n_rest -= config.target_prompts or 0
        if n_rest < 1:
            apart = "heldout_prompts and target_prompts" if config.target_prompts else f"heldout_prompts={n_heldout}"
            raise ValueError(f"{apart} leave none of the {n} prompts to train on.")
        n_train = config.train_prompts or n_rest
        if n_train > n_rest:
            raise ValueError(f"train_prompts={n_train} is above the {n_rest} prompts that are left to train on.")
        return n_train, n_heldout

    def path(self, task: _Task) -> Path:
        """Where a finished run is."""
        return self.output / _RUNS / f"{task.name}.json"

    def check(self, task: _Task) -> None:
        """Checks that a run that is there is of the same arm.

        Raises:
            ValueError: It is of an arm of that name with other settings.
        """
        if not self.path(task).is_file():
            return
        # A setting that there was none of when the run was made is as if at its default.
        defaults = SelectConfig().to_dict()
        there, here = (
            flattened({**settings, "select": {**defaults, **settings["select"]}})
            for settings in (_read_run(self.path(task))["arm_settings"], task.arm.settings())
        )
        changed = differing(there, here)
        if changed:
            raise ValueError(
                f"{self.output} holds runs of the arm {task.arm.name!r} with another {', '.join(changed)}: "
                f"{changed[0]} is {there.get(changed[0])!r} there and {here.get(changed[0])!r} here. Give the arm "
                "another name, or name another output."
            )

    def untrained(self, seed: int) -> dict[str, Any]:
        """Returns the run of the starting policy, which needs none."""
        pairs = self.split(seed).heldout
        data = self.evaluated
        tokenized, ref_logps = data.responses(pairs)
        beta = self.config.shared.beta
        evaluation = PreferenceEvaluation.of(tokenized, data.prompt_of_pair[pairs], ref_logps, ref_logps, beta)
        return {"seed": seed, "arm": UNTRAINED, "budget": 0, **_measures(evaluation)}

    def description(self) -> dict[str, Any]:
        """Returns what a report says of the comparison as a whole."""
        n_train, n_heldout = self.counts()
        config = self.config
        first = self.split(config.seeds[0])
        return {
            "bpo": bpo.__version__,
            "model": config.model,
            "dataset": config.dataset if isinstance(config.dataset, str) else type(config.dataset).__name__,
            "heldout": "prompts of the data set" if self.heldout is None else "a data set of its own",
            "heldout_share": n_heldout / len(self.pool.prompt_ids) if self.heldout is None else None,
            "n_train_prompts": n_train,
            "n_heldout_prompts": n_heldout,
            "n_train_pairs": len(first.train),
            "n_heldout_pairs": len(first.heldout),
            "heldout_prompt_of_pair": None
            if self.heldout is None
            else self.heldout.prompt_of_pair[first.heldout].tolist(),
            "seeds": list(config.seeds),
            "budgets": list(config.budget),
            "arms": [
                {"name": arm.name, "strategy": arm.strategy, "needs_gradients": arm.needs_gradients}
                for arm in config.arms
            ],
            "baseline": config.baseline,
            "training": dict(config.training),
            "evaluate": dict(config.evaluate),
            "seconds": self.costs,
            "n_responses": len(self.pool.tokenized.ids),
            "n_tokens": int(self.pool.tokenized.lengths.sum()),
        }


def _prepare(config: CompareConfig, output: Path, progress: bool) -> _Plan:
    """What all runs need, computed once: data, gradients, log-probabilities of the reference."""
    shared = config.shared
    tokenizer = load_tokenizer(config.model, config.processing_class, shared)
    longest = window(config.model, shared)
    pool = ComparedPairs.read(config.dataset, tokenizer, longest, shared, config.columns)
    heldout = None
    if not config.splits:
        # Weights are of training; what is measured counts every pair alike.
        heldout = ComparedPairs.read(
            config.heldout, tokenizer, longest, dataclasses.replace(shared, weight_column=None)
        )
        pool = pool.without(heldout)
    _Plan(config, output, pool, heldout, None, None, {}).counts()  # before any work
    policy = load_policy(config.model, shared)
    fingerprint = model_fingerprint(policy)
    identity = {
        "bpo": bpo.__version__,
        "model": fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dataset": pool.fingerprint(),
        "heldout_data": None if heldout is None else heldout.fingerprint(),
    }
    _check_manifest(output, {**identity, **config.settings()})
    costs = _Costs(output / _COSTS)
    store = None
    if config.store is not None:
        store = Path(config.store).expanduser()
        _check_store(store, fingerprint, pool)
    elif config.needs_store:
        store = output / "store"
        with costs.add("gradients"):
            collect_gradients(
                policy, pool.rows, processing_class=tokenizer, store=store, config=shared, progress=progress
            )
    args = dpo_config(config.training, ".", 0)
    # One reference serves training and evaluation where both compute alike.
    shares = not args.fp16 and bool(args.bf16) == config.eval_bf16
    draft = _Plan(config, output, pool, heldout, None, store, {})
    evaluated = [draft.split(seed).heldout for seed in config.seeds]
    with costs.add("reference"):
        reference = functools.partial(_ref_logps, policy, tokenizer, config, store, output / _REFERENCE, progress)
        everything = np.arange(len(pool.rows))
        if heldout is None:
            pool = reference(pool, everything if shares else np.unique(np.concatenate(evaluated)))
        else:
            pool = reference(pool, everything) if shares else pool
            heldout = reference(heldout, evaluated[0])
    train_ref_logps = None
    if shares:
        train_ref_logps = pool.ref_logps
    elif store is not None and not args.fp16:
        train_ref_logps = _stored_logps(store, pool, bool(args.bf16))
    plan = _Plan(config, output, pool, heldout, train_ref_logps, store, costs.seconds)
    if config.scorer is not None:
        with costs.add("sampling"):
            _sample_start(plan, policy, tokenizer, progress)
    del policy
    gc.collect()
    return plan


def _sample_start(plan: _Plan, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: bool) -> None:
    """Samples the starting policy's responses to each seed's held-out prompts, and scores them."""
    config, directory = plan.config, plan.output / _RESPONSES
    directory.mkdir(parents=True, exist_ok=True)
    scorer = config.scorer.build(plan.output / _VERDICTS)
    for seed in tqdm(config.seeds, desc="Responses of the starting policy", unit="seed", disable=not progress):
        path = directory / f"seed{seed}-start.json"
        if not path.is_file():
            prompts = plan.prompts(plan.split(seed).heldout)
            rows = config.scorer.sample(policy, prompts, tokenizer, seed, directory / f"seed{seed}-start.jsonl")
            rows = score_start(rows, scorer, directory / f"seed{seed}-scores.jsonl")
            _write(path, json.dumps({"format": _FORMAT, "format_version": _FORMAT_VERSION, "rows": rows}) + "\n")


def _check_store(path: Path, model: str, pool: ComparedPairs) -> None:
    """Checks that a store that was there before is of this policy and data.

    Raises:
        ValueError: It is not.
    """
    store = GradientStore.open(path)
    if store.fingerprint["model"] != model:
        raise ValueError(f"store: {path} was made with another model.")
    missing = int((store.rows_of(pool.tokenized.sequence_ids) < 0).sum())
    if missing:
        raise ValueError(
            f"store: {path} lacks {missing} of the {len(pool.tokenized.ids)} responses. Complete it with "
            "bpo.collect_gradients, or leave store out."
        )


def _ref_logps(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CompareConfig,
    store: Path | None,
    cache: Path,
    progress: bool,
    data: ComparedPairs,
    pairs: npt.NDArray[np.int64],
) -> ComparedPairs:
    """Returns data with log π_ref of the responses of some pairs: from the store or an earlier call, else computed."""
    stored = None if store is None else _stored_logps(store, data, config.eval_bf16)
    if stored is not None:
        return data.with_ref_logps(stored)
    known: dict[bytes, float] = {}
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as file:
            known = dict(zip(map(bytes, file["sequence_ids"]), file["logps"], strict=True))
    wanted = np.unique(data.tokenized.pairs[pairs])
    ids = [bytes(identity) for identity in data.tokenized.sequence_ids]
    missing = np.array([row for row in wanted if ids[row] not in known], dtype=np.int64)
    if len(missing):
        part = data.tokenized.take(missing)
        bar = tqdm(total=int(part.lengths.sum()), desc="Reference", unit="token", unit_scale=True, disable=not progress)
        with bar, inference_state(policy):
            computed = _logps(policy, part, tokenizer, config, bar.update)
        if not np.isfinite(computed).all():
            raise ValueError(
                f"The starting policy gives {int((~np.isfinite(computed)).sum())} responses no finite log π."
            )
        known.update(zip((ids[row] for row in missing), computed.tolist(), strict=True))
        scratch = cache.with_name("reference.new.npz")
        np.savez(
            scratch,
            sequence_ids=np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16),
            logps=np.array(list(known.values()), dtype=np.float32),
        )
        scratch.replace(cache)
    return data.with_ref_logps(np.array([known.get(identity, np.nan) for identity in ids], dtype=np.float32))


def _logps(
    policy: PreTrainedModel,
    tokenized: TokenizedResponses,
    tokenizer: PreTrainedTokenizerBase,
    config: CompareConfig,
    on_batch: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float32]:
    """Returns log π of responses in the precision of evaluation ((S,) float32)."""
    return response_logps(
        policy,
        tokenized,
        padding_id(tokenizer),
        tokens_per_batch=config.evaluate["tokens_per_batch"],
        autocast=torch.bfloat16 if config.eval_bf16 else None,
        on_batch=on_batch,
    )


def _stored_logps(path: Path, data: ComparedPairs, bf16: bool) -> npt.NDArray[np.float32] | None:
    """Returns the log-probabilities that a store holds, if they were computed in the precision asked for."""
    store = GradientStore.open(path)
    precision = "float32" + (" under bfloat16 autocast" if bf16 else "")
    if (store.fingerprint["dtype"], store.fingerprint["max_length"]) != (precision, data.tokenized.max_length):
        return None
    rows = store.rows_of(data.tokenized.sequence_ids)
    if (rows < 0).any():
        return None
    logps: npt.NDArray[np.float32] = store.records["logp"][rows].astype(np.float32)
    return logps


def _run(plan: _Plan, task: _Task) -> dict[str, Any]:
    """Selects, trains and evaluates."""
    config, arm = plan.config, task.arm
    split = plan.split(task.seed)
    train, held = split.train, split.heldout
    budget = count_of(task.budget, len(train))
    settings = arm.select if arm.select.threads else dataclasses.replace(arm.select, threads=plan.threads)
    seconds = {}
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        selection = select(
            config.model if arm.needs_model else None,
            [plan.pool.rows[pair] for pair in train],
            budget=budget,
            breadth=arm.breadth,
            processing_class=config.processing_class,
            strategy=arm.strategy,
            target=[plan.pool.rows[pair] for pair in split.target] if arm.needs_target else None,
            store=(arm.store or plan.store) if arm.needs_gradients else None,
            config=settings,
            seed=task.seed,
            progress=False,
        )
    seconds["selection"] = time.perf_counter() - start
    chosen = train[np.array(selection.dataset["bpo_row"])]
    order = np.argsort(chosen)  # so that the same pairs are the same training
    chosen, trained_on = chosen[order], selection.dataset.select(order)
    # Pairs that length control turned round.
    turned = np.array(
        [text == plan.pool.rows[pair]["rejected"] for pair, text in zip(chosen, trained_on["chosen"], strict=True)]
    )
    run = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "seed": task.seed,
        "arm": arm.name,
        "budget": task.budget,
        "arm_settings": arm.settings(),
        "n_pairs": len(chosen),
        "n_prompts": int((selection.depth > 0).sum()),
        "warnings": [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)],
        "pairs": chosen.tolist(),
        "heldout_pairs": held.tolist(),
        "same_as": None,
        **({"turned": chosen[turned].tolist()} if turned.any() else {}),
    }
    twin = _twin(plan, task, run)
    if twin is not None:
        copied = {name: twin[name] for name in ("measures", "correct")}
        return {**run, **copied, "same_as": twin["arm"], "seconds": {**twin["seconds"], **seconds}}
    start = time.perf_counter()
    known = plan.train_ref_logps
    with tempfile.TemporaryDirectory(prefix="bpo-compare-") as scratch:
        policy = train_on_pairs(
            config.model,
            trained_on,
            dpo_config(config.training, scratch, task.seed),
            processing_class=config.processing_class,
            peft_config=config.peft_config,
            ref_logps=None if known is None else known[turn(plan.pool.tokenized.pairs[chosen], turned)],
        )
    seconds["training"] = time.perf_counter() - start
    start = time.perf_counter()
    run = {**run, **_measures(_evaluate(plan, policy, held))}
    seconds["evaluation"] = time.perf_counter() - start
    if config.scorer is not None:
        start = time.perf_counter()
        run["measures"] |= _win_rates(plan, task, policy, held)
        seconds["sampling"] = time.perf_counter() - start
    return {**run, "seconds": seconds}


def _foretell(plan: _Plan, runs: list[dict[str, Any]]) -> None:
    """Adds to each run what the linearised regime makes of its pairs, where the store holds what that takes."""
    if plan.store is None or not runs:
        return
    store = GradientStore.open(plan.store)
    try:
        config = with_settings_of(store, plan.config.shared)
    except StoreMismatchError:  # a store that no arm read
        return

    def gradients_of(data: ComparedPairs) -> PairGradients | None:
        rows = store.rows_of(data.tokenized.sequence_ids)[data.tokenized.pairs]
        return None if (rows < 0).any() else measured([store], [rows], config).gradients[0]

    pool = gradients_of(plan.pool)
    evaluated = pool if plan.heldout is None else gradients_of(plan.heldout)
    if pool is None or evaluated is None:
        return
    for run in runs:
        pairs, held = np.array(run["pairs"]), np.array(run["heldout_pairs"])
        # With the policy as its own reference, a pair that is turned round has the opposite gradient.
        signs = np.where(np.isin(pairs, run.get("turned", [])), np.float32(-1), np.float32(1))[:, None]
        training = pool.take(pairs)
        training = training._replace(coefficients=training.coefficients * signs)
        correct = linearised_correct(training, evaluated.take(held))
        run["measures"] = {**run["measures"], "linearised_accuracy": float(correct.mean())}


def _win_rates(plan: _Plan, task: _Task, policy: PreTrainedModel, pairs: npt.NDArray[np.int64]) -> dict[str, float]:
    """Compares sampled responses with those of the starting policy, and keeps them to look at."""
    config, directory = plan.config, plan.output / _RESPONSES
    tokenizer = load_tokenizer(config.model, config.processing_class, config.shared)
    sampled = config.scorer.sample(policy, plan.prompts(pairs), tokenizer, task.seed)
    start = _read_json(directory / f"seed{task.seed}-start.json")["rows"]
    wins = compare_responses(start, sampled, config.scorer.build(plan.output / _VERDICTS))
    _write(directory / f"{task.name}.jsonl", "".join(json.dumps(row) + "\n" for row in wins.rows))
    return wins.measures


def _twin(plan: _Plan, task: _Task, here: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a finished run of the same seed on the same pairs, the same way round."""
    for path in sorted((plan.output / _RUNS).glob(f"seed{task.seed}-*.json")):
        run = _read_run(path)
        same = all(run.get(name) == here.get(name) for name in ("pairs", "turned"))
        if same and run["same_as"] is None:
            return run
    return None


def _evaluate(plan: _Plan, policy: PreTrainedModel, pairs: npt.NDArray[np.int64]) -> PreferenceEvaluation:
    config = plan.config
    data = plan.evaluated
    tokenized, ref_logps = data.responses(pairs)
    tokenizer = load_tokenizer(config.model, config.processing_class, config.shared)
    with inference_state(policy):
        logps = _logps(policy, tokenized, tokenizer, config)
    if not np.isfinite(logps).all():
        raise ValueError(
            f"The trained policy gives {int((~np.isfinite(logps)).sum())} held-out responses no finite "
            "log-probability: lower training.learning_rate."
        )
    return PreferenceEvaluation.of(tokenized, data.prompt_of_pair[pairs], logps, ref_logps, config.shared.beta)


def _measures(evaluation: PreferenceEvaluation) -> dict[str, Any]:
    """What a run keeps of its evaluation."""
    names = ("accuracy", "length_controlled_accuracy", "margin", "likelihood_accuracy")
    return {
        "measures": {name: getattr(evaluation, name) for name in names if hasattr(evaluation, name)},
        "correct": evaluation.correct.tolist(),
    }


def _attempt(plan: _Plan, task: _Task) -> str | None:
    """Makes a run and writes its file; returns the traceback of what went wrong."""
    try:
        with _quiet():
            run = _run(plan, task)
        _write(plan.path(task), json.dumps(run) + "\n")
    except Exception:
        return traceback.format_exc()
    finally:
        gc.collect()  # the trainer and its model hold each other
    return None


def _attempt_elsewhere(plan: _Plan, own: Mapping[str, Strategy], task: _Task) -> str | None:
    """As :func:`_attempt`, in a process that knows only bpo's own strategies."""
    STRATEGIES.update(own)
    return _attempt(plan, task)


def _check_reachable(own: Mapping[str, Strategy]) -> None:
    """Checks that other processes can import the strategies that a user registered.

    Raises:
        ValueError: They cannot.
    """
    for name, strategy in own.items():
        try:
            pickle.dumps(strategy)
            there = strategy.choose.__module__ != "__main__" or hasattr(sys.modules["__main__"], "__file__")
        except (pickle.PicklingError, AttributeError, TypeError):
            there = False
        if not there:
            raise ValueError(
                f"The strategy {name!r} cannot be imported by the processes of jobs > 1: define its function at the "
                "top level of a module or script, or use jobs=1."
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the bars and notes of other libraries from burying our own."""
    level, bars = transformers.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()


class _Costs:
    """Seconds of each stage, kept over interruptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @contextlib.contextmanager
    def add(self, stage: str) -> Iterator[None]:
        """Adds the time of a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            _write(self.path, json.dumps(self.seconds) + "\n")


def _check_directory(output: Path) -> None:
    if output.is_file():
        raise FileExistsError(f"{output} is a file; name a directory.")
    if output.is_dir() and any(output.iterdir()) and not (output / _MANIFEST).is_file():
        raise FileExistsError(f"{output} is not empty and holds no comparison; name another directory.")


def _check_manifest(output: Path, settings: Mapping[str, Any]) -> None:
    """Writes down what all runs depend on, or compares it with what is there.

    Raises:
        ValueError: Something differs, by name.
    """
    path = output / _MANIFEST
    manifest = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "settings": json.loads(json.dumps(settings))}
    if not path.is_file():
        _write(path, json.dumps(manifest, indent=1) + "\n")
        return
    saved = _read_json(path)
    there, here = flattened(saved["settings"]), flattened(manifest["settings"])
    changed = differing(there, here)
    if changed:
        raise ValueError(
            f"{output} holds a comparison with another {', '.join(changed)}: {changed[0]} is "
            f"{there.get(changed[0])!r} there and {here.get(changed[0])!r} here. Name another output."
        )


def _read_run(path: Path) -> dict[str, Any]:
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    """Reads one of our files.

    Raises:
        ValueError: It is damaged, or of another version.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it.") from None
    if not isinstance(values, dict) or (values.get("format"), values.get("format_version")) != (
        _FORMAT,
        _FORMAT_VERSION,
    ):
        raise ValueError(f"{path} is not of a comparison that this bpo {bpo.__version__} reads.")
    return values


def _write(path: Path, text: str) -> None:
    """Writes a file, and the directory that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
