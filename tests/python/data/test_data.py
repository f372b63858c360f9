import gzip
import hashlib
import json
import math
import warnings

import datasets
import numpy as np
import pytest

from bpo import InvalidDataWarning, read_candidates
from bpo.data.values import content_id


def message(role, content):
    return [{"role": role, "content": content}]


USER = message("user", "Sky?")
BLUE = message("assistant", "Blue.")
GREEN = message("assistant", "Green.")


def simple(candidates):
    """Prompts, and pairs as texts."""
    pairs = [(candidates.responses[chosen], candidates.responses[rejected]) for chosen, rejected in candidates.pairs]
    return candidates.prompts, pairs


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "Sky?", "chosen": " Blue.", "rejected": " Green."}, "Sky?", " Blue.", " Green."),
        ({"chosen": "Sky? Blue.", "rejected": "Sky? Green."}, "Sky?", " Blue.", " Green."),
        ({"prompt": USER, "chosen": BLUE, "rejected": GREEN}, USER, BLUE, GREEN),
        ({"prompt": USER, "chosen": "Blue.", "rejected": "Green."}, USER, BLUE, GREEN),
        ({"chosen": USER + BLUE, "rejected": USER + GREEN}, USER, BLUE, GREEN),
        ({"prompt": USER, "chosen": USER + BLUE, "rejected": USER + GREEN}, USER, BLUE, GREEN),
        ({"prompt": "Sky?", "chosen": BLUE, "rejected": GREEN}, USER, BLUE, GREEN),
        ({"prompt": "Sky?", "chosen": USER + BLUE, "rejected": USER + GREEN}, USER, BLUE, GREEN),
        (
            {"prompt": "Sky?", "responses": [" Green.", " Blue."], "scores": [0.1, 0.9]},
            "Sky?",
            " Blue.",
            " Green.",
        ),
        (
            {"prompt": "Sky?", "responses": [{"text": " Green.", "score": 1}, {"text": " Blue.", "score": 2}]},
            "Sky?",
            " Blue.",
            " Green.",
        ),
        ({"prompt": USER, "responses": ["Green.", "Blue."], "scores": [0.1, 0.9]}, USER, BLUE, GREEN),
        (
            {
                "instruction": "Sky?",
                "completions": [
                    {"response": " Green.", "overall_score": 3.0},
                    {"response": " Blue.", "overall_score": 4.5},
                ],
            },
            "Sky?",
            " Blue.",
            " Green.",
        ),
    ],
)
def test_every_accepted_format(row, prompt, chosen, rejected):
    for dataset in ([row], datasets.Dataset.from_list([row])):
        assert simple(read_candidates(dataset)) == ([prompt], [(chosen, rejected)])


def test_every_kind_of_file_and_directory(tmp_path):
    dataset = datasets.Dataset.from_list([{"prompt": "Sky?", "responses": ["a", "b"], "scores": [1.0, 0.0]}])
    dataset.to_json(tmp_path / "rows.jsonl")
    with gzip.open(tmp_path / "rows.JSONL.gz", "wb") as file:
        file.write((tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "directory").mkdir()
    dataset.to_parquet(tmp_path / "directory" / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "splits")
    for name in ("rows.jsonl", "rows.JSONL.gz", "directory", "directory/rows.parquet", "saved", "splits"):
        assert simple(read_candidates(tmp_path / name)) == (["Sky?"], [("a", "b")]), name
    assert simple(read_candidates(datasets.DatasetDict(train=dataset))) == (["Sky?"], [("a", "b")])
    assert simple(read_candidates(dataset.with_format("numpy"))) == (["Sky?"], [("a", "b")])


@pytest.mark.parametrize(
    ("name", "content"),
    [("bad.jsonl", "{"), ("empty.jsonl", ""), ("bad.parquet", "PAR"), ("rows.txt", "text")],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: cannot be read"):
        read_candidates(tmp_path / name)


def test_rows_group_by_exact_prompt_and_share_responses():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": "c"},
        {"prompt": "p ", "chosen": "a", "rejected": "c"},
    ]
    candidates = read_candidates(rows)
    assert candidates.prompts == ["p", "q", "p "]
    assert candidates.responses == ["a", "b", "c", "a", "b", "a", "c"]
    assert candidates.pairs.tolist() == [[0, 1], [0, 2], [3, 4], [5, 6]]
    assert candidates.prompt_of_pair.tolist() == [0, 0, 1, 2]
    assert candidates.prompt_rows.tolist() == [0, 1, 3]
    assert np.isnan(candidates.score_gaps).all()


def test_all_pairs_of_unequal_scores_largest_gap_first_under_a_cap():
    rows = [{"prompt": "p", "responses": list("abcd"), "scores": [0.0, 3.0, 1.0, 1.0]}]
    every = read_candidates(rows)
    assert every.pairs.tolist() == [[1, 0], [1, 2], [1, 3], [2, 0], [3, 0]]
    assert every.score_gaps.tolist() == [3, 2, 2, 1, 1]
    capped = read_candidates(rows, max_pairs_per_prompt=2)
    assert capped.pairs.tolist() == [[1, 0], [1, 2]]


def test_tools_are_part_of_the_prompt_of_a_conversation():
    rows = [
        {"prompt": USER, "chosen": BLUE, "rejected": GREEN, "tools": tools}
        for tools in ([{"name": "f"}], '[{"name": "f"}]', None, [{"name": "g"}])
    ]
    with pytest.warns(InvalidDataWarning, match=r"duplicate of an earlier pair \(row 1\)"):
        candidates = read_candidates(rows)
    assert candidates.template_kwargs == [{"tools": [{"name": "f"}]}, {}, {"tools": [{"name": "g"}]}]
    assert len(np.unique(candidates.response_ids, axis=0)) == 6
    plain = read_candidates([{"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}])
    assert plain.template_kwargs == [{}]  # as in TRL, no template sees them


def test_message_keys_that_arrow_fills_with_none_are_dropped():
    rows = [
        {"prompt": [{"role": "user", "content": "x"}], "responses": ["a", "b"], "scores": [1, 0]},
        {"prompt": [{"role": "user", "content": "y", "name": "n"}], "responses": ["a", "b"], "scores": [1, 0]},
    ]
    assert read_candidates(datasets.Dataset.from_list(rows)).prompts[0] == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ([{"prompt": "p", "choosen": "a", "rejected": "b"}], "rename_column('choosen', 'chosen')"),
        ([{"question": "p"}], "none of the accepted formats"),
        ([], "empty"),
        (datasets.Dataset.from_dict({"prompt": [], "responses": [], "scores": []}), "empty"),
        ([{"prompt": "p", "responses": ["a"], "scores": [1.0]}], "fewer than two usable responses"),
        ([{"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 1.0]}], "equal scores"),
        ([{"prompt": "p", "responses": ["a", "b"], "scores": [math.nan, 1.0]}], "NaN"),
        (
            [{"prompt": "p", "responses": ["a", "b"], "scores": [1.0]}],
            "column 'scores': not one value a response (row 0: 2 responses, 1 values)",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"], "scores": ["x", "y"]}],
            "2 × score is not a number (row 0, response 0: str 'x'; row 0, response 1: str 'y')",
        ),
        ([{"prompt": "p", "responses": ["a", "b"]}], "must be a record with 'text'"),
        (
            [{"prompt": 3, "responses": ["a", "b"], "scores": [1, 2]}],
            "column 'prompt': expected text or a list of {role, content} messages (row 0: int 3)",
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "a"}], "chosen equals rejected"),
        ([None], "Row 0: NoneType None is no mapping"),
        (
            [{"prompt": "p", "responses": ["a", BLUE], "scores": [1, 2]}],
            "the response holds chat messages but the prompt is plain text",
        ),
        ([{"prompt": [{"role": "user", "content": None}], "responses": ["a"], "scores": [1]}], "no text content"),
        ([{"prompt": "p", "chosen": "a", "rejected": BLUE}], "must both be text or both be messages"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0}], "not its counterpart"),
        ([{"prompt": "p", "chosen": "a", "rejected": "b", "images": [1]}], "'images' is not supported"),
        ([{"prompt": USER, "chosen": BLUE, "rejected": GREEN, "tools": "{"}], "column 'tools': not JSON (row 0: "),
        ([{"prompt": USER, "chosen": BLUE, "rejected": GREEN, "tools": '"f"'}], "expected a list of tools"),
        (
            [{"prompt": USER, "chosen": BLUE, "rejected": GREEN, "tools": [{"x": {1}}]}],
            "column 'tools': JSON has no form for the value (row 0: Object of type set",
        ),
        (
            [{"prompt": USER, "chosen": BLUE, "rejected": GREEN, "chat_template_kwargs": "{}"}],
            "column 'chat_template_kwargs': expected a mapping (row 0: str '{}')",
        ),
        (
            [{"prompt": USER, "chosen": BLUE, "rejected": GREEN, "chat_template_kwargs": {"tokenize": False}}],
            "tokenize is set by the trainer",
        ),
        (
            [{"prompt": USER, "chosen": BLUE, "rejected": GREEN, "chat_template_kwargs": {"x": x}} for x in (1, "a")],
            "Arrow cannot hold the column 'chat_template_kwargs'",
        ),
        (
            [{"prompt": [{**USER[0], "x": {1}}], "chosen": BLUE, "rejected": GREEN}],
            "column 'prompt': JSON has no form for the value (row 0: Object of",
        ),
    ],
)
def test_bad_data_is_refused_with_what_to_do(dataset, expected):
    with pytest.raises(ValueError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore", InvalidDataWarning)
        read_candidates(dataset)
    assert expected in str(error.value)


def test_scores_stay_with_their_pair_and_pairs_with_their_row():
    """A response that two judges scored differently in two rows."""
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 5.0, "score_rejected": 1.0},
        {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2.0, "score_rejected": 1.0},
        {"prompt": "p", "chosen": "c", "rejected": "a", "score_chosen": 3.0, "score_rejected": 2.0},
    ]
    candidates = read_candidates(rows)
    assert candidates.pair_scores.tolist() == [[5, 1], [3, 2], [2, 1]]
    assert candidates.pair_rows.tolist() == [0, 2, 1]


def test_contradictions_are_named():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}]
    with pytest.warns(InvalidDataWarning, match=r"contradicts an earlier pair \(row 1, against row 0\)"):
        assert len(read_candidates(rows).pairs) == 1


def test_missing_path():
    with pytest.raises(FileNotFoundError, match=r"\./nowhere\.jsonl"):
        read_candidates("./nowhere.jsonl")


def test_unusable_rows_are_counted_and_named():
    rows = [
        {"prompt": "good", "responses": ["a", "b", "a", "", "b"], "scores": [1.0, 0.0, 1.0, 0.2, 0.7]},
        {"prompt": "one", "responses": ["a"], "scores": [1.0]},
        {"prompt": "equal", "responses": ["a", "b"], "scores": [2.0, 2.0]},
        {"prompt": "nan", "responses": ["a", "b", "c"], "scores": [math.nan, 1.0, 2.0]},
        {"prompt": "none", "responses": ["a", "b"], "scores": [None, 1.0]},
    ]
    with pytest.warns(InvalidDataWarning) as warned:
        candidates = read_candidates(rows)
    assert candidates.prompts == ["good", "nan"]
    assert candidates.skipped.places == {
        "duplicate response of the same prompt": ["row 0, response 2"],
        "empty response": ["row 0, response 3"],
        "duplicate response with another score than before": ["row 0, response 4"],
        "score missing, NaN or infinite": ["row 3, response 0", "row 4, response 0"],
        "prompt with fewer than two usable responses": ["row 1", "row 4"],
        "prompt whose responses all have equal scores": ["row 2"],
    }
    assert "2 × score missing, NaN or infinite (row 3, response 0; row 4, response 0)" in str(warned[0].message)
    with pytest.raises(ValueError, match="row 2"):
        read_candidates(rows, on_invalid="raise")


def test_stated_scores_must_agree_with_the_preference():
    base = {"prompt": "p", "chosen": "a", "rejected": "b"}
    rows = [
        {**base, "score_chosen": 1.0, "score_rejected": 0.5},
        {**base, "prompt": "q", "score_chosen": 0.5, "score_rejected": 1.0},
        {**base, "prompt": "r", "score_chosen": 0.5, "score_rejected": 0.5},
    ]
    with pytest.warns(InvalidDataWarning):
        candidates = read_candidates(rows)
    assert candidates.score_gaps.tolist() == [0.5]
    assert candidates.skipped.counts() == {
        "chosen has a lower score than rejected": 1,
        "chosen and rejected have equal scores": 1,
    }


@pytest.mark.parametrize("texts", [['é🙂\n"\\\x7f\u2028'], [""], ["a", "b"]])
def test_messages_are_known_by_their_json(texts):
    """Stores hold these hashes."""
    plain = [{"role": "user", "content": text} for text in texts]
    for messages in (plain, [{**plain[0], "name": "n"}], [{**plain[0], "content": None, "tool_calls": [1]}]):
        written = json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        expected = hashlib.sha256(len(written).to_bytes(8, "little") + written).digest()[:16]
        assert content_id(messages) == expected


def test_keep_prompts_renumbers_everything():
    rows = [{"prompt": p, "responses": ["a", "b", "c"], "scores": [0, 1, 2]} for p in "xyz"]
    candidates = read_candidates(rows)
    kept, pairs, responses = candidates.keep_prompts(np.array([True, False, True]))
    assert kept.prompts == ["x", "z"]
    assert pairs.tolist() == [0, 1, 2, 6, 7, 8]
    assert responses.tolist() == [0, 1, 2, 6, 7, 8]
    assert kept.pairs[3:].min() == 3 and kept.prompt_of_pair.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(kept.response_ids[3], candidates.response_ids[6])
