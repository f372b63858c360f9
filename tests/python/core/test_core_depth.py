"""The depth allocation against a slow and obvious reference, and its promises."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo._core import allocate_depth


def reference(prompts, clusters, usefulness, budget, min_depth, max_depth, weights):
    pairs = range(len(prompts))
    cap = max_depth or len(prompts)
    kept = set()
    for prompt in set(prompts) if min_depth else ():
        kept.add(min((p for p in pairs if prompts[p] == prompt), key=lambda p: (-usefulness[p], p)))
    target = min(budget, sum(min(cap, list(prompts).count(prompt)) for prompt in set(prompts)))
    queues: dict[int, list[int]] = {cluster: [] for cluster in sorted(set(clusters))}
    for p in sorted(set(pairs) - kept, key=lambda p: (-usefulness[p], p)):
        queues[clusters[p]].append(p)
    while len(kept) < target:
        left = target - len(kept)
        # A cluster counts with all pairs that are not kept until its last one was offered.
        sizes = {
            cluster: sum(1 for p in pairs if clusters[p] == cluster and p not in kept)
            for cluster, queue in queues.items()
            if queue
        }
        masses = {cluster: size * weights[cluster] for cluster, size in sizes.items()}
        if not any(masses.values()):
            masses = sizes
        shares = {cluster: left * mass / sum(masses.values()) for cluster, mass in masses.items()}
        quotas = {cluster: int(share) for cluster, share in shares.items()}
        by_fraction = sorted((c for c in shares if masses[c] > 0), key=lambda c: (-(shares[c] % 1), c))
        for cluster in by_fraction[: left - sum(quotas.values())]:
            quotas[cluster] += 1
        for cluster, quota in quotas.items():
            while quota and queues[cluster]:
                p = queues[cluster].pop(0)
                if sum(1 for q in kept if prompts[q] == prompts[p]) < cap:
                    kept.add(p)
                    quota -= 1
    return np.isin(np.arange(len(prompts)), list(kept))


@st.composite
def problems(draw):
    count = draw(st.integers(1, 40))
    prompts = np.array(draw(st.lists(st.integers(-3, 6), min_size=count, max_size=count)), dtype=np.int64)
    clusters = np.array(draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)), dtype=np.int32)
    values = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 1.0, np.inf])
    usefulness = np.array(draw(st.lists(values, min_size=count, max_size=count)))
    min_depth = draw(st.integers(0, 1))
    budget = draw(st.integers(min_depth * len(set(prompts.tolist())), count + 3))
    max_depth = draw(st.none() | st.integers(1, 5))
    weights = draw(st.none() | st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=5, max_size=5))
    return prompts, clusters, usefulness, budget, min_depth, max_depth, weights


@given(problems())
@settings(max_examples=300, deadline=None)
def test_promises(problem):
    prompts, clusters, usefulness, budget, min_depth, max_depth, weights = problem
    array = None if weights is None else np.array(weights)
    kept = allocate_depth(
        prompts, clusters, usefulness, budget, min_depth=min_depth, max_depth=max_depth, cluster_weights=array
    )

    depths = {prompt: int(kept[prompts == prompt].sum()) for prompt in set(prompts.tolist())}
    cap = max_depth or len(prompts)
    assert kept.sum() == min(budget, sum(min(cap, int((prompts == prompt).sum())) for prompt in depths))
    assert all(min_depth <= depth <= cap for depth in depths.values())
    best = []
    if min_depth:
        best = [min(np.flatnonzero(prompts == prompt), key=lambda p: (-usefulness[p], p)) for prompt in depths]
    assert kept[best].all()
    # Within a cluster nothing left out beats anything kept, unless its prompt is full or the kept is a prompt's best.
    for out in np.flatnonzero(~kept):
        if depths[prompts[out]] < cap:
            rivals = [p for p in np.flatnonzero(kept & (clusters == clusters[out])) if p not in best]
            assert all((-usefulness[p], p) < (-usefulness[out], out) for p in rivals)
    expected = reference(
        prompts.tolist(), clusters.tolist(), usefulness.tolist(), budget, min_depth, max_depth, weights or [1.0] * 5
    )
    np.testing.assert_array_equal(kept, expected)


def test_shares_follow_cluster_sizes_and_weights():
    # Two clusters of 60 and 40 pairs beside the best pairs of 10 prompts.
    prompts = np.tile(np.arange(10), 11)
    clusters = np.repeat(np.array([0, 1, 2], dtype=np.int32), [10, 60, 40])
    usefulness = np.concatenate([np.full(10, 2.0), np.linspace(1, 0, 100)])
    kept = allocate_depth(prompts, clusters, usefulness, 20)
    assert np.bincount(clusters[kept]).tolist() == [10, 6, 4]
    weighted = allocate_depth(prompts, clusters, usefulness, 20, cluster_weights=np.array([1.0, 1.0, 6.0]))
    assert np.bincount(clusters[weighted]).tolist() == [10, 2, 8]


def test_a_larger_budget_keeps_more_up_to_everything():
    generator = np.random.default_rng(0)
    prompts, clusters = generator.integers(20, size=300), generator.integers(7, size=300).astype(np.int32)
    usefulness = generator.standard_normal(300)
    sizes = [allocate_depth(prompts, clusters, usefulness, budget).sum() for budget in range(20, 310, 10)]
    assert sizes == [min(budget, 300) for budget in range(20, 310, 10)]


def test_errors_name_the_culprit():
    prompts, clusters = np.arange(3), np.zeros(3, dtype=np.int32)
    usefulness = np.array([0.0, np.nan, 1.0])
    with pytest.raises(ValueError, match="`budget` = 2 pairs cannot give each of the 3 prompts its best pair"):
        allocate_depth(prompts, clusters, np.zeros(3), 2)
    with pytest.raises(ValueError, match="`usefulness` holds NaN at index 1"):
        allocate_depth(prompts, clusters, usefulness, 3)
    with pytest.raises(ValueError, match="`clusters` holds cluster -1 at index 0"):
        allocate_depth(prompts, clusters - 1, np.zeros(3), 3)
    with pytest.raises(ValueError, match=r"`clusters` holds cluster 0 at index 0; it must be in 0\.\.0"):
        allocate_depth(prompts, clusters, np.zeros(3), 3, cluster_weights=np.zeros(0))
    with pytest.raises(ValueError, match="`cluster_weights` must be finite and not negative, but is -1 at index 0"):
        allocate_depth(prompts, clusters, np.zeros(3), 3, cluster_weights=np.array([-1.0]))
    with pytest.raises(ValueError, match="`max_depth` must be at least 1"):
        allocate_depth(prompts, clusters, np.zeros(3), 3, max_depth=0)
    with pytest.raises(ValueError, match="`min_depth` must be 0 or 1, but is 2"):
        allocate_depth(prompts, clusters, np.zeros(3), 3, min_depth=2)
    with pytest.raises(ValueError, match="`clusters` must have shape"):
        allocate_depth(prompts, clusters[:2], np.zeros(3), 3)
    assert allocate_depth(prompts[:0], clusters[:0], np.zeros(0), 0).shape == (0,)


INTERRUPT = """
import os, signal, threading, time
import numpy as np
from bpo._core import allocate_depth, ranking_keys
signal.signal(signal.SIGINT, signal.default_int_handler)
generator = np.random.default_rng(0)
prompts, usefulness = generator.integers(1 << 60, size=4_000_000), generator.random(4_000_000)
clusters = np.zeros(4_000_000, dtype=np.int32)
sent = []
def interrupt():
    time.sleep(0.1)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    while True:
        {call}
except KeyboardInterrupt:
    print(time.perf_counter() - sent[0])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
@pytest.mark.parametrize(
    "call",
    [
        "allocate_depth(prompts, clusters, usefulness, 4_000_000, threads=1)",
        "ranking_keys(usefulness, 'softmax', threads=1)",
    ],
)
def test_interrupts_are_answered(call):
    finished = subprocess.run(
        [sys.executable, "-c", INTERRUPT.format(call=call)], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(finished.stdout) < 1.0
