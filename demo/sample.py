"""Sample replies to the demo's prompts, score them with the tasks' checks, and describe the result.

    python demo/sample.py              sample; continues where an interrupted run stopped
    python demo/sample.py --rescore    score the stored replies again after a check has changed (no model)
    python demo/sample.py --describe   print the table of demo/README.md (no model)

Writes `responses.jsonl`, one prompt a line, and `provenance.json` into the output directory.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from models import POLICY, POLICY_PACKAGE, policy
from tasks import Task, tasks

DATA = Path(__file__).resolve().parent / "data"
TEMPERATURE = 0.7
TOP_P = 0.95

Record = dict[str, Any]


def prompt_of(record: Record) -> str:
    """The user's message of a record."""
    return record["prompt"][0]["content"]


def make_record(task: Task, responses: list[str]) -> Record:
    """Score `responses` to a task and lay out one line of the data."""
    return {
        "id": task.id,
        "kind": task.kind,
        "split": task.split,
        "prompt": [{"role": "user", "content": task.prompt}],
        "responses": responses,
        "scores": [task.check(response) for response in responses],
    }


def read(path: Path) -> list[Record]:
    """Read the records of a JSON Lines file, without a last line that an interrupted run left unfinished."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def to_line(record: Record) -> str:
    """One line of JSON Lines."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def refresh(records: list[Record]) -> list[Record]:
    """Score stored replies again, in the order of the tasks; records whose prompt is no task's any more are dropped."""
    stored = {prompt_of(record): record["responses"] for record in records}
    return [make_record(task, stored[task.prompt]) for task in tasks() if task.prompt in stored]


def store(output: Path, records: list[Record], provenance: Record) -> None:
    """Write the records and, with their hash, the provenance."""
    text = "".join(map(to_line, records))
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    write(output / "responses.jsonl", text)
    write(output / "provenance.json", json.dumps(provenance | {"sha256": digest}, indent=2) + "\n")


def prompt_seed(seed: int, prompt: str) -> int:
    """A seed of the prompt's own, so that its replies depend neither on where a run resumed nor on other prompts."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:8], "big") >> 1


def sample(args: argparse.Namespace) -> None:
    """Sample replies to all prompts that have none yet."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = args.model or policy()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {
        "model": Path(args.model).name if args.model else POLICY,
        "package": None if args.model else f"{POLICY_PACKAGE}=={importlib.metadata.version(POLICY_PACKAGE)}",
        "seed": args.seed,
        "responses": args.responses,
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "max_new_tokens": args.max_new_tokens,
        "dtype": "float32",
        "device": device,
        "libraries": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    provenance_file = args.output / "provenance.json"
    earlier: Record = {}
    if provenance_file.exists():
        earlier = json.loads(provenance_file.read_text(encoding="utf-8"))
        differing = [key for key, value in settings.items() if earlier.get(key) != value]
        if differing:
            sys.exit(f"{args.output} was sampled with other settings ({', '.join(differing)}); choose another --output")
    records = refresh(read(args.output / "responses.jsonl"))
    done = {prompt_of(record) for record in records}
    todo = [task for task in tasks() if task.prompt not in done]
    if not todo and "mean_response_tokens" in earlier:  # which is written last
        print(f"{args.output} is complete")
        return
    command = shlex.join(["python", "demo/sample.py", *sys.argv[1:]])
    today = datetime.datetime.now(datetime.timezone.utc).date()
    provenance = settings | {"date": today.isoformat(), "command": command}
    store(args.output, records, provenance)

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    with (args.output / "responses.jsonl").open("a", encoding="utf-8", newline="\n") as file:
        for task in tqdm(todo, unit="prompt"):
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": task.prompt}],
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            ).to(device)
            torch.manual_seed(prompt_seed(args.seed, task.prompt))
            with torch.inference_mode():
                tokens = model.generate(
                    **inputs,
                    do_sample=True,
                    temperature=TEMPERATURE,
                    top_p=TOP_P,
                    top_k=0,  # off: generate's default would cut to 50
                    max_new_tokens=args.max_new_tokens,
                    num_return_sequences=args.responses,
                )
            replies = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            records.append(make_record(task, [reply.strip() for reply in replies]))
            file.write(to_line(records[-1]))
            file.flush()
    lengths = [len(ids) for record in records for ids in tokenizer(record["responses"])["input_ids"]]
    store(args.output, refresh(records), provenance | {"mean_response_tokens": round(statistics.mean(lengths), 1)})


def rescore(output: Path) -> None:
    """Score the stored replies with the checks as they are now."""
    provenance = json.loads((output / "provenance.json").read_text(encoding="utf-8"))
    store(output, refresh(read(output / "responses.jsonl")), provenance)


def length_correlation(record: Record) -> float | None:
    """Pearson's correlation of score and length in characters within a prompt; None where either is constant."""
    lengths = [len(response) for response in record["responses"]]
    if len(set(lengths)) < 2 or len(set(record["scores"])) < 2:
        return None
    return statistics.correlation(lengths, record["scores"])


def describe(records: list[Record]) -> str:
    """A Markdown table with a line for each kind and one for all."""
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record["kind"], []).append(record)
    rows = [
        "| kind | prompts | held out | mean score | ≥ 2 scores | distinct scores | length correlation | words |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for kind, members in [*kinds.items(), ("**all**", records)]:
        distinct = [len(set(record["scores"])) for record in members]
        correlations = [r for r in map(length_correlation, members) if r is not None]
        rows.append(
            f"| {kind} | {len(members)} | {sum(record['split'] == 'heldout' for record in members)} "
            f"| {statistics.mean(score for record in members for score in record['scores']):.2f} "
            f"| {statistics.mean(count >= 2 for count in distinct):.0%} | {statistics.mean(distinct):.1f} "
            f"| {statistics.mean(correlations):+.2f} "
            f"| {statistics.mean(len(text.split()) for record in members for text in record['responses']):.0f} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Sample and score replies to the demo's prompts.")
    parser.add_argument("--model", help="a causal chat model, directory or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", type=Path, default=DATA, help="output directory (default: demo/data)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--responses", type=int, default=8, help="replies to a prompt (default: 8)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longer replies are cut off (default: 48)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--rescore", action="store_true", help="score the stored replies again, without a model")
    mode.add_argument("--describe", action="store_true", help="print a table of the stored replies")
    args = parser.parse_args()
    if args.rescore:
        rescore(args.output)
    elif args.describe:
        print(describe(read(args.output / "responses.jsonl")))
    else:
        sample(args)


if __name__ == "__main__":
    main()
