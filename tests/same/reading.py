"""Data in every form, and what is computed of data and numbers alone, without a model."""

import gzip
from pathlib import Path

import datasets
import numpy as np

import bpo
from bpo import _core
from record import observation
from world import directions, write_rows

USER = [{"role": "user", "content": "Sky?"}]
BLUE, GREEN = ([{"role": "assistant", "content": text}] for text in ("Blue.", "Green."))
SCORED = {"prompt": "p", "responses": list("abcd"), "scores": [0.0, 3.0, 1.0, 1.0]}
FORMS = {
    "explicit": {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."},
    "implicit": {"chosen": "Sky? Blue.", "rejected": "Sky? Green."},
    "messages": {"prompt": USER, "chosen": BLUE, "rejected": GREEN},
    "messages and text": {"prompt": USER, "chosen": "Blue.", "rejected": "Green."},
    "implicit messages": {"chosen": USER + BLUE, "rejected": USER + GREEN},
    "repeated prompt": {"prompt": USER, "chosen": USER + BLUE, "rejected": USER + GREEN},
    "text and messages": {"prompt": "Sky?", "chosen": BLUE, "rejected": GREEN},
    "scored preference": {
        "prompt": "Sky?",
        "chosen": " Blue.",
        "rejected": " G",
        "score_chosen": 2,
        "score_rejected": 1,
    },
    "scored": SCORED,
    "scored records": {"prompt": "Sky?", "responses": [{"text": " G", "score": 1}, {"text": " B", "score": 2}]},
    "scored messages": {"prompt": USER, "responses": ["Green.", "Blue."], "scores": [0.1, 0.9]},
    "completions": {
        "instruction": "Sky?",
        "completions": [{"response": " G", "overall_score": 3.0}, {"response": " B", "overall_score": 4.5}],
    },
    "tools": {"prompt": USER, "chosen": BLUE, "rejected": GREEN, "tools": '[{"name": "f"}]'},
    "template": {"prompt": USER, "chosen": BLUE, "rejected": GREEN, "chat_template_kwargs": {"thinking": True}},
    "weight": {"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green.", "weight": 0.5},
}
MIXED = [
    SCORED,
    {"prompt": "", "responses": ["a", "b"], "scores": [1.0, 0.0]},
    {"prompt": "q", "responses": ["a", "a"], "scores": [1.0, 0.0]},
    {"prompt": "r", "responses": ["a", "b"], "scores": [1.0, None]},
    {"prompt": "s", "responses": ["a", "b"], "scores": [1.0, 1.0]},
    {"prompt": "p", "responses": ["e"], "scores": [9.0]},
]
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm"),
)


@observation
def forms(record, world):
    for name, row in FORMS.items():
        record.values(name, bpo.read_candidates([row], weight_column="weight" if name == "weight" else None))
    record.values("capped", bpo.read_candidates([SCORED], max_pairs_per_prompt=2))
    record.values("with gaps", bpo.read_candidates(MIXED))
    record.error("with gaps, refused", lambda: bpo.read_candidates(MIXED, on_invalid="raise"))
    weighted = {**FORMS["explicit"], "w_chosen": [1.0, 0.5], "w_rejected": [0.0, 2.0]}
    record.values("token weights", bpo.read_candidates([weighted], token_weights="w"))
    known = {**FORMS["explicit"], "ref_chosen_logps": -3.5, "ref_rejected_logps": -4.25}
    record.values("reference", bpo.read_candidates([known], ref_logps=True))


@observation
def files(record, world):
    data = datasets.Dataset.from_list([{**SCORED, "prompt": f"p{index}"} for index in range(3)])
    write_rows("some.jsonl", data.to_list())
    Path("some.jsonl.gz").write_bytes(gzip.compress(Path("some.jsonl").read_bytes()))
    Path("directory").mkdir()
    data.to_parquet("directory/rows.parquet")
    data.save_to_disk("on-disk")
    datasets.DatasetDict(train=data).save_to_disk("splits")
    for name in ("some.jsonl", "some.jsonl.gz", "directory", "directory/rows.parquet", "on-disk", "splits"):
        record.values(name.replace("/", " "), bpo.read_candidates(name))
    record.values("numpy", bpo.read_candidates(data.with_format("numpy")))
    record.values("dictionary", bpo.read_candidates(datasets.DatasetDict(train=data)))


@observation
def breadth(record, world):
    points = directions(60)
    for method in ("quota", "representative", "diverse"):
        record.values(method, bpo.compress_breadth(points, 17, method=method, seed=3))
    near = np.concatenate([points, points[:5] + 0.01 * points[5:10]])
    record.values("near duplicates", bpo.near_duplicates(near, 0.9))


@observation
def lengths(record, world):
    record.values("characters", bpo.length_effect(world.rows))
    record.values("tokens", bpo.length_effect(world.rows, processing_class=world.tokenizer))
    record.values("pairs", bpo.length_effect(world.pairs))


@observation
def coefficients(record, world):
    generator = np.random.default_rng(5)
    logps, ref_logps = -generator.gamma(4, 5, (2, 40))
    numbers = {"lengths": generator.integers(2, 30, 40), "log_weights": generator.standard_normal(40)}
    pairs = generator.permutation(40).reshape(-1, 2)
    smoothing = {"robust": 0.1, "exo_pair": 0.01}
    for name in LOSSES:
        config = {"loss_type": name, "label_smoothing": smoothing.get(name, 0.0)}
        record.values(name, bpo.pair_coefficients(logps, ref_logps, pairs, **numbers, config=config))
    for name, config in {
        "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        "weighted": {"use_weighting": True},
        "beta": {"beta": 0.7},
        **{kind: {"f_divergence_type": kind} for kind in ("forward_kl", "js_divergence", "alpha_divergence")},
    }.items():
        record.values(name, bpo.pair_coefficients(logps, ref_logps, pairs, **numbers, config=config))


@observation
def depth(record, world):
    generator = np.random.default_rng(6)
    prompts, clusters = np.sort(generator.integers(0, 12, 80)), generator.integers(0, 5, 80).astype(np.int32)
    useful = generator.standard_normal(80)
    for name, settings in {
        "plain": {},
        "capped": {"max_depth": 3},
        "free": {"min_depth": 0},
        "weighted": {"cluster_weights": np.arange(1.0, 6.0)},
    }.items():
        record.values(name, bpo.allocate_depth(prompts, clusters, useful, 30, **settings))


@observation
def clusters(record, world):
    rows, pairs = directions(50, 64), np.random.default_rng(8).integers(0, 50, (120, 2))
    weights = np.tile(np.array([-0.05, 0.05], dtype=np.float32), (120, 1))
    for name, config in {
        "default": {},
        "cosine": {"metric": "cosine", "n_clusters": 7},
        "short": {"max_iter": 1, "n_clusters": 20},
    }.items():
        found = bpo.cluster_pairs(rows, pairs, weights, config=bpo.SelectConfig(**config), seed=1)
        record.values(name, found)
    record.values("half", bpo.cluster_pairs(rows.astype(np.float16), pairs, weights))


@observation
def core(record, world):
    rows = directions(90, 32)
    found = _core.kmeans(rows, 6, seed=2)
    record.values("kmeans", [found.labels, found.centroids, found.distances, found.inertia])
    record.values("assign", _core.assign(rows, rows[:4]))
    keys = np.arange(30.0)
    for ranking in ("nearest", "farthest", "softmax", "random"):
        record.values(f"keys {ranking}", _core.ranking_keys(keys, ranking, seed=1))
    for kind in ("sparse", "rademacher", "normal"):
        record.values(f"sketch {kind}", _core.Sketcher(16, seed=1, kind=kind).sketch(rows))


@observation
def estimators(record, world):
    from bpo.sklearn import KMeans, SparseSketch

    rows = directions(90, 32)
    for name, estimator in {
        "KMeans": KMeans(5, random_state=0),
        "SparseSketch": SparseSketch(8, random_state=0),
    }.items():
        record.values(name, [repr(estimator), estimator.fit(rows).transform(rows)])
    fitted = KMeans(5, random_state=0).fit(rows)
    record.values("fitted", [fitted.labels_, fitted.cluster_centers_, fitted.inertia_, fitted.predict(rows)])
