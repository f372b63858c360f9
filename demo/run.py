"""The main job, end to end, on real responses of a real model.

First what the choice of pairs is worth: strategies compared on all prompts, from gradients that ship with the demo.
Then all of it on a few prompts: scored responses → breadth compression → gradient store → pair clusters → scores →
depth → DPO training with TRL → preference accuracy on held-out prompts, for the pairs that bpo chose and for as many
chosen at random.

Run `make demo`, or `python demo/run.py --help`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# No hub is needed: both models come from the package index. Asking for one would only wait for a network.
# Decided before the imports, which read it once.
if not any(argument.startswith("--model") for argument in sys.argv):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, ProgressCallback
from trl import DPOConfig, DPOTrainer

import bpo
from gradients import STORE, rows
from models import embedder, policy

HERE = Path(__file__).resolve().parent
ARMS = ("bpo", "random")
LORA_RANK = 8
BETA = 0.1


@dataclasses.dataclass(frozen=True)
class Size:
    """How much the demo does."""

    breadth: int | None  # prompts kept for selection; None for all
    budget: int | float  # pairs trained on, of each arm
    heldout: int | None  # prompts evaluated on; None for all
    heldout_responses: int  # of each of those
    epochs: int


# What fits into four minutes on two cores, and everything.
SHORT = Size(breadth=16, budget=32, heldout=24, heldout_responses=4, epochs=1)
FULL = Size(breadth=None, budget=0.1, heldout=None, heldout_responses=8, epochs=2)


def main() -> None:
    """Parses the arguments and runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="use all prompts (about an hour on 2 cores)")
    parser.add_argument("--model", help="any causal LM, path or hub id, in place of SmolLM2-135M-Instruct")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.path.relpath(HERE / "output")),
        help="folder for everything the demo leaves",
    )
    options = parser.parse_args()
    # Their bars and notes would bury the demo's own output.
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    warnings.formatwarning = lambda message, *_, **__: f"  {message}\n".replace("\n", "\n  ").rstrip(" ")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    started = time.perf_counter()

    size = FULL if options.full else SHORT
    model = options.model or str(policy(options.output / "models"))
    name = Path(model).name + ("-full" if options.full else "")
    output = options.output / name
    output.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        preview()
    train, heldout = load_data(size)
    heading(f"Model {Path(model).name}, {len(train)} prompts to choose from, {len(heldout)} held out")

    selections = {
        arm: choose(arm, model, train, size, options.seed, output, embedder(options.output / "models")) for arm in ARMS
    }
    print()
    print(selections["bpo"].summary())

    heading("Preference accuracy before training")
    model_key = weights_of(model)
    before_key = identity(model_key, heldout)
    before = evaluate(model, None, heldout, output / "before.npz", before_key)
    print(f"  {before.n_pairs} pairs of {before.n_prompts} held-out prompts")
    after = {}
    for arm, selection in selections.items():
        heading(f"DPO training on the {len(selection)} pairs chosen by {arm}")
        directory = output / arm
        settings = train_settings(size, options.seed)
        key = identity(model_key, settings, selection.dataset.to_list())
        if reusable(directory / "adapter", key):
            print(f"  adapter reused from {directory / 'adapter'}")
        else:
            fit(model, selection.dataset, directory / "adapter", settings, key)
        after[arm] = evaluate(directory / "adapter", before, heldout, directory / "after.npz", key + before_key)
    table(before, after, selections, output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\n{time.perf_counter() - started:.0f} s, peak memory {peak:.1f} GiB")


def preview() -> None:
    """Compares strategies on all prompts by the gradients that ship with the demo; no model runs."""
    heading("Which pairs are worth training on? Foretold from the gradients of 192 prompts, without training")
    arms = ["matching", "bpo", "best_worst", "random"]
    found = bpo.preview(STORE, rows(), budget=60, arms=arms, seeds=12)
    print(found.summary())


def load_data(size: Size) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the training and the held-out prompts with their scored responses, the latter thinned evenly."""
    rows = [json.loads(line) for line in (HERE / "data" / "responses.jsonl").read_text(encoding="utf-8").splitlines()]
    train = [row for row in rows if row["split"] == "train"]
    heldout = [row for row in rows if row["split"] == "heldout"]
    if size.heldout is not None:
        # Prompts stand in order of their kind, so an even stride keeps the kinds in proportion.
        heldout = [heldout[i] for i in np.linspace(0, len(heldout) - 1, size.heldout).round().astype(int)]
    for row in heldout:
        row["responses"] = row["responses"][: size.heldout_responses]
        row["scores"] = row["scores"][: size.heldout_responses]
    return train, heldout


def choose(
    arm: str, model: str, train: list[dict[str, Any]], size: Size, seed: int, output: Path, encoder: Path
) -> bpo.Selection:
    """Selects the pairs of one arm, and saves dataset and report."""
    heading(f"Selection: {arm}")
    store = output / "store"
    known = len(bpo.GradientStore.open(store)) if arm == "bpo" and (store / "manifest.json").exists() else 0
    if known:
        print(f"  {known} gradients reused from {store}")
    selection = bpo.select(
        model,
        Dataset.from_list(train).select_columns(["prompt", "responses", "scores"]),
        budget=size.budget,
        breadth=size.breadth,
        strategy=arm,
        store=store,
        config=bpo.SelectConfig(beta=BETA, lora_rank=LORA_RANK, embedder=str(encoder)),
        seed=seed,
    )
    selection.save(output / arm / "selection")
    selection.report(output / arm / "selection" / "report.html")
    return selection


def train_settings(size: Size, seed: int) -> dict[str, Any]:
    """Returns the DPO settings, the same for every arm."""
    return {
        "num_train_epochs": size.epochs,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "beta": BETA,
        "max_length": 1024,
        "seed": seed,
        "gradient_checkpointing": False,
        "bf16": False,
    }


def fit(model: str, dataset: Dataset, directory: Path, settings: dict[str, Any], key: str) -> None:
    """Trains a LoRA adapter with TRL and saves it with the key of what it was trained on."""
    scratch = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=DPOConfig(output_dir=str(scratch), save_strategy="no", report_to="none", disable_tqdm=False, **settings),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ProgressBar)
    trainer.train()
    trainer.save_model(str(scratch))
    (scratch / "key").write_text(key)
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)


class ProgressBar(ProgressCallback):
    """The bar of the trainer without its metrics, which the demo measures on held-out prompts instead."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """Prints nothing."""


def evaluate(
    model: str | Path,
    reference: bpo.PreferenceEvaluation | None,
    heldout: list[dict[str, Any]],
    cache: Path,
    key: str,
) -> bpo.PreferenceEvaluation:
    """Measures held-out preference accuracy, or reads what an earlier run measured on the same things."""
    if cache.is_file():
        with np.load(cache, allow_pickle=False) as stored:
            names = {field.name for field in dataclasses.fields(bpo.PreferenceEvaluation)}
            if str(stored["key"]) == key and names <= set(stored.files):
                print(f"  evaluation reused from {cache}")
                fields = {name: stored[name] for name in stored.files if name != "key"}
                return bpo.PreferenceEvaluation(
                    **{name: value if value.ndim else value.item() for name, value in fields.items()}
                )
    rows = [{name: row[name] for name in ("prompt", "responses", "scores")} for row in heldout]
    tokenizer = None
    if isinstance(model, Path):
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        model = AutoPeftModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    result = bpo.evaluate_preferences(
        model, rows, reference=reference, processing_class=tokenizer, config=bpo.SelectConfig(beta=BETA)
    )
    np.savez(cache, key=key, **dataclasses.asdict(result))
    return result


def weights_of(model: str) -> Any:
    """Returns what tells the weights of a local model apart without reading them; a hub id as it is."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    return [model, *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


def identity(*parts: Any) -> str:
    """Returns a hash by which a later run knows that nothing changed."""
    text = json.dumps([bpo.__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def reusable(directory: Path, key: str) -> bool:
    """Whether an adapter is there and was trained on the same things."""
    return (directory / "key").is_file() and (directory / "key").read_text() == key


def table(
    before: bpo.PreferenceEvaluation,
    after: dict[str, bpo.PreferenceEvaluation],
    selections: dict[str, bpo.Selection],
    output: Path,
) -> None:
    """Prints the result and where everything is."""
    heading("Result")
    columns = ["before", *after]
    results = [before, *after.values()]
    depths = ["", *(f"{selections[arm].depth[selections[arm].depth > 0].mean():.1f}" for arm in after)]
    lines = [
        ("pairs trained on", ["0", *(str(len(selections[arm])) for arm in after)]),
        ("prompts among them", ["0", *(str(int((selections[arm].depth > 0).sum())) for arm in after)]),
        ("mean depth", depths),
        ("held-out accuracy (implicit reward)", [f"{r.accuracy:.3f}" for r in results]),
        ("  standard error", ["", *(f"{r.standard_error:.3f}" for r in results[1:])]),
        ("  reward margin", [f"{r.margin:+.3f}" for r in results]),
        ("held-out accuracy (mean log-probability)", [f"{r.likelihood_accuracy:.3f}" for r in results]),
    ]
    print(f"  {'':<42}" + "".join(f"{column:>10}" for column in columns))
    for label, cells in lines:
        print(f"  {label:<42}" + "".join(f"{cell:>10}" for cell in cells))
    print("\n  Before training the policy is its own reference: every implicit reward is 0, accuracy one half.")
    print("  One split of a small set: a difference within two standard errors says nothing.")
    print(f"\nEverything is in {output}:")
    print("  bpo/selection/dataset      the chosen pairs, for trl dpo --dataset_name")
    print("  bpo/selection/report.html  what was chosen, to look at")
    print("  bpo/adapter                the trained adapter")
    print("  random/...                 the same for the random choice")
    print("  store                      the gradients, reused by the next run")


def heading(text: str) -> None:
    """Prints a stage's title."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
