"""Gradients at several checkpoints, against autograd pair gradients at each."""

import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl import DPOConfig

import bpo
from bpo import SelectConfig, _core, collect_gradients
from bpo.data.tokens import tokenize_candidates
from bpo.gradients import checkpoints
from bpo.gradients.checkpoints import collect_checkpoints, collect_reference
from bpo.gradients.choose import choose_features
from bpo.pairs import checkpoints as pair_checkpoints
from bpo.pairs.checkpoints import pair_features
from bpo.pairs.measured import _pair_gradients
from bpo.pairs.pair_gradients import PairGradients
from bpo.policy.logprobs import completion_logps
from bpo.policy.models import load_policy
from tiny import scored_rows

ROWS = scored_rows(4, 3)
SKETCH = {"sketch_dim": 128, "sketch_dtype": "float32", "n_clusters": 4}


@pytest.fixture(scope="module")
def warmed(model_path, tmp_path_factory):
    """Two checkpoints far enough from the model to differ."""
    args = DPOConfig(
        "ignored",
        num_train_epochs=2,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return bpo.warm_up(model_path, scored_rows(6, 4), tmp_path_factory.mktemp("warm-up"), fraction=0.5, args=args)


@pytest.fixture
def select(model_path):
    def run(model=model_path, store=None, **settings):
        config = SelectConfig(**{**SKETCH, **settings})
        return bpo.select(model, ROWS, budget=7, store=store, config=config, progress=False)

    return run


def refuse(*_, **__):
    raise AssertionError("the model ran")


def test_one_checkpoint_selects_as_it_does_as_the_model(select, model_path, warmed):
    checkpoint = next(iter(warmed))
    alone = select(checkpoint, ref_model=model_path)
    among = select(checkpoints={checkpoint: 3e-5})
    assert among.dataset["bpo_pair"][:] == alone.dataset["bpo_pair"][:]
    assert among.pairs["cluster"].equals(alone.pairs["cluster"])
    for name in ("informativeness", "centrality", "distance", "alignment"):
        np.testing.assert_allclose(among.pairs[name], alone.pairs[name], rtol=1e-4, atol=1e-5)
    logps = select(model_path).pairs["logp_chosen"]  # the reference's
    np.testing.assert_allclose(among.pairs["ref_logp_chosen"], logps, rtol=1e-5)


def pair_gradient_sketches(checkpoint, reference, tokenized, pairs, config):
    """Sketches of the DPO loss's gradient by autograd, one pair at a time."""
    model = load_policy(checkpoint, config)
    parameters = [model.get_parameter(name).requires_grad_(True) for name in choose_features(model, config).slots]
    sketches = []
    for pair in pairs:
        ratios = completion_logps(model, tokenized, pair, 0).logps - torch.tensor(reference[pair])
        loss = -torch.nn.functional.logsigmoid(config.beta * (ratios[0] - ratios[1]))
        sketches.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).numpy())
    return _core.Sketcher(config.sketch_dim).sketch(np.stack(sketches))


def test_inner_products_are_cosines_averaged_with_the_learning_rates(model_path, tokenizer, warmed):
    rates = dict(zip(warmed, (3e-5, 1e-5), strict=True))
    config = SelectConfig(sketch_dim=128, sketch_dtype="float32", checkpoints=rates)
    model = load_policy(model_path, config)
    candidates, tokenized = tokenize_candidates(bpo.read_candidates(ROWS), tokenizer, 256, on_invalid="raise")
    inputs = {"config": config, "store": None, "progress": False}
    reference = collect_reference(model, tokenized, tokenizer, **inputs)
    stores = collect_checkpoints(reference, candidates, tokenized, tokenizer, **inputs)
    gradients = [
        _pair_gradients(store, store.rows_of(tokenized.sequence_ids)[tokenized.pairs], config, None, False, None)
        for store in stores
    ]
    features, informativeness = pair_features(gradients, list(rates.values()))

    with torch.no_grad():
        logps = completion_logps(model, tokenized, np.arange(len(tokenized.ids)), 0).logps.numpy()
    np.testing.assert_allclose(reference.known, logps, rtol=1e-5)
    cosines, squares = 0, 0
    for checkpoint, weight in zip(rates, (0.75, 0.25), strict=True):
        z = pair_gradient_sketches(checkpoint, logps, tokenized, candidates.pairs, config)
        norms = np.linalg.norm(z, axis=1)
        cosines += weight * (z @ z.T) / np.outer(norms, norms)
        squares += weight * norms**2
    np.testing.assert_allclose(features @ features.T, cosines, atol=1e-5)
    np.testing.assert_allclose(informativeness, np.sqrt(squares), rtol=1e-4)
    # The checkpoints do not agree, so the weights matter.
    assert np.abs(features[:, :128] @ features[:, :128].T / 0.75 - cosines).max() > 0.01


def test_a_second_call_runs_no_model(select, warmed, model, tmp_path, monkeypatch):
    settings = {"checkpoints": warmed, "preconditioner": "checkpoint", "store": tmp_path / "store"}
    first = select(**settings)
    names = [f"{position}-{path.rpartition('/')[2]}" for position, path in enumerate(warmed)]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == names
    stores = [bpo.GradientStore.open(tmp_path / "store" / name) for name in names]
    assert None not in {store.fingerprint["preconditioner"] for store in stores}
    assert len({store.fingerprint["preconditioner"] for store in stores}) == 2

    # Of a store that is lost, the gradients are computed again, and not the reference.
    shutil.rmtree(tmp_path / "store" / names[1])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "in_batches", refuse)
        again = select(**settings)
    monkeypatch.setattr(type(model), "forward", refuse)
    for selection in (again, select(**settings)):
        assert selection.pairs.equals(first.pairs)


def test_an_interrupted_run_goes_on(select, warmed, tmp_path, monkeypatch):
    collect, calls = checkpoints.collect, []

    def interrupt(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return collect(*arguments, **named)

    monkeypatch.setattr(checkpoints, "collect", interrupt)
    with pytest.raises(KeyboardInterrupt):
        select(checkpoints=warmed, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert select(checkpoints=warmed, store=tmp_path).pairs.equals(select(checkpoints=warmed).pairs)


def test_one_model_is_in_memory_at_a_time(select, warmed, monkeypatch):
    alive = []

    def load(*arguments):
        assert not [model for model in alive if model() is not None]
        policy = load_policy(*arguments)
        alive.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr("bpo.selection.sources.load_policy", load)
    monkeypatch.setattr(checkpoints, "load_policy", load)
    select(checkpoints=warmed)
    assert len(alive) == 3


def test_pairs_that_one_checkpoint_cannot_use_are_zero(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    pairs = np.array([[0, 1], [2, 3], [0, 3]])
    weights = np.tile(np.float32([-1, 1]), (3, 1))
    both = [PairGradients(rows, pairs, weights), PairGradients(rows, pairs, weights * np.float32([[1], [0], [2]]))]
    monkeypatch.setattr(pair_checkpoints, "_BLOCK_BYTES", 1)  # a pair at a time
    features, informativeness = pair_features(both, [1.0, 3.0], tmp_path)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), [1, 0, 1], rtol=1e-6)
    norms = np.linalg.norm(rows[pairs[:, 1]] - rows[pairs[:, 0]], axis=1)
    np.testing.assert_allclose(informativeness, norms * np.sqrt([1, np.nan, 0.25 + 0.75 * 4]), rtol=1e-6)
    assert isinstance(features, np.memmap) and not list(tmp_path.iterdir())

    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"3 pairs at 2 checkpoints take 1\.92e-07 GB, and .* has 1e-07 GB free"):
        pair_features(both, [1.0, 3.0], tmp_path)


def test_bad_checkpoints_are_refused_before_a_model_runs(select, warmed, model, model_path, tmp_path, monkeypatch):
    select(store=tmp_path / "store")
    monkeypatch.setattr(type(model), "forward", refuse)
    first = next(iter(warmed))
    for settings, expected in (
        ({"checkpoints": {f"{first}0": 1e-5}}, "no such model directory"),
        ({"checkpoints": {model_path: 1e-5}, "preconditioner": "checkpoint"}, r"optimizer\.pt: no such file"),
        ({"checkpoints": warmed, "store": tmp_path / "store"}, "is the gradient store of one model"),
        ({"checkpoints": {}}, "must map paths to learning rates, got"),
        ({"checkpoints": [first]}, "must map paths to learning rates, got"),
        ({"checkpoints": {first: 0.0}}, "learning rates above 0, got .*: 0.0"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=expected):
            select(**settings)
    with pytest.raises(ValueError, match="collect_gradients serves one model"):
        collect_gradients(model_path, ROWS, config=SelectConfig(checkpoints=warmed))
