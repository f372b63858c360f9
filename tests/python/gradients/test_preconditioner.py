"""Gradients divided by Adam's √v̂ + ε, against autograd and the live optimizer of a real training with TRL."""

import warnings

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import bpo
from bpo import SelectConfig, StoreMismatchError, _core, collect_gradients, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.gradients.preconditioner import load_preconditioner
from bpo.policy.logprobs import completion_logps
from bpo.policy.models import load_policy
from bpo.policy.state import inference_state
from tiny import scored_rows, tiny_llama

ROWS = scored_rows(2, 3)
LORA = LoraConfig(r=4, target_modules="all-linear")


def train(model, tokenizer, output, peft_config=None, optimizer=None, **arguments):
    """Three steps of DPO. Returns the checkpoint and what its optimizer holds: {name: √v̂ + ε}."""
    settings = DPOConfig(
        output_dir=str(output),
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
        learning_rate=1e-2,
        weight_decay=0.01,
        per_device_train_batch_size=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    dataset = bpo.select(None, scored_rows(6, 4), budget=1.0, strategy="random", progress=False).dataset
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        optimizers=(optimizer, None),
    )
    trainer.train()
    denominators = {}
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state.get(parameter)
        if state and "exp_avg_sq" in state:
            v_hat = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
            denominators[name] = torch.where(v_hat == 0, torch.inf, v_hat.sqrt() + 1e-8)
    return str(output / "checkpoint-3"), denominators


@pytest.fixture(scope="module")
def lora(model_path, tokenizer, tmp_path_factory):
    return train(model_path, tokenizer, tmp_path_factory.mktemp("lora"), LORA)


@pytest.fixture(scope="module")
def continued(model_path, tokenizer, tmp_path_factory):
    """An adapter trained further, beside the copy of it that TRL adds as the reference, with trained norms."""
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["norm"])
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), config)
    wrapped.save_pretrained(tmp_path_factory.mktemp("sft") / "adapter")
    return train(wrapped, tokenizer, tmp_path_factory.mktemp("continued"))


@pytest.fixture(scope="module")
def full(tokenizer, tmp_path_factory):
    """Full fine-tuning of a model whose biases and norms, without weight decay, form the second group.

    Not GPT-2: the gradient of a key's bias is zero in theory, so its quotient by √v̂ would be one of rounding errors.
    """
    path = tmp_path_factory.mktemp("biased") / "model"
    tiny_llama(tokenizer, mlp_bias=True).save_pretrained(path)
    return train(str(path), tokenizer, tmp_path_factory.mktemp("full"))


@pytest.mark.parametrize("kind", ["lora", "continued", "full"])
def test_rows_are_sketches_of_preconditioned_autograd_gradients(kind, tokenizer, request):
    checkpoint, denominators = request.getfixturevalue(kind)
    config = SelectConfig(
        features="full" if kind == "full" else "lora",
        preconditioner="checkpoint",
        sketch_dim=256,
        sketch_dtype="float32",
        dtype="float32",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*had no gradient in training")
        store = collect_gradients(checkpoint, ROWS, processing_class=tokenizer, config=config, progress=False)

    model = load_policy(checkpoint, config)
    names = list(choose_features(model, config).slots)
    parameters = [model.get_parameter(name).requires_grad_(True) for name in names]
    candidates = read_candidates(ROWS)
    tokenized = tokenize_responses(candidates, tokenizer, 256)[0]
    for row, place in enumerate(store.rows_of(candidates.response_ids)):
        logp = completion_logps(model, tokenized, np.array([row]), 0).logps.sum()
        gradients = torch.autograd.grad(logp, parameters)
        exact = torch.cat([(g / denominators[name]).flatten() for name, g in zip(names, gradients, strict=True)])
        expected = _core.Sketcher(256).sketch(exact[None].numpy())[0]
        assert np.linalg.norm(store.sketches()[place] - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_trained_adapter_has_state_for_a_and_b(lora, tokenizer):
    checkpoint, denominators = lora
    model = load_policy(checkpoint, SelectConfig())
    features = choose_features(model, SelectConfig())
    assert set(features.slots) == set(denominators)
    scales = load_preconditioner(f"{checkpoint}/optimizer.pt", model, features).scales
    for name, slot in features.slots.items():
        np.testing.assert_allclose(
            scales[slot.offset : slot.offset + slot.size], 1 / denominators[name].flatten(), rtol=1e-6
        )


def test_names_saved_by_the_optimizer_are_preferred_to_their_order(model_path, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    named = list(model.named_parameters())[::-1]
    optimizer = torch.optim.AdamW([{"params": named[:4]}, {"params": named[4:9]}, {"params": named[9:]}], lr=1e-3)
    checkpoint, denominators = train(model, tokenizer, tmp_path, optimizer=optimizer)
    loaded = load_policy(checkpoint, SelectConfig())
    features = choose_features(loaded, SelectConfig(features="full"))
    with pytest.warns(UserWarning, match=r"had no gradient in training \(v̂ = 0\)"):  # tokens that did not occur
        scales = load_preconditioner(f"{checkpoint}/optimizer.pt", loaded, features).scales
    expected = torch.cat([1 / denominators[name].flatten() for name in features.slots])
    np.testing.assert_allclose(scales, expected, rtol=1e-6)


def test_second_moments_by_name_equal_those_of_the_optimizer(lora, tmp_path):
    checkpoint, denominators = lora
    path = tmp_path / "moments.safetensors"
    v_hat = {name: (value - 1e-8).clamp(min=0).square() for name, value in denominators.items()}
    save_file(v_hat, path, metadata={"eps": "1e-08"})
    model = load_policy(checkpoint, SelectConfig())
    features = choose_features(model, SelectConfig())
    left, right = (
        load_preconditioner(str(file), model, features).scales for file in (path, f"{checkpoint}/optimizer.pt")
    )
    np.testing.assert_allclose(left, right, rtol=1e-4)
    first = next(iter(v_hat))
    for changed, expected in (
        ({name: value for name, value in v_hat.items() if name != first}, f"no state for 1 of the 28.*{first}"),
        ({**v_hat, first: torch.zeros(2, 2)}, rf"{first} have shape \(2, 2\), the parameter \(4, 32\)"),
        ({**v_hat, first: -torch.ones(4, 32)}, f"second moments of {first} are not all finite and at least 0"),
    ):
        save_file(changed, path)
        with pytest.raises(ValueError, match=f"(?s){expected}"):
            load_preconditioner(str(path), model, features)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        load_preconditioner(str(path), model, features)


def test_a_store_knows_its_preconditioner(lora, tokenizer, tmp_path):
    arguments = {"processing_class": tokenizer, "progress": False, "store": tmp_path / "store"}
    plain = SelectConfig(sketch_dim=64)
    preconditioned = SelectConfig(sketch_dim=64, preconditioner="checkpoint")
    first = collect_gradients(lora[0], ROWS, config=preconditioned, **arguments)
    again = collect_gradients(
        lora[0], ROWS, config=SelectConfig(sketch_dim=64, preconditioner=f"{lora[0]}/optimizer.pt"), **arguments
    )
    np.testing.assert_array_equal(first.sketches(), again.sketches())
    with pytest.raises(StoreMismatchError, match=r"made with another preconditioner: .*… there, None here"):
        collect_gradients(lora[0], ROWS, config=plain, **arguments)


def test_select_preconditions_and_says_what_it_cannot(lora, tokenizer, model_path):
    def select(model, **settings):
        config = SelectConfig(sketch_dim=64, **settings)
        return bpo.select(model, ROWS, budget=4, processing_class=tokenizer, config=config, progress=False)

    plain = select(lora[0])
    scaled = select(lora[0], preconditioner="checkpoint")
    assert np.nanmean(scaled.pairs["informativeness"]) > 10 * np.nanmean(plain.pairs["informativeness"])
    with pytest.raises(ValueError, match=r"a fresh adapter has none\. Run bpo\.warm_up"):
        select(model_path, preconditioner=lora[0])
    with pytest.raises(FileNotFoundError, match=r"tiny-llama/optimizer\.pt: no such file"):
        select(model_path, preconditioner="checkpoint")
    with pytest.raises(ValueError, match="but this is a PeftModel"):
        select(AutoPeftModelForCausalLM.from_pretrained(lora[0]), preconditioner="checkpoint")
    with pytest.raises(ValueError, match="preconditioner must be text or None"):
        SelectConfig(preconditioner=3)


def test_another_model_is_refused(lora, full, tokenizer, model_path):
    def load(model, path, **settings):
        return load_preconditioner(f"{path}/optimizer.pt", model, choose_features(model, SelectConfig(**settings)))

    wider = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=8, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.default\.weight have shape \(4, 32\), the parameter \(8"):
        load(wider, lora[0])
    fewer = get_peft_model(tiny_llama(tokenizer), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"trained 28 \+ 0 parameters, but the model has 4 to train"):
        load(fewer, lora[0])
    with pytest.raises(ValueError, match="no state for 21 of the 49 differentiated parameters"):
        load(load_policy(lora[0], SelectConfig()), lora[0], features="full")
    with pytest.raises(ValueError, match=r"trained \d+ \+ \d+ parameters, but the model has 21"):
        load(tiny_llama(tokenizer), full[0], features="full")


@pytest.mark.parametrize(
    ("optim", "expected"),
    [("adafactor", "is that of Adafactor .*exp_avg_sq_row"), ("sgd", "no state for 21 of the 21 .*such as SGD")],
)
def test_other_optimizers_are_named(optim, expected, model_path, tokenizer, tmp_path):
    checkpoint, _ = train(model_path, tokenizer, tmp_path, optim=optim)
    config = SelectConfig(features="full", preconditioner="checkpoint")
    with pytest.raises(ValueError, match=f"(?s){expected}.*adamw_torch"):
        collect_gradients(checkpoint, ROWS, processing_class=tokenizer, config=config, progress=False)


class SophiaG(torch.optim.Optimizer):
    """The step of arXiv 2305.14342 as its authors' code has it, and its state; h from the gradients themselves."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95), "rho": 0.04})
        self.moved = {}

    @torch.no_grad()
    def step(self, closure=None, bs=5120):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), hessian=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["hessian"].lerp_(p.grad.square() * 3e-4, 0.05)
                ratio = (state["exp_avg"].abs() / (group["rho"] * bs * state["hessian"] + 1e-15)).clamp(max=1)
                self.moved[p] = state["exp_avg"].sign() * ratio
                p.add_(self.moved[p], alpha=-group["lr"])


def test_sophias_factors_make_its_step_of_the_momentum(model_path, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    optimizer = SophiaG([{"params": list(model.named_parameters())}], 1e-3)
    checkpoint, _ = train(model, tokenizer, tmp_path, optimizer=optimizer)
    loaded = load_policy(checkpoint, SelectConfig())
    features = choose_features(loaded, SelectConfig(features="full"))
    with pytest.warns(UserWarning, match="had no gradient in training"):
        preconditioner = load_preconditioner(f"{checkpoint}/optimizer.pt", loaded, features)
    parameters = dict(model.named_parameters())
    clipped = []
    for name, slot in features.slots.items():
        momentum = optimizer.state[parameters[name]]["exp_avg"].flatten()[None]
        step = preconditioner(slot.offset, momentum)[0]
        clipped += (step.abs() == 1).tolist()
        torch.testing.assert_close(step, optimizer.moved[parameters[name]].flatten(), rtol=1e-5, atol=1e-7)
        doubled = preconditioner(slot.offset, 2 * momentum)[0]
        assert torch.equal(doubled, 2 * step)
    assert 0.05 < np.mean(clipped) < 0.95


def test_optimizers_that_scale_no_coordinate_are_named(lora, model_path, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    named = [(name, p) for name, p in model.named_parameters() if p.ndim == 2]
    checkpoint, _ = train(model, tokenizer, tmp_path / "muon", optimizer=torch.optim.Muon(named, lr=1e-3))
    config = SelectConfig(features="full", parameters="*mlp*", preconditioner="checkpoint")
    with pytest.raises(ValueError, match=r"is that of Muon, which scales no coordinate.*\(momentum_buffer\)"):
        collect_gradients(checkpoint, ROWS, processing_class=tokenizer, config=config, progress=False)
    saved = torch.load(f"{lora[0]}/optimizer.pt", weights_only=True)
    for state in saved["state"].values():
        state.update(GG=[torch.zeros(2, 2)], Q=[torch.eye(2)])  # as SOAP keeps them, beside exp_avg_sq
    torch.save(saved, tmp_path / "optimizer.pt")
    policy = load_policy(lora[0], SelectConfig())
    with pytest.raises(ValueError, match="is that of SOAP, whose second moments are those of another basis"):
        load_preconditioner(str(tmp_path / "optimizer.pt"), policy, choose_features(policy, SelectConfig()))
    for state in saved["state"].values():
        shape = state.pop("exp_avg_sq").shape
        del state["GG"], state["Q"]
        state["hessian"] = torch.full(shape, -1.0)
    saved["param_groups"][0]["rho"] = saved["param_groups"][1]["rho"] = 0.04
    torch.save(saved, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="its Hessian below 0"):
        load_preconditioner(str(tmp_path / "optimizer.pt"), policy, choose_features(policy, SelectConfig()))


def test_eight_bit_states_are_named(lora, tmp_path):
    """bitsandbytes' own layout; the library needs a GPU to make one."""
    saved = torch.load(f"{lora[0]}/optimizer.pt", weights_only=True)
    for state in saved["state"].values():
        shape = state.pop("exp_avg_sq").shape
        state.update(state1=torch.zeros(shape, dtype=torch.uint8), state2=torch.zeros(shape, dtype=torch.uint8))
    torch.save(saved, tmp_path / "optimizer.pt")
    model = load_policy(lora[0], SelectConfig())
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight is that of a bitsandbytes optimizer"):
        load_preconditioner(str(tmp_path / "optimizer.pt"), model, choose_features(model, SelectConfig()))


class Payload:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(lora, tmp_path, capsys):
    model = load_policy(lora[0], SelectConfig())
    features = choose_features(model, SelectConfig())
    path = tmp_path / "optimizer.pt"
    torch.save({"state": Payload(), "param_groups": []}, path)
    with pytest.raises(ValueError, match=r"optimizer\.pt cannot be read as tensors and plain values"):
        load_preconditioner(str(path), model, features)
    assert "executed" not in capsys.readouterr().out
    for content in (b"", b"PK nothing"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as tensors"):
            load_preconditioner(str(path), model, features)
    torch.save({"model": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="holds no optimizer state"):
        load_preconditioner(str(path), model, features)


def test_a_shape_is_checked_before_it_is_allocated(lora, tmp_path):
    """A view of one number that claims to be four terabytes."""
    saved = torch.load(f"{lora[0]}/optimizer.pt", weights_only=True)
    saved["state"][3]["exp_avg_sq"] = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(saved, tmp_path / "optimizer.pt")
    model = load_policy(lora[0], SelectConfig())
    with inference_state(model), pytest.raises(ValueError, match=r"lora_B\.default\.weight have shape \(1048576, "):
        load_preconditioner(str(tmp_path / "optimizer.pt"), model, choose_features(model, SelectConfig()))
