"""Whole comparisons on a tiny model: killed and resumed, with runs and workers that fail, and every bad setting."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

import bpo
import job
from bpo.cli.main import main
from bpo.evidence.compare.config import CompareConfig
from bpo.evidence.compare.yaml_file import read_yaml
from bpo.evidence.win_rates import compare_responses
from bpo.selection.strategies.register import STRATEGIES
from bpo.system.processes import Workers
from bpo.training.dpo import dpo_config, train_on_pairs
from pages import check
from tiny import scored_rows

TRAINING = {
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "gradient_checkpointing": False,
    "peft": {"r": 2, "target_modules": "all-linear"},
}


@pytest.fixture(scope="module")
def settings(model_path, tmp_path_factory):
    """A configuration as a file would have it."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in scored_rows(12, 4)))
    return {
        "model": model_path,
        "dataset": str(data),
        "seeds": 2,
        "budget": 10,
        "arms": ["bpo", "random"],
        "select": {"sketch_dim": 64, "lora_rank": 2},
        "training": TRAINING,
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A finished comparison; tests work on copies."""
    output = tmp_path_factory.mktemp("comparison") / "out"
    return bpo.compare(settings, output, progress=False)


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished.output, tmp_path / "copy")


def runs_of(output):
    return {path.name: json.loads(path.read_text()) for path in sorted((output / "runs").glob("*.json"))}


def without_times(results):
    return json.loads(json.dumps(results), object_hook=lambda item: {k: v for k, v in item.items() if k != "seconds"})


def test_arms_share_their_splits(finished):
    runs = runs_of(finished.output)
    assert sorted(runs) == [f"seed{seed}-{arm}-10.json" for seed in (0, 1) for arm in ("bpo", "random")]
    for seed in (0, 1):
        bpo_run, random_run = runs[f"seed{seed}-bpo-10.json"], runs[f"seed{seed}-random-10.json"]
        assert bpo_run["heldout_pairs"] == random_run["heldout_pairs"]
        assert len(bpo_run["pairs"]) == len(random_run["pairs"]) == 10
        # 12 prompts of 6 pairs: no prompt is on both sides.
        held = {pair // 6 for pair in bpo_run["heldout_pairs"]}
        assert len(held) == 3
        assert not held & {pair // 6 for pair in bpo_run["pairs"] + random_run["pairs"]}
    assert runs["seed0-bpo-10.json"]["heldout_pairs"] != runs["seed1-bpo-10.json"]["heldout_pairs"]


def test_results_say_what_the_runs_say(finished):
    runs, results = runs_of(finished.output), finished.results
    accuracies = {name: np.mean(run["correct"]) for name, run in runs.items()}
    arm = next(arm for arm in results["arms"] if arm["arm"] == "bpo")
    expected = [accuracies[f"seed{seed}-bpo-10.json"] for seed in (0, 1)]
    assert arm["measures"]["accuracy"]["values"] == pytest.approx(expected)
    assert arm["measures"]["accuracy"]["mean"] == pytest.approx(np.mean(expected))
    difference = next(
        entry for entry in results["differences"] if (entry["measure"], entry["family"]) == ("accuracy", "baseline")
    )
    assert (difference["arm"], difference["against"]) == ("bpo", "random")
    each = [accuracies[f"seed{seed}-bpo-10.json"] - accuracies[f"seed{seed}-random-10.json"] for seed in (0, 1)]
    assert difference["values"] == pytest.approx(each)
    # Nadeau and Bengio: a quarter of the prompts is held out.
    assert difference["standard_error"] == pytest.approx(np.std(each, ddof=1) * math.sqrt(1 / 2 + 1 / 3))
    untrained = results["arms"][0]
    assert untrained["arm"] == "untrained"
    assert untrained["measures"]["accuracy"]["values"] == [0.5, 0.5]
    assert untrained["measures"]["likelihood_accuracy"]["mean"] != 0.5
    assert results["description"]["seconds"]["gradients"] > 0
    assert json.loads((finished.output / "results.json").read_text()) == results


def test_report_has_its_figures(finished, capsys):
    page = finished.report.read_text()
    assert check(page).all("h2")[0]["text"] == "In words" and page.count("<svg") == 4
    assert "bpo − random" in page
    assert "Nadeau" in page
    names = sorted(path.name for path in (finished.output / "figures").iterdir())
    assert names == [
        f"{name}.{kind}" for name in ("accuracy", "agreement", "costs", "differences") for kind in ("png", "svg")
    ]
    text = finished.summary()
    assert main(["show", str(finished.output)]) == 0
    assert capsys.readouterr().out == text + "\n"
    assert "bpo − random" in text
    assert "80 % power" in text


def pair_features(store, rows):
    candidates = bpo.read_candidates(rows)
    h = store.sketches(store.rows_of_responses(candidates.response_ids)[0])[candidates.pairs].astype(np.float64)
    return h[:, 0] - h[:, 1]


def ranked_rightly(x, heldout):
    """Share of held-out pairs that a logistic regression on unit features ranks rightly, by scikit-learn."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    model = LogisticRegression(fit_intercept=False, tol=1e-8)
    model.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)), sample_weight=np.full(2 * len(x), 0.5))
    return np.mean(heldout @ model.coef_[0] > 0)


def test_the_linear_regime_foretells_a_run_from_the_store(finished, settings):
    runs = runs_of(finished.output)
    (entry,) = finished.results["agreement"]
    features = pair_features(bpo.GradientStore.open(finished.output / "store"), settings["dataset"])
    assert [(run["seed"], run["arm"]) for run in entry["runs"]] == [(s, a) for s in (0, 1) for a in ("bpo", "random")]
    for told in entry["runs"]:
        run = runs[f"seed{told['seed']}-{told['arm']}-10.json"]
        right = ranked_rightly(features[run["pairs"]], features[run["heldout_pairs"]])
        assert told["linearised_accuracy"] == pytest.approx(right, abs=1.5 / len(run["heldout_pairs"]))
        assert told["accuracy"] == pytest.approx(np.mean(run["correct"]))
    each = np.array([[run["linearised_accuracy"], run["accuracy"]] for run in entry["runs"]]).reshape(2, 2, 2)
    within = (each - each.mean(axis=1, keepdims=True)).reshape(-1, 2)
    expected = spearmanr(*within.T).statistic if np.ptp(within, axis=0).all() else None
    assert entry["correlation_of_runs"] == (None if expected is None else pytest.approx(expected))
    assert "with the linearised one" in finished.summary()


def test_it_foretells_held_out_data_of_its_own_that_the_store_holds(finished, settings, tmp_path):
    rows = scored_rows(12, 4)
    store = finished.output / "store"
    config = {
        **settings,
        "dataset": rows[:9],
        "heldout": rows[9:],
        "seeds": [3],
        "arms": ["random"],
        "store": str(store),
    }
    comparison = bpo.compare(config, tmp_path / "out", progress=False)
    ((told,),) = (entry["runs"] for entry in comparison.results["agreement"])
    pairs = runs_of(comparison.output)["seed3-random-10.json"]["pairs"]
    opened = bpo.GradientStore.open(store)
    right = ranked_rightly(pair_features(opened, rows[:9])[pairs], pair_features(opened, rows[9:]))
    assert told["linearised_accuracy"] == pytest.approx(right, abs=1.5 / 18)
    config["heldout"] = rows[9:] + scored_rows(2, 4, seed=9)
    assert not bpo.compare(config, tmp_path / "other", progress=False).results["agreement"]


def test_a_run_is_what_its_parts_give(finished, settings, tokenizer, tmp_path):
    """The same selection, training and evaluation, by hand."""
    run = runs_of(finished.output)["seed1-random-10.json"]
    config = bpo.SelectConfig()
    candidates = bpo.read_candidates(settings["dataset"])

    def rows(pairs):
        return [
            {
                "prompt": candidates.prompts[candidates.prompt_of_pair[pair]],
                "chosen": candidates.responses[candidates.pairs[pair, 0]],
                "rejected": candidates.responses[candidates.pairs[pair, 1]],
            }
            for pair in pairs
        ]

    policy = train_on_pairs(
        settings["model"],
        Dataset.from_list(rows(run["pairs"])),
        dpo_config(TRAINING, str(tmp_path), 1),
        peft_config=LoraConfig(**TRAINING["peft"], task_type="CAUSAL_LM"),
    )
    held = rows(run["heldout_pairs"])
    reference = bpo.evaluate_preferences(settings["model"], held, config=config, progress=False)
    result = bpo.evaluate_preferences(
        policy, held, reference=reference, processing_class=tokenizer, config=config, progress=False
    )
    assert result.correct.tolist() == run["correct"]
    assert result.margin == pytest.approx(run["measures"]["margin"], rel=1e-3)


def test_killed_and_resumed_it_gives_the_same(finished, settings, tmp_path):
    """The whole program, once a run is there."""
    file, output = tmp_path / "compare.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(settings))
    process = job.command(["compare", file, "--output", output])
    process.start()
    while not list(output.glob("runs/seed*.json")) and process.is_alive():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in (output / "runs").glob("seed*.json")}
    assert 0 < len(there) < 4
    resumed = bpo.compare(file, output, progress=False)
    assert not resumed.failures
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert without_times(resumed.results) == without_times(finished.results)


def test_more_seeds_and_arms_are_added(copied, settings):
    before = {path: path.stat().st_mtime_ns for path in (copied / "runs").iterdir()}
    more = {**settings, "seeds": 3, "arms": ["bpo", "random", {"name": "again", "strategy": "random"}]}
    comparison = bpo.compare(more, copied, progress=False)
    assert comparison.results["n_runs"] == 9
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The same pairs as random by another name: trained once.
    runs = runs_of(copied)
    for seed in range(3):
        one, other = runs[f"seed{seed}-again-10.json"], runs[f"seed{seed}-random-10.json"]
        assert one["same_as"] == "random"
        assert one["correct"] == other["correct"]
    assert "the same pairs as random" in comparison.report.read_text()


def test_a_run_that_fails_loses_no_other(settings, tmp_path, capsys):
    """Uniform depth is to keep all 9 prompts, which a budget of 5 does not allow."""
    file, output = tmp_path / "compare.yaml", tmp_path / "out"
    uniform = {"name": "uniform", "strategy": "uniform", "select": {"min_depth": 1}}
    changed = {**settings, "seeds": [7], "budget": [5, 10], "arms": [uniform, "random"]}
    file.write_text(yaml.safe_dump(changed))
    assert main(["compare", str(file), "--output", str(output)]) == 1
    assert sorted(runs_of(output)) == ["seed7-random-10.json", "seed7-random-5.json", "seed7-uniform-10.json"]
    printed = capsys.readouterr().out
    assert "seed7-uniform-5" in printed
    assert "below the 9 prompts" in printed
    assert "Traceback" in (output / "errors" / "seed7-uniform-5.txt").read_text()
    assert "below the 9 prompts" in (output / "report.html").read_text()


class Bomb:
    """A task whose process dies over it."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_process_that_dies_is_replaced():
    tasks = [Bomb(), "2 + 2"]
    with Workers(eval, 1) as workers:
        answers = dict(workers.each(tasks))
    assert answers == {tasks[0]: "The process of the run ended with status 3", "2 + 2": 4}


def test_a_second_data_set_is_held_out(settings, tmp_path):
    """Its prompts are the same for every seed, and are not trained on."""
    rows = scored_rows(12, 4)
    config = {
        **settings,
        "dataset": rows,
        "heldout": rows[:3] + scored_rows(2, 4, seed=9),
        "arms": ["margin", "random"],
        "evaluate": {"max_pairs_per_prompt": 4, "bf16": True},
    }
    with pytest.warns(UserWarning, match="3 prompts of dataset are in heldout"):
        comparison = bpo.compare(config, tmp_path / "out", progress=False)
    about = comparison.results["description"]
    assert (about["n_train_prompts"], about["n_heldout_prompts"], about["n_heldout_pairs"]) == (9, 5, 20)
    assert about["heldout_share"] is None
    difference = comparison.results["differences"][0]
    low, high = difference["bootstrap"]
    assert low <= difference["mean"] <= high
    assert difference["standard_error"] == pytest.approx(np.std(difference["values"], ddof=1) / math.sqrt(2))
    assert "bootstrap" in comparison.report.read_text()
    runs = runs_of(comparison.output)
    assert runs["seed0-margin-10.json"]["heldout_pairs"] == runs["seed1-random-10.json"]["heldout_pairs"]


def test_breadth_by_embeddings_of_the_data(settings, tmp_path):
    """An arm that compresses breadth reads the embeddings of a column, also of the prompts of a split."""
    rows = [{**row, "vector": [math.cos(i), math.sin(i)]} for i, row in enumerate(scored_rows(12, 4))]
    arms = ["random", {"name": "narrow", "strategy": "uniform", "breadth": 5}]
    config = {**settings, "dataset": rows, "seeds": [0], "arms": arms, "select": {"prompt_embeddings": "vector"}}
    comparison = bpo.compare(config, tmp_path / "out", progress=False)
    assert not comparison.failures
    assert runs_of(comparison.output)["seed0-narrow-10.json"]["n_prompts"] == 5
    with pytest.raises(ValueError, match="'vectors' is no column"):
        bpo.compare({**config, "select": {"prompt_embeddings": "vectors"}}, tmp_path / "other")
    with pytest.raises(ValueError, match="must be the name of a column"):
        bpo.compare({**config, "select": {"prompt_embeddings": np.eye(12)}}, tmp_path / "other")


def by_hand(settings, rows, output, seed):
    """Trains on rows and evaluates on those of a run, without the harness."""
    return train_on_pairs(
        settings["model"],
        Dataset.from_list(rows),
        dpo_config(TRAINING, str(output), seed),
        peft_config=LoraConfig(**TRAINING["peft"], task_type="CAUSAL_LM"),
    )


def test_pairs_are_trained_with_their_weights_and_the_way_length_control_turns_them(settings, tokenizer, tmp_path):
    """Arms of all pairs are two trainings where one of them turns pairs; both train with the weights of the data."""
    noise = np.random.default_rng(0).normal(size=(12, 4))
    rows = [
        {
            **row,
            "weight": 0.25 + index % 3,
            "scores": [len(text) + 2 * e for text, e in zip(row["responses"], more, strict=True)],
        }
        for index, (row, more) in enumerate(zip(scored_rows(12, 4), noise, strict=True))
    ]
    arms = ["random", {"name": "controlled", "strategy": "random", "select": {"length_control": "residual"}}]
    config = {**settings, "dataset": rows, "seeds": [1], "budget": 1.0, "arms": arms}
    runs = runs_of(bpo.compare(config, tmp_path / "out", progress=False).output)
    plain, controlled = runs["seed1-random-1.0.json"], runs["seed1-controlled-1.0.json"]
    assert plain["pairs"] == controlled["pairs"] and controlled["same_as"] is None and "turned" not in plain
    assert 0 < len(controlled["turned"]) < len(controlled["pairs"])

    candidates = bpo.read_candidates(rows)
    weights = {row["prompt"]: row["weight"] for row in rows}

    def row_of(pair, turned=()):
        prompt = candidates.prompts[candidates.prompt_of_pair[pair]]
        texts = [candidates.responses[row] for row in candidates.pairs[pair]][:: -1 if pair in turned else 1]
        return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1], "weight": weights[prompt]}

    held = [row_of(pair) for pair in plain["heldout_pairs"]]
    reference = bpo.evaluate_preferences(settings["model"], held, progress=False)
    for run in (plain, controlled):
        trained = [row_of(pair, run.get("turned", ())) for pair in run["pairs"]]
        result = bpo.evaluate_preferences(
            by_hand(settings, trained, tmp_path, 1),
            held,
            reference=reference,
            processing_class=tokenizer,
            progress=False,
        )
        assert result.margin == pytest.approx(run["measures"]["margin"], rel=1e-3)


def test_strategies_of_users_reach_other_processes(settings, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import time\n\ndef shortest(candidacy):\n    time.sleep(4)\n"
        "    return candidacy.eligible, candidacy.score_gaps\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import mine

    monkeypatch.setitem(STRATEGIES, "mine", None)  # taken out again after the test
    config = {**settings, "arms": ["mine", "random"], "seeds": [0], "budget": 1.0}
    bpo.register_strategy("mine", lambda candidacy: mine.shortest(candidacy))
    with pytest.raises(ValueError, match="'mine' cannot be imported by the processes of jobs > 1"):
        bpo.compare(config, tmp_path / "out", jobs=2, progress=False)
    bpo.register_strategy("mine", mine.shortest)
    assert not bpo.compare(config, tmp_path / "out", jobs=2, progress=False).failures
    # All pairs by both: the first arm is the one that is trained, though the other one had chosen long before.
    runs = runs_of(tmp_path / "out")
    assert {run["arm"]: run["same_as"] for run in runs.values()} == {"mine": None, "random": "mine"}
    assert runs["seed0-mine-1.0.json"]["correct"] == runs["seed0-random-1.0.json"]["correct"]


def test_win_rates_by_a_scorer(settings, tmp_path, monkeypatch):
    """What both policies sampled is scored by the same function; the start of a seed is sampled and scored once."""
    (tmp_path / "scorers.py").write_text("def spaces(prompt, response):\n    return response.count(' ')\n")
    monkeypatch.chdir(tmp_path)
    scorer = {"function": "scorers:spaces", "n_responses": 2, "max_new_tokens": 6}
    config = {**settings, "seeds": [3], "arms": ["margin", "random"], "scorer": scorer}
    comparison = bpo.compare(config, "out", progress=False)
    assert not comparison.failures
    starts = []
    for arm in ("margin", "random"):
        file = comparison.output / "responses" / f"seed3-{arm}-10.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows) == 3
        shares = []
        for row in rows:
            for response in row["start"] + row["trained"]:
                assert response["score"] == response["text"].count(" ")
            pairs = [(mine["score"], other["score"]) for mine in row["trained"] for other in row["start"]]
            shares += [(mine > other) + (mine == other) / 2 for mine, other in pairs]
        found = next(entry for entry in comparison.results["arms"] if entry["arm"] == arm)
        assert found["measures"]["win_rate"]["mean"] == pytest.approx(np.mean(shares))
        assert found["seconds"]["sampling"] > 0
        starts.append([row["start"] for row in rows])
    assert starts[0] == starts[1]
    assert "win rate" in comparison.report.read_text()


def test_wins_are_counted_by_hand():
    """Equal scores and equal responses are half a win; what has no score is left out."""
    start = [{"prompt": "a", "responses": ["x", "yy"]}, {"prompt": "b", "responses": ["zzz"]}]
    trained = [{"prompt": "a", "responses": ["x", "www"]}, {"prompt": "b", "responses": ["q"]}]
    scores = {"x": 1.0, "yy": 2.0, "www": 2.0, "q": 0.0, "zzz": None}
    with pytest.warns(UserWarning, match="1 of 5 responses have no score"):
        wins = compare_responses(start, trained, lambda prompt, response: scores[response])
    # x against x and yy: ½, 0; www against x and yy: 1, ½.
    assert [row["wins"] for row in wins.rows] == [0.5, None]
    assert wins.measures["win_rate"] == 0.5
    scores["zzz"] = 1.0
    assert compare_responses(start, trained, lambda _, response: scores[response]).measures["win_rate"] == 0.4


def test_a_store_that_is_there_serves(finished, settings, tmp_path):
    comparison = bpo.compare(
        {**settings, "store": str(finished.output / "store"), "seeds": [0]}, tmp_path / "out", progress=False
    )
    assert not (tmp_path / "out" / "store").exists()
    run, expected = (runs_of(output)["seed0-bpo-10.json"] for output in (comparison.output, finished.output))
    assert run["pairs"] == expected["pairs"]
    assert run["correct"] == expected["correct"]
    other = scored_rows(13, 4, seed=5)
    with pytest.raises(ValueError, match=r"store: .* lacks \d+ of the"):
        bpo.compare({**settings, "dataset": other, "store": str(finished.output / "store")}, tmp_path / "other")


def test_training_and_evaluation_in_two_precisions(finished, settings, tmp_path, monkeypatch):
    """A store in float32 knows the reference of training, the evaluation in bfloat16 runs it again."""
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", None)  # TRL runs none
    store = str(finished.output / "store")
    config = {**settings, "store": store, "seeds": [0], "arms": ["random"], "evaluate": {"bf16": True}}
    comparison = bpo.compare(config, tmp_path / "out", progress=False)
    assert not comparison.failures
    run, expected = (runs_of(output)["seed0-random-10.json"] for output in (comparison.output, finished.output))
    assert run["measures"]["margin"] == pytest.approx(expected["measures"]["margin"], rel=0.1)
    assert run["measures"]["margin"] != expected["measures"]["margin"]


def test_known_reference_trains_as_trl_does(settings, tokenizer, tmp_path):
    """Told log π_ref, nothing of the reference runs, and the weights come out the same."""
    selection = bpo.select(None, settings["dataset"], budget=8, strategy="random", progress=False)
    everything = bpo.evaluate_preferences(settings["model"], selection.dataset, progress=False)
    candidates = bpo.read_candidates(selection.dataset)
    logps = everything.logps[candidates.pairs]
    peft = {**TRAINING["peft"], "task_type": "CAUSAL_LM"}
    args = dpo_config(TRAINING, str(tmp_path), 3)
    ours = train_on_pairs(settings["model"], selection.dataset, args, peft_config=LoraConfig(**peft), ref_logps=logps)
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(settings["model"]),
        args=dpo_config(TRAINING, str(tmp_path), 3),
        train_dataset=selection.dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(**peft),
    )
    trainer.train()
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in ours.named_parameters():
        np.testing.assert_allclose(parameter.detach(), theirs[name].detach(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_trained_policy_is_free_of_its_trainer(settings, tokenizer, tmp_path):
    """After training under bfloat16 it computes in float32 as the saved adapter does."""
    selection = bpo.select(None, settings["dataset"], budget=8, strategy="random", progress=False)
    peft = LoraConfig(**TRAINING["peft"], task_type="CAUSAL_LM")
    args = dpo_config({**TRAINING, "bf16": True}, str(tmp_path), 3)
    policy = train_on_pairs(settings["model"], selection.dataset, args, peft_config=peft)
    policy.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(settings["model"])
    saved = PeftModel.from_pretrained(base, tmp_path / "adapter")
    first, second = (
        bpo.evaluate_preferences(model, selection.dataset, processing_class=tokenizer, progress=False)
        for model in (policy, saved)
    )
    np.testing.assert_array_equal(first.logps, second.logps)
    half = bpo.evaluate_preferences(
        saved, selection.dataset, processing_class=tokenizer, config={"bf16": True}, progress=False
    )
    assert not np.array_equal(half.logps, second.logps)
    np.testing.assert_allclose(half.logps, second.logps, rtol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"training": {**TRAINING, "learning_rate": 1e-3}},
            r"another training\.learning_rate: .* 0\.01 there and 0\.001",
        ),
        ({"heldout": 0.5}, "another heldout"),
        (
            {"arms": [{"name": "bpo", "select": {"n_clusters": 3}}, "random"]},
            r"arm 'bpo' with another select\.n_clusters",
        ),
        (
            {"arms": [{"name": "bpo", "select": {"usefulness": {"centrality": 1.0}}}, "random"]},
            r"arm 'bpo' with another select\.usefulness\.centrality: .* None there and 1\.0 here",
        ),
        ({"dataset": scored_rows(11, 4)}, "another dataset"),
    ],
)
def test_other_settings_are_refused_by_name(copied, settings, change, message):
    with pytest.raises(ValueError, match=message):
        bpo.compare({**settings, **change}, copied, progress=False)


def test_runs_from_before_a_setting_was_there_count(copied, settings):
    path = copied / "runs" / "seed0-bpo-10.json"
    run = json.loads(path.read_text())
    del run["arm_settings"]["select"]["min_depth"]
    path.write_text(json.dumps(run))
    assert not bpo.compare(settings, copied, progress=False).failures
    arms = [{"name": "bpo", "select": {"min_depth": 0}}, "random"]
    with pytest.raises(ValueError, match=r"arm 'bpo' with another select\.min_depth: .* None there and 0 here"):
        bpo.compare({**settings, "arms": arms}, copied, progress=False)


def test_a_directory_of_something_else_is_refused(settings, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="no comparison"):
        bpo.compare(settings, tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        bpo.compare(settings, tmp_path / "thesis.tex")


def test_a_damaged_run_is_named(copied, settings):
    path = copied / "runs" / "seed0-bpo-10.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=r"seed0-bpo-10\.json is damaged"):
        bpo.compare(settings, copied, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modell": "x"}, "modell is no field; did you mean model"),
        ({"budget": None}, "budget must be given"),
        ({"budget": 1.5}, "budget must be a count"),
        ({"budget": [5, 5]}, "budget must be distinct"),
        ({"seeds": 0}, "seeds must be a whole number"),
        ({"seeds": [1, 1]}, "seeds has a seed twice"),
        ({"seeds": [-1]}, "seeds must be whole numbers"),
        ({"heldout": 1.0}, "heldout must be a fraction"),
        ({"heldout": 0.5, "heldout_prompts": 3}, "heldout and heldout_prompts both"),
        ({"train_prompts": 0}, "train_prompts must be"),
        ({"breadth": "all"}, r"arms\[0\]\.breadth"),
        ({"arms": []}, "arms must be a list"),
        ({"arms": ["best"]}, r"arms\[0\]\.strategy must be one of"),
        ({"arms": ["random", "random"]}, "arms has 'random' twice"),
        ({"arms": [{"name": "a/b", "strategy": "random"}]}, r"arms\[0\]\.name must be"),
        (
            {"arms": ["random", {"name": "x", "strategi": "bpo"}]},
            r"arms\[1\]\.strategi is no field; did you mean strat",
        ),
        ({"arms": ["random", {"name": "bpo", "select": {"rank": 1}}]}, r"arms\[1\]\.select: .* no field rank"),
        (
            {"arms": ["random", {"name": "bpo", "select": {"lora_rank": 1}}]},
            r"arms\[1\]\.select\.lora_rank is a setting",
        ),
        ({"arms": ["random", {"name": "bpo", "select": {"beta": 1}}]}, r"arms\[1\]\.select\.beta is the same for all"),
        ({"arms": ["bpo"]}, "baseline must be one of the arms bpo, got 'random'"),
        ({"select": {"sketch_dim": 0}}, "select: SelectConfig.sketch_dim"),
        ({"select": {"beta": 0.5}}, r"select\.beta is 0\.5, but training has 0\.1"),
        ({"select": {"ref_model": "base"}}, r"select\.ref_model cannot"),
        ({"training": {"epochs": 2}}, r"training\.epochs is no field; did you mean num_train_epochs"),
        ({"training": {"seed": 2}}, r"training\.seed is decided by the comparison"),
        ({"training": {"loss_type": ["aot"]}}, "training: .*aot"),
        ({"training": {"peft": {"rank": 2}}}, r"training\.peft\.rank is no field"),
        ({"training": {"lr_scheduler_type": "sideways"}}, "training: .*sideways"),
        ({"evaluate": {"batch": 2}}, r"evaluate\.batch is no field"),
        ({"evaluate": {"tokens_per_batch": 0}}, "evaluate: .*tokens_per_batch"),
        ({"scorer": {"temperature": 1}}, "scorer must have one of function"),
        ({"scorer": {"function": "a:b", "mode": "rating"}}, r"scorer\.mode is no field"),
        ({"scorer": {"judge": "http://x"}}, r"scorer\.model must be given"),
        ({"scorer": {"function": "a:b", "n_responses": 0}}, r"scorer\.n_responses must be"),
        ({"scorer": {"function": "a:b", "top_p": 2}}, r"scorer\.top_p must be above 0 and at most 1"),
        ({"heldout_prompts": 12}, "heldout_prompts=12 leave none"),
        ({"train_prompts": 10}, "train_prompts=10 is above the 9 prompts"),
        ({"target_prompts": 9}, "heldout_prompts and target_prompts leave none"),
        ({"arms": ["random", "less"]}, "target_prompts must be given for the arm 'less'"),
    ],
)
def test_bad_settings_are_named(settings, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        bpo.compare({**settings, **change}, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_bad_paths_are_named(settings, tmp_path):
    for field in ("model", "store"):
        with pytest.raises(FileNotFoundError, match=f"{field}: .*nowhere"):
            bpo.compare({**settings, field: str(tmp_path / "nowhere")}, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        bpo.compare({**settings, "dataset": str(tmp_path / "nowhere")}, tmp_path / "out")
    with pytest.raises(ValueError, match="jobs"):
        bpo.compare(settings, tmp_path / "out", jobs=0)


def test_yaml(tmp_path, settings):
    file = tmp_path / "compare.yaml"
    file.write_text("training: {learning_rate: 2e-4, warmup_ratio: 1E-1, adam_epsilon: 1.0e-8}\nname: 2e-4x\n")
    values = read_yaml(file)
    assert values["training"] == {"learning_rate": 2e-4, "warmup_ratio": 0.1, "adam_epsilon": 1e-8}
    assert values["name"] == "2e-4x"
    file.write_text("a: [1")
    with pytest.raises(ValueError, match=r"compare\.yaml is no YAML"):
        bpo.compare(file, tmp_path / "out")
    file.write_text(yaml.safe_dump({**settings, "seeds": "many"}))
    with pytest.raises(ValueError, match=r"compare\.yaml: seeds must be"):
        CompareConfig.of(file)
    with pytest.raises(TypeError, match="CompareConfig"):
        CompareConfig.of(3)


def test_the_documented_example_is_valid(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "compare.md").read_text()
    file = tmp_path / "compare.yaml"
    file.write_text(page.split("```yaml\n")[1].split("```")[0])
    config = CompareConfig.of(file)
    assert [arm.name for arm in config.arms] == ["bpo", "uniform", "random", "best_worst", "pairs", "farthest"]
    assert config.training["learning_rate"] == 5e-4
    assert config.arms[0].select.min_depth == 0
