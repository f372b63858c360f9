"""What a user of the installed wheel meets first."""

import subprocess
import sys
from importlib import metadata, resources

import pytest

import bpo
from bpo.cli.main import main
from tiny import scored_rows


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_no_torch():
    heavy = {"torch", "transformers", "trl", "datasets", "pyarrow", "sklearn"}
    assert run(f"import bpo, sys; print({heavy} & set(sys.modules))").strip() == "set()"


def test_every_public_name_is_there():
    for name in bpo.__all__:
        assert getattr(bpo, name) is not None
    assert set(bpo.__all__) == set(dir(bpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bpo.nothing


def test_wheel_is_abi3_typed_and_of_one_version():
    assert metadata.version("bpo") == bpo.__version__
    files = [str(path) for path in metadata.files("bpo")]
    assert any(name.startswith("bpo/_core.abi3") for name in files) or sys.platform == "win32"
    assert resources.files("bpo").joinpath("py.typed").is_file()
    assert resources.files("bpo").joinpath("_core.pyi").is_file()


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
    assert (output / "report.html").is_file() and (output / "dataset" / "train.parquet").is_file()
    assert main(["show", str(output)]) == 0 and "15 kept of 30" in capsys.readouterr().out
    assert main(["show", str(store)]) == 0 and "20 responses of 5 prompts" in capsys.readouterr().out
    assert main([*arguments, "--budget", "3"]) == 1
    assert "bpo: budget=3 is below the 5 prompts" in capsys.readouterr().err
    assert main([*arguments, "--budget", "9", "--set", "colour=red"]) == 1
    assert "no field colour" in capsys.readouterr().err
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
