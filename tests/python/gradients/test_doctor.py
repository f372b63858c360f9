"""What the doctor says, against what a run does."""

import numpy as np
import pytest
import torch

import bpo
from bpo.cli.main import main
from tiny import scored_rows, tiny_llama


def diagnose(model, rows, tokenizer, **changes):
    return bpo.doctor(model, rows, processing_class=tokenizer, config={"sketch_dim": 64, **changes})


def test_it_counts_what_the_run_then_has(tokenizer, tmp_path):
    model, rows = tiny_llama(tokenizer), scored_rows(6, 4)
    rows[0]["responses"][1] = ""
    with pytest.warns(bpo.InvalidDataWarning):
        store = bpo.collect_gradients(
            model, rows, processing_class=tokenizer, store=tmp_path / "store", config={"sketch_dim": 64}, progress=False
        )
    found = diagnose(model, rows, tokenizer)
    assert found.responses == len(store) == 23
    assert found.coordinates == store.fingerprint["features"]["coordinates"] == sum(found.parts.values())
    sizes = [(tmp_path / "store" / name).stat().st_size for name in ("rows.f16", "records.bin")]
    assert found.store_bytes == sum(sizes) - 72  # the header of the records
    assert found.skipped == {"empty response": 1}
    assert found.pairs == 5 * 6 + 3
    assert found.longest <= found.window == 256
    assert found.looked_at > 0 and found.unusable == 0
    assert found.batch_sensitivity < 1e-5
    assert found.zero == found.whole_model == found.warnings == found.problems == []
    assert found.seconds > 0 and found.peak_memory_bytes > 2**20
    assert "no problems found" in str(found)


def test_dead_parameters_are_named(tokenizer):
    model = tiny_llama(tokenizer)
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()  # nothing flows back through it …
    found = diagnose(model, scored_rows(3, 3), tokenizer)
    dead = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    assert found.zero == dead
    assert "3 parameters had a gradient of exactly zero" in found.problems[0]


def test_nan_gradients_are_counted(tokenizer):
    model = tiny_llama(tokenizer)
    model.lm_head.weight.data.fill_(float("nan"))
    found = diagnose(model, scored_rows(3, 3), tokenizer)
    assert found.unusable == found.looked_at
    assert "NaN, infinite or zero" in found.problems[0]


def test_low_precision_shows_as_batch_sensitivity(tokenizer):
    found = diagnose(tiny_llama(tokenizer, num_hidden_layers=6).to(torch.bfloat16), scored_rows(6, 4), tokenizer)
    assert found.batch_sensitivity > 1e-3
    assert any("changes by" in problem for problem in found.problems)


def test_truncation_and_merging_tokens_are_reported(tokenizer):
    rows = scored_rows(3, 3)
    rows[0]["prompt"], rows[0]["responses"] = "re", ["d green", "gg", "x"]
    found = diagnose(tiny_llama(tokenizer), rows, tokenizer, max_length=14)
    assert found.truncated > 0
    assert any("not a prefix" in warning for warning in found.warnings)


def test_modules_that_run_again_are_named(tokenizer):
    found = diagnose(tiny_llama(tokenizer), scored_rows(2, 2), tokenizer, features="full")
    assert "model.norm" in found.run_again
    assert found.coordinates == sum(parameter.numel() for parameter in tiny_llama(tokenizer).parameters())


def test_the_command(model_path, tmp_path, capsys):
    import json

    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in scored_rows(3, 3)), encoding="utf-8")
    assert main(["doctor", model_path, str(data), "--set", "sketch_dim=32"]) == 0
    printed = capsys.readouterr().out
    assert "3 prompts, 9 responses" in printed
    assert "estimate" in printed


def test_the_estimate_covers_every_batch(tokenizer):
    """The time of the trial's own batches, when these are all there are."""
    found = diagnose(tiny_llama(tokenizer), scored_rows(3, 3), tokenizer, tokens_per_batch=10_000)
    assert found.looked_at == 9
    assert 0 < found.seconds < found.elapsed_seconds
    assert np.isfinite(found.seconds)
