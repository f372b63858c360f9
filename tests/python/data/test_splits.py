"""Which part of a data set is read, and under which names."""

import datasets
import pytest

import bpo
from bpo.data.rows import load_rows

ROWS = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(3)]
MORE = [{"prompt": f"{i}!", "chosen": "yes", "rejected": "no"} for i in range(5)]


def _prompts(*arguments, **settings):
    return [row["prompt"] for row in load_rows(*arguments, **settings)]


def test_a_split_is_read_of_whatever_has_several(tmp_path):
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(ROWS), train_prefs=datasets.Dataset.from_list(MORE)
    )  # fmt: skip
    both.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    both["train"].to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    both["train_prefs"].to_parquet(tmp_path / "files" / "train_prefs-00000-of-00001.parquet")
    both["train_prefs"].to_parquet(tmp_path / "files" / "pretrain_prefs.parquet")
    for held in (both, tmp_path / "saved", tmp_path / "files"):
        assert _prompts(held, split="train_prefs") == ["0!", "1!", "2!", "3!", "4!"]
        assert _prompts(held, split="train") == ["0?", "1?", "2?"]
        with pytest.raises(ValueError, match="test_sft"):
            load_rows(held, split="test_sft")
    assert _prompts(both) == _prompts(tmp_path / "saved") == ["0?", "1?", "2?"]
    assert len(bpo.read_candidates(tmp_path / "saved", split="train_prefs").prompts) == 5
    for single in (ROWS, both["train"], tmp_path / "files" / "train-00000-of-00001.parquet", tmp_path / "saved/train"):
        with pytest.raises(ValueError, match="'test'"):
            load_rows(single, split="test")


@pytest.mark.parametrize("made", [list, datasets.Dataset.from_list], ids=["rows", "table"])
def test_columns_are_read_under_the_names_of_the_user(made):
    rows = made([{"question": "2+2?", "prompt": "old", "chosen": "4", "rejected": "5", "id": 7}])
    named = load_rows(rows, columns={"prompt": "question"})
    assert set(named.column_names) == {"prompt", "chosen", "rejected", "id"}
    assert [row["prompt"] for row in named] == list(named.column("prompt")) == ["2+2?"]  # it takes the place of the old
    swapped = load_rows(rows, columns={"chosen": "rejected", "rejected": "chosen"})
    assert [(row["chosen"], row["rejected"]) for row in swapped] == [("5", "4")]
    assert bpo.read_candidates(rows, columns={"prompt": "question"}).prompts == ["2+2?"]
    with pytest.raises(ValueError, match=r"no column 'questoin' for 'prompt'.*did you mean 'question'\?"):
        load_rows(rows, columns={"prompt": "questoin"})


def test_broken_rows_stay_named_under_other_names():
    named = load_rows([{"question": "2?", "chosen": "4", "rejected": "5"}, 3], columns={"prompt": "question"})
    assert list(named.broken) == [1] and list(named.column("prompt")) == ["2?", None]
