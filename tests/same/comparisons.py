"""Previews, and small comparisons of strategies with their plan, runs, results and report."""

from pathlib import Path

import bpo
from record import observation
from world import scored_rows, write_rows

TRAINING = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
    "gradient_checkpointing": False,
    "peft": {"r": 2, "target_modules": "all-linear"},
}
CONFIG = {
    "model": "model",
    "dataset": "many.jsonl",
    "seeds": 2,
    "budget": [10],
    "arms": ["bpo", "random", {"name": "deep", "strategy": "uniform", "breadth": 5}],
    "select": {"sketch_dim": 64, "lora_rank": 2},
    "training": TRAINING,
}
# How long things took, as summaries and as the files of a comparison tell it; and where in a file an error arose.
PREVIEW_TIME = [(r"\(\d+\.\d s\)", "(TIME)")]
TABLE_TIMES = [(r"(?m)(?: +(?:[\d.]+|–)){2}$", " TIME TIME"), (r"Once for all arms: .*", "Once for all arms: TIME")]
FILES = [
    (r'("(?:gradients|reference|sampling)": )[\d.e-]+', r"\1TIME"),
    (r"(?s)(Mean seconds of a run; [^\n]*\n).*?(?=<table>)", r"\1FIGURE\n"),
    (r'(?m)^(<tr><td>(?:once: \w+|[^<]*, \d+)</td>)(?:<td class="number"[^<>]*>[\d.–]+(?: s)?</td>)+', r"\1TIME"),
    (r"(?s)(Traceback \(most recent call last\):\n).*\n(?=\w)", r"\1"),
]


@observation
def previews(record, world):
    rows = scored_rows(24, 4)
    write_rows("many.jsonl", rows)
    world.collect(rows, store="many-store", sketch_dtype="float32")
    world.collect(rows, store="embedded-store", features="embeddings")
    arms = [
        *("bpo", "random", "margin", "best_worst", "coreset"),
        {"name": "design", "strategy": "d_optimal", "breadth": 9},
        {"name": "no length", "strategy": "bpo", "select": {"length_control": "residual", "ranking": "farthest"}},
        {"name": "embedded", "strategy": "bpo", "store": "embedded-store"},
    ]
    for name, settings in {
        "arms": {"budget": [12, 20], "arms": arms},
        "own data": {"budget": 12, "heldout": rows[:6], "dataset": rows[6:], "normalize": False},
        "baseline": {"budget": 12, "arms": ["bpo", "uniform"], "baseline": "uniform", "regularization": 0.2},
    }.items():
        given = {"dataset": rows, "seeds": 4, "progress": False, **settings}
        found = bpo.preview("many-store", given.pop("dataset"), **given)
        part = record.within(name)
        part.values("preview", found)
        part.values("table", found.table())
        part.text("summary.txt", found.summary(), hidden=PREVIEW_TIME)
        part.files("saved.json", found.save(f"preview {name}.json"))
        part.files("figure.svg", found.figure(f"preview {name}.svg"))
        part.values("difference", found.difference(found.arms[0], 12, length_controlled=True))
        part.error("no arm", lambda found=found: found.difference("nothing", 12))
        part.text("loaded.txt", bpo.Preview.load(f"preview {name}.json").summary(), hidden=PREVIEW_TIME)


@observation
def plans(record, world):
    """What a comparison would do, before it does anything."""
    for name, changes in {
        "plain": {},
        "defaults": {"arms": ("bpo", "pairs", "random"), "training": {}, "select": {}},
        "counts": {"heldout_prompts": 5, "train_prompts": 12, "budget": [0.2, 20], "seeds": [3, 1], "breadth": 0.5},
        "target": {"arms": ["less", "random"], "target_prompts": 3},
        "scorer": {"scorer": {"function": "scorers:length", "n_responses": 2}},
        "judge": {"scorer": {"judge": "http://localhost:1", "model": "m", "mode": "pairwise"}},
    }.items():
        config = bpo.CompareConfig.of({**CONFIG, **changes})
        derived = [config.settings(), config.splits, config.columns, config.needs_store, config.eval_bf16]
        record.values(name, [config, derived, [arm.settings() for arm in config.arms]])


@observation
def comparison(record, world):
    """With prompts that are split, an arm that fails among others, and with held-out data of its own."""
    Path("scorers.py").write_text("def length(prompt, response):\n    return len(response)\n")
    free = {"name": "free", "strategy": "bpo", "select": {"min_depth": 0}}
    scorer = {"function": "scorers:length", "max_new_tokens": 8, "n_responses": 1}
    for name, changes in {
        "splits": {"scorer": scorer, "arms": ["bpo", "random", free]},
        "given": {"heldout": world.rows, "arms": ["bpo", "random"], "seeds": [3]},
    }.items():
        found = bpo.compare({**CONFIG, **changes}, f"comparison-{name}", progress=False)
        part = record.within(name)
        part.values("results", [found.results, found.failures, repr(found)])
        part.text("summary.txt", found.summary(), hidden=TABLE_TIMES)
        part.files("output", f"comparison-{name}", hidden=FILES, without=r"figures/costs\..*")
