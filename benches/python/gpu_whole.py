"""The method as a whole on the card: part `whole` of benches/python/gpu.py."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import bpo
from gpu_setting import SHAPES, Card, Data, Measurement, failed
from table import Row

DEMO = Path(__file__).resolve().parents[2] / "demo"
ARMS = ("random", "bpo", "best_worst", "matching")
# As in the demo.
TRAINING = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "beta": 0.1,
    "max_length": 1024,
    "gradient_checkpointing": False,
    "bf16": False,
}


def material(card: Card, directory: Path) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]], int]:
    """Path of the model, rows to select from, rows held out, and the budget: the demo's, or tiny ones.

    Raises:
        RuntimeError: The package that carries the demo's model is not installed.
    """
    if not card.there:
        shape = SHAPES["tiny"]
        data = Data.make(card, shape, "demo", prompts=8)
        shape.build("cpu", torch.float32).save_pretrained(directory / "model")
        data.tokenizer.save_pretrained(directory / "model")
        return str(directory / "model"), data.rows[:6], data.rows[6:], 4
    sys.path.insert(0, str(DEMO))
    import models

    lines = (DEMO / "data" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for row in map(json.loads, lines):
        rows[row["split"]].append({key: row[key] for key in ("prompt", "responses", "scores")})
    return str(models.policy()), rows["train"], rows["heldout"], 60


def once(card: Card) -> Iterator[Row]:
    """Select, train with TRL, measure."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as directory:
        try:
            path, train, heldout, budget = material(card, Path(directory))
        except RuntimeError as error:
            yield Row("whole", "skipped", "", str(error)[:200])
            return
        config = bpo.SelectConfig(min_depth=0)  # not every prompt, for so few pairs
        start = card.now()
        selection = bpo.select(path, Dataset.from_list(train), budget=budget, config=config, progress=False)
        seconds = card.now() - start
        yield Row(f"bpo.select, {len(train)} prompts of the demo", f"{seconds:.1f} s", "", f"{len(selection)} pairs")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(card.device)
        tokenizer = AutoTokenizer.from_pretrained(path)
        evaluated = {"processing_class": tokenizer, "config": config, "progress": False}
        before = bpo.evaluate_preferences(model, heldout, **evaluated)
        trainer = DPOTrainer(
            model,
            args=DPOConfig(output_dir=directory, save_strategy="no", report_to="none", disable_tqdm=True, **TRAINING),
            train_dataset=selection.dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        )
        start = card.now()
        trainer.train()
        seconds = card.now() - start
        after = bpo.evaluate_preferences(trainer.model, heldout, reference=before, **evaluated)
        shown = f"{after.accuracy:.3f} ± {after.standard_error:.3f}"
        name = f"TRL on {len(selection)} pairs: accuracy on {after.n_pairs} held-out pairs"
        yield Row(name, shown, "before", f"{before.accuracy:.3f}; trained in {seconds:.1f} s")


def comparison(card: Card) -> Iterator[Row]:
    """bpo compare, with a seed more as long as there is time for one."""
    from bpo.selection.strategies.register import STRATEGIES

    with tempfile.TemporaryDirectory() as directory:
        try:
            path, train, heldout, budget = material(card, Path(directory))
        except RuntimeError as error:
            yield Row("comparison", "skipped", "", str(error)[:200])
            return
        rows = Path(directory) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in [*train, *heldout]))
        arms = [arm for arm in ARMS if arm in STRATEGIES][: card.choose(len(ARMS), 2)]
        config: dict[str, Any] = {
            "model": path,
            "dataset": str(rows),
            "heldout": 0.25,
            "budget": [budget],
            "arms": arms,
            "baseline": "random",
            "select": {"min_depth": 0},
            "training": TRAINING,
        }
        found, longest = None, 0.0
        for seeds in range(1, card.choose(100, 1) + 1):
            start = time.time()
            try:
                found = bpo.compare({**config, "seeds": seeds}, Path(directory) / "comparison", progress=False)
            except Exception as error:
                yield failed(f"comparison, {seeds} seeds", error)
                break
            longest = max(longest, time.time() - start)
            yield from _told(found)
            (card.output / "comparison.txt").write_text(found.summary() + "\n")
            if card.left < 1.3 * longest + 3:
                break


def _told(found: bpo.Comparison) -> Iterator[Row]:
    """One row an arm: its accuracy, and its difference from random."""
    for run, reason in found.failures.items():
        yield Row(f"comparison, {run}", "FAILED", "", reason[:200])
    for arm in found.results["arms"]:
        shown = f"{arm['measures']['accuracy']['mean']:.4f}"
        yield Row(f"comparison: accuracy of {arm['arm']}", shown, "", f"mean of {len(arm['seeds'])} seeds")
    for entry in found.results["differences"]:
        if entry["measure"] == "accuracy" and entry["family"] == "baseline":
            low, high, p_value = (math.nan if entry[key] is None else entry[key] for key in ("low", "high", "p_value"))
            interval = f"[{low:+.4f}, {high:+.4f}], p = {p_value:.3f}"
            name = f"comparison: {entry['arm']} less {entry['against']}"
            yield Row(name, f"{entry['mean']:+.4f}", "", interval)


def measurements() -> dict[str, Measurement]:
    """By name, the most important first."""
    return {"once": once, "comparison": comparison}
