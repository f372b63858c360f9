"""What scorers give: a number counts in whatever form, everything else is named at its place, the rest finished."""

import decimal
import fractions
import json
from typing import NamedTuple

import numpy as np
import pytest
import torch

import bpo
from bpo.responses.scorer import Score, load_function
from tiny import scored_rows

ROWS = [{"prompt": f"p{index}", "responses": [f"a{index}", f"bb{index}", f"ccc{index}"]} for index in range(4)]
RIGHT = [[2.0, 3.0, 4.0]] * 4


def score(rows, scorer, **settings):
    return bpo.score_responses(rows, scorer, progress=False, **settings)


class Given(NamedTuple):
    value: object
    error: str | None = None


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (True, 1.0),
        (np.bool_(False), 0.0),
        (np.float16(1.5), 1.5),
        (np.array([[2.5]]), 2.5),
        (np.array(2, dtype=np.int8), 2.0),
        (torch.tensor(1.25), 1.25),
        (torch.tensor([[1.25]], dtype=torch.bfloat16, requires_grad=True), 1.25),
        ([[0.5]], 0.5),
        ((torch.tensor([7]),), 7.0),
        (decimal.Decimal("1.5"), 1.5),
        (fractions.Fraction(1, 4), 0.25),
        (Score(torch.tensor(2.0)), 2.0),
        (Given(np.float32(4)), 4.0),
    ],
)
def test_every_form_of_a_number_is_that_number(value, number):
    assert Score.of(value) == Score(number)
    assert type(Score.of(value).value) is float


class Hostile:
    def __float__(self):
        raise RuntimeError("no")

    def __repr__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "the scorer gave none"),
        (float("nan"), "the scorer gave nan"),
        (torch.tensor(float("-inf")), "the scorer gave -inf"),
        (10**400, "the scorer gave inf"),
        (1e305, "the scorer gave 1e+305"),
        ("N/A", "the scorer gave str 'N/A', which is no number"),
        ("3", "the scorer gave str '3', which is no number"),
        (1j, "the scorer gave complex 1j, which is no number"),
        ([1.0, 2.0], "the scorer gave list [1.0, 2.0], which is no number"),
        ([], "the scorer gave list [], which is no number"),
        (np.array([1.0, 2.0]), "the scorer gave ndarray array([1., 2.]), which is no number"),
        (torch.empty(0), "the scorer gave Tensor tensor([]), which is no number"),
        (np.ma.masked, "the scorer gave MaskedConstant masked, which is no number"),
        ((number for number in [1.0]), "the scorer gave generator"),
        ({"score": 1.0}, "the scorer gave dict {'score': 1.0}, which is no number"),
        (torch.empty(1, device="meta"), "the scorer gave Tensor"),
        (Hostile(), "the scorer gave Hostile: RuntimeError: no"),
        ("\ud83d", "the scorer gave str '\\ud83d', which is no number"),
        (Score(None, "half \ud83d"), "half \\ud83d"),
    ],
)
def test_what_is_no_number_has_a_reason_that_a_file_can_hold(value, reason):
    given = Score.of(value)
    assert given.value is None and given.error.startswith(reason)
    given.error.encode()


FORMS = [float, np.float32, torch.tensor, lambda number: torch.tensor([number], dtype=torch.bfloat16)]


@pytest.mark.parametrize("form", FORMS)
def test_functions_may_give_any_form(form):
    assert score(ROWS, lambda prompt, response: form(len(response)))["scores"][:] == RIGHT


@pytest.mark.parametrize(
    "form", [np.array, torch.tensor, lambda values: torch.tensor(values)[:, None], iter, tuple, lambda values: values]
)
@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_lists_may_come_in_any_form(form, batch_size):
    def lengths(prompts, responses):
        return form([float(len(response)) for response in responses])

    assert score(ROWS, lengths, batch_size=batch_size)["scores"][:] == RIGHT


def test_one_bad_value_or_row_stops_no_other_and_is_tried_again(tmp_path):
    bad = {
        "a1": "N/A",
        "bb1": torch.tensor([1.0, 2.0]),
        "ccc2": float("nan"),
        "a3": KeyError("no such \ud83d key"),
        "bb3": RecursionError("deep"),
    }

    def picky(prompt, response):
        value = bad.get(response, torch.tensor(float(len(response))))
        if isinstance(value, Exception):
            raise value
        return value

    picky.describe = lambda: {"scorer": "picky"}
    path = tmp_path / "scores.jsonl"
    with pytest.warns(UserWarning, match="5 of 12 responses have no score.*the first: the scorer gave str 'N/A'"):
        dataset = score(ROWS, picky, output=path)
    assert dataset["scores"][:] == [[2, 3, 4], [None, None, 4], [2, 3, None], [None, None, 4]]
    told = dataset["score_errors"]
    assert told[1][0] == "the scorer gave str 'N/A', which is no number" and told[2] == [
        None,
        None,
        "the scorer gave nan",
    ]
    assert told[3] == ["KeyError: 'no such \\ud83d key'", "RecursionError: deep", None]
    bad.clear()
    assert score(ROWS, picky, output=path)["scores"][:] == RIGHT


def test_a_number_that_is_none_in_the_file_is_tried_again(tmp_path):
    path = tmp_path / "scores.jsonl"

    def length(prompt, response):
        return len(response)

    score(ROWS, length, output=path)
    path.write_text(path.read_text().replace("[2.0, ", "[NaN, ", 1))
    assert score(ROWS, length, output=path)["scores"][:] == RIGHT


def test_a_list_over_which_a_function_raises_is_given_one_by_one():
    calls = []

    def lengths(prompts, responses):
        calls.append(len(responses))
        if "bb2" in responses:
            raise ValueError("not this one")
        return [len(response) for response in responses]

    with pytest.warns(UserWarning, match="1 of 12 responses.*ValueError: not this one"):
        dataset = score(ROWS, lengths, batch_size=6)
    assert dataset["scores"][:] == [*RIGHT[:2], [2.0, None, 4.0], RIGHT[3]] and calls == [6, 6, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda responses: [1.0] * (len(responses) - 1), "the scorer returned 5 scores for 6 responses"),
        (lambda responses: 1.0, "the scorer gave float 1.0, not a list of scores"),
        (lambda responses: "123456", "the scorer gave str '123456', not a list of scores"),
        (lambda responses: dict.fromkeys(range(6), 1.0), "not a list of scores"),
        (lambda responses: None, "the scorer gave NoneType None, not a list of scores"),
    ],
)
def test_a_list_of_another_count_scores_nobody_and_stops_nobody(returned, reason):
    def scorer(prompts, responses):
        return returned(responses) if "a0" in responses else [len(response) for response in responses]

    with pytest.warns(UserWarning, match="6 of 12 responses have no score"):
        dataset = score(ROWS, scorer, batch_size=6)
    assert dataset["scores"][:] == [[None] * 3, [None] * 3, *RIGHT[2:]]
    assert all(reason in error for error in dataset["score_errors"][0])


def test_an_error_that_hits_every_row_is_told_with_its_cause():
    with pytest.raises(ValueError, match=r"Not one of the 12 responses.*NameError: name 'lenght'") as raised:
        score(ROWS, lambda prompt, response: lenght(response))  # noqa: F821
    assert isinstance(raised.value.__cause__, NameError) and raised.value.__cause__.__traceback__ is not None
    called = []
    with pytest.raises(TypeError, match=r"called with \(prompt, response\), but takes \(text\)"):
        score(ROWS, lambda text: called.append(text))
    with pytest.raises(TypeError, match=r"called with \(prompts, responses\), but takes \(\*, completions\)"):
        score(ROWS, lambda *, completions: called.append(completions), batch_size=2)
    assert not called


def test_functions_cannot_change_the_data():
    rows = scored_rows(2, 2, conversational=True)

    def careless(prompt, response):
        prompt.append({"role": "assistant", "content": "changed"})
        prompt[0]["content"] = "changed"
        return len(response)

    dataset = score(rows, careless, overwrite=True)
    assert dataset["prompt"][:] == [row["prompt"] for row in scored_rows(2, 2, conversational=True)]


class Custom(bpo.Scorer):
    def __init__(self, scores):
        self._scores = scores

    def describe(self):
        return {"scorer": "custom"}

    def scores(self, rows):
        return self._scores(rows)


def given_for(row):
    return [float(len(text)) for text in row.responses]


def raising_over_p1(rows):
    for index, row in enumerate(rows):
        if row.prompt == "p1":
            raise RuntimeError("not p1")
        yield index, given_for(row)


def raising_after_all(rows):
    yield from ((index, given_for(row)) for index, row in enumerate(rows))
    raise RuntimeError("too late")


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (raising_over_p1, "RuntimeError: not p1"),
        (
            lambda rows: ((i, given_for(row)) for i, row in enumerate(rows) if row.prompt != "p1"),
            "the scorer yielded no scores of this prompt",
        ),
        (
            lambda rows: ((i, given_for(row)[: 3 - (row.prompt == "p1")]) for i, row in enumerate(rows)),
            "the scorer returned 2 scores for 3 responses",
        ),
        (
            lambda rows: ((i, "N/A" if row.prompt == "p1" else iter(given_for(row))) for i, row in enumerate(rows)),
            "the scorer gave str 'N/A', not a list of scores",
        ),
        (
            lambda rows: (
                (i, torch.tensor([float("nan")] * 3 if row.prompt == "p1" else given_for(row)))
                for i, row in reversed(list(enumerate(rows)))
            ),
            "the scorer gave nan",
        ),
    ],
)
def test_scorers_of_ones_own_may_fail_over_a_row(scores, reason, tmp_path):
    path = tmp_path / "scores.jsonl"
    with pytest.warns(UserWarning, match="3 of 12 responses have no score"):
        dataset = score(ROWS, Custom(scores), output=path)
    assert dataset["scores"][:] == [RIGHT[0], [None] * 3, *RIGHT[2:]]
    assert dataset["score_errors"][1] == [reason] * 3
    whole = score(ROWS, Custom(lambda rows: ((i, given_for(row)) for i, row in enumerate(rows))), output=path)
    assert whole["scores"][:] == RIGHT


def test_scorers_of_ones_own_that_fail_over_everything_end_the_run(tmp_path):
    asked = []

    def broken(rows):
        asked.extend(row.prompt for row in rows)
        raise ZeroDivisionError("always")
        yield

    rows = [{"prompt": f"p{index}", "responses": ["a"]} for index in range(50)]
    with pytest.raises(ZeroDivisionError, match="always"):
        score(rows, Custom(broken))
    assert len(asked) == 50 + 3
    with pytest.raises(ValueError, match=r"Not one of the 6 responses.*TypeError: 'NoneType' object is not iterable"):
        score(ROWS[:2], Custom(lambda rows: None))
    path = tmp_path / "scores.jsonl"

    def unreachable(rows):
        yield 0, given_for(rows[0])
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        score(ROWS, Custom(unreachable), output=path)
    assert [json.loads(line)["scores"] for line in path.read_text().splitlines()] == RIGHT[:1]
    assert score(ROWS, Custom(raising_after_all))["scores"][:] == RIGHT


@pytest.mark.parametrize("index", [99, -1, "0", None, 0])
def test_an_index_that_is_none_of_the_rows_is_named(index):
    def scores(rows):
        yield 0, given_for(rows[0])
        yield index, given_for(rows[0])

    with pytest.warns(UserWarning, match=r"9 of 12.*Custom\.scores yielded the index"):
        assert score(ROWS, Custom(scores))["scores"][0] == RIGHT[0]


def test_the_command_takes_a_scorer_by_its_name(monkeypatch):
    monkeypatch.setattr("builtins.CUSTOM", Custom(None), raising=False)
    assert isinstance(load_function("builtins:CUSTOM", "--function"), bpo.Scorer)
