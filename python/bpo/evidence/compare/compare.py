"""``compare``: the same training on the pairs of several strategies, over several seeds, and what it was good for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from bpo.evidence.compare.config import CompareConfig
from bpo.evidence.compare.files import ComparisonFiles, write
from bpo.evidence.compare.plan import Task
from bpo.evidence.compare.prepare import prepare
from bpo.evidence.compare.results import summarize, table
from bpo.evidence.compare.runs import attempt_runs, check_reachable, untrained
from bpo.pairs.linear import linearised_correct
from bpo.report.comparison_page import write_report
from bpo.selection.sources import StoreAlone
from bpo.selection.strategies.register import registered
from bpo.store.gradient_store import GradientStore, StoreMismatchError
from bpo.system.optional import import_matplotlib
from bpo.system.paths import check_not_within
from bpo.world.world import world

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from bpo.evidence.compare.plan import Plan
    from bpo.selection.strategies.candidacy import Strategy


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
        ValueError: A bad setting, by the name of its field; unusable data; an ``output`` with other settings; several
            processes that a launcher started; or, with several jobs, a strategy of your own that other processes cannot
            import.
        FileNotFoundError: A path that does not exist.
        FileExistsError: An ``output`` that holds something else.
        BlockingIOError: An ``output`` in which another comparison is at work.
        ImportError: matplotlib is missing: ``pip install 'balanced-preference-optimization[compare]'``.

    Example:
        .. code-block:: python

            comparison = bpo.compare("compare.yaml", "comparison")
            print(comparison.summary())
    """
    config = CompareConfig.of(config)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"jobs must be a whole number of at least 1, got {jobs!r}")
    if (size := world().size) > 1:
        raise ValueError(
            f"A comparison trains in processes of its own (jobs), and this is one of {size} that a launcher started: "
            "start it without one, or in one process within `with bpo.alone():`."
        )
    # Before hours of work whose results could not be told.
    import_matplotlib()
    files = ComparisonFiles(Path(output))
    files.check_directory()
    check_not_within("output", files.directory, {"store": config.store, **{arm.name: arm.store for arm in config.arms}})
    own = registered(arm.strategy for arm in config.arms)
    if jobs > 1:
        check_reachable(own)
    with files.locked():
        plan = prepare(config, files, progress)
        tasks = [Task(seed, arm, budget) for seed in config.seeds for budget in config.budget for arm in config.arms]
        for task in tasks:
            plan.check(task)
        failures = _run_missing(plan, tasks, jobs, own, progress)
        runs = [plan.read_run(files.run(task.name)) for task in tasks if plan.finished(task)]
        _foretell(plan, runs)
        results = summarize(runs, [untrained(plan, seed) for seed in config.seeds], plan.description())
        write(files.results, json.dumps(results, indent=1) + "\n")
        write_report(results, failures, files.directory)
    return Comparison(files.directory, results, failures)


def _run_missing(
    plan: Plan, tasks: list[Task], jobs: int, own: Mapping[str, Strategy], progress: bool
) -> dict[str, str]:
    """Makes the runs that are not there; returns those that failed, and why."""
    missing = [task for task in tasks if not plan.finished(task)]
    failures: dict[str, str] = {}
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(missing), desc="Runs", unit="run", disable=not progress
    ) as bar:
        for task, error in attempt_runs(plan, missing, jobs, own):
            errors = plan.files.errors(task.name)
            if error is None:
                errors.unlink(missing_ok=True)
            else:
                failures[task.name] = error.strip().splitlines()[-1]
                write(errors, error)
            bar.update()
    return failures


def _foretell(plan: Plan, runs: list[dict[str, Any]]) -> None:
    """Adds to each run what the linearised regime makes of its pairs, where the store holds what that takes."""
    if plan.store is None or not runs:
        return
    try:
        source = StoreAlone(GradientStore.open(plan.store), plan.config.shared)
    except StoreMismatchError:  # a store that no arm read
        return
    pool = source.of_tokens(plan.pool.tokenized)
    evaluated = pool if plan.heldout is None else source.of_tokens(plan.heldout.tokenized)
    if pool is None or evaluated is None:
        return
    gradients, heldout = pool.gradients[0], evaluated.gradients[0]
    for run in runs:
        pairs, held = np.array(run["pairs"]), np.array(run["heldout_pairs"])
        # With the policy as its own reference, a pair that is turned round has the opposite gradient.
        signs = np.where(np.isin(pairs, run.get("turned", [])), np.float32(-1), np.float32(1))[:, None]
        training = gradients.take(pairs)
        training = training._replace(coefficients=training.coefficients * signs)
        correct = linearised_correct(training, heldout.take(held))
        run["measures"] = {**run["measures"], "linearised_accuracy": float(correct.mean())}
