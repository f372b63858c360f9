"""Tiny models and tokenizers, made here so that no test needs a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
torch.set_num_threads(1)  # on models this small more threads cost more than they give
WORDS = "red green blue one two three cat dog bird sun moon star tea milk bread north south east west".split()  # noqa: SIM905


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


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


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


@pytest.fixture(scope="session")
def model(tokenizer):
    """A two-layer Llama of 32 dimensions."""
    return tiny_llama(tokenizer)


@pytest.fixture(scope="session")
def model_path(model, tokenizer, tmp_path_factory):
    """The same, saved."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def smollm2():
    """The path of the demo's SmolLM2-135M-Instruct."""
    demo = Path(__file__).resolve().parents[2] / "demo"
    sys.path.insert(0, str(demo))
    try:
        import models
    finally:
        sys.path.remove(str(demo))
    return str(models.policy(demo / "output" / "models"))


def hooked(model, features, tokenized, rows, pad_id=0):
    """Full gradients and log-probabilities of a batch, by the hooks."""
    from bpo.logprobs import Forward
    from bpo.models import inference_state

    forward = Forward(model, tokenized, pad_id)
    with inference_state(model):
        return caught(forward, features, features.plan(forward), rows)


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


@pytest.fixture
def rows():
    return scored_rows()


def run(*command):
    """Runs a command that must succeed."""
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def mount(tmp_path):
    """A function that mounts something, skipping the test where that cannot be done."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system of its own needs Linux and root")
    mounts = []

    def mount(*arguments):
        directory = tmp_path / f"mount-{len(mounts)}"
        directory.mkdir()
        done = subprocess.run(["mount", *map(str, arguments), directory], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
        mounts.append(directory)
        return directory

    yield mount
    for directory in reversed(mounts):
        subprocess.run(["umount", "--lazy", directory], check=False, capture_output=True)


def image(path, size, make):
    """A file of ``size`` bytes that holds a file system, made by the command ``make``."""
    if not shutil.which(make[0]):
        pytest.skip(f"{make[0]} is not installed")
    path.touch()
    os.truncate(path, size)
    run(*make, path)
    return path
