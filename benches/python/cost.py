"""How far the model of costs holds: ``python benches/python/cost.py``. Rates of four sizes, tried at a fifth.

Times are the processor's, with one thread, at best of several runs, since machines are noisy; the fifth size is larger
than the others, and differs from them in all that a stage depends on. ``--figure FILE`` draws what was found.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

import bpo
from bpo import _core
from bpo.evidence import cost
from bpo.pairs.clustering import cluster_pairs
from bpo.pairs.left_out import left_out_margins
from bpo.pairs.linear import training_direction
from bpo.pairs.pair_gradients import PairGradients, pair_norms, unit_features
from scaling import context, data, environment, free_port, model_and_tokenizer


@dataclasses.dataclass
class Case:
    """One size of a stage.

    Attributes:
        size: What it depends on, to be shown.
        counts: How much of each unit of work there is; the first is how much there is of it all, for the figure.
        run: Does it.
        clock: What measures it: that of the processor, or of the wall where others work or a disk does.
    """

    size: str
    counts: tuple[float, ...]
    run: Callable[[], object]
    clock: Callable[[], float] = time.process_time


def rows(n_prompts: int) -> list[dict]:
    """Prompts of 200 characters with four responses of 800."""
    return [
        {
            "prompt": f"{index}: " + "a question " * 18,
            "responses": [f"{number} {index} " + "an answer " * 80 for number in range(4)],
            "scores": [3.0, 1.0, 2.0, 0.0],
        }
        for index in range(n_prompts)
    ]


def points(n: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sketches around 64 directions, pairs and weights."""
    rng = np.random.default_rng(0)
    sketches = rng.standard_normal((64, dim))[rng.integers(64, size=n)] + rng.standard_normal((n, dim))
    pairs = np.stack([np.arange(n), np.arange(n) ^ rng.integers(1, 4, size=n)], axis=1)
    return sketches.astype(np.float32), pairs, np.tile(np.float32([1, -1]), (n, 1))


def reading() -> list[Case]:
    """Rows to pairs: responses."""
    sizes = {n: rows(n) for n in (3000, 6000, 9000, 12000, 24000)}
    return [
        Case(f"{4 * n:,} responses", (4 * n,), functools.partial(bpo.read_candidates, given))
        for n, given in sizes.items()
    ]


def extraction() -> list[Case]:
    """Gradients: tokens, and numbers of all gradients."""
    model, tokenizer = model_and_tokenizer()
    cases = []
    for n, rank in ((6, 8), (12, 4), (18, 16), (24, 8), (48, 12)):
        given = data(n)
        config = bpo.SelectConfig(lora_rank=rank, threads=1, tokens_per_batch=256)
        found = bpo.doctor(model, given, processing_class=tokenizer, config=config, seconds=0)

        def run(given: list[dict] = given, config: bpo.SelectConfig = config) -> object:
            with tempfile.TemporaryDirectory() as directory:
                return bpo.collect_gradients(
                    model, given, processing_class=tokenizer, store=Path(directory) / "s", config=config, progress=False
                )

        size = f"{found.tokens:,} tokens, {found.coordinates:,} coordinates"
        cases.append(Case(size, (found.tokens, found.responses * found.coordinates), run))
    return cases


def clustering() -> list[Case]:
    """k-means: products of pairs, clusters and numbers, of which later passes skip most; and what they read."""
    cases = []
    for n, k, dim, most in (
        (16384, 64, 512, 10),
        (32768, 64, 512, 5),
        (16384, 256, 512, 15),
        (32768, 128, 1024, 10),
        (65536, 256, 1024, 12),
    ):
        config = bpo.SelectConfig(n_clusters=k, max_iter=most, threads=1)
        given = points(n, dim)
        passes = len(cluster_pairs(*given, config=config).inertia)
        cases.append(
            Case(
                f"{n:,} pairs, k = {k}, d = {dim}, {passes} passes",
                (n * k * dim, passes * n * dim),
                lambda given=given, config=config: cluster_pairs(*given, config=config),
            )
        )
    return cases


def scoring() -> list[Case]:
    """Norms: numbers of the sketches of all pairs."""
    cases = []
    for n, dim in ((65536, 256), (32768, 512), (65536, 512), (131072, 256), (262144, 512)):
        gradients = PairGradients(*points(n, dim))
        cases.append(Case(f"{n:,} pairs, d = {dim}", (n * dim,), lambda gradients=gradients: pair_norms(gradients, 1)))
    return cases


def choosing() -> list[Case]:
    """A selection without gradients, reading included: responses and pairs are told apart by their number a prompt."""
    asked = {"budget": 0.2, "strategy": "margin", "progress": False, "evidence": False}
    sizes = {n: rows(n) for n in (2000, 4000, 6000, 8000, 16000)}
    return [
        Case(f"{6 * n:,} pairs", (6 * n,), functools.partial(bpo.select, None, given, **asked))
        for n, given in sizes.items()
    ]


def fitted(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds a unit, none below zero, by the least relative error; and a constant, the last."""
    from scipy.optimize import nnls

    design = np.column_stack([counts, np.ones(len(counts))])
    scale = design.max(axis=0)
    return nnls(design / scale / seconds[:, None], np.ones(len(seconds)))[0] / scale


def prompts_of(n: int) -> np.ndarray:
    """The prompts of :func:`points`: four responses each."""
    return np.arange(n) // 4


def regressing() -> list[Case]:
    """The regressions that lead a matching: numbers that are read in all steps."""
    cases = []
    for n, dim in ((4096, 256), (8192, 256), (4096, 512), (16384, 256), (24576, 512)):
        features = unit_gradients(n, dim)
        load = dataclasses.replace(LARGE, pairs=n, config=bpo.SelectConfig(sketch_dim=dim))
        run = functools.partial(training_direction, features, prompts_of(n), 0, None, 1)
        cases.append(Case(f"{n:,} pairs, d = {dim}", (load.regressed,), run))
    return cases


def picking() -> list[Case]:
    """The steps of a matching: numbers that are read."""
    cases = []
    for n, dim, budget in (
        (8192, 256, 500),
        (8192, 512, 2000),
        (16384, 256, 4000),
        (32768, 256, 1000),
        (32768, 512, 8000),
    ):
        features = unit_gradients(n, dim)
        load = dataclasses.replace(LARGE, responses=n, budget=budget, config=bpo.SelectConfig(sketch_dim=dim))
        run = functools.partial(_core.matching, *features, features.rows[0], budget, threads=1)
        cases.append(Case(f"{n:,} pairs, d = {dim}, {budget:,} picks", (load.picked,), run))
    return cases


def unit_gradients(n: int, dim: int) -> PairGradients:
    """Those of :func:`points`, at unit length."""
    gradients = PairGradients(*points(n, dim))
    return unit_features(gradients, pair_norms(gradients, 1), np.ones(n, bool))


def auditing() -> list[Case]:
    """Labels from which their prompt is left out: products of rows, of the matrix, and prompts."""
    cases = []
    for n, dim in ((2048, 256), (4096, 256), (2048, 768), (8192, 128), (1024, 1024), (4096, 512), (8192, 1024)):
        gradients = PairGradients(*points(n, dim))
        size = {"prompts": n // 4, "responses": n, "config": bpo.SelectConfig(sketch_dim=dim)}
        counts = dataclasses.replace(LARGE, **size).audited
        run = functools.partial(left_out_margins, [gradients], prompts_of(n))
        cases.append(Case(f"{n:,} pairs, d = {dim}", counts, run))
    return cases


def writing() -> list[Case]:
    """Bytes to the disk of the cache, until they are there."""
    return [
        Case(f"{size} MiB", (size << 20,), functools.partial(cost.write, size << 20), time.perf_counter)
        for size in (16, 32, 64, 128, 256)
    ]


def member(rank: int, port: int, mebibytes: int, found: multiprocessing.SimpleQueue) -> None:
    """One of two processes, the first of which tells the other a table that is on disk; seconds of both."""
    os.environ.update(environment(rank, 2, port))
    from bpo.system.packed import as_table
    from bpo.world.world import world

    batch = pa.record_batch({"number": np.arange(1 << 17)})  # a MiB
    table = None if rank else as_table(batch.schema, (batch for _ in range(mebibytes)))
    world().check_same({}, 600)
    for _ in range(3):
        begin = time.perf_counter()
        world().from_main(lambda: table)
        found.put(time.perf_counter() - begin)


def telling() -> list[Case]:
    """Bytes from one process to another on this machine, which writes them to its disk."""
    cases = []
    for size in (96, 128, 192, 256, 512):

        def seconds(size: int = size) -> float:
            server = context()
            found = server.SimpleQueue()
            members = [
                server.Process(target=member, args=(rank, port, size, found))
                for port in [free_port()]
                for rank in (0, 1)
            ]
            for each in members:
                each.start()
            for each in members:
                each.join()
            return min(found.get() for _ in range(6))

        clock = Measured(seconds)
        cases.append(Case(f"{size} MiB", (size << 20,), clock.run, clock.read))
    return cases


class Measured:
    """A clock of what measures itself: it goes on by the seconds that a run gives."""

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds, self._now = seconds, 0.0

    def run(self) -> None:
        """Runs."""
        self._now += self._seconds()

    def read(self) -> float:
        """Seconds of all runs."""
        return self._now


STAGES = {
    "read": reading,
    "extract": extraction,
    "cluster": clustering,
    "score": scoring,
    "match: fits": regressing,
    "match: picks": picking,
    "audit": auditing,
    "choose": choosing,
    "tell": telling,
    "write": writing,
}


_ACROSS = 5  # panels of a figure side by side


def draw(found: dict[str, list[dict]], path: str) -> None:
    """What was measured against what was foretold, a panel for each stage."""
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    plt.rcParams.update({"svg.hashsalt": "bpo", "svg.fonttype": "none", "font.size": 9})
    rows = -(-len(found) // _ACROSS)
    across = -(-len(found) // rows)
    figure, axes = plt.subplots(
        rows, across, figsize=(2.4 * across, 2.6 * rows), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    for axis, (name, cases) in zip(axes.flat, found.items(), strict=False):
        ends = [min(c["foretold"] for c in cases) / 1.5, max(c["foretold"] for c in cases) * 1.5]
        axis.fill_between(ends, [0.8 * end for end in ends], [1.2 * end for end in ends], color="#dddddd", lw=0)
        axis.loglog(ends, ends, color="#888888", lw=1)
        axis.loglog(
            [c["foretold"] for c in cases[:-1]],
            [c["seconds"] for c in cases[:-1]],
            "o",
            ms=5,
            mfc="none",
            color="#1f5fa8",
        )
        axis.loglog(cases[-1]["foretold"], cases[-1]["seconds"], "o", ms=6, color="#c0392b")
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_formatter(matplotlib.ticker.NullFormatter())  # which would write one over the other
        axis.set_title(name)
        axis.set_xlabel("seconds foretold")
    for first in axes[:, 0]:
        first.set_ylabel("seconds")
    figure.savefig(path, metadata={"Date": None})


# 100 million responses to 25 million prompts, of 1,000 tokens with their prompts, 3,000 characters alone. An H100 as
# docs/gpu.md found it with a model of 1B; rates of one core of the Xeon of docs/scaling.md, two of which
# each process has; a shared disk of 2 GB/s, and 10 Gbit/s between machines.
LARGE = cost.Load(
    prompts=25 * 10**6,
    responses=10**8,
    pairs=15 * 10**7,
    tokens=10**11,
    text_bytes=3 * 10**11,
    coordinates=10**6,
    config=bpo.SelectConfig(threads=2),
    budget=15 * 10**6,
)
H100 = cost.Rates(
    response=1.2e-5,
    token=1 / 57_900,
    coordinate=0.0,
    product=1.5e-10 / 2,
    number=7e-10 / 2,
    pair=1e-5,
    byte=1 / 2e9,
    sent=1 / 1.25e9,
    memory=4 << 30,
    regression=1e-10 / 2,
    pick=1.6e-10 / 2,
)


def extrapolate(processes: int) -> None:
    """Prints what the model says of 100 million responses, as a table."""
    print("| stage | by | time | memory of a process | disk | network |\n|---|---|--:|--:|--:|--:|")
    for stage in cost.stages(LARGE, H100, processes):
        sizes = (f"{size / 1e9:,.0f} GB" for size in (stage.memory_bytes, stage.disk_bytes, stage.network_bytes))
        print(f"| {stage.name} | {stage.by} | {stage.seconds / 3600:,.2f} h | {' | '.join(sizes)} |")


def main() -> None:
    """Prints what was measured and foretold for each stage and size, and a JSON of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--figure")
    parser.add_argument(
        "--large", type=int, metavar="N", help="what 100 million responses would take on N H100, at once"
    )
    options = parser.parse_args()
    if options.large:
        extrapolate(options.large)
        return
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: dict[str, list[dict]] = {}
    for name in options.only:
        cases = STAGES[name]()
        cases[0].run()  # whatever is done once
        seconds = np.array([cost.least_seconds(case.run, options.rounds, case.clock) for case in cases])
        counts = np.array([case.counts for case in cases])
        rates = fitted(counts[:-1], seconds[:-1])
        foretold = np.column_stack([counts, np.ones(len(counts))]) @ rates
        found[name] = [
            {"size": case.size, "seconds": float(took), "foretold": float(said)}
            for case, took, said in zip(cases, seconds, foretold, strict=True)
        ]
        for case, took, said in zip(cases, seconds, foretold, strict=True):
            tried = "   tried" if case is cases[-1] else "   fitted"
            print(
                f"{name:8} {case.size:44} {took:8.2f} s, foretold {said:8.2f} s, {said / took - 1:+6.1%}{tried}",
                flush=True,
            )
        print(
            f"{name:8} seconds a unit: {', '.join(f'{rate:.3g}' for rate in rates[:-1])}; and {rates[-1]:.2g} s",
            flush=True,
        )
    if options.figure:
        draw(found, options.figure)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
