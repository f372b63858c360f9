"""Weights of tokens in the log-probability of a response: TIS-DPO (arXiv 2410.04350), RTO (arXiv 2404.18922)."""

import functools

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bpo
from bpo import SelectConfig, pair_coefficients, read_candidates
from bpo.data.tokens import tokenize_responses
from bpo.gradients.choose import choose_features
from bpo.policy.logprobs import Forward, response_logps
from tiny import hooked, scored_rows, stored, tiny_llama


def random_weights(prompt_ids, response_ids, seed=0):
    """Some negative, some zero; other ones for another response."""
    weights = np.random.default_rng([seed, *response_ids]).normal(size=len(response_ids))
    weights[::4] = 0
    return weights.tolist()


def weighted_logp(model, ids, start, weights):
    """Σ w_t log π(y_t | x, y_<t), written out."""
    logps = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
    return sum(w * logps[t - 1, ids[t]] for t, w in zip(range(start, len(ids)), weights, strict=True))


def test_pair_gradients_are_those_of_tis_dpo(tokenizer):
    policy, reference, beta = tiny_llama(tokenizer), tiny_llama(tokenizer, initializer_range=0.21), 0.3
    candidates = read_candidates(scored_rows(2, 3))
    tokenized = tokenize_responses(candidates, tokenizer, 256, token_weights=random_weights)[0]
    features = choose_features(policy, SelectConfig(features="full"))
    gradients, logps = hooked(policy, features, tokenized, np.arange(6))
    ref_logps = response_logps(Forward(reference, tokenized, 0))
    coefficients = pair_coefficients(logps.numpy(), ref_logps, tokenized.pairs, config={"beta": beta})
    for parameter in policy.parameters():
        parameter.requires_grad_(True)
    for pair, (a, b) in zip(tokenized.pairs, coefficients, strict=True):
        ratios = []
        for side in pair:
            ids, start = tokenized.ids[side], int(tokenized.prompt_lengths[side])
            sequence = ids, start, random_weights(ids[:start], ids[start:])
            ratios.append(weighted_logp(policy, *sequence) - weighted_logp(reference, *sequence).detach())
        loss = -F.logsigmoid(beta * (ratios[0] - ratios[1]))
        exact = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(policy.parameters()))])
        ours = a * gradients[pair[0]] + b * gradients[pair[1]]
        assert float((ours - exact).norm() / exact.norm()) < 1e-5


def test_gradients_are_linear_in_the_weights(tokenizer):
    model, candidates = tiny_llama(tokenizer), read_candidates(scored_rows(1, 3))
    features = choose_features(model, SelectConfig())

    def gradients(weights):
        tokenized = tokenize_responses(candidates, tokenizer, 256, token_weights=weights)[0]
        return hooked(model, features, tokenized, np.arange(3))[0]

    first, second = random_weights, functools.partial(random_weights, seed=1)
    combined = gradients(lambda *ids: 2 * np.array(first(*ids)) - 3 * np.array(second(*ids)))
    expected = 2 * gradients(first) - 3 * gradients(second)
    assert float((combined - expected).norm() / expected.norm()) < 1e-5
    ones = gradients(lambda _, ids: [1] * len(ids))
    assert float((ones - gradients(None)).norm() / ones.norm()) < 1e-6
    assert not gradients(lambda _, ids: [0] * len(ids)).any()


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
def test_weights_are_cut_with_their_tokens(tokenizer, model, truncation_mode):
    rows = [{"prompt": "red cat?", "chosen": " blue dog star tea milk", "rejected": " one"}]
    everything = tokenize_responses(read_candidates(rows), tokenizer, None, token_weights=random_weights)[0]
    for max_length in (4, 5):
        tokenized = tokenize_responses(
            read_candidates(rows),
            tokenizer,
            max_length,
            truncation_mode=truncation_mode,
            token_weights=random_weights,
        )[0]
        assert [len(weights) for weights in tokenized.weights] == tokenized.response_lengths.tolist()
        length = len(everything.weights[0])
        kept = (
            slice(int(tokenized.response_lengths[0])) if truncation_mode == "keep_start" else slice(-max_length, None)
        )
        assert 0 < len(tokenized.weights[0]) < length
        np.testing.assert_array_equal(tokenized.weights[0], everything.weights[0][kept])
        start = max(int(tokenized.prompt_lengths[0]), 1)
        predicted = tokenized.weights[0][int(tokenized.prompt_lengths[0] == 0) :]
        expected = weighted_logp(model, tokenized.ids[0], start, predicted)
        assert response_logps(Forward(model, tokenized, 0))[0] == pytest.approx(expected.item(), rel=1e-5)


def weighted_rows(tokenizer, seed=0):
    """Scored responses with a column of weights."""
    rows = scored_rows(4, 3)
    tokenized = tokenize_responses(read_candidates(rows), tokenizer, None)[0]
    sequences = list(zip(tokenized.ids, tokenized.prompt_lengths.tolist(), strict=True))
    for index, row in enumerate(rows):
        row["importance"] = [
            random_weights(ids[:start], ids[start:], seed) for ids, start in sequences[3 * index : 3 * index + 3]
        ]
    return rows


def test_columns_records_preference_rows_and_functions_mean_the_same(tokenizer, model, tmp_path):
    rows = weighted_rows(tokenizer)
    records = [
        {
            "prompt": row["prompt"],
            "responses": [
                {"text": text, "score": score, "importance": weights}
                for text, score, weights in zip(row["responses"], row["scores"], row["importance"], strict=True)
            ],
        }
        for row in rows
    ]
    config = SelectConfig(sketch_dim=64, token_weights="importance")
    selections = [
        bpo.select(model, data, budget=6, processing_class=tokenizer, config=config, progress=False)
        for data in (rows, datasets.Dataset.from_list(rows), records)
    ]
    every = bpo.select(
        model, rows, budget=1.0, processing_class=tokenizer, config=config, store=tmp_path / "store", progress=False
    )
    best = int(np.argmax(rows[0]["scores"]))
    assert every.dataset["importance_chosen"][0] == pytest.approx(rows[0]["importance"][best])
    stated = every.dataset.select_columns(["prompt", "chosen", "rejected", "importance_chosen", "importance_rejected"])
    selections.append(bpo.select(model, stated, budget=6, processing_class=tokenizer, config=config, progress=False))
    config = SelectConfig(sketch_dim=64, token_weights=random_weights)
    selections.append(bpo.select(model, rows, budget=6, processing_class=tokenizer, config=config, progress=False))
    for selection in selections[1:]:
        assert selection.dataset["chosen"][:] == selections[0].dataset["chosen"][:]
        assert selection.pairs["logp_chosen"].equals(selections[0].pairs["logp_chosen"])
        assert selection.pairs["centrality"].equals(selections[0].pairs["centrality"])
    assert selections[0].config["token_weights"] == "importance"
    assert selections[-1].config["token_weights"] == "<test_token_weights.random_weights>"
    plain = bpo.select(
        model, rows, budget=6, processing_class=tokenizer, config=SelectConfig(sketch_dim=64), progress=False
    )
    assert not plain.pairs["logp_chosen"].equals(selections[0].pairs["logp_chosen"])
    assert plain.pairs["length_chosen"].equals(selections[0].pairs["length_chosen"])


def test_other_weights_are_other_rows_of_a_store(tokenizer, model, tmp_path):
    def made(rows, **settings):
        return stored(model, rows, tokenizer, tmp_path / "store", **settings)

    assert len(made(weighted_rows(tokenizer), token_weights="importance")) == 12
    assert len(made(weighted_rows(tokenizer), token_weights=random_weights)) == 12
    assert len(made(weighted_rows(tokenizer)[:2], token_weights="importance")) == 12
    assert len(made(weighted_rows(tokenizer, seed=1)[:2], token_weights="importance")) == 18
    assert len(made(weighted_rows(tokenizer))) == 30


def test_a_response_with_other_weights_in_another_pair_is_another_sequence(tokenizer):
    def row(chosen, weight_chosen, rejected, weight_rejected):
        lengths = [len(tokenizer(text + "<|im_end|>")["input_ids"]) for text in (chosen, rejected)]
        weights = {"w_chosen": [weight_chosen] * lengths[0], "w_rejected": [weight_rejected] * lengths[1]}
        return {"prompt": "p?", "chosen": chosen, "rejected": rejected, **weights}

    rows = [row(" a", 1, " b", 0.5), row(" c", 1, " a", -1), row(" a", 1, " d", 0.5)]
    tokenized = tokenize_responses(read_candidates(rows, token_weights="w"), tokenizer, 100)[0]
    assert tokenized.response_of.tolist() == [0, 0, 1, 2, 3]
    assert tokenized.pairs.tolist() == [[0, 2], [3, 1], [0, 4]]
    assert [weights.tolist()[0] for weights in tokenized.weights] == [1, -1, 0.5, 1, 0.5]
    assert len(np.unique(tokenized.sequence_ids, axis=0)) == 5


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [{"prompt": "p", "responses": ["red cat", "b"], "scores": [1, 0], "w": [[1.0, 2.0], [1.0]]}],
            r"Row 0, response 0: 2 token weights for 3 tokens; .*: 'red', 'Ġcat', '<\|im_end\|>'\.",
        ),
        (
            [{"prompt": "p", "chosen": " a", "rejected": " b", "w_chosen": [1, 1], "w_rejected": [1, float("nan")]}],
            r"column 'w_rejected': token weights must be finite \(row 0: that of token 1 is nan\)",
        ),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b", "w_chosen": [1e39], "w_rejected": [1]}],
            r"column 'w_chosen': token weights must be finite \(row 0: that of token 0 is 1e\+39\)",
        ),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b", "w_chosen": "ab", "w_rejected": [1]}],
            r"column 'w_chosen': expected a list of token weights \(row 0: str 'ab'\)",
        ),
        ([{"prompt": "p", "chosen": "a", "rejected": "b"}], "token_weights='w' needs the columns w_chosen, w_rejected"),
        ([{"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}], "needs the columns w,"),
        (
            [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 0], "w": [[1]]}],
            r"column 'w': not one value a response \(row 0: 2 responses, 1 values\)",
        ),
        (
            [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 0], "w": None}],
            r"column 'w': expected a list of one value a response \(row 0: NoneType None\)",
        ),
        (
            [{"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]}],
            r"2 × column 'w': expected a list of token weights \(row 0, response 0: NoneType None",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tokenizer, rows, expected):
    with pytest.raises(ValueError, match=expected):
        tokenize_responses(read_candidates(rows, token_weights="w"), tokenizer, 100)


def test_a_function_that_miscounts_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"Row 0, chosen: 1 token weights for 3 tokens; .*'red', 'Ġcat'"):
        tokenize_responses(
            read_candidates([{"prompt": "p", "chosen": "red cat", "rejected": "one"}]),
            tokenizer,
            100,
            token_weights=lambda prompt_ids, response_ids: [1.0],
        )


def test_what_cannot_be_weighted_is_refused():
    with pytest.raises(ValueError, match="token_weights must be a name, a function or None, got 3"):
        SelectConfig(token_weights=3)
    with pytest.raises(ValueError, match="needs a reference that runs"):
        SelectConfig(token_weights="w", ref_model="columns")
