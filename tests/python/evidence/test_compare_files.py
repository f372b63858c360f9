"""The files of a comparison: two at once, damaged ones, and settings that are a bomb."""

import json
import shutil
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

import bpo
from bpo.cli.main import main
from bpo.evidence.compare.config import CompareConfig
from bpo.evidence.compare.files import ComparisonFiles
from bpo.evidence.compare.yaml_file import read_yaml
from tiny import scored_rows


@pytest.fixture(scope="module")
def settings(model_path, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in scored_rows(8, 3)))
    return {
        "model": model_path,
        "dataset": str(data),
        "seeds": 1,
        "budget": 5,
        "arms": ["random"],
        "training": {"max_steps": 1, "gradient_checkpointing": False, "peft": {"r": 2, "target_modules": "all-linear"}},
    }


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    return bpo.compare(settings, tmp_path_factory.mktemp("comparison") / "out", progress=False).output


@pytest.fixture
def output(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_one_comparison_at_a_time(settings, output, tmp_path):
    with (
        ComparisonFiles(output).locked(),
        pytest.raises(BlockingIOError, match=r"copy: process .* is comparing there"),
    ):
        bpo.compare(settings, output, progress=False)
    with pytest.raises(ValueError, match="train_prompts"):
        bpo.compare({**settings, "train_prompts": 100}, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_a_split_under_the_names_of_the_user_is_the_same_data(settings, output, tmp_path):
    """So what was trained on it is still good."""
    rows = [json.loads(line) for line in Path(settings["dataset"]).read_text().splitlines()]
    renamed = [{"question" if name == "prompt" else name: value for name, value in row.items()} for row in rows]
    datasets.DatasetDict(prefs=datasets.Dataset.from_list(renamed)).save_to_disk(tmp_path / "data")
    before = (output / "runs" / "seed0-random-5.json").read_bytes()
    asked = {**settings, "dataset": str(tmp_path / "data"), "split": "prefs", "columns": {"prompt": "question"}}
    bpo.compare(asked, output, progress=False)
    assert (output / "runs" / "seed0-random-5.json").read_bytes() == before
    for wrong, message in (({"split": 3}, "split must be text"), ({"columns": "prompt"}, "columns must be a mapping")):
        with pytest.raises(ValueError, match=message):
            CompareConfig.of({**settings, **wrong})
    with pytest.raises(ValueError, match=r"no split 'train', only \['prefs'\]"):
        bpo.compare({**asked, "split": None}, tmp_path / "other", progress=False)


def without(name):
    return lambda values: values.pop(name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("comparison.json", without("settings")),
        ("runs/seed0-random-5.json", without("measures")),
        ("runs/seed0-random-5.json", lambda run: run["pairs"].append(10_000)),
        ("runs/seed0-random-5.json", lambda run: run["heldout_pairs"].append(0.5)),
        ("runs/seed0-random-5.json", lambda run: run["heldout_pairs"].reverse()),
        ("runs/seed0-random-5.json", lambda run: run["correct"].pop()),
        ("runs/seed0-random-5.json", lambda run: run.update(seed=3)),
        ("runs/seed0-random-5.json", lambda run: run["seconds"].update(training="long")),
        ("runs/seed0-random-5.json", lambda run: run["arm_settings"].clear()),
        ("costs.json", lambda costs: costs.update(reference=[])),
    ],
)
def test_edited_files_are_named(settings, output, name, change):
    values = json.loads((output / name).read_text())
    change(values)
    (output / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"{name} is damaged .*remove it"):
        bpo.compare(settings, output, progress=False)


@pytest.mark.parametrize("name", ["comparison.json", "runs/seed0-random-5.json", "costs.json", "reference.npz"])
@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"PK\x03\x04 no more"])
def test_cut_files_are_named(settings, output, name, content):
    (output / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged .*remove it"):
        bpo.compare(settings, output, progress=False)


def test_arrays_that_do_not_fit_are_named(settings, output):
    path = output / "reference.npz"
    for arrays in ({"logps": np.zeros(3)}, {"sequence_ids": np.zeros((3, 16), np.uint8), "logps": np.zeros(2)}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=r"reference\.npz is damaged"):
            bpo.compare(settings, output, progress=False)
    with zipfile.ZipFile(path, "w") as archive:  # a bomb where an array should be
        archive.writestr("sequence_ids.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(ValueError, match=r"reference\.npz is damaged"):
        bpo.compare(settings, output, progress=False)
    path.unlink()
    assert not bpo.compare(settings, output, progress=False).failures


def test_results_and_previews_that_do_not_fit_are_named(output, tmp_path, capsys):
    results = json.loads((output / "results.json").read_text())
    for change in (without("agreement"), lambda r: r.update(arms=[1]), lambda r: r["description"].clear()):
        changed = json.loads(json.dumps(results))
        change(changed)
        (output / "results.json").write_text(json.dumps(changed))
        assert main(["show", str(output)]) == 1
        assert "results.json is damaged" in capsys.readouterr().err
    preview = {
        "arms": ["random", "all candidates"],
        "budgets": [5],
        **{name: np.full((2, 1, 2), 0.5).tolist() for name in ("accuracy", "length_controlled", "mean_depth")},
        "baseline": "random",
        "heldout_share": 0.25,
        "n_pairs": 10.0,
        "n_heldout": 3.0,
        "seconds": 1.0,
        "settings": {},
    }
    path = tmp_path / "preview.json"
    path.write_text(json.dumps(preview))
    assert main(["show", str(path)]) == 0
    for change in (
        {"accuracy": [[0.5]]},
        {"budgets": [5, 6]},
        {"budgets": ["many"]},
        {"baseline": "best"},
        {"arms": None},
        {"n_pairs": "ten"},
        {"heldout_share": 1.0},
        {"accuracy": None},
    ):
        path.write_text(json.dumps({**preview, **change}))
        assert main(["show", str(path)]) == 1
        assert "preview.json is no saved preview" in capsys.readouterr().err
    path.write_text("[" * 100_000)
    assert main(["show", str(path)]) == 1
    assert "preview.json is no saved preview: its text is nested too deeply" in capsys.readouterr().err


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
MERGED = "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "its aliases stand for more than 100,000 values"),
        (MERGED, "its aliases stand for more than 100,000 values"),
        ("a: &a [*a]", "an alias names what it is a part of"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "{b: " * 5000, "nested too deeply"),
        ("a: 2001-13-01", "month must be in"),
        ("a: !!bool maybe", "cannot be read"),
        ("a: !!timestamp soon", "cannot be read"),
        ("a: " + "1" * 5000, "is no YAML"),
        ("? [a]\n: b", "unhashable"),
        (b"a: \xff\xfe", "is no YAML"),
        ("", "must hold a mapping"),
    ],
)
def test_a_file_of_settings_that_is_none_is_named(tmp_path, text, message):
    path = tmp_path / "compare.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_aliases_are_fine(tmp_path, settings):
    path = tmp_path / "compare.yaml"
    path.write_text(
        "usual: &usual {n_clusters: 3}\narms:\n- {name: one, strategy: bpo, select: *usual}\n"
        "- {name: two, strategy: bpo, select: {<<: *usual, min_depth: 0}}\n"
    )
    values = read_yaml(path)
    values.pop("usual")
    config = CompareConfig.of({**settings, **values, "baseline": "one"})
    assert [(arm.select.n_clusters, arm.select.min_depth) for arm in config.arms] == [(3, None), (3, 0)]


def test_a_setting_that_json_lacks_is_named(settings, tmp_path):
    path = tmp_path / "compare.yaml"
    training = {**settings["training"], "run_name": "X"}
    path.write_text(yaml.safe_dump({**settings, "training": training}).replace("X", "2026-01-01"))
    with pytest.raises(ValueError, match=r"datetime\.date\(2026, 1, 1\) in the settings cannot be saved"):
        bpo.compare(path, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_an_output_within_a_store_is_refused(settings, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    (store / "manifest.json").write_text("{}")
    for change in ({"store": str(store)}, {"arms": ["random", {"name": "bpo", "store": str(store)}]}):
        with pytest.raises(ValueError, match=r"output .* lies within .*store"):
            bpo.compare({**settings, **change}, store / "out")
    assert [path.name for path in store.iterdir()] == ["manifest.json"]
