"""The output head over a chunk of positions at a time: the same as all logits at once, which are never there."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bpo import SelectConfig, UnsupportedModelError, read_candidates
from bpo.data.tokens import packed_ids, tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.policy import head
from bpo.policy.head import Positions
from bpo.policy.logprobs import Forward, completion_logps, response_logps
from tiny import TINY, hooked, scored_rows, tiny_gpt2, tiny_llama

ROWS_OF_CHUNK = 5


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    """Six responses of 1 to 17 tokens, most longer than a chunk; one has no prompt, some tokens have weights."""
    found = tokenize_responses(read_candidates(scored_rows(2, 3)), tokenizer, 256)[0]
    generator = np.random.default_rng(0)
    lengths = [9, 17, 12, 7, 8, 6]
    ids = [generator.integers(3, len(tokenizer), length).tolist() for length in lengths]
    prompts = np.array([3, 4, 11, 0, 4, 2])
    return dataclasses.replace(
        found,
        ids=packed_ids(ids),
        prompt_lengths=prompts,
        weights=[
            generator.choice([0.0, 0.5, 1.0, 1.7], length - prompt).astype(np.float32)
            for length, prompt in zip(lengths, prompts, strict=True)
        ],
    )


@pytest.fixture
def small_chunks(monkeypatch, tokenizer):
    """Chunks of few rows of the tiny vocabulary, in place of many rows of a real one."""
    monkeypatch.setattr(head, "CPU_CHUNK_BYTES", 4 * len(tokenizer) * ROWS_OF_CHUNK)


class LargestLogits(TorchDispatchMode):
    """Notes how many rows the largest new tensor of so many columns has."""

    def __init__(self, model, columns):
        super().__init__()
        self.rows = 0
        self._columns = columns
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[-1] != self._columns:
                continue
            # Weights, and their gradients, have as many columns when they are transposed.
            of_weight = leaf.untyped_storage().data_ptr() in self._weights or leaf.shape[:-1] == (TINY["hidden_size"],)
            if not of_weight:
                self.rows = max(self.rows, leaf.shape[:-1].numel())
        return out


def of(name, tokenizer, **changes):
    torch.manual_seed(0)
    settings = {**TINY, "initializer_range": 0.2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 2, **changes}
    config = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def with_adapter_on_head(tokenizer):
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def with_head_to_save(tokenizer):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return get_peft_model(tiny_llama(tokenizer), config).eval()


MODELS = {
    "Llama": tiny_llama,
    "Qwen2, tied": lambda tokenizer: of("Qwen2", tokenizer, tie_word_embeddings=True),
    "Gemma2, soft-capped": lambda tokenizer: of("Gemma2", tokenizer, head_dim=8, final_logit_softcapping=2.0),
    "Cohere, scaled": lambda tokenizer: of("Cohere", tokenizer, logit_scale=0.25),
    "Granite, divided": lambda tokenizer: of("Granite", tokenizer, logits_scaling=3.0),
    "GPT-2": tiny_gpt2,
    "LoRA on the head": with_adapter_on_head,
    "modules_to_save": with_head_to_save,
}


def wanted(model, tokenized, rows):
    """Differentiable log π from all logits of each response, weighted."""
    logps = []
    for row in rows:
        ids = torch.tensor(tokenized.ids[row])
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        prompt = int(tokenized.prompt_lengths[row])
        weights = torch.from_numpy(tokenized.weights[row])[int(prompt == 0) :]
        logps.append((scores[max(prompt - 1, 0) :] * weights).sum())
    return torch.stack(logps)


def gradients(model, logps):
    """By parameter, of a sum in which each response counts differently."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
    found = torch.autograd.grad((logps * factors).sum(), parameters.values(), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


def assert_as_wanted(model, tokenized, rows):
    found, truth = completion_logps(model, tokenized, rows, 0).logps, wanted(model, tokenized, rows)
    torch.testing.assert_close(found, truth.float(), rtol=1e-5, atol=1e-5)
    found, truth = gradients(model, found), gradients(model, truth)
    assert found.keys() == truth.keys()
    largest = max(float(gradient.norm()) for gradient in truth.values())
    for name, gradient in truth.items():
        error = float((found[name] - gradient).norm())
        assert error <= 1e-5 * float(gradient.norm()) + 1e-6 * largest, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_chunks_are_the_same_as_all_logits(name, dtype, tokenizer, tokenized, small_chunks):
    model = MODELS[name](tokenizer).to(dtype)
    rows = np.arange(len(tokenized.ids))
    assert_as_wanted(model, tokenized, rows)
    assert_as_wanted(model, tokenized, rows[:1])
    for parameter in model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)  # the head runs once
    assert_as_wanted(model, tokenized, rows)
    with LargestLogits(model, len(tokenizer)) as largest:
        completion_logps(model, tokenized, rows, 0).logps.sum().backward()
    assert largest.rows == ROWS_OF_CHUNK


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_chunk_are_all_there_is(name, tokenizer, tokenized, small_chunks):
    """Without gradients, with those of the head as well, and while per-sample gradients are caught."""
    model = MODELS[name](tokenizer)
    rows = np.arange(len(tokenized.ids))
    config = SelectConfig() if hasattr(model, "peft_config") else SelectConfig(features="full", factor_dim=8)
    features = choose_features(model, config)
    with LargestLogits(model, len(tokenizer)) as largest:
        response_logps(Forward(model, tokenized, 0))
        completion_logps(model, tokenized, rows, 0).logps.sum().backward()
        hooked(model, features, tokenized, rows)
    assert largest.rows == ROWS_OF_CHUNK


@pytest.mark.parametrize("factor_dim", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_each_response_by_chunks(name, factor_dim, tokenizer, tokenized, small_chunks):
    model = MODELS[name](tokenizer)
    trained = hasattr(model, "peft_config")
    features = choose_features(
        model, SelectConfig() if trained else SelectConfig(features="full", factor_dim=factor_dim)
    )
    rows = np.arange(len(tokenized.ids))
    found, logps = hooked(model, features, tokenized, rows)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    truth = wanted(model, tokenized, rows)
    np.testing.assert_allclose(logps, truth.detach(), rtol=1e-5, atol=1e-5)
    parameters = [model.get_parameter(name) for name in features.slots]
    for row in rows:
        exact = torch.autograd.grad(truth[row], parameters, retain_graph=True)
        flat = torch.cat([s.keep(g)[0] for s, g in zip(features.slots.values(), exact, strict=True)])
        for slot in features.slots.values():
            part = slice(slot.offset, slot.offset + slot.size)
            assert (found[row, part] - flat[part]).norm() <= 1e-4 * flat[part].norm() + 2e-6 * flat.norm()


def test_the_head_runs_again_only_where_that_is_needed(tokenizer, tokenized, small_chunks):
    model = tiny_llama(tokenizer)
    rows = np.arange(len(tokenized.ids))
    calls = []
    run = model.lm_head.forward
    model.lm_head.forward = lambda hidden: calls.append(hidden.shape[1]) or run(hidden)
    completion_logps(model, tokenized, rows, 0)  # finds out what comes after the head
    n_predicting = len(Positions.of(head_positions(tokenized, rows)).index)
    for trained, times in ((True, 2), (False, 1)):
        model.lm_head.requires_grad_(trained)
        calls.clear()
        completion_logps(model, tokenized, rows, 0).logps.sum().backward()
        assert sum(calls) == 1 + times * n_predicting


def head_positions(tokenized, rows):
    from bpo.policy.logprobs import predicting_positions

    return predicting_positions(tokenized, rows)


def test_chunks_keep_responses_whole_where_they_fit():
    counts = np.array([2, 3, 0, 1, 9, 4, 5, 0])
    predicting = torch.arange(10) < torch.from_numpy(counts)[:, None]
    chunks = list(Positions.of(predicting).chunks(6))
    assert [(c.samples.start, c.samples.stop, c.rows.stop - c.rows.start) for c in chunks] == [
        (0, 2, 5),
        (2, 4, 1),
        (4, 5, 5),
        (4, 5, 4),
        (5, 6, 4),
        (6, 7, 5),
    ]
    assert [c.rows.start for c in chunks[1:]] == [c.rows.stop for c in chunks[:-1]]
    assert Positions.of(predicting).cuts(10) == [slice(0, 8), slice(8, 16), slice(16, 24)]
    first = chunks[0].by_sample(torch.arange(1.0, 6.0)[None, :, None])
    assert first[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert [c.rows.stop - c.rows.start for c in Positions.of(predicting).chunks(1)] == [1] * 24


# Where all logits are needed.


class Odd(transformers.LlamaForCausalLM):
    """What its subclasses do to logits is known nowhere."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutput(logits=self.predict(hidden))


class Banned(Odd):
    def predict(self, hidden):
        return self.lm_head(hidden) - torch.arange(self.config.vocab_size) / 100


class Sharpened(Odd):
    def predict(self, hidden):
        return self.lm_head(hidden) * 1.7


class ByKeyword(Odd):
    def predict(self, hidden):
        return self.lm_head(input=hidden)


class Functional(Odd):
    def predict(self, hidden):
        return nn.functional.linear(hidden, self.lm_head.weight)


class TwiceOver(Odd):
    def predict(self, hidden):
        return self.lm_head(hidden) + self.lm_head(hidden.flip(-1))


class Flat(Odd):
    def predict(self, hidden):
        return self.lm_head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


class Doubled(Odd):
    def predict(self, hidden):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.lm_head(hidden).float()


@pytest.mark.parametrize("kind", [Banned, Sharpened, ByKeyword, Functional, TwiceOver, Flat, Doubled])
def test_what_is_not_known_takes_all_logits(kind, tokenizer, tokenized, small_chunks):
    model = tiny_llama(tokenizer)
    model.__class__ = kind
    rows = np.arange(len(tokenized.ids))
    for _ in range(2):
        found, truth = completion_logps(model, tokenized, rows, 0).logps, wanted(model, tokenized, rows)
        close = 0.02 if kind is Doubled else 1e-5
        torch.testing.assert_close(found, truth, rtol=close, atol=close)
        found, truth = gradients(model, found), gradients(model, truth)
        for name, gradient in truth.items():
            assert (found[name] - gradient).norm() <= close * (1 + gradient.norm()), name
    with LargestLogits(model, len(tokenizer)) as largest, torch.no_grad():
        completion_logps(model, tokenized, rows, 0)
    assert largest.rows > ROWS_OF_CHUNK


def test_a_changed_configuration_is_found_out_anew(tokenizer, tokenized, small_chunks):
    model = of("Gemma2", tokenizer, head_dim=8, final_logit_softcapping=2.0)
    rows = np.arange(len(tokenized.ids))
    assert_as_wanted(model, tokenized, rows)
    model.config.final_logit_softcapping = 0.5
    assert_as_wanted(model, tokenized, rows)
    model.config.final_logit_softcapping = None
    assert_as_wanted(model, tokenized, rows)


def test_embeddings_of_a_model_that_takes_all_logits(tokenizer, tokenized, small_chunks):
    """The model runs a second time when that is found out, which is nobody's concern."""
    model = tiny_llama(tokenizer)
    model.__class__ = Banned
    features = choose_features(model, SelectConfig(features="embeddings"))
    found, logps = hooked(model, features, tokenized, np.arange(len(tokenized.ids)))
    np.testing.assert_allclose(logps, wanted(model, tokenized, range(len(logps))).detach(), rtol=1e-5, atol=1e-5)
    assert found.shape == (len(tokenized.ids), 32)


def test_one_predicted_token(tokenizer, tokenized, small_chunks):
    assert_as_wanted(tiny_llama(tokenizer), tokenized, np.array([2]))


def test_low_precision_is_that_of_the_model(tokenizer, tokenized, small_chunks):
    model = tiny_llama(tokenizer).to(torch.bfloat16)
    rows = np.arange(len(tokenized.ids))
    found, truth = completion_logps(model, tokenized, rows, 0).logps, wanted(model.float(), tokenized, rows)
    torch.testing.assert_close(found, truth, rtol=0.05, atol=0.5)


def sharper(model, factor):
    plain = model.forward

    def forward(*args, **kwargs):
        found = plain(*args, **kwargs)
        found.logits = factor * found.logits
        return found

    model.forward = forward


def test_every_run_looks_at_the_model_anew(tokenizer, tokenized, small_chunks):
    """What was found out before does not hold: its code, its type, or a number that is in no configuration."""
    model = of("Cohere", tokenizer, logit_scale=0.25).to(torch.bfloat16)
    rows = np.arange(len(tokenized.ids))

    def check():
        found = response_logps(Forward(model, tokenized, 0))
        np.testing.assert_allclose(found, wanted(model, tokenized, rows).detach().float(), rtol=1e-5, atol=1e-4)
        return found

    rounded = response_logps(Forward(model, tokenized, 0))
    model.float()
    full = check()
    assert not np.array_equal(rounded, full)
    model.logit_scale = 1.0
    assert not np.allclose(check(), full)
    for factor in (0.5, 2.0):
        sharper(model, factor)
        check()
        del model.forward


@pytest.mark.parametrize("bound", [10.0, 300.0])
def test_a_bound_is_seen_wherever_it_is(bound, tokenizer, tokenized, small_chunks):
    model = tiny_llama(tokenizer)
    model.lm_head.weight.data *= 100
    plain = model.forward

    def bounded(*args, **kwargs):
        found = plain(*args, **kwargs)
        found.logits = found.logits.clamp(-bound, bound)
        return found

    model.forward = bounded
    assert_as_wanted(model, tokenized, np.arange(len(tokenized.ids)))


def test_logits_of_more_tokens_than_were_given_are_refused(tokenizer, tokenized):
    settings = PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(tokenizer), settings).eval()
    with pytest.raises(UnsupportedModelError, match=r"logits of shape \(6, 22, \d+\) for 6 sequences of 17 tokens"):
        completion_logps(model, tokenized, np.arange(len(tokenized.ids)), 0)


def test_no_responses_have_no_log_probabilities(tokenizer, tokenized):
    assert response_logps(Forward(tiny_llama(tokenizer), tokenized.take(np.arange(0)), 0)).shape == (0,)
