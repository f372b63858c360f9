"""The runs of a comparison: select, train, evaluate, each on its own, here or in other processes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import pickle
import sys
import tempfile
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import transformers

from bpo.data.tokenizers import load_tokenizer
from bpo.evidence.compare.config import UNTRAINED
from bpo.evidence.compare.files import HEADER, read, timed, write
from bpo.evidence.evaluate import PreferenceEvaluation, policy_logps
from bpo.evidence.win_rates import compare_responses
from bpo.pairs.length import turn
from bpo.selection.request import count_of
from bpo.selection.select import select
from bpo.selection.strategies.register import STRATEGIES
from bpo.system.processes import Workers, cores
from bpo.training.dpo import dpo_config, train_on_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from transformers import PreTrainedModel

    from bpo.evidence.compare.plan import Plan, Split, Task
    from bpo.selection.strategies.candidacy import Strategy

# What says of a run which pairs it is trained on.
_SAME = ("pairs", "turned")

_CHOOSE, _MAKE = "choose", "make"
_MEASURES = ("accuracy", "length_controlled_accuracy", "margin", "likelihood_accuracy")


def attempt_runs(
    plan: Plan, tasks: Sequence[Task], jobs: int, own: Mapping[str, Strategy]
) -> Iterator[tuple[Task, str | None]]:
    """Makes runs and writes the file of each.

    Args:
        plan: What they share.
        tasks: The runs, in the order in which they are begun.
        jobs: Runs at a time, each in a process of its own; one is made here.
        own: Strategies that a user registered, which other processes do not know.

    Yields:
        Each run when it is done, and the traceback of what went wrong, or None.
    """
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            outcome = _attempt(plan, task, _run)
            assert not isinstance(outcome, _Chose)
            yield task, outcome
        return
    plan = dataclasses.replace(plan, threads=max(1, cores() // jobs))
    with Workers(functools.partial(_attempt_elsewhere, plan, own), min(jobs, len(tasks))) as workers:
        # All choose before one is trained, so that of those that chose the same pairs it is the first that is trained,
        # and not whichever came sooner.
        chosen: dict[str, list[Task]] = {}
        for (_, task), outcome in workers.each([(_CHOOSE, task) for task in tasks]):
            if isinstance(outcome, _Chose):
                chosen.setdefault(outcome.pairs, []).append(task)
            else:
                yield task, outcome
        while chosen:
            for alike in chosen.values():
                alike.sort(key=tasks.index)
            first = sorted((alike.pop(0) for alike in chosen.values()), key=tasks.index)
            for (_, task), outcome in workers.each([(_MAKE, task) for task in first]):
                yield task, outcome
            chosen = {pairs: alike for pairs, alike in chosen.items() if alike}


def untrained(plan: Plan, seed: int) -> dict[str, Any]:
    """Returns the run of the starting policy, which needs none."""
    pairs = plan.split(seed).heldout
    data = plan.evaluated
    tokenized, ref_logps = data.responses(pairs)
    beta = plan.config.shared.beta
    evaluation = PreferenceEvaluation.of(tokenized, data.prompt_of_pair[pairs], ref_logps, ref_logps, beta)
    return {"seed": seed, "arm": UNTRAINED, "budget": 0, **_measures(evaluation)}


def check_reachable(own: Mapping[str, Strategy]) -> None:
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


def _attempt_elsewhere(plan: Plan, own: Mapping[str, Strategy], job: tuple[str, Task]) -> _Chose | str | None:
    """Makes a run, or its choice, in a process that knows only bpo's own strategies."""
    STRATEGIES.update(own)
    stage, task = job
    return _attempt(plan, task, _run if stage == _MAKE else _choose_or_copy)


def _attempt(plan: Plan, task: Task, make: Callable[[Plan, Task], dict[str, Any] | _Chose]) -> _Chose | str | None:
    """Makes a run and writes its file; returns the traceback of what went wrong."""
    try:
        with _quiet():
            run = make(plan, task)
        if isinstance(run, _Chose):
            return run
        write(plan.files.run(task.name), json.dumps(run) + "\n")
    except Exception:
        return traceback.format_exc()
    finally:
        gc.collect()  # the trainer and its model hold each other
    return None


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


def _run(plan: Plan, task: Task) -> dict[str, Any]:
    """Selects, trains and evaluates; takes training and evaluation from a run on the same pairs where there is one."""
    split = plan.split(task.seed)
    chosen, run, seconds = _choose(plan, task, split)
    twin = _twin(plan, task, run)
    if twin is not None:
        return _copied(run, twin, seconds)
    with timed(seconds, "training"):
        policy = _train(plan, task, chosen)
    with timed(seconds, "evaluation"):
        run |= _measures(_evaluate(plan, policy, split.heldout))
    if plan.config.scorer is not None:
        with timed(seconds, "sampling"):
            run["measures"] |= _win_rates(plan, task, policy, split.heldout)
    return {**run, "seconds": seconds}


def _choose_or_copy(plan: Plan, task: Task) -> dict[str, Any] | _Chose:
    """Selects, and returns the whole run where one on the same pairs is there already."""
    _, run, seconds = _choose(plan, task, plan.split(task.seed))
    twin = _twin(plan, task, run)
    if twin is not None:
        return _copied(run, twin, seconds)
    return _Chose(json.dumps([task.seed, *(run.get(name) for name in _SAME)]))


def _choose(plan: Plan, task: Task, split: Split) -> tuple[_Chosen, dict[str, Any], dict[str, float]]:
    """Returns the pairs that an arm chooses, what its run says of them, and the seconds that it took."""
    seconds: dict[str, float] = {}
    with timed(seconds, "selection"):
        chosen = _select(plan, task, split)
    run = {
        **HEADER,
        "seed": task.seed,
        "arm": task.arm.name,
        "budget": task.budget,
        "arm_settings": task.arm.settings(),
        "n_pairs": len(chosen.pairs),
        "n_prompts": chosen.n_prompts,
        "warnings": chosen.warnings,
        "pairs": chosen.pairs.tolist(),
        "heldout_pairs": split.heldout.tolist(),
        "same_as": None,
        **({"turned": chosen.pairs[chosen.turned].tolist()} if chosen.turned.any() else {}),
    }
    return chosen, run, seconds


def _copied(run: dict[str, Any], twin: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """A run with the training and evaluation of another one on the same pairs."""
    copied = {name: twin[name] for name in ("measures", "correct")}
    return {**run, **copied, "same_as": twin["arm"], "seconds": {**twin["seconds"], **seconds}}


@dataclasses.dataclass(frozen=True)
class _Chose:
    """That a run only chose so far: which pairs, as text."""

    pairs: str


@dataclasses.dataclass(frozen=True, eq=False)
class _Chosen:
    """What an arm chose, in the order of the data, so that the same pairs are the same training.

    Attributes:
        pairs: (n,) int64, of the pool.
        dataset: The same as TRL takes them.
        turned: (n,) bool, which of them length control turned round.
        n_prompts: Prompts that have one.
        warnings: Of the selection.
    """

    pairs: npt.NDArray[np.int64]
    dataset: Any
    turned: npt.NDArray[np.bool_]
    n_prompts: int
    warnings: list[str]


def _select(plan: Plan, task: Task, split: Split) -> _Chosen:
    """Chooses pairs of a split to train on."""
    config, arm, rows = plan.config, task.arm, plan.pool.rows
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        selection = select(
            config.model if arm.needs_model else None,
            [rows[pair] for pair in split.train],
            budget=count_of(task.budget, len(split.train)),
            breadth=arm.breadth,
            processing_class=config.processing_class,
            strategy=arm.strategy,
            target=[rows[pair] for pair in split.target] if arm.needs_target else None,
            store=(arm.store or plan.store) if arm.needs_gradients else None,
            config=arm.select if arm.select.threads else dataclasses.replace(arm.select, threads=plan.threads),
            seed=task.seed,
            progress=False,
            evidence=False,
        )
    pairs = split.train[np.array(selection.dataset["bpo_row"])]
    order = np.argsort(pairs)
    pairs, dataset = pairs[order], selection.dataset.select(order)
    return _Chosen(
        pairs,
        dataset,
        turned=np.array([text == rows[pair]["rejected"] for pair, text in zip(pairs, dataset["chosen"], strict=True)]),
        n_prompts=int((selection.depth > 0).sum()),
        warnings=[str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)],
    )


def _twin(plan: Plan, task: Task, here: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns a finished run of the same seed on the same pairs, the same way round."""
    for path in plan.files.runs_of(task.seed):
        run = plan.read_run(path)
        same = all(run.get(name) == here.get(name) for name in _SAME)
        if same and run["same_as"] is None:
            return run
    return None


def _train(plan: Plan, task: Task, chosen: _Chosen) -> PreTrainedModel:
    """Trains on the pairs that were chosen."""
    config, known = plan.config, plan.train_ref_logps
    with tempfile.TemporaryDirectory(prefix="bpo-compare-") as scratch:
        return train_on_pairs(
            config.model,
            chosen.dataset,
            dpo_config(config.training, scratch, task.seed),
            processing_class=config.processing_class,
            peft_config=config.peft_config,
            ref_logps=None if known is None else known[turn(plan.pool.tokenized.pairs[chosen.pairs], chosen.turned)],
        )


def _evaluate(plan: Plan, policy: PreTrainedModel, pairs: npt.NDArray[np.int64]) -> PreferenceEvaluation:
    """Ranks held-out pairs by a trained policy."""
    config, data = plan.config, plan.evaluated
    tokenized, ref_logps = data.responses(pairs)
    tokenizer = load_tokenizer(config.model, config.processing_class, config.shared)
    logps = policy_logps(policy, tokenized, tokenizer, config.evaluation, stage="Evaluation", progress=False)
    if not np.isfinite(logps).all():
        raise ValueError(
            f"The trained policy gives {int((~np.isfinite(logps)).sum())} held-out responses no finite "
            "log-probability: lower training.learning_rate."
        )
    return PreferenceEvaluation.of(tokenized, data.prompt_of_pair[pairs], logps, ref_logps, config.shared.beta)


def _measures(evaluation: PreferenceEvaluation) -> dict[str, Any]:
    """What a run keeps of its evaluation."""
    return {
        "measures": {name: getattr(evaluation, name) for name in _MEASURES},
        "correct": evaluation.correct.tolist(),
    }


def _win_rates(plan: Plan, task: Task, policy: PreTrainedModel, pairs: npt.NDArray[np.int64]) -> dict[str, float]:
    """Compares sampled responses with those of the starting policy, and keeps them to look at."""
    config, files = plan.config, plan.files
    tokenizer = load_tokenizer(config.model, config.processing_class, config.shared)
    sampled = config.scorer.sample(policy, plan.prompts(pairs), tokenizer, task.seed)
    start = read(files.start_responses(task.seed), {"rows": list})["rows"]
    wins = compare_responses(start, sampled, config.scorer.build(files.verdicts))
    write(files.responses / f"{task.name}.jsonl", "".join(json.dumps(row) + "\n" for row in wins.rows))
    return wins.measures
