"""What bad input is told: the kind of error and its text."""

import copy
from pathlib import Path

import bpo
from comparisons import CONFIG
from record import observation
from world import directions, scored_rows, tiny_llama

ARGUMENTS = {
    "budget below the prompts": {"budget": 9},
    "budget above the pairs": {"budget": 101},
    "budget above those of the kept": {"budget": 41, "breadth": 4},
    "budget as a small fraction": {"budget": 0.01},
    "budget of none": {"budget": 0},
    "budget beyond one": {"budget": 1.5},
    "budget as text": {"budget": "20"},
    "budget as truth": {"budget": True},
    "breadth above the prompts": {"breadth": 11},
    "unknown strategy": {"strategy": "best"},
    "no target": {"strategy": "less"},
    "negative seed": {"seed": -1},
    "no model": {"model": None},
    "model by a wrong path": {"model": "./nowhere"},
    "model of another type": {"model": 3},
    "tokenizer of another type": {"processing_class": 3},
    "no such encoder": {"breadth": 5, "config": {"embedder": "./nowhere"}},
    "too little memory": {"config": {"max_memory": "1MiB"}},
    "other store": {"store": "store", "config": {"sketch_dim": 32}},
    "checkpoint that is not there": {"config": {"checkpoints": {"nowhere": 1e-4}}},
    "preconditioner that is not there": {"config": {"preconditioner": "checkpoint"}},
    "window without room": {"config": {"max_length": 4}},
    "embeddings of a wrong shape": {"breadth": 5, "config": {"prompt_embeddings": directions(3)}},
}
CONFIGS = {
    "unknown field": {"colour": 1},
    "beta": {"beta": -1},
    "loss that sorts": {"loss_type": "aot"},
    "unknown loss": {"loss_type": "best"},
    "smoothing": {"loss_type": "exo_pair"},
    "sketch": {"sketch_nnz": 3},
    "seed": {"sketch_seed": 2**70},
    "usefulness": {"usefulness": {"beauty": 1}},
    "memory": {"max_memory": "much"},
    "embeddings and parameters": {"features": "embeddings", "parameters": "*.mlp.*"},
    "two embeddings": {"embedder": "x", "prompt_embeddings": "y"},
    "length control": {"length_control": "none"},
}
DATA = {
    "empty": [],
    "no rows": [1, 2],
    "wrong columns": [{"question": "a", "answer": "b"}],
    "no scores": [{"prompt": "a", "responses": ["b", "c"]}],
    "images": [{"prompt": "a", "chosen": "b", "rejected": "c", "image": "x"}],
    "score as text": [{"prompt": "a", "responses": ["b", "c"], "scores": ["good", "bad"]}],
    "tools as text": [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c", "tools": "{"}],
    "nothing usable": [{"prompt": "a", "responses": ["b", "c"], "scores": [1, 1]}],
    "no file": "nowhere.jsonl",
    "number": 3,
}
COMPARED = {
    "unknown field": {"colour": 1},
    "no budget": {"budget": None},
    "arm": {"arms": ["best"]},
    "baseline": {"baseline": "best"},
    "two of one name": {"arms": ["bpo", "bpo", "random"]},
    "training": {"training": {"colour": 1}},
    "seeds": {"seeds": 0},
    "held out twice": {"heldout": 0.5, "heldout_prompts": 3},
    "no target": {"arms": ["less", "random"]},
    "scorer": {"scorer": {"function": "a:b", "reward_model": "c"}},
    "gradients of an arm": {"arms": ["random", {"name": "x", "strategy": "bpo", "select": {"sketch_dim": 8}}]},
}


@observation
def selecting(record, world):
    for name, arguments in ARGUMENTS.items():
        record.error(name, lambda arguments=arguments: world.select(**arguments))
    record.error("scores that are not there", lambda: world.select(world.pairs, budget=6, strategy="margin"))
    bare = copy.deepcopy(world.tokenizer)
    bare.chat_template = None
    record.error("no chat template", lambda: world.select(world.messages, processing_class=bare))
    dead = tiny_llama(world.tokenizer)
    dead.lm_head.weight.data.zero_()
    record.error("no gradients", lambda: world.select(model=dead))
    own = [("bpo", print, ()), ("own", 3, ()), ("own", print, ("beauty",))]
    for number, (name, choose, needs) in enumerate(own):
        record.error(
            f"strategy {number}", lambda n=name, c=choose, needs=needs: bpo.register_strategy(n, c, needs=needs)
        )
    bpo.register_strategy("nothing", lambda candidacy: (candidacy.eligible[:2], candidacy.score_gaps))
    record.error("strategy of a wrong shape", lambda: world.select(strategy="nothing"))


@observation
def configuring(record, world):
    for name, config in CONFIGS.items():
        record.error(name, lambda config=config: bpo.SelectConfig.from_dict(config))
    for name, changes in COMPARED.items():
        record.error(f"compare, {name}", lambda changes=changes: bpo.CompareConfig.of({**CONFIG, **changes}))
    record.error("compare, output", lambda: bpo.compare({**CONFIG, "dataset": world.rows}, "model"))
    record.error("trainer", lambda: bpo.BPOTrainer(world.model, train_dataset=world.rows))
    for name, settings in {
        "rounds": {"reselect_strategy": "steps"},
        "resample": {"resample": 2},
        "select_config": {"select_config": {"dtype": "float16"}},
        "json": {"select_config": "{"},
    }.items():
        given = {"budget": 5, "report_to": "none", "bf16": False, **settings}
        record.error(f"trainer, {name}", lambda given=given: bpo.BPOConfig(output_dir="wrong", **given))


@observation
def reading(record, world):
    for name, data in DATA.items():
        record.error(name, lambda data=data: bpo.read_candidates(data))
    Path("bad.jsonl").write_text("{")
    record.error("bad file", lambda: bpo.read_candidates("bad.jsonl"))
    record.error("raised", lambda: bpo.read_candidates(DATA["score as text"], on_invalid="raise"))


@observation
def others(record, world):
    zero = directions(5) * 0
    record.error("breadth", lambda: bpo.compress_breadth(directions(5), 6))
    record.error("embeddings of zero", lambda: bpo.compress_breadth(zero, 2))
    record.error("method", lambda: bpo.compress_breadth(directions(5), 2, method="best"))
    record.error("threshold", lambda: bpo.near_duplicates(directions(5), 2))
    record.error("coefficients", lambda: bpo.pair_coefficients(zero[0], zero[0], [[0, 1]], config={"loss_type": "ipo"}))
    record.error("temperature", lambda: bpo.sample_responses("model", ["a"], temperature=0, progress=False))
    record.error("scorer", lambda: bpo.score_responses(world.rows, 3, progress=False))
    record.error("no score", lambda: bpo.score_responses(world.rows, max, overwrite=True, progress=False))
    record.error("reward model", lambda: bpo.RewardModel("model"))
    record.error("server", lambda: bpo.ChatServer("localhost", "m"))
    record.error("judge", lambda: bpo.Judge(3))
    record.error("warm-up", lambda: bpo.warm_up(world.model, world.rows, "wrong"))
    record.error("evaluation", lambda: bpo.evaluate_preferences("./nowhere", world.rows, progress=False))
    record.error("selection", lambda: bpo.Selection.load("store"))
    record.error("export", lambda: bpo.export_store("store", "wrong.csv"))
    record.error("merge", lambda: bpo.merge_stores("wrong", []))
    record.error("preview, budget", lambda: bpo.preview("store", world.rows, budget=1000, progress=False))
    record.error("preview, arm", lambda: bpo.preview("store", world.rows, budget=9, arms=["best"], progress=False))
    other = scored_rows(3, 3, seed=4)
    record.error("preview, data", lambda: bpo.preview("store", other, budget=3, progress=False))
    changed = bpo.select(None, world.rows, budget=20, strategy="margin", progress=False).save("changed")
    path = changed / "selection.json"
    path.write_text(path.read_text().replace('"budget": 20', '"budget": 21'))
    record.error("selection that was changed", lambda: bpo.Selection.load("changed"))
