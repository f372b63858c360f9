"""What goes along with the chosen pairs: columns of the user, log π_ref, where they come from, and the card."""

import json
import re

import datasets
import numpy as np
import pandas as pd
import pytest
from trl import DPOConfig, DPOTrainer

import bpo
from bpo.selection.read import _command
from bpo.selection.tables import _rows_of
from tiny import scored_rows, tiny_llama
from trainers import SHORT

SETTINGS = {**SHORT, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
CONFIG = {"sketch_dim": 64}


def told_rows(**arguments):
    """Rows with an id, a source, a label of a class and something nested."""
    return [
        {
            **row,
            "id": f"row {index}",
            "source": index % 3,
            "tags": ["x"] * index,
            "meta": {"page": index},
            "empty": None,
        }
        for index, row in enumerate(scored_rows(6, 3, **arguments))
    ]


def random_choice(rows, **arguments):
    return bpo.select(None, rows, budget=9, strategy="random", progress=False, **arguments)


@pytest.mark.parametrize(
    "made", [list, datasets.Dataset.from_list, pd.DataFrame, iter], ids=["rows", "table", "pandas", "generator"]
)
def test_the_other_columns_go_along_with_the_row_of_each_pair(made, tmp_path):
    rows = told_rows()
    selection = random_choice(made(rows))
    selection.save(tmp_path)
    for held in (selection.dataset, bpo.Selection.load(tmp_path).dataset):
        assert {"id", "source", "tags", "meta"} < set(held.column_names)
        assert not {"responses", "scores", "empty"} & set(held.column_names)
        for pair in held:
            row = next(row for row in rows if row["prompt"] == pair["prompt"])
            assert {name: pair[name] for name in ("id", "source", "tags", "meta")} == {
                name: row[name] for name in ("id", "source", "tags", "meta")
            }
            assert pair["id"] == f"row {pair['bpo_row']}"


def test_types_and_formats_of_the_columns_stay():
    labels = datasets.ClassLabel(names=["web", "book", "chat"])
    rows = datasets.Dataset.from_list(told_rows()).cast_column("source", labels)
    selection = random_choice(rows)
    assert selection.dataset.features["source"] == labels and set(selection.dataset["source"]) <= {0, 1, 2}
    assert "meta" not in random_choice(rows.with_format(columns=["prompt", "responses", "scores"])).dataset.column_names
    upper = rows.with_transform(lambda batch: {**batch, "id": [name.upper() for name in batch["id"]]})
    assert all(name.startswith("ROW") for name in random_choice(upper).dataset["id"])


def test_rows_are_taken_of_tables_in_parts_and_in_any_order():
    parts = [datasets.Dataset.from_dict({"id": list(range(start, start + 5))}) for start in (0, 5, 10)]
    whole = datasets.concatenate_datasets(parts)
    wanted = np.array([11, 3, 14, 3, 0, 5])
    assert _rows_of(whole, wanted)["id"].to_pylist() == wanted.tolist()
    shuffled = whole.shuffle(seed=3)
    assert _rows_of(shuffled, wanted)["id"].to_pylist() == [shuffled[int(row)]["id"] for row in wanted]
    rows = datasets.Dataset.from_list(told_rows())
    chosen = random_choice(rows.select([5, 1, 3])).dataset
    assert [(pair["prompt"], pair["id"]) for pair in chosen] == [
        (rows[row]["prompt"], f"row {row}") for row in (5, 1, 3) for _ in range(3)
    ]


def test_columns_that_bpo_or_trl_would_take_for_their_own_stay_behind():
    rows = [
        {
            "prompt": f"{index}?",
            "chosen": "yes",
            "rejected": "no",
            "messages": [{"role": "user", "content": "x"}],
            "ref_chosen_logps": -1.0,
            "weight": 2.0,
            "w_chosen": [1.0],
            "vector": [1.0],
            "bpo_pair": 7,
            "id": index,
            "strange": index or "text",
        }
        for index in range(3)
    ]
    config = {"weight_column": None, "prompt_embeddings": "vector"}
    with pytest.warns(UserWarning) as caught:
        selection = bpo.select(None, rows, budget=3, strategy="random", config=config, progress=False)
    said = " ".join(str(entry.message) for entry in caught)
    assert "The columns bpo_pair of the data" in said and "rename them to keep them" in said
    assert "The column 'strange' does not go along" in said and "id" not in re.findall("column '(\\w+)'", said)
    names = {name for name in selection.dataset.column_names if not name.startswith("bpo_")}
    assert names == {"prompt", "chosen", "rejected", "w_chosen", "id"}
    assert selection.dataset["bpo_pair"][:] == [0, 1, 2]


def reference_of(tokenizer):
    return tiny_llama(tokenizer, initializer_range=0.21)


@pytest.mark.parametrize("conversational", [False, True])
def test_trl_gets_its_own_log_probabilities_and_losses_from_the_selection(tokenizer, conversational, tmp_path):
    """Other columns and stored log π_ref in one training set: the same steps as of a reference that runs."""
    reference, rows = reference_of(tokenizer), told_rows(conversational=conversational)
    config = bpo.SelectConfig(ref_model=reference, reference_logps=True, **CONFIG)
    tokens = {"processing_class": tokenizer}
    selection = bpo.select(tiny_llama(tokenizer), rows, budget=8, config=config, progress=False, **tokens)
    selection.save(tmp_path / "selection")
    dataset = bpo.Selection.load(tmp_path / "selection").dataset
    assert {"ref_chosen_logps", "ref_rejected_logps", "id", "meta"} < set(dataset.column_names)
    without = dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])

    def losses(kind, data, reference=reference, told=False, **changes):
        args = DPOConfig(str(tmp_path), logging_steps=1, **{**SETTINGS, **changes})
        trainer = kind(tiny_llama(tokenizer), reference, args=args, train_dataset=data, **tokens)
        if told:
            trainer.precompute_ref_logps = True
        trainer.train()
        return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    by_trl, expected = losses(DPOTrainer, without, precompute_ref_log_probs=True)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        np.testing.assert_allclose(dataset[name][:], by_trl.train_dataset[name][:], rtol=1e-5)
    assert len(expected) == 2 and expected[0] != expected[1]
    assert losses(DPOTrainer, dataset)[1] == pytest.approx(expected, rel=1e-5)  # the reference runs all the same
    told = {"kind": DPOTrainer, "data": dataset, "told": True}
    known = {"kind": bpo.WeightedDPOTrainer, "data": dataset, "precompute_ref_log_probs": True, "reference": None}
    reference.model.forward = _refuse
    for asked in (told, known):
        assert losses(**asked)[1] == pytest.approx(expected, rel=1e-5)


def _refuse(*_, **__):
    raise AssertionError("the reference ran")


def test_log_probabilities_that_trl_would_not_have_are_refused(tokenizer, tmp_path):
    rows, asked = scored_rows(4, 3), {"reference_logps": True, **CONFIG}
    with pytest.raises(ValueError, match=r"reference_logps .*strategy='random' computes none"):
        bpo.select(None, rows, budget=4, strategy="random", config=asked, progress=False)
    with pytest.raises(ValueError, match="reference_logps does not go with token_weights"):
        bpo.SelectConfig(token_weights="w", **asked)
    with pytest.raises(ValueError, match=r"reference_logps must be True or False, got 1"):
        bpo.SelectConfig(reference_logps=1)
    narrow = {"processing_class": tokenizer, "progress": False}
    model = tiny_llama(tokenizer, max_position_embeddings=16)
    with (
        pytest.warns(UserWarning, match="window of 16"),
        pytest.raises(ValueError, match=r"such as that of row \d, fill the window of 16 tokens .* set max_length=16"),
    ):
        bpo.select(model, rows, budget=8, config=asked, **narrow)
    with pytest.warns(UserWarning, match="window of 16"):
        cut = bpo.select(model, rows, budget=8, config={**asked, "max_length": 16}, store=tmp_path / "store", **narrow)
    assert None not in cut.dataset["ref_chosen_logps"][:]
    # A store alone has them, too.
    again = bpo.select(None, rows, budget=8, config={"reference_logps": True}, store=tmp_path / "store", progress=False)
    assert again.dataset["ref_rejected_logps"][:] == cut.dataset["ref_rejected_logps"][:]
    assert again.with_ref_logps() is again.dataset


def test_where_a_selection_comes_from_is_saved_with_it(model_path, monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in scored_rows(4, 3)))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setattr("sys.argv", ["/usr/bin/bpo", "select", "--hub_token", "hf_secret", "it's"])
    made = [bpo.select(model_path, path, budget=4, breadth=0.5, config=CONFIG, progress=False) for _ in range(2)]
    for number, selection in enumerate(made):
        selection.save(tmp_path / str(number))
    for name in ("selection.json", "pairs.parquet", "dataset/train.parquet"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    provenance = bpo.Selection.load(tmp_path / "0").provenance
    assert provenance == made[0].provenance and made[0].provenance["versions"]["bpo"] == bpo.__version__
    assert provenance["model"] == model_path and provenance["breadth"] == 0.5
    assert provenance["data"] == str(path) and provenance["data_readable"]
    assert re.fullmatch("[0-9a-f]{64}", provenance["data_fingerprint"])
    assert provenance["created"] == "2023-11-14T22:13:20+00:00"
    assert provenance["command"] == """bpo select --hub_token '***' 'it'"'"'s'"""
    assert {"split", "model_revision", "license"}.isdisjoint(provenance)
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    other = bpo.select(None, scored_rows(4, 3), budget=5, strategy="random", progress=False).provenance
    assert other["data"] == "a list of rows" and not other["data_readable"] and other["created"] > "2026"
    assert other["data_fingerprint"] == provenance["data_fingerprint"]
    store = bpo.collect_gradients(model_path, path, store=tmp_path / "store", config=CONFIG, progress=False)
    alone = bpo.select(None, path, budget=4, store=tmp_path / "store", config=CONFIG, progress=False).provenance
    assert alone["model"] == f"fingerprint {store.fingerprint['model']}" and "model_revision" not in alone


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/python", "train.py"], None),
        (["/site/bpo/__main__.py", "show", "x"], "bpo show x"),
        (["C:/bpo.exe", "--api_key=abc", "--budget", "5"], "bpo '--api_key=***' --budget 5"),
        ([], None),
    ],
)
def test_the_command_is_that_of_bpo_and_without_secrets(words, expected):
    assert _command(words) == expected


def test_a_selection_saved_without_its_provenance_still_loads(tmp_path):
    """By an earlier version."""
    from bpo.selection.saved import _checksum

    random_choice(told_rows()).save(tmp_path)
    manifest = json.loads((tmp_path / "selection.json").read_text())
    del manifest["provenance"], manifest["checksum"]
    (tmp_path / "selection.json").write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    assert bpo.Selection.load(tmp_path).provenance == {}
