"""What benches/python/gpu.py runs on: the card, random models in real shapes, and responses of real lengths."""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers

import bpo
from bpo.data.tokens import TokenizedResponses, tokenize_candidates
from table import Row

Measurement = Callable[["Card"], Iterator[Row]]


# The card


@dataclass
class Card:
    """Where the measurements run, where they leave files, and how long they may take."""

    output: Path
    deadline: float = float("inf")  # of the part at work, as of time.time()

    @property
    def there(self) -> bool:
        return torch.cuda.is_available()

    @property
    def device(self) -> str:
        return "cuda" if self.there else "cpu"

    @property
    def left(self) -> float:
        """Seconds until the part must end."""
        return self.deadline - time.time()

    def choose(self, card: Any, cpu: Any) -> Any:
        """One of two sizes: what is worth measuring, and what only keeps the code from rotting."""
        return card if self.there else cpu

    def goal(self, goal: float | None) -> float | None:
        """A goal of speed or memory, which means nothing without a GPU."""
        return goal if self.there else None

    def now(self) -> float:
        if self.there:
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def matmul_size(self) -> int:
        return int(self.choose(8192, 64))

    @functools.cached_property
    def matmul_rate(self) -> float:
        """FLOP/s of a large product in bfloat16, once a run: a worker that comes later finds the card warm."""
        found = self.output / "matmul-rate"
        if found.exists():
            return float(found.read_text())
        size = self.matmul_size
        left, right = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * size**3 / self._median_seconds(lambda: left @ right)
        found.write_text(repr(rate))
        return rate

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes read and written a second by a large copy on the device."""
        source = torch.empty(self.choose(1 << 30, 1 << 20), device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        return 2 * source.numel() / self._median_seconds(lambda: target.copy_(source))

    @functools.cached_property
    def host_rate(self) -> float:
        """Bytes a second from the device to pinned memory."""
        source = torch.empty(self.choose(1 << 28, 1 << 20), device=self.device, dtype=torch.uint8)
        target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=self.there)
        return source.numel() / self._median_seconds(lambda: target.copy_(source, non_blocking=True))

    def _median_seconds(self, run: Callable[[], object], repeats: int = 10) -> float:
        run()
        seconds = []
        for _ in range(5):
            start = self.now()
            for _ in range(repeats):
                run()
            seconds.append((self.now() - start) / repeats)
        return statistics.median(seconds)

    def free(self) -> None:
        """Gives the memory of what is no longer used back to the device."""
        import gc

        gc.collect()
        if self.there:
            torch.cuda.empty_cache()


# Models


@dataclass(frozen=True)
class Shape:
    """A causal language model by its sizes."""

    name: str
    family: str  # of transformers: "Llama" or "Qwen2"
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    tied: bool = True

    def on(self, card: Card) -> Shape:
        """The shape itself on a GPU; elsewhere a tiny one of the same kind."""
        if card.there:
            return self
        kv_heads = 2 if self.kv_heads < self.heads else 4
        tiny = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": kv_heads, "inner": 48, "vocabulary": 256}
        return dataclasses.replace(self, name=f"tiny for {self.name}", **tiny)

    def build(self, device: str, dtype: torch.dtype) -> Any:
        """A model of random weights, the same ones each time on the same kind of device."""
        config = getattr(transformers, f"{self.family}Config")(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.to(device).eval()


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "Llama", 64, 2, 4, 2, 96, 512),
        Shape("135M", "Llama", 576, 30, 9, 3, 1536, 49152),
        Shape("0.5B", "Qwen2", 896, 24, 14, 2, 4864, 151936),
        Shape("1B", "Llama", 2048, 16, 32, 8, 8192, 128256),
        Shape("7B", "Llama", 4096, 32, 32, 32, 11008, 32000, tied=False),
    )
}


@functools.lru_cache(maxsize=2)
def twins(shape: Shape, device: str) -> tuple[Any, Any]:
    """One model twice: in float64 on the CPU and in float32 on a device. bfloat16 holds their weights exactly, too."""
    model = shape.build("cpu", torch.bfloat16).float()
    return copy.deepcopy(model).double(), model.to(device)


# Responses

# (prompt, response) tokens of 32 of the demo's responses, evenly over their lengths together (mean 81, most 120).
DEMO_LENGTHS = (
    *((51, 4), (53, 4), (48, 11), (48, 12), (52, 10), (46, 17), (48, 17), (55, 11), (47, 20), (56, 13), (49, 21)),
    *((56, 15), (47, 25), (51, 22), (54, 21), (58, 18), (51, 26), (50, 29), (50, 30), (50, 32), (44, 41), (63, 25)),
    *((57, 34), (51, 44), (48, 50), (60, 40), (54, 50), (58, 50), (61, 50), (62, 50), (65, 50), (67, 50)),
)
RESPONSES = 4  # of a prompt


def numbers(vocabulary: int) -> Any:
    """A tokenizer whose words are the token ids."""
    words = {"<pad>": 0, "</s>": 1} | {str(index): index for index in range(2, vocabulary)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>")


def draw(lengths: str, generator: np.random.Generator, card: Card) -> tuple[int, list[int]]:
    """Tokens of a prompt and of its responses: as in the demo, or 512 to 2,048 together, a third of it the prompt."""
    if lengths == "demo":
        taken = generator.integers(len(DEMO_LENGTHS), size=RESPONSES)
        return DEMO_LENGTHS[taken[0]][0], [DEMO_LENGTHS[index][1] for index in taken]
    together = generator.integers(512, 2049, size=RESPONSES) // card.choose(1, 16)
    prompt = int(together.mean()) // 3
    return prompt, [max(int(each) - prompt, 2) for each in together]


@dataclass(frozen=True, eq=False)
class Data:
    """Random tokens of given lengths, as rows of text for the public functions and as token ids."""

    name: str
    rows: list[dict[str, Any]]
    tokenizer: Any
    tokenized: TokenizedResponses
    pad_id: int = 0

    @classmethod
    def make(cls, card: Card, shape: Shape, lengths: str, *, tokens: int = 0, prompts: int = 0) -> Data:
        """At least so many tokens, or so many prompts."""
        generator, rows, made = np.random.default_rng(0), [], 0
        while made < tokens or len(rows) < prompts:
            prompt, responses = draw(lengths, generator, card)
            made += sum(prompt + each for each in responses)
            text = [
                " ".join(map(str, generator.integers(2, shape.vocabulary, size=size))) for size in (prompt, *responses)
            ]
            scores = generator.permutation(RESPONSES).astype(float).tolist()
            rows.append({"prompt": text[0], "responses": [f" {each}" for each in text[1:]], "scores": scores})
        tokenizer = numbers(shape.vocabulary)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidates = bpo.read_candidates(rows)
            _, tokenized = tokenize_candidates(candidates, tokenizer, None, on_invalid="raise")
        return cls(lengths, rows, tokenizer, tokenized)

    @property
    def tokens(self) -> int:
        return int(self.tokenized.lengths.sum())


def settings(**changes: Any) -> bpo.SelectConfig:
    """Of what is extracted here, with sketches kept as they are."""
    return bpo.SelectConfig(**{"max_length": None, "sketch_dtype": "float32", **changes})


def extracted(model: Any, data: Data, **changes: Any) -> np.ndarray:
    """(S, d) sketches by bpo.collect_gradients, in the order of the data."""
    with tempfile.TemporaryDirectory() as directory:
        store = bpo.collect_gradients(
            model,
            data.rows,
            processing_class=data.tokenizer,
            store=Path(directory) / "store",
            config=settings(**changes),
            progress=False,
        )
        return np.array(store.sketches(store.rows_of(data.tokenized.sequence_ids)))


def failed(name: str, error: BaseException) -> Row:
    text = str(error).strip().splitlines()
    return Row(name, "FAILED", type(error).__name__, (text[0] if text else "")[:200])
