"""How batches go through the model: memory, precision, checkpointing."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import job
from bpo import SelectConfig, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.gradients.plan import find_plan
from bpo.policy.logprobs import Forward
from bpo.policy.state import inference_state
from bpo.system.memory import is_out_of_memory
from tiny import caught, hooked, scored_rows, stored, tiny_llama


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_responses(read_candidates(scored_rows(3, 4)), tokenizer, 256)[0]


def rows_of(model, tokenizer, **changes):
    return stored(model, scored_rows(4, 4), tokenizer, **{"sketch_dim": 256, **changes})


def relative_errors(left, right):
    return np.linalg.norm(left - right, axis=1) / np.linalg.norm(right, axis=1)


@pytest.mark.parametrize("features", ["lora", "full"])
def test_padding_batch_size_and_order_change_a_row_by_1e5_at_most(tokenizer, features):
    model = tiny_llama(tokenizer)
    alone, together = (rows_of(model, tokenizer, features=features, tokens_per_batch=n).rows for n in (1, 400))
    assert relative_errors(together, alone).max() < 1e-5


def test_bfloat16_autocast_stays_close_and_sketches_stay_float32(tokenizer):
    model = tiny_llama(tokenizer)
    exact, coarse = rows_of(model, tokenizer), rows_of(model, tokenizer, bf16=True)
    assert coarse.rows.dtype == np.float32
    assert "bfloat16" in coarse.fingerprint["dtype"]
    errors = relative_errors(coarse.sketches(), exact.sketches())
    assert 1e-4 < errors.max() < 0.1


def test_a_bfloat16_model_gives_float32_sketches(tokenizer):
    exact = rows_of(tiny_llama(tokenizer), tokenizer)
    coarse = rows_of(tiny_llama(tokenizer).to(torch.bfloat16), tokenizer)
    assert coarse.rows.dtype == np.float32
    assert relative_errors(coarse.sketches(), exact.sketches()).max() < 0.1


@pytest.mark.parametrize("wrap", [False, True])
def test_gradient_checkpointing_is_honoured_and_changes_nothing(tokenizer, tokenized, wrap):
    model = tiny_llama(tokenizer)
    if wrap:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    features = choose_features(model, SelectConfig())
    rows = np.arange(4)
    plain, _ = hooked(model, features, tokenized, rows)
    model.gradient_checkpointing_enable()
    forwards = []
    handle = model.get_submodule(
        ("base_model.model." if wrap else "") + "model.layers.0.mlp"
    ).register_forward_pre_hook(lambda *_: forwards.append(1))
    with inference_state(model):
        forward = Forward(model, tokenized, 0)
        plan = find_plan(features, forward)
        forwards.clear()
        gradients, _ = caught(forward, features, plan, rows)
    handle.remove()
    assert len(forwards) == 2  # forward, and again on the way back
    torch.testing.assert_close(gradients, plain, rtol=1e-5, atol=1e-6)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_out_of_memory_halves_the_batch_and_changes_nothing(tokenizer):
    """A limit like a GPU's: the allocation itself fails."""
    model = tiny_llama(tokenizer)
    expected = rows_of(model, tokenizer, tokens_per_batch=4096)
    sizes = []

    def scarce(_, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            torch.empty(1 << 60, dtype=torch.uint8)

    handle = model.register_forward_pre_hook(scarce, with_kwargs=True)
    with pytest.warns(UserWarning, match="Memory does not suffice for 16 sequences of .* going on with 8"):
        store = rows_of(model, tokenizer, tokens_per_batch=4096)
    assert max(sizes[sizes.index(16) + 3 :]) <= 3
    np.testing.assert_array_equal(store.records["response_id"], expected.records["response_id"])
    assert relative_errors(store.sketches(), expected.sketches()).max() < 1e-5
    handle.remove()

    def none_left(_, args, kwargs):
        if kwargs["input_ids"].shape[1] > 20:
            torch.empty(1 << 60, dtype=torch.uint8)

    model.register_forward_pre_hook(none_left, with_kwargs=True)
    with (
        pytest.warns(UserWarning, match="Memory does not suffice"),
        pytest.raises(MemoryError, match=r"(?s)one sequence of 2\d tokens \(row \d+\).*max_length"),
    ):
        rows_of(model, tokenizer, tokens_per_batch=60)


def test_other_errors_are_not_taken_for_memory():
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def peaks_of_short_and_long():
    """Most memory, in KiB, while little of a response has logits, and then all of it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from bpo.policy.logprobs import completion_logps

    sizes = {"vocab_size": 60_000, "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 1024}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    ids = [[1] * 1000 for _ in range(4)]

    def peak(prompt):
        tokenized = types.SimpleNamespace(
            ids=ids, prompt_lengths=np.full(4, prompt), lengths=np.full(4, 1000), weights=None
        )
        completion_logps(model, tokenized, np.arange(4), 0).logps.sum().backward()
        # Not ru_maxrss, which starts with that of the process that started this one.
        return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1])

    return peak(990), peak(0)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_stays_that_of_the_model():
    """No logits but those of a chunk, no gradients of parameters: a large vocabulary costs next to nothing."""
    short, long = job.result(peaks_of_short_and_long)
    assert (long - short) / 1024 < 900  # 4,000 × 60,000 logits are 960 MB, and so are their gradients
