"""Where saved models and adapters lie, and errors that name them."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

if TYPE_CHECKING:
    from collections.abc import Iterator


# What the loaders of damaged files raise, beside their own kinds of ValueError.
_DAMAGED = (
    SafetensorError,
    json.JSONDecodeError,
    UnicodeError,
    LookupError,
    AttributeError,
    EOFError,
    RecursionError,
    zipfile.BadZipFile,
)


def check_path(name: str) -> str:
    """Returns a model path with ``~`` expanded, or a hub id; fails early on a path that cannot be a model's.

    Raises:
        FileNotFoundError: No such directory, or no model in it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(name):
            raise FileNotFoundError(f"{name}: the directory holds no config.json, so it is not a saved model.")
    elif path.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such model directory.")
    return str(path) if path.is_dir() else name


def is_adapter(name: str) -> bool:
    """Whether a path holds a saved PEFT adapter."""
    return (Path(name).expanduser() / "adapter_config.json").is_file()


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Says which model could not be loaded, which the loader's own message does not.

    Raises:
        OSError: It is not there, or one of its files is damaged.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{name} is no local directory, or not a whole model, and the hub does not give it: {error}"
        ) from error
    except _DAMAGED as error:
        raise OSError(f"{name}: a file of the model is damaged: {type(error).__name__}: {error}") from error
    except Exception as error:
        if type(error) is not Exception:  # as tokenizers raises them
            raise
        raise OSError(f"{name}: a file of the model or its tokenizer is damaged: {error}") from error
