"""Prompts and responses of any form: what cannot be read is named and stops nothing else, and columns stay."""

import datetime
import json

import datasets
import numpy as np
import pytest

import bpo
from bpo.responses.prompts import read_responses, to_dataset

HALF = "half an emoji \ud83d"


def length(prompt, response):
    return len(str(response))


def score(rows, scorer=length, **settings):
    return bpo.score_responses(rows, scorer, progress=False, **settings)


def user(text):
    return [{"role": "user", "content": text}]


def test_bad_rows_and_responses_are_named_and_the_rest_is_scored(tmp_path):
    rows = [
        {"prompt": "p0", "responses": ["a", None, "", 3.5, "bb", HALF]},
        {"prompt": None, "responses": ["a"]},
        {"prompt": 7, "responses": ["a"]},
        {"prompt": HALF, "responses": ["a"]},
        {"prompt": "p4", "responses": "abc"},
        {"prompt": "p5", "responses": ["a", user("chat")]},
        {"prompt": "p6", "responses": ["a", "bb"], "id": HALF},
        {"prompt": "p7", "responses": ["a", "bb"], "id": datetime.date(2020, 1, 1)},
        {"prompt": "p8", "responses": ["a", "bb"], "id": 8},
        {"prompt": "p9", "responses": None},
    ]
    with pytest.warns(bpo.InvalidDataWarning) as told:
        dataset = score(rows, output=tmp_path / "scores.jsonl")
    said = str(told[0].message)
    assert dataset["prompt"][:] == ["p0", "p5", "p8", "p9"] and dataset["id"][:] == [None, None, 8, None]
    assert dataset["scores"][:] == [[1.0, 2.0], [1.0], [1.0, 2.0], []]
    for what in (
        "2 × empty response (row 0, response 1; row 0, response 2)",
        "(row 0, response 3: float 3.5)",
        "row 0, response 5: column 'responses', character 14",
        "prompt is missing (row 1)",
        "(row 2: int 7)",
        "row 3: column 'prompt', character 14",
        "column 'responses': expected a list (row 4: str 'abc')",
        "the prompt is plain text: give it as messages, too (row 5, response 1)",
        "row 6: column 'id'",
        "(row 7: Object of type date is not JSON serializable)",
    ):
        assert what in said, what
    assert [json.loads(line)["prompt"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == dataset[
        "prompt"
    ][:]
    with pytest.raises(ValueError, match=r"No row has a usable prompt[\s\S]*prompt is missing \(row 0\)"):
        score([{"prompt": None, "responses": ["a"]}])


def test_scores_of_the_data_that_are_no_numbers_are_named_and_made_anew():
    rows = [
        {"prompt": "p0", "responses": ["a", "bb", "ccc"], "scores": [5.0, "N/A", float("inf")]},
        {"prompt": "p1", "responses": ["a", "bb"], "scores": [1.0]},
        {"prompt": "p2", "responses": ["a", "bb"], "scores": None},
    ]
    with pytest.warns(bpo.InvalidDataWarning, match=r"score is not a number \(row 0, response 1: str 'N/A'\)") as told:
        dataset = score(rows)
    assert "not one value a response (row 1: 2 responses, 1 values)" in str(told[0].message)
    assert dataset["scores"][:] == [[5.0, 2.0, 3.0], [1.0, 2.0], [1.0, 2.0]]


def test_records_of_two_forms_are_read_by_what_they_hold():
    rows = [
        {"prompt": "p0", "responses": [{"text": None, "response": "a", "score": None, "overall_score": 1.0}]},
        {"prompt": "p1", "responses": [{"text": "bb", "response": None, "score": 2.0, "overall_score": None}]},
    ]
    assert [(row.responses, row.scores) for row in read_responses(rows)] == [(["a"], [1.0]), (["bb"], [2.0])]


def test_pairs_with_a_bad_row_give_the_others():
    rows = [
        {"prompt": "p0", "chosen": "a", "rejected": "bb", "score_chosen": "N/A", "score_rejected": 1.0},
        {"prompt": "p1", "chosen": 3, "rejected": "bb", "score_chosen": 2.0, "score_rejected": 1.0},
    ]
    with pytest.warns(bpo.InvalidDataWarning, match=r"row 0, response 0: str 'N/A'"):
        [row] = read_responses(rows)
    assert row.responses == ["a", "bb"] and row.scores == [None, 1.0]


def test_a_list_of_prompts_may_hold_none():
    with pytest.warns(bpo.InvalidDataWarning, match=r"1 × prompt is missing \(row 0\)"):
        rows = read_responses([None, "2+2?", "3+3?"], prompts_only=True)
    assert [row.prompt for row in rows] == ["2+2?", "3+3?"]


def test_a_column_that_differs_among_equal_prompts_is_named():
    rows = [
        {"prompt": "p", "responses": [text], "weight": weight, "id": 1} for text, weight in (("a", 1.0), ("b", 2.0))
    ]
    with pytest.warns(bpo.InvalidDataWarning, match=r"1 × another 'weight' .*\(row 1, before 0\)") as told:
        dataset = score(rows)
    assert dataset["weight"][:] == [1.0] and "another 'id'" not in str(told[0].message)


def test_columns_come_back_as_they_were(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}
    other = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"enum": [1, "a"]}}}}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    rows = [
        {"prompt": user("one"), "responses": [[call], "no"], "tools": [tool], "meta": {"a": 1}, "mixed": 1, "n": [1.5]},
        {"prompt": user("two"), "responses": ["b", "cc"], "tools": [other], "meta": {"b": "x"}, "mixed": "x", "n": []},
        {"prompt": user("three"), "responses": ["d"], "tools": None, "meta": None, "mixed": None, "n": None},
    ]
    dataset = score(rows, output=tmp_path / "scores.jsonl")
    assert isinstance(dataset, datasets.Dataset)
    for name in ("prompt", "tools", "meta", "mixed", "n"):
        assert dataset[name][:] == [row[name] for row in rows], name
    assert dataset[0]["responses"] == [[call], [{"role": "assistant", "content": "no"}]]
    again = score(dataset)
    assert again.to_list() == dataset.to_list()
    assert [row.key for row in read_responses(dataset)] == [row.key for row in read_responses(rows)]
    dataset.to_parquet(tmp_path / "scores.parquet")
    assert score(str(tmp_path / "scores.parquet")).to_list() == dataset.to_list()


def test_arrays_and_what_is_no_number_in_columns():
    rows = [
        {
            "prompt": "p",
            "responses": ["a"],
            "v": np.arange(3),
            "s": np.float32(1.5),
            "n": [float("nan"), {"x": float("nan")}],
        }
    ]
    [row] = read_responses(rows)
    assert row.columns == {"v": [0, 1, 2], "s": 1.5, "n": [None, {"x": None}]}


def test_plain_columns_keep_the_types_of_arrow():
    dataset = to_dataset(
        [
            {"prompt": "p", "scores": [None], "score_errors": [None], "dropped": {"empty": 1, "failed": 0}, "id": 1},
            {"prompt": "q", "scores": [None], "score_errors": [None], "dropped": {"empty": 0, "failed": 2}, "id": 2},
        ]
    )
    assert dataset.features["scores"] == datasets.List(datasets.Value("float64"))
    assert dataset.features["score_errors"] == datasets.List(datasets.Value("string"))
    assert dataset.features["dropped"] == {"empty": datasets.Value("int64"), "failed": datasets.Value("int64")}
    assert dataset.features["id"] == datasets.Value("int64")


def test_summaries_name_what_they_cannot_count():
    rows = [{"prompt": "p", "responses": ["a", "b"], "scores": ["N/A", 1.0], "dropped": {"empty": None, "failed": 2}}]
    summary = bpo.describe_responses(rows)
    assert (summary.n_scored, summary.dropped) == (1, {"empty": 0, "failed": 2})
    for changed, message in (
        ({"dropped": "failed"}, "Row 0, column 'dropped': expected counts by reason, got str 'failed'"),
        ({"score_errors": "timeout"}, "Row 0, column 'score_errors': expected a list of reasons"),
        ({"scores": [1.0]}, "Row 0, column 'scores': not one value a response: 2 responses, 1 values"),
    ):
        with pytest.raises(ValueError, match=message):
            bpo.describe_responses([{**rows[0], **changed}])
    with pytest.raises(ValueError, match="hold no 'responses'"):
        bpo.describe_responses([{"prompt": "p", "chosen": "a", "rejected": "b"}])
