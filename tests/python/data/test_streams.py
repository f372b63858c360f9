"""Data that does not fit into memory: the same rows, pairs and training set, on disk and in as much memory as ever."""

import errno
import json
import os
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import bpo
from bpo.data.rows import load_rows
from bpo.system import packed


def row(index):
    """Half of the prompts come twice, some not one after another; every fifth row has messages, which most have not."""
    if index % 5 == 4:
        prompt = [{"role": "user", "content": f"question {index} — ☃"}]
        sides = [[{"role": "assistant", "content": f"{name} {index}"}] for name in ("good", "bad")]
    else:
        prompt, sides = f"question {index // 2 % 40}", [f"good {index} é", f"bad {index % 50}" * (1 + index % 3)]
    scores = {"score_chosen": 2.0 + index % 7, "score_rejected": 1.0}
    return {
        "prompt": prompt,
        "chosen": sides[0],
        "rejected": sides[1],
        **scores,
        "id": index,
        "tag": [index] * (index % 3),
    }


ROWS = [row(index) for index in range(200)]
TEXTS = [each for each in ROWS if isinstance(each["prompt"], str)]  # which have one type a column


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Everything beyond half a kilobyte is on disk; the directory is looked at in the end."""
    monkeypatch.setenv("BPO_CACHE", str(tmp_path / "cache"))
    for name, limit in (("IN_MEMORY", 512), ("_WRITTEN_AT_ONCE", 256), ("_READ_AT_ONCE", 7)):
        monkeypatch.setattr(packed, name, limit)
    for room in ("data.rows", "selection.tables"):
        monkeypatch.setattr(f"bpo.{room}._PIECE", 11)
    yield tmp_path
    assert list((tmp_path / "cache" / "scratch").iterdir()) == []


def jsonl(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=30)
    return str(path)


HELD = {
    "generator": lambda path: iter(TEXTS),
    "jsonl": lambda path: jsonl(path / "rows.jsonl", TEXTS),
    "parquet": lambda path: parquet(path / "rows.parquet", TEXTS),
    "reader": lambda path: pa.Table.from_pylist(TEXTS).to_reader(max_chunksize=9),
    "stream": lambda path: datasets.Dataset.from_list(TEXTS).to_iterable_dataset(num_shards=3),
}


def contents(candidates):
    arrays = {name: value for name, value in vars(candidates).items() if isinstance(value, np.ndarray)}
    texts = (
        list(candidates.prompts),
        list(candidates.responses),
        candidates.template_kwargs,
        candidates.skipped.places,
    )
    return texts, {name: (value.dtype, value.tolist()) for name, value in arrays.items()}


def chosen_of(data):
    selection = bpo.select(None, data, budget=40, strategy="margin", progress=False)
    return selection.dataset.to_list(), selection.dataset.features, selection.pairs.to_pylist(), selection.pairs.schema


EXPECTED = contents(bpo.read_candidates(TEXTS)), chosen_of(TEXTS)


@pytest.mark.parametrize("held", HELD)
def test_data_on_disk_gives_what_a_list_gives(held, on_disk):
    read = bpo.read_candidates(HELD[held](on_disk))
    assert str(contents(read)) == str(EXPECTED[0])  # NaN equals itself so
    assert chosen_of(HELD[held](on_disk)) == EXPECTED[1]


def test_prompts_meet_wherever_their_rows_stand(on_disk):
    read = bpo.read_candidates(iter(TEXTS))
    assert read.prompts == list(dict.fromkeys(each["prompt"] for each in TEXTS)) and len(read.prompts) < len(TEXTS) / 2
    for (chosen, rejected), prompt, row in zip(read.pairs, read.prompt_of_pair, read.pair_rows, strict=True):
        said = [read.prompts[prompt], read.responses[chosen], read.responses[rejected]]
        assert said == [TEXTS[row][name] for name in ("prompt", "chosen", "rejected")]


def test_rows_of_mixed_types_are_read_from_disk_as_they_are(on_disk):
    """Messages beside text, a number that becomes text: what no column of Arrow holds, and with other names."""
    odd = [*ROWS, 7, {**ROWS[0], "prompt": "other", "id": "text"}, {"prompt": "no pair"}]
    plain, streamed = load_rows(odd), load_rows(iter(odd))
    assert streamed.broken == plain.broken == {200: "int 7 is no mapping of columns to values"}
    assert list(streamed) == list(plain) and list(streamed.take([3, 201], "id")) == [3, "text"]
    names = {"ask": "prompt", "number": "id"}
    columns = [load_rows(given, columns=names) for given in (odd, iter(odd))]
    assert [rows.column_names for rows in columns] == [
        ["ask", "chosen", "rejected", "score_chosen", "score_rejected", "number", "tag"]
    ] * 2
    assert list(columns[0]) == list(columns[1]) and list(columns[1].column("number"))[199:] == [199, None, "text", None]
    assert list(columns[1].column("id")) == [None] * 203  # which has another name now
    for rows in (plain, streamed):
        with pytest.warns(UserWarning, match="column 'id' does not go along"):
            table = rows.table(["id", "tag", "score_chosen"])
        assert table.column_names == ["tag", "score_chosen"] and table["tag"][:3] == [[], [1], [2, 2]]


def test_a_column_whose_type_only_all_rows_tell(on_disk, monkeypatch):
    monkeypatch.setattr("bpo.data.rows._PIECE", 2)
    values = {
        "late": [None, None, None, 1, 2],
        "wider": [1, 2, 3, 0.5, None],
        "keys": [{"a": 1}, None, {"b": 2}, None, {"a": 3}],
        "nulls": [[None] * 5, [None] * 5, [], None, [None]],
    }
    rows = [dict(zip(values, row, strict=True), never=None) for row in zip(*values.values(), strict=True)]
    for data in (rows, iter(rows)):
        table = load_rows(data).table([*values, "never"])
        assert {
            name: field.type for name, field in zip(table.column_names, table.features.arrow_schema, strict=True)
        } == {name: pa.array(column).type for name, column in values.items()}
        assert {name: table[name][:] for name in table.column_names} == {
            name: pa.array(column).to_pylist() for name, column in values.items()
        }


def test_reading_takes_as_much_memory_for_ten_times_the_rows(monkeypatch, tmp_path):
    """Rows: none at all. Pairs: numbers, and no text."""
    monkeypatch.setenv("BPO_CACHE", str(tmp_path))
    for name, limit in (("IN_MEMORY", 1 << 16), ("_WRITTEN_AT_ONCE", 1 << 14), ("_READ_AT_ONCE", 8)):
        monkeypatch.setattr(packed, name, limit)

    def rows(count):
        return ({**row(5 * index), "prompt": f"{index}", "chosen": "long " * 400} for index in range(count))

    def peak(read, count):
        tracemalloc.start()
        held = read(rows(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, held

    peak(load_rows, 200)  # whatever is imported
    few, many = (peak(load_rows, count)[0] for count in (200, 2000))
    assert many - few < 1800 * 32  # of 2 kB each
    few, many = (peak(bpo.read_candidates, count)[0] for count in (200, 2000))
    assert many - few < 1800 * 900


def test_token_ids_are_cut_and_taken_on_disk_as_in_memory(tokenizer, on_disk):
    from bpo.data.tokens import tokenize_responses

    candidates = bpo.read_candidates(TEXTS)
    for length in (None, 8):
        tokenized, _, _ = tokenize_responses(candidates, tokenizer, length)
        ids = [list(each) for each in tokenized.ids]
        assert tokenized.lengths.tolist() == [len(each) for each in ids] and max(map(len, ids)) <= (length or 1000)
        assert tokenized.take(np.array([5, 2])).ids == [ids[5], ids[2]] and tokenized.ids[-1] == ids[-1]


def test_a_full_disk_is_told_with_the_directory(on_disk, monkeypatch):
    class Full:
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed.tempfile, "TemporaryFile", lambda **named: Full())
    with pytest.raises(OSError, match=r"No space left on device: '.*cache/scratch'"):
        load_rows(iter(ROWS))


def test_what_cannot_be_read_again_is_refused_by_its_row():
    with pytest.raises(TypeError, match=r"A row holds more than plain values.*'prompt': 'a'"):
        load_rows(iter([{"prompt": "a", "call": lambda: 1}]))
