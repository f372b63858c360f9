"""A prompt is what the data gives, in whatever form; a row that cannot be used is set aside, and no other with it."""

import math
import warnings

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bpo import read_candidates
from bpo.responses.prompts import read_responses

# Prompts and answers that begin alike, that contain one another, or that look like something else.
WORDS = st.sampled_from(
    ["Sky", "Sky?", " Sky", "The", "The capital", "Be brief.", "yes", "yes no", "null", "7", "é🙂", " "]
)
TEXT = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}]}
TOOL = {"role": "tool", "content": "21 degrees"}


# Forms in which a row can say that a prompt has a better and a worse answer, and the prompt that must come back.
FORMS = {
    "text": lambda p, good, bad: ({"prompt": p, "chosen": good, "rejected": bad}, p),
    "messages": lambda p, good, bad: (
        {"prompt": [user(p)], "chosen": [assistant(good)], "rejected": [assistant(bad)]},
        [user(p)],
    ),
    "messages and text": lambda p, good, bad: ({"prompt": [user(p)], "chosen": good, "rejected": bad}, [user(p)]),
    "text and messages": lambda p, good, bad: (
        {"prompt": p, "chosen": [assistant(good)], "rejected": [assistant(bad)]},
        [user(p)],
    ),
    "text and tool use": lambda p, good, bad: (
        {"prompt": p, "chosen": [CALL, TOOL, assistant(good)], "rejected": [CALL, TOOL, assistant(bad)]},
        [user(p)],
    ),
    "text and a system message": lambda p, good, bad: (
        {"prompt": p, "chosen": [SYSTEM, assistant(good)], "rejected": [SYSTEM, assistant(bad)]},
        [SYSTEM, user(p)],
    ),
    "text and whole conversations": lambda p, good, bad: (
        {"prompt": p, "chosen": [SYSTEM, user(p), assistant(good)], "rejected": [SYSTEM, user(p), assistant(bad)]},
        [SYSTEM, user(p)],
    ),
    "repeated messages": lambda p, good, bad: (
        {"prompt": [user(p)], "chosen": [user(p), assistant(good)], "rejected": [user(p), assistant(bad)]},
        [user(p)],
    ),
    "conversations alone": lambda p, good, bad: (
        {"chosen": [user(p), assistant(good)], "rejected": [user(p), assistant(bad)]},
        [user(p)],
    ),
    "scored text": lambda p, good, bad: ({"prompt": p, "responses": [bad, good], "scores": [0.5, 2]}, p),
    "scored messages": lambda p, good, bad: (
        {"prompt": [user(p)], "responses": [[assistant(good)], [assistant(bad)]], "scores": [2, 0]},
        [user(p)],
    ),
    "records": lambda p, good, bad: (
        {"prompt": p, "responses": [{"text": good, "score": 2}, {"text": bad, "score": 1}]},
        p,
    ),
    "UltraFeedback": lambda p, good, bad: (
        {
            "instruction": p,
            "completions": [{"response": bad, "overall_score": 1}, {"response": good, "overall_score": 3}],
        },
        p,
    ),
}


def quietly(dataset, read=read_candidates):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(dataset)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5))
def test_rows_give_back_exactly_their_prompts(form, data):
    made = [FORMS[form](prompt, better, worse) for prompt, better, worse in data if better != worse]
    rows, prompts = [row for row, _ in made], [prompt for _, prompt in made]
    if not rows:
        return
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        candidates = quietly(dataset)
        for pair, row in enumerate(candidates.pair_rows):
            assert without_null(candidates.prompts[candidates.prompt_of_pair[pair]]) == without_null(prompts[row])
        # Rows without a pair say the same as an earlier row, or the contrary.
        unpaired = set(range(len(rows))) - set(candidates.pair_rows.tolist())
        assert all(prompts[row] in prompts[:row] for row in unpaired)
        for prompt in quietly(dataset, read_responses):
            assert without_null(prompt.prompt) == without_null(prompts[prompt.row])


def without_null(prompt):
    """Arrow gives messages the keys of others."""
    if isinstance(prompt, str):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


@pytest.mark.parametrize("missing", [None, math.nan, [], np.float64("nan")])
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("conversations alone", "UltraFeedback")])
def test_no_prompt_is_made_where_one_is_missing(form, missing):
    rows = [FORMS[form](f"question {index}", f"a {index}", f"a b {index}")[0] for index in range(2)]
    candidates = quietly([*rows, {**rows[0], "prompt": missing}])
    assert candidates.skipped.places == {"prompt is missing": ["row 2"]}
    assert candidates.pair_rows.tolist() == [0, 1]
    assert len(quietly([*rows, {**rows[0], "prompt": missing}], read_responses)) == 2


@pytest.mark.parametrize("name", ["question", "instruction", "input", "query"])
def test_a_prompt_under_another_name_is_refused_by_name(name):
    row = {name: "2+2?", "chosen": "It is 4", "rejected": "It is 5"}
    for read in (read_candidates, read_responses):
        with pytest.raises(ValueError, match=rf"dataset.rename_column\('{name}', 'prompt'\)"):
            read([row])
    assert read_candidates([{**row, "prompt": "2+3?"}]).prompts == ["2+3?"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        ([assistant("a"), assistant("b")], [assistant("a"), assistant("c")], "nobody asks in it"),
        ([SYSTEM, user("a"), assistant("b")], [SYSTEM, user("c"), assistant("d")], "nobody asks in it"),
        ([assistant("b")], [assistant("c")], "share no prompt"),
    ],
)
def test_what_conversations_share_is_a_prompt_only_if_somebody_asks(chosen, rejected, why):
    with pytest.raises(ValueError, match=why):
        quietly([{"chosen": chosen, "rejected": rejected}])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"prompt": "p", "chosen": [SYSTEM, assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [user("p")], "chosen": [user("p"), assistant("a")], "rejected": [assistant("b")]},
    ],
)
def test_responses_that_bring_another_prompt_are_set_aside(row):
    good = {"prompt": "x", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    candidates = quietly([good, row])
    assert candidates.prompts == [[user("x")]]
    assert sum(candidates.skipped.counts().values()) == 1


EMPTY = [None, "", [], math.nan, np.array([])]
BAD_TEXTS = [3, {"a": 1}, [{"content": "x"}], [assistant(None)], [assistant(7)], "half \ud83d", [assistant("\udc00")]]


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_one_bad_answer_of_a_pair_stops_no_other_row(conversational, side):
    form = FORMS["messages" if conversational else "text"]
    rows = [form(f"q{index}", "good", "bad")[0] for index in range(3)]
    empty = [[assistant("")]] if conversational else []
    for value in [*EMPTY, *BAD_TEXTS, *empty]:
        candidates = quietly([rows[0], {**rows[1], side: value}, rows[2]])
        assert candidates.pair_rows.tolist() == [0, 2], value
        (place,) = [place for places in candidates.skipped.places.values() for place in places]
        assert place.startswith("row 1"), place


@pytest.mark.parametrize("form", ["scored text", "scored messages", "records", "UltraFeedback"])
def test_one_bad_response_or_score_stops_no_other(form):
    column = "completions" if form == "UltraFeedback" else "responses"
    text, score = ("response", "overall_score") if form == "UltraFeedback" else ("text", "score")
    for field, values in {
        "text": [*EMPTY, *BAD_TEXTS],
        "score": [None, "N/A", "", math.nan, math.inf, 1e301, [1], {}, np.array([1.0, 2.0]), 10**400, "7 of 10"],
    }.items():
        for value in values:
            row = FORMS[form]("p", "good", "bad")[0]
            other = FORMS[form]("q", "good", "bad")[0]
            if form in ("records", "UltraFeedback"):
                row[column] = [*row[column], {text: "x", score: 9, (text if field == "text" else score): value}]
            else:
                row["responses"] = [*row["responses"], value if field == "text" else "x"]
                row["scores"] = [*row["scores"], value if field == "score" else 9]
            candidates = quietly([row, other])
            assert len(candidates.pairs) == 2, (field, value)
            assert len(candidates.prompts) == 2
            (place,) = [place for places in candidates.skipped.places.values() for place in places]
            assert place.startswith("row 0, response 2"), place


@pytest.mark.parametrize("value", [None, 7, "a", [], {"a": 1}, [1.0]])
@pytest.mark.parametrize("column", ["responses", "scores"])
def test_a_row_whose_lists_do_not_go_together_stops_no_other(column, value):
    rows = [FORMS["scored text"](f"q{index}", "good", "bad")[0] for index in range(3)]
    candidates = quietly([rows[0], {**rows[1], column: value}, rows[2]])
    assert candidates.pair_rows.tolist() == [0, 2]
    assert all(place.startswith("row 1") for places in candidates.skipped.places.values() for place in places)


@pytest.mark.parametrize("bad", [None, 7, ["a"], {3: "x"}, "text"])
def test_what_is_no_row_stops_no_other(bad):
    rows = [FORMS["text"](f"q{index}", "good", "bad")[0] for index in range(2)]
    candidates = quietly([rows[0], bad, rows[1]])
    assert candidates.pair_rows.tolist() == [0, 2]
    assert [*candidates.skipped.places] == ["not a row"]
    assert [prompt.row for prompt in quietly([rows[0], bad, rows[1]], read_responses)] == [0, 2]


def test_the_form_of_most_prompts_is_kept():
    text, chat = FORMS["text"]("q", "a", "b")[0], FORMS["messages"]("p", "a", "b")[0]
    others = [FORMS["messages"](f"p{index}", "a", "b")[0] for index in range(2)]
    candidates = quietly([text, chat, *others])
    assert candidates.skipped.places == {"the prompt is plain text, but most are chat messages": ["row 0"]}
    assert candidates.pair_rows.tolist() == [1, 2, 3]
    assert len(quietly([text, chat, *others], read_responses)) == 3


@pytest.mark.parametrize("bad", ["{", '"f"', 7, {"a": 1}, [{"x": {1}}]])
def test_bad_tools_or_weights_stop_no_other_row(bad):
    rows = [{**FORMS["messages"](f"q{index}", "a", "b")[0], "tools": None, "weight": 1.0} for index in range(3)]
    for column, value in (("tools", bad), ("weight", -1 if bad == 7 else bad)):
        changed = [rows[0], {**rows[1], column: value}, rows[2]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidates = read_candidates(changed, weight_column="weight")
        assert candidates.pair_rows.tolist() == [0, 2]
        (place,) = [place for places in candidates.skipped.places.values() for place in places]
        assert place.startswith("row 1"), place


def test_records_of_two_forms_in_one_table():
    """Arrow gives every record the keys of all."""
    rows = [
        {"prompt": "a", "completions": [{"text": "x", "score": 1.0}, {"text": "y", "score": 2.0}]},
        {
            "prompt": "b",
            "completions": [{"response": "x", "overall_score": 1.0}, {"response": "y", "overall_score": 2.0}],
        },
    ]
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        candidates = read_candidates(dataset)
        assert candidates.prompts == ["a", "b"] and candidates.score_gaps.tolist() == [1.0, 1.0]
        assert [row.scores for row in read_responses(dataset)] == [[1.0, 2.0]] * 2


def test_a_message_that_calls_tools_may_say_nothing():
    rows = [
        {"prompt": [user("x")], "chosen": [{**CALL, **content}], "rejected": [assistant("no")]}
        for content in ({}, {"content": None})
    ]
    first, second = (read_candidates([row]) for row in rows)
    assert first.responses[0] == second.responses[0] and (first.response_ids == second.response_ids).all()


def test_arrays_that_pandas_makes_of_lists_are_read():
    row = FORMS["messages"]("q", "a", "b")[0]
    arrays = {name: np.array(messages, dtype=object) for name, messages in row.items()}
    assert read_candidates([arrays]).prompts == read_candidates([row]).prompts
    scored = {"prompt": "p", "responses": np.array(["a", "b"], dtype=object), "scores": np.array([1.0, 0.0])}
    assert read_candidates([scored]).pairs.tolist() == [[0, 1]]
