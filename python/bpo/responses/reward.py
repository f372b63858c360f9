"""A reward model as a scorer: one number for a prompt and a response."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bpo.config import SelectConfig
from bpo.data.tokenizers import joined, load_tokenizer, token_ids, tokenizer_fingerprint
from bpo.policy.batches import batch_tokens, in_batches, longest_first
from bpo.policy.checks import check_model, unwrapped
from bpo.policy.logprobs import check_vocabulary, pad_right, vocabulary
from bpo.policy.models import model_fingerprint
from bpo.policy.state import inference_state
from bpo.responses.scorer import Score, Scorer, reason_of
from bpo.system.paths import check_path, is_adapter, naming

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy.typing as npt

    from bpo.responses.prompts import PromptResponses


# Prompts that are sorted by length together: what an interrupted run may lose.
_PROMPTS_AT_ONCE = 64


class RewardModel(Scorer):
    """A sequence classifier with one logit, which is the score, as TRL's ``RewardTrainer`` makes them.

    Conversations go through the chat template, as training data does; plain text is closed by the end token. The score
    is that of the sequence alone: it depends on the other sequences of a batch by rounding only.

    Args:
        model: Path or hub id that ``AutoModelForSequenceClassification`` loads, or such a model.
        processing_class: Its tokenizer; by default the one saved with it.
        config: Uses ``tokens_per_batch`` and, for a model given by path, ``dtype``, ``device`` and
            ``trust_remote_code``.

    Raises:
        ValueError: A model with other than one logit, or one whose head was not trained: a plain language model.
        FileNotFoundError, OSError: A model that cannot be loaded.

    Example:
        .. code-block:: python

            scorer = bpo.RewardModel("my-reward-model")
            scored = bpo.score_responses("responses.jsonl", scorer, output="scored.jsonl")
    """

    reads_columns = False
    share = _PROMPTS_AT_ONCE

    def __init__(
        self, model: Any, processing_class: Any = None, *, config: SelectConfig | Mapping[str, Any] | None = None
    ) -> None:
        config = SelectConfig.of(config)
        self.tokenizer = load_tokenizer(model, processing_class, config)
        self.model = _load(model, config) if isinstance(model, (str, Path)) else unwrapped(model)
        check_model(self.model)
        labels = getattr(self.model.config, "num_labels", None)
        if labels != 1:
            raise ValueError(
                f"A reward model gives one logit, this model has num_labels={labels}; turn its logits into a score "
                "with a function of your own."
            )
        self.tokens_per_batch = batch_tokens(config.tokens_per_batch, self.model)

    def describe(self) -> dict[str, Any]:
        """Returns the hashes of weights and tokenizer."""
        return {
            "reward_model": model_fingerprint(self.model),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
        }

    def scores(self, rows: Sequence[PromptResponses]) -> Iterator[tuple[int, list[Score]]]:
        """Yields the scores of each row; a sequence beyond the positions of the model, or that is refused, has none."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for start in range(0, len(rows), _PROMPTS_AT_ONCE):
            chunk = rows[start : start + _PROMPTS_AT_ONCE]
            told = [self._tokens(row, place) for row in chunk for place in range(len(row.responses))]
            sequences = [tokens for tokens, _ in told]
            scores = [
                Score(None, f"{len(tokens)} tokens, more than the {longest} that the reward model was made for")
                if len(tokens) > (longest or np.inf)
                else Score(None, reason)
                for tokens, reason in told
            ]
            fitting = np.array([index for index, score in enumerate(scores) if score.error is None], dtype=np.int64)
            lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
            order = fitting[longest_first(lengths[fitting])]
            run = functools.partial(self._logits_of, sequences)
            for batch, logits in in_batches(run, order, lengths, self.tokens_per_batch):
                for index, logit in zip(batch, logits, strict=True):
                    scores[index] = Score.of(logit)
            given = iter(scores)
            for index, row in enumerate(chunk, start=start):
                yield index, list(itertools.islice(given, len(row.responses)))

    def _tokens(self, row: PromptResponses, place: int) -> tuple[list[int], str | None]:
        """Returns the tokens of a response, or why there are none: templates refuse some conversations."""
        response = row.responses[place]
        response = response if isinstance(row.prompt, str) else row.messages(response)
        try:
            text = joined(row.prompt, response, self.tokenizer.eos_token or "")
            return token_ids(self.tokenizer, text, row.row, row.template_kwargs), None
        except Exception as error:
            return [], reason_of(error)

    def _logits_of(self, sequences: Sequence[Sequence[int]], batch: npt.NDArray[np.int64]) -> list[float]:
        return self._logits([sequences[index] for index in batch])

    def _logits(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        check_vocabulary(self.model, sequences)
        config = self.model.config.get_text_config()
        # The model finds the end of a sequence as its last token that is not the pad token. Without one, or with one
        # that has no embedding, it takes the last: any token fills that no sequence has.
        filler = config.pad_token_id
        if filler is None or not 0 <= filler < vocabulary(self.model):
            used = {token for sequence in sequences for token in sequence}
            filler = next((token for token in range(vocabulary(self.model)) if token not in used), None)
        if filler is None and len(sequences) > 1:
            return [logit for sequence in sequences for logit in self._logits([sequence])]
        with inference_state(self.model), torch.no_grad():
            if filler is not None:
                config.pad_token_id = filler  # put back with all else
            ids, mask = pad_right(self.model, sequences, filler or 0)
            logits = self.model(input_ids=ids, attention_mask=mask).logits
        values: list[float] = logits.float().squeeze(-1).tolist()
        return values


def _load(model: str | Path, config: SelectConfig) -> Any:
    from transformers import AutoModelForSequenceClassification

    name = check_path(str(model))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = {"dtype": getattr(torch, config.dtype), "trust_remote_code": config.trust_remote_code}
    if is_adapter(name):
        from peft import AutoPeftModelForSequenceClassification

        # What the adapter was trained with; PEFT does not keep it, and transformers takes two labels for granted.
        with naming(name):
            return AutoPeftModelForSequenceClassification.from_pretrained(name, num_labels=1, **settings).to(device)
    with naming(name):
        loaded, info = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **settings)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"{name} is no reward model: it has no trained weights for {missing}.")
    return loaded.to(device)
