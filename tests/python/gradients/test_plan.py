"""How gradients are caught: each parameter is checked by itself, and what is no layer is had in another way."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from architectures import autograd
from bpo import SelectConfig, UnsupportedModelError, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients import capture
from bpo.gradients.choose import choose_features
from bpo.gradients.layers import Embedding, Slot
from bpo.gradients.plan import _self_check, _Truth, find_plan
from bpo.policy.logprobs import Forward
from bpo.policy.state import inference_state
from tiny import caught, scored_rows, tiny_llama

WIDTH = 32


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_responses(read_candidates(scored_rows(1, 3)), tokenizer, 256)[0]


def errors(model, tokenized, **settings):
    """By parameter, the largest relative error of its gradient in a batch, and the plan."""
    features = choose_features(model, SelectConfig(lora_rank=4, **settings))
    forward = Forward(model, tokenized, 0)
    found = dict.fromkeys(features.slots, 0.0)
    with inference_state(model):
        plan = find_plan(features, forward)
        gradients, _ = caught(forward, features, plan, np.arange(len(tokenized.ids)))
        for row, gradient in enumerate(gradients):
            for name, wanted in autograd(forward, features, row).items():
                slot = features.slots[name]
                error = (gradient[slot.offset : slot.offset + slot.size] - wanted).norm() / wanted.norm()
                found[name] = max(found[name], float(error))
    return found, plan


class Uses(nn.Module):
    """An mlp whose layer is used in a way of a test, as a small part of what it gives."""

    def __init__(self, use, share):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.use, self.share = use, share

    def forward(self, x):
        return self.other(x) + self.share * self.use(self, x)


USES = {
    "its weight alone": lambda m, x: x @ m.proj.weight.T,
    "transposed": lambda m, x: x @ m.proj.weight,
    "a view of its weight": lambda m, x: torch.cat([x @ m.proj.weight[:16].T, x[..., 16:] * m.proj.bias[16:]], dim=-1),
    "called and used beside": lambda m, x: m.proj(x) + 0.3 * x @ m.proj.weight,
    "called twice": lambda m, x: m.proj(torch.tanh(m.proj(x))),
    "its bias beside": lambda m, x: m.proj(x) + x * m.proj.bias,
}


@pytest.mark.parametrize(
    ("use", "dtype"),
    [*((use, torch.float32) for use in USES), ("its weight alone", torch.bfloat16), ("called twice", torch.bfloat16)],
)
def test_a_small_gradient_is_not_lost(use, dtype, tokenizer, tokenized):
    """However small its share: it lies far below what the whole gradient is known to in this precision."""
    model = tiny_llama(tokenizer)
    model.model.layers[1].mlp = Uses(USES[use], 1e-4)
    found, plan = errors(model.to(dtype), tokenized, features="full")
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    assert max(error for name, error in found.items() if ".mlp.proj." in name) < tolerance
    assert not plan.whole
    found, _ = errors(model, tokenized, parameters="*.mlp.*")
    assert found["model.layers.1.mlp.proj.weight"] < tolerance


def test_what_is_lost_in_one_layer_of_many_is_found(tokenizer, tokenized):
    """Others of its kind are right, so a sample of each kind would not do."""
    model = tiny_llama(tokenizer, num_hidden_layers=5)
    layer = model.model.layers[3].self_attn.v_proj
    layer.forward = lambda x: x @ layer.weight.T
    model.model.layers[3].self_attn.o_proj.weight.data *= 1e-3
    uncalled = model.model.layers[3].mlp
    uncalled.forward = lambda x: uncalled.down_proj(x @ uncalled.gate_proj.weight.T) * 1e-3
    found, plan = errors(model, tokenized, features="full", parameters=["*_proj.weight"])
    del found["model.layers.3.mlp.up_proj.weight"]  # has no part
    assert max(found.values()) < 1e-4
    assert list(plan.replays) == ["model.layers.3.mlp"]


class Router(nn.Linear):
    """A router as Llama 4 and Phi-MoE have them."""

    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router(WIDTH, 2)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights, _ = self.router(x)
        return weights[..., :1] * self.first(x) + weights[..., 1:] * self.second(x)


@pytest.mark.parametrize("features", ["lora", "full"])
def test_a_linear_layer_that_gives_a_tuple_is_run_again(features, tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    model.model.layers[0].mlp = Routed()
    found, plan = errors(model, tokenized, features=features)
    assert found["model.layers.0.mlp.router.weight"] < 1e-4
    assert max(found.values()) < 1e-4
    assert any(name.startswith("model.layers.0.mlp") for name in plan.replays)


class Block(nn.Module):
    """Parameters of three sides, of which one holds experts."""

    def __init__(self, transposed=False):
        super().__init__()
        self.num_experts = 3
        if transposed:
            self.is_transposed = True
        shape = (3, WIDTH, 48) if transposed else (3, 48, WIDTH)
        self.up = nn.Parameter(0.1 * torch.randn(shape))
        self.scale = nn.Parameter(torch.randn(3, 1, WIDTH))
        self.table = nn.Parameter(torch.randn(2, 64, WIDTH))
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)
        self.down = nn.Linear(48, WIDTH)

    def forward(self, x):
        experts = self.up.mT if hasattr(self, "is_transposed") else self.up
        x = x + self.conv(x.mT)[..., : x.shape[1]].mT + self.table[0, : x.shape[1]]
        return self.down(sum(torch.tanh((x * scale) @ w.T) for w, scale in zip(experts, self.scale, strict=True)))


@pytest.mark.parametrize("transposed", [False, True])
def test_only_experts_are_taken_for_experts(transposed, tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    model.model.layers[0].mlp = Block(transposed)
    slots = choose_features(model, SelectConfig(lora_rank=4)).slots
    of_block = {name.rpartition("mlp.")[2] for name in slots if ".0.mlp." in name}
    assert of_block == {"up", "down.weight"}
    assert slots["model.layers.0.mlp.up"].shape == (3, 48, 4)
    found, _ = errors(model, tokenized)
    assert max(found.values()) < 1e-4


def test_a_token_that_sees_ahead_is_found(tokenizer, tokenized):
    """By a mean over all positions, small beside the rest."""
    model = tiny_llama(tokenizer)
    mlp = model.model.layers[0].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + 0.01 * x.mean(dim=1, keepdim=True)
    with pytest.raises(UnsupportedModelError, match="In LlamaForCausalLM a token sees those after it"):
        errors(model, tokenized)


def test_padding_that_matters_is_found(tokenizer, tokenized):
    """By the gradients, where log π hardly changes."""
    model = tiny_llama(tokenizer)
    norm = model.model.norm
    inner = norm.forward
    norm.forward = lambda x: inner(x) * (1 + 0.035 * x.shape[1] / 20)
    with pytest.raises(UnsupportedModelError, match=r"gradients in a batch of two differ .* or padding acts on them"):
        errors(model, tokenized)


def test_no_noise_hides_what_is_lost(tokenizer, tokenized):
    """In rounding of any size, a parameter that the plan does not catch is named, and so is one that it half does."""
    model = tiny_llama(tokenizer)
    features = choose_features(model, SelectConfig(features="full", parameters=["*.mlp.*"]))
    forward, rows = Forward(model, tokenized, 0), np.array([0, 1])
    with inference_state(model):
        plan = find_plan(features, forward)
        truth = _Truth.of(features.slots, forward, rows)
        noisy = dataclasses.replace(truth, noise=dict.fromkeys(truth.noise, 1e9))
        assert _self_check(features, forward, plan, rows, noisy) == {}
        lost = plan.layers.pop(0)
        halved = plan.layers[0].slots.keys()
        doubled = {name: 2 * found if name in halved else found for name, found in noisy.batch.items()}
        noisy = dataclasses.replace(noisy, batch=doubled)
        assert _self_check(features, forward, plan, rows, noisy).keys() == lost.slots.keys() | halved


def test_layers_that_share_a_weight_share_its_adapter(tokenizer, tokenized):
    """As Zamba's: modules of their own around one parameter."""
    model = tiny_llama(tokenizer)
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    found, plan = errors(model, tokenized)
    assert "model.layers.1.mlp.up_proj.weight" not in found
    assert max(found.values()) < 1e-4
    assert not plan.replays and not plan.whole


class Stateful(nn.Module):
    """Runs over a batch of the size that it saw first, until the next whole forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.size = None

    def forward(self, x):
        if self.size is None:
            self.size = len(x)
        return x * self.weight.expand(self.size, 1, WIDTH)[: len(x)].view(len(x), 1, WIDTH) if len(x) else x


def test_a_module_that_cannot_be_run_again_is_left_to_the_whole_model(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    mlp = model.model.layers[0].mlp = Stateful()

    def forget(*_):
        mlp.size = None

    def insist(_, args):
        assert mlp.size in (None, len(args[0])), "one sample of a batch"

    model.register_forward_pre_hook(forget)
    mlp.register_forward_pre_hook(insist)
    with pytest.warns(UserWarning, match=r"of 1 parameters, such as model\.layers\.0\.mlp\.weight, take a forward"):
        found, plan = errors(model, tokenized, features="full")
    assert max(found.values()) < 1e-4
    assert list(plan.whole) == ["model.layers.0.mlp.weight"]


def test_what_has_no_part_is_named_and_costs_nothing(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    model.vision = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    features = choose_features(model, SelectConfig(features="full"))
    with (
        inference_state(model),
        pytest.warns(UserWarning, match=r"2 parameters, such as vision\.1\.weight, have no part in"),
    ):
        plan = find_plan(features, Forward(model, tokenized, 0))
    assert not plan.whole


def test_an_error_of_the_model_is_a_sentence(tokenizer, tokenized):
    model = tiny_llama(tokenizer)

    def fail(_, args):
        raise AttributeError("no such thing")

    model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM cannot be run .* AttributeError: no such thing"):
        errors(model, tokenized)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_all_samples_are_run_again_in_one_go(dtype, tokenizer, tokenized, monkeypatch):
    model = tiny_llama(tokenizer).to(dtype)
    norm, calls = model.model.layers[0].input_layernorm, []
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    features = choose_features(model, SelectConfig(features="full"))
    forward = Forward(model, tokenized, 0)
    rows = np.arange(len(tokenized.ids))
    with inference_state(model):
        plan = find_plan(features, forward)
        calls.clear()
        together, _ = caught(forward, features, plan, rows)
        assert len(calls) == 2
        assert all(replay.vectorized for replay in plan.replays.values())
        # Where the gradients of all of them would take too much memory.
        monkeypatch.setattr(capture, "_GRADIENT_BUFFER_BYTES", 4 * WIDTH * len(rows) - 1)
        calls.clear()
        one_by_one, _ = caught(forward, features, plan, rows)
        assert len(calls) == 1 + len(rows)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-4)


class OfItsNumbers(nn.Module):
    """What no vmap can run: Python looks at the numbers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.scale if float(x.detach().abs().sum()) > 0 else x


def test_what_cannot_run_in_one_go_runs_one_by_one(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    model.model.layers[1].input_layernorm = OfItsNumbers()
    found, plan = errors(model, tokenized, features="full")
    assert max(found.values()) < 1e-4
    assert not plan.replays["model.layers.1.input_layernorm"].vectorized
    assert plan.replays["model.layers.0.input_layernorm"].vectorized
    assert not plan.whole


class KeepsForLater(nn.Module):
    """What it made for one batch it takes for the next, if that is as large."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.kept = None

    def forward(self, x):
        if self.kept is None or self.kept.shape != x.shape[:1]:
            self.kept = x.new_ones(x.shape[0])
        return x * self.weight * self.kept[:, None, None]


class MayBeGivenMore(nn.Module):
    """A module that is given one tensor more where there is padding, as the mixers of hybrids are given a mask."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        short = x.shape[0] > 1 and bool((x[:, -1] == x[:1, -1]).all())
        return self.inner(x, None if short or x.shape[0] == 1 else torch.ones(x.shape[0], 1, 1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, mask):
        return x * self.weight if mask is None else x * self.weight * mask


@pytest.mark.parametrize("norm", [KeepsForLater, lambda: MayBeGivenMore(Scaled())])
def test_modules_that_are_not_the_same_for_every_batch(norm, tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    model.model.layers[1].input_layernorm = norm()
    features = choose_features(model, SelectConfig(features="full"))
    forward = Forward(model, tokenized, 0)
    rows = np.arange(len(tokenized.ids))
    with inference_state(model):
        plan = find_plan(features, forward)
        alone = torch.cat([caught(forward, features, plan, rows[index : index + 1])[0] for index in rows])
        together, _ = caught(forward, features, plan, rows)
        again = torch.cat([caught(forward, features, plan, rows[index : index + 1])[0] for index in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, alone)


def test_embeddings_are_added_up_in_one_order(tokenizer):
    """With more threads than one."""
    table = nn.Embedding(3, WIDTH)
    layer = Embedding("table", table, Slot(0, table.weight.shape))
    ids, gradient = torch.randint(0, 3, (3, 1000)), 1e4 * torch.randn(3, 1000, WIDTH)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [next(layer.gradients(ids, gradient))[1] for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
