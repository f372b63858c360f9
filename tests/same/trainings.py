"""Short trainings, with rounds and weights and a warm-up, and what measures policies."""

import dataclasses

import datasets
import torch
from peft import LoraConfig
from trl import DPOConfig

import bpo
from answers import length
from record import observation
from world import scored_rows, tiny_llama

SETTINGS = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
}
ROUNDS = {"reselect_strategy": "epoch", "num_train_epochs": 2, "gradient_accumulation_steps": 2, "budget": 8}
ROWS = scored_rows(5, 3)


def trainer_of(world, output, *, adapter=True, **arguments):
    """A trainer that selects; ``arguments`` are its own or those of its settings."""
    own = {name: arguments.pop(name) for name in ("scorer", "target", "eval_dataset") if name in arguments}
    small = {"sketch_dim": 64, "n_clusters": 3}
    torch.manual_seed(0)
    return bpo.BPOTrainer(
        tiny_llama(world.tokenizer),
        None if adapter else tiny_llama(world.tokenizer),
        bpo.BPOConfig(output_dir=output, select_config=small, **{**SETTINGS, **arguments}),
        train_dataset=ROWS,
        processing_class=world.tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if adapter else None,
        **own,
    )


def write_down(record, name, trainer):
    """Weights, log and selections of a trainer that trained."""
    record = record.within(name)
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    record.data("weights", weights.numpy().tobytes())
    record.values("log", trainer.state.log_history)
    for number, selection in enumerate(getattr(trainer, "selections", [])):
        record.values(f"pairs {number}", selection.pairs)
        record.text(f"summary {number}.txt", selection.summary())


@observation
def rounds(record, world):
    trainer = trainer_of(world, "rounds", store="rounds-store", **{**ROUNDS, "save_strategy": "epoch"})
    trainer.train()
    write_down(record, "adapter", trainer)
    record.files("output", "rounds")
    record.files("stores", "rounds-store")
    again = trainer_of(world, "rounds", store="again-store", **ROUNDS)
    again.train(resume_from_checkpoint="rounds/checkpoint-2")
    write_down(record, "resumed", again)
    model = trainer_of(world, "model-rounds", adapter=False, **{**ROUNDS, "precompute_ref_log_probs": True})
    model.train()
    write_down(record, "model", model)


@observation
def one_selection(record, world):
    for name, settings in {
        "breadth": {"breadth": 3, "budget": 6, "max_steps": 2},
        "less": {"strategy": "less", "budget": 6, "max_steps": 2, "target": world.target},
        "ipo": {"loss_type": ["ipo"], "beta": 0.5, "budget": 0.5, "max_steps": 2, "eval_dataset": ROWS[:2]},
    }.items():
        trainer = trainer_of(world, f"one {name}", **settings)
        trainer.train()
        if "eval_dataset" in settings:
            record.values("evaluated", trainer.evaluate())
        write_down(record, name, trainer)


@observation
def resampled(record, world):
    sampling = {"resample": 3, "resample_config": {"max_new_tokens": 8, "keep": ["truncated"]}}
    trainer = trainer_of(world, "resampled", scorer=length, **ROUNDS, **sampling)
    trainer.train()
    write_down(record, "trainer", trainer)
    record.files("output", "resampled")


@observation
def weighted(record, world):
    rows = datasets.Dataset.from_list([{**row, "weight": 0.5 + index % 3} for index, row in enumerate(world.pairs[:8])])
    for name, settings in {
        "sigmoid": {},
        "mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    }.items():
        torch.manual_seed(0)
        trainer = bpo.WeightedDPOTrainer(
            tiny_llama(world.tokenizer),
            tiny_llama(world.tokenizer, initializer_range=0.25),
            bpo.WeightedDPOConfig(output_dir=f"weighted {name}", max_steps=2, **{**SETTINGS, **settings}),
            train_dataset=rows,
            processing_class=world.tokenizer,
        )
        trainer.train()
        write_down(record, name, trainer)


@observation
def warm_up(record, world):
    """And selections by the gradients at its checkpoints."""
    args = DPOConfig("ignored", num_train_epochs=2, **{**SETTINGS, "per_device_train_batch_size": 4})
    checkpoints = bpo.warm_up("model", world.rows, "warm", fraction=0.2, args=args)
    record.values("checkpoints", checkpoints)
    record.files("output", "warm", without=r".*\.md")
    last = list(checkpoints)[-1]
    world.collect(world.rows[:4], model=last, store="preconditioned", preconditioner="checkpoint")
    record.files("preconditioned", "preconditioned")
    config = {"checkpoints": checkpoints, "preconditioner": "checkpoint"}
    for name, settings in {"bpo": {}, "less": {"strategy": "less", "target": world.target}}.items():
        selection = world.select(model="model", config=config, store=f"checkpoints-{name}", **settings)
        record.selection(name, selection)
    record.files("stores", "checkpoints-less")


@observation
def evaluation(record, world):
    before = bpo.evaluate_preferences(world.model, world.rows, processing_class=world.tokenizer, progress=False)
    other = tiny_llama(world.tokenizer, initializer_range=0.21)
    given = {"processing_class": world.tokenizer, "progress": False, "config": {"beta": 0.3}}
    after = bpo.evaluate_preferences(other, world.rows, reference=before, **given)
    record.values("before", before)
    record.values("after", after)


@observation
def diagnosis(record, world):
    configs = {
        "lora": {},
        "full": {"features": "full"},
        "embeddings": {"features": "embeddings"},
        "cut": {"max_length": 14},
    }
    for name, config in configs.items():
        found = bpo.doctor(world.model, world.rows, processing_class=world.tokenizer, config=config)
        record.values(name, {**dataclasses.asdict(found), "problems": found.problems})
        record.text(f"{name}.txt", str(found), hidden=[(r"estimate   .* of memory", "estimate   TIME AND MEMORY")])
