"""The short training before a selection."""

import json

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import bpo
from bpo.gradients.choose import choose_features
from bpo.gradients.preconditioner import load_preconditioner
from bpo.policy.models import load_policy
from tiny import scored_rows

ROWS = scored_rows(6, 4)


def settings(**changes):
    return DPOConfig(
        "ignored",
        **{
            "num_train_epochs": 3,
            "learning_rate": 1e-3,
            "warmup_steps": 3,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        },
    )


def refuse(*_, **__):
    raise AssertionError("trained again")


def weights(checkpoint):
    return load_file(f"{checkpoint}/adapter_model.safetensors")


def test_one_checkpoint_an_epoch_with_its_learning_rate(model_path, tmp_path, monkeypatch):
    def run():
        return bpo.warm_up(model_path, ROWS, tmp_path / "warm-up", fraction=0.5, args=settings())

    checkpoints = run()
    # 18 of the 36 pairs in batches of 4 make 5 steps an epoch; the schedule rises for 3 steps, then falls to 0 at 15.
    schedule = [1e-3 * (step / 3 if step < 3 else (15 - step) / 12) for step in range(15)]
    assert [path.rpartition("-")[2] for path in checkpoints] == ["5", "10", "15"]
    np.testing.assert_allclose(list(checkpoints.values()), np.reshape(schedule, (3, 5)).mean(axis=1), rtol=1e-6)
    monkeypatch.setattr(DPOTrainer, "train", refuse)
    assert run() == checkpoints


def test_its_checkpoints_precondition_a_selection(model_path, tmp_path):
    checkpoints = bpo.warm_up(model_path, ROWS, tmp_path, fraction=1, args=settings(num_train_epochs=1))
    ((checkpoint, _),) = checkpoints.items()
    config = bpo.SelectConfig(sketch_dim=64, preconditioner="checkpoint")
    assert len(bpo.select(checkpoint, ROWS, budget=12, config=config, progress=False)) == 12
    policy = load_policy(checkpoint, config)
    features = choose_features(policy, config)
    assert {name.split(".")[-3] for name in features.slots} == {"lora_A", "lora_B"}
    assert load_preconditioner(f"{checkpoint}/optimizer.pt", policy, features).scales.min() > 0


@pytest.mark.parametrize("further", [False, True], ids=["fresh adapter", "trained adapter"])
def test_an_interrupted_warm_up_goes_on(further, model_path, tokenizer, tmp_path, monkeypatch):
    model = model_path
    if further:
        model = tmp_path / "sft"
        base = AutoModelForCausalLM.from_pretrained(model_path)
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(model)
        tokenizer.save_pretrained(model)

    def run(name):
        return bpo.warm_up(model, ROWS, tmp_path / name, fraction=0.5, args=settings())

    whole = run("whole")
    training_step, calls = DPOTrainer.training_step, []

    def interrupt(*arguments, **named):
        calls.append(1)
        if len(calls) == 8:  # of 15
            raise KeyboardInterrupt
        return training_step(*arguments, **named)

    monkeypatch.setattr(DPOTrainer, "training_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    assert "checkpoints" not in json.loads((tmp_path / "cut" / "warm_up.json").read_text())
    resumed = run("cut")
    assert len(calls) == 8 + 10  # from the checkpoint of the first epoch
    assert list(resumed.values()) == list(whole.values())
    for left, right in zip(whole, resumed, strict=True):
        left, right = weights(left), weights(right)
        assert left.keys() == right.keys()
        assert all(np.array_equal(left[name], right[name]) for name in left)


def test_other_directories_are_left_alone(model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "train", refuse)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="no empty directory and holds no warm-up"):
        bpo.warm_up(model_path, ROWS, tmp_path, args=settings())
    with pytest.raises(AssertionError, match="trained again"):
        bpo.warm_up(model_path, ROWS, tmp_path / "new", args=settings())
    for changes, expected in (
        ({"args": settings(learning_rate=1e-4)}, "another learning_rate: learning_rate is 0.001 there and 0.0001 here"),
        ({"fraction": 0.5}, "another pairs"),
        ({"peft_config": LoraConfig(r=2)}, "another peft_config"),
    ):
        with pytest.raises(ValueError, match=expected):
            bpo.warm_up(model_path, ROWS, tmp_path / "new", **{"args": settings(), **changes})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "thesis.tex"]


def test_bad_arguments_are_refused(model, model_path, tmp_path):
    with pytest.raises(TypeError, match="not a LlamaForCausalLM; save it first"):
        bpo.warm_up(model, ROWS, tmp_path)
    with pytest.raises(ValueError, match=r"fraction must be above 0 and at most 1, got 1\.5"):
        bpo.warm_up(model_path, ROWS, tmp_path, fraction=1.5)
    with pytest.raises(FileNotFoundError, match="no such model directory"):
        bpo.warm_up(tmp_path / "nowhere", ROWS, tmp_path)
    get_peft_model(model.__class__(model.config), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="is an adapter, which is trained further"):
        bpo.warm_up(tmp_path / "a", ROWS, tmp_path / "b", peft_config=LoraConfig())
