"""What a run takes, stage by stage, for any number of processes: counts of the work, times what each needs.

All *(ours)*. A :class:`Load` says how much there is to do, :class:`Rates` what one unit takes on one machine, and
:func:`stages` multiplies. Counts follow from the code: what a stage holds, writes and sends is the same to the byte
wherever it runs, or a bound that was measured (:class:`bpo.pairs.size.ChoiceSize`). ``benches/python/cost.py``
fits rates at four sizes and compares what they foretell for a fifth.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
import time
from typing import TYPE_CHECKING

import numpy as np

from bpo import _core
from bpo.config import SelectConfig
from bpo.data.read import read_candidates
from bpo.pairs.clustering import cluster_pairs
from bpo.pairs.left_out import left_out_margins
from bpo.pairs.linear import N_FITS, VALIDATED_PAIRS, training_direction
from bpo.pairs.pair_gradients import PairGradients, pair_norms, unit_features
from bpo.pairs.size import ChoiceSize, default_n_clusters, matching_steps
from bpo.store.gradient_store import RECORD, row_bytes
from bpo.system.packed import IN_MEMORY, scratch
from bpo.world.shares import WORD_BYTES
from bpo.world.telling import PIECE

if TYPE_CHECKING:
    from collections.abc import Callable

# Bytes of the numbers of the data that stay (Candidates): of a response its hash, prompt, place, score and where its
# text is; of a pair its responses, prompt, row and scores; of a prompt its hash, row, settings and text.
RESPONSE_BYTES, PAIR_BYTES, PROMPT_BYTES = 64, 48, 48
# Of a sequence, beside its token ids: where they are, lengths, response and hash; and of a pair, which two it is.
SEQUENCE_BYTES, SEQUENCES_OF_PAIR_BYTES = 56, 16
# What reading holds of a response beside that: entries, and what is sorted to find those that are the same.
_READING_BYTES = 100
# Of a pair in the table that a selection keeps of all of them, mapped or in memory, and as it is sent; as Parquet less.
TABLE_BYTES = 140
# Passes over the pairs, where data has clusters: at most SelectConfig.max_iter. Those after the first compare few pairs
# with all centroids, so their number counts little.
_PASSES = 30
# Steps of a regression grow as the root of the pairs do, as long as it goes on to its end.
_MOST_STEPS = 800
# What processes that share the pairs tell each other of each: its nearest drawn pair in each round of the seeding, its
# cluster and how far that is, its norm and scores.
SHARED_BYTES = 5 * 12 + 12 + 16
# And of a pair that a strategy chose or not, which the first process tells: whether, and what it is worth.
CHOICE_BYTES = 9
# What a process has beside its tables while it sends or gets them: pieces, in the hands of several libraries (54 to 105
# MiB were seen), and the first batches of a table.
_PIECES = 12 * PIECE + IN_MEMORY
_WRITTEN = 32 << 20  # bytes by which the disk is measured
_NOISE = bytes(range(256)) * 4096  # no zeros, which a disk may not write
_TRIED = 2  # times that each rate is measured; the shorter one counts


@dataclasses.dataclass(frozen=True)
class Load:
    """How much there is to do.

    Attributes:
        prompts: Usable prompts.
        responses: Their responses; a sequence each.
        pairs: Candidate pairs.
        tokens: Of all prompts and responses, each response with its prompt.
        text_bytes: Of all prompts and responses, as UTF-8.
        coordinates: Numbers of a gradient.
        config: Uses ``sketch_dim``, ``sketch_dtype``, ``n_clusters``, ``max_iter``, ``threads``, ``trust``, and what is
            useful.
        budget: Pairs to choose.
        strategy: What chooses: of one that matches pairs to the direction of training, that is a stage.
    """

    prompts: int
    responses: int
    pairs: int
    tokens: int
    text_bytes: int
    coordinates: int
    config: SelectConfig
    budget: int
    strategy: str = "bpo"

    @property
    def row_bytes(self) -> int:
        """Bytes of a response in the store: its sketch and its record."""
        return row_bytes(self.config.sketch_dtype, self.config.sketch_dim) + RECORD.itemsize

    @property
    def matches(self) -> bool:
        """Whether pairs are matched to the direction of training."""
        return self.strategy == "matching" or (self.strategy == "bpo" and self.config.usefulness_terms is None)

    @property
    def regressed(self) -> float:
        """Numbers that the regressions of a matching read, in all steps: those that choose λ, and that of all pairs."""
        read = sum(
            fits * pairs * min(math.sqrt(pairs), _MOST_STEPS)
            for fits, pairs in ((N_FITS, min(self.pairs, VALIDATED_PAIRS)), (1, self.pairs))
        )
        return read * self.config.sketch_dim

    @property
    def picked(self) -> int:
        """Numbers that the steps of a matching read, a byte each."""
        return matching_steps(self.budget) * self.responses * self.config.sketch_dim

    @property
    def audited(self) -> tuple[int, int, int]:
        """Products of the audit: of rows, of the matrix alone; and the prompts that are left out one by one."""
        dim = self.config.sketch_dim
        return self.responses * dim**2, dim**3, self.prompts

    @property
    def n_clusters(self) -> int:
        """Of k-means."""
        return self.config.n_clusters or default_n_clusters(self.pairs)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds that a unit of work takes on one process of one machine.

    Attributes:
        response: Reading one response, from a row to its pairs.
        token: Extraction, of a token of prompt and response.
        coordinate: Extraction, of a number of a gradient; 0 where ``token`` has it.
        product: k-means, seeding and all passes: for each pair, cluster and number of a sketch.
        number: For each pair and number of a sketch that is read.
        pair: The choice and the tables: a pair.
        byte: Writing to disk; the doctor takes that of the cache.
        sent: Sending between two processes; 0 where that is not known.
        memory: Bytes that a process has before there is data, the model included.
        audit: A product of rows, a product of the matrix, and a prompt that is left out (:attr:`Load.audited`).
        regression: A number that the regressions of a matching read (:attr:`Load.regressed`).
        pick: A number of a row that is read for a step of a matching.
    """

    response: float
    token: float
    coordinate: float
    product: float
    number: float
    pair: float
    byte: float
    sent: float
    memory: int
    audit: tuple[float, float, float] = (0.0, 0.0, 0.0)
    regression: float = 0.0
    pick: float = 0.0


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage takes.

    Attributes:
        name: What it is.
        by: Who does it: ``"each"`` process the same, ``"all"`` together, or the ``"first"`` one.
        seconds: Until it is done.
        memory_bytes: The most that a process has.
        disk_bytes: The most that it adds on the disk of a process (``by="each"``) or on the shared one.
        network_bytes: What goes to and from the shared disk and between processes, together.
    """

    name: str
    by: str
    seconds: float
    memory_bytes: int
    disk_bytes: int
    network_bytes: int


def stages(load: Load, rates: Rates, processes: int = 1) -> list[Stage]:
    """Foretells the stages of :func:`bpo.select` with gradients, for a number of equal processes with a shared disk.

    Args:
        load: What there is to do.
        rates: What a unit takes.
        processes: How many.

    Example:
        >>> load = Load(1000, 4000, 6000, 10**6, 3 * 10**6, 10**6, SelectConfig(), budget=1000)
        >>> rates = Rates(1e-5, 1e-3, 0, 1e-11, 1e-10, 1e-5, 1e-9, 0, 10**9)
        >>> [(stage.name, stage.by, round(stage.seconds, 2)) for stage in stages(load, rates, 4)][:2]
        [('read', 'each', 0.04), ('extract', 'all', 250.0)]
    """
    dim, pairs, many = load.config.sketch_dim, load.pairs, processes > 1
    store = load.responses * load.row_bytes
    held = data_bytes(load)
    reading = rates.memory + held + load.responses * _READING_BYTES
    table = TABLE_BYTES * pairs
    chosen = load.budget * (load.text_bytes // max(load.responses, 1) * 3 + TABLE_BYTES)
    on_disk = sum(size for size in (table, chosen) if size > IN_MEMORY)
    after = rates.memory + held + table + chosen - on_disk
    choice = ChoiceSize(load.responses, pairs, dim, load.config, n_processes=processes)
    choosing = rates.memory + held + choice.needed_bytes
    extraction = load.tokens * rates.token + load.responses * load.coordinates * rates.coordinate
    found = [
        Stage("read", "each", load.responses * rates.response, reading, 2 * load.text_bytes + 4 * load.tokens, 0),
        Stage("extract", "all", extraction / processes, rates.memory + held, store, store if many else 0),
    ]
    if many:  # blocks into the store: each is read, and written once more
        found.append(Stage("gather", "first", 2 * store * rates.byte, rates.memory + held, store, 2 * store))
    number = pairs * dim * rates.number
    passes = min(_PASSES, load.config.max_iter)
    clustering = pairs * load.n_clusters * dim * rates.product + passes * number
    # Sums go from each process to the next, and from the last to all.
    told = (processes - 1) * (SHARED_BYTES * pairs + passes * 2 * 8 * load.n_clusters * (dim + 1))
    by = "all" if many else "first"
    found += [
        Stage("cluster", by, clustering / processes + told * rates.sent, choosing, 0, told + (store if many else 0)),
        Stage("score", by, 3 * number / processes, choosing, 0, 0),  # norms before, and what scores read
        *_of_some(load, rates, processes, choosing),
        Stage("choose", "first", pairs * rates.pair, choosing, on_disk, (processes - 1) * CHOICE_BYTES * pairs),
    ]
    if many:
        # Each process hands on to the next what it gets, piece by piece, so all send at the same time.
        telling = (table + chosen) * (rates.sent + rates.byte)
        sent = (processes - 1) * (table + chosen)
        found.append(Stage("tell", "each", telling, after + _PIECES, on_disk, sent))
    found.append(Stage("save", "first", (table + chosen) * rates.byte, after, table + chosen, 0))
    return found


def _of_some(load: Load, rates: Rates, processes: int, choosing: int) -> list[Stage]:
    """The stages that only some settings have, with what a process holds while it chooses."""
    found, others = [], processes - 1
    if load.config.trust == "audit":
        seconds = sum(count * rate for count, rate in zip(load.audited, rates.audit, strict=True))
        found.append(Stage("audit", "first", seconds, choosing, 0, others * CHOICE_BYTES * load.pairs))
    if load.matches:
        seconds = (load.regressed * rates.regression + load.picked * rates.pick) / processes
        # At each step every process tells every other which its best pairs are, and then the best of all are sent.
        words = processes * (2 * matching_steps(load.budget) * WORD_BYTES + 16 * load.budget)
        told = others * (words + 8 * load.config.sketch_dim * load.budget)
        found.append(Stage("match", "all", seconds + told / processes * rates.sent, choosing, 0, told))
    return found


def data_bytes(load: Load) -> int:
    """Returns the bytes of memory that data and tokens take once read: numbers, and texts as far as they are short."""
    texts = min(load.text_bytes, IN_MEMORY) * 2 + min(4 * load.tokens, IN_MEMORY)
    return (
        texts
        + load.responses * (RESPONSE_BYTES + SEQUENCE_BYTES)
        + load.pairs * (PAIR_BYTES + SEQUENCES_OF_PAIR_BYTES)
        + load.prompts * PROMPT_BYTES
    )


def measured(config: SelectConfig, token: float, memory: int) -> Rates:
    """Measures what does not need the model, within seconds; ``token`` and ``memory`` are what a trial of it found."""
    from bpo.selection.select import select

    rng = np.random.default_rng(0)
    dim = config.sketch_dim
    n = min(8192, max(512, (1 << 23) // dim))
    # 64 directions and noise, so that k-means finds clusters; four responses a prompt.
    sketches = rng.standard_normal((n, dim), dtype=np.float32)
    sketches += rng.standard_normal((64, dim), dtype=np.float32)[rng.integers(64, size=n)]
    pairs = np.stack([np.arange(n), np.arange(n) ^ rng.integers(1, 4, size=n)], axis=1)
    weights = np.tile(np.array([1, -1], dtype=np.float32), (n, 1))
    gradients = PairGradients(sketches, pairs, weights)
    few, more = (dataclasses.replace(config, n_clusters=n_clusters, max_iter=10) for n_clusters in (32, 160))
    rows = [
        {
            "prompt": f"{index}: {'a question ' * 20}",
            "responses": [f"{i} " * 200 for i in range(4)],
            "scores": [0, 1, 2, 3],
        }
        for index in range(500)
    ]
    read = least_seconds(lambda: read_candidates(rows))
    chosen = least_seconds(lambda: select(None, rows, budget=0.1, strategy="margin", progress=False, evidence=False))
    number = least_seconds(lambda: pair_norms(gradients, config.threads, None))
    clustered = [
        least_seconds(functools.partial(cluster_pairs, sketches, pairs, weights, config=each)) for each in (few, more)
    ]
    return Rates(
        response=read / 2000,
        token=token,
        coordinate=0.0,
        product=max(clustered[1] - clustered[0], 0.0) / (n * (160 - 32) * dim),
        number=number / (n * dim),
        pair=max(chosen - read, 0.0) / 3000,
        byte=least_seconds(lambda: write(_WRITTEN)) / _WRITTEN,
        sent=0.0,
        memory=memory,
        audit=_audit_rates(gradients) if config.trust == "audit" else (0.0, 0.0, 0.0),
        **_matching_rates(gradients, config),
    )


def _matching_rates(gradients: PairGradients, config: SelectConfig) -> dict[str, float]:
    """Rates of the regressions and of the steps of a matching."""
    n = len(gradients.pairs)
    prompts = np.arange(n) // 4
    features = unit_features(gradients, pair_norms(gradients, config.threads), np.ones(n, dtype=bool))
    load = Load(n // 4, n, n, 0, 0, 0, config, budget=32)

    def choose(budget: int) -> None:
        _core.matching(*features, features.rows[0], budget, threads=config.threads)

    fitted = least_seconds(functools.partial(training_direction, features, prompts, 0, None, config.threads), 1)
    few, more = (least_seconds(functools.partial(choose, budget)) for budget in (1, 1 + load.budget))
    return {"regression": fitted / load.regressed, "pick": max(more - few, 0.0) / load.picked}


def _audit_rates(gradients: PairGradients) -> tuple[float, float, float]:
    """Rates of the audit, those of prompts with those of rows."""
    dim, counts = gradients.rows.shape[1], (64, 512)
    few, more = (
        least_seconds(functools.partial(left_out_margins, [gradients.take(np.arange(n))], np.arange(n) // 4))
        for n in counts
    )
    of_row = max(more - few, 0.0) / (counts[1] - counts[0])
    return of_row / dim**2, max(few - counts[0] * of_row, 0.0) / dim**3, 0.0


def least_seconds(
    work: Callable[[], object], times: int = _TRIED, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds that something takes by a clock, at best of some times."""
    found = []
    for _ in range(times):
        begin = clock()
        work()
        found.append(clock() - begin)
    return min(found)


def write(size: int) -> None:
    """Writes so many bytes to the disk of the cache, until they are there, and takes them away."""
    with tempfile.TemporaryFile(dir=scratch()) as file:
        for first in range(0, size, len(_NOISE)):
            file.write(_NOISE[: size - first])
        file.flush()
        os.fsync(file.fileno())
