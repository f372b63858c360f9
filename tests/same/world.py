"""The models and data that the observations share, as the tests make them."""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "python" / "helpers"))

import bpo
from tiny import TINY, build_tokenizer, scored_rows, stored, tiny_gpt2, tiny_llama

__all__ = ["SMALL", "TINY", "World", "scored_rows", "tiny_gpt2", "tiny_llama"]

SMALL = {"sketch_dim": 64, "lora_rank": 4}
"""Settings of every store and selection that does not say otherwise."""


class World:
    """What the observations share. Every path is relative, to a working directory that is new.

    Attributes:
        tokenizer: Byte-level, with a chat template.
        model: A Llama of two layers, saved in ``model``.
        rows: Scored responses, saved in ``rows.jsonl``; ``messages`` are others, as conversations.
        pairs: Preference rows without scores.
        store: A gradient store of ``rows``.
    """

    def __init__(self):
        self.tokenizer = build_tokenizer()
        self.model = tiny_llama(self.tokenizer)
        self.model.save_pretrained("model")
        self.tokenizer.save_pretrained("model")
        self.rows = scored_rows()
        self.messages = scored_rows(6, 4, conversational=True, seed=2)
        self.pairs = [
            {"prompt": row["prompt"], "chosen": row["responses"][place], "rejected": row["responses"][place + 1]}
            for row in self.rows
            for place in (0, 2)
        ]
        self.target = scored_rows(2, 3, seed=7)
        for name in ("rows", "messages", "pairs", "target"):
            write_rows(f"{name}.jsonl", getattr(self, name))
        self.store = "store"
        self.collect(self.rows, store=self.store)

    def collect(self, rows, *, model=None, **settings):
        """Fills a gradient store."""
        return stored(model or self.model, rows, self.tokenizer, **{**SMALL, "sketch_dtype": "float16", **settings})

    def select(self, rows=None, **arguments):
        """Selects from the rows, with small sketches."""
        given = {"model": self.model, "budget": 23, "processing_class": self.tokenizer, "progress": False, **arguments}
        given["config"] = {**SMALL, **given.get("config", {})}
        return bpo.select(given.pop("model"), self.rows if rows is None else rows, **given)


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def directions(n, dim=16, seed=0):
    """Random float32 rows."""
    return np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
