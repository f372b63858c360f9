"""Gradient stores with every kind of setting, file by file, and what looks after them."""

import shutil
from pathlib import Path

import numpy as np
from peft import LoraConfig, get_peft_model

import bpo
from record import observation
from world import scored_rows, tiny_gpt2, tiny_llama

SETTINGS = {
    "float32": {"sketch_dtype": "float32"},
    "bfloat16": {"sketch_dtype": "bfloat16"},
    "int8": {"sketch_dtype": "int8"},
    "wide": {"sketch_dim": 256, "sketch_nnz": 4, "sketch_seed": 9},
    "rademacher": {"sketch_kind": "rademacher"},
    "normal": {"sketch_kind": "normal"},
    "embeddings": {"features": "embeddings"},
    "full": {"features": "full"},
    "factored": {"features": "full", "factor_dim": 8},
    "some parameters": {"parameters": "*.mlp.*"},
    "rank": {"lora_rank": 2},
    "autocast": {"bf16": True},
    "small batches": {"tokens_per_batch": 30},
    "truncated": {"max_length": 14},
    "truncated at the start": {"max_length": 14, "truncation_mode": "keep_end"},
}


def halving(prompt, response):
    """Token weights that a user's function gives."""
    return [0.5 + 0.5 * (place % 2) for place in range(len(response))]


@observation
def settings(record, world):
    rows = world.rows[:5]
    for name, values in SETTINGS.items():
        world.collect(rows, store=f"store {name}", **values)
        record.files(name, f"store {name}")
    world.collect(rows, store="store weighted", token_weights=halving)
    record.files("token weights", "store weighted")
    world.collect(world.messages, store="store messages")
    record.files("messages", "store messages")


@observation
def policies(record, world):
    """An adapter that is fresh, trained, of another kind; another reference; a model by path; another architecture."""
    rows = world.rows[:4]
    for name, settings in {"lora": {}, "dora": {"use_dora": True}, "saved": {"modules_to_save": ["norm"]}}.items():
        model = get_peft_model(tiny_llama(world.tokenizer), LoraConfig(r=2, target_modules="all-linear", **settings))
        for parameter_name, parameter in model.named_parameters():
            parameter.data.fill_(0.05) if ".lora_" in parameter_name else None
        world.collect(rows, model=model, store=f"policy {name}")
        record.files(name, f"policy {name}")
    world.collect(rows, model=model, store="policy base", ref_model="base")
    record.files("base", "policy base")
    world.collect(rows, store="policy other", ref_model=tiny_llama(world.tokenizer, initializer_range=0.21))
    record.files("other reference", "policy other")
    world.collect(rows, model="model", store="policy path")
    record.files("path", "policy path")
    world.collect(rows, model=tiny_gpt2(world.tokenizer), store="policy gpt2")
    record.files("gpt2", "policy gpt2")
    known = [{**row, "ref_chosen_logps": -9.5, "ref_rejected_logps": -11.25} for row in world.pairs[:6:2]]
    world.collect(known, store="policy columns", ref_model="columns")
    record.files("columns", "policy columns")


@observation
def handle(record, world):
    record.files("files", world.store)
    store = bpo.GradientStore.open(world.store)
    candidates = bpo.read_candidates(world.rows)
    record.values(
        "ids", [store.rows_of(store.records["response_id"]), store.rows_of_responses(candidates.response_ids)]
    )
    record.values("sketches", [store.sketches(), store.scales, store.predicted, store.set_aside])
    record.values("rest", [repr(store), len(store), store.dtype, store.fingerprint, store.tail_bytes, store.verify()])
    record.values("records", store.records)


@observation
def maintenance(record, world):
    record.text("describe.txt", bpo.describe_store(world.store))
    record.values("verify", bpo.verify_store(world.store, progress=False))
    for shard, rows in (("shard-0", world.rows[:5]), ("shard-1", world.rows[4:])):
        world.collect(rows, store=shard)
    record.values("merged", repr(bpo.merge_stores("merged", ["shard-0", "shard-1"], progress=False)))
    record.files("merged", "merged")
    bpo.merge_stores("narrow", ["shard-0"], dtype="int8", progress=False)
    record.files("narrow", "narrow")
    for ending in ("npz", "parquet"):
        record.files(f"exported.{ending}", bpo.export_store("shard-0", f"exported.{ending}"))


@observation
def damage(record, world):
    shutil.copytree(world.store, "damaged")
    path = Path("damaged/rows.f16")
    data = bytearray(path.read_bytes())
    data[130] ^= 1
    path.write_bytes(data[:-200])
    record.values("verify", bpo.verify_store("damaged", progress=False))
    record.error("open", lambda: bpo.GradientStore.open("damaged"))
    record.values("skipping", bpo.GradientStore.open("damaged", skip_damaged=True).set_aside)
    done = bpo.repair_store("damaged", progress=False)
    record.values("repair", [done.mended, done.set_aside, done.lost, done.cut_bytes, done.count])
    record.files("repaired", "damaged")
    record.text("describe.txt", bpo.describe_store("damaged"))
    world.collect(world.rows, store="damaged")
    record.files("completed", "damaged")


@observation
def growing(record, world):
    """A store that is completed, and one that serves a part of its data."""
    world.collect(world.rows[:3], store="growing")
    world.collect(world.rows, store="growing")
    record.files("files", "growing")
    part = world.collect(world.rows[2:4], store="growing")
    record.values("part", repr(part))
    other = scored_rows(3, 3, seed=4)
    record.error("other data", lambda: world.collect(other, store="growing"))
    for name, values in {
        "sketch": {"sketch_dim": 32},
        "features": {"features": "full"},
        "dtype": {"bf16": True},
    }.items():
        record.error(f"other {name}", lambda values=values: world.collect(world.rows, store="growing", **values))
    model = tiny_llama(world.tokenizer, initializer_range=0.3)
    record.error("other model", lambda: world.collect(world.rows, store="growing", model=model))
    record.error("no store", lambda: np.asarray(bpo.GradientStore.open("nowhere")))
