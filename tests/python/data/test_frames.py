"""What a user may hold in place of a data set: frames, tables, streams and mappings of splits, all of the same rows."""

import collections

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import bpo
from bpo.data.rows import load_rows
from bpo.responses.prompts import read_responses

ROWS = [
    {"prompt": f"{i}+2?", "responses": ["4", "5", "four"], "scores": [1.0, 0.0, 0.5], "id": i, "source": "ab"[i % 2]}
    for i in range(4)
]
TABLE = pa.Table.from_pylist(ROWS)
EXPECTED = bpo.read_candidates(ROWS)


def polars_frame():
    return pytest.importorskip("polars").DataFrame(ROWS)


def polars_categories():
    polars = pytest.importorskip("polars")
    return polars_frame().with_columns(polars.col("source").cast(polars.Categorical)).lazy()


HELD = {
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas with Arrow's types": lambda: TABLE.to_pandas(types_mapper=pd.ArrowDtype),
    "pandas with an index": lambda: pd.DataFrame(ROWS).set_index("prompt"),
    "pandas, some of its rows": lambda: pd.DataFrame([ROWS[0], *ROWS]).iloc[1:],
    "Polars": polars_frame,
    "Polars, lazy, with categories": polars_categories,
    "a table": lambda: TABLE,
    "a table with a dictionary": lambda: TABLE.set_column(4, "source", TABLE["source"].dictionary_encode()),
    "a batch": lambda: TABLE.to_batches()[0],
    "a reader": TABLE.to_reader,
    "a generator": lambda: (row for row in ROWS),
    "a deque": lambda: collections.deque(ROWS),
    "a stream": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2),
    "a stream of a generator": lambda: datasets.IterableDataset.from_generator(lambda: iter(ROWS)),
    "streams": lambda: datasets.IterableDatasetDict(train=datasets.Dataset.from_list(ROWS).to_iterable_dataset()),
    "splits": lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=None),
    "a mapping of splits": lambda: {"train": datasets.Dataset.from_list(ROWS)},
}


@pytest.mark.parametrize("held", HELD)
def test_the_same_rows_are_read_of_whatever_holds_them(held):
    rows = load_rows(HELD[held]())
    assert sorted(rows.column_names) == sorted(ROWS[0])
    assert list(rows.column("id")) == [0, 1, 2, 3] and list(rows.column("source")) == ["a", "b", "a", "b"]
    read = bpo.read_candidates(HELD[held]())
    assert read.prompts == EXPECTED.prompts and read.responses == EXPECTED.responses
    assert read.pairs.tolist() == EXPECTED.pairs.tolist() and read.scores.tolist() == EXPECTED.scores.tolist()


def test_a_generator_is_gone_through_once_whatever_reads_it(tmp_path):
    """The embeddings of the prompts come from the same rows, as does what goes along."""
    seen = []

    def rows():
        for row in ROWS:
            seen.append(row["id"])
            yield {**row, "vector": [1.0, float(row["id"])]}

    config = {"prompt_embeddings": "vector"}
    selection = bpo.select(None, rows(), budget=4, breadth=2, strategy="margin", config=config, progress=False)
    assert seen == [0, 1, 2, 3] and len(set(selection.dataset["id"])) == 2
    sampled = bpo.score_responses((row for row in ROWS), lambda prompt, response: 1.0, progress=False)
    assert sampled["id"][:] == [0, 1, 2, 3]
    asked = (row["prompt"] for row in ROWS)  # prompts alone will do, where nothing else is wanted
    assert [row.prompt for row in read_responses(asked, prompts_only=True)] == EXPECTED.prompts


def test_missing_cells_of_pandas_are_missing():
    """A row without a score is named, and a missing id is None, not a number."""
    frame = pd.DataFrame(
        [
            {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0, "id": 7},
            {"prompt": "d", "chosen": np.nan, "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0, "id": None},
            {"prompt": "e", "chosen": "b", "rejected": "c", "score_chosen": 2.0, "score_rejected": 1.0, "id": None},
        ]
    )
    with pytest.warns(bpo.InvalidDataWarning, match="row 1"):
        selection = bpo.select(None, frame, budget=2, strategy="random", progress=False)
    assert selection.dataset["id"][:] == [7, None]


@pytest.mark.parametrize(
    ("held", "kind", "message"),
    [
        (pd.concat([pd.DataFrame(ROWS)] * 2, axis=1), ValueError, "Two columns are called 'prompt'; rename one"),
        (pd.DataFrame([["a", "b"]]), ValueError, "The column 0 has no text for a name; rename it"),
        (pd.DataFrame({"prompt": []}), ValueError, "empty"),
        # The latter where pandas is too old to give a column to Arrow.
        (pd.Series(["a"]), (TypeError, ValueError), "rows and columns, which this Series has not|is no mapping"),
        (iter(()), ValueError, "empty"),
        ((row for row in [ROWS[0], 3, ROWS[1]]), None, "row 1: int 3 is no mapping"),
        (5, TypeError, "a pandas or Polars frame, an Arrow table, .* not int"),
        (b"rows.jsonl", TypeError, "not bytes"),
        (
            TABLE.append_column("day", pa.array([(1, 2, 3)] * 4, pa.month_day_nano_interval())),
            ValueError,
            "column 'day'",
        ),
        (
            datasets.DatasetDict(train_sft=None, train_prefs=None),
            ValueError,
            r"no split 'train', only 'train_sft', 'train_prefs'; name one, as in split='train_sft'",
        ),
    ],
    ids=["twice", "no name", "no rows", "series", "nothing", "a number", "int", "bytes", "interval", "splits"],
)
def test_what_cannot_be_read_is_told_by_its_name(held, kind, message):
    if kind is None:
        with pytest.warns(bpo.InvalidDataWarning, match=message):
            bpo.read_candidates(held)
        return
    with pytest.raises(kind, match=message):
        bpo.read_candidates(held)


def test_a_wrong_column_mapping_is_refused():
    for columns, message in (
        ({"question": "prompt"}, r"the name that is wanted comes first, \{'prompt': 'question'\}"),
        ({"prompt": "question", "instruction": "question"}, "one column of the data for several names"),
        (["prompt"], "must be a mapping such as"),
    ):
        with pytest.raises(ValueError, match=message):
            bpo.read_candidates([{"question": "a", "chosen": "b", "rejected": "c"}], columns=columns)


RENAMED = datasets.DatasetDict(
    test=datasets.Dataset.from_list(
        [{"question" if name == "prompt" else name: value for name, value in row.items()} for row in ROWS]
    )
)
ASKED = {"split": "test", "columns": {"prompt": "question"}}


def test_every_function_reads_a_split_under_the_names_of_the_user(model, tokenizer, tmp_path):
    store, tokens = str(tmp_path / "store"), {"processing_class": tokenizer}
    config = {"sketch_dim": 64}
    made = bpo.collect_gradients(model, RENAMED, store=store, config=config, progress=False, **tokens, **ASKED)
    assert len(made) == len(EXPECTED.responses)
    selection = bpo.select(None, RENAMED, budget=6, store=store, target=RENAMED["test"], progress=False, **ASKED)
    assert len(selection) == 6 and set(selection.dataset["prompt"]) <= set(EXPECTED.prompts)
    assert selection.provenance["split"] == "test"
    assert bpo.doctor(model, RENAMED, config=config, seconds=0, **tokens, **ASKED).responses == 12
    heldout = {"heldout": RENAMED["test"]}
    assert (
        bpo.preview(store, RENAMED, budget=4, arms=["margin"], seeds=2, progress=False, **heldout, **ASKED).n_pairs
        == 12
    )
    assert bpo.audit(store, RENAMED, progress=False, **ASKED).pairs.num_rows == 12
    assert bpo.length_effect(RENAMED, **ASKED).n_pairs == 12
    evaluated = bpo.evaluate_preferences(model, RENAMED, progress=False, **tokens, **ASKED)
    assert evaluated.n_pairs == 12
    asked = {"max_new_tokens": 2, "progress": False, **ASKED}
    assert len(bpo.sample_responses(model, RENAMED, 2, keep=["truncated"], **tokens, **asked)) == 4
    scored = bpo.score_responses(RENAMED, lambda prompt, response: len(prompt), progress=False, overwrite=True, **ASKED)
    assert scored["scores"][0] == [4.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="no split 'train'"):
        bpo.audit(store, RENAMED, progress=False)
