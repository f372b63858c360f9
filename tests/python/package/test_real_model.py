"""The real SmolLM2-135M-Instruct, from the package index, on the demo's own data."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import bpo
from tiny import hooked

DEMO = Path(__file__).resolve().parents[3] / "demo"


def rows(n):
    """Those of the shortest responses: time goes by their tokens."""
    lines = (DEMO / "data" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    found = [{key: json.loads(line)[key] for key in ("prompt", "responses", "scores")} for line in lines]
    found = [row for row in found if len(set(row["responses"])) == 8 and len(set(row["scores"])) > 2]
    return sorted(found, key=lambda row: sum(map(len, row["responses"])))[:n]


@pytest.fixture(scope="module")
def loaded(smollm2):
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(smollm2)


def test_gradients_are_exact(loaded):
    """B-gradients of the whole model against autograd through PEFT, one response at a time."""
    from peft import LoraConfig, get_peft_model

    from bpo.data.tokenizers import padding_id
    from bpo.data.tokens import tokenize_responses
    from bpo.gradients.parameters import FreshAdapter
    from bpo.policy.logprobs import completion_logps

    model, tokenizer = loaded
    tokenized = tokenize_responses(bpo.read_candidates(rows(1)), tokenizer, 1024)[0]
    features = FreshAdapter(model, rank=8, seed=0)
    batch = np.array([0, 1])
    gradients, _ = hooked(model, features, tokenized, batch, padding_id(tokenizer))
    wrapped = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=8, target_modules=[layer.name for layer in features.layers])
    )
    wrapped.eval()
    parameters = []
    for layer in features.layers:
        wrapped.get_parameter(f"base_model.model.{layer.name}.lora_A.default.weight").data.copy_(layer.weight.right)
        parameters.append(wrapped.get_parameter(f"base_model.model.{layer.name}.lora_B.default.weight"))
    for index in range(2):
        logp = completion_logps(wrapped, tokenized, batch[index : index + 1], padding_id(tokenizer)).logps
        exact = torch.cat([g.flatten() for g in torch.autograd.grad(logp.sum(), parameters)])
        assert float((gradients[index] - exact).norm() / exact.norm()) < 3e-5
    wrapped.unload()


def test_sketch_error_on_real_pair_gradients(loaded):
    """RMS error of the cosines of real DPO pair gradients, against the figures that the sketch was chosen by."""
    from bpo import _core
    from bpo.data.tokenizers import padding_id
    from bpo.data.tokens import tokenize_responses
    from bpo.gradients.parameters import FreshAdapter

    model, tokenizer = loaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bpo.InvalidDataWarning)
        candidates = bpo.read_candidates(rows(4), max_pairs_per_prompt=3)
    tokenized = tokenize_responses(candidates, tokenizer, 1024)[0]
    features = FreshAdapter(model, rank=8, seed=0)
    gradients, _ = hooked(model, features, tokenized, np.arange(len(tokenized.ids)), padding_id(tokenizer))
    differences = (gradients[tokenized.pairs[:, 0]] - gradients[tokenized.pairs[:, 1]]).numpy()
    assert differences.shape == (12, 1_244_160)
    off_diagonal = ~np.eye(12, dtype=bool)

    def cosines(vectors):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return (unit @ unit.T)[off_diagonal]

    exact = cosines(differences)
    for dim, expected in ((256, 0.0599), (1024, 0.0307), (4096, 0.0152)):
        errors = [cosines(_core.Sketcher(dim, seed=seed).sketch(differences)) - exact for seed in range(10)]
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(expected, rel=0.15)
        assert abs(np.mean(errors)) < 3 * expected / np.sqrt(10)  # unbiased


def test_select_end_to_end(loaded, tmp_path):
    data = rows(3)
    model, tokenizer = loaded
    settings = {"processing_class": tokenizer, "store": tmp_path / "store", "progress": False}
    selection = bpo.select(model, data, budget=6, breadth=2, **settings)
    assert len(selection) == 6
    assert (selection.depth > 0).sum() == 2
    centrality = np.array(selection.dataset["bpo_centrality"][:])
    assert (centrality > 0).all() and (centrality <= 1 + 1e-6).all()
    assert selection.dataset[0]["prompt"][0]["role"] == "user"


def test_the_gradients_that_ship_with_the_demo(smollm2, monkeypatch):
    """They are those of all its responses, and those that the model gives."""
    monkeypatch.syspath_prepend(DEMO)
    import gradients

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bpo.InvalidDataWarning)
        candidates = bpo.read_candidates(gradients.rows())
    store = bpo.GradientStore.open(gradients.STORE)
    assert len(store.verify()) == 0
    known = {bytes(name) for name in store.records["response_id"]}
    assert known == {bytes(name) for name in candidates.response_ids}
    assert gradients.difference(smollm2, gradients.rows()[:1]) < 0.01
