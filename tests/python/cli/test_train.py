"""``bpo train``: the options of TRL beside those of a selection."""

import dataclasses
import json

import torch
from trl import ModelConfig

import bpo
from bpo.cli.main import main
from bpo.cli.train import declared_options
from tiny import scored_rows


def test_what_the_sources_declare_is_what_trl_reads():
    """And a word or two more, which are refused later."""
    fields = {field.name for kind in (bpo.BPOConfig, ModelConfig) for field in dataclasses.fields(kind)}
    assert fields <= declared_options()
    assert len(declared_options() - fields) < 20, declared_options() - fields


def test_train_selects_and_trains_by_the_options_of_trl(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    rows = [{"question" if name == "prompt" else name: row[name] for name in row} for row in scored_rows(5, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        "learning_rate: 1.0e-4\nbf16: false\nuse_cpu: true\nmax_steps: 3\nuse_peft: true\n"
        "lora_target_modules: [q_proj, v_proj]\nset:\n  sketch_dim: 64\nbudget: 5\n"
    )
    command = ["train", model_path, "rows.jsonl", "--column", "prompt=question", "--config", "run.yaml"]
    more = [
        "--budget",
        "9",
        "--output_dir",
        "out",
        "--max-steps",
        "1",
        "--report_to",
        "none",
        "--per_device_train_batch_size=2",
    ]
    assert main([*command, *more]) == 0
    said = capsys.readouterr().out
    assert "strategy bpo, budget 9, seed 42" in said and said.endswith("model    out\n")
    args = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    assert isinstance(args, bpo.BPOConfig)
    assert (args.learning_rate, args.max_steps, args.bf16, args.per_device_train_batch_size) == (1e-4, 1, False, 2)
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    assert bpo.GradientStore.open(tmp_path / "out-gradients").fingerprint["sketch"]["dim"] == 64
    for wrong, meant in (
        (
            ["--learning_rat", "1"],
            "--learning_rat: neither bpo train nor TRL has such an option; did you mean learning_rate?",
        ),
        (["--max_steps", "1", "2"], "bpo: 2: is one argument too many for bpo train"),
    ):
        assert main([*command, "--budget", "9", "--output_dir", "out", *wrong]) == 1
        assert meant in capsys.readouterr().err
