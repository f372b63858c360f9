import json

import numpy as np
import pytest
import torch

import bpo
from bpo import GradientStore, SelectConfig, StoreError, StoreMismatchError, collect_gradients
from tiny import scored_rows, stored, tiny_llama


@pytest.fixture
def made(tokenizer, tmp_path):
    """A function that fills one store, with whatever is changed."""
    model = tiny_llama(tokenizer)

    def make(model=model, rows=None, tokenizer=tokenizer, **settings):
        return collect_gradients(
            model,
            rows or scored_rows(2, 3),
            processing_class=tokenizer,
            store=tmp_path / "store",
            config=SelectConfig(**{"sketch_dim": 64, **settings}),
            progress=False,
        )

    make()
    return make


def test_it_names_what_it_was_made_with(made, tmp_path):
    store = GradientStore.open(tmp_path / "store")
    assert store.fingerprint["bpo"] == bpo.__version__
    assert store.fingerprint["sketch"] == {"kind": "sparse", "dim": 64, "nnz": 1, "seed": 0, "dtype": "float16"}
    assert len(store.fingerprint["model"]) == 64
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["format"] == "bpo-store"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sketch_seed": 1}, "differentiated parameters, or seed"),
        ({"lora_rank": 4}, "differentiated parameters"),
        ({"features": "full"}, "differentiated parameters"),
        ({"sketch_dim": 32}, "sketch"),
        ({"sketch_nnz": 2}, "sketch"),
        ({"sketch_dtype": "int8"}, "sketch"),
        ({"max_length": 30}, "max_length"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
    ],
)
def test_other_settings_are_refused(made, change, named):
    with pytest.raises(StoreMismatchError, match=f"made with another .*{named}.*Name another store directory"):
        made(**change)


def test_another_model_is_refused(made, tokenizer):
    other = tiny_llama(tokenizer)
    other.model.layers[1].mlp.up_proj.weight.data[3, 2] += 1e-3
    with pytest.raises(StoreMismatchError, match="made with another model"):
        made(model=other)


def test_another_template_is_refused(made, tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    with pytest.raises(StoreMismatchError, match="tokenizer or chat template"):
        made(tokenizer=other)


def test_another_version_is_refused(made, monkeypatch):
    monkeypatch.setattr(bpo, "__version__", "99.0")
    with pytest.raises(StoreMismatchError, match=r"another version of bpo: .* there, 99\.0 here"):
        made()


def test_other_data_is_refused_more_data_extends_and_less_is_served(made):
    with pytest.raises(StoreMismatchError, match="6 of its 6 responses are not in this data set"):
        made(rows=scored_rows(2, 3, seed=5))
    assert len(made(rows=scored_rows(2, 3) + scored_rows(1, 3, seed=5))) == 9
    assert len(made(rows=scored_rows(1, 3))) == 9


def test_a_response_with_two_starts_has_two_rows(tokenizer, tmp_path):
    """Tokens merge across the boundary, so a response starts elsewhere with another partner; see test_tokens."""
    merging = [
        {"prompt": "one re", "chosen": "d green", "rejected": " two"},
        {"prompt": "one re", "chosen": " blue", "rejected": " two"},
    ]
    plain = [{"prompt": f"{i} red?", "chosen": " cat", "rejected": " dog"} for i in range(2)]
    model = tiny_llama(tokenizer)

    def made(rows, **settings):
        return stored(model, rows, tokenizer, tmp_path / "store", **settings)

    with pytest.warns(UserWarning, match="not a prefix"):
        store = made(merging + plain)
    assert len(store) == 4 + 4
    assert len(made(plain)) == 8  # less is served
    with pytest.warns(UserWarning, match="not a prefix"):
        assert len(made(merging)) == 8
    with pytest.raises(StoreMismatchError, match="made with other data"):
        made([{"prompt": "2 red?", "chosen": " cat", "rejected": " dog"}])


def test_responses_that_no_pair_asks_for_have_no_row(made):
    rows = scored_rows(2, 3)
    for row in rows:
        row["prompt"] = "sun " + row["prompt"]
    with pytest.raises(StoreMismatchError, match="other data"):
        made(rows=rows, max_pairs_per_prompt=1)


def test_changed_scores_need_no_new_gradients(made):
    rows = scored_rows(2, 3)
    rows[0]["scores"] = [1.0, 1.0, 1.0]
    rows[1]["scores"][2] = float("nan")
    with pytest.warns(bpo.InvalidDataWarning):
        assert len(made(rows=rows)) == 6
    stated = [{"prompt": p, "chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 0.0} for p in "xyz"]
    stated[1]["score_rejected"] = float("nan")
    with pytest.warns(bpo.InvalidDataWarning):
        assert len(bpo.read_candidates(stated).known_ids) == 6


def test_another_scaling_of_an_adapter_is_another_model(tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    for alpha, matching in ((2, True), (200, False)):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"]))
        arguments = {"processing_class": tokenizer, "store": tmp_path, "progress": False}
        if matching:
            collect_gradients(model, scored_rows(1, 2), **arguments)
        else:
            with pytest.raises(StoreMismatchError, match="another model"):
                collect_gradients(model, scored_rows(1, 2), **arguments)


def test_scaling_changed_at_run_time_is_another_model(tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    arguments = {"processing_class": tokenizer, "store": tmp_path, "progress": False}
    collect_gradients(model, scored_rows(1, 2), **arguments)
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = {"default": 50.0} if isinstance(module.scaling, dict) else module.scaling
    with pytest.raises(StoreMismatchError, match="another model"):
        collect_gradients(model, scored_rows(1, 2), **arguments)


def test_a_finished_store_serves_while_another_process_writes(made, tmp_path):
    writer = bpo._core.StoreWriter.append_to(str(tmp_path / "store"))
    try:
        assert len(made()) == 6
        with pytest.raises(StoreError, match="another process is writing"):
            made(rows=scored_rows(3, 3))
    finally:
        writer.close()


def test_a_directory_of_something_else_is_left_alone(tokenizer, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.tex").write_text("x")
    with pytest.raises(StoreError, match="no empty directory and no gradient store"):
        collect_gradients(
            tiny_llama(tokenizer),
            scored_rows(1, 2),
            processing_class=tokenizer,
            store=tmp_path / "store",
            progress=False,
        )
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.tex"]


def test_opening_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        GradientStore.open(tmp_path / "nowhere")


def test_rows_are_mapped_read_only(made, tmp_path):
    store = GradientStore.open(tmp_path / "store")
    assert isinstance(store.rows, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        store.rows[0, 0] = 1
    assert store.rows_of(np.zeros((1, 16), dtype=np.uint8)).tolist() == [-1]
