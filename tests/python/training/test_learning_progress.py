"""Weights by learning progress between rounds: LPPO (arXiv 2507.06573)."""

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from peft import LoraConfig

import bpo
from bpo.training.weights.progress import by_progress, learning_progress
from tiny import scored_rows, tiny_llama
from trainers import QUIET

SETTINGS = {
    **QUIET,
    "num_train_epochs": 3,
    "learning_rate": 3e-2,
    "logging_steps": 1,
    "save_strategy": "epoch",
    "budget": 8,
    "select_config": {"sketch_dim": 64, "n_clusters": 3},
    "reselect_strategy": "epoch",
}


class Round:
    """A selection as far as learning progress reads it."""

    def __init__(self, margins, trained):
        """Margins of the pairs of each prompt, by its text; and the prompts of the pairs that are trained on."""
        names = list(margins)
        prompts = [at for at, name in enumerate(names) for _ in margins[name]]
        values = np.array([margin for name in names for margin in margins[name]])
        columns = {"logp_chosen": values - 7, "logp_rejected": 0 * values, "ref_logp_chosen": 0 * values - 7}
        self.pairs = pa.table({"prompt": prompts, **columns, "ref_logp_rejected": 0 * values})
        self.dataset = Dataset.from_dict({"prompt": trained, "bpo_prompt": [names.index(name) for name in trained]})


def test_progress_is_the_change_of_a_moving_average():
    rounds = [
        Round({"a": [0, 0], "b": [1, -1, 1, 1]}, ["a", "b", "a"]),
        Round({"b": [1, 1, 1, 1], "a": [2, -1], "c": [1, np.nan]}, ["c", "b"]),
        Round({"c": [-1], "a": [1, 2], "b": [1, -1, -1, -1]}, ["b", "a", "c", "a"]),
    ]
    assert learning_progress(rounds[:1], 0.8).tolist() == [0, 0, 0]
    assert learning_progress(rounds[:2], 0.8) == pytest.approx([0, 0.2 * (1 - 0.75)])
    b = 0.8 * 0.75 + 0.2
    # The second round trained on no pair of a, whose average is still that of the first.
    assert learning_progress(rounds, 0.8) == pytest.approx([0.2 * (0.25 - b), 0.2 * (1 - 0.5), 0.2 * (0 - 1), 0.1])
    assert learning_progress(rounds, 0.0) == pytest.approx([0.25 - 1, 0.5, -1, 0.5])


def test_weights_are_lppos_times_those_of_the_data():
    progress = np.array([0.0, 0.1, -1e3, 1e3])
    rows = Dataset.from_dict({"x": [0, 1, 2, 3]})
    found = by_progress(rows, progress, 8.0, "weight")
    both = by_progress(rows.add_column("w", [2.0, 3.0, 4.0, 0.5]), progress, 8.0, "w")
    assert found["weight"][:] == pytest.approx([1, 0.5 + 1 / (1 + np.exp(-0.8)), 0.5, 1.5])
    assert both["w"][:] == pytest.approx(np.array(found["weight"]) * [2, 3, 4, 0.5])


def test_a_training_weighs_its_later_rounds_and_goes_on_with_the_same(tokenizer, tmp_path):
    def trainer_of(output, **settings):
        return bpo.BPOTrainer(
            tiny_llama(tokenizer),
            args=bpo.BPOConfig(str(output), **{**SETTINGS, "learning_progress": 8.0, **settings}),
            train_dataset=scored_rows(5, 3),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )

    seen = []

    class Trainer(bpo.BPOTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(inputs.get("pair_weight"))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = trainer_of(tmp_path / "out")
    trainer.__class__ = Trainer
    trainer.train()
    assert len(trainer.selections) == 3 and seen[0] is None and seen[-1] is not None
    weights = np.array(trainer.train_dataset["weight"])
    progress = learning_progress(trainer.selections, 0.8)
    assert weights == pytest.approx(1 / (1 + np.exp(-8 * progress)) + 0.5)
    assert len(set(weights.tolist())) > 1 and "weight" not in trainer.selection.dataset.column_names
    assert set(np.concatenate([batch.numpy() for batch in seen[-4:]]).tolist()) <= set(
        weights.astype(np.float32).tolist()
    )
    logged = [entry["selection/learning_progress"] for entry in trainer.state.log_history if "selection/round" in entry]
    assert len(logged) == 2 and logged[-1] == pytest.approx(progress.mean(), rel=1e-3)
    again = trainer_of(tmp_path / "out")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert again.train_dataset["weight"][:] == trainer.train_dataset["weight"][:]
    with pytest.raises(ValueError, match="strategy='random' does not compute"):
        trainer_of(tmp_path / "random", strategy="random")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"learning_progress": 0}, "must be a finite number above 0"),
        ({"learning_progress_decay": 1.0}, "from 0 to below 1"),
        ({"reselect_strategy": "no"}, "learning_progress needs rounds"),
        ({"weight_column": None}, "weight_column must not be None"),
    ],
)
def test_what_cannot_be_weighted_is_refused(settings, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        bpo.BPOConfig(str(tmp_path), **{**SETTINGS, "learning_progress": 8.0, **settings})
