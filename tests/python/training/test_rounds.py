"""Rounds of selection within one training."""

import json
import os
import random
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback

import bpo
import bpo.responses.rowblocks
import job
from bpo.system.files import write_whole
from bpo.training.rounds import last_whole_checkpoint, load_rounds
from tiny import build_tokenizer, scored_rows, tiny_llama
from trainers import QUIET, weights_of

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))
ROWS = scored_rows(5, 3)
SMALL = {"sketch_dim": 64, "n_clusters": 3}
SETTINGS = {
    **QUIET,
    "num_train_epochs": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "budget": 8,  # of 15 pairs; 2 steps an epoch
    "select_config": SMALL,
}


def trainer_of(
    tokenizer, output, *, adapter=True, rows=ROWS, callbacks=None, peft=None, scorer=None, target=None, **settings
):
    settings = {**SETTINGS, **settings}
    torch.manual_seed(0)
    return bpo.BPOTrainer(
        tiny_llama(tokenizer),
        None if adapter else tiny_llama(tokenizer),
        bpo.BPOConfig(output_dir=str(output), **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", **(peft or {})) if adapter else None,
        callbacks=callbacks,
        scorer=scorer,
        target=target,
    )


def pairs_of(selection):
    return selection.dataset["bpo_pair"][:]


def trained(trainer, **kwargs):
    trainer.train(**kwargs)
    return trainer


class Watch(TrainerCallback):
    """What a training does: its steps, the round of each, and the rows that it sees."""

    def __init__(self):
        self.events = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.events.append((state.global_step, self.trainer.selection.seed - args.seed))

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.events.append("epoch")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reselect_strategy": "steps", "reselect_steps": 3}, [0, 0, 0, 1, 1, 1, 2, 2]),
        ({"reselect_strategy": "steps", "reselect_steps": 0.5}, [0, 0, 0, 0, 1, 1, 1, 1]),
        ({"reselect_strategy": "epoch"}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"reselect_strategy": "epoch", "reselect_epochs": 2}, [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_rounds_come_when_they_should(settings, expected, tokenizer, tmp_path):
    watch = Watch()
    watch.trainer = trainer_of(
        tokenizer, tmp_path / "out", store=str(tmp_path / "store"), callbacks=[watch], **settings
    )
    trainer = trained(watch.trainer)
    steps = [event for event in watch.events if event != "epoch"]
    assert steps == list(enumerate(expected)) and watch.events.count("epoch") == 4
    assert [selection.seed - 42 for selection in trainer.selections] == sorted(set(expected))
    assert trainer.state.global_step == trainer.state.max_steps == 8
    stores = [bpo.GradientStore.open(tmp_path / "store" / f"round-{number:03d}") for number in set(expected)]
    assert len({store.fingerprint["model"] for store in stores}) == len(stores)
    # The first round has the B-gradients of a fresh adapter, the others A and B of the one in training.
    assert all(store.fingerprint["features"] != stores[0].fingerprint["features"] for store in stores[1:])
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "selection/round" in entry}
    assert {step: entry["selection/round"] for step, entry in logged.items()} == {
        expected.index(number) + 1: number for number in set(expected) if number
    }
    assert all(0 <= entry["selection/kept"] <= 1 for entry in logged.values())
    assert pairs_of(trainer.selection) == trainer.train_dataset["bpo_pair"][:]


@pytest.mark.parametrize(
    ("adapter", "precompute"),
    [(True, False), (False, False), (False, True)],
    ids=["adapter", "model", "reference known"],
)
def test_a_round_is_a_selection_with_the_policy_as_it_is(adapter, precompute, tokenizer, tmp_path):
    settings = {"reselect_strategy": "epoch", "num_train_epochs": 2, "precompute_ref_log_probs": precompute}
    trainer = trainer_of(tokenizer, tmp_path, adapter=adapter, **settings)
    policies = []
    select_again = trainer._select_again
    reference = tiny_llama(tokenizer)

    def selecting(number):
        # The same by the public function, with a reference that runs.
        config = {**trainer._settings.to_dict(), "ref_model": reference}
        policies.append(
            bpo.select(
                trainer.model, ROWS, budget=8, config=config, processing_class=tokenizer, seed=43, progress=False
            )
        )
        assert all(not parameter.requires_grad or parameter.grad is None for parameter in trainer.model.parameters())
        select_again(number)

    trainer._select_again = selecting
    trained(trainer)
    first, second = trainer.selections
    (expected,) = policies
    assert pairs_of(second) == pairs_of(expected)
    for column in ("logp_chosen", "ref_logp_chosen", "ref_logp_rejected", "informativeness", "centrality"):
        assert np.allclose(second.pairs[column], expected.pairs[column], rtol=1e-3, atol=1e-4), column
    assert np.allclose(second.pairs["ref_logp_chosen"], first.pairs["logp_chosen"], atol=1e-4)
    assert not np.allclose(second.pairs["logp_chosen"], first.pairs["logp_chosen"], atol=1e-2)
    assert pairs_of(first) != pairs_of(second)
    if precompute:
        row = trainer.train_dataset[0]
        assert row["ref_chosen_logps"] == row["bpo_ref_logp_chosen"]


@pytest.mark.parametrize("resampled", [False, True])
def test_a_target_goes_through_rounds(resampled, tokenizer, tmp_path):
    """Each round chooses what has most influence on the target with the policy as it then is."""
    target = [
        {"prompt": "q", "chosen": "yes please", "rejected": "no"},
        {"prompt": "r", "chosen": "a", "rejected": "b"},
    ]
    settings = {"reselect_strategy": "epoch", "num_train_epochs": 2, "strategy": "less"}
    if resampled:
        settings |= {
            "resample": 3,
            "resample_config": {"max_new_tokens": 8, "keep": ["truncated"]},
            "scorer": by_length,
        }
    with pytest.raises(ValueError, match="needs a target"):
        trainer_of(tokenizer, tmp_path, **settings)
    trainer = trainer_of(tokenizer, tmp_path, target=target, **settings)
    expected = []
    select_again = trainer._select_again

    def select(model, **asked):
        config = {**trainer._settings.to_dict(), "ref_model": tiny_llama(tokenizer)}
        asked |= {"budget": 8, "strategy": "less", "target": target, "config": config, "processing_class": tokenizer}
        return bpo.select(model, ROWS, progress=False, **asked)

    def selecting(number):
        expected.append(select(trainer.model, seed=43))
        select_again(number)

    trainer._select_again = selecting
    trained(trainer)
    first, second = trainer.selections
    assert pairs_of(first) == pairs_of(select(tiny_llama(tokenizer)))
    assert second.pairs["alignment"].null_count == 0
    if not resampled:
        assert pairs_of(second) == pairs_of(expected[0])
        assert np.allclose(second.pairs["alignment"], expected[0].pairs["alignment"], atol=1e-3)
        assert not np.allclose(second.pairs["alignment"], first.pairs["alignment"], atol=1e-2)


def test_a_trained_adapter_under_mixed_precision(tokenizer, tmp_path):
    """The reference is the adapter as it was given, and selection has the precision of the weights."""
    model = adapter_as_given(tokenizer)
    args = bpo.BPOConfig(
        output_dir=str(tmp_path), **{**SETTINGS, "bf16": True, "reselect_strategy": "epoch", "num_train_epochs": 2}
    )
    trainer = bpo.BPOTrainer(model, args=args, train_dataset=ROWS, processing_class=tokenizer)
    trainer.train()
    first, second = trainer.selections
    assert first.pairs["ref_logp_chosen"] == second.pairs["ref_logp_chosen"] == first.pairs["logp_chosen"]
    trainer._select_again(2)
    model.delete_adapter("ref")
    model.save_pretrained(tmp_path / "adapter")
    alone = PeftModel.from_pretrained(tiny_llama(tokenizer), tmp_path / "adapter", is_trainable=True)
    expected = bpo.select(alone, ROWS, budget=8, config=SMALL, processing_class=tokenizer, progress=False)
    assert trainer.selection.pairs["logp_chosen"] == expected.pairs["logp_chosen"]


def test_breadth_is_decided_once(tokenizer, tmp_path):
    trainer = trained(trainer_of(tokenizer, tmp_path, breadth=3, reselect_strategy="epoch"))
    kept = [set(selection.dataset["bpo_prompt"]) for selection in trainer.selections]
    assert len(kept[0]) == 3 and kept == kept[:1] * 4


RESAMPLING = {
    "reselect_strategy": "steps",
    "reselect_steps": 2,
    "num_train_epochs": 2,
    "resample": 3,
    "resample_config": {"max_new_tokens": 6, "keep": ["truncated"]},
}

# With a block of work for each prompt.
RESAMPLING_BLOCKS = RESAMPLING | {"resample_config": RESAMPLING["resample_config"] | {"batch_size": 3}}


def by_length(prompt, response):
    """A score that the seed decides: longer, then later in the alphabet."""
    return len(response) + ord(response.strip()[0]) / 1e6


def adapter_as_given(tokenizer):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("kind", ["new adapter", "trained adapter", "model"])
def test_responses_are_sampled_anew(kind, tokenizer, tmp_path):
    reference = adapter_as_given(tokenizer) if kind == "trained adapter" else tiny_llama(tokenizer)
    rows = [{**row, "weight": 1.0 + index} for index, row in enumerate(ROWS)]
    trainer = bpo.BPOTrainer(
        adapter_as_given(tokenizer) if kind == "trained adapter" else tiny_llama(tokenizer),
        tiny_llama(tokenizer) if kind == "model" else None,
        bpo.BPOConfig(output_dir=str(tmp_path), breadth=4, **{**SETTINGS, **RESAMPLING}),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear") if kind == "new adapter" else None,
        scorer=by_length,
    )
    trained(trainer)
    first, second = trainer.selections
    assert trainer.state.log_history[2]["selection/kept"] == 0
    prompts = dict.fromkeys(first.dataset["prompt"])
    assert len(prompts) == 4 and prompts.keys() == set(second.dataset["prompt"])
    given = {response for row in ROWS for response in row["responses"]}
    for pair in second.dataset:
        assert pair["chosen"] not in given and pair["rejected"] not in given
        assert pair["bpo_score_chosen"] == by_length("", pair["chosen"]) > pair["bpo_score_rejected"]
        assert pair["weight"] == next(row["weight"] for row in rows if row["prompt"] == pair["prompt"])
    scored = next((tmp_path / "_rounds").glob("round-001-*-scores.jsonl"))
    expected = bpo.select(
        reference, str(scored), budget=len(second), config=SMALL, processing_class=tokenizer, progress=False
    )
    for column in ("ref_logp_chosen", "ref_logp_rejected"):
        assert np.allclose(second.pairs[column], expected.pairs[column], atol=1e-4)
    assert not np.allclose(second.pairs["logp_chosen"], expected.pairs["logp_chosen"], atol=1e-2)


def test_a_training_that_samples_goes_on_with_what_it_sampled(tokenizer, tmp_path):
    settings = {**RESAMPLING, "save_strategy": "steps", "save_steps": 1}
    calls = []

    def counting(prompt, response):
        calls.append(response)
        return by_length(prompt, response)

    whole = trained(trainer_of(tokenizer, tmp_path, scorer=counting, **settings))
    n_scored = len(calls)
    for checkpoint in (2, 3):  # before the round, and within it
        resumed = trainer_of(tokenizer, tmp_path, scorer=counting, **settings)
        trained(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
        assert torch.equal(weights_of(whole), weights_of(resumed))
    assert len(calls) == n_scored > 8


def test_rounds_leave_the_rest_of_the_training_alone(tokenizer, tmp_path):
    """A training in which no round comes, and one whose rounds choose the same pairs, is that of a trainer without."""
    short = {"num_train_epochs": 1}
    without = trained(trainer_of(tokenizer, tmp_path / "a", **short))
    never = trained(trainer_of(tokenizer, tmp_path / "b", reselect_strategy="steps", reselect_steps=100, **short))
    assert torch.equal(weights_of(without), weights_of(never))
    everything = {"budget": 1.0, "peft": {"lora_dropout": 0.2}, "disable_dropout": False, **short}
    plain = trained(trainer_of(tokenizer, tmp_path / "c", **everything))
    rounds = trained(trainer_of(tokenizer, tmp_path / "d", reselect_strategy="steps", reselect_steps=1, **everything))
    assert len(rounds.selections) == 4
    assert torch.equal(weights_of(plain), weights_of(rounds))
    rates = [[entry["learning_rate"] for entry in one.state.log_history if "loss" in entry] for one in (plain, rounds)]
    assert rates[0] == rates[1]


def test_selecting_leaves_random_states_alone(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path, reselect_strategy="epoch")

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    trainer._restore_rounds(None)
    trainer._select_again(1)
    assert states() == before
    assert trainer.model.training and any(parameter.requires_grad for parameter in trainer.model.parameters())


RESUMED = {"reselect_strategy": "steps", "reselect_steps": 3, "num_train_epochs": 3}


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """An uninterrupted training of six steps, and where its checkpoints are."""
    output = tmp_path_factory.mktemp("whole")
    return trained(trainer_of(tokenizer, output, save_strategy="steps", save_steps=1, **RESUMED)), output


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["before a round, between epochs", "at a round", "within a round"])
def test_resuming_ends_where_an_uninterrupted_training_does(stop, whole, tokenizer, tmp_path):
    whole, output = whole
    shutil.copytree(output / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    shutil.copytree(output / "_rounds", tmp_path / "_rounds")
    resumed = trained(trainer_of(tokenizer, tmp_path, **RESUMED), resume_from_checkpoint=True)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert [pairs_of(one) for one in whole.selections] == [pairs_of(one) for one in resumed.selections]
    losses = [
        {entry["step"]: entry["loss"] for entry in one.state.log_history if "loss" in entry} for one in (whole, resumed)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_resuming_trains_the_pairs_of_the_checkpoint(whole, tokenizer, tmp_path):
    """Even where selecting anew would choose others, as on a GPU that adds up in another order."""
    whole, output = whole
    shutil.copytree(output / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(output / "_rounds", tmp_path / "_rounds")
    checkpoint, elsewhere = str(tmp_path / "checkpoint-4"), tmp_path / "elsewhere"
    resumed = trainer_of(tokenizer, elsewhere, save_strategy="steps", save_steps=5, **RESUMED)
    other = bpo.select(None, ROWS, budget=8, strategy="random", progress=False)
    assert pairs_of(other) != pairs_of(whole.selections[0])
    resumed._train_on([(0, other)])
    trained(resumed, resume_from_checkpoint=checkpoint)
    assert torch.equal(weights_of(whole), weights_of(resumed))
    found = [(number, pairs_of(one)) for number, one, _ in load_rounds(elsewhere / "checkpoint-5")]
    assert found == [(number, pairs_of(one)) for number, one in enumerate(whole.selections)]

    manifest = tmp_path / "_rounds" / "round-001" / "selection.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(bpo.SelectionError, match=r"round-001 is not the selection that .*checkpoint-4 was trained on"):
        resumed.train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(tmp_path / "_rounds")
    with pytest.raises(FileNotFoundError, match="Keep the directory '_rounds' beside the checkpoints"):
        resumed.train(resume_from_checkpoint=checkpoint)


def train_rounds(output, resume):
    """A whole training in a process of its own, which notes its weights and pairs at the end."""
    settings = {"save_strategy": "steps", "save_steps": 1, "store": str(output / "store"), **RESUMED}
    trainer = trained(trainer_of(build_tokenizer(), output, **settings), resume_from_checkpoint=resume or None)
    found = [weights_of(trainer).tolist(), [pairs_of(one) for one in trainer.selections]]
    write_whole(output / "found.json", json.dumps(found))


def test_a_training_that_is_killed_at_random_ends_where_an_uninterrupted_one_does(tmp_path):
    context = job.context()

    def run(output, resume=False, seconds=None):
        process = context.Process(target=train_rounds, args=(output, resume))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode == 0

    server = context.Process(target=time.sleep, args=(0,))  # which starts it
    server.start()
    server.join()
    start = time.perf_counter()
    assert run(tmp_path / "whole")
    seconds = time.perf_counter() - start
    whole = (tmp_path / "whole" / "found.json").read_text()
    generator, kills, trainings, seen = np.random.default_rng(0), 0, 0, set()
    while kills < (TORTURE // 4 or 1):
        output = tmp_path / f"killed-{trainings}"
        while not run(output, last_whole_checkpoint(output) is not None, generator.uniform(0.2, 1.1) * seconds):
            kills += 1
            seen.add(last_whole_checkpoint(output) and Path(last_whole_checkpoint(output)).name)
        assert (output / "found.json").read_text() == whole
        trainings += 1
    print(f"{kills} kills of {trainings} trainings, which left {seen}")


def test_a_checkpoint_that_is_half_written_is_passed_over(whole, tokenizer, tmp_path):
    whole, output = whole
    for stop in (3, 4, 5):
        shutil.copytree(output / f"checkpoint-{stop}", tmp_path / f"checkpoint-{stop}")
    shutil.copytree(output / "_rounds", tmp_path / "_rounds")
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:-20])
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    resumed = trained(trainer_of(tokenizer, tmp_path, **RESUMED), resume_from_checkpoint=True)
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_rounds_may_begin_when_a_training_goes_on(tokenizer, tmp_path):
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    trained(trainer_of(tokenizer, tmp_path, **settings))
    for later in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    resumed = trainer_of(tokenizer, tmp_path, reselect_strategy="epoch", **settings)
    trained(resumed, resume_from_checkpoint=True)
    assert [number for number, _, _ in load_rounds(tmp_path / "checkpoint-4")] == [0, 1]
    assert len(resumed.selections) == 2


def test_stores_of_another_training_are_replaced(tokenizer, tmp_path):
    settings = {"reselect_strategy": "epoch", "num_train_epochs": 2, "store": str(tmp_path / "store")}
    seen = []
    for rate in (1e-3, 1e-2):
        trained(trainer_of(tokenizer, tmp_path / "out", learning_rate=rate, **settings))
        seen.append(
            [bpo.GradientStore.open(path).fingerprint["model"] for path in sorted((tmp_path / "store").iterdir())]
        )
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]


def test_weights_and_controls_go_through_rounds(tokenizer, tmp_path):
    rows = [{**row, "weight": 0.5 + index} for index, row in enumerate(ROWS)]
    trainer = trained(
        trainer_of(tokenizer, tmp_path, rows=rows, strategy="random", reselect_strategy="epoch", num_train_epochs=2)
    )
    first, second = trainer.selections
    assert pairs_of(first) != pairs_of(second)
    weights = dict(zip(trainer.train_dataset["prompt"], trainer.train_dataset["weight"], strict=True))
    assert weights.items() <= {row["prompt"]: row["weight"] for row in rows}.items()


WEIGHTED = [{**row, "weight": 1.0 + index} for index, row in enumerate(ROWS)]
EVERY_STEP = {"reselect_strategy": "steps", "reselect_steps": 1, "num_train_epochs": 1}


def train_together(rank, output, resampled=False):
    """One process of a training by several, which notes its weights and pairs."""
    settings = {"store": str(output / "store"), "per_device_train_batch_size": 1, **EVERY_STEP}
    scorer = None
    if resampled:
        settings |= RESAMPLING_BLOCKS
        make, calls = bpo.responses.rowblocks._make, output / f"made-{rank}"

        def make_once_all_are_at_work(*arguments):
            calls.touch()
            deadline = time.monotonic() + 300
            while not (output / f"made-{1 - rank}").exists():
                assert time.monotonic() < deadline, "the other process makes nothing"
                time.sleep(0.01)
            make(*arguments)

        def scorer(prompt, response):
            with (output / "scored").open("a") as file:
                file.write(f"{prompt} {response}\n")
            return by_length(prompt, response)

        bpo.responses.rowblocks._make = make_once_all_are_at_work
    trainer = trained(trainer_of(build_tokenizer(), output, rows=WEIGHTED, scorer=scorer, **settings))
    found = {"rounds": [pairs_of(one) for one in trainer.selections], "weights": weights_of(trainer).tolist()}
    (output / f"{rank}.json").write_text(json.dumps(found))


def test_several_processes_train_the_same_rounds_as_one(tokenizer, tmp_path):
    alone = trained(trainer_of(tokenizer, tmp_path / "alone", rows=WEIGHTED, **EVERY_STEP))
    job.finish(job.start(2, tmp_path, train_together, tmp_path), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["rounds"] == [pairs_of(one) for one in alone.selections]
    assert np.allclose(first["weights"], weights_of(alone), atol=1e-5)


def test_several_processes_sample_a_round_together(tokenizer, tmp_path):
    alone = trained(trainer_of(tokenizer, tmp_path / "alone", rows=WEIGHTED, scorer=by_length, **RESAMPLING_BLOCKS))
    job.finish(job.start(2, tmp_path, train_together, tmp_path, True), tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["rounds"] == [pairs_of(one) for one in alone.selections]
    assert np.allclose(first["weights"], weights_of(alone), atol=1e-5)
    scored = (tmp_path / "scored").read_text().splitlines()
    assert len(scored) == len(set(scored)) > 0


def test_a_round_of_fewer_pairs_is_spread_over_the_epoch(tokenizer, tmp_path):
    trainer = trainer_of(tokenizer, tmp_path, reselect_strategy="epoch")
    trainer.train_dataset = trainer.train_dataset.select(range(5))
    trainer._restore_rounds(None)
    seen, whole = (
        torch.cat(batch["input_ids"].chunk(2), dim=1)  # chosen beside rejected
        for batch in (trainer._pairs_of(torch.arange(8)), trainer.data_collator(list(trainer.train_dataset)))
    )
    counts = [(seen == row).all(dim=1).sum().item() for row in whole]
    assert sum(counts) == 8 and set(counts) == {1, 2}


def test_settings_that_rounds_cannot_have_are_refused(tokenizer, tmp_path):
    for settings, expected in (
        ({"reselect_strategy": "often"}, "must be 'no', 'steps' or 'epoch', got 'often'"),
        ({"reselect_strategy": "steps"}, "needs reselect_steps"),
        ({"reselect_strategy": "steps", "reselect_steps": 1.5}, r"a whole number of steps or .* got 1\.5"),
        ({"reselect_strategy": "epoch", "reselect_epochs": 0}, "at least 1, got 0"),
        ({"reselect_strategy": "epoch", "train_sampling_strategy": "group_by_length"}, "lengths change"),
        (
            {"reselect_strategy": "epoch", "select_config": {"preconditioner": "optimizer.pt"}},
            "does not go with preconditioner in select_config",
        ),
        ({"resample": 2}, "resample needs rounds"),
        (
            {"reselect_strategy": "epoch", "resample": 2, "scorer": by_length, "precompute_ref_log_probs": True},
            "resample needs a reference that runs over new responses",
        ),
        (
            {"reselect_strategy": "epoch", "target": ROWS, "precompute_ref_log_probs": True},
            "A target needs a reference that runs over its responses",
        ),
        (
            {"reselect_strategy": "epoch", "resample": 2, "scorer": by_length, "stated": True},
            "have no weights of the data's pairs",
        ),
        ({"reselect_strategy": "epoch", "resample": 2}, "needs a scorer"),
        ({"reselect_strategy": "epoch", "resample": 2, "resample_config": {"m": 3}}, "has m; it takes batch_size"),
        (
            {"reselect_strategy": "epoch", "strategy": "random", "precompute_ref_log_probs": True},
            "strategy='random' computes no log-probabilities",
        ),
    ):
        scorer, target = settings.pop("scorer", None), settings.pop("target", None)
        stated = [{"prompt": "p", "chosen": "a", "rejected": "b", "weight": 2.0}]
        rows = stated if settings.pop("stated", False) else ROWS
        with pytest.raises(ValueError, match=expected):
            bpo.BPOTrainer(
                tiny_llama(tokenizer),
                args=bpo.BPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **settings}),
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                ref_model=None if "precompute_ref_log_probs" in settings else tiny_llama(tokenizer),
                scorer=scorer,
                target=target,
            )
