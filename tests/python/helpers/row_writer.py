"""Sampling and scoring of known rows, by processes that are killed; what they need is made when this is imported."""

import resource
import signal

import datasets
import torch

import bpo
from tiny import build_tokenizer, tiny_llama

TOKENIZER = build_tokenizer()
MODEL = tiny_llama(TOKENIZER)
PROMPTS = [{"prompt": f"{index} red cat", "id": index} for index in range(20)]
# Long rows, so that many a kill is in the middle of a write.
LONG = [{"prompt": f"{index}", "responses": ["a" * 20_000, "b" * 10_000], "id": index} for index in range(60)]


def sample(path):
    """Responses of a tiny model, in batches of two prompts."""
    bpo.sample_responses(
        MODEL,
        PROMPTS,
        2,
        processing_class=TOKENIZER,
        output=path,
        batch_size=4,
        max_new_tokens=8,
        keep=["truncated"],
        progress=False,
    )


def score(path):
    """Scores of long responses."""
    bpo.score_responses(LONG, lambda prompt, response: len(response) / 7, output=path, progress=False)


def run(work, path, started, most_bytes):
    """Works, and says when it begins; a file that would grow beyond ``most_bytes`` kills it within a write."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    started.set()
    work(path)
