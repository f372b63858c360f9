import warnings

import datasets
import numpy as np
import pyarrow.compute as pc
import pytest
import trl.cli
from transformers import TrainerCallback
from trl.scripts import dpo

import bpo
import job
from tiny import scored_rows, tiny_llama
from trainers import SHORT


@pytest.fixture(params=[False, True], ids=["standard", "conversational"])
def rows(request):
    return scored_rows(6, 4, conversational=request.param)


def test_bpo_trainer_selects_then_trains(model_path, rows, tmp_path):
    args = bpo.BPOConfig(
        output_dir=str(tmp_path),
        budget=12,
        breadth=0.5,
        store=str(tmp_path / "store"),
        select_config=bpo.SelectConfig(sketch_dim=64),
        **SHORT,
    )
    trainer = bpo.BPOTrainer(model_path, args=args, train_dataset=rows)
    assert len(trainer.selection) == 12 == len(trainer.train_dataset)
    result = trainer.train()
    assert result.global_step == 2 and result.training_loss > 0
    saved = bpo.Selection.load(tmp_path / "_selection")
    assert saved.dataset["chosen"][:] == trainer.selection.dataset["chosen"][:]
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "Breadth and Depth in Alignment](https://huggingface.co/papers/2411.10914)" in card
    assert trainer.selection.summary() in card and "wang2025bpo" in card


def test_bpo_trainer_takes_a_peft_config_and_a_model_object(tokenizer, rows, tmp_path):
    from peft import LoraConfig

    args = bpo.BPOConfig(output_dir=str(tmp_path), budget=8, strategy="uniform", **SHORT)
    trainer = bpo.BPOTrainer(
        tiny_llama(tokenizer),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    assert len(trainer.selection) == 8


def test_bpo_trainer_says_what_is_missing(model_path, rows, tmp_path):
    with pytest.raises(ValueError, match="budget"):
        bpo.BPOTrainer(model_path, args=bpo.BPOConfig(output_dir=str(tmp_path), **SHORT), train_dataset=rows)
    args = bpo.BPOConfig(output_dir=str(tmp_path), budget=10, loss_type=["aot"], **SHORT)
    with pytest.raises(ValueError, match="'aot' cannot be selected for"):
        bpo.BPOTrainer(model_path, args=args, train_dataset=rows)


@pytest.mark.parametrize("kind", [dict, lambda **fields: bpo.SelectConfig(**fields)])
def test_settings_that_cannot_be_saved_are_refused(kind, tmp_path):
    for given, expected in (
        ({"prompt_embeddings": [[0.0], [1.0]]}, "the name of a column"),
        ({"embedder": Encoder()}, "a path"),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(given))} must be {expected}.*saved as JSON"):
            bpo.BPOConfig(output_dir=str(tmp_path), budget=10, select_config=kind(**given), **SHORT)


class Encoder:
    """Stands for a loaded sentence encoder."""

    def encode(self, texts):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"ld_alpha": 0.5}, "ld_alpha=0.5: it weights the tokens of a response by the length of the other"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing must be below 0.5"),
        ({"select_config": {"beta": 0.7}}, "select_config has beta=0.7, but BPOConfig has 0.1"),
        (
            {"select_config": {"order": "easiest_first"}},
            "order='easiest_first', which train_sampling_strategy='random'",
        ),
        ({"select_config": {"loss_type": "ipo"}}, r"select_config has loss_type=\['ipo'\], but BPOConfig has"),
    ],
)
def test_bpo_trainer_refuses_losses_that_it_does_not_select_for(model_path, tmp_path, setting, expected):
    args = bpo.BPOConfig(output_dir=str(tmp_path), budget=10, **setting, **SHORT)
    with pytest.raises(ValueError, match=expected):
        bpo.BPOTrainer(model_path, args=args, train_dataset=scored_rows(4, 3))


def test_bpo_trainer_selects_for_the_loss_that_it_trains(model_path, tmp_path):
    loss = {
        "loss_type": ["robust", "discopop", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "beta": 0.3,
        "label_smoothing": 0.1,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
        "discopop_tau": 0.1,
        "use_weighting": True,
        "ld_alpha": 1.0,  # weights of one: none
    }
    # TRL itself cannot weight the sft loss of more than one pair at a time.
    settings = {**SHORT, "per_device_train_batch_size": 1}
    args = bpo.BPOConfig(output_dir=str(tmp_path), budget=8, select_config={"sketch_dim": 64}, **loss, **settings)
    trainer = bpo.BPOTrainer(model_path, args=args, train_dataset=scored_rows(4, 3))
    assert {**trainer.selection.config, "ld_alpha": 1.0}.items() >= loss.items()
    trainer.train()


def test_bpo_trainer_evaluates_scored_responses_and_loads_as_trl_does(model_path, tmp_path):
    args = bpo.BPOConfig(
        output_dir=str(tmp_path),
        budget=8,
        store=str(tmp_path / "store"),
        model_init_kwargs={"dtype": "bfloat16"},
        **SHORT,
    )
    trainer = bpo.BPOTrainer(
        model_path, args=args, train_dataset=scored_rows(4, 3), eval_dataset=scored_rows(2, 3, seed=1)
    )
    assert len(trainer.eval_dataset) == 6
    assert bpo.GradientStore.open(tmp_path / "store").fingerprint["dtype"] == "bfloat16"
    with pytest.raises(TypeError, match="ref_model must be a model object"):
        bpo.BPOTrainer(model_path, "reference", args=args, train_dataset=scored_rows(4, 3))


def renamed(rows):
    return [{"question" if name == "prompt" else name: value for name, value in row.items()} for row in rows]


class Logs(TrainerCallback):
    """Keeps what every report_to is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


def test_bpo_trainer_reads_a_split_and_logs_what_it_selected(model_path, tmp_path):
    """A generator as a target would be gone after the first round; figures go to whatever reports."""
    asked = {"split": "train_prefs", "columns": '{"prompt": "question"}', "report_to": "none"}
    settings = {
        **SHORT,
        **asked,
        "logging_steps": 1,
        "max_steps": 4,
        "reselect_strategy": "steps",
        "reselect_steps": 2,
    }
    logs = Logs()
    preferred = [{"question": "One?", "chosen": "red", "rejected": "tea", "id": 1}]
    trainer = bpo.BPOTrainer(
        model_path,
        args=bpo.BPOConfig(str(tmp_path), budget=8, select_config={"sketch_dim": 64}, **settings),
        train_dataset=datasets.DatasetDict(train_prefs=datasets.Dataset.from_list(renamed(scored_rows(4, 3)))),
        eval_dataset={"one": renamed(scored_rows(2, 3)), "two": datasets.Dataset.from_list(preferred)},
        target=iter(renamed(scored_rows(2, 2, seed=3))),
        callbacks=[logs],
    )
    assert {name: len(part) for name, part in trainer.eval_dataset.items()} == {"one": 6, "two": 1}
    assert trainer.eval_dataset["two"]["prompt"][0] == "One?" and trainer.selection.provenance["split"] == "train_prefs"
    trainer.train()
    told = {step: entry for step, entry in logs.logs if "selection/pairs" in entry}
    assert list(told) == [1, 3]
    for entry, selection in zip(told.values(), trainer.selections, strict=True):
        kept = selection.pairs.filter(pc.equal(selection.pairs["fate"], "selected"))
        assert (entry["selection/pairs"], entry["selection/prompts"]) == (8, (selection.depth > 0).sum())
        assert entry["selection/mean_depth"] == 8 / entry["selection/prompts"]
        assert entry["selection/score_gap"] == pytest.approx(np.mean(kept["score_gap"]))
        assert entry["selection/longer_share"] == selection.lengths()["kept"]["longer_share"]
        assert entry["selection/clusters"] == len(set(kept["cluster"].to_pylist()))
        assert -1 <= entry["selection/centrality"] <= 1 and "loss" in entry
    assert "selection/round" not in told[1] and told[3]["selection/round"] == 1
    with pytest.raises(ValueError, match="no split 'train'"):
        bpo.BPOTrainer(
            model_path,
            args=bpo.BPOConfig(str(tmp_path), budget=8, **SHORT),
            train_dataset=datasets.DatasetDict(test=datasets.Dataset.from_list(scored_rows(4, 3))),
        )


@pytest.mark.parametrize("known_reference", [False, True])
def test_bpo_trainer_evaluates_what_it_is_given_as_its_eval_dataset(model_path, tokenizer, tmp_path, known_reference):
    """Scored rows, preference rows, and a mapping of names to them."""
    heldout = datasets.Dataset.from_list(scored_rows(3, 3, seed=1))
    settings = {**SHORT, "precompute_ref_log_probs": known_reference}
    trainer = bpo.BPOTrainer(
        model_path,
        tiny_llama(tokenizer),
        args=bpo.BPOConfig(str(tmp_path), budget=6, strategy="random", **settings),
        train_dataset=scored_rows(4, 3),
        eval_dataset={"held": heldout, "train": scored_rows(4, 3)},
    )
    trainer.train()
    expected = trainer.evaluate()
    assert expected["eval_held_loss"] != expected["eval_train_loss"]
    pairs = bpo.select(None, heldout, budget=1.0, strategy="random", progress=False).dataset
    pairs = pairs.select_columns(["prompt", "chosen", "rejected"])
    for given in (heldout, list(heldout), pairs):
        assert trainer.evaluate(given)["eval_loss"] == expected["eval_held_loss"]
    found = trainer.evaluate({"one": heldout, "two": scored_rows(4, 3)}, metric_key_prefix="x")
    assert (found["x_one_loss"], found["x_two_loss"]) == (expected["eval_held_loss"], expected["eval_train_loss"])
    assert trainer.predict(list(heldout)).metrics["test_loss"] == expected["eval_held_loss"]


def test_bpo_trainer_refuses_an_output_within_its_store(model_path, tmp_path):
    for store in (tmp_path, tmp_path / "out"):
        args = bpo.BPOConfig(str(tmp_path / "out"), budget=6, store=str(store), **SHORT)
        with pytest.raises(ValueError, match=r"output_dir .* lies within store"):
            bpo.BPOTrainer(model_path, args=args, train_dataset=scored_rows(4, 3))


def test_selected_dataset_trains_through_the_trl_command(model_path, rows, tmp_path):
    """Conversations through the program, which starts another one; text through its script, in this process."""
    selection = bpo.select(model_path, rows, budget=8, config=bpo.SelectConfig(sketch_dim=64), progress=False)
    selection.save(tmp_path / "selection")
    options = [
        *("--dataset_name", str(tmp_path / "selection" / "dataset")),
        *("--model_name_or_path", model_path),
        *("--output_dir", str(tmp_path / "out")),
        *("--max_steps", "1", "--report_to", "none", "--bf16", "False", "--use_cpu", "True"),
        *("--per_device_train_batch_size", "2", "--save_strategy", "no"),
    ]
    if isinstance(rows[0]["prompt"], str):
        dpo.main(*dpo.make_parser().parse_args_and_config(options, fail_with_unknown_args=False))
    else:
        process = job.program(trl.cli.main, ["trl", "dpo", *options], output=tmp_path)
        process.start()
        process.join()
        assert process.exitcode == 0, (tmp_path / "stderr").read_text()[-2000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("truncation", [{"max_length": None}, {"max_length": 8, "truncation_mode": "keep_end"}])
def test_bpo_trainer_cuts_where_it_selected(model_path, tmp_path, truncation):
    rows = scored_rows(4, 3)
    args = bpo.BPOConfig(output_dir=str(tmp_path), budget=8, **truncation, **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = bpo.BPOTrainer(model_path, args=args, train_dataset=rows)
    longest = max(trainer.selection.pairs["length_chosen"].to_pylist())
    batch = trainer.data_collator(list(trainer.train_dataset))
    kept = batch["completion_mask"][: len(batch["completion_mask"]) // 2].sum(dim=1).tolist()
    assert kept == trainer.selection.dataset["bpo_length_chosen"][:]
    assert longest == 8 if truncation["max_length"] else longest > 8
    assert trainer.train().training_loss > 0


def test_evaluation_measures_what_trl_measures(tokenizer, tmp_path):
    """Margin and accuracy of TRL's own evaluation, also where a response starts elsewhere in another pair."""
    from trl import DPOConfig, DPOTrainer

    model, reference = tiny_llama(tokenizer), tiny_llama(tokenizer, initializer_range=0.25)
    merging = [
        {"prompt": "one re", "chosen": "d green", "rejected": " two"},
        {"prompt": "one re", "chosen": " blue", "rejected": " two"},
    ]
    stated = bpo.select(None, scored_rows(3, 3), budget=1.0, strategy="random", progress=False).dataset
    rows = datasets.Dataset.from_list(merging + stated.select_columns(["prompt", "chosen", "rejected"]).to_list())
    args = DPOConfig(output_dir=str(tmp_path), per_device_eval_batch_size=1, **SHORT)
    trainer = DPOTrainer(
        model, ref_model=reference, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    measured = trainer.evaluate()
    with pytest.warns(UserWarning, match="not a prefix"):
        before = bpo.evaluate_preferences(reference, rows, processing_class=tokenizer, progress=False)
        after = bpo.evaluate_preferences(model, rows, reference=before, processing_class=tokenizer, progress=False)
    assert after.n_pairs == len(rows) == 11
    assert after.margin == pytest.approx(measured["eval_rewards/margins"], abs=1e-6)
    assert after.accuracy == pytest.approx(measured["eval_rewards/accuracies"])


def test_evaluation_rewards_what_training_taught(tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    model, rows = tiny_llama(tokenizer), scored_rows(6, 4)
    before = bpo.evaluate_preferences(model, rows, processing_class=tokenizer, progress=False)
    assert before.accuracy == 0.5 and before.margin == 0 and before.n_pairs == 36
    selection = bpo.select(None, rows, budget=1.0, strategy="random", progress=False)
    args = DPOConfig(output_dir=str(tmp_path), learning_rate=3e-3, **{**SHORT, "max_steps": 40})
    DPOTrainer(
        model,
        ref_model=tiny_llama(tokenizer),
        args=args,
        train_dataset=selection.dataset,
        processing_class=tokenizer,
    ).train()
    after = bpo.evaluate_preferences(model, rows, reference=before, processing_class=tokenizer, progress=False)
    assert after.accuracy > 0.8 and after.margin > 0
    assert 0 < after.standard_error < 0.2
    with pytest.raises(ValueError, match="evaluate both on the same data"):
        bpo.evaluate_preferences(model, rows[::-1], reference=before, processing_class=tokenizer, progress=False)
