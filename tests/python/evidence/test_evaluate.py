"""Accuracies and win rates with the length effect taken out, against scikit-learn and resampling."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import bpo
from bpo.evidence.length_controlled import length_controlled_accuracy, length_controlled_win_rate
from tiny import scored_rows


def planted(n, quality, length_effect, seed=0):
    """Wins by quality and by length, of responses that are mostly longer."""
    generator = np.random.default_rng(seed)
    differences = generator.normal(40, 80, n).round()
    logits = quality + length_effect * np.tanh(differences / differences.std())
    return (generator.random(n) < 1 / (1 + np.exp(-logits))).astype(float), differences


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_win_rate_is_that_of_scikit_learn(penalty):
    wins, differences = planted(400, 0.3, 1.5)
    rate = length_controlled_win_rate(wins, differences, penalty=penalty)
    feature = np.tanh(differences / differences.std())[:, None]
    fitted = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=1000).fit(feature, wins)
    assert rate.win_rate == pytest.approx(fitted.predict_proba([[0.0]])[0, 1], abs=1e-6)
    assert rate.length_effect == pytest.approx(fitted.coef_[0, 0], abs=1e-5)


def test_win_rate_finds_the_quality_below_a_planted_length_bias():
    wins, differences = planted(40_000, -0.4, 2.0)
    rate = length_controlled_win_rate(wins, differences)
    assert rate.raw_win_rate > 0.55  # the longer one wins often enough to hide that it is the worse
    assert rate.win_rate == pytest.approx(1 / (1 + np.exp(0.4)), abs=4 * rate.standard_error)
    assert rate.standard_error < 0.005 and rate.length_effect == pytest.approx(2.0, abs=0.1)


def test_standard_error_of_the_win_rate_is_that_of_repeated_draws():
    rates = [length_controlled_win_rate(*planted(300, 0.3, 1.5, seed)) for seed in range(300)]
    spread = np.std([rate.win_rate for rate in rates])
    assert np.mean([rate.standard_error for rate in rates]) == pytest.approx(spread, rel=0.15)
    # Every comparison twice, as one cluster, says no more than once.
    wins, differences = planted(300, 0.3, 1.5)
    once = length_controlled_win_rate(wins, differences, penalty=1e-9)
    twice = length_controlled_win_rate(
        np.tile(wins, 2), np.tile(differences, 2), clusters=np.tile(np.arange(300), 2), penalty=1e-9
    )
    assert twice.win_rate == pytest.approx(once.win_rate) and twice.standard_error == pytest.approx(once.standard_error)
    assert twice.raw_standard_error == pytest.approx(once.raw_standard_error)


def test_win_rate_at_the_edges():
    all_won = length_controlled_win_rate([1, 1], [5, -5])
    assert (all_won.win_rate, all_won.standard_error) == (1.0, 0.0) and np.isnan(all_won.length_effect)
    same_length = length_controlled_win_rate([1, 0, 1, 1], [0, 0, 0, 0])
    assert same_length.win_rate == same_length.raw_win_rate == 0.75
    confounded = length_controlled_win_rate([1, 0, 1, 1], [7, 7, 7, 7])
    assert np.isnan(confounded.win_rate) and confounded.raw_win_rate == 0.75
    separated = length_controlled_win_rate([1, 1, 0, 0], [9, 3, -3, -9])
    assert separated.win_rate == pytest.approx(0.5) and np.isfinite(separated.length_effect)
    ties = length_controlled_win_rate([0.5, 0.5, 0.5], [9, 3, -3])
    assert ties.win_rate == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("wins", "differences", "expected"),
    [
        ([], [], "at least one number"),
        ([1, 2], [0, 1], "each from 0 to 1"),
        ([1, 0], [1], r"length_differences must have one entry for each of the 2 wins, got shape \(1,\)"),
        ([1, float("nan")], [0, 1], r"wins\[1\] is nan"),
    ],
)
def test_bad_comparisons_are_named(wins, differences, expected):
    with pytest.raises(ValueError, match=expected):
        length_controlled_win_rate(wins, differences)


def test_a_ranking_by_length_has_one_half_when_length_is_controlled():
    differences = np.random.default_rng(0).normal(1, 1, 500)
    correct = (differences > 0).astype(float)
    assert correct.mean() > 0.8 and length_controlled_accuracy(correct, differences) == (0.5, 0.0)
    assert np.isnan(length_controlled_accuracy([1, 0], [3, 3])).all()
    assert np.isnan(length_controlled_accuracy([1, 0], [3, 0])).all()


def test_standard_error_of_the_accuracy_is_that_of_repeated_draws():
    """Three pairs a prompt that share its luck."""
    generator = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 3)
    found = []
    for _ in range(300):
        luck = np.repeat(generator.normal(size=100), 3)
        differences = generator.normal(0.5, 1, 300)
        correct = (generator.normal(size=300) + luck + 0.5 * np.sign(differences) > 0).astype(float)
        found.append(length_controlled_accuracy(correct, differences, clusters=prompts))
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(), rel=0.15)


def test_evaluation_reports_length_beside_accuracy(model, tokenizer):
    rows = scored_rows(8, 4)
    reference = bpo.evaluate_preferences(model, rows, processing_class=tokenizer, progress=False)
    other = bpo.evaluate_preferences(model, rows, processing_class=tokenizer, reference=reference, progress=False)
    assert other.length_controlled_accuracy == 0.5 and other.length_controlled_standard_error == 0.0
    candidates = bpo.read_candidates(rows)
    tokens = np.array([len(tokenizer(text)["input_ids"]) for text in candidates.responses])
    differences = tokens[candidates.pairs[:, 0]] - tokens[candidates.pairs[:, 1]]
    assert other.longer_share == pytest.approx(np.mean(np.sign(differences) + 1) / 2)
    for row in rows:  # the longer response is always the better one
        row["scores"] = [float(len(tokenizer(text)["input_ids"])) for text in row["responses"]]
    biased = bpo.evaluate_preferences(model, rows, processing_class=tokenizer, progress=False)
    assert biased.longer_share == 1.0 and np.isnan(biased.length_controlled_accuracy)
