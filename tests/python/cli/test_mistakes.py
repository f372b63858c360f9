"""Mistakes that a person makes at a shell, and what is said: in the shell's words, before anything is loaded."""

import io
import json
import shlex
import subprocess
import sys

import pytest

from bpo.cli.main import main
from tiny import scored_rows

TRAIN = "train model rows.jsonl --budget 3 --output_dir out"
SELECT = "select model rows.jsonl --output out"
RESELECT = "reselect store rows.jsonl --output out"
PREVIEW = "preview store rows.jsonl --budget 3"

# What is refused by the words alone (2), or by what they name (1): status, command, what is said.
MISTAKES = [
    # commands and options
    (2, "selct model rows.jsonl --budget 3", "bpo: selct: there is no such command; did you mean select?"),
    (2, "frobnicate", "bpo: frobnicate: there is no such command; there are doctor, select, train"),
    (2, "--verison", "bpo: --verison: there is no such option before a command"),
    (2, "", "bpo: the following arguments are required: COMMAND"),
    (2, "store verfy x", "bpo store: verfy: there is no such command; did you mean verify?"),
    (2, f"{SELECT} --budgett 3", "bpo select: --budgett: there is no such option; did you mean --budget?"),
    (2, f"{SELECT} --budget 3 --stratgy bpo", "--stratgy: there is no such option; did you mean --strategy?"),
    (2, f"{SELECT} --budget 3 --zzz", "--zzz: there is no such option\n"),
    (2, f"{SELECT} --budget 3 --beta 0.2", "--beta: there is no such option; did you mean --set beta=…?"),
    (2, f"{SELECT} --budget 3 --min-depth=0", "--min-depth: there is no such option; did you mean --set min_depth=…?"),
    (2, f"{SELECT} --budget 3 --dataset-nmae x", "did you mean --dataset_name?"),
    (2, "sample model rows.jsonl --output o.jsonl --max_new_token_s 3", "did you mean --max-new-tokens?"),
    (2, SELECT, "bpo select: the following arguments are required: --budget"),
    (2, "select model --budget 3 --output out", "the following arguments are required: dataset"),
    (2, f"{SELECT} --budget", "argument --budget: expected one argument"),
    (2, f"{SELECT} --budget 3 more.jsonl", "bpo: more.jsonl: is one argument too many for bpo select"),
    (2, f"{SELECT} --budget 3 --model_name_or_path other", "is one argument too many for bpo select"),
    (2, f"{SELECT} --budget 3 --quiet --json", "argument --json: not allowed with argument --quiet"),
    (2, f"{SELECT} --budget 3 --store s --no_store", "argument --no_store: not allowed with argument --store"),
    # values
    (2, f"{SELECT} --budget many", "argument --budget: 'many' is no count such as 500, nor a fraction"),
    (2, f"{SELECT} --budget 0", "argument --budget: '0' is no count"),
    (2, f"{SELECT} --budget 1.5", "argument --budget: '1.5' is no count"),
    (2, f"{SELECT} --budget 3 --breadth -2", "argument --breadth: '-2' is no count"),
    (2, f"{SELECT} --budget 3 --seed -1", "argument --seed: '-1' is no whole number"),
    (2, f"{SELECT} --budget 3 --strategy unifrom", "'unifrom' is no strategy; did you mean uniform?"),
    (2, f"{SELECT} --budget 3 --strategy zzz", "'zzz' is no strategy; there are bpo, uniform"),
    (2, f"{SELECT} --budget 3 --column question", "'question': write NAME=YOURS, as in prompt=question"),
    (2, "collect model rows.jsonl --store s --shard 3", "argument --shard: '3' is no share such as 2/4"),
    (2, "collect model rows.jsonl --store s --shard 5/4", "argument --shard: '5/4' is no share such as 2/4"),
    (2, "sample model rows.jsonl --output o.jsonl --keep truncate", "'truncate' is not among its values; did you mean"),
    (2, "store merge out a --dtype float8", "did you mean float"),
    (2, "score rows.jsonl --output o.jsonl", "one of the arguments --reward-model --judge --function is required"),
    # --set, in the words of the shell
    (1, f"{SELECT} --budget 3 --set min_dept=0", "--set min_dept=…: there is no such field; did you mean min_depth?"),
    (1, f"{SELECT} --budget 3 --set zzz=0", "bpo: --set zzz=…: there is no such field\n"),
    (1, f"{SELECT} --budget 3 --set min_depth", "bpo: --set min_depth: write FIELD=VALUE"),
    (1, f"{SELECT} --budget 3 --set beta=-1", "bpo: --set beta must be above 0, got -1"),
    (1, f"{RESELECT} --budget 3 --set ranking=nearst", "bpo: --set ranking must be one of"),
    (1, f"{PREVIEW} --set min_dept=0", "bpo: --set min_dept=…: there is no such field; did you mean min_depth?"),
    (1, "doctor model rows.jsonl --set dtyp=bfloat16", "there is no such field; did you mean dtype?"),
    (1, "sample model rows.jsonl --output o.jsonl --set devise=cpu", "there is no such field; did you mean device?"),
    (1, f"{SELECT} --budget 3 --strategy less", "bpo: --strategy less needs a target: pairs that say where to go"),
    # what is read
    (1, "select model row.jsonl --budget 3 --output out", "row.jsonl: no such file or directory, and not the form"),
    (1, "select model row.jsonl --budget 3 --output out", "Did you mean rows.jsonl?"),
    (1, "select ./nowhere rows.jsonl --budget 3 --output out", "./nowhere: no such model directory"),
    (1, "select empty rows.jsonl --budget 3 --output out", "empty: the directory holds no config.json"),
    (1, "doctor ./nowhere rows.jsonl", "./nowhere: no such model directory"),
    (1, "train ./nowhere rows.jsonl --budget 3 --output_dir out", "./nowhere: no such model directory"),
    (1, f"{TRAIN} --learning_rat 1e-6", "--learning_rat: neither bpo train nor TRL has such an option; did you mean"),
    (1, "preview nostore rows.jsonl --budget 3", "bpo: nostore holds no gradient store: there is no such directory"),
    (1, "compare nowhere.yaml --output out", "bpo: nowhere.yaml: there is no such file"),
    (1, "show nowhere", "bpo: nowhere holds no gradient store, and there is no such file or directory"),
    (1, "report empty", "bpo: empty holds no saved selection"),
    (1, f"{SELECT} --budget 3 --split train_prefs", "rows.jsonl: cannot be read: a file has no splits such as"),
    (1, f"{SELECT} --budget 3 --dataset_config en", "only data sets of the hub have configurations such as 'en'"),
    (1, f"{SELECT} --budget 3 --column prompt=questoin", "The data has no column 'questoin' for 'prompt'"),
    (1, "select model - --split test --budget 3 --output out", "--split and --dataset_config belong to data sets of"),
    (1, "select model - --budget 3 --output out", "bpo: the standard input: there is nothing in it"),
    # what is written
    (1, f"{PREVIEW} --figure x.bmp", "bpo: --figure x.bmp: the name must end in .svg or .png or .pdf"),
    (1, f"{PREVIEW} --output x.txt", "bpo: --output x.txt: the name must end in .json"),
    (1, f"{PREVIEW} --output empty.json", "bpo: --output empty.json: is a directory; name a file"),
    (1, "sample model rows.jsonl --output out.csv", "bpo: --output out.csv: the name must end in .jsonl"),
    (1, "report selection --output page.pdf", "bpo: --output page.pdf: the name must end in .html"),
    (1, "store export store rows.csv", "bpo: output rows.csv: the name must end in .npz or .parquet"),
    (1, "select model rows.jsonl --budget 3 --output rows.jsonl/out", "no directory"),
    (1, "select model rows.jsonl --budget 3 --output selection", "--output selection holds an earlier selection"),
    (1, f"{SELECT} --budget 3 --store rows.jsonl", "--store and dataset are the same"),
    # --config
    (2, "select --config none.yaml", "bpo select: --config none.yaml: cannot be read: No such file or directory"),
    (2, "select --config rows.jsonl", "bpo select: --config rows.jsonl: "),
    (2, "select --config bad.yaml", "--config bad.yaml: --budgett: there is no such option; did you mean --budget?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with rows, and what looks like a model, a store and a selection, which nothing gets as far as."""
    place = tmp_path_factory.mktemp("mistakes")
    for name in ("model", "empty", "empty.json", "store", "selection"):
        (place / name).mkdir()
    (place / "model" / "config.json").write_text("{}")
    (place / "selection" / "selection.json").write_text('{"format": "bpo-selection"}')
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored_rows(3, 3)))
    (place / "bad.yaml").write_text("model_name_or_path: model\nbudgett: 3\n")
    return place


@pytest.mark.parametrize(("status", "command", "said"), MISTAKES)
def test_mistake(status, command, said, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    before = sorted(place.rglob("*"))
    try:
        ended = main(shlex.split(command))
    except SystemExit as end:
        ended = end.code
    printed = capsys.readouterr()
    assert said in printed.err, printed.err
    assert ended == status and printed.out == ""
    assert printed.err.startswith("bpo") and len(printed.err.splitlines()) == status  # where it is 2, See … --help.
    assert "SelectConfig" not in printed.err
    assert sorted(place.rglob("*")) == before


def test_what_is_refused_by_its_words_is_refused_before_torch_is_imported(place):
    """All in one process, in which each must find the heavy libraries not imported yet."""
    loaded = [
        (status, command) for status, command, said in MISTAKES if "split" not in command and "column" not in command
    ]
    quick = [(s, c) for s, c in loaded if not c.startswith("select model - ") and "dataset_config" not in c]
    assert len(quick) > 50
    code = f"""
import contextlib, io, shlex, sys
from bpo.cli.main import main
for status, command in {quick!r}:
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            ended = main(shlex.split(command))
        except SystemExit as end:
            ended = end.code
    assert ended == status, (command, ended)
    # tqdm reads when it is imported whether --quiet leaves out its bars.
    heavy = {{"torch", "transformers", "trl", "datasets", "tqdm"}} & set(sys.modules)
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
