"""Every kind of model and adapter: gradients from one batch against autograd, one response at a time.

The table in docs/models.md is what these tests found: ``BPO_WRITE_DOCS=1`` writes it anew.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, VeraConfig, get_peft_model
from torch import nn

from bpo import SelectConfig, UnsupportedModelError, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.gradients.plan import find_plan
from bpo.policy.logprobs import Forward, completion_logps
from bpo.policy.state import inference_state
from tiny import TINY, caught, hooked, scored_rows, tiny_gpt2, tiny_llama

MOE = {**TINY, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DOCS = Path(__file__).resolve().parents[3] / "docs" / "models.md"
FOUND: dict[str, dict[str, str]] = {}
FOUND_ADAPTERS: dict[str, str] = {}


def build(name, tokenizer, **changes):
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
    config = config_class(
        vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=0, eos_token_id=2, bos_token_id=2, **changes
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # ones and zeros would hide what multiplies and what adds
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


class ExpertMlp(nn.Module):
    """A mixture whose experts are modules and see the tokens that chose them only."""

    def __init__(self, width=32, experts=4):
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, width)) for _ in range(experts)
        )

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), 2)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, position = torch.where(chosen == index)
            if len(token):
                result.index_add_(0, token, expert(flat[token]) * weights[token, position, None])
        return result.view_as(hidden_states)


def module_experts(tokenizer):
    model = tiny_llama(tokenizer)
    for layer in model.model.layers:
        layer.mlp = ExpertMlp()
    return model.eval()


MODELS = {
    "Llama": lambda t: tiny_llama(t),
    "Llama, tied embeddings": lambda t: tiny_llama(t, tie_word_embeddings=True),
    "Qwen2 (biases)": lambda t: build("Qwen2", t, **TINY),
    "Qwen3": lambda t: build("Qwen3", t, head_dim=8, **TINY),
    "Gemma": lambda t: build("Gemma", t, head_dim=8, **TINY),
    "Gemma 2 (soft caps)": lambda t: build("Gemma2", t, head_dim=8, **TINY),
    "Gemma 3": lambda t: build("Gemma3", t, head_dim=8, **TINY),
    "GPT-2 (Conv1D)": tiny_gpt2,
    "GPT-NeoX (fused qkv)": lambda t: build("GPTNeoX", t, **{**TINY, "num_key_value_heads": None}),
    "Phi": lambda t: build("Phi", t, **TINY),
    "Phi 3 (fused qkv)": lambda t: build("Phi3", t, **TINY),
    "Mistral": lambda t: build("Mistral", t, **TINY),
    "Mixtral (fused experts)": lambda t: build("Mixtral", t, **MOE),
    "Qwen2-MoE (fused and shared experts)": lambda t: build(
        "Qwen2Moe", t, shared_expert_intermediate_size=16, decoder_sparse_step=1, **MOE
    ),
    "Qwen3-MoE (fused experts)": lambda t: build("Qwen3Moe", t, head_dim=8, decoder_sparse_step=1, **MOE),
    "experts as modules": module_experts,
}


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_responses(read_candidates(scored_rows(2, 3)), tokenizer, 256)[0]


@pytest.fixture(scope="module", autouse=True)
def documented():
    yield
    if len(FOUND) < len(MODELS) or len(FOUND_ADAPTERS) < len(ADAPTERS):
        return  # not the whole file was run
    text = table()
    if os.environ.get("BPO_WRITE_DOCS"):
        head = DOCS.read_text(encoding="utf-8").split("<!-- table -->")
        DOCS.write_text(f"{head[0]}<!-- table -->\n{text}<!-- table -->{head[2]}", encoding="utf-8")
    assert text in DOCS.read_text(encoding="utf-8"), "docs/models.md is out of date: make tables"


def table():
    columns = list(dict.fromkeys(column for row in FOUND.values() for column in row))
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for model, row in FOUND.items():
        lines.append(f"| {model} | " + " | ".join(row.get(name, "") for name in columns) + " |")
    lines += ["", "| adapter, here on Llama | its parameters |", "|---|---|"]
    lines += [f"| {adapter} | {found} |" for adapter, found in FOUND_ADAPTERS.items()]
    return "\n".join(lines) + "\n"


def errors(model, config, tokenized):
    """Relative errors of the gradients of a batch, the plan, and the features."""
    features = choose_features(model, config)
    rows = np.arange(len(tokenized.ids))
    forward = Forward(model, tokenized, 0)
    found = []
    with inference_state(model):
        plan = find_plan(features, forward)
        gradients, _ = caught(forward, features, plan, rows)
        assert all(parameter.grad is None for parameter in model.parameters())
        parameters = [model.get_parameter(name) for name in features.slots]
        for parameter in parameters:
            parameter.requires_grad_(True)
        for row in rows:
            logp = completion_logps(model, tokenized, np.array([row]), 0).logps.sum()
            exact = torch.autograd.grad(logp, parameters, allow_unused=True)
            kept = [
                torch.zeros(1, slot.size) if gradient is None else slot.keep(gradient)
                for slot, gradient in zip(features.slots.values(), exact, strict=True)
            ]
            flat = torch.cat(kept, dim=1)[0]
            assert flat.norm() > 0
            for name, slot in features.slots.items():  # each by itself, since some are small beside the whole
                part = slice(slot.offset, slot.offset + slot.size)
                error = (gradients[row, part] - flat[part]).norm()
                assert error <= 1e-4 * flat[part].norm() + 2e-6 * flat.norm(), name
            found.append(float((gradients[row] - flat).norm() / flat.norm()))
    return found, plan, features


def note(model, column, found, plan):
    assert max(found) < 1e-5
    assert not plan.whole
    # Norms and the like run again, too, but they are a few sums.
    again = sorted({name.rpartition(".")[2] for name in plan.replays if ".mlp" in name})
    FOUND.setdefault(model, {})[column] = "exact" + (f", runs `{'`, `'.join(again)}` again" if again else "")


@pytest.mark.parametrize("name", MODELS)
def test_model(name, tokenizer, tokenized):
    model = MODELS[name](tokenizer)
    found, plan, _ = errors(model, SelectConfig(lora_rank=4), tokenized)
    note(name, "fresh LoRA", found, plan)
    found, plan, features = errors(model, SelectConfig(features="full"), tokenized)
    assert features.dim == sum(parameter.numel() for parameter in model.parameters())
    note(name, "every parameter", found, plan)
    found, plan, _ = errors(model, SelectConfig(features="full", factor_dim=8), tokenized)
    note(name, "every parameter, factored", found, plan)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for parameter_name, parameter in wrapped.named_parameters():
        if ".lora_B." in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    found, plan, features = errors(wrapped, SelectConfig(), tokenized)
    assert any(".lora_A." in name for name in features.slots)
    note(name, "trained LoRA", found, plan)


ADAPTERS = {
    "LoRA": LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5),
    "rsLoRA": LoraConfig(r=4, use_rslora=True, target_modules="all-linear"),
    "DoRA": LoraConfig(r=4, use_dora=True, target_modules="all-linear"),
    "LoRA with biases": LoraConfig(r=4, target_modules="all-linear", bias="all"),
    "LoRA and `modules_to_save`": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
    "LoRA on embeddings": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    "LoRA and trainable tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 9, 17]),
    "LoRA of several ranks": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
    "VeRA": VeraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "LoHa": LoHaConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "LoKr": LoKrConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "IA3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name, tokenizer, tokenized):
    config = ADAPTERS[name]
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny_llama(tokenizer), config)
    fresh, plan, features = errors(model, SelectConfig(), tokenized)
    assert max(fresh) < 1e-5
    if isinstance(config, LoraConfig):
        assert not any(".lora_A." in name for name in features.slots)  # their gradients are zero while B is
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    found, plan, features = errors(model, SelectConfig(), tokenized)
    assert set(features.slots) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert max(found) < 1e-5
    assert not plan.whole
    FOUND_ADAPTERS[name] = "exact"


def test_the_active_one_of_several_adapters_is_differentiated(tokenizer, tokenized):
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    for parameter in model.parameters():
        if parameter.dim() == 2 and min(parameter.shape) <= 4:
            parameter.data.normal_(std=0.1)
    for active, size in (("default", 4), ("other", 2)):
        model.set_adapter(active)
        found, _, features = errors(model, SelectConfig(), tokenized)
        assert max(found) < 1e-5
        assert all(f".{active}." in name for name in features.slots)
        assert {min(slot.shape) for slot in features.slots.values()} == {size}
    FOUND_ADAPTERS["several adapters (the active one)"] = "exact"


def test_parameters_by_pattern(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    found, _, features = errors(model, SelectConfig(features="full", parameters=["*.1.mlp.*", "*norm*"]), tokenized)
    assert max(found) < 1e-5
    assert sorted({name.split(".")[-2] for name in features.slots if "norm" not in name}) == [
        "down_proj",
        "gate_proj",
        "up_proj",
    ]
    assert "model.norm.weight" in features.slots
    fresh = choose_features(model, SelectConfig(parameters="*.q_proj.weight"))
    assert [layer.name for layer in fresh.layers] == [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]
    with pytest.raises(UnsupportedModelError, match=r"No parameter of LlamaForCausalLM matches .*nothing"):
        choose_features(model, SelectConfig(features="full", parameters="nothing"))
    with pytest.raises(UnsupportedModelError, match=r"no linear layers .* whose weights match \['nothing'\]"):
        choose_features(model, SelectConfig(parameters="nothing"))


def test_adapters_that_prepend_tokens_are_refused(tokenizer):
    from peft import PromptTuningConfig

    model = get_peft_model(tiny_llama(tokenizer), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING, which puts tokens in front of the prompt"):
        choose_features(model, SelectConfig())


def test_factored_gradients_keep_inner_products(tokenizer, tokenized):
    """Their mean over projections is the exact one, and the error falls with the side."""
    model = tiny_llama(tokenizer)
    patterns = ["*proj.weight", "lm_head.weight", "*embed*"]
    rows = np.arange(len(tokenized.ids))

    def products(**changes):
        features = choose_features(model, SelectConfig(features="full", parameters=patterns, **changes))
        gradients, _ = hooked(model, features, tokenized, rows)
        return gradients @ gradients.T

    exact = products()
    scale = exact.diagonal().sqrt()
    spread = {}
    for side in (4, 16):
        off = [(products(factor_dim=side, sketch_seed=seed) - exact) / scale / scale[:, None] for seed in range(12)]
        spread[side] = float(torch.stack(off).square().mean().sqrt())
        assert float(torch.stack(off).mean().abs()) < 3 * spread[side] / 12**0.5
    assert spread[16] < spread[4] / 2
