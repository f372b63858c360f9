"""Trainers of tiny models, and what a step of theirs comes to."""

import torch
from trl import DPOConfig

import bpo
from tiny import tiny_llama

QUIET = {
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
}
SHORT = {**QUIET, "max_steps": 2}


def trainer_of(kind, rows, tokenizer, output, *, eval_dataset=None, peft_config=None, **settings):
    """A trainer of TRL's, or ours that weighs, for two steps; with TRL's settings where ours are not asked for."""
    config = bpo.WeightedDPOConfig if "token_weights" in settings else DPOConfig
    defaults = {**SHORT, "gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    return kind(
        tiny_llama(tokenizer),
        tiny_llama(tokenizer, initializer_range=0.25) if peft_config is None else None,
        config(str(output), **{**defaults, **settings}),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def gradients(trainer, examples):
    """Loss and gradient of one batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def weights_of(trainer):
    """All weights of the model that is trained, in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
