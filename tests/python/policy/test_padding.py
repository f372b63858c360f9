"""What fills a batch changes nothing: a pad token without an embedding, none at all, padding at the left."""

import copy

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import bpo
from bpo.data.tokens import tokenize_responses
from bpo.policy.logprobs import Forward, response_logps
from tiny import TINY, scored_rows, stored, tiny_llama

ROWS = scored_rows(3, 3)
PROMPTS = ["one", "two three four five", "red", "green blue red two one three", ""]


def pad_beyond(tokenizer):
    """With a pad token that was added to the tokenizer alone."""
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"pad_token": "[PAD]"})
    return changed


def pad_less(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = None
    return changed


def sample(model, tokenizer, prompts=PROMPTS, **changes):
    settings = {"max_new_tokens": 6, "keep": ["truncated"], "progress": False, **changes}
    rows = bpo.sample_responses(model, prompts, 3, processing_class=tokenizer, **settings)
    return {row["prompt"]: row["responses"] for row in rows}


@pytest.mark.parametrize("change", [pad_beyond, pad_less])
def test_the_pad_token_does_not_matter(change, tokenizer):
    model = tiny_llama(tokenizer)
    other = change(tokenizer)
    assert (other.pad_token_id or 0) >= model.get_input_embeddings().num_embeddings or other.pad_token_id is None
    for run in (
        lambda given: stored(model, ROWS, given, tokens_per_batch=200).sketches(),
        lambda given: stored(model, ROWS, given, tokens_per_batch=200, features="full").sketches(),
        lambda given: bpo.evaluate_preferences(model, ROWS, processing_class=given, progress=False).logps,
        lambda given: (
            bpo.select(
                model, ROWS, budget=2, breadth=2, processing_class=given, config={"sketch_dim": 64}, progress=False
            )
            .pairs["fate"]
            .to_numpy(zero_copy_only=False)
        ),
    ):
        np.testing.assert_array_equal(run(tokenizer), run(other))
    assert not bpo.doctor(model, ROWS, processing_class=other, config={"sketch_dim": 64}).problems
    with_prompts = [prompt for prompt in PROMPTS if prompt]
    assert sample(model, other, with_prompts) == sample(model, tokenizer, with_prompts)


def test_a_reference_without_the_policys_pad_token_is_padded_too(tokenizer):
    larger = pad_beyond(tokenizer)
    policy = tiny_llama(tokenizer)
    policy.resize_token_embeddings(len(larger))
    reference = tiny_llama(tokenizer, initializer_range=0.21)
    records = stored(policy, ROWS, larger, ref_model=reference, tokens_per_batch=200).records
    wanted = stored(tiny_llama(tokenizer), ROWS, tokenizer, ref_model=reference, tokens_per_batch=200).records
    np.testing.assert_array_equal(records["ref_logp"], wanted["ref_logp"])


def test_a_tokenizer_of_a_larger_model_is_refused_by_its_tokens(tokenizer):
    model = tiny_llama(tokenizer, vocab_size=200, pad_token_id=0)
    with pytest.raises(ValueError, match=r"The tokenizer gives token \d+, but LlamaForCausalLM has embeddings for 200"):
        stored(model, ROWS, tokenizer)
    with pytest.raises(ValueError, match=r"The tokenizer gives token \d+, but LlamaForCausalLM has embeddings for 200"):
        bpo.evaluate_preferences(model, ROWS, processing_class=tokenizer, progress=False)
    with pytest.raises(ValueError, match=r"The tokenizer gives token \d+, but LlamaForCausalLM has embeddings for 200"):
        sample(model, tokenizer)


@pytest.mark.parametrize("pad", ["known", "beyond", None])
def test_rewards_are_those_of_each_sequence_alone(pad, tokenizer):
    torch.manual_seed(0)
    number = {"known": 0, "beyond": len(tokenizer) + 3, None: None}[pad]
    config = LlamaConfig(vocab_size=len(tokenizer), **TINY, num_labels=1, initializer_range=0.3)
    model = LlamaForSequenceClassification(config).eval()
    model.config.pad_token_id = number
    rows = [{"prompt": "one", "responses": [" two three red green", " four", " red blue one two three"]}]
    scored = bpo.score_responses(rows, bpo.RewardModel(model, tokenizer), progress=False)[0]["scores"]
    assert model.config.pad_token_id == number
    for response, score in zip(rows[0]["responses"], scored, strict=True):
        ids = torch.tensor([tokenizer("one" + response + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=ids).logits), abs=1e-5)


def test_rewards_of_sequences_that_use_every_token(tokenizer):
    """No token is left to fill with."""
    config = LlamaConfig(vocab_size=len(tokenizer), **TINY, num_labels=1, initializer_range=0.3)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config).eval()
    sequences = [list(range(len(tokenizer))), [5, 6, 7]]
    logits = bpo.RewardModel(model, tokenizer)._logits(sequences)
    with torch.no_grad():
        alone = [float(model(input_ids=torch.tensor([ids])).logits) for ids in sequences]
    np.testing.assert_allclose(logits, alone, atol=1e-5)


def _rwkv(tokenizer):
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=len(tokenizer), hidden_size=32, attention_hidden_size=32, num_hidden_layers=2)
    )


def _bart(tokenizer):
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    return BartForCausalLM(BartConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=128))


@pytest.mark.parametrize("make", [_rwkv, _bart])
def test_responses_are_those_of_each_prompt_alone(make, tokenizer):
    """One has states that padding at the left goes into, the other positions that it moves."""
    torch.manual_seed(0)
    model = make(tokenizer).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    prompts = [prompt for prompt in PROMPTS if prompt]
    alone = {}
    for prompt in prompts:
        alone |= sample(model, tokenizer, [prompt])
    assert sample(model, tokenizer, prompts, batch_size=12) == alone


def test_a_reward_models_tokens_are_checked(tokenizer):
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=50, **TINY, num_labels=1))
    with pytest.raises(ValueError, match=r"gives token \d+, but LlamaForSequenceClassification has embeddings for 50"):
        bpo.score_responses(
            [{"prompt": "one", "responses": [" two"]}], bpo.RewardModel(model, tokenizer), progress=False
        )


def test_positions_begin_where_the_model_counts_from(tokenizer):
    """RoBERTa leaves those up to that of its pad token out."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    pad_id = len(tokenizer)
    model = RobertaForCausalLM(RobertaConfig(vocab_size=pad_id + 1, pad_token_id=pad_id, is_decoder=True, **sizes))
    model.eval().roberta.embeddings.position_embeddings.weight.data.normal_()
    tokenized = tokenize_responses(bpo.read_candidates(ROWS), tokenizer, 256)[0]
    found = response_logps(Forward(model, tokenized, pad_id))
    for ids, prompt_length, logp in zip(tokenized.ids, tokenized.prompt_lengths, found, strict=True):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            logps = model(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
        np.testing.assert_allclose(logp, float(logps[prompt_length - 1 :].sum()), rtol=1e-4)


class NeedsMask(LlamaForCausalLM):
    """A model that is another one without a mask, or none."""

    refuses = False

    def forward(self, input_ids=None, attention_mask=None, **named):
        if attention_mask is None and self.refuses:
            raise ValueError("Give me a mask.")
        if attention_mask is None:
            input_ids = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **named)


def masks_given(model, run):
    """Whether each call of a model was given a mask; only those of batches with padding count."""
    given = []

    def note(_, args, kwargs):
        if kwargs["input_ids"].shape[0] > 2:
            given.append("attention_mask" in kwargs)

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    run()
    handle.remove()
    return given


@pytest.mark.parametrize("features", ["lora", "embeddings"])
def test_causal_attention_runs_without_a_mask(features, tokenizer):
    model = tiny_llama(tokenizer)
    given = masks_given(model, lambda: stored(model, ROWS, tokenizer, tokens_per_batch=200, features=features))
    assert given
    assert not any(given)
    eager = tiny_llama(tokenizer)
    eager.set_attn_implementation("eager")
    given = masks_given(eager, lambda: stored(eager, ROWS, tokenizer, tokens_per_batch=200, features=features))
    assert given
    assert all(given)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_model_that_needs_its_mask_has_it(refuses, tokenizer):
    plain = tiny_llama(tokenizer)
    model = NeedsMask(plain.config)
    model.load_state_dict(plain.state_dict())
    model.refuses = refuses
    expected = stored(plain, ROWS, tokenizer, tokens_per_batch=200, sketch_dtype="float32").sketches()
    found = []
    given = masks_given(
        model,
        lambda: found.append(stored(model, ROWS, tokenizer, tokens_per_batch=200, sketch_dtype="float32").sketches()),
    )
    assert all(given)
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-5)
