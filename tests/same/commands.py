"""The command: every help text, and runs of every sub-command with what they print and write."""

from importlib.metadata import entry_points
from pathlib import Path

import yaml

from answers import Server
from comparisons import CONFIG, FILES, PREVIEW_TIME, TABLE_TIMES
from record import captured, observation, without_bars
from world import scored_rows, write_rows

[MAIN] = (point.load() for point in entry_points(group="console_scripts", name="bpo"))
COMMANDS = ("select", "reselect", "preview", "sample", "score", "doctor", "compare", "show", "store")
TASKS = ("info", "verify", "repair", "merge", "export")
SMALL = ("--set", "sketch_dim=64", "--set", "lora_rank=4")
RUNS = {
    "select": "select model rows.jsonl --budget 23 --breadth 7 --store cli-s --output chosen",
    "select again": "select model rows.jsonl --budget 0.4 --strategy coreset --store cli-s --output chosen-again",
    "select less": "select model rows.jsonl --budget 20 --strategy less --target target.jsonl --output toward --seed 3",
    "select pairs": "select model pairs.jsonl --budget 14 --output cli-pairs",
    "reselect": "reselect cli-s rows.jsonl --budget 30 --output cli-again --set length_control=residual",
    "show selection": "show chosen",
    "show store": "show cli-s",
    "preview": "preview cli-s rows.jsonl --budget 9 --budget 12 --seeds 3 --output cli-preview.json --figure cli.svg",
    "preview arms": 'preview cli-s rows.jsonl --budget 9 --arm bpo --arm {"name":"u","strategy":"uniform"} --seeds 2',
    "show preview": "show cli-preview.json",
    "store info": "store info cli-s",
    "store verify": "store verify cli-s",
    "store repair": "store repair cli-s",
    "store merge": "store merge cli-merged cli-s --dtype bfloat16",
    "store export": "store export cli-s cli-rows.parquet",
    "sample": "sample model rows.jsonl --output asked.jsonl --n-responses 3 --max-new-tokens 8 --keep truncated",
    "sample again": "sample model rows.jsonl --output asked.jsonl --n-responses 3 --max-new-tokens 8 --keep truncated",
    "score": "score asked.jsonl --function cli_scorer:length --output cli-scored.jsonl",
    "doctor": "doctor model rows.jsonl --set sketch_dim=64",
    "compare": "compare cli-compare.yaml --output cli-comparison --jobs 2",
    "show comparison": "show cli-comparison",
}
HIDDEN = {
    "doctor": [(r"estimate   .* of memory", "estimate   TIME AND MEMORY")],
    **dict.fromkeys(("preview", "preview arms", "show preview"), PREVIEW_TIME),
    **dict.fromkeys(("compare", "show comparison"), TABLE_TIMES),
}
WRONG = {
    "no command": "",
    "unknown command": "choose",
    "no budget": "select model rows.jsonl --output wrong",
    "bad budget": "select model rows.jsonl --budget many --output wrong",
    "budget below": "select model rows.jsonl --budget 3 --output wrong",
    "budget above": "select model rows.jsonl --budget 1000 --output wrong",
    "unknown strategy": "select model rows.jsonl --budget 20 --strategy best --output wrong",
    "unknown field": "select model rows.jsonl --budget 20 --set colour=red --output wrong",
    "no value": "select model rows.jsonl --budget 20 --set colour --output wrong",
    "no model": "select ./nowhere rows.jsonl --budget 20 --output wrong",
    "no data": "select model nowhere.jsonl --budget 20 --output wrong",
    "other output": "select model rows.jsonl --budget 20 --output model",
    "other store": "select model rows.jsonl --budget 20 --store store --set sketch_dim=32 --output wrong",
    "no store": "reselect nowhere rows.jsonl --budget 20 --output wrong",
    "nothing to show": "show nowhere",
    "no preview": "show target.jsonl",
    "bad arm": "preview cli-s rows.jsonl --budget 9 --arm {name",
    "no scorer": "score rows.jsonl --output wrong.jsonl",
    "no function": "score rows.jsonl --function cli_scorer:width --output wrong.jsonl",
    "no name": "score rows.jsonl --judge http://localhost:1 --output wrong.jsonl",
    "no key": "sample http://localhost:1 rows.jsonl --model m --api-key-env BPO_NOT_SET --output wrong.jsonl",
    "no jsonl": "sample model rows.jsonl --output wrong.txt",
    "bad format": "store export cli-s wrong.csv",
    "bad comparison": "compare wrong.yaml --output wrong",
}


def run(record, name, arguments, hidden=()):
    """Runs the command in this process, and writes down what it prints and returns."""
    with captured() as (out, err):
        try:
            status = MAIN(arguments)
        except SystemExit as stopped:
            status = f"exit {stopped.code}"
    printed = f"status {status}\n--- stdout\n{out.getvalue()}\n--- stderr\n{without_bars(err.getvalue())}"
    record.text(f"{name}.txt", printed, hidden=hidden)


@observation
def help_texts(record, world):
    run(record, "bpo", ["--help"])
    run(record, "version", ["--version"])
    for command in COMMANDS:
        run(record, command, [command, "--help"])
    for task in TASKS:
        run(record, f"store {task}", ["store", task, "--help"])


@observation
def runs(record, world):
    Path("cli_scorer.py").write_text("def length(prompt, response):\n    return len(response)\n")
    write_rows("cli-many.jsonl", scored_rows(12, 4, seed=5))
    compared = {**CONFIG, "dataset": "cli-many.jsonl", "arms": ["bpo", "random"], "seeds": [1], "budget": 10}
    Path("cli-compare.yaml").write_text(yaml.safe_dump(compared))
    for name, line in RUNS.items():
        small = SMALL if name.startswith("select") else ()
        run(record, name, [*line.split(), *small], HIDDEN.get(name, ()))
    for name in ("chosen", "cli-again", "cli-s", "cli-merged", "cli-rows.parquet", "cli-scored.jsonl"):
        record.files(f"written/{name}", name)
    record.files("written/cli-preview.json", "cli-preview.json")
    record.files("written/cli-comparison", "cli-comparison", hidden=FILES, without=r"figures/costs\..*")


@observation
def servers(record, world):
    with Server() as server:
        record.replaced[server.url] = "SERVER"
        sample = f"sample {server.url} rows.jsonl --model m --concurrency 1 --n-responses 3 --output asked-server.jsonl"
        run(record, "sample", sample.split())
        for mode in ("rating", "pairwise"):
            score = f"score asked-server.jsonl --judge {server.url} --model m --mode {mode} --output {mode}.jsonl"
            run(record, mode, score.split())
            record.files(f"{mode}.jsonl", f"{mode}.jsonl")


@observation
def wrong(record, world):
    Path("wrong.yaml").write_text("model: model\ndataset: rows.jsonl\nbudget: 10\narms: [best]\n")
    for name, line in WRONG.items():
        run(record, name, line.split())
