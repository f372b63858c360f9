"""Tiny models, tokenizers and data, made here so that no test needs a network."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


WORDS = "red green blue one two three cat dog bird sun moon star tea milk bread north south east west".split()  # noqa: SIM905


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build_tokenizer():
    """A byte-level BPE tokenizer with a chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    from tokenizers import decoders

    raw.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def tiny_llama(tokenizer, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": len(tokenizer),
        **TINY,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def tiny_gpt2(tokenizer):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config).eval()


def hooked(model, features, tokenized, rows, pad_id=0):
    """Full gradients and log-probabilities of a batch, by the hooks."""
    from bpo.gradients.plan import find_plan
    from bpo.policy.logprobs import Forward
    from bpo.policy.state import inference_state

    forward = Forward(model, tokenized, pad_id)
    with inference_state(model):
        return caught(forward, features, find_plan(features, forward), rows)


def caught(forward, features, plan, rows):
    """The same with a plan that is there already, of a model that is frozen already."""
    gradients = torch.zeros(len(rows), features.dim)

    def keep(offset, values, samples):
        gradients[samples, offset : offset + values.shape[1]] += values

    logps = features.catch(forward, plan, rows, keep).logps
    return gradients, logps


def stored(model, rows, tokenizer, store=None, **settings):
    """The gradient store of some rows of data, with small sketches that are kept as they are."""
    from bpo import SelectConfig, collect_gradients

    return collect_gradients(
        model,
        rows,
        processing_class=tokenizer,
        store=store,
        config=SelectConfig(**{"sketch_dim": 64, "sketch_dtype": "float32", **settings}),
        progress=False,
    )


def scored_rows(n_prompts=10, n_responses=5, *, conversational=False, seed=0):
    """Random prompts and responses with random distinct scores."""
    generator = np.random.default_rng(seed)

    def sentence(low, high):
        return " ".join(generator.choice(WORDS, generator.integers(low, high)))

    rows = []
    for index in range(n_prompts):
        prompt = f"{index} {sentence(3, 8)}?"
        responses = [f" {i} {sentence(2, 12)}" for i in range(n_responses)]
        scores = generator.permutation(n_responses).astype(float).tolist()
        if conversational:
            prompt = [{"role": "user", "content": prompt}]
            responses = [[{"role": "assistant", "content": response}] for response in responses]
        rows.append({"prompt": prompt, "responses": responses, "scores": scores})
    return rows
