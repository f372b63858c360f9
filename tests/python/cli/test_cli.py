"""The commands as a user calls them; those of a room of their own are tested there."""

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
