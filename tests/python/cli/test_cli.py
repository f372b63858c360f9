"""The commands as a user calls them; those of a room of their own are tested there."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import bpo
from bpo.cli.main import main
from tiny import scored_rows


def test_command_selects_shows_and_explains(model_path, tmp_path, capsys):
    import datasets

    data = tmp_path / "rows.jsonl"
    datasets.Dataset.from_list(scored_rows(5, 4)).to_json(data)
    output, store = tmp_path / "selection", tmp_path / "store"
    arguments = [
        "select",
        model_path,
        str(data),
        "--store",
        str(store),
        "--output",
        str(output),
        "--set",
        "sketch_dim=64",
    ]
    assert main([*arguments, "--budget", "0.5"]) == 0
    assert "15 kept of 30" in capsys.readouterr().out
    assert not (tmp_path / "selection-gradients").exists()  # another one was named
    assert main([*arguments, "--budget", "0.5"]) == 1
    assert f"--output {output} holds an earlier selection" in capsys.readouterr().err
    arguments.append("--overwrite")
    assert (output / "report.html").is_file() and (output / "dataset" / "train.parquet").is_file()
    assert main(["show", str(output)]) == 0 and "15 kept of 30" in capsys.readouterr().out
    assert main(["show", str(store)]) == 0 and "20 responses of 5 prompts" in capsys.readouterr().out
    assert main([*arguments, "--budget", "3", "--set", "min_depth=1"]) == 1
    assert "bpo: --budget 3 is below the 5 prompts" in capsys.readouterr().err
    assert main([*arguments, "--budget", "9", "--set", "colour=red"]) == 1
    assert "--set colour=…: there is no such field" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
    for name, text, said in (
        ("preview.json", "{}", "no saved preview"),
        ("results.json", "{", "is damaged"),
        ("results.json", "{}", "holds no results"),
    ):
        (tmp_path / name).write_text(text)
        assert main(["show", str(tmp_path / name if name == "preview.json" else tmp_path)]) == 1
        assert said in capsys.readouterr().err


@pytest.fixture
def saved(tmp_path):
    """A selection whose summary has signs and texts that are no ASCII."""
    selection = bpo.select(None, scored_rows(5, 3), budget=5, strategy="random", progress=False)
    return dataclasses.replace(selection, skipped={"½ ≥ 日本": ["row 1"]}).save(tmp_path / "s — ü")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_output_can_be_printed(saved, encoding, monkeypatch, tmp_path):
    """In the encoding of a pipe on Windows, in ASCII, and with a path that is no UTF-8."""
    strange = tmp_path / os.fsdecode(b"no \xff utf-8")
    printed = {}
    for arguments, status in ((["show", str(saved)], 0), (["--help"], 0), (["show", str(strange)], 1)):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        try:
            assert main(arguments) == status
        except SystemExit as end:
            assert end.code == status
        for stream in streams:
            stream.flush()
        printed[arguments[0], status] = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    shown = printed["show", 0][0]
    assert "5 kept of 15" in shown and shown.count("\n") == bpo.Selection.load(saved).summary().count("\n") + 1
    assert "usage: bpo" in printed["--help", 0][0]
    assert "bpo: " in printed["show", 1][1] and "utf-8 holds no gradient store" in printed["show", 1][1]


def test_output_that_nobody_reads_or_that_does_not_fit_is_no_traceback(saved):
    for redirected, status, said in (
        ("| true", 141, ""),
        ("> /dev/full", 1, "bpo: the standard output cannot be written: No space left"),
    ):
        if not os.path.exists("/dev/full"):  # noqa: PTH110
            pytest.skip("needs /dev/full")
        code = "import sys, time; time.sleep(0.5); from bpo.cli.main import main; sys.exit(main())"
        line = f'"$0" -c "$1" show "$2" {redirected}; exit ${{PIPESTATUS[0]}}'
        done = subprocess.run(
            ["bash", "-c", line, sys.executable, code, str(saved)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and said in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("select nowhere rows.jsonl --budget 3 --output out --store out/x", "--store .* lies within --output"),
        ("select nowhere rows.jsonl --budget 3 --output st/x --store st", "--output .* lies within --store"),
        ("select nowhere rows.jsonl --budget 3 --output out --store out", "--output and --store are the same"),
        ("select nowhere sel/dataset --budget 3 --output sel", "dataset .* lies within --output"),
        ("select nowhere rows.jsonl --budget 3 --output sel --target sel/dataset", "--target .* lies within --output"),
        ("reselect st rows.jsonl --budget 3 --output st/x", "--output .* lies within store"),
        ("preview st rows.jsonl --budget 3 --output rows.jsonl", "--output and dataset are the same"),
        ("preview st rows.jsonl --budget 3 --figure st/x.svg", "--figure .* lies within store"),
        ("sample nowhere rows.jsonl --output out.jsonl --cache out.jsonl", "--output and --cache are the same"),
        ("sample nowhere rows.jsonl --output rows.jsonl", "--output and dataset are the same"),
        ("sample nowhere rows.manifest.json --output rows.jsonl", "the manifest of --output and dataset are the same"),
        ("score rows.jsonl --function a:b --output out.jsonl --cache rows.jsonl", "--cache and dataset are the same"),
        ("store merge st/x st", "output .* lies within store 1"),
        ("store merge new new/x st", "store 1 .* lies within output"),
        ("store export st st/rows.npz", "path .* lies within store"),
    ],
)
def test_paths_that_do_not_lie_apart_are_refused_before_any_work(command, message, tmp_path, monkeypatch, capsys):
    """No model is looked for, no store opened, and what is there stays."""
    monkeypatch.chdir(tmp_path)
    for name in ("st", "sel/dataset"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("rows.jsonl", "rows.manifest.json", "st/manifest.json"):
        (tmp_path / name).write_text("{}")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    assert said.startswith("bpo: ") and len(said.splitlines()) == 1
    assert re.search(message, said), said
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_json_of_the_command_line_that_is_none_is_named(tmp_path, capsys):
    deep = "[" * 100_000
    assert main(["preview", "st", "rows", "--budget", "3", "--arm", "{" + deep]) == 1
    assert "is not JSON" in capsys.readouterr().err
    assert main(["reselect", "st", "rows", "--budget", "3", "--output", "out", "--set", f"usefulness={deep}"]) == 1
    assert "usefulness" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["sample", "http://x", "rows", "--output", "o.jsonl", "--model", "m", "--extra-body", deep])
    assert "it is nested too deeply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[" * 100_000),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff"),
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"),
    ],
)
def test_a_damaged_model_is_named(model_path, tmp_path, name, content, capsys):
    model = shutil.copytree(model_path, tmp_path / "model")
    (model / name).write_bytes(content)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored_rows(3, 3)))
    assert main(["select", str(model), str(tmp_path / "rows.jsonl"), "--budget", "3", "--output", "out"]) == 1
    assert f"bpo: {model}: a file of the model" in capsys.readouterr().err
