"""Tokenizers: loading by path, what they must be able to do, and fingerprints that tell two of them apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpo.system.paths import check_path, naming

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from bpo.config import SelectConfig
    from bpo.data.values import Text


def load_tokenizer(model: Any, processing_class: Any, config: SelectConfig) -> PreTrainedTokenizerBase:
    """Returns the tokenizer given, or the one saved with the model.

    Raises:
        FileNotFoundError: A model path that does not exist.
        OSError: A hub id that cannot be loaded, or a model object whose origin is not known.
    """
    from transformers import AutoTokenizer

    if isinstance(processing_class, (str, Path)):
        model, processing_class = str(processing_class), None
    if processing_class is not None:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        if not hasattr(tokenizer, "apply_chat_template"):
            raise TypeError(f"processing_class must be a tokenizer or a path, not {type(processing_class).__name__}")
        return tokenizer
    name = model if isinstance(model, (str, Path)) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise OSError("The model does not say where it was loaded from; pass its tokenizer as processing_class.")
    name = check_path(str(name))
    with naming(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)


def tokenizer_fingerprint(processing_class: PreTrainedTokenizerBase) -> str:
    """Returns the SHA-256 of vocabulary, special tokens, text normalisation and chat template (hex)."""
    digest = hashlib.sha256(str(getattr(processing_class, "chat_template", None)).encode())
    digest.update(json.dumps(sorted(processing_class.get_vocab().items())).encode())
    digest.update(json.dumps(processing_class.special_tokens_map, sort_keys=True, default=str).encode())
    backend = getattr(processing_class, "backend_tokenizer", None)
    if backend is not None:
        # Padding and truncation are set by whoever used the tokenizer last and are not part of its identity.
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
        digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def check_tokenizer(processing_class: PreTrainedTokenizerBase, conversational: bool) -> None:
    """Checks that the tokenizer can do what training will ask of it.

    Raises:
        ValueError: No padding or end token, or no chat template for conversational rows.
    """
    if processing_class.pad_token_id is None and processing_class.eos_token_id is None:
        raise ValueError(
            "The tokenizer has neither a pad_token nor an eos_token, so batches cannot be padded. Set "
            "tokenizer.pad_token to a token of its vocabulary."
        )
    if conversational and getattr(processing_class, "chat_template", None) is None:
        raise ValueError(
            "The rows are conversations but the tokenizer has no chat template. Use the tokenizer of a chat model, set "
            "tokenizer.chat_template, or give prompt and responses as plain text."
        )
    if not conversational and processing_class.eos_token is None:
        raise ValueError("The tokenizer has no eos_token, which ends every plain-text response. Set one.")


def padding_id(processing_class: PreTrainedTokenizerBase) -> int:
    """Returns the id that fills batches: the pad token, else, as in TRL, the end token."""
    pad = processing_class.pad_token_id
    return int(processing_class.eos_token_id if pad is None else pad)


def joined(prompt: Text, response: Text, end: str) -> Text:
    """Prompt and response as one; plain text is closed by the end token, conversations by their template."""
    if isinstance(prompt, str) and isinstance(response, str):
        return prompt + response + ("" if response.endswith(end) else end)
    assert isinstance(prompt, list) and isinstance(response, list)
    return prompt + response


def token_ids(
    processing_class: PreTrainedTokenizerBase,
    text: Text,
    row: int,
    settings: dict[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> list[int]:
    """Returns the token ids of text or of messages, which go through the chat template; errors name the row."""
    with _as_it_was(processing_class):
        return _token_ids(processing_class, text, row, {**settings, "add_generation_prompt": add_generation_prompt})


def _token_ids(processing_class: PreTrainedTokenizerBase, text: Text, row: int, settings: dict[str, Any]) -> list[int]:
    if isinstance(text, list):
        try:
            encoded = processing_class.apply_chat_template(text, tokenize=True, return_dict=True, **settings)
        except Exception as error:  # templates are programs: they raise what they like
            roles = [message["role"] for message in text]
            raise ValueError(f"Row {row}: the chat template fails on the roles {roles}: {error}") from error
        return list(encoded["input_ids"])
    return list(processing_class(text=text)["input_ids"])


@contextlib.contextmanager
def _as_it_was(processing_class: PreTrainedTokenizerBase) -> Iterator[None]:
    """Puts back what a fast tokenizer keeps of the truncation and padding that it was called with last."""
    backend = getattr(processing_class, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    try:
        yield
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)  # type: ignore[union-attr]
        if padding is not None:
            backend.enable_padding(**padding)  # type: ignore[union-attr]
