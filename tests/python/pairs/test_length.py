"""The length effect on scores, and both ways of controlling it, against plain versions and planted effects."""

import itertools

import datasets
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

import bpo
from bpo import SelectConfig, Selection, length_effect, read_candidates
from bpo.data.pairing import largest_gaps
from bpo.selection.choice import balance_lengths
from tiny import WORDS, scored_rows


def planted_rows(slope, n_prompts=12, n_responses=6, seed=0):
    """Scores of a quality of their own, by prompt, and of the log length; returns rows and qualities."""
    generator = np.random.default_rng(seed)
    rows, qualities = [], []
    for index in range(n_prompts):
        responses = [
            f"{position} " + " ".join(generator.choice(WORDS, generator.integers(2, 40)))
            for position in range(n_responses)
        ]
        quality = generator.normal(size=n_responses) + 3 * generator.normal()
        scores = quality + slope * np.log([len(text) for text in responses])
        rows.append({"prompt": f"prompt {index}", "responses": responses, "scores": scores.tolist()})
        qualities.append(dict(zip(responses, quality, strict=True)))
    return rows, qualities


def select(rows, control, strategy="random", budget=0.3, **arguments):
    config = SelectConfig(length_control=control, **arguments.pop("config", {}))
    return bpo.select(
        arguments.pop("model", None), rows, budget=budget, strategy=strategy, config=config, progress=False, **arguments
    )


def test_the_effect_is_that_of_a_regression_with_an_intercept_for_each_prompt():
    rows, _ = planted_rows(1.5)
    rows.append({"prompt": "ties", "responses": ["a", "bb"], "scores": [1.0, 1.0]})  # no pair, so no part in it
    with pytest.warns(bpo.InvalidDataWarning):
        effect = length_effect(rows)
    logs = np.log([len(text) for row in rows[:-1] for text in row["responses"]])
    scores = np.concatenate([row["scores"] for row in rows[:-1]])
    prompts = np.repeat(np.eye(12), 6, axis=0)
    fitted = LinearRegression(fit_intercept=False).fit(np.column_stack([logs, prompts]), scores)
    assert effect.slope == pytest.approx(fitted.coef_[0])
    x, y = (
        (values.reshape(12, 6) - values.reshape(12, 6).mean(axis=1, keepdims=True)).ravel() for values in (logs, scores)
    )
    assert effect.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert (effect.n_responses, effect.n_pairs, effect.unit) == (72, 12 * 15, "characters")
    candidates = read_candidates(rows[:-1])
    longer = [len(candidates.responses[a]) > len(candidates.responses[b]) for a, b in candidates.pairs]
    same = [len(candidates.responses[a]) == len(candidates.responses[b]) for a, b in candidates.pairs]
    assert effect.longer_share == pytest.approx(np.mean(longer) + np.mean(same) / 2)


def test_the_effect_counts_tokens_where_there_is_a_tokenizer(tokenizer, model_path):
    rows, _ = planted_rows(0.0)
    for row in rows:
        row["scores"] = [2.0 * np.log(len(tokenizer(text)["input_ids"]) + 1) for text in row["responses"]]
    for given in (tokenizer, model_path):
        effect = length_effect(rows, processing_class=given)  # the end token counts
        assert (effect.slope, effect.correlation) == pytest.approx((2.0, 1.0)) and effect.unit == "tokens"
        assert effect.longer_share == 1.0


def test_stated_pairs_have_a_share_but_no_slope():
    rows = [{"prompt": "p", "chosen": "long one", "rejected": "no"}, {"prompt": "q", "chosen": "y", "rejected": "no"}]
    effect = length_effect(rows)
    assert effect.longer_share == 0.5 and np.isnan(effect.slope) and effect.n_responses == 0
    same = length_effect([{"prompt": "p", "responses": ["ab", "cd"], "scores": [1.0, 0.0]}])
    assert same.slope == 0.0 and np.isnan(same.correlation) and same.longer_share == 0.5


def test_residuals_bring_the_planted_quality_back():
    """With a strong effect most pairs prefer what is longer; without it, nearly all prefer what is better."""
    rows, qualities = planted_rows(6.0)
    of_prompt = {row["prompt"]: quality for row, quality in zip(rows, qualities, strict=True)}

    def agreement(selection):
        return np.mean(
            [
                of_prompt[pair["prompt"]][pair["chosen"]] > of_prompt[pair["prompt"]][pair["rejected"]]
                for pair in selection.dataset
            ]
        )

    raw, controlled = (select(rows, control, budget=1.0) for control in (None, "residual"))
    assert agreement(raw) < 0.75 and agreement(controlled) > 0.95
    # Which pairs turned: those whose gap is smaller than what length explains of it.
    slope = length_effect(rows).slope
    candidates = read_candidates(rows)
    logs = np.log([len(text) for text in candidates.responses])[candidates.pairs]
    gaps = candidates.score_gaps - slope * (logs[:, 0] - logs[:, 1])
    ((reason, places),) = controlled.noted.items()
    assert reason.startswith("pair turned round") and len(places) == (gaps < 0).sum() > 20
    assert sorted(controlled.pairs["score_gap"].to_pylist()) == pytest.approx(sorted(np.abs(gaps)))
    # With and without the effect: the same numbers from either selection, but that pairs turned.
    measured, again = raw.lengths()["all"], controlled.lengths()["all"]
    assert measured["longer_share"] > 0.8 > 0.65 > again["longer_share"] > 0.35
    assert measured["gap"] == pytest.approx(candidates.score_gaps.mean())
    assert measured["controlled_gap"] == pytest.approx(gaps.mean())
    assert again["controlled_gap"] == pytest.approx(np.abs(gaps).mean())
    assert again["gap"] == pytest.approx((np.sign(gaps) * candidates.score_gaps).mean())


def test_pairs_that_turn_keep_what_belongs_to_each_response(model, tokenizer):
    """Token weights, log-probabilities, lengths and the row follow their response."""
    halves = []
    for row in planted_rows(6.0, n_prompts=5)[0]:
        for part in (slice(0, 3), slice(3, 6)):
            texts = row["responses"][part]
            weights = [[1.0 / (1 + len(text))] * (len(tokenizer(text)["input_ids"]) + 1) for text in texts]
            halves.append({**row, "responses": texts, "scores": row["scores"][part], "weights": weights})
    arguments = {"model": model, "processing_class": tokenizer, "budget": 1.0, "strategy": "bpo"}
    config = {"sketch_dim": 64, "token_weights": "weights"}
    raw, controlled = (select(halves, control, config=config, **arguments) for control in (None, "residual"))
    by_texts = {frozenset((pair["chosen"], pair["rejected"])): pair for pair in raw.dataset}
    turned = 0
    for pair in controlled.dataset:
        other = by_texts[frozenset((pair["chosen"], pair["rejected"]))]
        sides = ("chosen", "rejected") if pair["chosen"] == other["chosen"] else ("rejected", "chosen")
        turned += sides == ("rejected", "chosen")
        for name in ("{}", "weights_{}", "bpo_length_{}", "bpo_logp_{}", "bpo_ref_logp_{}"):
            for mine, theirs in zip(("chosen", "rejected"), sides, strict=True):
                assert pair[name.format(mine)] == other[name.format(theirs)]
        assert pair["chosen"] in halves[pair["bpo_row"]]["responses"]
        assert pair["bpo_score_gap"] >= 0 and pair["bpo_score_chosen"] > pair["bpo_score_rejected"]
    assert turned == sum(len(places) for reason, places in controlled.noted.items() if "turned round" in reason) > 10


def test_residuals_by_store_are_those_by_model(model, tokenizer, tmp_path):
    rows, _ = planted_rows(3.0, n_prompts=6, n_responses=4)
    arguments = {"strategy": "bpo", "store": tmp_path / "store", "budget": 12}
    config = {"sketch_dim": 64, "max_pairs_per_prompt": 4}
    first = select(rows, "residual", model=model, processing_class=tokenizer, config=config, **arguments)
    again = select(rows, "residual", config=config, **arguments)
    assert first.dataset.to_list() == again.dataset.to_list() and first.noted == again.noted
    assert np.bincount(first.pairs["prompt"].to_numpy()).tolist() == [4] * 6


def test_the_largest_gaps_are_those_left_after_control():
    rows, _ = planted_rows(5.0)
    every = select(rows, "residual", budget=1.0)
    capped = select(rows, "residual", budget=1.0, config={"max_pairs_per_prompt": 3})
    gaps = np.array(every.pairs["score_gap"].to_pylist())
    prompts = every.pairs["prompt"].to_numpy()
    expected = [sorted(gaps[prompts == prompt])[-3:] for prompt in range(12)]
    found = np.array(capped.pairs["score_gap"].to_pylist()).reshape(12, 3)
    np.testing.assert_allclose(np.sort(found, axis=1), expected)
    candidates = read_candidates(rows)
    capped_first = read_candidates(rows, max_pairs_per_prompt=3)
    assert (
        candidates.score_gaps[largest_gaps(candidates.prompt_of_pair, candidates.score_gaps, 3)].tolist()
        == capped_first.score_gaps.tolist()
    )


def test_residuals_need_scores():
    rows = [{"prompt": f"p{i}", "chosen": "yes, it is", "rejected": "no"} for i in range(4)]
    with pytest.raises(ValueError, match="needs scores, but 4 of 4 pairs have none, such as that of row 0"):
        select(rows, "residual")
    with pytest.raises(ValueError, match="length_control must be one of"):
        SelectConfig(length_control="both")


@pytest.mark.parametrize("strategy", ["bpo", "uniform", "random", "margin"])
def test_balance_keeps_budget_breadth_and_depth(strategy, model, tokenizer):
    rows, _ = planted_rows(4.0)
    arguments = {"strategy": strategy, "model": model, "processing_class": tokenizer, "budget": 24}
    config = {"sketch_dim": 64, "max_depth": 3 if strategy == "margin" else None}
    plain, balanced = (select(rows, control, config=config, **arguments) for control in (None, "balance"))
    assert plain.lengths()["kept"]["longer_share"] > 0.65
    assert balanced.lengths()["kept"]["longer_share"] == pytest.approx(0.5, abs=1 / 24)
    assert len(balanced) == 24 == balanced.depth.sum() and balanced.depth.max() <= (config["max_depth"] or 24)
    assert (balanced.depth > 0).sum() == (plain.depth > 0).sum()
    again = select(rows, "balance", config=config, **arguments)
    assert again.dataset.to_list() == balanced.dataset.to_list()


def test_exchanges_within_prompts_lose_the_least_that_is_possible():
    """Against all ways to keep the depth of every prompt and as many pairs of either kind."""
    for seed in range(8):
        generator = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(3), 5)
        differences = np.where(generator.random(15) < 0.6, 1, -1) * generator.integers(1, 9, 15)
        keys = generator.random(15) + 0.5 * (differences > 0)
        chosen = np.zeros(15, dtype=bool)
        for prompt in range(3):
            members = np.flatnonzero(prompts == prompt)
            chosen[members[np.argsort(-keys[members])[:2]]] = True
        found = balance_lengths(chosen, keys, np.ones(15, dtype=bool), prompts, differences)
        ways = itertools.product(*(itertools.combinations(np.flatnonzero(prompts == p), 2) for p in range(3)))
        totals = [keys[np.ravel(way)].sum() for way in ways if abs(np.sign(differences[np.ravel(way)]).sum()) <= 1]
        if totals:
            assert abs(np.sign(differences[found]).sum()) <= 1 and np.bincount(prompts[found]).tolist() == [2] * 3
            assert keys[found].sum() == pytest.approx(max(totals))


def test_exchanges_between_prompts_lose_no_prompt_and_respect_the_cap():
    prompts = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    differences = np.array([5, 4, 3, -1, -2, -3, 1, 0])
    keys = np.array([9.0, 8.0, 7.0, 1.0, np.nan, 3.0, 5.0, 6.0])
    chosen = np.array([1, 1, 1, 1, 0, 0, 1, 0], dtype=bool)
    eligible = np.ones(8, dtype=bool)
    # Pair 6 is the least useful, but the only one of its prompt; pair 5 is the more useful of those that may come.
    found = balance_lengths(chosen, keys, eligible, prompts, differences)
    assert np.flatnonzero(found).tolist() == [0, 1, 3, 5, 6]
    chosen[7] = True
    found = balance_lengths(chosen, keys, eligible, prompts, differences)
    assert np.flatnonzero(found).tolist() == [0, 1, 2, 3, 5, 7]
    assert (balance_lengths(chosen, keys, eligible, prompts, differences, max_depth=1) == chosen).all()
    eligible[[4, 5]] = False
    assert (balance_lengths(chosen, keys, eligible, prompts, differences) == chosen).all()


def test_what_cannot_be_balanced_is_said():
    rows = [{"prompt": f"p{i}", "responses": ["short", "rather longer"], "scores": [0.0, 1.0]} for i in range(6)]
    with pytest.warns(UserWarning, match="6 of the kept pairs prefer the longer response and 0 the shorter one"):
        selection = select(rows, "balance", budget=6)
    assert len(selection) == 6


def test_summary_and_report_show_length(tmp_path):
    rows, _ = planted_rows(4.0)
    for control in (None, "residual", "balance"):
        selection = select(rows, control)
        kept, every = selection.lengths()["kept"], selection.lengths()["all"]
        expected = (
            f"preferred response longer in {kept['longer_share']:.1%} of pairs kept, {every['longer_share']:.1%} of "
            f"all; mean score gap with its effect {kept['gap']:.3f} kept, {every['gap']:.3f} all, without "
            f"{kept['controlled_gap']:.3f} and {every['controlled_gap']:.3f}"
        )
        assert expected in selection.summary()
        page = selection.report(tmp_path / "report.html").read_text()
        for value in (f"{100 * kept['longer_share']:.1f} %", f"{every['controlled_gap']:.3f}"):
            assert value in page
        loaded = Selection.load(selection.save(tmp_path / str(control)))
        assert loaded.lengths() == selection.lengths()
        assert {"bpo_length_ratio", "bpo_length_effect"} <= set(loaded.dataset.column_names)
    stated = [{"prompt": f"p{i}", "chosen": "yes, it is", "rejected": "no"} for i in range(4)]
    selection = select(stated, None, budget=2)
    assert "longer in 100.0% of pairs kept, 100.0% of all\n" in selection.summary() + "\n"
    assert "mean score gap" not in selection.report(tmp_path / "stated.html").read_text()
    earlier = Selection(
        **{
            **{name: getattr(selection, name) for name in ("dataset", "depth", "strategy", "budget", "seed", "config")},
            "pairs": selection.pairs.drop_columns(["length_ratio", "length_effect"]),
            "skipped": {},
        }
    )
    assert earlier.lengths() is None and "longer in" not in earlier.summary()
    assert 'id="length"' not in earlier.report(tmp_path / "earlier.html").read_text()


def test_length_is_controlled_in_the_trainer_too(model_path, tmp_path):
    rows = scored_rows(6, 4)
    args = bpo.BPOConfig(
        str(tmp_path),
        budget=12,
        strategy="random",
        select_config={"length_control": "balance"},
        max_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = bpo.BPOTrainer(model_path, args=args, train_dataset=datasets.Dataset.from_list(rows))
    assert trainer.selection.lengths()["kept"]["longer_share"] == pytest.approx(0.5, abs=1 / 12)
