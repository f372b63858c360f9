"""DPO with a weight for each token: TIS-DPO (arXiv 2410.04350), and weights that two policies give."""

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

import bpo
from bpo.data.read import read_candidates
from bpo.data.tokens import tokenize_responses
from tiny import scored_rows, tiny_llama
from trainers import SHORT, gradients, trainer_of


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """Six pairs with weights of their tokens, some negative, some zero."""
    rows = bpo.select(None, scored_rows(3, 3), budget=6, strategy="random", progress=False).dataset
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    tokenized = tokenize_responses(read_candidates(rows), tokenizer, None)[0]
    generator = np.random.default_rng(0)
    for name, sides in zip(("w_chosen", "w_rejected"), tokenized.pairs.T, strict=True):
        lengths = tokenized.response_lengths[sides]
        weights = [np.where(np.arange(n) % 4, generator.normal(size=n), 0).tolist() for n in lengths]
        rows = rows.add_column(name, weights)
    return rows


def weighted_logp(model, prompt_ids, ids, weights):
    """Σ w_t log π(y_t | x, y_<t), written out."""
    logps = torch.log_softmax(model(torch.tensor([prompt_ids + ids])).logits[0], dim=-1)
    return sum(w * logps[len(prompt_ids) + t - 1, token] for t, (token, w) in enumerate(zip(ids, weights, strict=True)))


def reference_losses(trainer, examples, beta, name="w"):
    """The DPO losses of weighted sums, written out."""
    losses = []
    for row in examples:
        ratios = []
        for side in ("chosen", "rejected"):
            given = row["prompt_ids"], row[f"{side}_ids"], row[f"{name}_{side}"]
            ratios.append(weighted_logp(trainer.model, *given) - weighted_logp(trainer.ref_model, *given).detach())
        losses.append(-F.logsigmoid(beta * (ratios[0] - ratios[1])))
    return torch.stack(losses)


@pytest.mark.parametrize("pair_weights", [None, [0.5, 0.0, 3.0]], ids=["tokens alone", "pairs, too"])
def test_the_loss_is_tis_dpos_and_so_is_its_gradient(pair_weights, pairs, tokenizer, tmp_path):
    trainer = trainer_of(bpo.WeightedDPOTrainer, pairs, tokenizer, tmp_path, token_weights="w", beta=0.3)
    examples = list(trainer.train_dataset)[:3]
    losses = reference_losses(trainer, examples, 0.3)
    if pair_weights is not None:
        examples = [{**row, "weight": weight} for row, weight in zip(examples, pair_weights, strict=True)]
        losses = losses * torch.tensor(pair_weights)
    trainer.model.zero_grad()
    losses.mean().backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
    value, gradient = gradients(trainer, examples)
    assert value == pytest.approx(losses.mean().item(), rel=1e-5)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_weights_are_cut_with_their_tokens(truncation_mode, pairs, tokenizer, tmp_path):
    settings = {"token_weights": "w", "beta": 0.3, "truncation_mode": truncation_mode}
    whole = trainer_of(bpo.WeightedDPOTrainer, pairs, tokenizer, tmp_path, **settings)
    row = max(whole.train_dataset, key=lambda row: len(row["chosen_ids"]))
    length = len(row["prompt_ids"]) + len(row["chosen_ids"]) - 2
    if truncation_mode == "keep_end":  # into the response, so that both are of one length
        row = {**row, "rejected_ids": row["chosen_ids"], "w_rejected": [-w for w in row["w_chosen"]]}
        length = len(row["chosen_ids"]) - 2
    trainer = trainer_of(bpo.WeightedDPOTrainer, pairs, tokenizer, tmp_path, max_length=length, **settings)
    cut = dict(row)
    for column in ("chosen_ids", "rejected_ids", "w_chosen", "w_rejected"):
        if truncation_mode == "keep_start":
            cut[column] = row[column][: length - len(row["prompt_ids"])]
        else:  # nothing predicts the first that is left
            cut[column] = row[column][3:]
            cut["prompt_ids"] = row["chosen_ids"][2:3]
    value = trainer.compute_loss(trainer.model, trainer.data_collator([row])).item()
    assert value == pytest.approx(reference_losses(trainer, [cut], 0.3).item(), rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True], ids=["reference runs", "reference known"])
@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
def test_weights_of_one_train_as_trl_bit_for_bit(adapter, precompute, pairs, tokenizer, tmp_path):
    from peft import LoraConfig

    trained = []
    for kind, name in ((DPOTrainer, None), (bpo.WeightedDPOTrainer, "ones"), (bpo.WeightedDPOTrainer, "w")):
        rows = pairs.add_column("ones_chosen", [[1.0] * len(w) for w in pairs["w_chosen"]])
        rows = rows.add_column("ones_rejected", [[1.0] * len(w) for w in pairs["w_rejected"]])
        trainer = trainer_of(
            kind,
            rows,
            tokenizer,
            tmp_path,
            peft_config=LoraConfig(r=2, target_modules="all-linear") if adapter else None,
            precompute_ref_log_probs=precompute,
            **({} if name is None else {"token_weights": name}),
        )
        trainer.train()
        trained.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert torch.equal(trained[0], trained[1]) and not torch.equal(trained[0], trained[2])


def test_a_reference_that_is_known_is_weighted_anew_for_other_weights(pairs, tokenizer, tmp_path):
    rows = pairs.add_column("ones_chosen", [[1.0] * len(w) for w in pairs["w_chosen"]])
    rows = rows.add_column("ones_rejected", [[1.0] * len(w) for w in pairs["w_rejected"]])
    prepared = trainer_of(bpo.WeightedDPOTrainer, rows, tokenizer, tmp_path, token_weights="ones").train_dataset
    prepared.save_to_disk(tmp_path / "rows")
    prepared = datasets.load_from_disk(tmp_path / "rows")  # of files TRL keeps log π_ref
    for name in ("ones", "w"):
        settings = {"token_weights": name, "precompute_ref_log_probs": True, "max_length": None}
        trainer = trainer_of(bpo.WeightedDPOTrainer, prepared, tokenizer, tmp_path, **settings)
        row = trainer.train_dataset[0]
        found = weighted_logp(trainer.ref_model, row["prompt_ids"], row["chosen_ids"], row[f"{name}_chosen"])
        assert row["ref_chosen_logps"] == pytest.approx(found.item(), rel=1e-5)


def test_wpos_weights_are_those_of_the_tokens_as_they_are(pairs, tokenizer, tmp_path):
    settings = {"use_weighting": True, "loss_type": ["sigmoid"]}
    trainer = trainer_of(bpo.WeightedDPOTrainer, pairs, tokenizer, tmp_path, token_weights="w", beta=0.3, **settings)
    row = trainer.train_dataset[0]
    agreements = []
    for side in ("chosen", "rejected"):
        logps = torch.log_softmax(trainer.model(torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])).logits[0], -1)
        start = len(row["prompt_ids"])
        own = logps[start - 1 : -1]
        chosen = own.gather(1, torch.tensor(row[f"{side}_ids"])[:, None])[:, 0]
        agreements.append((chosen - (2 * own).logsumexp(dim=1)).mean())
    expected = reference_losses(trainer, [row], 0.3)[0] * torch.exp(sum(agreements))
    assert gradients(trainer, [row])[0] == pytest.approx(expected.item(), rel=1e-4)


def test_training_weighs_as_selection_does(pairs, tokenizer, tmp_path):
    args = bpo.BPOConfig(
        str(tmp_path / "out"),
        budget=4,
        token_weights="w",
        precompute_ref_log_probs=True,
        select_config={"sketch_dim": 64},
        **SHORT,
    )
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = bpo.BPOTrainer(str(tmp_path / "model"), args=args, train_dataset=pairs, eval_dataset=pairs)
    assert trainer.selection.config["token_weights"] == "w"
    row = trainer.train_dataset[0]
    expected = weighted_logp(trainer.model, row["prompt_ids"], row["chosen_ids"], row["w_chosen"]).item()
    assert row["ref_chosen_logps"] == pytest.approx(expected, rel=1e-4) and row["bpo_logp_chosen"] == pytest.approx(
        expected, rel=1e-4
    )
    assert np.isfinite(trainer.evaluate(scored_rows(2, 3))["eval_loss"])  # without weights
    scored = [{"prompt": "red?", "responses": [" one", " two"], "scores": [1, 0], "w": [[0.5, 1.0], [1.0, -1.0]]}]
    batches = [
        trainer.data_collator([row])
        for row in trainer._prepare_dataset(trainer._pairs_to_evaluate(scored), tokenizer, args, "test")
    ]
    assert batches[0]["token_weights"][:, -2:].tolist() == [[0.5, 1.0], [1.0, -1.0]]
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_what_cannot_be_weighted_is_refused(pairs, tokenizer, tmp_path):
    def refused(rows, match, **settings):
        with pytest.raises(ValueError, match=match):
            trainer_of(bpo.WeightedDPOTrainer, rows, tokenizer, tmp_path, **{"token_weights": "w", **settings})

    refused(pairs.remove_columns("w_rejected"), "'w_rejected' is missing")
    refused(pairs, "needs the columns v_chosen and v_rejected", token_weights="v")
    rows = pairs.to_list()
    rows[2]["w_chosen"][1] = float("nan")
    refused(datasets.Dataset.from_list(rows), "train_dataset, row 2, column 'w_chosen': token weights must be finite")
    rows = pairs.to_list()
    rows[3]["w_rejected"].append(1.0)
    refused(datasets.Dataset.from_list(rows), r"row 3 of those .* token weights for \d+ tokens; .*'<\|im_end\|>'\.")
    refused(pairs.add_column("ref_chosen_logps", [0.0] * 6), "remove the columns ref_chosen_logps")
    args = bpo.BPOConfig(str(tmp_path), budget=4, select_config={"token_weights": len}, **SHORT)
    with pytest.raises(ValueError, match="has a function for token_weights"):
        bpo.BPOTrainer("nowhere", args=args, train_dataset=pairs, ref_model=tiny_llama(tokenizer))


@pytest.fixture(scope="module")
def policies(tokenizer, tmp_path_factory):
    """Two policies that disagree, by path."""
    place = tmp_path_factory.mktemp("policies")
    for name, changes in (("plus", {}), ("minus", {"initializer_range": 0.6})):
        tiny_llama(tokenizer, **changes).save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


@pytest.mark.parametrize("rule", ["tis_dpo", "rto"])
@pytest.mark.parametrize("data", ["pairs", "scored"])
def test_estimated_weights_are_those_of_the_formula(rule, data, policies, tokenizer):
    rows = scored_rows(2, 3)
    if data == "pairs":
        rows = [
            {"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][1], "mine": 7} for r in rows
        ]
    weighted = bpo.estimate_token_weights(
        rows, str(policies / "plus"), str(policies / "minus"), rule=rule, name="w", progress=False
    )
    assert len(weighted) == (2 if data == "pairs" else 6)
    assert ("mine" in weighted.column_names) == (data == "pairs")
    assert not [name for name in weighted.column_names if name.startswith("bpo_")]
    models = [AutoModelForCausalLM.from_pretrained(policies / name) for name in ("plus", "minus")]
    clamped = False
    for row in weighted:
        prompt = tokenizer(row["prompt"])["input_ids"]
        for side, sign in (("chosen", 1), ("rejected", -1)):
            ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"][len(prompt) :]
            for place, (token, weight) in enumerate(zip(ids, row[f"w_{side}"], strict=True)):
                context = torch.tensor([prompt + ids[:place]])
                with torch.no_grad():
                    plus, minus = (
                        torch.log_softmax(model(context).logits[0, -1], -1)[token].item() for model in models
                    )
                if rule == "tis_dpo":
                    expected = np.exp(sign * min(max(plus - minus, -0.5), 1.5))
                else:
                    expected = sign * min(max(0.05 * (plus - minus), -0.05), 0.05)
                clamped |= abs(plus - minus) > 1.5
                assert weight == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert clamped
    kept = bpo.select(None, weighted, budget=2, strategy="random", config={"token_weights": "w"}, progress=False)
    assert all(row["w_chosen"] in weighted["w_chosen"] for row in kept.dataset)


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_tokens_beyond_the_window_count_as_if_nothing_were_known(truncation_mode, policies):
    rows = [{"prompt": "red cat?", "chosen": " blue dog star tea milk", "rejected": " one"}]
    arguments = rows, str(policies / "plus"), str(policies / "minus")
    settings = {"progress": False, "scale": 2.0, "bounds": (-30.0, 30.0)}
    window = {"max_length": 4 if truncation_mode == "keep_end" else 6, "truncation_mode": truncation_mode}
    cut = bpo.estimate_token_weights(*arguments, **settings, config=window)[0]["token_weights_chosen"]
    whole = bpo.estimate_token_weights(*arguments, **settings)[0]["token_weights_chosen"]
    assert len(cut) == len(whole)
    same = np.isclose(cut, whole, rtol=1e-5)
    unknown = np.array(cut) == 2.0
    assert unknown.any() and same.any() == (truncation_mode == "keep_start") and (same | unknown).any()
    if truncation_mode == "keep_start":
        assert (same ^ unknown).all() and not unknown[0] and unknown[-1]
    else:
        assert unknown[:3].all() and not unknown[3:].any()


def test_an_adapter_against_its_base(policies, tokenizer):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(policies / "plus")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    rows = scored_rows(1, 2)
    settings = {"processing_class": tokenizer, "rule": "rto", "scale": 1.0, "bounds": (-9.0, 9.0), "progress": False}
    found = bpo.estimate_token_weights(rows, adapted, "base", **settings)[0]
    other = bpo.estimate_token_weights(rows, adapted, str(policies / "plus"), **settings)[0]
    np.testing.assert_allclose(found["token_weights_chosen"], other["token_weights_chosen"], atol=1e-5)
    assert np.abs(found["token_weights_chosen"]).max() > 0.01
    with pytest.raises(ValueError, match="without its adapter, but it has none"):
        bpo.estimate_token_weights(rows, str(policies / "plus"), "base", progress=False)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rule": "dpo"}, "rule must be one of 'tis_dpo', 'rto', got 'dpo'"),
        ({"scale": 0}, "scale must be a finite number above 0"),
        ({"bounds": (1.0, -1.0)}, "bounds must be two finite numbers, the lower one first"),
        ({"name": "mine"}, "The data has a column 'mine_chosen' already"),
    ],
)
def test_what_cannot_be_estimated_is_refused(settings, match):
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b", "mine_chosen": 1}]
    with pytest.raises(ValueError, match=match):
        bpo.estimate_token_weights(rows, "nowhere", "nowhere", **settings)
