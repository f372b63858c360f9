"""DPO with a weight for each pair."""

import functools
import math

import datasets
import numpy as np
import pytest
import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOTrainer

import bpo
from bpo.choices import LossType
from bpo.config import SelectConfig
from tiny import scored_rows, tiny_llama
from trainers import SHORT, gradients, trainer_of, weights_of

LOSSES = {
    **{name: {"loss_type": [name]} for name in LossType.__args__},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "f-divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "ld_alpha": {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5},
    "WPO": {"use_weighting": True},
}


@pytest.fixture(scope="module")
def pairs():
    """Eight pairs of differing length."""
    rows = bpo.select(None, scored_rows(4, 3), budget=8, strategy="random", progress=False).dataset
    return rows.select_columns(["prompt", "chosen", "rejected"])


def weighted(pairs, weights):
    return pairs.add_column("weight", [float(weight) for weight in weights])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_weighted_and_is_trls_for_weights_of_one(loss, pairs, tokenizer, tmp_path):
    trls = trainer_of(DPOTrainer, pairs, tokenizer, tmp_path, **LOSSES[loss])
    rows = list(trls.train_dataset)[:3]
    whole = gradients(trls, rows)
    alone = [gradients(trls, [row]) for row in rows]
    ours = trainer_of(bpo.WeightedDPOTrainer, pairs, tokenizer, tmp_path, **LOSSES[loss])

    ones = gradients(ours, [{**row, "weight": 1.0} for row in rows])
    assert ones[0] == whole[0] and torch.equal(ones[1], whole[1])

    weights = np.array([0.0, 0.5, 3.0])
    value, gradient = gradients(ours, [{**row, "weight": weight} for row, weight in zip(rows, weights, strict=True)])
    if loss == "sft":  # averaged over the tokens of the batch
        tokens = np.array([len(row["chosen_ids"]) for row in rows])
        weights = weights * tokens / tokens.mean()
    if loss not in ("mixture", "ld_alpha"):
        assert value == pytest.approx(sum(w * one[0] for w, one in zip(weights, alone, strict=True)) / 3, rel=1e-4)
        expected = sum(w * one[1] for w, one in zip(weights, alone, strict=True)) / 3
        assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())
    if loss == "WPO":  # whose own weights are constants to the gradient
        return
    # Whatever the losses, the value is one that has this gradient.
    place, moved = weights_of(ours), []
    batch = [{**row, "weight": weight} for row, weight in zip(rows, [0.0, 0.5, 3.0], strict=True)]
    for step in (5e-3, -5e-3):
        torch.nn.utils.vector_to_parameters(place + step * gradient / gradient.norm(), ours.model.parameters())
        moved.append(ours.compute_loss(ours.model, ours.data_collator(batch)).item())
    assert (moved[0] - moved[1]) / 1e-2 == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("adapter", [False, True], ids=["model", "adapter"])
@pytest.mark.parametrize("precompute", [False, True], ids=["reference runs", "reference known"])
def test_weights_of_one_train_as_trl_bit_for_bit(adapter, precompute, pairs, tokenizer, tmp_path):
    from peft import LoraConfig

    trained = []
    for kind, rows in ((DPOTrainer, pairs), (bpo.WeightedDPOTrainer, weighted(pairs, [1] * 8))):
        peft_config = LoraConfig(r=2, target_modules="all-linear") if adapter else None
        trainer = trainer_of(
            kind,
            rows,
            tokenizer,
            tmp_path,
            peft_config=peft_config,
            eval_dataset=rows.select(range(3)),
            precompute_ref_log_probs=precompute,
            per_device_train_batch_size=3,  # the last batch is smaller
        )
        trainer.train()
        log = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained.append((weights_of(trainer), log, trainer.evaluate()["eval_loss"]))
    assert torch.equal(trained[0][0], trained[1][0])
    assert trained[0][1:] == trained[1][1:]


def one_step(rows, tokenizer, tmp_path, **settings):
    sgd = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "lr_scheduler_type": "constant"}
    trainer = trainer_of(
        bpo.WeightedDPOTrainer, rows, tokenizer, tmp_path, train_sampling_strategy="sequential", **{**sgd, **settings}
    )
    before = weights_of(trainer)
    trainer.train()
    return weights_of(trainer) - before


def test_a_weight_of_two_is_the_pair_twice(pairs, tokenizer, tmp_path):
    twice = one_step(
        pairs.select([0, 0, 1]),
        tokenizer,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=3,
        learning_rate=3e-2,
    )
    weighing = one_step(
        weighted(pairs.select([0, 1]), [2, 1]),
        tokenizer,
        tmp_path,
        gradient_accumulation_steps=1,
        learning_rate=2e-2,
    )
    assert torch.allclose(twice, weighing, rtol=1e-3, atol=1e-6) and twice.abs().max() > 1e-3


def test_a_weight_of_zero_is_no_pair_however_a_step_is_cut(pairs, tokenizer, tmp_path):
    without = one_step(pairs.select([0, 2]), tokenizer, tmp_path, gradient_accumulation_steps=1, learning_rate=2e-2)
    rows = weighted(pairs.select(range(4)), [1, 0, 1, 0])
    for size, accumulation in ((1, 4), (2, 2), (4, 1)):
        cut = one_step(
            rows,
            tokenizer,
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            learning_rate=4e-2,
        )
        assert torch.allclose(without, cut, rtol=1e-3, atol=1e-6) and cut.abs().max() > 1e-3


def test_evaluation_weighs_the_loss(pairs, tokenizer, tmp_path):
    weights = [0.0, 2.0, 1.0, 0.5, 0.0, 3.0, 1.0, 1.0]
    trainer = trainer_of(
        bpo.WeightedDPOTrainer,
        pairs,
        tokenizer,
        tmp_path,
        eval_dataset={"plain": pairs, "weighted": weighted(pairs, weights)},
        per_device_eval_batch_size=1,
    )
    rows = list(trainer.eval_dataset["plain"])
    with torch.no_grad():
        losses = [trainer.compute_loss(trainer.model, trainer.data_collator([row])).item() for row in rows]
    measured = trainer.evaluate()
    assert measured["eval_plain_loss"] == pytest.approx(np.mean(losses))
    assert measured["eval_weighted_loss"] == pytest.approx(np.dot(weights, losses) / 8)
    plain, ours = (entry["eval_rewards/margins"] for entry in trainer.state.log_history)
    assert plain == ours


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_a_bad_weight_is_named(bad, pairs, tokenizer, tmp_path):
    rows = weighted(pairs, [1, 1, bad, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="train_dataset, row 2, column 'weight': the weight of a pair must be"):
        trainer_of(bpo.WeightedDPOTrainer, rows, tokenizer, tmp_path)
    with pytest.warns(
        bpo.InvalidDataWarning, match=r"column 'weight': the weight of a pair must be a finite number .* \(row 2: "
    ):
        selection = bpo.select(None, rows, budget=1.0, strategy="random", progress=False)
    assert sorted(selection.dataset["bpo_row"]) == [0, 1, 3, 4, 5, 6, 7]


def test_what_cannot_be_weighted_is_refused(pairs, tokenizer, tmp_path):
    rows = weighted(pairs, range(8))
    with pytest.raises(ValueError, match="'aot' cannot be weighted: it sorts"):
        trainer_of(bpo.WeightedDPOTrainer, rows, tokenizer, tmp_path, loss_type=["aot"])
    with pytest.raises(ValueError, match="all weights are 0"):
        trainer_of(bpo.WeightedDPOTrainer, weighted(pairs, [0] * 8), tokenizer, tmp_path)
    text = pairs.add_column("weight", ["heavy"] * 8)
    with pytest.raises(ValueError, match=r"str 'heavy'\. If the column means something else, set weight_column"):
        trainer_of(bpo.WeightedDPOTrainer, text, tokenizer, tmp_path)
    args = bpo.WeightedDPOConfig(output_dir=str(tmp_path), weight_column="confidence", **SHORT)
    with pytest.raises(ValueError, match="weight_column='confidence' is not a column of train_dataset"):
        bpo.WeightedDPOTrainer(tiny_llama(tokenizer), args=args, train_dataset=pairs, processing_class=tokenizer)
    with pytest.raises(ValueError, match="weight_column='confidence' needs the columns confidence"):
        bpo.select(None, rows, budget=2, strategy="random", config={"weight_column": "confidence"}, progress=False)


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="there TRL's default holds")
def test_without_a_gpu_it_trains_in_float32_unless_told_otherwise(tmp_path):
    for kind, settings in ((bpo.WeightedDPOConfig, {}), (bpo.BPOConfig, {"budget": 2})):
        kind = functools.partial(kind, str(tmp_path), **settings)
        assert kind().bf16 is False
        assert kind(use_cpu=True).bf16 is True  # TRL's default on a processor that was asked for
        with pytest.raises(ValueError, match="doesn't support bf16"):
            kind(bf16=True)


def select(model, rows, tokenizer, **settings):
    config = SelectConfig(sketch_dim=64, sketch_dtype="float32", n_clusters=3, **settings)
    return bpo.select(model, rows, budget=10, config=config, processing_class=tokenizer, progress=False)


def test_a_weight_stays_with_its_pair_and_scales_its_gradient(model, tokenizer):
    rows = bpo.select(None, scored_rows(5, 3), budget=1.0, strategy="random", progress=False).dataset
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    weights = np.random.default_rng(0).uniform(0.1, 4, len(rows))
    plain, ours = select(model, rows, tokenizer), select(model, weighted(rows, weights), tokenizer)
    assert plain.pairs["row"] == ours.pairs["row"]
    lengths = [np.array(selection.pairs["informativeness"]) for selection in (plain, ours)]
    assert np.allclose(lengths[1], lengths[0] * weights[np.array(ours.pairs["row"])], rtol=1e-5)
    assert plain.pairs["cluster"] == ours.pairs["cluster"]
    assert ours.dataset["weight"][:] == [weights[row] for row in ours.dataset["bpo_row"]]
    assert "weight" not in plain.dataset.column_names
    ignored = select(model, weighted(rows, weights), tokenizer, weight_column=None)
    assert ignored.pairs == plain.pairs and "weight" not in ignored.dataset.column_names


def test_pairs_of_weight_zero_and_scored_rows(tmp_path):
    rows = [{**row, "importance": float(index)} for index, row in enumerate(scored_rows(3, 3))]
    config = {"weight_column": "importance"}
    with pytest.warns(bpo.InvalidDataWarning, match="3 × pair of weight 0"):
        selection = bpo.select(None, rows, budget=1.0, strategy="random", config=config, progress=False)
    assert sorted(selection.dataset["importance"]) == [1.0] * 3 + [2.0] * 3
    selection.save(tmp_path / "selection")
    assert bpo.Selection.load(tmp_path / "selection").dataset["importance"] == selection.dataset["importance"]
    stated = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.warns(bpo.InvalidDataWarning, match="duplicate of an earlier pair with another weight"):
        twice = bpo.read_candidates([{**stated, "weight": 1}, {**stated, "weight": 2}], weight_column="weight")
    assert twice.weights.tolist() == [1.0]


def test_bpo_trainer_trains_with_weights(model_path, tmp_path):
    rows = [{**row, "weight": 1.0 + index} for index, row in enumerate(scored_rows(4, 3))]
    args = bpo.BPOConfig(output_dir=str(tmp_path), budget=8, select_config={"sketch_dim": 64}, **SHORT)
    trainer = bpo.BPOTrainer(model_path, args=args, train_dataset=rows, eval_dataset=rows)
    assert set(trainer.train_dataset["weight"]) == set(trainer.eval_dataset["weight"]) == {1.0, 2.0, 3.0, 4.0}
    first = next(iter(trainer.get_train_dataloader()))
    assert first["pair_weight"].shape == (2,)
    assert trainer.train().training_loss > 0.7 * 2  # log 2 for each pair, times weights of 2.5 on average


def test_streamed_rows_are_checked_as_they_come(pairs, tokenizer, tmp_path):
    rows = datasets.Dataset.from_list(weighted(pairs, [1, 1, 1, 1, 1, 1, 1, -2]).to_list()).to_iterable_dataset()
    trainer = trainer_of(bpo.WeightedDPOTrainer, rows, tokenizer, tmp_path)
    with pytest.raises(
        ValueError, match=r"column 'weight': the weight of a pair must be a finite number .*: float -2\.0"
    ):
        trainer.train()
