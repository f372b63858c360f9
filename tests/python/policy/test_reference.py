"""Reference log-probabilities: where they come from, and that TRL need not compute them again."""

import datasets
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

import bpo
from bpo import InvalidDataWarning, SelectConfig, StoreMismatchError, collect_gradients, read_candidates
from bpo.data.tokens import tokenize_candidates, tokenize_responses
from bpo.policy.logprobs import Forward, response_logps
from tiny import scored_rows, tiny_llama
from trainers import QUIET

SETTINGS = {**QUIET, "max_steps": 1, "per_device_train_batch_size": 4}
MERGING = [
    {"prompt": "one re", "chosen": "d green", "rejected": " two"},
    {"prompt": "one re", "chosen": " blue", "rejected": " two"},
]


@pytest.fixture
def reference(tokenizer):
    return tiny_llama(tokenizer, initializer_range=0.21)


@pytest.fixture
def collect(model, tokenizer):
    def run(rows, model=model, store=None, **settings):
        config = SelectConfig(**{"sketch_dim": 64, "sketch_dtype": "float32", **settings})
        return collect_gradients(model, rows, processing_class=tokenizer, store=store, config=config, progress=False)

    return run


def stated(rows):
    """Preference rows, one for each pair of scored responses."""
    dataset = bpo.select(None, rows, budget=1.0, strategy="random", progress=False).dataset
    return dataset.select_columns(["prompt", "chosen", "rejected"]).to_list()


def precomputed_by_trl(model, reference, tokenizer, rows, path):
    """Preference rows with the columns that DPOTrainer adds to its training set."""
    args = DPOConfig(str(path), precompute_ref_log_probs=True, **SETTINGS)
    dataset = datasets.Dataset.from_list(rows)
    trainer = DPOTrainer(model, ref_model=reference, args=args, train_dataset=dataset, processing_class=tokenizer)
    columns = {name: trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    return datasets.Dataset.from_dict({**{name: dataset[name][:] for name in dataset.column_names}, **columns})


def test_base_is_the_policy_without_its_adapter(tokenizer, collect):
    model = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.05)
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    rows = scored_rows(2, 3)
    own, base = collect(rows, model), collect(rows, model, ref_model="base", tokens_per_batch=60)
    np.testing.assert_allclose(own.sketches(), base.sketches(), rtol=1e-4, atol=1e-5 * np.abs(own.sketches()).max())
    plain = collect(rows, tiny_llama(tokenizer))
    np.testing.assert_allclose(base.records["ref_logp"], plain.records["logp"], rtol=1e-5)
    assert (np.abs(base.records["ref_logp"] - base.records["logp"]) > 1e-3).all()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == trainable[name] and parameter.grad is None
    assert base.fingerprint["reference"] == "the policy without its adapter"


def test_base_needs_an_adapter_and_a_path_of_that_name_a_slash(collect, model_path, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"without its adapter, but LlamaForCausalLM has none.*'\./base'"):
        collect(scored_rows(1, 2), ref_model="base")
    (tmp_path / "base").symlink_to(model_path)
    monkeypatch.chdir(tmp_path)
    store = collect(scored_rows(1, 2), ref_model=(tmp_path / "base").relative_to(tmp_path))
    assert len(store.fingerprint["reference"]) == 64


def test_columns_of_trl_mean_the_same_as_its_reference(model, tokenizer, reference, collect, tmp_path):
    rows = MERGING + stated(scored_rows(2, 3))
    given = precomputed_by_trl(tiny_llama(tokenizer), reference, tokenizer, rows, tmp_path)
    with pytest.warns(UserWarning, match="not a prefix"):
        stores = [collect(rows, ref_model=reference), collect(given, ref_model="columns")]
    np.testing.assert_array_equal(stores[0].records["response_id"], stores[1].records["response_id"])
    np.testing.assert_allclose(stores[0].records["ref_logp"], stores[1].records["ref_logp"], rtol=1e-5)
    assert stores[1].fingerprint["reference"] == "the data"


def test_scored_responses_bring_a_list(tokenizer, reference, collect):
    rows = scored_rows(3, 3)
    tokenized = tokenize_responses(read_candidates(rows), tokenizer, None)[0]
    values = response_logps(Forward(reference, tokenized, 0)).reshape(3, 3)
    for row, logps in zip(rows, values.tolist(), strict=True):
        row["ref_logps"] = logps
    stores = [collect(rows, ref_model=reference), collect(rows, ref_model="columns")]
    np.testing.assert_allclose(stores[0].records["ref_logp"], stores[1].records["ref_logp"], rtol=1e-5)


def test_what_does_not_fit_the_tokens_is_set_aside_and_named(tokenizer):
    def usable(rows):
        with pytest.warns(InvalidDataWarning) as warned:
            candidates, tokenized = tokenize_candidates(
                read_candidates(rows, ref_logps=True), tokenizer, 100, on_invalid="skip"
            )
        return candidates.pair_rows.tolist(), tokenized, "\n".join(str(warning.message) for warning in warned)

    def row(chosen, rejected, ref_chosen, ref_rejected, prompt="p?"):
        values = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **values}

    rows = [
        row(" a", " b", -10.0, -20.0),
        row(" a", " c", -10.001, -30.0),  # as another batch may round
        row(" a", " d", -11.0, -30.0),
        row(" e", " b", None, -20.0),
        row(" f", " b", -10.0, float("nan")),
        row(" a", " b", -10.0, -25.0),
    ]
    pair_rows, tokenized, message = usable(rows)
    assert pair_rows == [0, 1]
    assert tokenized.ref_logps.tolist() == [-10, -20, -30]
    assert "differs from that of the same response in an earlier row (row 2)" in message
    assert "reference log-probability missing, NaN or infinite (row 3; row 4)" in message
    assert "duplicate of an earlier pair with other token weights or reference log-probabilities (row 5)" in message

    # "re" + "d" merges: in its pair, " two" starts before the place that its one value can be of.
    scored = {"prompt": "one re", "responses": ["d green", " two", " blue"], "scores": [2, 1, 0]}
    pair_rows, tokenized, message = usable([{**scored, "ref_logps": [-1.0, -2.0, -3.0]}])
    assert tokenized.pairs.tolist() == [[0, 1]] and tokenized.ref_logps.tolist() == [-2, -3]
    assert "2 × pair that starts before the response, where ref_logps does not hold (row 0" in message
    # Preference rows give the value of each pair's own tokens.
    both = [row("d green", " two", -1.0, -2.5, "one re"), row(" blue", " two", -3.0, -2.0, "one re")]
    tokenized = tokenize_candidates(read_candidates(both, ref_logps=True), tokenizer, 100, on_invalid="raise")[1]
    assert tokenized.ref_logps[tokenized.pairs].tolist() == [[-1, -2.5], [-3, -2]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "needs the columns ref_chosen_logps, ref_rejected_logps"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}, "needs the columns ref_logps"),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0], "ref_logps": [-1.0]},
            r"column 'ref_logps': not one value a response \(row 0: 2 responses, 1 values\)",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "ref_chosen_logps": "x", "ref_rejected_logps": 0},
            r"reference log-probability is not a number \(row 0: str 'x'\)",
        ),
    ],
)
def test_missing_columns_are_named(row, expected):
    with pytest.raises(ValueError, match=expected):
        read_candidates([row], ref_logps=True)


def test_other_values_are_not_served_from_a_store(collect, tmp_path):
    rows = scored_rows(2, 3)
    for row in rows:
        row["ref_logps"] = [-1.0, -2.1, -3.0]
    collect(rows, ref_model="columns", store=tmp_path)
    assert len(collect(rows[:1], ref_model="columns", store=tmp_path)) == 6
    rows[1]["ref_logps"] = [-1.0, -2.1, -4.0]
    with pytest.raises(
        StoreMismatchError, match=r"1 of 6 responses differ, such as row \d of .* -3\.0, which is -4\.0"
    ):
        collect(rows, ref_model="columns", store=tmp_path)
    with pytest.raises(StoreMismatchError, match="another reference: the data there, the policy here"):
        collect(rows, store=tmp_path)


def run_one_step(trainer):
    return trainer.train().training_loss


def refuse(*_, **__):
    raise AssertionError("the reference ran")


def test_bpo_trainer_takes_the_reference_from_the_selection(tokenizer, reference, tmp_path):
    """One real step each: TRL's reference at every step, its precomputed one, and the one that selecting computed."""
    rows, store = scored_rows(4, 3), str(tmp_path / "store")

    def trainer(**changes):
        args = bpo.BPOConfig(str(tmp_path), budget=8, store=store, **{**SETTINGS, **changes})
        return bpo.BPOTrainer(
            tiny_llama(tokenizer), reference, args=args, train_dataset=rows, processing_class=tokenizer
        )

    first = trainer()
    dataset = first.selection.dataset
    every_step = run_one_step(first)
    args = DPOConfig(str(tmp_path), precompute_ref_log_probs=True, **SETTINGS)
    by_trl = DPOTrainer(tiny_llama(tokenizer), reference, args=args, train_dataset=dataset, processing_class=tokenizer)
    np.testing.assert_allclose(dataset["bpo_ref_logp_chosen"], by_trl.train_dataset["ref_chosen_logps"], rtol=1e-5)
    np.testing.assert_allclose(dataset["bpo_ref_logp_rejected"], by_trl.train_dataset["ref_rejected_logps"], rtol=1e-5)
    assert run_one_step(by_trl) == pytest.approx(every_step, rel=1e-5)

    reference.model.forward = refuse
    with pytest.raises(AssertionError, match="the reference ran"):
        run_one_step(trainer())
    stored = trainer(precompute_ref_log_probs=True)
    assert {"ref_chosen_logps", "bpo_ref_logp_chosen"} <= set(stored.train_dataset.column_names)
    assert run_one_step(stored) == pytest.approx(every_step, rel=1e-5)
    # A strategy without gradients has none to offer, so TRL's own runs.
    with pytest.raises(AssertionError, match="the reference ran"):
        trainer(precompute_ref_log_probs=True, strategy="random")


def test_bpo_trainer_runs_the_reference_on_tokens_that_selection_cut(tokenizer, tmp_path):
    """TRL runs beyond the positions that a model was made for; selection does not."""
    narrow = {"max_position_embeddings": 16}
    reference = tiny_llama(tokenizer, **narrow)
    args = bpo.BPOConfig(str(tmp_path), budget=8, precompute_ref_log_probs=True, **SETTINGS)
    with pytest.warns(UserWarning, match="are cut to the window of 16 tokens"):
        trainer = bpo.BPOTrainer(
            tiny_llama(tokenizer, **narrow),
            reference,
            args=args,
            train_dataset=scored_rows(4, 3),
            processing_class=tokenizer,
        )
    selected = trainer.selection.dataset["bpo_ref_logp_chosen"][:]
    assert not np.allclose(selected, trainer.train_dataset["ref_chosen_logps"][:])


def test_trl_takes_the_reference_from_the_selection_once_it_is_told(tokenizer, reference, tmp_path):
    config = SelectConfig(sketch_dim=64, ref_model=reference)
    arguments = {"budget": 8, "processing_class": tokenizer, "config": config, "progress": False}
    selection = bpo.select(tiny_llama(tokenizer), scored_rows(4, 3), **arguments)
    for name in ("ref_logp_chosen", "ref_logp_rejected"):
        assert selection.pairs[name].null_count == 0
        assert selection.pairs[name].to_pylist() != selection.pairs[name.removeprefix("ref_")].to_pylist()

    def trainer(dataset):
        args = DPOConfig(str(tmp_path), **SETTINGS)
        return DPOTrainer(
            tiny_llama(tokenizer), reference, args=args, train_dataset=dataset, processing_class=tokenizer
        )

    every_step = run_one_step(trainer(selection.dataset))
    selection.save(tmp_path / "selection")
    told = trainer(bpo.Selection.load(tmp_path / "selection").with_ref_logps())
    told.precompute_ref_logps = True
    reference.model.forward = refuse
    assert run_one_step(told) == pytest.approx(every_step, rel=1e-5)
    random = bpo.select(None, scored_rows(4, 3), budget=8, strategy="random", progress=False)
    with pytest.raises(ValueError, match="strategy='random' computes no log-probabilities"):
        random.with_ref_logps()
