import json
import os
import signal
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import bpo
from bpo import InvalidDataWarning, SelectConfig, Selection
from bpo.selection.saved import SelectionError
from tiny import scored_rows, tiny_llama

CONFIG = SelectConfig(sketch_dim=128, lora_rank=4)


@pytest.fixture
def select(model, tokenizer):
    def run(rows, **arguments):
        arguments = {"config": CONFIG, "processing_class": tokenizer, "progress": False, **arguments}
        if arguments.get("strategy") == "less":
            arguments.setdefault(
                "target", scored_rows(2, 3, conversational=isinstance(rows[0]["prompt"], list), seed=7)
            )
        return bpo.select(arguments.pop("model", model), rows, **arguments)

    return run


def as_bytes(table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


# Some of each kind; the others, which may keep one pair a prompt or need a reference, are in test_rules.
ALL = ("bpo", "uniform", "random", "matching", "margin", "fused_margin", "coreset", "d_optimal", "easiest", "epig")


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("conversational", [False, True])
def test_every_strategy_keeps_exactly_the_budget(select, strategy, conversational):
    rows = scored_rows(conversational=conversational)
    selection = select(rows, budget=23, breadth=6, strategy=strategy)
    assert len(selection.dataset) == 23 == selection.depth.sum()
    assert (selection.depth > 0).sum() <= 6
    assert selection.fates() == {"selected": 23, "depth": 37, "breadth": 40, "unusable": 0}
    by_row = {json.dumps(row["prompt"]): row for row in rows}
    for pair in selection.dataset:
        row = by_row[json.dumps(pair["prompt"])]
        score = dict(zip(map(json.dumps, row["responses"]), row["scores"], strict=True))
        assert score[json.dumps(pair["chosen"])] > score[json.dumps(pair["rejected"])]


@pytest.mark.parametrize("strategy", ["bpo", "uniform"])
def test_depth_is_balanced_on_breadth(select, rows, strategy):
    selection = select(rows, budget=34, strategy=strategy)
    assert selection.depth.min() >= 1 and selection.depth.sum() == 34
    if strategy == "uniform":
        assert sorted(selection.depth) == [3] * 6 + [4] * 4


def test_uniform_leaves_the_share_of_shallow_prompts_to_the_others(select, rows):
    rows[0]["responses"], rows[0]["scores"] = rows[0]["responses"][:2], [0.0, 1.0]
    selection = select(rows, budget=50, strategy="uniform")
    assert selection.depth[0] == 1 and set(selection.depth[1:]) <= {5, 6}


def test_margin_takes_the_largest_gaps(rows):
    selection = bpo.select(None, rows, budget=10, strategy="margin", progress=False)
    assert selection.dataset["bpo_score_gap"][:] == [4.0] * 10
    assert selection.pairs["cluster"].null_count == 100


def test_bpo_takes_the_best_pair_of_each_prompt_first(select, rows):
    selection = select(rows, budget=10)
    table = selection.pairs.to_pandas()
    best = table.loc[table.groupby("prompt")["usefulness"].idxmax(), "pair"].tolist()
    assert selection.dataset["bpo_pair"][:] == best
    assert selection.depth.tolist() == [1] * 10


def test_farthest_is_less_central_than_nearest(select, rows):
    means = []
    for ranking in ("nearest", "random", "farthest"):
        config = SelectConfig(sketch_dim=128, lora_rank=4, n_clusters=5, ranking=ranking)
        means.append(np.mean(select(rows, budget=30, config=config).dataset["bpo_centrality"][:]))
    assert means[0] > means[1] > means[2]


@pytest.mark.parametrize("strategy", ALL)
def test_max_depth_caps_a_prompt(select, rows, strategy):
    config = SelectConfig(sketch_dim=128, max_depth=2)
    with pytest.warns(UserWarning, match="20 pairs are kept of the 60 asked for, because of max_depth=2"):
        selection = select(rows, budget=60, strategy=strategy, config=config)
    assert selection.depth.max() == 2 and len(selection) == 20 and selection.budget == 60


@pytest.mark.parametrize("strategy", ALL)
def test_same_seed_same_bytes_for_any_number_of_threads(select, rows, strategy):
    one, two = (
        select(rows, budget=30, breadth=8, strategy=strategy, config=SelectConfig(sketch_dim=128, threads=threads))
        for threads in (1, 2)
    )
    assert as_bytes(one.pairs) == as_bytes(two.pairs)
    assert one.dataset.to_list() == two.dataset.to_list()
    if strategy in ("random", "uniform"):
        other = select(rows, budget=30, breadth=8, strategy=strategy, seed=1)
        assert one.dataset.to_list() != other.dataset.to_list()


def test_two_batch_sizes_select_the_same_pairs(select, rows):
    """The model's matrix products round differently for other batch shapes; everything after them is exact.

    Rows of float16 would turn the last digit of a float32 into the last of a float16.
    """
    small, large = (
        select(rows, budget=30, config=SelectConfig(sketch_dim=128, sketch_dtype="float32", tokens_per_batch=tokens))
        for tokens in (1, 4096)
    )
    for name in small.pairs.column_names:
        left, right = small.pairs[name].to_numpy(), large.pairs[name].to_numpy()
        if left.dtype.kind == "f":
            np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(left, right)


def test_fractions(select, rows):
    selection = select(rows, budget=0.5, breadth=0.4)
    assert (selection.depth > 0).sum() == 4 and len(selection) == 20
    assert len(select(rows, budget=1.0)) == 100


def test_full_parameters_and_a_trained_adapter(select, rows, tokenizer):
    from peft import LoraConfig, get_peft_model

    full = select(rows, budget=20, config=SelectConfig(sketch_dim=128, features="full"))
    wrapped = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules="all-linear"))
    fresh = select(rows, budget=20, model=wrapped)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.05)
    trained = select(rows, budget=20, model=wrapped)
    assert len(full) == len(fresh) == len(trained) == 20
    means = [np.mean(selection.pairs["informativeness"].to_numpy()) for selection in (full, fresh, trained)]
    assert means[0] > means[2] > 0 and means[1] != means[2]


def test_preference_rows_keep_their_pairs(select):
    rows = [{"prompt": f"p{i // 3}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(12)]
    selection = select(rows, budget=6)
    assert selection.pairs.num_rows == 12 and selection.depth.sum() == 6
    assert "bpo_score_gap" not in selection.dataset.column_names
    with pytest.raises(ValueError, match="'margin' needs scores"):
        select(rows, budget=6, strategy="margin")


def test_breadth_by_an_encoder(select, rows, tmp_path, tokenizer):
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    selection = select(rows, budget=10, breadth=5, config=SelectConfig(sketch_dim=64, embedder=str(tmp_path)))
    assert (selection.depth > 0).sum() == 5


def test_store_is_reused_for_another_budget(select, rows, tmp_path, model, monkeypatch):
    first = select(rows, budget=20, store=tmp_path / "store")

    def refuse(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "forward", refuse)
    second = select(rows, budget=40, store=tmp_path / "store")
    assert len(second) == 40
    np.testing.assert_array_equal(first.pairs["centrality"], second.pairs["centrality"])


def test_breadth_then_all_prompts_from_one_store(select, rows, tmp_path):
    select(rows, budget=20, breadth=4, store=tmp_path / "store")
    assert len(bpo.GradientStore.open(tmp_path / "store")) == 20
    select(rows, budget=20, store=tmp_path / "store")
    assert len(bpo.GradientStore.open(tmp_path / "store")) == 50


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"budget": 9, "config": {"min_depth": 1}}, "budget=9 is below the 10 prompts.*breadth=9"),
        ({"budget": 9, "strategy": "uniform", "config": {"min_depth": 1}}, "below the 10 prompts"),
        ({"budget": 101}, "budget=101 is above the 100 candidate pairs"),
        ({"budget": 41, "breadth": 4}, "budget=41 is above the 40 candidate pairs"),
        (
            {"budget": 0.05, "breadth": 0.9, "config": {"min_depth": 1}},
            r"budget=0.05, which makes 4, is below the 9 prompts",
        ),
        ({"budget": 20, "config": 3}, "config must be a bpo.SelectConfig"),
        ({"budget": 20, "config": {"colour": 1}}, "no field colour"),
        ({"budget": 20, "config": {"trust_remote_code": "no"}}, "trust_remote_code must be True or False"),
        ({"budget": 20, "config": {"sketch_seed": 2**70}}, "sketch_seed must be"),
        ({"budget": 20, "config": {"embedder": 5}}, "embedder must be text"),
        ({"budget": 20, "model": 3}, "model must be a path"),
        ({"budget": 20, "processing_class": 3}, "processing_class must be a tokenizer"),
        ({"budget": 0}, "at least 1"),
        ({"budget": -3}, "at least 1"),
        ({"budget": 1.5}, "neither a whole number nor a fraction"),
        ({"budget": float("nan")}, "neither a whole number nor a fraction"),
        ({"budget": "20"}, "must be a whole number or a fraction, got '20'"),
        ({"budget": True}, "must be a whole number or a fraction"),
        ({"budget": 0.01, "config": {"min_depth": 1}}, "budget=0.01, which makes 1, is below the 10 prompts"),
        ({"budget": 20, "breadth": 11}, "breadth=11 is above the 10 usable prompts"),
        ({"budget": 20, "strategy": "best"}, "strategy must be one of"),
        ({"budget": 20, "seed": -1}, "seed must be"),
        ({"budget": 20, "model": "./nowhere"}, "no such model directory"),
        ({"budget": 20, "model": "no/such-model", "processing_class": None}, "no/such-model is no local directory"),
        ({"budget": 20, "model": None}, "needs a model"),
    ],
)
def test_bad_arguments_are_refused(select, rows, arguments, expected, model, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)  # before any model runs
    with pytest.raises((ValueError, TypeError, OSError), match=f"(?s){expected}"):
        select(rows, **arguments)


def test_bad_data_is_refused_before_the_model_runs(select, rows, model, tokenizer, monkeypatch):
    import copy

    monkeypatch.setattr(type(model), "forward", None)
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        select(scored_rows(conversational=True), budget=10, processing_class=bare)
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad_token nor an eos_token"):
        select(rows, budget=10, processing_class=bare)
    with (
        pytest.raises(ValueError, match=r"No pair can be used.*\n.*prompt fills the window of 4 tokens"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", InvalidDataWarning)
        select(rows, budget=10, config=SelectConfig(max_length=4))


def test_a_prompt_beyond_the_window_is_named(select, rows):
    rows[3]["prompt"] = "red " * 300
    with pytest.warns(InvalidDataWarning, match=r"prompt fills the window of 256 tokens \(row 3, \d+ tokens\)"):
        selection = select(rows, budget=20)
    assert len(selection.depth) == 9
    assert "prompt fills the window" in selection.summary()


def test_a_model_without_gradients_is_refused(select, rows, tokenizer):
    dead = tiny_llama(tokenizer)
    dead.lm_head.weight.data.zero_()
    with pytest.raises(ValueError, match="every pair is zero or not finite"):
        select(rows, budget=20, model=dead)


def test_one_bad_response_costs_its_own_pairs_only(select, rows, tokenizer):
    """A token whose embedding is NaN, in one response: its pairs are named and the others selected."""
    bad = tiny_llama(tokenizer)
    rows[2]["responses"][1] = " moon zzz"
    token = tokenizer("zzz")["input_ids"][0]
    assert not any(token in tokenizer(text)["input_ids"] for row in scored_rows() for text in row["responses"])
    bad.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.warns(InvalidDataWarning, match=r"4 × pair whose gradient is NaN or infinite \(row 2; row 2"):
        selection = select(rows, budget=30, model=bad)
    assert len(selection) == 30
    assert selection.fates() == {"selected": 30, "depth": 66, "breadth": 0, "unusable": 4}


def test_pairs_name_their_row(select):
    rows = [{"prompt": f"p{i % 2}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(4)]
    assert select(rows, budget=1.0).pairs["row"].to_pylist() == [0, 2, 1, 3]


def test_a_smaller_reference_is_refused_or_narrows_the_window(select, rows, tokenizer):
    small = SelectConfig(sketch_dim=64, ref_model=tiny_llama(tokenizer, vocab_size=50))
    with pytest.raises(ValueError, match="embeddings for 50 tokens only"):
        select(rows, budget=20, config=small)
    narrow = SelectConfig(sketch_dim=64, ref_model=tiny_llama(tokenizer, max_position_embeddings=24))
    with pytest.warns(UserWarning, match="are cut to the window of 24 tokens"):
        assert len(select(rows, budget=20, config=narrow)) == 20


def test_seeds_share_a_store(select, rows, tmp_path):
    for seed in (0, 1):
        select(rows, budget=20, store=tmp_path / "store", seed=seed)
    assert len(bpo.GradientStore.open(tmp_path / "store")) == 50


def test_an_adapter_by_path_knows_its_window(tokenizer, model_path, tmp_path, rows):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_path)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    rows[0]["responses"][0] = "red " * 400
    selection = bpo.select(
        str(tmp_path / "adapter"), rows, budget=10, processing_class=tokenizer, config=CONFIG, progress=False
    )
    longest = max(selection.pairs["length_chosen"].to_pylist() + selection.pairs["length_rejected"].to_pylist())
    assert 200 < longest < 256


def test_the_model_and_random_state_are_left_alone(select, rows, tokenizer):
    import random

    import torch

    model = tiny_llama(tokenizer).train()
    model.model.layers[0].eval()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    select(rows, budget=10, breadth=5, model=model)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_saving_keeps_what_it_did_not_write(select, rows, tmp_path, monkeypatch):
    first, second = select(rows, budget=20), select(rows, budget=30)
    first.save(tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "s")
    second.save(".")
    assert len(Selection.load(".")) == 30
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "dataset",
        "notes.txt",
        "pairs.parquet",
        "selection.json",
    ]
    with pytest.raises(FileExistsError, match="is a file"):
        second.save("notes.txt")


def test_an_interrupted_save_can_be_done_again_and_foreign_files_stay(select, rows, tmp_path):
    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / "dataset").mkdir()
    select(rows, budget=20).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "pairs.parquet", "selection.json"]
    (tmp_path / "selection.json").write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"selection\.json is not bpo's"):
        select(rows, budget=20).save(tmp_path)
    assert (tmp_path / "selection.json").read_text() == '{"mine": 1}'


def test_save_and_load(select, rows, tmp_path):
    selection = select(rows, budget=30, breadth=8)
    selection.save(tmp_path / "s")
    loaded = Selection.load(tmp_path / "s")
    assert loaded.pairs.equals(selection.pairs)
    assert loaded.dataset.to_list() == selection.dataset.to_list()
    assert loaded.dataset.features == selection.dataset.features
    np.testing.assert_array_equal(loaded.depth, selection.depth)
    assert loaded.summary() == selection.summary() and repr(loaded) == repr(selection)
    trained_on = datasets.load_dataset(str(tmp_path / "s" / "dataset"), split="train")
    assert trained_on.to_list() == selection.dataset.to_list()
    selection.save(tmp_path / "s")  # replaces an earlier selection
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="holds no selection"):
        selection.save(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "s"]


def test_a_damaged_selection_is_refused(select, rows, tmp_path):
    select(rows, budget=30).save(tmp_path)
    with pytest.raises(FileNotFoundError, match="no saved selection"):
        Selection.load(tmp_path / "dataset")
    data = (tmp_path / "pairs.parquet").read_bytes()
    (tmp_path / "pairs.parquet").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SelectionError, match=r"pairs\.parquet was changed"):
        Selection.load(tmp_path)
    manifest = json.loads((tmp_path / "selection.json").read_text())
    for content, expected in (
        ({**manifest, "format_version": 9}, "version 9"),
        ({name: value for name, value in manifest.items() if name != "depth"}, "lacks depth"),
        ([1], "holds no manifest"),
    ):
        (tmp_path / "selection.json").write_text(json.dumps(content))
        with pytest.raises(SelectionError, match=expected):
            Selection.load(tmp_path)


def test_every_flipped_bit_of_a_selection_is_detected_or_harmless(select, rows, tmp_path):
    selection = select(rows, budget=30)
    selection.save(tmp_path)
    generator = np.random.default_rng(0)
    detected = {}
    for name in ("selection.json", "pairs.parquet", "dataset/train.parquet"):
        data = (tmp_path / name).read_bytes()
        for place in generator.choice(len(data), 150, replace=False):
            flipped = bytearray(data)
            flipped[place] ^= 1 << generator.integers(8)
            (tmp_path / name).write_bytes(flipped)
            try:
                loaded = Selection.load(tmp_path)
            except SelectionError as error:
                assert name in str(error)
                detected[name] = detected.get(name, 0) + 1
            else:  # a blank of the JSON
                assert loaded.pairs.equals(selection.pairs) and loaded.config == selection.config
                np.testing.assert_array_equal(loaded.depth, selection.depth)
        (tmp_path / name).write_bytes(data)
    assert detected["pairs.parquet"] == detected["dataset/train.parquet"] == 150 and detected["selection.json"] > 75


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_save_that_is_killed_leaves_the_earlier_selection_or_the_new_one(select, rows, tmp_path, monkeypatch):
    earlier, later, last = (select(rows, budget=budget) for budget in (20, 30, 40))
    found = []
    for step in range(13):
        directory = tmp_path / str(step)
        earlier.save(directory)
        child = os.fork()
        if child == 0:
            left = [step]

            def dying(work, left=left):
                def run(*arguments, **settings):
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    left[0] -= 1
                    return work(*arguments, **settings)

                return run

            monkeypatch.setattr(Path, "replace", dying(Path.replace))
            monkeypatch.setattr(os, "fsync", dying(os.fsync))
            later.save(directory)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        loaded = Selection.load(directory)
        expected = {20: earlier, 30: later}[len(loaded)]
        assert loaded.pairs.equals(expected.pairs) and loaded.dataset.to_list() == expected.dataset.to_list()
        found.append((len(loaded), os.WIFSIGNALED(status)))
        last.save(directory)
        assert len(Selection.load(directory)) == 40
        assert sorted(path.name for path in directory.iterdir()) == ["dataset", "pairs.parquet", "selection.json"]
    assert found[0] == (20, True) and (30, True) in found and found[-1] == (30, False)


def test_report_is_one_page_that_escapes_what_it_shows(select, rows, tmp_path):
    rows[0]["prompt"] = "<script>alert(1)</script> & co"
    selection = select(rows, budget=30)
    page = selection.report(tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in page and page.count("<script") == 1
    assert page.count("h0m") == 29
    plain = bpo.select(None, rows, budget=5, strategy="margin", progress=False)
    assert "Clusters of pair gradients" not in plain.report(tmp_path / "plain.html").read_text()


@pytest.mark.parametrize("strategy", ["coreset", "d_optimal", "best_worst"])
def test_a_report_of_pairs_that_length_control_added(select, rows, tmp_path, strategy):
    """Which the strategy did not rank."""
    for row in rows:
        row["scores"] = [len(text) + index / 10 for index, text in enumerate(row["responses"])]
    selection = select(rows, budget=30, strategy=strategy, config={"sketch_dim": 64, "length_control": "balance"})
    if strategy != "best_worst":
        assert None in selection.dataset["bpo_usefulness"][:]
    assert "score gap" in selection.report(tmp_path / "report.html").read_text()


def test_gradients_far_longer_than_the_others_are_noted_and_kept(select, rows, tmp_path):
    def heavy(_, response_ids):
        return [1e5 if len(response_ids) == longest else 1.0] * len(response_ids)

    rows[2]["responses"][1] = " moon" * 40
    longest = 41  # the end token counts
    config = SelectConfig(sketch_dim=64, token_weights=heavy)
    selection = select(rows, budget=30, config=config)
    ((reason, places),) = [item for item in selection.noted.items() if "longer" in item[0]]
    assert places == ["row 2"] * 4
    assert f"noted    4 × {reason} (row 2" in selection.summary()
    assert Selection.load(selection.save(tmp_path / "saved")).noted == selection.noted
