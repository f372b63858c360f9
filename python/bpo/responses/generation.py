"""Responses of a model in this process: generated in batches, each drawn with random numbers of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig

from bpo.config import SelectConfig
from bpo.data.candidates import Skipped, report_skipped
from bpo.data.tokenizers import load_tokenizer, padding_id, token_ids, tokenizer_fingerprint
from bpo.policy.checks import base_of
from bpo.policy.logprobs import check_vocabulary, input_device, known_id, takes
from bpo.policy.models import load_policy, model_fingerprint, window
from bpo.policy.state import inference_state
from bpo.responses.client import ChatError
from bpo.responses.rowblocks import in_blocks
from bpo.responses.sources import Sampled, random_stream
from bpo.system.memory import within_memory
from bpo.system.warn import warn

if TYPE_CHECKING:
    import numpy.typing as npt

    from bpo.responses.prompts import PromptResponses


# Largest change of the logits by padding at the left that is rounding, relative to the largest of them.
_PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class ModelSource:
    """A model in this process, each response drawn with random numbers of its own."""

    def __init__(
        self, model: Any, processing_class: Any, config: SelectConfig, settings: Mapping[str, Any], batch_size: int
    ) -> None:
        self.tokenizer = load_tokenizer(model, processing_class, config)
        self.model = load_policy(model, config)
        self.settings = settings
        # Prompts in a batch, and how many of them memory suffices for.
        self.size = self.at_once = max(1, batch_size // settings["n_responses"])
        self.window = window(self.model, SelectConfig(max_length=None))
        self.prompt_ids: list[list[int]] = []
        self._pad = known_id(self.model, padding_id(self.tokenizer))
        self._padding_matters: bool | None = None  # not known before two lengths meet
        self.failures: list[str] = []

    def describe(self) -> dict[str, Any]:
        """Returns the hashes of weights and tokenizer, and the tokens that end a response."""
        return {
            "weights": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "end_tokens": _end_tokens(self.model, self.tokenizer),
        }

    def fitting(self, rows: Sequence[PromptResponses]) -> list[PromptResponses]:
        """Tokenizes the prompts; sets those aside that leave no room for a response."""
        skipped = Skipped()
        fitting = []
        room = None if self.window is None else self.window - self.settings["max_new_tokens"]
        for row in rows:
            ids = token_ids(self.tokenizer, row.prompt, row.row, row.template_kwargs, add_generation_prompt=True)
            if room is not None and len(ids) > room:
                reason = f"prompt that leaves no {self.settings['max_new_tokens']} tokens of {self.window} to respond"
                skipped.add(reason, f"row {row.row}")
                continue
            fitting.append(row)
            self.prompt_ids.append(ids or [self._pad])
        report_skipped(skipped, "skip")
        check_vocabulary(self.model, self.prompt_ids)
        if not fitting:
            raise ValueError(f"No prompt can be responded to; lower max_new_tokens.\n{skipped.describe()}")
        return fitting

    def blocks(self, rows: Sequence[PromptResponses]) -> list[list[int]]:
        """Whole batches, as one process generates them."""
        return in_blocks(self._batches)

    @functools.cached_property
    def _batches(self) -> list[list[int]]:
        # Longest first: memory peaks in the first batch. Batches do not depend on what is there already, so that an
        # interrupted run goes on with the same arithmetic.
        order = sorted(range(len(self.prompt_ids)), key=lambda index: -len(self.prompt_ids[index]))
        return [order[start : start + self.size] for start in range(0, len(order), self.size)]

    def sample(
        self, rows: Sequence[PromptResponses], todo: Sequence[int], on_response: Callable[[int], Any]
    ) -> Iterator[tuple[int, list[Sampled | ChatError]]]:
        """Yields the responses to the prompts, batch by batch; what is no text is a failure among them."""
        wanted = set(todo)
        for batch in self._batches:
            if wanted.isdisjoint(batch):
                continue
            with inference_state(self.model), _own_distribution(self.model):
                # Not yielded in here: between batches the model is as it was.
                texts = self._in_memory(rows, batch)
            for index, sampled in zip(batch, texts, strict=True):
                if index in wanted:
                    on_response(len(sampled))
                    yield index, [self._checked(response, rows[index].row) for response in sampled]

    def _in_memory(self, rows: Sequence[PromptResponses], batch: Sequence[int]) -> list[list[Sampled]]:
        """Generates for a batch, in parts where memory does not suffice for all of it."""
        sampled: list[list[Sampled]] = []
        while len(sampled) < len(batch):
            part = self._together(batch[len(sampled) : len(sampled) + self.at_once])
            done, error = within_memory(self._generate, rows, part)
            if done is not None:
                sampled += done
                continue
            if len(part) == 1:
                raise MemoryError(
                    f"Memory does not suffice for {self.settings['n_responses']} responses to one prompt (row "
                    f"{rows[part[0]].row}): {error}\nLower n_responses or max_new_tokens, or load the model in a "
                    "smaller dtype."
                )
            self.at_once = len(part) // 2
            warn(f"Memory does not suffice for {len(part)} prompts at once; going on with {self.at_once}.")
        return sampled

    def _together(self, batch: Sequence[int]) -> Sequence[int]:
        """Returns those at the beginning of a batch, the longest first, that do not change one another.

        Where padding at the left moves what comes after it, as in RWKV's states and BART's positions, only prompts of
        equal length go together.
        """
        shortest, longest = self.prompt_ids[batch[-1]], self.prompt_ids[batch[0]]
        if len(shortest) == len(longest):
            return batch
        if self._padding_matters is None:
            alone, padded = (self._next_logits(shortest, width) for width in (len(shortest), len(longest)))
            precision = _PADDING_TOLERANCE.get(self.model.dtype, _PADDING_TOLERANCE[torch.bfloat16])
            self._padding_matters = not bool((alone - padded).abs().max() <= precision * alone.abs().max())
        if not self._padding_matters:
            return batch
        return [index for index in batch if len(self.prompt_ids[index]) == len(longest)]

    def _next_logits(self, prompt: Sequence[int], width: int) -> torch.Tensor:
        """Returns the (v,) logits after a prompt that is padded to a width, as ``generate`` pads."""
        ids, mask = self._padded([prompt], width)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if takes(self.model, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            logits: torch.Tensor = self.model(**inputs).logits[0, -1].float()
        return logits

    def _padded(self, prompts: Sequence[Sequence[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (n, width) token ids and attention mask of prompts padded at the left, where the model takes them."""
        ids = torch.full((len(prompts), width), self._pad, dtype=torch.long, device="cpu")
        mask = torch.zeros_like(ids)
        for place, prompt in enumerate(prompts):
            ids[place, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long, device="cpu")
            mask[place, width - len(prompt) :] = 1
        device = input_device(self.model)
        return ids.to(device), mask.to(device)

    def _generate(self, rows: Sequence[PromptResponses], batch: Sequence[int]) -> list[list[Sampled]]:
        count, longest = self.settings["n_responses"], self.settings["max_new_tokens"]
        width = max(len(self.prompt_ids[index]) for index in batch)
        ids, mask = self._padded([self.prompt_ids[index] for index in batch for _ in range(count)], width)  # (b·m, t)
        uniforms = np.stack(
            [
                random_stream(self.settings["seed"], rows[index].key, response, longest)
                for index in batch
                for response in range(count)
            ]
        )
        draws = OwnStreams(uniforms, width, self.settings["temperature"], self.settings["top_p"])
        ends = _end_tokens(self.model, self.tokenizer)
        tokens = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            # Greedy, over scores of which the processor leaves one: the token that it drew.
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=longest,
                eos_token_id=ends or None,
                pad_token_id=self._pad,
                use_cache=True,
            ),
            logits_processor=[draws],
        )
        sampled = [self._read(row, ends, rows[batch[0]]) for row in tokens[:, width:].tolist()]
        return [sampled[start : start + count] for start in range(0, len(sampled), count)]

    def _checked(self, response: Sampled, row: int) -> Sampled | ChatError:
        try:
            response.text.encode()
        except UnicodeEncodeError:
            error = ChatError("the tokenizer makes half a character (a lone surrogate) of what was sampled")
            self.failures.append(f"row {row}: {error}")
            return error
        return response

    def _read(self, tokens: list[int], ends: Sequence[int], row: PromptResponses) -> Sampled:
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        return Sampled(text if isinstance(row.prompt, str) else text.strip(), truncated=end is None, refused=False)


def _end_tokens(model: Any, processing_class: Any) -> list[int]:
    """Returns the ids that end a response: the model's and the tokenizer's."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    of_model = given if isinstance(given, (list, tuple)) else [given]
    return sorted({int(token) for token in (*of_model, processing_class.eos_token_id) if token is not None})


@contextlib.contextmanager
def _own_distribution(model: Any) -> Iterator[None]:
    """Hides the generation settings saved with a model, which ``generate`` would add to those given."""
    base = base_of(model)
    saved = base.generation_config
    ends = GenerationConfig(eos_token_id=saved.eos_token_id, bos_token_id=saved.bos_token_id)
    base.generation_config = ends
    try:
        yield
    finally:
        base.generation_config = saved


class OwnStreams:
    """A logits processor that draws a token for each row with the row's own random numbers and leaves only that one.

    Args:
        uniforms: (b, max_new_tokens) in [0, 1).
        start: Tokens of the padded prompts.
        temperature: Of the softmax.
        top_p: Of the nucleus.
    """

    def __init__(self, uniforms: npt.NDArray[np.float64], start: int, temperature: float, top_p: float) -> None:
        self.uniforms = uniforms
        self.start = start
        self.temperature = temperature
        self.top_p = top_p

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes (b, t) ids and (b, v) logits; returns logits that are finite at the token drawn for each row alone."""
        column = torch.from_numpy(self.uniforms[:, input_ids.shape[1] - self.start].copy())
        chosen = draw_tokens(scores, column, self.temperature, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def draw_tokens(scores: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draws a token for each row by inverting its distribution function.

    The function runs over the vocabulary in its order, not by probability: two tokens of nearly equal probability then
    cannot change places by rounding, and a change of the logits by ε changes a draw with probability O(ε).

    Args:
        scores: (b, v) logits.
        uniforms: (b,) float64 in [0, 1).
        temperature: Divides the logits.
        top_p: The smallest set of most probable tokens whose mass reaches it is drawn from, with what ties its last.

    Returns:
        (b,) int64.

    Raises:
        ValueError: Logits that are NaN or infinite.
    """
    # Not all devices have float64.
    exact = scores.cpu() if scores.device.type == "mps" else scores
    probabilities = torch.softmax(exact.double() / temperature, dim=-1)
    if top_p < 1:
        # Mostly few tokens make up the nucleus; sorting them all takes longest of all that is done here.
        for most in (1024, probabilities.shape[1]):
            ordered = probabilities.topk(min(most, probabilities.shape[1]), dim=-1).values
            before = ordered.cumsum(dim=-1) - ordered  # mass of what is more probable
            if bool((before[:, -1] >= top_p).all()):
                break
        least = ordered.masked_fill(before >= top_p, torch.inf).amin(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise ValueError("The model gives logits that are NaN or infinite; try another dtype.")
    target = torch.minimum(uniforms.to(cumulative)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose cumulative mass exceeds the target, so never one of no mass.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).to(scores.device)
