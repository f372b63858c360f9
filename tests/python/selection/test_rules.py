"""The rules of others, each against a small reference of its own."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

import bpo
from bpo import SelectConfig
from bpo.pairs.linear import cross_fitted_margins, training_direction
from bpo.pairs.pair_gradients import PairGradients
from bpo.selection.strategies.candidacy import Candidacy
from bpo.selection.strategies.register import STRATEGIES, run_strategy
from references import greedy_design, most_informative
from tiny import WORDS, scored_rows

CONFIG = SelectConfig(sketch_dim=32, sketch_dtype="float32", ref_model="columns", n_clusters=4)
BETA = CONFIG.beta
BY_SCORES = ("margin", "two_sigma", "air")
ONE_A_PROMPT = ("best_worst", "two_sigma")
HELDOUT = ("easiest", "smallest_margin", "bees", "lossdiff", "bald", "epig")
RULES = (*BY_SCORES, "alignment_potential", "irm", "lossdiff_irm", *HELDOUT, "largest_norm", "smallest_norm")


def rows_with_reference():
    """Scores that tie here and there, and a reference of its own."""
    generator, rows = np.random.default_rng(3), scored_rows()
    for row in rows:
        row["scores"] = np.round(generator.normal(5, 2, 5) * 2).tolist()
        row["ref_logps"] = generator.normal(-60, 15, 5).tolist()
    return rows


def target_rows():
    generator = np.random.default_rng(5)
    text = lambda: " ".join(generator.choice(WORDS, 5))  # noqa: E731
    rows = [{"prompt": f"target {i}?", "chosen": text(), "rejected": text()} for i in range(6)]
    return [{**row, "ref_chosen_logps": -40.0, "ref_rejected_logps": -40.0} for row in rows]


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("rules") / "store"
    arguments = {"processing_class": tokenizer, "config": CONFIG, "store": path, "progress": False}
    bpo.select(model, rows_with_reference(), budget=5, strategy="less", target=target_rows(), **arguments)
    return path


@pytest.fixture
def select(store):
    def run(strategy, budget=20, **arguments):
        config = dataclasses.replace(CONFIG, ref_model=None, **arguments.pop("changes", {}))
        given = {"config": config, "store": store, "seed": 0, "progress": False, **arguments}
        return bpo.select(None, given.pop("rows", rows_with_reference()), budget=budget, strategy=strategy, **given)

    return run


def picked(selection):
    return selection.dataset["bpo_pair"][:]


def largest(keys, budget):
    """The largest keys; of equal ones the earlier."""
    return sorted(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:budget])


def about_the_median(values):
    return -np.abs(rankdata(values) - (len(values) + 1) / 2)


def sketches(store, rows):
    """h of both responses of each pair, (P, 2, d), and the pairs."""
    candidates, opened = bpo.read_candidates(rows), bpo.GradientStore.open(store)
    index, _ = opened.rows_of_responses(candidates.response_ids)
    return opened.sketches(index)[candidates.pairs].astype(np.float64), candidates


def gradients(store, rows, table=None):
    """z of each pair: of the sigmoid loss at the policy as it is."""
    h, candidates = sketches(store, rows)
    margins = 0.0 if table is None else implicit(table)
    return np.asarray(-BETA / (1 + np.exp(margins)))[..., None] * (h[:, 0] - h[:, 1]), candidates.prompt_of_pair


def implicit(table):
    ratios = [table[f"logp_{side}"] - table[f"ref_logp_{side}"] for side in ("chosen", "rejected")]
    return BETA * (ratios[0] - ratios[1]).to_numpy(dtype=np.float64)


def heldout(z, prompts, seed=0):
    unit = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    return cross_fitted_margins(PairGradients.of_rows(unit), prompts, seed)


# By scores


def responses(n_prompts=7, n_responses=40, seed=0):
    generator = np.random.default_rng(seed)
    return [
        {
            "prompt": f"prompt {i}",
            "responses": [f"response {k}" for k in range(n_responses)],
            "scores": (np.round(generator.normal(0, 2 + 2 * i, n_responses)) / 2).tolist(),
        }
        for i in range(n_prompts)
    ]


def test_two_sigma_takes_the_best_against_the_one_below_the_mean():
    rows = responses()
    selection = bpo.select(None, rows, budget=7, strategy="two_sigma", progress=False)
    wider = 0
    for row, chosen, rejected in zip(rows, *(selection.dataset[side] for side in ("chosen", "rejected")), strict=True):
        scores = np.array(row["scores"])
        goal = scores.mean() - 2 * scores.std()
        nearest = int(np.abs(scores - goal).argmin())  # the first of equal ones
        assert chosen == f"response {scores.argmax()}"
        assert scores[int(rejected.split()[1])] == scores[nearest]
        wider += scores[nearest] > scores.min()
    assert wider >= 2  # where it is another than the worst
    few = bpo.select(None, rows, budget=3, strategy="two_sigma", progress=False)
    assert set(few.dataset["prompt"]) < {row["prompt"] for row in rows} and few.depth.max() == 1
    keys = selection.pairs["usefulness"].to_numpy()[picked(selection)]
    goals = np.array([np.mean(row["scores"]) - 2 * np.std(row["scores"]) for row in rows])
    away = np.abs(np.array(selection.dataset["bpo_score_rejected"]) - goals)
    np.testing.assert_allclose(keys, -away / [np.std(row["scores"]) for row in rows])


def test_two_sigma_of_few_responses_is_best_against_worst():
    rows = responses(n_responses=4)
    one, other = (bpo.select(None, rows, budget=7, strategy=name, progress=False) for name in ONE_A_PROMPT)
    assert one.dataset["rejected"][:] == other.dataset["rejected"][:]
    with pytest.warns(UserWarning, match="7 pairs are kept of the 9 asked for, because of strategy='two_sigma'"):
        bpo.select(None, rows, budget=9, strategy="two_sigma", progress=False)


def test_air_ranks_by_variance_gap_and_score():
    rows = responses(n_responses=6, seed=1)
    selection = bpo.select(None, rows, budget=25, strategy="air", progress=False)
    table = selection.pairs.to_pandas()
    deviation = np.array([np.std(rows[prompt]["scores"]) for prompt in table["prompt"]])
    share = lambda values: (rankdata(values) - 1) / (len(values) - 1)  # noqa: E731
    keys = (
        share(-deviation)
        + share(about_the_median(table["score_gap"]))
        + share((table["score_chosen"] + table["score_rejected"]) / 2)
    )
    np.testing.assert_allclose(table["usefulness"], keys, atol=1e-12)
    assert picked(selection) == largest(table["usefulness"].to_numpy(), 25)


@pytest.mark.parametrize("strategy", [*BY_SCORES, "best_worst", "bees", "alignment_potential", "fused_margin"])
def test_rules_by_scores_refuse_data_without(select, strategy):
    with pytest.raises(ValueError, match=f"strategy='{strategy}' needs scores, but 6 of 6 pairs have none"):
        select(strategy, 3, rows=target_rows())


# By log-probabilities


def test_alignment_potential_is_what_scores_know_and_the_policy_does_not(select):
    table = select("alignment_potential").pairs.to_pandas()
    each = [table[f"logp_{side}"] / table[f"length_{side}"] for side in ("chosen", "rejected")]
    known, gaps = np.abs(each[0] - each[1]).to_numpy(), table["score_gap"].to_numpy()
    keys = (gaps - gaps.mean()) / gaps.std() - (known - known.mean()) / known.std()
    np.testing.assert_allclose(table["usefulness"], keys, atol=1e-6)
    assert picked(select("alignment_potential")) == largest(table["usefulness"].to_numpy(), 20)


def test_irm_and_lossdiff_take_the_middle(select, store):
    rows = rows_with_reference()
    table = select("irm").pairs.to_pandas()
    before = implicit(table)
    assert picked(select("irm")) == largest(about_the_median(before), 20)
    z, prompts = gradients(store, rows, table)
    after = before + heldout(z, prompts)
    difference = np.log1p(np.exp(-before)) - np.log1p(np.exp(-after))
    assert picked(select("lossdiff")) == largest(about_the_median(difference), 20)
    both = np.minimum(about_the_median(before), about_the_median(difference))
    found = select("lossdiff_irm")
    assert picked(found) == largest(both, 20)
    # That is the intersection of two bands of one width.
    worst = max(np.abs(rankdata(values) - 47.5)[picked(found)].max() for values in (before, difference))
    inside = [np.abs(rankdata(values) - 47.5) <= worst for values in (before, difference)]
    assert set(picked(found)) <= set(np.flatnonzero(inside[0] & inside[1])) and (inside[0] & inside[1]).sum() <= 22


def test_lossdiff_trains_on_a_target_where_there_is_one(select, store):
    table = select("lossdiff").pairs.to_pandas()
    z, _ = gradients(store, rows_with_reference(), table)
    wanted, _ = gradients(store, target_rows())
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (z, wanted)]
    direction = training_direction(PairGradients.of_rows(unit[1].astype(np.float32)), np.arange(6), 0)
    before, trained = implicit(table), -unit[0] @ direction
    difference = np.log1p(np.exp(-before)) - np.log1p(np.exp(-before - trained))
    chosen = picked(select("lossdiff", target=target_rows()))
    assert chosen == largest(about_the_median(difference), 20) != picked(select("lossdiff"))


@pytest.mark.parametrize("strategy", ["irm", "lossdiff_irm", "fused_margin"])
def test_a_policy_that_is_its_own_reference_is_told(select, store, model, tokenizer, strategy, tmp_path):
    rows = [{name: row[name] for name in ("prompt", "responses", "scores")} for row in rows_with_reference()]
    arguments = {"strategy": strategy, "processing_class": tokenizer, "progress": False, "budget": 20}
    config = dataclasses.replace(CONFIG, ref_model=None)
    if strategy == "fused_margin":
        with pytest.warns(UserWarning, match="strategy='fused_margin' chooses as 'margin' does") as found:
            chosen = bpo.select(model, rows, config=config, **arguments)
        assert picked(chosen) == picked(bpo.select(None, rows, budget=20, strategy="margin", progress=False))
        assert len([warning for warning in found if "fused_margin" in str(warning.message)]) == 1
        return
    with pytest.raises(ValueError, match=f"strategy='{strategy}' compares the policy with its reference, and here it"):
        bpo.select(model, rows, config=config, **arguments)


@pytest.mark.parametrize("strategy", ["irm", "lossdiff_irm", "lossdiff", "alignment_potential", "fused_margin"])
def test_several_checkpoints_have_no_log_probabilities(select, strategy):
    with pytest.raises(ValueError, match=f"strategy='{strategy}' needs the log-probabilities of one model: leave out"):
        select(strategy, changes={"checkpoints": {"somewhere": 1.0}})


# By what training on the other prompts makes of a pair


def test_easiest_and_hardest_are_the_ends_of_the_heldout_margins(select, store):
    z, prompts = gradients(store, rows_with_reference(), select("irm").pairs.to_pandas())
    easiest, hardest = select("easiest"), select("smallest_margin")
    margins = easiest.pairs["usefulness"].to_numpy()
    np.testing.assert_allclose(margins, heldout(z, prompts), atol=1e-4)
    np.testing.assert_array_equal(hardest.pairs["usefulness"], -margins)
    losses = np.log1p(np.exp(-margins))
    assert picked(easiest) == largest(-losses, 20) and picked(hardest) == largest(losses, 20)


def test_bees_fuses_two_clipped_margins(select):
    table = select("easiest").pairs.to_pandas()
    one, other = table["score_gap"].to_numpy(), table["usefulness"].to_numpy()
    p = []
    for margins in (one, other):
        most = np.quantile(np.abs(margins), 0.99)
        p.append((np.clip(margins, -most, most) + most) / (2 * most))
    keys = [
        a * b / (a * b + (1 - a) * (1 - b)) if a * b + (1 - a) * (1 - b) > 0 else 0.5 for a, b in zip(*p, strict=True)
    ]
    found = select("bees")
    np.testing.assert_allclose(found.pairs["usefulness"], keys, atol=1e-12)
    assert picked(found) == largest(found.pairs["usefulness"].to_numpy(), 20)


def test_bees_does_not_divide_by_sources_that_contradict_each_other():
    candidacy = planted(score_gaps=np.array([1.0, 2.0, 2.0]), heldout_margins=np.array([0.0, -9.0, 9.0]), budget=3)
    np.testing.assert_allclose(run_strategy("bees", candidacy)[1], [0.75, 0.5, 1.0], atol=0.01)


@pytest.mark.parametrize("strategy", HELDOUT)
def test_one_prompt_cannot_be_left_out(select, strategy):
    with pytest.raises(ValueError, match=rf"strategy='{strategy}' leaves each prompt out in turn .* one prompt only"):
        select(strategy, 2, rows=rows_with_reference()[:1])


# By gradients


def test_norms_are_those_of_the_gradients(select, store):
    table = select("irm").pairs.to_pandas()
    z, _ = gradients(store, rows_with_reference(), table)
    norms = np.linalg.norm(z, axis=1)
    assert picked(select("largest_norm")) == largest(norms, 20)
    assert picked(select("smallest_norm")) == largest(-norms, 20)
    np.testing.assert_allclose(select("largest_norm").pairs["usefulness"], norms, rtol=1e-4)


def posterior(select, store):
    """Unit gradients, slopes and prior of the logistic model."""
    z, prompts = gradients(store, rows_with_reference(), select("irm").pairs.to_pandas())
    margins = heldout(z, prompts)
    slopes = np.exp(-margins) / (1 + np.exp(-margins)) ** 2
    return z / np.linalg.norm(z, axis=1, keepdims=True), slopes, slopes.mean() / 32, prompts


@pytest.mark.parametrize("most", [2, 100])
def test_bald_takes_what_tells_most_of_the_weights(select, store, most):
    x, slopes, prior, prompts = posterior(select, store)
    picks, growth = greedy_design(np.sqrt(slopes)[:, None] * x, 15, prior, prompts, most, np.ones(len(x), dtype=bool))
    selection = select("bald", 15, changes={"max_depth": most})
    assert picked(selection) == sorted(picks)
    np.testing.assert_allclose(selection.pairs["usefulness"].to_numpy()[picks], np.array(growth) / 2, rtol=1e-4)


@pytest.mark.parametrize("most", [2, 100])
@pytest.mark.parametrize("with_target", [False, True])
def test_epig_takes_what_tells_most_of_other_pairs(select, store, most, with_target):
    x, slopes, prior, prompts = posterior(select, store)
    targets, given = x, {}
    if with_target:
        z, _ = gradients(store, target_rows())
        targets, given = z / np.linalg.norm(z, axis=1, keepdims=True), {"target": target_rows()}
    picks, gains = most_informative(x, slopes, targets, prior, 8, prompts, most)
    selection = select("epig", 8, changes={"max_depth": most}, **given)
    assert picked(selection) == sorted(picks)
    np.testing.assert_allclose(selection.pairs["usefulness"].to_numpy()[picks], gains, rtol=2e-4)


def test_epig_draws_its_targets_where_there_are_many(monkeypatch):
    from bpo.selection.strategies import information

    monkeypatch.setattr(information, "_MOST_TARGETS", 10)
    some = run_strategy("epig", world(40, seed=1))
    assert run_strategy("epig", world(40, seed=1))[0].tolist() == some[0].tolist()
    monkeypatch.setattr(information, "_MOST_TARGETS", 40)
    assert not np.allclose(run_strategy("epig", world(40, seed=1))[1], some[1], equal_nan=True)


# All of them


def planted(**values):
    n = len(values["score_gaps"])
    given = {
        "prompt_of_pair": np.arange(n),
        "pair_scores": np.stack([values["score_gaps"], np.zeros(n)], axis=1),
        "lengths": np.full((n, 2), 10),
        "scores": np.ravel(np.stack([values["score_gaps"], np.zeros(n)], axis=1)),
        "prompt_of_response": np.repeat(np.arange(n), 2),
        "eligible": np.ones(n, dtype=bool),
        "config": SelectConfig(),
        "seed": 0,
    }
    return Candidacy(**{**given, **values})


def world(n, seed=0, **values):
    """Pairs with everything that a rule reads, of two a prompt, with ties among scores."""
    from bpo.pairs.clustering import cluster_pairs
    from bpo.pairs.pair_gradients import unit_features

    generator = np.random.default_rng(seed)
    z = generator.normal(size=(n, 24)).astype(np.float32)
    gaps, prompts = generator.integers(1, 5, size=n).astype(float), np.arange(n) // 2
    scores = np.stack([gaps + prompts % 3, np.full(n, prompts % 3)], axis=1).astype(float)
    pairs = PairGradients.of_rows(z)
    clusters = cluster_pairs(*pairs, config=SelectConfig(n_clusters=1))
    given = {
        "prompt_of_pair": prompts,
        "score_gaps": gaps,
        "pair_scores": scores,
        "scores": scores.ravel(),
        "prompt_of_response": np.repeat(prompts, 2),
        "budget": n // 4,
        "clusters": clusters,
        "features": unit_features(pairs, clusters.informativeness, clusters.usable),
        "heldout_margins": generator.normal(size=n),
        "logps": generator.normal(-30, 5, size=(n, 2)),
        "margins": generator.normal(size=n),
    }
    return planted(**{**given, **values})


@pytest.mark.parametrize("strategy", RULES)
def test_what_is_not_eligible_plays_no_part(strategy):
    """As if such pairs, whose figures are NaN, were not there; scores of their responses are those of the prompt."""
    whole = world(60)
    out = np.zeros(60, dtype=bool)
    out[[3, 4, 17, 30, 31, 59]] = True
    spoilt = dataclasses.replace(
        whole,
        eligible=~out,
        heldout_margins=np.where(out, np.nan, whole.heldout_margins),
        margins=np.where(out, np.nan, whole.margins),
        logps=np.where(out[:, None], np.nan, whole.logps),
        features=whole.features._replace(coefficients=np.where(out[:, None], np.nan, whole.features.coefficients)),
        clusters=dataclasses.replace(
            whole.clusters, informativeness=np.where(out, np.nan, whole.clusters.informativeness)
        ),
    )
    index = np.flatnonzero(~out)
    less = {
        name: getattr(whole, name)[index]
        for name in ("prompt_of_pair", "score_gaps", "pair_scores", "lengths", "heldout_margins", "logps", "margins")
    }
    without = dataclasses.replace(
        whole,
        **less,
        eligible=np.ones(54, dtype=bool),
        features=whole.features.take(index),
        clusters=dataclasses.replace(whole.clusters, informativeness=whole.clusters.informativeness[index]),
    )
    chosen, keys = run_strategy(strategy, spoilt)
    expected, ranked_by = run_strategy(strategy, without)
    assert np.flatnonzero(chosen).tolist() == index[expected].tolist() and chosen.sum() == 15
    np.testing.assert_array_equal(keys[index], ranked_by)
    assert np.isnan(keys[out]).all()


@pytest.mark.parametrize("strategy", RULES)
def test_every_rule_obeys_depth_and_budget_and_no_thread(select, strategy):
    one, two = (select(strategy, 10, changes={"max_depth": 1, "threads": threads}) for threads in (1, 2))
    assert one.depth.tolist() == [1] * 10
    assert one.pairs.equals(two.pairs)
    if strategy not in ONE_A_PROMPT:
        assert len(select(strategy, 33)) == 33


def test_rules_choose_by_several_checkpoints(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    other = {name: value + 0.02 * value.std() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", state_dict=other)
    tokenizer.save_pretrained(tmp_path / "b")
    config = {"sketch_dim": 32, "checkpoints": {str(tmp_path / "a"): 3e-5, str(tmp_path / "b"): 1e-5}}
    given = {"config": config, "store": tmp_path / "stores", "progress": False}
    for strategy in ("easiest", "largest_norm", "epig"):
        both = bpo.select(str(tmp_path / "a"), scored_rows(), budget=12, strategy=strategy, **given)
        assert len(both) == 12 and np.isfinite(both.pairs["usefulness"].to_numpy()[picked(both)]).all()


def test_the_easiest_come_first_where_that_is_asked_for(select, tmp_path):
    margins = select("easiest").pairs["usefulness"].to_numpy()
    for strategy in ("random", "bpo", "smallest_margin"):
        plain = select(strategy)
        ordered = select(strategy, changes={"order": "easiest_first"})
        assert picked(ordered) == sorted(picked(plain), key=lambda pair: -margins[pair]) != picked(plain)
        assert ordered.pairs["fate"].equals(plain.pairs["fate"])
        chosen = dict(zip(plain.dataset["bpo_pair"], plain.dataset["chosen"], strict=True))
        assert ordered.dataset["chosen"][:] == [chosen[pair] for pair in picked(ordered)]
    ordered.save(tmp_path / "selection")
    assert picked(bpo.Selection.load(tmp_path / "selection")) == picked(ordered)
    with pytest.raises(ValueError, match="strategy='random' with breadth=None needs a model; model is None"):
        select("random", changes={"order": "easiest_first"}, store=None)
    with pytest.raises(ValueError, match=r"order='easiest_first' leaves each prompt out in turn .* one prompt only"):
        select("random", 2, rows=rows_with_reference()[:1], changes={"order": "easiest_first"})
    with pytest.raises(ValueError, match=r"SelectConfig.order must be one of \['data', 'easiest_first'\], got 'best'"):
        SelectConfig(order="best")


def test_the_docs_have_every_strategy():
    text = (Path(__file__).parents[3] / "docs" / "strategies.md").read_text(encoding="utf-8")
    assert [name for name in STRATEGIES if f"| `{name}` |" not in text] == []
