"""Models that something has been put around: they give the gradients of the plain model, or are refused by name."""

import contextlib
import copy
import os

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoModelForCausalLM

import bpo
from bpo.policy.models import load_policy, model_fingerprint
from snapshots import assert_unchanged, snapshot
from tiny import scored_rows, stored, tiny_gpt2, tiny_llama

ROWS = scored_rows(3, 3)
CPU = torch.device("cpu")
LONG = "BPO_TORTURE" in os.environ


def _dispatched(model, directory):
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=directory, force_hooks=True)


def _hooked(model, directory):
    for layer in model.model.layers:
        add_hook_to_module(layer, ModelHook())
    return model


OFFLOADED = {
    "to the CPU": lambda model, directory: cpu_offload(model, CPU, offload_buffers=True) or model,
    "to disk": lambda model, directory: disk_offload(model, directory, CPU) or model,
    "in part": _dispatched,
}
WRAPPED = {
    **OFFLOADED,
    "hooked": _hooked,
    "compiled": lambda model, directory: torch.compile(model, backend="eager"),
    "compiled in place": lambda model, directory: model.compile(backend="eager") or model,
    "data parallel": lambda model, directory: torch.nn.DataParallel(model),
}


def _compiled_and_run(model):
    """Compiled code is made at the first call, without the hooks of later ones."""
    inner = model.module if isinstance(model, torch.nn.DataParallel) else model
    inner(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    return model


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [(kind, checkpointing) for kind in WRAPPED for checkpointing in (False, True)]
    if LONG
    else [("in part", True), ("hooked", True), ("compiled", False), ("compiled in place", False)],
)
def test_the_gradients_are_those_of_the_plain_model(kind, checkpointing, tokenizer, tmp_path):
    plain = tiny_llama(tokenizer, tie_word_embeddings=kind == "to disk")
    wanted = stored(plain, ROWS, tokenizer)
    if checkpointing:
        plain.activation_checkpointing_enable()
    model = _compiled_and_run(WRAPPED[kind](copy.deepcopy(plain), tmp_path))
    before = snapshot(model, tokenizer)
    found = stored(model, ROWS, tokenizer)
    np.testing.assert_array_equal(found.sketches(), wanted.sketches())
    assert {**found.fingerprint, "created": None} == {**wanted.fingerprint, "created": None}
    assert_unchanged(before, snapshot(model, tokenizer))


def test_no_compiled_code_runs_or_is_made(tokenizer):
    """It may have been made without our hooks, which then would see nothing."""
    ran = []

    def backend(graph, inputs):
        ran.append("made")
        return lambda *given: ran.append("run") or graph.forward(*given)

    model = tiny_llama(tokenizer)
    wanted = stored(model, ROWS, tokenizer).sketches()
    for layer in model.model.layers:
        layer.compile(backend=backend)
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert "run" in ran
    ran.clear()
    np.testing.assert_array_equal(stored(model, ROWS, tokenizer).sketches(), wanted)
    assert not ran
    model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    assert ran


@pytest.mark.parametrize("kind", WRAPPED if LONG else ["in part", "compiled"])
def test_whatever_else_runs_a_model_runs_it_wrapped(kind, tokenizer, tmp_path):
    plain = tiny_llama(tokenizer)
    model = _compiled_and_run(WRAPPED[kind](copy.deepcopy(plain), tmp_path))
    for run in (
        lambda given: bpo.sample_responses(
            given,
            ["one", "two three"],
            2,
            max_new_tokens=4,
            keep=["truncated"],
            progress=False,
            processing_class=tokenizer,
        ).to_list(),
        lambda given: bpo.evaluate_preferences(given, ROWS, processing_class=tokenizer, progress=False).logps.tolist(),
        lambda given: stored(given, ROWS, tokenizer, features="embeddings").sketches().tolist(),
        lambda given: bpo.doctor(given, ROWS, processing_class=tokenizer, config={"sketch_dim": 64}).problems,
    ):
        assert run(model) == run(plain)


@pytest.mark.parametrize("kind", OFFLOADED if LONG else ["in part"])
def test_parameters_that_are_brought_for_each_pass_have_no_gradient_of_their_own(kind, tokenizer, tmp_path):
    model = OFFLOADED[kind](tiny_llama(tokenizer), tmp_path)
    before = snapshot(model)
    with pytest.raises(bpo.UnsupportedModelError, match=r"weight is offloaded by accelerate.* features='lora'"):
        stored(model, ROWS, tokenizer, features="full")
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("head", ["cpu", "disk"])
def test_a_model_loaded_by_a_device_map_is_the_undivided_one(head, tokenizer, tmp_path):
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"]
    device_map = {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk", "lm_head": head}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert model.hf_device_map == device_map
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    undivided = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    wanted, found = (stored(given, ROWS, tokenizer) for given in (undivided, model))
    np.testing.assert_allclose(found.sketches(), wanted.sketches(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.records["logp"], wanted.records["logp"], rtol=1e-5)
    assert found.fingerprint["model"] == wanted.fingerprint["model"]


@pytest.mark.parametrize("features", ["lora", "full"])
def test_patched_layers_are_differentiated_as_they_are(features, tokenizer):
    """A layer's scale, a vector that steers it, with and without checkpointing: one function, one gradient."""
    steering = torch.linspace(-1, 1, 32).requires_grad_(True)

    def patched(checkpointing):
        model = tiny_llama(tokenizer)
        for layer in model.model.layers:
            layer.forward = _patch(layer.forward, steering)
        model.forward = _patch(model.forward, None)
        if checkpointing:
            model.activation_checkpointing_enable()
        return model

    plain, checkpointed = (stored(patched(c), ROWS, tokenizer, features=features).sketches() for c in (False, True))
    np.testing.assert_array_equal(plain, checkpointed)
    unpatched = stored(tiny_llama(tokenizer), ROWS, tokenizer, features=features).sketches()
    assert np.linalg.norm(plain - unpatched) > 0.1 * np.linalg.norm(plain)
    assert steering.grad is None


def _patch(forward, steering):
    if steering is None:
        return lambda *args, **kwargs: forward(*args, **kwargs)
    return lambda hidden, *args, **kwargs: forward(hidden, *args, **kwargs) * 0.7 + steering


def test_a_patched_pass_that_hands_all_on_gets_positions(tokenizer):
    """Without positions of their own, those of a batch could not be told apart by sample."""
    model = tiny_gpt2(tokenizer)
    wanted = stored(model, ROWS, tokenizer, features="full").sketches()
    model.forward = _patch(model.forward, None)
    np.testing.assert_array_equal(stored(model, ROWS, tokenizer, features="full").sketches(), wanted)


@pytest.mark.parametrize(
    "around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_the_callers_contexts_do_not_matter(around, tokenizer):
    model = tiny_llama(tokenizer)
    wanted = stored(model, ROWS, tokenizer).sketches()
    with around():
        found = stored(model, ROWS, tokenizer).sketches()
    np.testing.assert_array_equal(found, wanted)


def test_a_layer_that_nothing_flows_back_through_is_named(tokenizer):
    class Packed(torch.nn.Linear):
        """A kernel that autograd does not know."""

        def forward(self, x):
            return torch.from_numpy(x.detach().numpy() @ self.weight.detach().numpy().T)

    model = tiny_llama(tokenizer)
    packed = Packed(32, 48, bias=False)
    packed.weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj = packed
    before = snapshot(model)
    with pytest.raises(bpo.UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj: Packed gives back nothing to diff"):
        stored(model, ROWS, tokenizer)
    assert_unchanged(before, snapshot(model))


def test_embeddings_scaled_in_place_are_exact(tokenizer):
    """As CTRL does it: in place, on what the table gave."""
    wanted = stored(_scaling(tiny_llama(tokenizer), torch.mul), ROWS, tokenizer, features="full").sketches()
    found = stored(_scaling(tiny_llama(tokenizer), torch.Tensor.mul_), ROWS, tokenizer, features="full").sketches()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def _scaling(model, multiply):
    inner = model.model.layers[0].forward
    model.model.layers[0].forward = lambda hidden, *args, **kwargs: inner(multiply(hidden, 3.0), *args, **kwargs)
    return model


def test_shared_out_models_are_refused(tokenizer):
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.distributed.destroy_process_group)
        whole = tiny_llama(tokenizer)
        parallel = torch.nn.parallel.DistributedDataParallel(whole)
        assert model_fingerprint(load_policy(parallel, bpo.SelectConfig())) == model_fingerprint(whole)
        model = FullyShardedDataParallel(tiny_llama(tokenizer), device_id=CPU)
        said = "The model is a FullyShardedDataParallel, .* over processes.* by FSDP2"
        with pytest.raises(bpo.UnsupportedModelError, match=said):
            bpo.select(model, ROWS, budget=3, processing_class=tokenizer, progress=False)
        with pytest.raises(bpo.UnsupportedModelError, match=said):
            bpo.sample_responses(model, ["one"], processing_class=tokenizer, progress=False)
