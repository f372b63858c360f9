"""Embeddings of responses in place of gradients, against hidden states taken one response at a time."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import bpo
from bpo import SelectConfig, UnsupportedModelError, _core, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.gradients.response_embeddings import ResponseEmbeddings
from bpo.policy.logprobs import Forward, response_logps
from tiny import hooked, scored_rows, stored, tiny_gpt2, tiny_llama

ROWS = scored_rows(4, 4)


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return tokenize_responses(read_candidates(ROWS), tokenizer, 256)[0]


def expected(model, tokenized, row, autocast=False):
    """From all hidden states of one response: the mean over the positions whose logits its tokens are drawn from."""
    ids = torch.tensor(tokenized.ids[row])[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].float()
    start = int(tokenized.prompt_lengths[row])
    return hidden[max(start, 1) - 1 : len(ids[0]) - 1].mean(dim=0)


def trained_adapter(tokenizer):
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, trained_adapter])
def test_they_are_the_mean_of_the_last_hidden_states_of_the_response(tokenizer, tokenized, make):
    model = make(tokenizer)
    features = choose_features(model, SelectConfig(features="embeddings"))
    assert isinstance(features, ResponseEmbeddings)
    rows = np.arange(len(tokenized.ids))
    embeddings, logps = hooked(model, features, tokenized, rows)
    assert not any(module._forward_hooks for module in model.modules())
    model.eval()
    for row in rows:
        np.testing.assert_allclose(embeddings[row], expected(model, tokenized, row), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logps, response_logps(Forward(model, tokenized, 0)), rtol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_store_holds_their_sketches(tokenizer, tokenized, bf16):
    model = tiny_llama(tokenizer)
    store = stored(model, ROWS, tokenizer, features="embeddings", bf16=bf16)
    assert store.fingerprint["features"] == {"kind": "mean last hidden state", "seed": 0}
    rows = store.rows_of(tokenized.sequence_ids)
    exact = np.stack([expected(model, tokenized, row, autocast=bf16) for row in range(len(rows))])
    sketches = _core.Sketcher(64, seed=0).sketch(exact)
    errors = np.linalg.norm(store.sketches(rows) - sketches, axis=1) / np.linalg.norm(sketches, axis=1)
    assert errors.max() < (0.02 if bf16 else 1e-5)
    # A sketch of more numbers than an embedding has loses nothing.
    np.testing.assert_allclose(np.linalg.norm(sketches, axis=1), np.linalg.norm(exact, axis=1), rtol=1e-5)
    gradients = stored(model, ROWS, tokenizer, bf16=bf16)
    np.testing.assert_allclose(store.records["logp"], gradients.records["logp"], rtol=1e-2 if bf16 else 1e-5)
    np.testing.assert_array_equal(store.records["response_id"], gradients.records["response_id"])
    np.testing.assert_array_equal(store.records["score"], gradients.records["score"])


def test_no_backward_runs_and_batches_that_do_not_fit_are_halved(tokenizer):
    model = tiny_llama(tokenizer)
    expected = stored(model, ROWS, tokenizer, features="embeddings", tokens_per_batch=4096)
    sizes = []

    def scarce(_, args, kwargs):
        assert not torch.is_grad_enabled()
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 3:
            torch.empty(1 << 60, dtype=torch.uint8)

    model.register_forward_pre_hook(scarce, with_kwargs=True)
    with pytest.warns(UserWarning, match="Memory does not suffice for 16 sequences of .* going on with 8"):
        store = stored(model, ROWS, tokenizer, features="embeddings", tokens_per_batch=4096)
    assert max(sizes[sizes.index(16) + 3 :]) <= 3
    np.testing.assert_allclose(store.sketches(), expected.sketches(), rtol=1e-4, atol=1e-5)


def test_it_goes_on_where_it_was_and_is_no_store_of_gradients(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    first = stored(model, ROWS[:2], tokenizer, tmp_path / "store", features="embeddings")
    grown = stored(model, ROWS, tokenizer, tmp_path / "store", features="embeddings")
    assert (len(first), len(grown)) == (8, 16)
    np.testing.assert_array_equal(grown.sketches(np.arange(8)), first.sketches())
    with pytest.raises(bpo.StoreMismatchError, match=r"mean last hidden state.* there, .*fresh LoRA B.* here"):
        stored(model, ROWS, tokenizer, tmp_path / "store")


@pytest.mark.parametrize("strategy", ["bpo", "d_optimal", "coreset"])
def test_selecting_and_selecting_again_without_the_model(tokenizer, tmp_path, strategy):
    arguments = {"budget": 9, "strategy": strategy, "store": tmp_path / "store", "progress": False}
    config = {"features": "embeddings", "sketch_dim": 64, "sketch_dtype": "float32"}
    selection = bpo.select(tiny_llama(tokenizer), ROWS, processing_class=tokenizer, config=config, **arguments)
    for again in (None, {"features": "embeddings"}, config):
        found = bpo.select(None, ROWS, config=again, **arguments)
        assert found.config["features"] == "embeddings"
        assert found.dataset["bpo_pair"][:] == selection.dataset["bpo_pair"][:]


def test_a_pair_is_the_difference_of_its_embeddings_where_the_policy_is_its_own_reference(tokenizer, tmp_path):
    store = stored(tiny_llama(tokenizer), ROWS, tokenizer, tmp_path / "store", features="embeddings")
    selection = bpo.select(None, ROWS, budget=9, store=tmp_path / "store", progress=False)
    candidates = read_candidates(ROWS)
    h = store.sketches(store.rows_of_responses(candidates.response_ids)[0])[candidates.pairs]
    # DPO's a = −β/2 and b = β/2.
    lengths = 0.05 * np.linalg.norm(h[:, 0] - h[:, 1], axis=1)
    np.testing.assert_allclose(selection.pairs["informativeness"].to_numpy(), lengths, rtol=1e-4)


def test_a_store_of_the_other_kind_is_refused_without_the_model(tokenizer, tmp_path):
    model = tiny_llama(tokenizer)
    stored(model, ROWS, tokenizer, tmp_path / "gradients")
    stored(model, ROWS, tokenizer, tmp_path / "embeddings", features="embeddings")
    for name, features, message in (
        ("gradients", "embeddings", r"holds gradients \(fresh LoRA B\), and config asks for features='embeddings'"),
        ("embeddings", "full", "was made with features='embeddings', and config asks for 'full'"),
    ):
        with pytest.raises(bpo.StoreMismatchError, match=message):
            bpo.select(None, ROWS, budget=9, store=tmp_path / name, config={"features": features}, progress=False)


@pytest.mark.parametrize(
    "setting",
    [{"parameters": "*.mlp.*"}, {"factor_dim": 8}, {"preconditioner": "optimizer.pt"}, {"checkpoints": {"a": 1e-4}}],
)
def test_settings_of_gradients_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=rf"SelectConfig.{next(iter(setting))} is a setting of gradients"):
        SelectConfig(features="embeddings", **setting)


def test_models_whose_embeddings_cannot_be_had_are_refused(tokenizer, tokenized):
    prompt_tuning = get_peft_model(
        tiny_llama(tokenizer), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(UnsupportedModelError, match="puts tokens in front of the prompt"):
        choose_features(prompt_tuning, SelectConfig(features="embeddings"))
    headless = tiny_llama(tokenizer)
    headless.base_model_prefix = "nothing"
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no decoder apart from its output head"):
        choose_features(headless, SelectConfig(features="embeddings"))
    # Centred on the batch.
    model = tiny_llama(tokenizer)
    model.model.register_forward_hook(
        lambda _, __, output: type(output)(last_hidden_state=output[0] - output[0].mean(dim=0, keepdim=True))
    )
    with pytest.raises(UnsupportedModelError, match="responses of one batch act on one another"):
        hooked(model, choose_features(model, SelectConfig(features="embeddings")), tokenized, np.arange(2))


def test_the_doctor_calls_them_by_their_name(tokenizer):
    found = bpo.doctor(
        tiny_llama(tokenizer), ROWS, processing_class=tokenizer, config={"features": "embeddings", "sketch_dim": 64}
    )
    assert found.coordinates == 32 and found.problems == []
    assert found.batch_sensitivity < 1e-5 and found.looked_at > 0
    assert "embeddings mean last hidden state: 32 coordinates a response" in str(found)
    assert "gradient" not in str(found)
