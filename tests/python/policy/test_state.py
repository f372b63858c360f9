"""After every public call the user's model is the model they gave: each attribute, hook, bit and random state."""

import contextlib
import copy
import os
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

import bpo
from bpo.policy.state import inference_state
from snapshots import assert_unchanged, snapshot
from tiny import TINY, scored_rows, stored, tiny_gpt2, tiny_llama

ROWS = scored_rows(3, 3)
FAST = {"sketch_dim": 64}
LONG = int(os.environ.get("BPO_TORTURE", "0"))


def in_training(tokenizer, **changes):
    """A model as a trainer has it: dropout, gradient checkpointing, some of it frozen, gradients, hooks and patches."""
    model = tiny_llama(tokenizer, attention_dropout=0.1, tie_word_embeddings=True, **changes).train()
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()
    model.model.layers[0].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.layers)
    first.grad = torch.ones_like(first)
    second.register_hook(lambda gradient: gradient * 2)
    for layer in model.model.layers:
        layer.forward = _scaled(layer.forward)
        layer.register_forward_hook(lambda module, args, output: output)
    model.config.use_cache = True
    return model


def _scaled(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs) * 0.95


def _adapted(tokenizer):
    model = get_peft_model(in_training(tokenizer), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], lora_dropout=0.2))
    model.base_model.set_adapter(["default", "second"])
    return model


MODELS = {
    "plain": tiny_llama,
    "gpt2": lambda tokenizer: tiny_gpt2(tokenizer).train(),
    "in training": in_training,
    "bfloat16": lambda tokenizer: in_training(tokenizer).to(torch.bfloat16),
    "growing rope": lambda tokenizer: in_training(
        tokenizer,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        max_position_embeddings=16,
    ),
    "adapters": _adapted,
}


def _reward(tokenizer):
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), **TINY, "num_labels": 1, "pad_token_id": None}
    return LlamaForSequenceClassification(LlamaConfig(**settings)).train()


CALLS = {
    "select": lambda model, **given: bpo.select(model, ROWS, budget=3, config=FAST, progress=False, **given),
    "with a policy's embeddings": lambda model, **given: bpo.select(
        model, ROWS, budget=2, breadth=2, config=FAST, progress=False, **given
    ),
    "all parameters": lambda model, **given: bpo.collect_gradients(
        model, ROWS, config={**FAST, "features": "full"}, progress=False, **given
    ),
    "embeddings": lambda model, **given: bpo.collect_gradients(
        model, ROWS, config={**FAST, "features": "embeddings"}, progress=False, **given
    ),
    "doctor": lambda model, **given: bpo.doctor(model, ROWS, config=FAST, **given),
    "evaluate": lambda model, **given: bpo.evaluate_preferences(model, ROWS, config=FAST, progress=False, **given),
    "sample": lambda model, **given: bpo.sample_responses(
        model, ["one two", "three"], 2, max_new_tokens=3, keep=["truncated"], progress=False, **given
    ),
}


@pytest.mark.parametrize("name", MODELS if LONG else ["gpt2", "in training", "adapters"])
def test_a_model_is_as_it_was_after_every_call(name, tokenizer):
    model = MODELS[name](tokenizer)
    model(input_ids=torch.tensor([[5, 6, 7]]))  # what a model makes of itself when it first runs is its own
    before = snapshot(model, tokenizer)
    for call in CALLS.values():
        call(model, processing_class=tokenizer)
        assert_unchanged(before, snapshot(model, tokenizer))


class StopError(Exception):
    """What a user's own code may raise."""


@pytest.mark.parametrize("kind", [StopError, KeyboardInterrupt, MemoryError] if LONG else [KeyboardInterrupt])
@pytest.mark.parametrize("call", CALLS)
def test_a_model_is_as_it_was_after_an_error_in_a_layer(call, kind, tokenizer):
    """At the first call of the layer, at the last, and between; checkpointing calls it on the way back, too."""
    model = in_training(tokenizer)
    calls = left = 0

    def hook(module, args):
        nonlocal calls
        calls += 1
        if calls == left:
            raise kind

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(hook)
    before = snapshot(model, tokenizer)
    CALLS[call](model, processing_class=tokenizer)
    total = calls
    for left in sorted({1, total, *np.random.default_rng(0).integers(1, total + 1, 20 if LONG else 1)}):
        calls = 0
        # Out of memory, a batch is halved; an error out of the model may be told as what it means.
        with contextlib.suppress(kind, bpo.UnsupportedModelError):
            CALLS[call](model, processing_class=tokenizer)
        assert calls >= left
        assert_unchanged(before, snapshot(model, tokenizer))


def _interrupted(function, line):
    """Runs a function with Ctrl-C at the n-th line of the package; returns how many lines ran."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if "/bpo/policy/" not in frame.f_code.co_filename and "/bpo/gradients/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == line:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            function()
    finally:
        sys.settrace(before)
    return lines


def test_a_model_is_as_it_was_after_ctrl_c_at_any_line(tokenizer):
    model = _adapted(tokenizer)
    config = {**FAST, "ref_model": "base"}

    def run():
        bpo.collect_gradients(model, ROWS, processing_class=tokenizer, config=config, progress=False)

    run()
    before = snapshot(model, tokenizer)
    total = _interrupted(run, 0)
    assert_unchanged(before, snapshot(model, tokenizer))
    for line in np.random.default_rng(0).integers(1, total + 1, LONG or 4):
        assert _interrupted(run, line) <= total
        assert_unchanged(before, snapshot(model, tokenizer))


def test_a_reward_model_is_as_it_was(tokenizer):
    model = _reward(tokenizer)
    before = snapshot(model, tokenizer)
    scorer = bpo.RewardModel(model, tokenizer)
    rows = [{"prompt": "one", "responses": [" two three", " four"]}]
    bpo.score_responses(rows, scorer, progress=False)
    assert_unchanged(before, snapshot(model, tokenizer))
    model.score.register_forward_hook(_raise)
    before = snapshot(model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        bpo.score_responses(rows, scorer, progress=False)
    assert_unchanged(before, snapshot(model, tokenizer))


def _raise(*_):
    raise KeyboardInterrupt


def test_a_reference_is_as_it_was(tokenizer):
    policy, reference = tiny_llama(tokenizer).train(), in_training(tokenizer, initializer_range=0.21)
    before = snapshot(reference, tokenizer)
    stored(policy, ROWS, tokenizer, ref_model=reference)
    assert_unchanged(before, snapshot(reference, tokenizer))


def test_a_model_that_draws_at_random_leaves_the_random_state(tokenizer):
    model = tiny_llama(tokenizer)

    def draw(module, args, output):
        torch.rand(3)

    model.model.layers[0].register_forward_hook(draw)
    before = snapshot(model)
    stored(model, ROWS, tokenizer)
    assert_unchanged(before, snapshot(model))


def test_what_a_layer_counts_in_a_buffer_is_put_back(tokenizer):
    model = tiny_llama(tokenizer)
    norm = model.model.norm
    norm.register_buffer("calls", torch.zeros(1))
    norm.register_buffer("largest", torch.full((32,), torch.nan), persistent=False)

    def count(module, args, output):
        module.calls.add_(1)
        module.largest.copy_(output[0, 0].detach())

    norm.register_forward_hook(count)
    for call in list(CALLS.values()) if LONG else [CALLS["select"], CALLS["sample"]]:
        before = snapshot(model, tokenizer)
        call(model, processing_class=tokenizer)
        assert_unchanged(before, snapshot(model, tokenizer))


def test_what_a_tokenizer_was_called_with_last_stays(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    model = tiny_llama(tokenizer)
    tokenizer(["one two three", "four"], truncation=True, max_length=3, padding="max_length")
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    backend = tokenizer.backend_tokenizer
    before = snapshot(model, tokenizer), backend.truncation, backend.padding
    assert backend.truncation is not None and backend.padding is not None
    for call in (CALLS["select"], CALLS["sample"]):
        call(model, processing_class=tokenizer)
        assert_unchanged(before[0], snapshot(model, tokenizer))
    chats = scored_rows(2, 2, conversational=True)
    bpo.select(model, chats, budget=2, processing_class=tokenizer, config=FAST, progress=False)
    assert (backend.truncation, backend.padding) == before[1:]


def test_what_a_pass_takes_away_or_adds_is_put_back(tokenizer):
    model = tiny_llama(tokenizer)
    layer, head = model.model.layers[0], model.lm_head.weight
    mlp, hooks = layer.mlp, layer._forward_hooks
    before = snapshot(model)
    with pytest.raises(StopError), inference_state(model):
        del layer.mlp
        layer.added, layer.extra = torch.nn.Linear(2, 2), "text"
        layer.register_buffer("cache", torch.zeros(3))
        layer._forward_hooks = None
        model.config.use_cache = False
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(head))
        head.grad = torch.zeros_like(head)
        raise StopError
    assert layer.mlp is mlp
    assert layer._forward_hooks is hooks
    assert_unchanged(before, snapshot(model))
