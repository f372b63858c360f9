"""TRL's words and today's for the same things, what is printed in which form, and what is said to be kept."""

import argparse
import io
import json
import shlex
import subprocess
import sys

import pytest
from transformers.utils import is_torch_bf16_gpu_available

import bpo
from bpo.cli.main import _kept, in_words_of_the_shell, main
from bpo.cli.select import store_beside
from bpo.selection.strategies.register import STRATEGIES
from tiny import scored_rows

ROWS = scored_rows(5, 4)
IN_FLOAT32 = [] if is_torch_bf16_gpu_available() else ["--bf16", "False"]
SMALL = ["--budget", "9", "--set", "sketch_dim=64"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_a_selection_by_name_by_file_and_from_the_standard_input_is_that_by_position(
    model_path, place, capsys, monkeypatch
):
    assert main(["select", model_path, "rows.jsonl", *SMALL, "--output", "my selection"]) == 0
    said = capsys.readouterr().out
    assert (place / "my selection-gradients").is_dir()  # the store beside it
    assert "store    'my selection-gradients'\n" in said and "report   'my selection/report.html'\n" in said
    [command] = [line.removeprefix("train    ") for line in said.splitlines() if line.startswith("train")]
    words = shlex.split(command)
    assert words[:4] == ["trl", "dpo", "--dataset_name", "my selection/dataset"]
    assert words[4:] == ["--model_name_or_path", model_path, "--output_dir", "my selection-dpo", *IN_FLOAT32]
    first = bpo.Selection.load("my selection")
    assert first.seed == 42

    renamed = [{"question": row["prompt"], **{name: row[name] for name in row if name != "prompt"}} for row in ROWS]
    (place / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    named = ["--model_name_or_path", model_path, "--dataset-name=named.jsonl", "--column", "prompt=question"]
    loss = ["--set", "beta=0.2", "--set", 'loss_type=["sigmoid","sft"]']
    assert main(["select", *named, *SMALL, *loss, "--output_dir", "named", "--json", "--no-store"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["pairs"]["selected"] == 9 and values["dataset"] == "named/dataset" and "store" not in values
    assert values["train"].endswith(
        shlex.join(["--output_dir", "named-dpo", "--loss_type", "sigmoid", "sft", "--beta", "0.2", *IN_FLOAT32])
    )
    assert not (place / "named-gradients").exists()

    (place / "run.yaml").write_text(
        f"model_name_or_path: {model_path}\nbudget: 5\nset:\n  sketch_dim: 64\noverwrite: true\nno_store: false\n"
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((place / "rows.jsonl").read_bytes())))
    again = ["select", "--config", "run.yaml", "--dataset_name", "-", "--budget", "9", "--output", "my selection"]
    assert main([*again, "--quiet"]) == 0  # what stands beside --config comes after what is in it
    assert capsys.readouterr().out == ""
    second = bpo.Selection.load("my selection")
    assert second.pairs.equals(first.pairs) and second.dataset[:] == first.dataset[:]

    assert main(["report", "my selection", "--output", "page.html"]) == 0
    assert (place / "page.html").read_text() == (place / "my selection" / "report.html").read_text()


def test_a_shell_completes_commands_and_options(place, capsys):
    pytest.importorskip("shtab")
    scripts = []
    for words in (["--print-completion", "bash"], ["--print_completion", "bash"], ["--print-completion=bash"]):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
        scripts.append(capsys.readouterr().out)
    assert len(set(scripts)) == 1
    (place / "completion").write_text(scripts[0])
    for line, wanted in (("bpo sel", "select"), ("bpo select --bud", "--budget"), ("bpo store ver", "verify")):
        words = line.split()
        given = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}"
        script = f'source completion; {given}; _shtab_bpo; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [wanted], done.stderr


def test_a_dry_run_says_what_is_known_without_the_model_and_writes_nothing(model_path, place, capsys):
    before = sorted(place.iterdir())
    assert main(["select", model_path, "rows.jsonl", *SMALL, "--output", "out", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "data     5 prompts, 20 responses, 30 candidate pairs\n" in said
    assert f"bpo doctor {model_path} rows.jsonl measures it" in said
    assert "time     at least 0 s, what products of matrices take at " in said
    assert main(["collect", model_path, "rows.jsonl", "--store", "s", "--dry-run", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_path)
    assert costs["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert costs["weights_bytes"] == 4 * costs["parameters"]
    flops = 4 * costs["parameters"] * costs["tokens"]
    assert costs["least_seconds"] * costs["matmul_flops"] == pytest.approx(flops) and costs["matmul_flops"] > 1e8
    assert sorted(place.iterdir()) == before
    assert main(["collect", model_path, "rows.jsonl", "--store", "s", "--quiet"]) == 0
    rows = (place / "s").rglob("*")
    assert (
        costs["store_bytes"] <= sum(path.stat().st_size for path in rows if path.is_file()) < 10 * costs["store_bytes"]
    )


@pytest.mark.parametrize(
    ("command", "there", "said"),
    [
        ({"command": "select", "store": "some store"}, True, "kept in 'some store', and the same command goes on"),
        ({"command": "select", "store": "some store"}, False, "nothing is kept"),
        ({"command": "select", "store": None}, False, "nothing is kept"),
        ({"command": "sample", "keeps": "output", "output": "some store"}, True, "what was finished is kept in"),
        ({"command": "reselect", "store": "some store"}, True, "nothing is kept"),
        ({"command": "show", "path": "some store"}, True, "nothing is kept"),
        (None, False, "nothing is kept"),
    ],
)
def test_what_is_said_to_be_kept_of_an_interrupted_command_is(command, there, said, place):
    if there:
        (place / "some store").mkdir()
    assert said in _kept([] if command is None else [argparse.Namespace(**command)])


def test_messages_are_in_the_words_of_the_shell():
    message = "budget=3 is below the 5 prompts: strategy='bpo' keeps one. Let prompts go with SelectConfig.min_depth=0."
    assert in_words_of_the_shell(message) == (
        "--budget 3 is below the 5 prompts: --strategy bpo keeps one. Let prompts go with --set min_depth=0."
    )
    assert in_words_of_the_shell("a/budget=3 and --budget=3 stay") == "a/budget=3 and --budget=3 stay"


def test_stores_lie_beside_what_is_selected(place):
    assert str(store_beside(place / "a b")) == f"{place}/a b-gradients"
    assert str(store_beside(".")) == f"{place}-gradients"
    assert store_beside("s3://bucket/chosen/") == "s3://bucket/chosen-gradients"


COMMANDS = ("doctor", "select", "train", "reselect", "collect", "preview", "compare", "sample", "score", "report")


@pytest.mark.parametrize("command", [*COMMANDS, "show", "store"])
def test_each_help_has_examples_that_the_command_can_read(command, capsys):
    from bpo.cli.main import _parsed

    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "(default: None)" not in printed
    lines = [line.strip() for line in printed.partition("examples:\n")[2].splitlines()]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "bpo" and _parsed(words[1:]).command == command


def test_help_names_every_strategy(capsys):
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in STRATEGIES:
        assert f" {name}," in printed or f" {name} (" in printed, name
