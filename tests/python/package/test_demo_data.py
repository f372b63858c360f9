"""The demo's prompts, checks and stored replies; no model is loaded."""

import hashlib
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[3] / "demo"


def load(name):
    """Import a module of the demo by its path."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


TASKS = load("tasks").tasks()
TASK = {task.id: task for task in TASKS}
RECORDS = [json.loads(line) for line in (DEMO / "data" / "responses.jsonl").read_text(encoding="utf-8").splitlines()]

# One hand-written full-score reply and one middling reply of each kind.
REPLIES = {
    "listing-00": ("- apple\n- pear\n- plum", "Here are two:\n- apple\n- chair"),
    "arithmetic-00": ("3 x 12 = 36. Answer: 36", "3 + 12 = 15. Answer: 15"),
    "json-00": ('{"name": "Ana", "age": 31, "city": "Lima"}', 'Sure: {"name": "Ana", "years": 31}'),
    "conversion-00": ("3 kilometres are 3000 metres.", "3 kilometres are 300 metres."),
    "extraction-00": ("On Friday.", "She sold red kites on Monday and blue kites on Friday."),
    "rewriting-03": ("She walked to school.", "She walks to school."),
    "yes_no-01": ("No, because their wings are made for swimming.", "Yes, because they have wings."),
    "sorting-00": ("apple, fig, melon, pear", "apple, melon, fig, pear"),
    "fact-00": ("The capital of Italy is Rome.", "The capital of Italy is Milan."),
    "keywords-00": ("She left bread and a lamp by the river.", "She left bread by the river last night."),
    "wordplay-00": ("hat, bat, mat", "hat, dog, mat"),
    "explanation-01": ("We sleep so that the body and the brain can rest and recover.", "We sleep when we are tired."),
}


def test_size_and_ids():
    assert len(TASKS) >= 160
    assert len(TASK) == len(TASKS) == len({task.prompt for task in TASKS})
    kinds = Counter(task.kind for task in TASKS)
    assert len(kinds) >= 10
    assert min(kinds.values()) >= 14


def test_split_is_stratified_and_disjoint():
    held_out = Counter(task.kind for task in TASKS if task.split == "heldout")
    train = Counter(task.kind for task in TASKS if task.split == "train")
    assert held_out.total() + train.total() == len(TASKS)
    assert held_out.total() >= 40
    for kind in train:
        assert held_out[kind] / (held_out[kind] + train[kind]) == pytest.approx(0.25, abs=0.05)
    prompts = {split: {t.prompt for t in TASKS if t.split == split} for split in ("train", "heldout")}
    assert not prompts["train"] & prompts["heldout"]


def test_every_kind_has_replies_to_check():
    assert {TASK[task_id].kind for task_id in REPLIES} == {task.kind for task in TASKS}


@pytest.mark.parametrize("task_id", REPLIES)
def test_check_grades(task_id):
    full, middling = REPLIES[task_id]
    check = TASK[task_id].check
    assert check(full) == 1.0
    assert 0.2 < check(middling) < 0.9
    assert check("") == 0.0
    assert check("I am happy to help you with that! " * 6) < 0.4


def test_checks_stay_in_range():
    rng = random.Random(0)
    pieces = [reply for pair in REPLIES.values() for reply in pair]
    pieces += ["", " ", "\n", "{", '{"a": [1', "[1]", "3.5", "1,000,000", "0", "É", "🙂", "?", "-", "a" * 500]
    for task in TASKS:
        for _ in range(20):
            text = rng.choice(["", " ", "\n", ", "]).join(rng.choices(pieces, k=rng.randint(1, 4)))
            assert 0.0 <= task.check(text) <= 1.0, (task.id, text)


def test_records_match_the_tasks():
    assert [record["id"] for record in RECORDS] == [task.id for task in TASKS]
    for record in RECORDS:
        task = TASK[record["id"]]
        assert record["prompt"] == [{"role": "user", "content": task.prompt}]
        assert (record["kind"], record["split"]) == (task.kind, task.split)
        assert len(record["responses"]) == len(record["scores"]) == 8


def test_scores_equal_rescoring():
    for record in RECORDS:
        check = TASK[record["id"]].check
        assert record["scores"] == [check(response) for response in record["responses"]], record["id"]


def test_scores_have_spread():
    distinct = [len(set(record["scores"])) for record in RECORDS]
    assert statistics.mean(count >= 2 for count in distinct) >= 0.9
    assert statistics.mean(distinct) >= 3.5


def test_provenance_matches_the_data():
    provenance = json.loads((DEMO / "data" / "provenance.json").read_text(encoding="utf-8"))
    # Hash of the text with "\n" line ends, as written; a checkout may have changed them.
    text = (DEMO / "data" / "responses.jsonl").read_text(encoding="utf-8")
    assert hashlib.sha256(text.encode("utf-8")).hexdigest() == provenance["sha256"]
    assert provenance["responses"] == 8


def test_readme_table_is_current():
    command = [sys.executable, str(DEMO / "sample.py"), "--describe"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    table = subprocess.run(command, env=environment, capture_output=True, check=True, encoding="utf-8").stdout
    assert table.strip() in (DEMO / "README.md").read_text(encoding="utf-8")
