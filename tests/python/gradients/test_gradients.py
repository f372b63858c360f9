"""Per-sample gradients against autograd, one sample at a time."""

import gc

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

from bpo import SelectConfig, UnsupportedModelError, _core, collect_gradients, pair_coefficients, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.gradients.parameters import FreshAdapter, Parameters
from bpo.policy.logprobs import Forward, completion_logps, response_logps
from tiny import TINY, hooked, scored_rows, tiny_gpt2, tiny_llama


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_responses(read_candidates(scored_rows(3, 4)), tokenizer, 256)[0]


def autograd(model, names, tokenized, row):
    parameters = [parameter for name, parameter in model.named_parameters() if name in set(names)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    logp = completion_logps(model, tokenized, np.array([row]), 0).logps
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(logp.sum(), parameters)])


def relative_error(left, right):
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, lambda t: tiny_llama(t, tie_word_embeddings=True)])
def test_full_parameters(tokenizer, tokenized, make):
    model = make(tokenizer)
    features = choose_features(model, SelectConfig(features="full"))
    assert features.dim == sum(parameter.numel() for parameter in model.parameters())
    rows = np.arange(len(tokenized.ids))
    gradients, _ = hooked(model, features, tokenized, rows)
    for row in rows:
        assert relative_error(gradients[row], autograd(model, features.slots, tokenized, row)) < 1e-5


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_fresh_adapter_equals_the_b_gradients_of_pefts(tokenizer, tokenized, make):
    model = make(tokenizer)
    features = FreshAdapter(model, rank=4, seed=0)
    rows = np.arange(len(tokenized.ids))
    gradients, logps = hooked(model, features, tokenized, rows)

    # PEFT's adapter on the same layers, with the same A.
    config = LoraConfig(r=4, lora_alpha=4, target_modules=[layer.name for layer in features.layers])
    wrapped = get_peft_model(model, config)
    names = []
    for layer in features.layers:
        prefix = f"base_model.model.{layer.name}"
        wrapped.get_parameter(f"{prefix}.lora_A.default.weight").data.copy_(layer.weight.right)
        names.append(f"{prefix}.lora_B.default.weight")
    wrapped.eval()
    for row in rows:
        assert relative_error(gradients[row], autograd(wrapped, names, tokenized, row)) < 1e-5
    np.testing.assert_allclose(logps, response_logps(Forward(wrapped, tokenized, 0)), rtol=1e-5)


def test_trained_adapter_gives_a_and_b_and_a_fresh_one_only_b(tokenizer, tokenized):
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    fresh = choose_features(model, SelectConfig())
    assert all(".lora_B." in name for name in fresh.slots)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    features = choose_features(model, SelectConfig())
    assert features.dim == sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = np.array([0, 5, 7])
    gradients, _ = hooked(model, features, tokenized, rows)
    model.eval()
    for index, row in enumerate(rows):
        assert relative_error(gradients[index], autograd(model, features.slots, tokenized, row)) < 1e-5


def test_batch_size_order_and_padding_do_not_matter(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    features = FreshAdapter(model, rank=4, seed=0)
    together, _ = hooked(model, features, tokenized, np.arange(12))
    shuffled, _ = hooked(model, features, tokenized, np.arange(12)[::-1].copy())
    for row in range(12):
        alone, _ = hooked(model, features, tokenized, np.array([row]), pad_id=5)
        assert relative_error(together[row], alone[0]) < 1e-5
        assert relative_error(shuffled[11 - row], alone[0]) < 1e-5


def test_the_model_is_left_as_it_was(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    model.train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    hooked(model, FreshAdapter(model, 4, 0), tokenized, np.arange(3))
    assert model.training and model.model.layers[0].training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert not any(module._forward_hooks for module in model.modules())


def test_pair_gradient_of_sketches_is_the_sketch_of_the_dpo_gradient(tokenizer, tokenized):
    """a·h_w + b·h_l equals the sketch of autograd through DPO's loss, for a policy that is not its own reference."""
    model, beta = tiny_llama(tokenizer), 0.3
    features = choose_features(model, SelectConfig(features="full"))
    names = list(features.slots)
    gradients, logps = hooked(model, features, tokenized, np.arange(12))
    reference = logps.numpy() + np.random.default_rng(0).normal(size=12).astype(np.float32)
    pairs = np.array([[0, 1], [5, 4], [8, 11]])
    weights = pair_coefficients(logps.numpy(), reference, pairs, config={"beta": beta})
    sketcher = _core.Sketcher(256, seed=3)
    rows = sketcher.sketch(gradients.numpy())
    parameters = [parameter for name, parameter in model.named_parameters() if name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    for (chosen, rejected), (a, b) in zip(pairs, weights, strict=True):
        both = completion_logps(model, tokenized, np.array([chosen, rejected]), 0).logps
        ratios = both - torch.tensor(reference[[chosen, rejected]])
        loss = -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))
        exact = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
        expected = torch.tensor(sketcher.sketch(exact[None].numpy())[0])
        assert relative_error(torch.tensor(a * rows[chosen] + b * rows[rejected]), expected) < 1e-4


def test_store_holds_what_was_asked_and_a_second_call_computes_nothing(tokenizer, tmp_path, capsys):
    model = tiny_llama(tokenizer)
    data, config = scored_rows(4, 3), SelectConfig(sketch_dim=64)
    arguments = {"processing_class": tokenizer, "config": config, "progress": False, "store": tmp_path / "store"}
    first = collect_gradients(model, data[:2], **arguments)
    assert len(first) == 6 and first.sketches().shape == (6, 64)
    grown = collect_gradients(model, data, **{**arguments, "progress": True})
    assert "Gradients (6 of 12 responses are there):" in capsys.readouterr().err
    assert len(grown) == 12
    np.testing.assert_array_equal(grown.sketches()[:6], first.sketches())
    assert len(grown.verify()) == 0

    def refuse(*_, **__):
        raise AssertionError("the model ran")

    model.forward = refuse
    again = collect_gradients(model, data, **arguments)
    np.testing.assert_array_equal(again.sketches(), grown.sketches())


def test_two_batch_sizes_give_the_same_rows_in_the_same_order(tokenizer):
    model, data = tiny_llama(tokenizer), scored_rows(4, 4)
    stores = [
        collect_gradients(
            model,
            data,
            processing_class=tokenizer,
            config=SelectConfig(sketch_dim=128, sketch_dtype="float32", tokens_per_batch=tokens, threads=threads),
            progress=False,
        )
        for tokens, threads in ((1, 1), (300, 2))
    ]
    np.testing.assert_array_equal(stores[0].records["response_id"], stores[1].records["response_id"])
    np.testing.assert_allclose(
        stores[0].sketches(), stores[1].sketches(), rtol=1e-4, atol=1e-5 * np.abs(stores[0].sketches()).max()
    )


def test_nan_and_zero_gradients_are_flagged(tokenizer):
    model = tiny_llama(tokenizer)
    model.lm_head.weight.data.zero_()
    store = collect_gradients(
        model, scored_rows(1, 3), processing_class=tokenizer, config=SelectConfig(sketch_dim=32), progress=False
    )
    assert (store.records["flags"] == 2).all()
    model.lm_head.weight.data.fill_(float("nan"))
    store = collect_gradients(
        model, scored_rows(1, 3), processing_class=tokenizer, config=SelectConfig(sketch_dim=32), progress=False
    )
    assert (store.records["flags"] & 1).all()
    assert not store.sketches().any()


def test_parameters_used_outside_their_module_take_the_whole_model(tokenizer, tokenized):
    """The self-check notices gradients that the hooks cannot see, and they are had in the slow way."""

    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(32))

        def forward(self, x):
            return x * self.weight

    model = tiny_llama(tokenizer)
    model.model.norm = Scale()
    inner = model.model.forward

    def forward(*args, **kwargs):
        output = inner(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * model.model.norm.weight
        return output

    model.model.forward = forward
    features = choose_features(model, SelectConfig(features="full"))
    with pytest.warns(UserWarning, match=r"of 1 parameters, such as model\.norm\.weight, take .* the whole model"):
        gradients, _ = hooked(model, features, tokenized, np.array([0, 5]))
    for index, row in enumerate([0, 5]):
        assert relative_error(gradients[index], autograd(model, features.slots, tokenized, row)) < 1e-5


def test_responses_that_act_on_one_another_are_refused(tokenizer, tokenized):
    model = tiny_llama(tokenizer)
    layer = model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda x: inner(x) - x.mean(dim=0, keepdim=True)  # as a batch norm in training would
    with pytest.raises(UnsupportedModelError, match="responses of one batch act on one another"):
        hooked(model, FreshAdapter(model, 4, 0), tokenized, np.array([0, 5]))


def test_reference_model_changes_the_log_ratios_only(tokenizer):
    model, other = tiny_llama(tokenizer), tiny_llama(tokenizer)
    other.lm_head.weight.data.mul_(0.9)
    stores = [
        collect_gradients(
            model,
            scored_rows(2, 3),
            processing_class=tokenizer,
            config=SelectConfig(sketch_dim=32, ref_model=reference),
            progress=False,
        )
        for reference in (None, other)
    ]
    np.testing.assert_array_equal(stores[0].sketches(), stores[1].sketches())
    np.testing.assert_array_equal(stores[0].records["logp"], stores[0].records["ref_logp"])
    candidates = read_candidates(scored_rows(2, 3))
    tokenized = tokenize_responses(candidates, tokenizer, 256)[0]
    expected = response_logps(Forward(other, tokenized, 0))[_order(stores[1], candidates)]
    np.testing.assert_allclose(stores[1].records["ref_logp"], expected, rtol=1e-5)


def _order(store, candidates):
    """For each row of a store, the index of its response."""
    return np.argsort(store.rows_of(candidates.response_ids))


def test_scaled_embeddings_are_exact(tokenizer, tokenized):
    """Gemma multiplies its embeddings: a subclass that must not be taken for a plain lookup."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), head_dim=8, initializer_range=0.2, **TINY)).eval()
    features = choose_features(model, SelectConfig(features="full"))
    gradients, _ = hooked(model, features, tokenized, np.array([0, 5]))
    for index, row in enumerate([0, 5]):
        assert relative_error(gradients[index], autograd(model, features.slots, tokenized, row)) < 1e-5


def test_weights_that_no_adapter_reaches_are_pointed_out(tokenizer):
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(0.1 * torch.randn(32, 64))

        def forward(self, x):
            return x @ self.weight @ self.weight.T

    model = tiny_llama(tokenizer)
    model.model.layers[0].mlp = Product()
    with pytest.warns(UserWarning, match=r"\d+% of the weights .* such as model\.layers\.0\.mlp\.weight"):
        collect_gradients(model, scored_rows(1, 2), processing_class=tokenizer, progress=False)


def test_a_merged_or_disabled_adapter_is_refused(tokenizer):
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(UnsupportedModelError, match="merged or disabled"):
        choose_features(model, SelectConfig())


def test_an_adapter_inside_a_plain_model_is_refused(tokenizer):
    model = tiny_llama(tokenizer)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    with pytest.raises(UnsupportedModelError, match="without being a PeftModel"):
        choose_features(model, SelectConfig())


def test_a_tokenizer_of_another_model_is_refused(tokenizer):
    model = tiny_llama(tokenizer, vocab_size=50)
    with pytest.raises(ValueError, match=r"token \d+, but LlamaForCausalLM has embeddings for 50 tokens only"):
        collect_gradients(model, scored_rows(1, 2), processing_class=tokenizer, progress=False)


def test_a_temporary_store_goes_with_its_object(tokenizer):
    model = tiny_llama(tokenizer)
    store = collect_gradients(model, scored_rows(1, 2), processing_class=tokenizer, progress=False)
    path = store.path
    assert path.exists()
    del store
    gc.collect()
    assert not path.exists()


def test_parameters_names_every_slot_once(tokenizer):
    model = tiny_llama(tokenizer, tie_word_embeddings=True)
    features = Parameters(model, [name for name, _ in model.named_parameters()])
    assert len({slot.offset for slot in features.slots.values()}) == len(features.slots)
    tied = features.slots["model.embed_tokens.weight"]
    assert [layer.name for layer in features.layers if layer.weight is tied] == ["model.embed_tokens", "lm_head"]
