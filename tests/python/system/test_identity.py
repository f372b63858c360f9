"""What a function is made of: other values give another identity, the same program the same one."""

import functools
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from bpo.system.identity import NOT_COMPARED, identity_of

FACTOR = 1


def helpful(prompt, response, k=1):
    return k * len(response)


def harmful(prompt, response, k=1):
    return -k * len(response)


def uses_a_global(prompt, response):
    return FACTOR * len(response)


def uses_a_helper(prompt, response):
    return next(helpful(prompt, text) for text in (response,))


class Weighted:
    bias = 0

    def __init__(self, k):
        self.k = k

    def __call__(self, prompt, response):
        return self.k * len(response)


class Slots:
    __slots__ = ("k", "lock")

    def __init__(self, k):
        self.k, self.lock = k, threading.Lock()


def over(k):
    return lambda prompt, response: k


def scaled(k):
    def wrap(function):
        @functools.wraps(function)
        def inner(prompt, response):
            return k * function(prompt, response)

        return inner

    return wrap


def linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    "made",
    [
        lambda k: functools.partial(helpful, k=k),
        lambda k: functools.partial(functools.partial(helpful, k=k)),
        lambda k: functools.partial((helpful, harmful)[k]),
        lambda k: functools.lru_cache((helpful, harmful)[k]),
        lambda k: scaled(k)(helpful),
        lambda k: [lambda prompt, response: 0, lambda prompt, response: 1][k],
        lambda k: Weighted(k),
        lambda k: Weighted(k).__call__,
        lambda k: over(k),
        lambda k: over(str(k)),
        lambda k: over(float(k) * float("inf")),
        lambda k: over({"weights": [k, 0.5], "names": {"a", str(k)}}),
        lambda k: over(Weighted([k])),
        lambda k: over(Slots(k)),
        lambda k: over([Slots(0), k]),
        lambda k: over([(Weighted(k), threading.Lock()), k]),
        lambda k: over(np.full(3, k)),
        lambda k: over(np.float32(k)),
        lambda k: over(torch.full((2,), k, dtype=torch.bfloat16)),
        lambda k: over(linear(k)),
        lambda k: over(torch.nn.Dropout(k / 2)),
        lambda k: over(Path(str(k))),
        lambda k: over((helpful, harmful)[k]),
        lambda k: type("Local", (), {"__call__": (helpful, harmful)[k]})(),
    ],
)
def test_another_value_is_another_function(made):
    assert identity_of(made(0)) == identity_of(made(0))
    assert identity_of(made(0)) != identity_of(made(1))
    json.dumps(identity_of(made(0)))


def test_globals_helpers_and_classes_count(monkeypatch):
    before = [identity_of(thing) for thing in (uses_a_global, uses_a_helper, Weighted(1))]
    monkeypatch.setitem(globals(), "FACTOR", 2)
    monkeypatch.setitem(globals(), "helpful", harmful)
    monkeypatch.setattr(Weighted, "bias", 1)
    after = [identity_of(thing) for thing in (uses_a_global, uses_a_helper, Weighted(1))]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert before[0]["globals"] == {"FACTOR": 1} and after[0]["globals"] == {"FACTOR": 2}


def test_no_text_is_told_and_what_has_no_content_is_named():
    scorer = Weighted(3)
    scorer.api_key, scorer.lock, scorer.itself = "sk-secret", threading.Lock(), scorer
    told = identity_of(scorer)
    assert "secret" not in json.dumps(told) and told["k"] == 3
    assert told["lock"] == f"{NOT_COMPARED}: _thread.lock"
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert identity_of(over(deep))["function"].startswith(NOT_COMPARED)


PROGRAM = """
import json
from bpo.system.identity import identity_of

SHARED = {"names": {"one", "two", "three"}, "x": 1}

class Judge:
    '''Says so.'''
    kinds = frozenset({"a", "b", "c"})
    def __init__(self):
        self.client = open("/dev/null")
    def __call__(self, prompt, response):  # a comment
        return len(response) if response in {"x", "y", "z"} else len(SHARED)

print(json.dumps(identity_of(Judge())))
"""


def test_the_same_program_gives_the_same_identity_whatever_its_comments(tmp_path):
    path = tmp_path / "program.py"
    told = set()
    for text in (PROGRAM, PROGRAM, PROGRAM.replace("  # a comment", "\n")):
        path.write_text(text)
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
        told.add(done.stdout)
    assert len(told) == 1 and "not compared: _io.TextIOWrapper" in told.pop()
