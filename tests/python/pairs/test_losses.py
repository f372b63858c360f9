"""Every loss as two scalars a pair: against autograd through TRL's own loss, one pair at a time."""

import dataclasses
import itertools
import json
import math
import re
import types
from typing import get_args

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

import bpo
from bpo import InvalidDataWarning, SelectConfig, _core, collect_gradients, pair_coefficients, read_candidates
from bpo.choices import F_DIVERGENCE_LOSSES, REFUSED_LOSSES, FDivergence, LossType
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from tiny import hooked, scored_rows, tiny_llama

LOSSES = get_args(LossType)
LOSS_FIELDS = (
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "discopop_tau",
    "use_weighting",
)
ROWS = [
    {"prompt": "cat dog?", "chosen": " moon star tea", "rejected": " bird"},
    {"prompt": "one?", "chosen": " two", "rejected": " red green blue sun milk bread"},
    {"prompt": "north", "chosen": " south east west", "rejected": " star one cat"},
    # "re" and "d" merge into one token, so prompt and response part before their first token: nothing predicts it.
    {"prompt": "re", "chosen": "d moon", "rejected": "d green blue east"},
]
# Log-ratios of −10 and below, for exponents that TRL cuts.
LONG_ROWS = [
    {"prompt": "sun?", "chosen": " west" + 40 * " red star bird", "rejected": " two one"},
    {"prompt": "milk?", "chosen": " two", "rejected": " bread" + 40 * " moon dog three"},
]


def case(**fields):
    """A configuration and what to call it; ε as the losses that use it need it."""
    names = fields["loss_type"] if isinstance(fields["loss_type"], list) else [fields["loss_type"]]
    smoothing = 0.1 if {"robust", "exo_pair"} & set(names) else 0.0
    identifier = ",".join(f"{value}" for value in fields.values())
    return pytest.param({"label_smoothing": smoothing, **fields}, id=identifier)


CASES = [
    *(case(loss_type=name) for name in LOSSES),
    *(case(loss_type=name, use_weighting=True) for name in LOSSES if name != "hinge"),
    *(
        case(loss_type=name, f_divergence_type=divergence)
        for name, divergence in itertools.product(sorted(F_DIVERGENCE_LOSSES), get_args(FDivergence))
        if divergence != "reverse_kl"
    ),
    *(
        case(loss_type="sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
        for alpha in (-1.0, 0.0, 0.9, 1.0, 1.0 + 1e-7, 2.0)
    ),
    *(case(loss_type="robust", label_smoothing=smoothing) for smoothing in (0.0, 0.01, 0.45)),
    *(case(loss_type="exo_pair", label_smoothing=smoothing) for smoothing in (1e-6, 1e-3, 0.5, 0.9)),
    *(case(loss_type=name, beta=beta) for name, beta in itertools.product(LOSSES, (1e-6, 1.0, 5.0))),
    *(case(loss_type="discopop", discopop_tau=tau, beta=0.5) for tau in (0.2, 1.0, 3.0)),
    case(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    case(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], use_weighting=True),
    case(loss_type=["sigmoid", "sft"]),
    case(loss_type=["ipo", "sft", "sigmoid_norm"], loss_weights=[1.0, -0.3, 2.0], f_divergence_type="js_divergence"),
    case(loss_type=["hinge", "hinge", "robust"], loss_weights=[1, 0.5, 0.0], beta=0.3),
    case(loss_type=["exo_pair", "robust", "nca_pair", "apo_down", "discopop"], use_weighting=True),
]


@pytest.fixture(scope="module")
def reference(tokenizer):
    """A policy near the tiny one: log-ratios of about 1."""
    other = tiny_llama(tokenizer)
    generator = torch.Generator().manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.fixture(scope="module")
def trainer(tokenizer, reference, tmp_path_factory):
    """TRL's trainer of a copy of the tiny policy, on a copy of the reference."""
    copy = tiny_llama(tokenizer)
    copy.load_state_dict(reference.state_dict())
    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_weighting=True,  # so that TRL's forward also gives what its weights need
        gradient_checkpointing=False,
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices this small more of them only wait for each other
    yield DPOTrainer(
        tiny_llama(tokenizer),
        ref_model=copy,
        args=args,
        train_dataset=Dataset.from_list(ROWS + LONG_ROWS),
        processing_class=tokenizer,
    )
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stored(tokenizer, reference):
    """The same rows as bpo sees them: whole gradients, and a store of sketches."""
    model = tiny_llama(tokenizer)
    config = SelectConfig(features="full", sketch_dim=256, sketch_dtype="float32", ref_model=reference)
    candidates = read_candidates(ROWS + LONG_ROWS)
    assert candidates.pair_rows.tolist() == list(range(len(ROWS + LONG_ROWS)))
    with pytest.warns(UserWarning, match="1 of 6 tokenized prompts are not a prefix"):
        store = collect_gradients(model, ROWS + LONG_ROWS, processing_class=tokenizer, config=config, progress=False)
        tokenized = tokenize_responses(candidates, tokenizer, 256)[0]
    order = store.rows_of(candidates.response_ids)
    gradients, _ = hooked(model, choose_features(model, config), tokenized, np.argsort(order))
    return types.SimpleNamespace(store=store, gradients=gradients.numpy(), pairs=order[candidates.pairs])


def coefficients_of(store, pairs, config):
    records = store.records
    return pair_coefficients(
        records["logp"],
        records["ref_logp"],
        pairs,
        lengths=records["length"],
        predicted=store.predicted,
        log_weights=records["log_weight"],
        config=config,
    )


def gradient_of_trl(trainer, config, row):
    """Gradient of TRL's loss of a batch of one pair. Its trainer reads the loss from these attributes alone."""
    trainer.loss_types, trainer.loss_weights = zip(*config.weighted_losses, strict=True)
    trainer.args.discopop_tau = config.discopop_tau
    for name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting"):
        assert hasattr(trainer, name)
        setattr(trainer, name, getattr(config, name))
    batch = trainer.data_collator([trainer.train_dataset[row]])
    loss = trainer.compute_loss(trainer.model, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))]).numpy()


def assert_gradient_is_that_of_trl(trainer, stored, config, row):
    """Compares whole gradients and sketches; returns the two coefficients."""
    (coefficients,) = coefficients_of(stored.store, stored.pairs[row : row + 1], config)
    expected = gradient_of_trl(trainer, config, row)
    sketched = _core.Sketcher(256, seed=0).sketch(expected[None])[0]
    # Weights are exponentials of β times log-probabilities, which are rounded otherwise in a batch of another shape.
    tolerance = 1e-4 * max(1, config.beta)
    for rows, target in ((stored.gradients, expected), (stored.store.sketches(), sketched)):
        found = coefficients @ rows[stored.pairs[row]]
        assert np.linalg.norm(found - target) <= tolerance * np.linalg.norm(target)
    return coefficients


@pytest.mark.parametrize("fields", CASES)
def test_pair_gradient_is_that_of_trls_loss(trainer, stored, fields):
    config = SelectConfig(**fields)
    coefficients = [assert_gradient_is_that_of_trl(trainer, stored, config, row) for row in range(len(ROWS))]
    assert np.any(coefficients)


def test_exponents_are_cut_where_trl_cuts_them(trainer, stored):
    config = SelectConfig(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=-15.0)
    cut_chosen, cut_rejected = range(len(ROWS), len(ROWS + LONG_ROWS))
    a, b = assert_gradient_is_that_of_trl(trainer, stored, config, cut_chosen)
    assert a == 0 and b > 0
    a, b = assert_gradient_is_that_of_trl(trainer, stored, config, cut_rejected)
    assert a == b == 0
    hinge = dataclasses.replace(config, loss_type="hinge", beta=1e-36)  # so small that the margin is below 1
    a, b = assert_gradient_is_that_of_trl(trainer, stored, hinge, cut_rejected)
    assert a < 0 and b == 0


def test_every_loss_of_trl_is_supported_or_refused():
    """A loss that a later TRL adds fails here until it is one of the two."""
    described = {field.name: field.metadata["help"] for field in dataclasses.fields(DPOConfig) if field.metadata}
    assert set(re.findall(r"`'(\w+)'`", described["loss_type"])) == {*LOSSES, *REFUSED_LOSSES}
    assert set(re.findall(r"`'(\w+)'`", described["f_divergence_type"])) == F_DIVERGENCE_LOSSES
    listed = described["f_divergence_type"].split("Possible values are:")[1].split(".")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == get_args(FDivergence)


def test_defaults_are_trls(tmp_path):
    ours, theirs = SelectConfig().to_dict(), DPOConfig(output_dir=str(tmp_path), bf16=False)
    for name in LOSS_FIELDS:
        assert ours[name] == getattr(theirs, name)


RATIO = st.floats(-1e4, 1e4)


@settings(deadline=None)
@given(RATIO, RATIO, st.floats(1e-3, 10), st.integers(1, 1000), st.integers(1, 1000))
def test_coefficients_are_the_derivatives_written_by_hand(chosen, rejected, beta, chosen_length, rejected_length):
    def sigma(x):
        return math.exp(-np.logaddexp(0.0, -x))

    delta = beta * (chosen - rejected)
    error = 2 * (chosen / chosen_length - rejected / rejected_length - 0.5 / beta)
    by_hand = {
        "sigmoid": (-beta * sigma(-delta), beta * sigma(-delta)),
        "hinge": (-beta, beta) if delta < 1 else (0, 0),
        "ipo": (error / chosen_length, -error / rejected_length),
        "nca_pair": (
            -beta * sigma(-beta * chosen) + 0.5 * beta * sigma(beta * chosen),
            0.5 * beta * sigma(beta * rejected),
        ),
        "bco_pair": (-beta * sigma(-beta * chosen), beta * sigma(beta * rejected)),
        "sppo_hard": (2 * chosen - 1 / beta, 2 * rejected + 1 / beta),
        "apo_zero": (
            -beta * sigma(beta * chosen) * sigma(-beta * chosen),
            beta * sigma(beta * rejected) * sigma(-beta * rejected),
        ),
        "sft": (-1 / chosen_length, 0),
    }
    for name, expected in by_hand.items():
        found = pair_coefficients(
            np.array([chosen, rejected]),
            np.zeros(2),
            np.array([[0, 1]]),
            lengths=np.array([chosen_length, rejected_length]),
            config={"loss_type": name, "beta": beta},
        )
        np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-9, err_msg=name)


@given(RATIO, RATIO, st.floats(1e-3, 10))
def test_mio_is_ncas_loss(chosen, rejected, beta):
    """MIO (arXiv 2506.22578) by the Jensen–Shannon bound, half of what the base model says being preferred."""

    def bound(preferred):
        critic = beta * np.array([preferred, rejected])
        return -np.logaddexp(0, -critic[0]) - np.logaddexp(0, critic).mean()

    step = 1e-3 / beta
    slope = -(bound(chosen + step) - bound(chosen - step)) / (2 * step)
    config = {"loss_type": "nca_pair", "beta": beta}
    found = pair_coefficients(np.array([chosen, rejected]), np.zeros(2), np.array([[0, 1]]), config=config)[0, 0]
    assert found == pytest.approx(slope, rel=1e-3, abs=1e-5 * beta)


EXTREMES = (-1e4, -300.0, -1.0, 0.0, 300.0, 1e4)


@pytest.mark.parametrize("divergence", get_args(FDivergence))
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_log_ratios(name, divergence):
    if name not in F_DIVERGENCE_LOSSES and divergence != "reverse_kl":
        return
    ratios, pairs = np.array(EXTREMES), np.array(list(itertools.product(range(len(EXTREMES)), repeat=2)))
    config = SelectConfig(loss_type=name, label_smoothing=0.1, f_divergence_type=divergence)
    found = pair_coefficients(ratios, np.zeros(len(ratios)), pairs, lengths=np.full(len(ratios), 10), config=config)
    assert not np.isnan(found).any()
    if divergence in ("reverse_kl", "js_divergence"):
        assert np.isfinite(found).all()
    if divergence == "forward_kl" and name not in ("ipo", "robust"):
        # The score of the preferred response grows as 1/t; that of the other one only where the pair is satisfied.
        assert (np.isfinite(found[:, 0]) | (ratios[pairs[:, 0]] <= -300)).all()
        apart = ratios[pairs[:, 0]] > ratios[pairs[:, 1]]
        assert np.isfinite(found[apart]).all()


def test_limits_where_trls_arithmetic_overflows():
    pairs = np.array([[0, 1]])

    def found(chosen, rejected, **config):
        return pair_coefficients(np.array([chosen, rejected]), np.zeros(2), pairs, config=config)[0].tolist()

    # TRL: exp(1000) · σ(−20000) = ∞ · 0.
    assert found(-1e4, 0.0, loss_type="discopop", beta=0.125) == [-0.125, 0.125]
    # The exponential part wins over the logistic one where τ > 1, and is out of range.
    assert found(-1e4, 0.0, loss_type="discopop", beta=0.125, discopop_tau=2.0) == [-math.inf, math.inf]
    # TRL: σ(−∞) · exp(1000) = 0 · ∞.
    assert found(0.0, -1e3, f_divergence_type="forward_kl") == [0.0, 0.0]
    assert found(-1e3, 0.0, f_divergence_type="forward_kl", beta=0.125) == [-math.inf, 0.125]


@pytest.mark.parametrize("name", LOSSES)
def test_weighting_multiplies_by_both_weights(name):
    logps, ref_logps, pairs = np.array([-9.0, -7.0, -30.0]), np.array([-8.0, -7.5, -31.0]), np.array([[0, 1], [2, 0]])
    arguments = {"lengths": np.array([3, 4, 9]), "log_weights": np.array([-0.5, 0.25, -60.0])}
    config = SelectConfig(loss_type=name, label_smoothing=0.1)
    plain = pair_coefficients(logps, ref_logps, pairs, **arguments, config=config)
    weighted = pair_coefficients(
        logps, ref_logps, pairs, **arguments, config=dataclasses.replace(config, use_weighting=True)
    )
    np.testing.assert_allclose(weighted, plain * np.exp([[-0.25], [-60.5]]), rtol=1e-5)


def test_pairs_in_blocks_and_without_gradient_mode(monkeypatch):
    generator = np.random.default_rng(0)
    logps, ref_logps = generator.normal(size=(2, 20))
    pairs = generator.integers(0, 20, (50, 2))
    whole = pair_coefficients(logps, ref_logps, pairs)
    monkeypatch.setattr("bpo.pairs.losses._PAIRS_AT_ONCE", 7)
    with torch.no_grad():
        np.testing.assert_array_equal(pair_coefficients(logps, ref_logps, pairs), whole)
    assert pair_coefficients(logps, ref_logps, pairs[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"loss_type": "ipo"}, "needs lengths for ipo"),
        ({"loss_type": ["sigmoid_norm", "ipo"]}, "needs lengths for ipo, sigmoid_norm"),
        ({"loss_type": ["sigmoid", "sft"]}, r"needs predicted \(or lengths\) for sft"),
        ({"use_weighting": True}, "needs log_weights for use_weighting"),
    ],
)
def test_missing_arguments_are_named(config, expected):
    with pytest.raises(ValueError, match=expected):
        pair_coefficients(np.zeros(2), np.zeros(2), np.array([[0, 1]]), config=config)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"loss_type": "aot"}, "'aot' cannot be selected for: it sorts the log-ratios of a whole batch"),
        ({"loss_type": ["sigmoid", "aot_unpaired"]}, "'aot_unpaired' cannot be selected for: it sorts"),
        ({"loss_type": "dpo"}, r"loss_type must be one of \['sigmoid', 'hinge', .*'sigmoid_norm'\], got 'dpo'"),
        ({"loss_type": []}, "must be the name of a loss or a list of them"),
        ({"loss_type": None}, "must be the name of a loss or a list of them"),
        ({"loss_type": [["sigmoid"]]}, "loss_type must be one of"),
        ({"loss_weights": [1.0, 2.0]}, "one weight for each of the 1 losses of loss_type, got 2"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "each of the 2 losses of loss_type, got 1"),
        ({"loss_weights": [math.nan]}, "loss_weights must be a list of finite numbers"),
        ({"loss_weights": 1.0}, "loss_weights must be a list of finite numbers"),
        ({"loss_type": "exo_pair"}, "label_smoothing must be above 0 for loss_type 'exo_pair'.*1e-3"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing must be below 0.5 for loss_type 'robust'"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1"),
        ({"f_divergence_type": "chi_squared"}, "f_divergence_type must be one of"),
        ({"f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef must be a finite number"),
        ({"discopop_tau": 0}, "discopop_tau must be above 0"),
        ({"use_weighting": 1}, "use_weighting must be True or False"),
        *(
            (
                {"loss_type": ["sigmoid", name], "f_divergence_type": "js_divergence"},
                f"f_divergence_type must be 'reverse_kl' for loss_type '{name}'",
            )
            for name in sorted(set(LOSSES) - F_DIVERGENCE_LOSSES)
        ),
    ],
)
def test_losses_that_cannot_be_are_refused(fields, expected):
    with pytest.raises(ValueError, match=expected):
        SelectConfig(**fields)


def test_a_loss_survives_json_and_the_command_line():
    from bpo.cli.arguments import field

    config = SelectConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=(0.8, 0.2, 1))
    assert config.weighted_losses == [("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]
    assert SelectConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    options = ['loss_type=["sigmoid", "bco_pair", "sft"]', "loss_weights=[0.8, 0.2, 1]"]
    assert SelectConfig.from_dict(dict(map(field, options))) == config
    assert SelectConfig.from_dict(dict([field("loss_type=ipo")])).loss_type == ("ipo",)


def test_another_loss_is_selected_for_from_the_same_store(tokenizer, reference, tmp_path, monkeypatch):
    model, rows = tiny_llama(tokenizer), scored_rows(6, 4)

    def informativeness(**loss):
        config = SelectConfig(sketch_dim=64, ref_model=reference, **loss)
        selection = bpo.select(
            model,
            rows,
            budget=12,
            processing_class=tokenizer,
            store=tmp_path / "store",
            config=config,
            progress=False,
        )
        assert len(selection) == 12
        return selection.pairs["informativeness"].to_numpy()

    first = informativeness()

    def refuse(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "forward", refuse)
    np.testing.assert_array_equal(informativeness(), first)
    for loss in (
        *({"loss_type": name, "label_smoothing": 0.1} for name in LOSSES if name != "sigmoid"),
        {"beta": 0.5},
        {"use_weighting": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 2.0]},
    ):
        assert np.abs(informativeness(**loss) - first).max() > 0


def test_pairs_out_of_float32_are_named_and_set_aside(tokenizer):
    """Under forward KL the gradient is 1/t of it: beyond any number for one very improbable response."""
    model, rows = tiny_llama(tokenizer), scored_rows(4, 3)
    model.lm_head.weight.data *= 1.5  # more certain than its reference, so text at random is less probable to it
    rows[1]["responses"][0] += 50 * " red star bird"
    rows[1]["scores"] = [9.0, 1.0, 0.0]
    reference = tiny_llama(tokenizer)
    config = SelectConfig(sketch_dim=64, ref_model=reference, f_divergence_type="forward_kl", beta=1e-6)
    with pytest.warns(InvalidDataWarning, match=r"2 × pair whose gradient is NaN or infinite \(row 1; row 1\)"):
        selection = bpo.select(model, rows, budget=8, processing_class=tokenizer, config=config, progress=False)
    assert selection.fates() == {"selected": 8, "depth": 2, "breadth": 0, "unusable": 2}
    for name in ("informativeness", "centrality", "distance"):
        kept = selection.pairs.filter(selection.pairs["fate"].to_numpy() != "unusable")
        assert np.isfinite(kept[name].to_numpy()).all()
