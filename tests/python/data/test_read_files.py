"""A file is the file that was named, read as it stands there."""

import bz2
import gzip
import json
import lzma
import os
import warnings

import datasets
import pytest

from bpo import read_candidates
from bpo.responses.prompts import read_responses


def row(prompt="p", chosen="a", rejected="b", **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def prompts_of(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_candidates(path).prompts


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        # Given a name, these two would take "::" in it for more than one.
        with path.open("wb") as file:
            data = datasets.Dataset.from_list(rows)
            data.to_csv(file) if path.suffix == ".csv" else data.to_parquet(file)
    return path


KINDS = ["jsonl", "json", "csv", "parquet"]
NAMES = ["a[1]", "*", "?", "a::b", "x=1", "train", "space and é", "%20", "{a,b}", "hf:", "zip"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_name_is_a_pattern(tmp_path, name, kind):
    # What a pattern, a chain or a partition would find in place of the file.
    for decoy in ("a1", "b", "ab", "x", "a", "other"):
        write_rows(tmp_path / f"{decoy}.{kind}", [row("wrong")])
        write_rows(tmp_path / decoy / f"rows.{kind}", [row("wrong")])
    inside = write_rows(tmp_path / name / f"{name}.{kind}", [row("right")])
    assert prompts_of(inside) == ["right"] == prompts_of(str(inside)) == prompts_of(tmp_path / name)
    assert set(read_responses(inside)[0].columns) == set()
    datasets.Dataset.from_list([row("saved")]).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved").rename(tmp_path / f"saved {name}")
    assert prompts_of(tmp_path / f"saved {name}") == ["saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_replaced_at_the_same_time_is_read_anew(tmp_path, kind):
    path = write_rows(tmp_path / f"rows.{kind}", [row("old")])
    assert prompts_of(path) == prompts_of(tmp_path) == ["old"]
    before = path.stat()
    write_rows(tmp_path / f"rows.{kind}", [row("new")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert prompts_of(path) == prompts_of(tmp_path) == ["new"]


def test_no_cache_is_needed(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("no directory")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kind in KINDS:
        assert prompts_of(write_rows(tmp_path / f"{kind}.{kind}", [row()])) == ["p"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_stays_what_it_is(tmp_path, kind):
    """Readers that guess make numbers, times and nothing of these."""
    texts = [
        "007",
        "1e5",
        "null",
        "None",
        "NA",
        "nan",
        "true",
        "2020-01-01",
        "2020-01-01T00:00:00Z",
        " x ",
        'a "b", c',
        "l\n2",
        "é\u2028🙂",
    ]
    path = write_rows(tmp_path / f"rows.{kind}", [row(text, f"{text} yes", f"{text} no") for text in texts])
    candidates = read_candidates(path)
    assert candidates.prompts == texts
    assert candidates.responses[::2] == [f"{text} yes" for text in texts]


def test_numbers_of_csv_are_scores_and_weights(tmp_path):
    rows = [row(f"p{index}", score_chosen=2.5, score_rejected=index / 4, weight=1 + index) for index in range(3)]
    path = write_rows(tmp_path / "rows.csv", rows)
    candidates = read_candidates(path, weight_column="weight")
    assert candidates.score_gaps.tolist() == [2.5, 2.25, 2.0] and candidates.weights.tolist() == [1, 2, 3]
    path.write_text(path.read_text().replace("2.5,0.25", ",0.25"))
    assert prompts_of(path) == ["p0", "p2"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_files(tmp_path, compress):
    ending = {gzip.compress: "gz", bz2.compress: "bz2", lzma.compress: "xz"}[compress]
    for kind in ("jsonl", "json", "csv"):
        path = write_rows(tmp_path / f"rows.{kind}", [row()])
        (tmp_path / f"rows.{kind}.{ending}").write_bytes(compress(path.read_bytes()))
        assert prompts_of(tmp_path / f"rows.{kind}.{ending}") == ["p"]
    (tmp_path / f"bad.jsonl.{ending}").write_bytes(compress(path.read_bytes())[:-9])
    with pytest.raises(ValueError, match=f"bad.jsonl.{ending}: cannot be read"):
        read_candidates(tmp_path / f"bad.jsonl.{ending}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\ufeff{0}\n{1}\n", ["p0", "p1"]),
        ("\n\n{0}\n\n{1}", ["p0", "p1"]),
        ("{0}\r\n{1}\r\n", ["p0", "p1"]),
        ("[{0},\n{1}]", ["p0", "p1"]),
        (" \n [\n{0},{1}]", ["p0", "p1"]),
        ('{{"prompt":\n["p0", "p1"], "chosen": ["a", "a"], "rejected": ["b", "b"]}}', ["p0", "p1"]),
        ("{0}\n{{\n{1}\n", ["p0", "p1"]),
        ("{{broken\n{0}\n{1}\n", ["p0", "p1"]),
        ("{0}\nnull\n7\n{1}", ["p0", "p1"]),
        ("[{0}, null, 7, {1}]", ["p0", "p1"]),
        ("{0}\n" + "[" * 100_000 + "\n{1}", ["p0", "p1"]),
        ("{0}", ["p0"]),
    ],
)
def test_forms_of_json(tmp_path, text, expected):
    lines = [json.dumps(row(f"p{index}")) for index in range(2)]
    for kind in ("json", "jsonl"):
        (tmp_path / f"rows.{kind}").write_text(text.format(*lines), encoding="utf-8", newline="")
        assert prompts_of(tmp_path / f"rows.{kind}") == expected


def test_broken_lines_are_named(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [row(f"p{index}") for index in range(4)])
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1][:-3]
    lines[2] = lines[2].replace(b"p2", b"\xff\xfe")
    path.write_bytes(b"\n".join(lines))
    with pytest.warns(match="2 × not a row") as warned:
        assert read_candidates(path).prompts == ["p0", "p3"]
    said = str(warned[0].message)
    assert "row 1: line 2 is no JSON" in said and "row 2: line 3 is no JSON: 'utf-8' codec" in said
    path = tmp_path / "rows.csv"
    path.write_text("prompt,chosen,rejected\np0,a,b\np1,a\np2,a,b,c\np3,a,b\n")
    with pytest.warns(match="line 3 has 2 cells, the first line 3; row 2: line 4 has 4 cells"):
        assert read_candidates(path).prompts == ["p0", "p3"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", b"", "the file is empty"),
        ("rows.jsonl", b"\n \n", "cannot be read"),
        ("rows.json", b"[1, 2", "not JSON"),
        ("rows.json", b'{"prompt": ["a"],\n "chosen": ["a", "b"]}', "columns of equal length"),
        ("rows.json", b"[" * 100_000, "not JSON: "),
        ("rows.csv", b"prompt,chosen,rejected\n", "no row under"),
        ("rows.csv", b"prompt,prompt\na,b\n", "a column more than once"),
        ("rows.csv", b'prompt,chosen,rejected\np,"a,b\n', "unexpected end of data"),
        ("rows.parquet", b"PAR1", "cannot be read"),
        ("rows.json.bak", b"{}", "use a file of one of the types"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: cannot be read: .*{expected}|{expected}") as error:
        read_candidates(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_directories(tmp_path):
    def fresh(name, *files, **content):
        for file in files:
            write_rows(tmp_path / name / file, [row(file)])
        return tmp_path / name

    assert prompts_of(fresh("several", "b.jsonl", "a.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert prompts_of(fresh("splits", "train-0.parquet", "test-0.parquet")) == ["train-0.parquet"]
    assert prompts_of(fresh("folders", "train/x.csv", "validation/x.csv")) == ["train/x.csv"]
    assert prompts_of(fresh("named", "train.jsonl", "rest.jsonl")) == ["train.jsonl"]
    hidden = fresh("hidden", "rows.jsonl", ".cache/rows.jsonl", "dataset_info.json")
    assert prompts_of(hidden) == ["rows.jsonl"]
    for name, files, expected in (
        ("mixed", ("a.jsonl", "b.csv"), r"several types \(.csv, .jsonl\)"),
        ("tests", ("test.jsonl",), "no file of one of the types"),
    ):
        with pytest.raises(ValueError, match=f"{name}: cannot be read: .*{expected}"):
            read_candidates(fresh(name, *files))
    (hidden / "README.md").write_text("---\nconfigs:\n- config_name: default\n---\n")
    with pytest.raises(ValueError, match="says which files are which"):
        read_candidates(hidden)


def test_saved_data_sets(tmp_path):
    data = datasets.Dataset.from_list([row("p0"), row("p1")])
    data.select([1]).save_to_disk(tmp_path / "selected")
    assert prompts_of(tmp_path / "selected") == ["p1"]
    data.with_format("torch", columns=["chosen"]).save_to_disk(tmp_path / "hidden")
    with pytest.raises(ValueError, match=r"hides the columns \['prompt', 'rejected'\]"):
        read_candidates(tmp_path / "hidden")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "test")
    with pytest.raises(ValueError, match="no split 'train'"):
        read_candidates(tmp_path / "test")
    state = tmp_path / "selected" / "state.json"
    for text in ("{", "{}", json.dumps({"_data_files": [{"filename": "../hidden/data-00000-of-00001.arrow"}]})):
        state.write_text(text)
        with pytest.raises(ValueError, match="selected: cannot be read"):
            read_candidates(tmp_path / "selected")


def test_a_data_set_is_read_as_it_shows_itself():
    data = datasets.Dataset.from_list([row("p0", more=1), row("p1", more=2)])
    asked = data.with_transform(lambda batch: {**batch, "prompt": [f"ask {text}" for text in batch["prompt"]]})
    assert prompts_of(asked) == ["ask p0", "ask p1"] == prompts_of(datasets.DatasetDict(train=asked))
    renamed = data.with_transform(
        lambda batch: {"prompt": batch["chosen"], "chosen": batch["rejected"], "rejected": batch["prompt"]}
    )
    assert prompts_of(renamed) == ["a"]
    assert prompts_of(data.with_format("numpy")) == ["p0", "p1"]
    shown = data.with_format(columns=["prompt", "chosen", "rejected"])
    assert read_responses(shown)[0].columns == {} and read_responses(data)[0].columns == {"more": 1}
    assert prompts_of(data.with_format(columns=["more"], output_all_columns=True)) == ["p0", "p1"]
    with pytest.raises(ValueError, match=r"dataset.reset_format\(\)"):
        read_candidates(data.with_format(columns=["chosen", "rejected"]))


def test_a_mapping_of_columns():
    assert prompts_of({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}) == ["p"]
    for columns in ({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": ["p"], "chosen": ["a", "b"]}):
        with pytest.raises(ValueError, match="columns to lists of equal length"):
            read_candidates(columns)
