"""Many Python threads in the core at once, on the same arrays and the same store: each gets what it would get alone."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bpo import _core
from bpo.store.gradient_store import RECORD

THREADS = 8
ROUNDS = 3
GENERATOR = np.random.default_rng(0)
ROWS = GENERATOR.standard_normal((600, 64), dtype=np.float32)
PAIRS = GENERATOR.integers(0, 600, (400, 2))
COEFFICIENTS = GENERATOR.standard_normal((400, 2), dtype=np.float32)
CLUSTERS = GENERATOR.integers(0, 5, 400).astype(np.int32)
PROMPTS = np.arange(400) // 4
SCORES = GENERATOR.standard_normal(400)
OF_PAIRS = (ROWS, PAIRS, COEFFICIENTS)
TARGET = ROWS.sum(axis=0)
SKETCHER = _core.Sketcher(48, seed=3, nnz=3)


def jobs(reader):
    """Functions of the number of threads, all of shared arguments."""
    return [
        lambda threads: _core.kmeans(ROWS, 7, max_iter=5, threads=threads),
        lambda threads: _core.pair_kmeans(*OF_PAIRS, 4, metric="cosine", max_iter=5, threads=threads),
        lambda threads: _core.assign(ROWS, ROWS[:9], threads=threads),
        lambda threads: _core.pair_norms(*OF_PAIRS, threads=threads),
        lambda threads: _core.score_pairs(*OF_PAIRS, ROWS[:5], CLUSTERS, threads=threads),
        lambda threads: _core.ranking_keys(SCORES, "softmax", seed=4, threads=threads),
        lambda threads: _core.allocate_depth(PROMPTS, CLUSTERS, SCORES, 150, threads=threads),
        lambda threads: _core.coreset(*OF_PAIRS, CLUSTERS, 40, prompts=PROMPTS, max_depth=2, threads=threads),
        lambda threads: _core.d_optimal(*OF_PAIRS, 40, threads=threads),
        lambda threads: _core.matching(*OF_PAIRS, TARGET, 40, threads=threads),
        lambda threads: SKETCHER.sketch(ROWS, 1000, threads=threads),
        lambda threads: reader.verify(threads=threads),
        lambda _: reader.records(),
    ]


def arrays(result):
    """All that a result holds."""
    if isinstance(result, np.ndarray):
        return [result]
    return list(result) if isinstance(result, tuple) else list(result.__getnewargs_ex__()[1].values())


def test_threads_do_not_disturb_one_another(tmp_path):
    sketches, records = ROWS[:, :6].copy(), np.zeros(600, dtype=RECORD)
    with _core.StoreWriter.create(tmp_path / "store", 6, json.dumps({})) as writer:
        writer.append(sketches, records)
        writer.commit()
        work = jobs(_core.StoreReader(tmp_path / "store"))
        expected = [arrays(job(1)) for job in work]
        start = threading.Barrier(THREADS + 1)

        def compute(number):
            start.wait(timeout=60)
            for turn in range(ROUNDS * len(work)):
                # Each thread elsewhere, and on more pools than are kept.
                job = (turn + number * 5) % len(work)
                for found, alone in zip(arrays(work[job](1 + (turn + number) % 6)), expected[job], strict=True):
                    np.testing.assert_array_equal(found, alone)

        def write():
            start.wait(timeout=60)
            for count in range(1, 40):
                writer.append(sketches[:count], records[:count])
                writer.commit()
                assert len(_core.StoreReader(tmp_path / "store")) == writer.committed == len(writer)

        with ThreadPoolExecutor(THREADS + 1) as pool:
            for done in [*(pool.submit(compute, number) for number in range(THREADS)), pool.submit(write)]:
                done.result()
    assert len(_core.StoreReader(tmp_path / "store").verify()) == 0


def test_threads_fill_outputs_of_their_own():
    outputs = np.zeros((THREADS, 600, 48), dtype=np.float32)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda number: SKETCHER.sketch(ROWS, number, out=outputs[number], threads=2), range(THREADS)))
    for number, output in enumerate(outputs):
        np.testing.assert_array_equal(output, SKETCHER.sketch(ROWS, number))
