"""Scoring by functions and reward models: what fails stays without a score, and runs go on where they stopped."""

import json
import os
import signal
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

import bpo
import job
from bpo.cli.main import main
from tiny import TINY, scored_rows

ROWS = [
    {"prompt": "one", "responses": [" cat", " dog dog", " sun"], "id": 1},
    {"prompt": "two", "responses": [" red", " blue"], "id": 2},
]


def length(prompt, response):
    """A scorer that the command line finds by name."""
    return len(response)


def score(dataset, scorer, **settings):
    return bpo.score_responses(dataset, scorer, progress=False, **settings)


def test_functions_score_and_their_failures_have_reasons():
    def picky(prompt, response):
        return {" cat": np.float32(1.5), " dog dog": None, " sun": float("nan"), " red": True}[response]

    with pytest.warns(UserWarning, match="3 of 5 responses have no score.*the first: the scorer gave none"):
        dataset = score(ROWS, picky)
    assert dataset["scores"][:] == [[1.5, None, None], [1.0, None]] and dataset["id"][:] == [1, 2]
    assert dataset["score_errors"][0] == [None, "the scorer gave none", "the scorer gave nan"]
    assert dataset["score_errors"][1] == [None, "KeyError: ' blue'"]
    summary = bpo.describe_responses(dataset)
    assert (summary.n_scored, summary.n_tied) == (2, 0) and summary.errors["the scorer gave nan"] == 1
    with pytest.raises(ValueError, match="Not one of the 5 responses could be scored; the first: the scorer gave str"):
        score(ROWS, lambda prompt, response: "good")
    with pytest.raises(TypeError, match="not int"):
        score(ROWS, 3)


def test_functions_may_take_lists():
    calls = []

    def lengths(prompts, responses):
        calls.append(list(zip(prompts, responses, strict=True)))
        return np.array([len(response) for response in responses])

    assert score(ROWS, lengths, batch_size=2)["scores"][:] == [[4, 8, 4], [4, 5]]
    assert [len(call) for call in calls] == [3, 2] and calls[0][1] == ("one", " dog dog")
    assert score(ROWS, lengths, batch_size=100)["scores"][:] == [[4, 8, 4], [4, 5]]
    with pytest.raises(ValueError, match=r"Not one of the 5.*returned 1 scores for 3 responses"):
        score(ROWS, lambda prompts, responses: [1], batch_size=2)


def test_ties_stay_ties_and_present_scores_stay():
    tied = score(ROWS, lambda prompt, response: 1)
    assert bpo.describe_responses(tied).n_tied == 2
    rows = [{"prompt": "one", "responses": [" cat", " dog", " sun"], "scores": [7.0, None, float("nan")]}]
    assert score(rows, length)["scores"][:] == [[7.0, 4.0, 4.0]]
    assert score(rows, length, overwrite=True)["scores"][:] == [[4.0, 4.0, 4.0]]
    pairs = [
        {"prompt": "one", "chosen": " sun", "rejected": " cats"},
        {"prompt": "one", "chosen": " a", "rejected": " sun"},
    ]
    assert score(pairs, length).to_list() == [
        {"prompt": "one", "responses": [" sun", " cats", " a"], "scores": [4, 5, 2], "score_errors": [None] * 3}
    ]


def test_interrupted_scoring_goes_on_and_tries_failures_again(tmp_path):
    rows = [{key: row[key] for key in ("prompt", "responses")} for row in scored_rows(6, 3)]
    calls, broken = [], {rows[1]["responses"][2]}

    def scorer(prompt, response):
        calls.append(response)
        if response in broken:
            raise TimeoutError("too slow")
        if len(calls) == 12:
            raise KeyboardInterrupt
        return len(response)

    # What it holds changes from call to call, and says nothing of the scores.
    scorer.describe = lambda: {"scorer": "length"}
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt):
        score(rows, scorer, output=part)
    assert part.read_text().count("\n") == 3
    broken.clear()
    expected = [[len(response) for response in row["responses"]] for row in rows]
    assert score(rows, scorer, output=part)["scores"][:] == expected
    # Of the rows that were finished only the one that failed was asked for again.
    assert calls[12:] == [rows[1]["responses"][2], *(response for row in rows[3:] for response in row["responses"])]
    assert score(rows, scorer, output=whole)["scores"][:] == expected
    assert part.read_bytes() == whole.read_bytes()
    with pytest.raises(ValueError, match="other settings: scorer"):
        score(rows, length, output=part)
    with pytest.raises(ValueError, match="were made from other prompts or responses"):
        score([{**rows[0], "responses": [" other"]}, *rows[1:]], scorer, output=part)
    part.write_text(part.read_text().replace('{"prompt"', "{'prompt'", 1))
    with pytest.raises(ValueError, match=r"part\.jsonl, line 1: no row that bpo wrote"):
        score(rows, scorer, output=part)
    assert len(bpo.read_candidates(str(whole)).pairs) > 0


def length_until_killed(prompt, response):
    """A scorer whose process is killed at the fourth prompt."""
    if prompt.startswith("3 "):
        os.kill(os.getpid(), signal.SIGKILL)
    return len(response)


def test_a_kill_loses_nothing_that_was_finished(tmp_path, monkeypatch):
    data, output = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    rows = [{key: row[key] for key in ("prompt", "responses")} for row in scored_rows(5, 3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["score", str(data), "--output", str(output), "--function", "test_scoring:length_until_killed"]
    process = job.command(arguments, directory=Path(__file__).parent)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and output.read_text().count("\n") == 3
    monkeypatch.setattr(os, "kill", lambda *_: None)
    assert main(arguments) == 0
    expected = [[float(len(response)) for response in row["responses"]] for row in rows]
    assert [json.loads(line)["scores"] for line in output.read_text().splitlines()] == expected


def tiny_reward_model(tokenizer, **changes):
    torch.manual_seed(3)
    settings = {"vocab_size": len(tokenizer), **TINY, "max_position_embeddings": 64, "initializer_range": 0.5}
    return LlamaForSequenceClassification(LlamaConfig(**{**settings, "num_labels": 1, "pad_token_id": 0, **changes}))


@pytest.fixture(scope="module")
def reward_model(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    tiny_reward_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def alone(model, tokenizer, text):
    with torch.no_grad():
        return model.eval()(**tokenizer(text, return_tensors="pt")).logits.item()


@pytest.mark.parametrize("conversational", [False, True])
def test_reward_model_gives_the_logit_of_each_sequence_alone(reward_model, tokenizer, conversational):
    rows = scored_rows(5, 3, conversational=conversational)
    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    expected = [
        [
            alone(
                model,
                tokenizer,
                tokenizer.apply_chat_template([*row["prompt"], *response], tokenize=False)
                if conversational
                else row["prompt"] + response + "<|im_end|>",
            )
            for response in row["responses"]
        ]
        for row in rows
    ]
    for budget in (1, 4096):
        scorer = bpo.RewardModel(reward_model, config={"tokens_per_batch": budget})
        dataset = score(rows, scorer, overwrite=True)
        np.testing.assert_allclose(dataset["scores"][:], expected, rtol=1e-4, atol=1e-5)
    assert len(set(np.ravel(expected))) == 15


def test_reward_model_whatever_its_pad_token_and_beyond_its_window(tokenizer):
    rows = [{"prompt": "one", "responses": [" cat", " dog bird moon", " sun " * 70]}]
    for pad in (None, tokenizer.eos_token_id):
        model = tiny_reward_model(tokenizer, pad_token_id=pad).train()
        scorer = bpo.RewardModel(model, tokenizer)
        with pytest.warns(UserWarning, match="tokens, more than the 64 that the reward model was made for"):
            scores = score(rows, scorer)["scores"][0]
        assert model.training and model.config.pad_token_id == pad
        expected = [alone(model, tokenizer, f"one{text}<|im_end|>") for text in rows[0]["responses"][:2]]
        np.testing.assert_allclose(scores[:2], expected, rtol=1e-4, atol=1e-5)
        assert scores[2] is None


def test_reward_adapters_load_with_their_head(reward_model, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = LlamaForSequenceClassification.from_pretrained(reward_model)
    adapted = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = score(ROWS, bpo.RewardModel(tmp_path))["scores"]
    np.testing.assert_allclose(scores[1][0], alone(adapted, tokenizer, "two red<|im_end|>"), rtol=1e-4)


def test_what_is_no_reward_model_is_refused(model_path, tokenizer):
    with pytest.raises(ValueError, match=r"no trained weights for score\.weight"):
        bpo.RewardModel(model_path)
    with pytest.raises(ValueError, match="num_labels=3"):
        bpo.RewardModel(tiny_reward_model(tokenizer, num_labels=3), tokenizer)


def test_commands_sample_score_and_select(model_path, reward_model, tmp_path, capsys):
    prompts, responses, scores = (tmp_path / f"{name}.jsonl" for name in ("prompts", "responses", "scores"))
    prompts.write_text("".join(json.dumps({"prompt": f"{word} red"}) + "\n" for word in ("one", "two", "three")))
    arguments = ["sample", model_path, str(prompts), "--output", str(responses), "--n-responses", "3"]
    assert main([*arguments, "--max-new-tokens", "8", "--keep", "truncated"]) == 0
    assert "9 responses to 3 prompts" in capsys.readouterr().out
    arguments = ["score", str(responses), "--output", str(scores)]
    assert main([*arguments, "--reward-model", reward_model]) == 0
    assert "9 scored, 0 without" in capsys.readouterr().out
    selected = ["select", model_path, str(scores), "--budget", "4", "--set", "sketch_dim=64"]
    assert main([*selected, "--output", str(tmp_path / "selection")]) == 0
    assert "4 kept of 9" in capsys.readouterr().out
    assert main([*arguments, "--function", "test_scoring:length"]) == 1
    assert "other settings" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "lengths.jsonl")
    assert main([*arguments, "--function", "test_scoring:length"]) == 0
    assert main([*arguments, "--function", "test_scoring:nothing"]) == 1
    assert main([*arguments, "--function", "no_such_module:nothing"]) == 1
    assert "no_such_module" in capsys.readouterr().err
    assert main([*arguments, "--judge", "http://localhost:1"]) == 1
    assert "--model is needed" in capsys.readouterr().err


def test_result_is_what_the_rest_reads(tmp_path):
    dataset = score(ROWS, length)
    assert isinstance(dataset, datasets.Dataset)
    assert len(bpo.read_candidates(dataset).pairs) == 3
    dataset.to_parquet(tmp_path / "scores.parquet")
    assert score(str(tmp_path / "scores.parquet"), length).to_list() == dataset.to_list()
