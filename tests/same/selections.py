"""Selections by every strategy and setting, with everything that they return."""

import numpy as np
from transformers import BertConfig, BertModel

import bpo
from record import observation
from world import directions, scored_rows, tiny_llama

STRATEGIES = ("bpo", "uniform", "random", "best_worst", "margin", "fused_margin", "coreset", "d_optimal", "less")
CONFIGS = {
    "residual": {"length_control": "residual"},
    "balance": {"length_control": "balance"},
    "free depth": {"min_depth": 0},
    "two a prompt": {"max_depth": 2},
    "cosine": {"metric": "cosine", "n_clusters": 4},
    "farthest": {"ranking": "farthest", "n_clusters": 4},
    "softmax": {"ranking": "softmax", "temperature": 0.2},
    "random ranking": {"ranking": "random"},
    "informativeness": {"cluster_weighting": "informativeness"},
    "alignment": {"cluster_weighting": "alignment"},
    "centrality": {"cluster_weighting": "centrality"},
    "useful": {"usefulness": {"informativeness": 0.5, "score_gap": 2.0}},
    "few pairs": {"max_pairs_per_prompt": 3},
    "ipo": {"loss_type": "ipo", "beta": 0.4},
    "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
    "weighting": {"use_weighting": True},
    "int8": {"sketch_dtype": "int8"},
    "embeddings": {"features": "embeddings"},
    "full": {"features": "full"},
    "little memory": {"max_memory": "200MiB", "threads": 1},
    "no duplicates": {"duplicate_threshold": None},
}


def second_best(candidacy):
    """A strategy of a user's own, which needs gradients."""
    keys = np.where(candidacy.eligible, candidacy.clusters.centrality + candidacy.score_gaps, -np.inf)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[np.argsort(-keys, kind="stable")[1 : candidacy.budget + 1]] = True
    return chosen, keys


@observation
def strategies(record, world):
    for name in STRATEGIES:
        target = {"target": world.target} if name == "less" else {}
        record.selection(name, world.select(breadth=7, strategy=name, **target))
    record.selection("whole", world.select())
    record.selection("other seed", world.select(seed=5))


@observation
def registered(record, world):
    bpo.register_strategy("second_best", second_best, needs={"gradients", "scores"})
    record.selection("second_best", world.select(strategy="second_best", store=world.store))


@observation
def configs(record, world):
    for name, config in CONFIGS.items():
        record.selection(name, world.select(breadth=8, config=config))


@observation
def length_control(record, world):
    """Scores that are mostly length, so that pairs turn round."""
    rows = [
        {**row, "scores": [len(text) / 10 + score for text, score in zip(row["responses"], row["scores"], strict=True)]}
        for row in world.rows
    ]
    for control in ("residual", "balance"):
        for strategy in ("bpo", "margin", "coreset"):
            selection = world.select(rows, strategy=strategy, config={"length_control": control})
            record.selection(f"{control} {strategy}", selection)


@observation
def without_model(record, world):
    """From a store alone, and by what needs no gradients."""
    for name in ("bpo", "coreset", "d_optimal", "fused_margin"):
        record.selection(f"store {name}", world.select(model=None, strategy=name, store=world.store))
    record.selection("store, seed 3", world.select(model=None, store=world.store, seed=3, budget=0.5))
    for name in ("random", "margin", "best_worst", "uniform"):
        record.selection(f"scores {name}", world.select(model=None, processing_class=None, strategy=name))


@observation
def breadth(record, world):
    for method in ("quota", "representative", "diverse"):
        record.selection(method, world.select(breadth=0.5, config={"breadth_method": method}))
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(world.tokenizer), **size)).save_pretrained("encoder")
    world.tokenizer.save_pretrained("encoder")
    record.selection("encoder", world.select(breadth=5, config={"embedder": "encoder"}))
    record.values("embeddings", bpo.embed_prompts([row["prompt"] for row in world.rows], "encoder", progress=False))
    given = {"prompt_embeddings": directions(len(world.rows))}
    record.selection("array", world.select(model=None, strategy="margin", breadth=5, budget=9, config=given))
    rows = [{**row, "place": [1.0, index * 0.02]} for index, row in enumerate(world.rows)]
    column = {"prompt_embeddings": "place", "breadth_method": "diverse"}
    record.selection("column", world.select(rows, breadth=5, budget=9, config=column))


@observation
def data(record, world):
    """Conversations, stated pairs, weights, a reference, a file, rows that cannot be used, a gradient that is NaN."""
    record.selection("messages", world.select(world.messages, budget=12))
    record.selection("pairs", world.select(world.pairs, budget=14))
    weighted = [{**pair, "weight": index / 4} for index, pair in enumerate(world.pairs)]
    record.selection("weights", world.select(weighted, budget=12))
    reference = tiny_llama(world.tokenizer, initializer_range=0.21)
    for name in ("bpo", "fused_margin", "d_optimal"):
        record.selection(f"reference {name}", world.select(strategy=name, config={"ref_model": reference}))
    record.selection("file", world.select("rows.jsonl", model="model", processing_class=None))
    poor = [
        *world.rows,
        {"prompt": "red " * 300, "responses": ["a", "b"], "scores": [1, 0]},
        {**world.rows[0], "scores": None},
    ]
    record.selection("unusable rows", world.select(poor))
    bad, rows = tiny_llama(world.tokenizer), scored_rows(6, 4, seed=8)
    rows[2]["responses"][1] = " moon zzz"
    bad.model.embed_tokens.weight.data[world.tokenizer("zzz")["input_ids"][0]] = float("nan")
    record.selection("bad gradient", world.select(rows, model=bad, budget=12))
    tools = [{**row, "tools": [{"type": "function", "function": {"name": "f"}}]} for row in world.messages]
    record.selection("tools", world.select(tools, budget=12))
    logps = world.select(budget=12).with_ref_logps()
    record.values("reference columns", logps)
