"""Looking after stores: bpo store info, verify, repair, merge and export; and choosing again without the model."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import bpo
from bpo import GradientStore, SelectConfig, StoreDamagedError, StoreMismatchError, _core
from bpo.cli.main import main
from bpo.store.gradient_store import RECORD, SET_ASIDE
from store_writer import flip
from tiny import scored_rows, stored

ROWS = scored_rows(6, 4)


@pytest.fixture
def store(model, tokenizer, tmp_path):
    """The directory of a store of 24 rows."""
    return stored(model, ROWS, tokenizer, tmp_path / "store", sketch_dtype="float16").path


def sketches_by_id(store):
    rows = np.flatnonzero(~store.set_aside)
    return {store.records["response_id"][row].tobytes(): store.sketches([row])[0] for row in rows}


def test_info_says_what_is_there(store, capsys):
    assert main(["store", "info", str(store)]) == 0
    said = capsys.readouterr().out
    assert "24 responses of 6 prompts" in said and "64 numbers in float16" in said
    assert json.loads(said.partition("made with\n")[2])["bpo"] == bpo.__version__
    writer = _core.StoreWriter.append_to(store)
    writer.append(np.ones((1, 64), dtype=np.float32), np.zeros(1, dtype=RECORD))
    assert "tail      128 bytes of a writer at work or one that died" in bpo.describe_store(store)
    writer.close()


def test_verify_names_every_damage_and_where(store, capsys):
    assert main(["store", "verify", str(store)]) == 0
    assert "all 24 rows are as they were written" in capsys.readouterr().out
    flip(store / "rows.f16", 5 * 128 + 3)
    flip(store / "rows.f16", 9 * 128 + 3)
    assert main(["store", "verify", str(store)]) == 1
    assert "2 of 24 rows are damaged: 5, 9" in capsys.readouterr().err
    flip(store / "records.bin", 72 + 7 * 72)
    problems = bpo.verify_store(store, progress=False)
    assert "the record of row 7, at byte 576, is damaged" in problems[0]
    assert problems[1].endswith("3 of 24 rows are damaged: 5, 7, 9")
    flip(store / "manifest.json", 40)
    assert "manifest.json: it is not as it was written" in bpo.verify_store(store, progress=False)[0]
    assert main(["store", "verify", str(store.parent / "nothing")]) == 1


def test_a_damaged_row_is_never_selected_from(store, model, tokenizer):
    arguments = {"budget": 8, "processing_class": tokenizer, "store": store, "progress": False}
    config = SelectConfig(sketch_dim=64)
    bpo.select(model, ROWS, config=config, **arguments)
    flip(store / "rows.f16", 5 * 128 + 3)
    with pytest.raises(
        StoreDamagedError, match=r"rows\.f16: row 5, at byte 640, is not as it was written; .*store repair"
    ):
        bpo.select(model, ROWS, config=config, **arguments)


def test_what_repair_sets_aside_the_next_run_computes_anew(store, model, tokenizer, capsys):
    whole = GradientStore.open(store)
    expected = sketches_by_id(whole)
    before = bpo.select(
        model, ROWS, budget=8, processing_class=tokenizer, store=store, config={"sketch_dim": 64}, progress=False
    )
    flip(store / "rows.f16", 5 * 128 + 3)
    flip(store / "records.bin", 72 + 7 * 72)
    (store / "manifest.json").unlink()
    with pytest.raises(StoreDamagedError, match="it is missing, but the rows are there"):
        stored(model, ROWS, tokenizer, store, sketch_dtype="float16")
    assert main(["store", "repair", str(store)]) == 0
    said = capsys.readouterr().out
    assert "written anew: manifest.json, records.bin; 2 damaged rows set aside: 5, 7" in said and "24 rows" in said
    assert bpo.verify_store(store, progress=False) == []
    assert "2 set aside by a repair" in bpo.describe_store(store)
    mended = stored(model, ROWS, tokenizer, store, sketch_dtype="float16")
    assert len(mended) == 26 and mended.set_aside.sum() == 2
    for identifier, sketch in sketches_by_id(mended).items():
        # Those two were in other batches this time.
        np.testing.assert_allclose(sketch, expected[identifier], atol=2e-3 * np.abs(sketch).max())
    again = bpo.select(
        model, ROWS, budget=8, processing_class=tokenizer, store=store, config={"sketch_dim": 64}, progress=False
    )
    assert again.dataset["bpo_pair"][:] == before.dataset["bpo_pair"][:]
    assert main(["store", "repair", str(store)]) == 0
    assert "nothing to mend" in capsys.readouterr().out


def test_shards_merge_into_what_one_run_makes(model, tokenizer, tmp_path, capsys):
    shards = [ROWS[:3], ROWS[2:5], ROWS[5:]]
    paths = [tmp_path / f"shard-{index}" for index in range(3)]
    for path, shard in zip(paths, shards, strict=True):
        stored(model, shard, tokenizer, path)
    whole = stored(model, ROWS, tokenizer, tmp_path / "whole")
    assert main(["store", "merge", str(tmp_path / "merged"), *map(str, paths[:2])]) == 0
    assert "20 responses of 64 float32" in capsys.readouterr().out
    merged = bpo.merge_stores(tmp_path / "merged", paths, progress=False)  # adds what is new
    assert len(merged) == 24 and merged.fingerprint == whole.fingerprint
    for identifier, sketch in sketches_by_id(merged).items():
        np.testing.assert_allclose(sketch, sketches_by_id(whole)[identifier], atol=1e-5 * np.abs(sketch).max())
    # And it serves a run.
    assert len(stored(model, ROWS, tokenizer, tmp_path / "merged")) == 24


def test_a_store_can_be_converted(model, tokenizer, tmp_path):
    whole = stored(model, ROWS, tokenizer, tmp_path / "whole")
    for dtype, tolerance in (("float16", 1e-3), ("bfloat16", 1e-2), ("int8", 2e-2)):
        small = bpo.merge_stores(tmp_path / dtype, [whole.path], dtype=dtype, progress=False)
        assert (small.dtype, len(small)) == (dtype, 24)
        error = np.linalg.norm(small.sketches() - whole.rows, axis=1) / np.linalg.norm(whole.rows, axis=1)
        assert 0 < error.max() < tolerance
        # It is what a run with that type would have made.
        direct = stored(model, ROWS, tokenizer, tmp_path / f"direct-{dtype}", sketch_dtype=dtype)
        assert direct.fingerprint == small.fingerprint
        np.testing.assert_array_equal(direct.rows, small.rows)


def test_stores_of_other_things_do_not_merge(model, tokenizer, tmp_path):
    one = stored(model, ROWS[:2], tokenizer, tmp_path / "one").path
    other = stored(model, ROWS[2:], tokenizer, tmp_path / "other", sketch_seed=1).path
    with pytest.raises(
        StoreMismatchError, match=r"other was made with another set of differentiated parameters, or seed"
    ):
        bpo.merge_stores(tmp_path / "merged", [one, other], progress=False)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(StoreMismatchError, match="keeps its numbers in float32, not in int8"):
        bpo.merge_stores(one, [stored(model, ROWS[2:], tokenizer, tmp_path / "third").path], dtype="int8")
    with pytest.raises(ValueError, match="output and store 1 are the same"):
        bpo.merge_stores(one, [one])
    with pytest.raises(FileNotFoundError, match="holds no gradient store"):
        bpo.merge_stores(tmp_path / "merged", [tmp_path / "nothing"])
    with pytest.raises(ValueError, match="at least one store"):
        bpo.merge_stores(tmp_path / "merged", [])
    flip(one / "rows.f32", 3 * 256)
    with pytest.raises(StoreDamagedError, match=r"rows\.f32: row 3, at byte 768"):
        bpo.merge_stores(tmp_path / "merged", [one], progress=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_exports_are_what_is_stored(model, tokenizer, tmp_path, dtype):
    store = stored(model, ROWS, tokenizer, tmp_path / "store", sketch_dtype=dtype)
    damaged = store.path / {"float32": "rows.f32", "bfloat16": "rows.bf16", "int8": "rows.i8"}[dtype]
    flip(damaged, 2 * store.rows[0].nbytes)
    with pytest.raises(StoreDamagedError):
        bpo.export_store(store.path, tmp_path / "rows.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
    bpo.repair_store(store.path, progress=False)
    store = GradientStore.open(store.path)
    rows = np.flatnonzero(~store.set_aside)
    assert len(rows) == 23
    with np.load(bpo.export_store(store.path, tmp_path / "rows.npz"), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["sketch"], store.sketches(rows))
        for name in ("response_id", "logp", "length"):
            np.testing.assert_array_equal(arrays[name], store.records[name][rows])
    assert main(["store", "export", str(store.path), str(tmp_path / "rows.parquet")]) == 0
    table = pq.read_table(tmp_path / "rows.parquet")
    np.testing.assert_array_equal(np.array(table["sketch"].to_pylist(), dtype=np.float32), store.sketches(rows))
    assert [value.as_py() for value in table["prompt_id"]] == [
        row.tobytes() for row in store.records["prompt_id"][rows]
    ]
    np.testing.assert_array_equal(table["score"], store.records["score"][rows])
    with pytest.raises(FileExistsError):
        bpo.export_store(store.path, tmp_path / "rows.npz")
    with pytest.raises(ValueError, match=r"give one of \.npz, \.parquet"):
        bpo.export_store(store.path, tmp_path / "rows.csv")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_ten_lines_of_numpy_read_a_store(model, tokenizer, tmp_path, monkeypatch, dtype):
    """Those of docs/store-format.md."""
    text = (Path(__file__).parents[3] / "docs" / "store-format.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert len([line for line in code.splitlines() if line and not line.startswith("import")]) == 10
    store = stored(model, ROWS, tokenizer, tmp_path / "gradients", sketch_dtype=dtype)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    np.testing.assert_array_equal(found["sketches"], store.sketches())
    assert found["records"].tobytes() == store.records.tobytes()


def test_selecting_again_needs_no_model(model, tokenizer, store, model_path, tmp_path, capsys):
    arguments = {"budget": 8, "store": store, "progress": False}
    with_model = bpo.select(model, ROWS, processing_class=tokenizer, config={"sketch_dim": 64}, **arguments)
    again = bpo.select(None, ROWS, **arguments)
    assert again.pairs.equals(with_model.pairs)
    assert again.dataset.to_list() == with_model.dataset.to_list()
    assert again.config["sketch_dim"] == 64 and again.config["lora_rank"] == 8
    # Another loss, ranking or part of the data.
    other = bpo.select(None, ROWS[:4], config={"loss_type": "ipo", "ranking": "random"}, **arguments)
    assert len(other) == 8 and set(other.pairs["prompt"].to_pylist()) == {0, 1, 2, 3}
    with pytest.raises(
        StoreMismatchError, match=r"made with sketch_dim=64, and config asks for 32.*leave the setting out"
    ):
        bpo.select(None, ROWS, config={"sketch_dim": 32}, **arguments)
    with pytest.raises(StoreMismatchError, match="holds the responses of none of the 36 candidate pairs"):
        bpo.select(None, scored_rows(6, 4, seed=9), **arguments)
    with pytest.warns(bpo.InvalidDataWarning, match="6 × pair of a response that the store does not hold"):
        more = bpo.select(None, ROWS + scored_rows(1, 4, seed=9), **arguments)
    assert more.skipped["pair of a response that the store does not hold"] == ["row 6"] * 6
    with pytest.raises(ValueError, match=r"needs a model; model is None\. Name the store"):
        bpo.select(None, ROWS, budget=8)
    with pytest.raises(ValueError, match="Name an embedder"):
        bpo.select(None, ROWS, breadth=3, **arguments)
    with pytest.raises(FileNotFoundError, match="holds no gradient store"):
        bpo.select(None, ROWS, budget=8, store=tmp_path / "nothing")

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    output = tmp_path / "selection"
    assert main(["reselect", str(store), str(data), "--budget", "8", "--output", str(output)]) == 0
    assert "strategy bpo, budget 8" in capsys.readouterr().out
    assert bpo.Selection.load(output).pairs.equals(with_model.pairs)


def test_a_response_with_several_rows_needs_the_tokenizer(model, tokenizer, store):
    opened = GradientStore.open(store)
    record = opened.records[3:4].copy()
    record["response_id"][0, 8:] ^= 1  # the same response from another token on
    with _core.StoreWriter.append_to(store) as writer:
        writer.append(opened.sketches([3]), record)
    with pytest.raises(ValueError, match=r"holds 1 responses more than once, such as one of row \d.*tokenizer"):
        bpo.select(None, ROWS, budget=8, store=store, progress=False)


def test_set_aside_rows_are_found_by_nobody(store):
    flip(store / "rows.f16", 0)
    bpo.repair_store(store, progress=False)
    opened = GradientStore.open(store)
    assert opened.records["flags"][0] == SET_ASIDE
    assert opened.rows_of(np.zeros((1, 16), dtype=np.uint8)).tolist() == [-1]
    assert opened.rows_of(opened.records["response_id"][1:3]).tolist() == [1, 2]
