"""Each kernel of the core beside its peers and the limits of the machine, in one run: prints one table of ratios.

    python benches/python/peers.py               # short mode, under two minutes
    python benches/python/peers.py --full        # shapes of real jobs
    python benches/python/peers.py --only kmeans --json FILE

The sides of a case take turns, several rounds; a ratio is the median of the rounds, with the least and the greatest. It
is the peer's time over ours, or our rate over the limit's, so that more is better everywhere. Every side has the same
threads, the same input and, in k-means, the same first centroids. Peers are written as fast as we know how. The goal of
a case is set against its fastest peer.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import sklearn.cluster
import threadpoolctl
import torch

from bpo import _core
from table import Row, optional, peak_memory, printed, shown_rate, shown_time, spread

# Optional peers, and how to get them; all that TRAK needs for its projector is torch.
OPTIONAL = {"faiss": "pip install faiss-cpu", "TRAK BasicProjector": "pip install --no-deps traker"}
# A pool of threads that has just worked spins for some milliseconds, at the cost of whoever comes next.
PAUSE = 0.05


# Measuring


@dataclass(frozen=True)
class Side:
    """Something to be timed: one run, less the time of another, over the number of repeats."""

    name: str
    run: Callable[[], object]
    less: Callable[[], object] | None = None
    repeats: int = 1
    # What one repeat moves or computes, in units of 1e9; only of limits, and of what is compared with them.
    amount: float | None = None
    unit: str = ""

    def seconds(self) -> float:
        spent = _timed(self.run) - (_timed(self.less) if self.less else 0)
        return max(spent, 1e-9) / self.repeats


def _timed(run: Callable[[], object]) -> float:
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Settings:
    """How long to measure, and with how many threads."""

    full: bool
    threads: int

    def choose(self, short: int, full: int) -> int:
        return full if self.full else short

    @property
    def rounds(self) -> int:
        return self.choose(6, 11)

    @property
    def seconds_a_side(self) -> float:
        return 30 if self.full else 0.5


def interleave(sides: list[Side], settings: Settings) -> dict[str, list[float]]:
    """Seconds of each side in each round. The first round only warms up; slow sides sit out the later ones."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    spent = dict.fromkeys(times, 0.0)
    for _ in range(settings.rounds):
        for side in sides:
            # Three rounds at least, unless that takes several times as long.
            share = settings.seconds_a_side * (4 if len(times[side.name]) < 4 else 1)
            if spent[side.name] < share:
                start = time.perf_counter()
                times[side.name].append(side.seconds())
                spent[side.name] += time.perf_counter() - start
    return {name: seconds[1:] or seconds for name, seconds in times.items()}


def compare(
    name: str,
    settings: Settings,
    ours: Side,
    peers: list[Side | str],
    *,
    limits: list[Side] | None = None,
    goal: float | None = None,
    limit_goal: float | None = None,
) -> Iterator[Row]:
    """One row for each peer and each limit; the goal is set against the fastest peer, and against every limit.

    A peer given as text is one that is not installed.
    """
    limits = limits or []
    present = [peer for peer in peers if isinstance(peer, Side)]
    times = interleave([ours, *present, *limits], settings)
    fastest = min(present, key=lambda peer: statistics.median(times[peer.name]), default=None)
    for peer in present:
        ratios = [theirs / mine for mine, theirs in zip(times[ours.name], times[peer.name], strict=False)]
        yield Row(
            name,
            shown_time(times[ours.name]),
            peer.name,
            shown_time(times[peer.name]),
            spread(ratios),
            goal if peer is fastest else None,
        )
    for limit in limits:
        rates = [
            (ours.amount / mine) / (limit.amount / theirs)
            for mine, theirs in zip(times[ours.name], times[limit.name], strict=False)
        ]
        yield Row(
            name,
            shown_rate(ours.amount, times[ours.name], limit.unit),
            limit.name,
            shown_rate(limit.amount, times[limit.name], limit.unit),
            spread(rates),
            limit_goal,
        )
    for peer in peers:
        if isinstance(peer, str):
            yield Row(name, "", peer, f"not installed: {OPTIONAL[peer]}")


# Limits of the machine


@functools.cache
def large_buffer() -> torch.Tensor:
    """512 MiB, far more than any cache."""
    return torch.ones(1 << 27)


def reading() -> Side:
    buffer = large_buffer()
    return Side("memory read (torch sum)", buffer.sum, amount=buffer.nbytes / 1e9, unit="GB/s")


def product(left: np.ndarray, right: np.ndarray) -> Side:
    out = np.empty((len(left), right.shape[1]), dtype=np.float32)
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    return Side("product (NumPy)", lambda: np.matmul(left, right, out=out), amount=flops / 1e9, unit="GFLOP/s")


def machine(settings: Settings) -> Iterator[Row]:
    rows, centroids = normal(settings.choose(20_000, 100_000), 512), normal(256, 512)
    numpy_side = product(rows, centroids.T)
    left, right = torch.from_numpy(rows), torch.from_numpy(centroids).T
    out = torch.empty(len(rows), 256)
    torch_side = Side(
        "product (torch)", lambda: torch.mm(left, right, out=out), amount=numpy_side.amount, unit="GFLOP/s"
    )
    sides = [numpy_side, torch_side, reading()]
    times = interleave(sides, settings)
    for side in sides:
        yield Row("limits of the machine", "", side.name, shown_rate(side.amount, times[side.name], side.unit))


# Data


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def clusters(rows: int, columns: int, k: int, noise: float) -> np.ndarray:
    """Points around k centres in turn, the first k one of each."""
    points = noise * normal(rows, columns)
    points += normal(k, columns, seed=1)[np.arange(rows) % k]
    return points


def preference_pairs(prompts: int, responses: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sketches of the responses, all pairs of each prompt, and coefficients that give the pairs unit length."""
    sketches = normal(prompts * responses, dim)
    one = np.array(list(itertools.combinations(range(responses), 2)))
    pairs = (one + responses * np.arange(prompts)[:, None, None]).reshape(-1, 2)
    coefficients = np.tile(np.float32([-1, 1]), (len(pairs), 1))
    coefficients /= _core.pair_norms(sketches, pairs, coefficients)[:, None]
    return sketches, pairs, coefficients


def materialised(sketches: np.ndarray, pairs: np.ndarray, coefficients: np.ndarray, part: int = 4096) -> np.ndarray:
    """The pairs as points, made in parts so that nothing but the points stays in memory."""
    points = np.empty((len(pairs), sketches.shape[1]), dtype=np.float32)
    for start in range(0, len(pairs), part):
        rows = slice(start, start + part)
        first, second = sketches[pairs[rows, 0]], sketches[pairs[rows, 1]]
        first *= coefficients[rows, :1]
        second *= coefficients[rows, 1:]
        np.add(first, second, out=points[rows])
    return points


# Sketches


def sparse_sketch(
    settings: Settings,
    kind: str,
    rows: int = 16,
    width: int = 1_000_000,
    dim: int = 1024,
    limit_goal: float = 0.75,
) -> Iterator[Row]:
    wide = normal(rows, width)
    tensor = torch.from_numpy(wide).to(getattr(torch, kind))
    gradients = tensor.view(torch.uint16).numpy() if kind == "bfloat16" else tensor.numpy()
    generator = np.random.default_rng(1)
    bucket, negative = generator.integers(0, dim, width), generator.integers(0, 2, width)
    # Two buckets for each number of the sketch, one to add and one to subtract, spare the peers a pass for the signs.
    signed = bucket + dim * negative
    index = torch.from_numpy(signed)
    matrix = scipy.sparse.csr_matrix(
        ((1 - 2 * negative).astype(np.float32), bucket, np.arange(width + 1)), (width, dim)
    )

    def index_add() -> torch.Tensor:
        sums = torch.zeros(rows, 2 * dim)
        for sketch, row in zip(sums, tensor, strict=True):
            sketch.index_add_(0, index, row.float())
        return sums[:, :dim] - sums[:, dim:]

    def scatter_add() -> torch.Tensor:
        sums = torch.zeros(rows, 2 * dim).scatter_add_(1, index.expand(rows, -1), tensor.float())
        return sums[:, :dim] - sums[:, dim:]

    def bincount() -> np.ndarray:
        sums = np.stack([np.bincount(signed, weights=row.float().numpy(), minlength=2 * dim) for row in tensor])
        return sums[:, :dim] - sums[:, dim:]

    sketcher = _core.Sketcher(dim)
    yield from compare(
        f"sparse sketch, {rows} x {width:,} {kind} to {dim}",
        settings,
        Side("ours", lambda: sketcher.sketch(gradients, threads=settings.threads), amount=gradients.nbytes / 1e9),
        [
            Side("torch index_add_", index_add),
            Side("torch scatter_add_", scatter_add),
            Side("numpy bincount", bincount),
            # What scikit-learn's SparseRandomProjection does.
            Side("SciPy sparse product", lambda: tensor.float().numpy() @ matrix),
        ],
        limits=[reading()],
        goal=15,
        limit_goal=limit_goal,
    )


def dense_sketch(settings: Settings, kind: str, rows: int) -> Iterator[Row]:
    width, dim = settings.choose(20_000, 200_000), 1024
    gradients = normal(rows, width)
    sketcher = _core.Sketcher(dim, kind=kind)
    peers: list[Side | str] = ["TRAK BasicProjector"]
    if projectors := optional("trak.projectors"):
        projector = projectors.BasicProjector(width, dim, seed=0, proj_type=kind, device="cpu")
        tensor = torch.from_numpy(gradients)
        peers = [Side("TRAK BasicProjector", lambda: projector.project(tensor, model_id=0))]
    limit = product(gradients, normal(width, dim))
    yield from compare(
        f"{kind} sketch, {rows} x {width} to {dim}",
        settings,
        Side("ours", lambda: sketcher.sketch(gradients, threads=settings.threads), amount=limit.amount),
        peers,
        limits=[limit],
        goal=20,
        limit_goal=0.5,
    )


# k-means


def scikit_learn_kmeans(points: np.ndarray, init: np.ndarray, iterations: int, algorithm: str = "lloyd") -> object:
    model = sklearn.cluster.KMeans(
        len(init), init=init, n_init=1, max_iter=iterations, tol=0, algorithm=algorithm, copy_x=False
    )
    return model.fit(points)


def faiss_kmeans(points: np.ndarray, init: np.ndarray, iterations: int) -> object:
    """All points train, and get their labels."""
    faiss = optional("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    model = faiss.Kmeans(
        points.shape[1], len(init), niter=iterations, max_points_per_centroid=len(points), min_points_per_centroid=1
    )
    model.train(points, init_centroids=init)
    return model.index.search(points, 1)


def torch_kmeans(points: np.ndarray, init: np.ndarray, iterations: int, tile: int = 4096) -> object:
    """Tiles of product and argmin, then index_add_."""
    rows, centroids = torch.from_numpy(points), torch.from_numpy(init).clone()

    def labels() -> torch.Tensor:
        half_norms = centroids.square().sum(dim=1) / 2
        return torch.cat(
            [torch.addmm(half_norms, part, centroids.T, alpha=-1).argmin(dim=1) for part in rows.split(tile)]
        )

    for _ in range(iterations):
        own = labels()
        counts = torch.bincount(own, minlength=len(centroids)).clamp(min=1)
        centroids = torch.zeros_like(centroids).index_add_(0, own, rows) / counts[:, None]
    return labels()


def kmeans_peers(
    points: Callable[[], np.ndarray], init: np.ndarray, iterations: int, *, elkan: bool = True
) -> list[Side | str]:
    """The fixed iterations of each peer, on points that are made within its time."""
    peers: list[Side | str] = [
        Side("scikit-learn lloyd", lambda: scikit_learn_kmeans(points(), init, iterations)),
        Side("torch tiles", lambda: torch_kmeans(points(), init, iterations)),
        Side("faiss", lambda: faiss_kmeans(points(), init, iterations)) if optional("faiss") else "faiss",
    ]
    if elkan:
        peers.append(Side("scikit-learn elkan", lambda: scikit_learn_kmeans(points(), init, iterations, "elkan")))
    return peers


def kmeans_iterations(settings: Settings, k: int) -> Iterator[Row]:
    n, d, iterations = settings.choose(6000, 200_000), 512, settings.choose(5, 10)
    points = clusters(n, d, k, noise=4)
    init = points[:k].copy()
    yield from compare(
        f"kmeans, {n} x {d}, k = {k}, {iterations} iterations from the same centroids",
        settings,
        Side("ours", lambda: _core.kmeans(points, k, init=init, max_iter=iterations, tol=0, threads=settings.threads)),
        kmeans_peers(lambda: points, init, iterations, elkan=settings.full),
        goal=1.3,
    )


def assignment(settings: Settings, k: int) -> Iterator[Row]:
    points, centroids = normal(settings.choose(10_000, 100_000), 512), normal(k, 512, seed=1)
    limit = product(points, centroids.T)
    yield from compare(
        f"assign, {len(points)} x 512, k = {k}",
        settings,
        Side("ours", lambda: _core.assign(points, centroids, threads=settings.threads), amount=limit.amount),
        [],
        limits=[limit],
        limit_goal=0.88 if k >= 256 else 0.65,
    )


def kmeans_to_convergence(settings: Settings, *, own_seeding: bool) -> Iterator[Row]:
    n, k = settings.choose(4000, 200_000), settings.choose(32, 256)
    # Clusters that touch, so that it takes some iterations.
    points = clusters(n, 512, k, noise=4)
    inertias: dict[str, list[float]] = {"ours": [], "theirs": []}
    seeds = {name: itertools.count() for name in inertias}
    init = points[:k].copy()

    def ours() -> None:
        start = "k-means++" if own_seeding else init
        result = _core.kmeans(
            points, k, init=start, max_iter=300, tol=1e-4, seed=next(seeds["ours"]), threads=settings.threads
        )
        inertias["ours"].append(float(result.inertia[-1]))

    def theirs() -> None:
        start = "k-means++" if own_seeding else init
        model = sklearn.cluster.KMeans(
            k, init=start, n_init=1, max_iter=300, tol=1e-4, random_state=next(seeds["theirs"]), copy_x=False
        ).fit(points)
        inertias["theirs"].append(model.inertia_)

    name = f"kmeans, {n} x 512, k = {k}, to convergence, {'own seeding' if own_seeding else 'same centroids'}"
    yield from compare(name, settings, Side("ours", ours), [Side("scikit-learn lloyd", theirs)], goal=2)
    mine, peer = statistics.median(inertias["ours"]), statistics.median(inertias["theirs"])
    ratios = [other / own for own, other in zip(inertias["ours"], inertias["theirs"], strict=False)]
    yield Row(f"{name}: inertia", f"{mine:.6g}", "scikit-learn lloyd", f"{peer:.6g}", spread(ratios))


def pair_kmeans_time(settings: Settings) -> Iterator[Row]:
    prompts, responses, dim, k = settings.choose(300, 4000), 8, 1024, 256
    iterations = settings.choose(3, 10)
    sketches, pairs, coefficients = preference_pairs(prompts, responses, dim)
    init = materialised(sketches, pairs[:: len(pairs) // k][:k], coefficients[:: len(pairs) // k][:k])
    yield from compare(
        pair_kmeans_name(prompts, responses, dim, k),
        settings,
        Side(
            "ours",
            lambda: _core.pair_kmeans(
                sketches, pairs, coefficients, k, init=init, max_iter=iterations, tol=0, threads=settings.threads
            ),
        ),
        kmeans_peers(lambda: materialised(sketches, pairs, coefficients), init, iterations, elkan=False),
        goal=4,
    )


def pair_kmeans_name(prompts: int, responses: int, dim: int, k: int) -> str:
    return f"pair_kmeans, {prompts} prompts x {responses} responses, d = {dim}, k = {k}"


def pair_kmeans_memory(settings: Settings) -> Iterator[Row]:
    """Peaks of processes of their own, over what importing takes; the sketches are counted on both sides."""
    shape = (settings.choose(2000, 8000), 8, 1024, 256)
    peers = {"scikit-learn": "scikit-learn lloyd"}
    if settings.full:
        peers["torch"] = "torch tiles"
        if optional("faiss"):
            peers["faiss"] = "faiss"
    processes = {}
    for side in ("ours", *peers):
        command = [sys.executable, __file__, "--peak", side, *map(str, shape), "--threads", str(settings.threads)]
        processes[side] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {side: float(process.communicate()[0]) for side, process in processes.items()}
    least = min(peaks[side] for side in peers)
    for side, name in peers.items():
        ratio = peaks[side] / peaks["ours"]
        yield Row(
            f"{pair_kmeans_name(*shape)}: peak memory",
            f"{peaks['ours']:.0f} MB",
            name,
            f"{peaks[side]:.0f} MB",
            spread([ratio]),
            3 if peaks[side] == least else None,
        )


def peak_of_pair_kmeans(side: str, prompts: int, responses: int, dim: int, k: int, threads: int) -> float:
    """Megabytes by which a clustering of pairs raises the peak of this process."""
    warm = normal(600, 8)
    clustering = {"scikit-learn": scikit_learn_kmeans, "torch": torch_kmeans, "faiss": faiss_kmeans}.get(side)
    if clustering:
        clustering(warm, warm[:4].copy(), 1)
    before = peak_memory()
    sketches, pairs, coefficients = preference_pairs(prompts, responses, dim)
    init = materialised(sketches, pairs[:k], coefficients[:k])
    if clustering:
        clustering(materialised(sketches, pairs, coefficients), init, 1)
    else:
        _core.pair_kmeans(sketches, pairs, coefficients, k, init=init, max_iter=1, tol=0, threads=threads)
    return peak_memory() - before


def seeding_passes(settings: Settings) -> Iterator[Row]:
    n, d, k = settings.choose(6000, 100_000), 512, 1024
    points = clusters(n, d, k, noise=2)
    init = points[:k].copy()

    def run(start: str | np.ndarray, iterations: int) -> Callable[[], object]:
        keywords = {"init": start, "max_iter": iterations, "tol": 0, "threads": settings.threads}
        return lambda: _core.kmeans(points, k, **keywords)

    yield from compare(
        f"seeding, {n} x {d}, k = {k}, against a Lloyd pass",
        settings,
        Side("ours", run("k-means++", 1), less=run(init, 1)),
        [Side("one pass of ours", run(init, 4), less=run(init, 1), repeats=3)],
        goal=1 / 3,
    )


def seeding_time(settings: Settings) -> Iterator[Row]:
    n, d, k = settings.choose(6000, 100_000), 512, settings.choose(64, 1024)
    points = clusters(n, d, k, noise=2)
    init = points[:k].copy()
    keywords = {"max_iter": 1, "tol": 0, "threads": settings.threads}
    yield from compare(
        f"seeding, {n} x {d}, k = {k}",
        settings,
        Side(
            "ours",
            lambda: _core.kmeans(points, k, **keywords),
            less=lambda: _core.kmeans(points, k, init=init, **keywords),
        ),
        [Side("scikit-learn kmeans_plusplus", lambda: sklearn.cluster.kmeans_plusplus(points, k, random_state=0))],
    )


def mini_batches(settings: Settings) -> Iterator[Row]:
    """Seconds until the inertia over all points is that near to where Lloyd ends, from the same centroids."""
    n, k, batch = settings.choose(40_000, 400_000), settings.choose(64, 256), 2048
    points = clusters(n, 256, k, noise=6)
    init = points[:k].copy()
    end = float(_core.kmeans(points, k, init=init, max_iter=300, threads=settings.threads).inertia[-1])
    name = f"kmeans in mini-batches, {n} x 256, k = {k}"
    nears = (1.01, 1.005, 1.002)
    ours = _reached_by_ours(points, init, batch, nears[-1] * end, settings)
    whole = _reached_by_ours(points, init, None, nears[-1] * end, settings)
    theirs = _reached_by_scikit_learn(points, init, batch, nears[-1] * end, settings)
    for near in nears:
        mine = _first_below(ours, near * end)
        for peer, curve in (("MiniBatchKMeans", theirs), ("Lloyd of ours", whole)):
            reached = _first_below(curve, near * end)
            ratio = reached / mine
            shown = [shown_time([seconds]) if math.isfinite(seconds) else "never" for seconds in (mine, reached)]
            known = spread([ratio]) if math.isfinite(ratio) else None
            yield Row(f"{name}, to {near} of Lloyd's end", shown[0], peer, shown[1], known)


# Seconds, and the inertia that is reached by then.
Curve = list[tuple[float, float]]


def _reached_by_ours(
    points: np.ndarray, init: np.ndarray, batch: int | None, enough: float, settings: Settings
) -> Curve:
    """The clustering stopped after ever more iterations; each run is timed as a whole."""
    curve: Curve = []
    for iterations in (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 90, 128):
        start = time.perf_counter()
        result = _core.kmeans(
            points, len(init), init=init, max_iter=iterations, tol=0, batch_size=batch, threads=settings.threads
        )
        curve.append((time.perf_counter() - start, float(result.inertia[-1])))
        if curve[-1][1] <= enough or result.converged or curve[-1][0] > 4 * settings.seconds_a_side:
            break
    return curve


def _reached_by_scikit_learn(
    points: np.ndarray, init: np.ndarray, batch: int, enough: float, settings: Settings
) -> Curve:
    """Batches of random points; the inertia is looked at after ever more of them, which is not timed."""
    model = sklearn.cluster.MiniBatchKMeans(len(init), init=init, n_init=1, random_state=0)
    generator = np.random.default_rng(0)
    curve: Curve = []
    spent, batches = 0.0, 1.0
    while spent < 4 * settings.seconds_a_side and (not curve or curve[-1][1] > enough):
        start = time.perf_counter()
        for _ in range(int(batches)):
            model.partial_fit(points[generator.integers(len(points), size=batch)])
        spent += time.perf_counter() - start
        batches *= 1.2
        curve.append((spent, -model.score(points)))
    return curve


def _first_below(curve: Curve, inertia: float) -> float:
    return min((seconds for seconds, reached in curve if reached <= inertia), default=math.inf)


# Choices of pairs


def greedy_choices(settings: Settings) -> Iterator[Row]:
    """Picks of the core beside the plain algorithms in NumPy, which go through all pairs for each pick."""
    sketches, pairs, coefficients = preference_pairs(settings.choose(500, 4000), 8, 1024)
    target = normal(1, 1024, seed=3)[0]
    budget = settings.choose(20, 200)
    name = f"of {len(pairs)} pairs of {len(sketches)} rows, d = 1024"
    yield from compare(
        f"matching, {budget} {name}",
        settings,
        Side("ours", lambda: _core.matching(sketches, pairs, coefficients, target, budget, threads=settings.threads)),
        [Side("NumPy, products of rows", lambda: numpy_matching(sketches, pairs, coefficients, target, budget))],
    )
    yield from compare(
        f"d_optimal, {budget} {name}",
        settings,
        Side("ours", lambda: _core.d_optimal(sketches, pairs, coefficients, budget, threads=settings.threads)),
        [Side("NumPy, Sherman-Morrison", lambda: numpy_design(sketches, pairs, coefficients, budget))],
    )


def numpy_matching(
    sketches: np.ndarray, pairs: np.ndarray, coefficients: np.ndarray, target: np.ndarray, budget: int
) -> list[int]:
    """One product of the rows with the last pick a pick, in float32."""

    def products(vector: np.ndarray) -> np.ndarray:
        return (coefficients * (sketches @ vector)[pairs]).sum(axis=1)

    target = target / np.linalg.norm(target)
    alignments, total, squared = products(target), np.zeros(len(pairs), dtype=np.float32), 0.0
    product, picks = 0.0, []
    for _ in range(budget):
        values = (product + alignments) / np.sqrt(squared + 2 * total + 1)
        values[picks] = -2
        pick = int(values.argmax())
        picks.append(pick)
        squared += 2 * float(total[pick]) + 1
        product += float(alignments[pick])
        total += products(coefficients[pick] @ sketches[pairs[pick]])
    return picks


def numpy_design(sketches: np.ndarray, pairs: np.ndarray, coefficients: np.ndarray, budget: int) -> list[int]:
    """Gains of all pairs, less what each pick takes from them, in float32."""
    gains, solved, picks = np.ones(len(pairs), dtype=np.float32), [], []
    for _ in range(budget):
        open_gains = gains.copy()
        open_gains[picks] = -1
        pick = int(open_gains.argmax())
        vector = coefficients[pick] @ sketches[pairs[pick]]
        direction = vector - sum((other @ vector) * other for other in solved)
        picks.append(pick)
        solved.append(direction / np.sqrt(1 + gains[pick]))
        gains -= (coefficients * (sketches @ solved[-1])[pairs]).sum(axis=1) ** 2
    return picks


# Scores, threads, linearity


def pair_scores(settings: Settings) -> Iterator[Row]:
    sketches, pairs, coefficients = preference_pairs(settings.choose(2000, 8000), 8, 1024)
    labels = np.random.default_rng(0).integers(0, 256, len(pairs)).astype(np.int32)
    centroids = normal(256, 1024, seed=2)
    yield from compare(
        f"score_pairs, {len(pairs)} pairs of {len(sketches)} rows, d = 1024",
        settings,
        Side(
            "ours",
            lambda: _core.score_pairs(sketches, pairs, coefficients, centroids, labels, threads=settings.threads),
            amount=sketches.nbytes / 1e9,
        ),
        [],
        limits=[reading()],
        limit_goal=0.5,
    )


def all_threads(settings: Settings) -> Iterator[Row]:
    gradients, points = normal(16, 1_000_000), clusters(settings.choose(20_000, 100_000), 512, 256, noise=4)
    sketcher, init = _core.Sketcher(1024), points[:256].copy()
    works: dict[str, Callable[[int], object]] = {
        "sparse sketch": lambda threads: sketcher.sketch(gradients, threads=threads),
        "kmeans": lambda threads: _core.kmeans(points, 256, init=init, max_iter=3, tol=0, threads=threads),
    }
    for name, work in works.items():
        yield from compare(
            f"{name} on {settings.threads} threads",
            settings,
            Side("ours", functools.partial(work, settings.threads)),
            [Side("ours on 1 thread", functools.partial(work, 1))],
            goal=1.85 if settings.threads == 2 else None,
        )


def linear_in_rows(settings: Settings) -> Iterator[Row]:
    """The time of each row may not grow with their number."""
    least = settings.choose(5000, 25_000)
    counts = [least, 2 * least, 4 * least, 8 * least]
    points = clusters(counts[-1], 256, 64, noise=4)
    init = points[:64].copy()
    gradients = normal(32, 250_000)
    sketcher = _core.Sketcher(1024)
    works: dict[str, tuple[list[int], Callable[[int], object]]] = {
        "kmeans": (
            counts,
            lambda n: _core.kmeans(points[:n], 64, init=init, max_iter=3, tol=0, threads=settings.threads),
        ),
        "sparse sketch": ([4, 8, 16, 32], lambda n: sketcher.sketch(gradients[:n], threads=settings.threads)),
    }
    for name, (sizes, work) in works.items():
        sides = [Side(str(n), functools.partial(work, n)) for n in sizes]
        seconds = [statistics.median(times) for times in interleave(sides, settings).values()]
        exponent = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
        ratios = [(seconds[0] / sizes[0]) / (time / size) for time, size in zip(seconds[1:], sizes[1:], strict=True)]
        yield Row(
            f"{name}, {sizes[0]} to {sizes[-1]} rows: time ~ rows^{exponent:.2f}",
            f"{1e6 * seconds[-1] / sizes[-1]:.3g} us a row",
            "ours on the fewest rows",
            f"{1e6 * seconds[0] / sizes[0]:.3g} us a row",
            (ratios[-1], min(ratios), max(ratios)),
        )


# The table

CASES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "machine": machine,
    "sketch-float32": functools.partial(sparse_sketch, kind="float32"),
    "sketch-float16": functools.partial(sparse_sketch, kind="float16"),
    "sketch-bfloat16": functools.partial(sparse_sketch, kind="bfloat16"),
    "sketch-short-blocks": functools.partial(sparse_sketch, kind="float16", dim=128, limit_goal=0.4),
    "sketch-one-row": functools.partial(sparse_sketch, kind="float32", rows=1),
    "sketch-wide": functools.partial(sparse_sketch, kind="float32", rows=4, width=10_000_000, dim=8192),
    "dense-rademacher": functools.partial(dense_sketch, kind="rademacher", rows=16),
    "dense-normal": functools.partial(dense_sketch, kind="normal", rows=16),
    "dense-rademacher-many-rows": functools.partial(dense_sketch, kind="rademacher", rows=256),
    "dense-normal-many-rows": functools.partial(dense_sketch, kind="normal", rows=256),
    "kmeans-64": functools.partial(kmeans_iterations, k=64),
    "kmeans-256": functools.partial(kmeans_iterations, k=256),
    "assign-16": functools.partial(assignment, k=16),
    "assign-64": functools.partial(assignment, k=64),
    "assign-256": functools.partial(assignment, k=256),
    "assign-1024": functools.partial(assignment, k=1024),
    "kmeans-convergence": functools.partial(kmeans_to_convergence, own_seeding=False),
    "kmeans-convergence-seeded": functools.partial(kmeans_to_convergence, own_seeding=True),
    "pair-kmeans": pair_kmeans_time,
    "pair-kmeans-memory": pair_kmeans_memory,
    "seeding-passes": seeding_passes,
    "seeding": seeding_time,
    "mini-batches": mini_batches,
    "choices": greedy_choices,
    "scores": pair_scores,
    "threads": all_threads,
    "linear": linear_in_rows,
}
# Left to the full mode.
LONG = {"sketch-one-row", "sketch-wide", "dense-rademacher-many-rows", "dense-normal-many-rows"}


def environment(settings: Settings) -> dict[str, object]:
    packages = ("bpo", "numpy", "scipy", "scikit-learn", "torch", "faiss-cpu", "traker")
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = {package: installed.get(package) for package in packages}
    return {"full": settings.full, "threads": settings.threads, "machine": platform.machine(), "versions": versions}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--short", action="store_true", help="the default: small shapes, under two minutes")
    mode.add_argument("--full", action="store_true", help="the shapes of real jobs")
    parser.add_argument("--only", default="", metavar="PATTERN", help=f"cases to run, of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side; all cores by default")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    settings = Settings(arguments.full, arguments.threads)
    torch.set_num_threads(settings.threads)
    with threadpoolctl.threadpool_limits(settings.threads):
        if arguments.peak:
            side, *shape = arguments.peak
            print(peak_of_pair_kmeans(side, *map(int, shape), settings.threads))
            return
        load = os.getloadavg()[0]
        if load > 0.5:
            # Peers whose threads meet often fall behind several times: such ratios flatter us.
            print(f"The machine is busy (load {load:.1f}): do not trust these ratios.", file=sys.stderr)
        rows = []
        for name, case in CASES.items():
            if re.search(arguments.only, name) and (settings.full or name not in LONG):
                start = time.perf_counter()
                rows += case(settings)
                print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(printed(rows))
    if arguments.json:
        report = {
            **environment(settings),
            "load_before": load,
            "rows": [{**asdict(row), "met": row.met} for row in rows],
        }
        Path(arguments.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
