"""What is no whole causal language model is refused in a sentence, as an object and by path, before it runs."""

import re

import pytest
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    XLMConfig,
    XLMWithLMHeadModel,
)

import bpo
from tiny import TINY, scored_rows, stored, tiny_llama

ROWS = scored_rows(3, 3)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BART = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 48))}


def _of(name, config, **settings):
    return lambda vocabulary: getattr(transformers, name)(config(vocab_size=vocabulary, **settings))


NO_POLICIES = {
    "BertForMaskedLM": (_of("BertForMaskedLM", BertConfig, **SIZES), "its head is for MaskedLM"),
    "BertLMHeadModel": (_of("BertLMHeadModel", BertConfig, **SIZES), r"is an encoder.* \(is_decoder=False\)"),
    "BertModel": (_of("BertModel", BertConfig, **SIZES), "is an encoder"),
    "LlamaModel": (_of("LlamaModel", LlamaConfig, **TINY), "hidden states and no distribution|for lm_head.weight"),
    "LlamaForSequenceClassification": (
        _of("LlamaForSequenceClassification", LlamaConfig, **TINY, num_labels=1),
        r"its head is for SequenceClassification.*bpo\.RewardModel",
    ),
    "LlamaForTokenClassification": (_of("LlamaForTokenClassification", LlamaConfig, **TINY), "TokenClassification"),
    "T5ForConditionalGeneration": (_of("T5ForConditionalGeneration", T5Config, **T5), "is an encoder-decoder"),
    "BartForConditionalGeneration": (
        _of("BartForConditionalGeneration", BartConfig, d_model=32, **BART),
        "is an encoder-decoder",
    ),
}


def _calls(tokenizer):
    given = {"processing_class": tokenizer}
    fast = {"config": {"sketch_dim": 64}}
    return [
        lambda model: bpo.select(model, ROWS, budget=3, progress=False, **given, **fast),
        lambda model: bpo.collect_gradients(model, ROWS, progress=False, **given, **fast),
        lambda model: bpo.doctor(model, ROWS, **given, **fast),
        lambda model: bpo.sample_responses(model, ["one"], progress=False, **given),
        lambda model: bpo.evaluate_preferences(model, ROWS, progress=False, **given),
        lambda model: bpo.collect_gradients(
            tiny_llama(tokenizer), ROWS, progress=False, **given, config={"ref_model": model}
        ),
        lambda model: bpo.estimate_token_weights(ROWS, tiny_llama(tokenizer), model, progress=False, **given),
    ]


@pytest.mark.parametrize("name", NO_POLICIES)
def test_what_is_no_policy_is_refused(name, tokenizer, tmp_path):
    make, why = NO_POLICIES[name]
    model = make(len(tokenizer))
    model.save_pretrained(tmp_path / name)
    ran = []
    model.register_forward_pre_hook(lambda module, args: ran.append(1))
    for call in _calls(tokenizer):
        for given in (model, tmp_path / name):
            with pytest.raises(bpo.UnsupportedModelError, match=rf"{name} .*({why})"):
                call(str(given) if given is not model else given)
    assert not ran


@pytest.mark.parametrize("kind", [BertLMHeadModel, XLMWithLMHeadModel])
def test_decoders_of_such_families_are_policies(kind, tokenizer):
    config = (
        BertConfig(vocab_size=len(tokenizer), **SIZES, is_decoder=True)
        if kind is BertLMHeadModel
        else XLMConfig(vocab_size=len(tokenizer), emb_dim=32, n_layers=1, n_heads=4, causal=True)
    )
    assert len(stored(kind(config).eval(), ROWS, tokenizer)) == 9


def test_a_model_whose_tokens_see_ahead_is_evaluated_by_nobody(tokenizer):
    model = XLMWithLMHeadModel(XLMConfig(vocab_size=len(tokenizer), emb_dim=32, n_layers=1, n_heads=4)).eval()
    for call in [*_calls(tokenizer)[:3], _calls(tokenizer)[4], _calls(tokenizer)[6]]:
        with pytest.raises(bpo.UnsupportedModelError, match="In XLMWithLMHeadModel a token sees those after it"):
            call(model)


def test_models_without_values_are_refused(tokenizer):
    with torch.device("meta"):
        model = tiny_llama(tokenizer)
    for call in _calls(tokenizer):
        with pytest.raises(bpo.UnsupportedModelError, match=r"embed_tokens\.weight has no values: the model is on the"):
            call(model)


def test_weights_made_for_inference_alone_are_named(tokenizer):
    with torch.inference_mode():
        model = tiny_llama(tokenizer)
    with pytest.raises(bpo.UnsupportedModelError, match=r"embed_tokens\.weight was made under torch\.inference_mode"):
        stored(model, ROWS, tokenizer)


def test_packed_layers_are_named(tokenizer):
    class QuantLinear(torch.nn.Module):
        """As GPTQ's: 8 weights of 4 bits in a number of 32."""

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 48, dtype=torch.int32))

    model = tiny_llama(tokenizer)
    model.model.layers[1].mlp.up_proj = QuantLinear()
    with pytest.raises(bpo.UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj is a QuantLinear.* \(torch\.int32\)"):
        stored(model, ROWS, tokenizer)


def test_classes_that_share_weights_out_are_named(tokenizer):
    """By their names, since the libraries are large."""
    model = tiny_llama(tokenizer)

    class DeepSpeedEngine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def __getattr__(self, name):
            return super().__getattr__("module") if name == "module" else getattr(self.module, name)

    with pytest.raises(bpo.UnsupportedModelError, match="The model is a DeepSpeedEngine"):
        stored(DeepSpeedEngine(), ROWS, tokenizer)
    model.model.norm.weight.ds_id = 3
    with pytest.raises(bpo.UnsupportedModelError, match=r"norm\.weight is shared .* DeepSpeed's ZeRO-3 .* by FSDP2"):
        stored(model, ROWS, tokenizer)


def test_an_adapter_for_something_else_is_refused_by_path(tokenizer, tmp_path):
    base = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **TINY, num_labels=1))
    base.save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type=TaskType.SEQ_CLS)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(bpo.UnsupportedModelError, match="LlamaForSequenceClassification gives no distribution"):
        stored(str(tmp_path / "adapter"), ROWS, tokenizer)


def test_what_is_no_model_is_named(tokenizer):
    for given in (torch.nn.Linear(2, 2), 3, {"model": None}):
        with pytest.raises(TypeError, match=f"not {re.escape(type(given).__name__)}"):
            stored(given, ROWS, tokenizer)
