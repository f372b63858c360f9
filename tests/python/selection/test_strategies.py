"""Each strategy, through ``select``, against a small reference of its own; usefulness; strategies of users."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import bpo
from bpo import SelectConfig
from bpo.selection.strategies.register import STRATEGIES
from references import greedy_design, greedy_matching, pursuit
from tiny import WORDS, scored_rows

CONFIG = SelectConfig(sketch_dim=64, sketch_dtype="float32", n_clusters=4)
BETA = CONFIG.beta


def target_rows():
    generator = np.random.default_rng(5)
    text = lambda: " ".join(generator.choice(WORDS, 5))  # noqa: E731
    return [
        {"prompt": f"target {i}?", "chosen": text(), "rejected": text(), "subtask": ["sums", "poems"][i % 2]}
        for i in range(6)
    ]


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, tokenizer):
    """The gradients of the candidates and of the target, so that the model runs once."""
    path = tmp_path_factory.mktemp("strategies") / "store"
    arguments = {"processing_class": tokenizer, "config": CONFIG, "store": path, "progress": False}
    bpo.select(model, scored_rows(), budget=5, strategy="less", target=target_rows(), **arguments)
    bpo.select(model, scored_rows(), budget=10, **arguments)  # the target does not make it the store of other data
    assert len(bpo.GradientStore.open(path)) == 50 + 12
    return path


@pytest.fixture
def select(store, rows):
    def run(budget=20, strategy="bpo", **arguments):
        changes = arguments.pop("changes", {})
        config = dataclasses.replace(CONFIG, **changes)
        given = {"config": config, "store": store, "progress": False, **arguments}
        return bpo.select(None, given.pop("rows", rows), budget=budget, strategy=strategy, **given)

    return run


def sketches(store, rows):
    """h of the preferred and of the other response of each candidate pair, (P, 2, d), from the store's own files."""
    candidates = bpo.read_candidates(rows)
    opened = bpo.GradientStore.open(store)
    index, several = opened.rows_of_responses(candidates.response_ids)
    assert not several.any()
    return opened.sketches(index)[candidates.pairs].astype(np.float64)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def picked(selection):
    return selection.dataset["bpo_pair"][:]


def test_less_is_the_mean_cosine_with_the_closest_subtask(select, store, rows):
    selection = select(12, "less", target=target_rows())
    z = unit(np.subtract(*sketches(store, rows).transpose(1, 0, 2)))
    t = unit(np.subtract(*sketches(store, target_rows()).transpose(1, 0, 2)))
    cosines = z @ t.T
    influence = np.maximum(cosines[:, ::2].mean(axis=1), cosines[:, 1::2].mean(axis=1))
    np.testing.assert_allclose(selection.pairs["alignment"], influence, atol=1e-5)
    assert picked(selection) == sorted(np.argsort(-influence)[:12].tolist())
    # Subtasks matter: with none the mean over all decides.
    flat = [{key: value for key, value in row.items() if key != "subtask"} for row in target_rows()]
    np.testing.assert_allclose(select(12, "less", target=flat).pairs["alignment"], cosines.mean(axis=1), atol=1e-5)
    assert selection.pairs["cluster"].null_count == 100


def test_less_over_checkpoints_weighs_by_the_learning_rates(tmp_path, model, tokenizer, rows):
    model.save_pretrained(tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    other = {name: value + 0.02 * value.std() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", state_dict=other)
    tokenizer.save_pretrained(tmp_path / "b")
    rates = {str(tmp_path / "a"): 3e-5, str(tmp_path / "b"): 1e-5}
    config = dataclasses.replace(CONFIG, checkpoints=rates)
    arguments = {"budget": 5, "strategy": "less", "target": target_rows(), "progress": False}
    both = bpo.select(str(tmp_path / "a"), rows, config=config, **arguments)
    influences = []
    for path in rates:
        one = dataclasses.replace(CONFIG, checkpoints={path: 1.0})
        per_subtask = [
            bpo.select(str(tmp_path / "a"), rows, config=one, **{**arguments, "target": target_rows()[first::2]}).pairs[
                "alignment"
            ]
            for first in (0, 1)
        ]
        influences.append(np.array(per_subtask, dtype=np.float64))
    expected = (0.75 * influences[0] + 0.25 * influences[1]).max(axis=0)
    np.testing.assert_allclose(both.pairs["alignment"], expected, atol=1e-5)
    with pytest.raises(ValueError, match="'d_optimal' needs the gradients of one model"):
        bpo.select(str(tmp_path / "a"), rows, budget=5, strategy="d_optimal", config=config)


def test_a_target_turns_the_direction_of_bpo(select):
    config = {"usefulness": {"alignment": 1.0}}
    plain, turned = select(20, changes=config), select(20, changes=config, target=target_rows())
    assert picked(plain) != picked(turned)
    assert turned.pairs["cluster"].equals(plain.pairs["cluster"])


def test_coreset_is_a_pursuit_of_each_clusters_mean(select, store, rows):
    selection = select(24, "coreset")
    z = -unit(np.subtract(*sketches(store, rows).transpose(1, 0, 2)))
    labels = selection.pairs["cluster"].to_numpy()
    chosen = picked(selection)
    for cluster in range(4):
        members = np.flatnonzero(labels == cluster)
        own = [pair for pair in chosen if labels[pair] == cluster]
        expected, weights = pursuit(z[members], len(own))
        assert sorted(members[expected].tolist()) == own
        ranked = selection.pairs["usefulness"].to_numpy()[members[expected]]
        np.testing.assert_allclose(ranked, weights, atol=1e-5)


def direction_of(x, penalty):
    """Where training on pairs of unit gradients −x leads, by scikit-learn."""
    doubled, labels = np.concatenate([x, -x]), np.repeat([1, -1], len(x))  # it asks for both classes
    return (
        LogisticRegression(C=0.5 / penalty, fit_intercept=False, tol=1e-10, max_iter=10_000)
        .fit(doubled, labels)
        .coef_[0]
    )


def penalty_of(x, prompts, seed=0):
    """The largest of the penalties that rank most pairs of left-out prompts rightly."""
    order = np.random.default_rng(seed).permutation(prompts.max() + 1)
    fold = order[prompts] % 5
    right = {}
    for penalty in (1000, 100, 10, 1):
        fitted = [direction_of(x[fold != left_out], penalty) for left_out in range(5)]
        right[penalty] = sum((x[fold == k] @ fitted[k] > 0).sum() for k in range(5))
    return max(right, key=right.get)


def test_matching_adds_up_to_the_direction_of_training(select, store, rows):
    selection = select(24, "matching", changes={"max_depth": 3}, seed=0)
    x = unit(np.subtract(*sketches(store, rows).transpose(1, 0, 2)))
    prompts = np.array(selection.pairs["prompt"])
    direction = direction_of(x, penalty_of(x, prompts))
    picks, cosines = greedy_matching(x, direction, 24, prompts=prompts, max_depth=3)
    assert picked(selection) == sorted(picks)
    assert selection.pairs["usefulness"].to_numpy()[picks].tolist() == [-turn for turn in range(24)]
    assert selection.depth.max() == 3
    total = x[picks].sum(axis=0)
    assert cosines[-1] == pytest.approx(total @ direction / np.linalg.norm(total) / np.linalg.norm(direction), abs=1e-4)
    # In another order of k-means nothing changes: there are no clusters in it.
    assert picked(select(24, "matching", changes={"max_depth": 3, "n_clusters": 2}, seed=0)) == picked(selection)


@pytest.mark.parametrize("weighting", ["size", "informativeness"])
@pytest.mark.parametrize("min_depth", [0, 1])
def test_bpo_matches_within_the_shares_of_clusters(select, store, rows, weighting, min_depth):
    changes = {"max_depth": 3, "min_depth": min_depth, "cluster_weighting": weighting}
    selection = select(24, changes=changes, seed=0)
    x = unit(np.subtract(*sketches(store, rows).transpose(1, 0, 2)))
    table = selection.pairs.to_pandas()
    prompts, clusters = table["prompt"].to_numpy(), table["cluster"].to_numpy().astype(int)
    weights = None
    if weighting != "size":
        weights = table.groupby("cluster")[weighting].mean().reindex(range(clusters.max() + 1), fill_value=0).to_numpy()
    limits = {"prompts": prompts, "min_depth": min_depth, "max_depth": 3}
    direction = direction_of(x, penalty_of(x, prompts))
    picks, _ = greedy_matching(x, direction, 24, **limits, clusters=clusters, cluster_weights=weights)
    assert picked(selection) == sorted(picks) != picked(select(24, "matching", changes={"max_depth": 3}, seed=0))
    # Behind those that are taken come the others, by how far they agree with the direction.
    ranks = table["usefulness"].to_numpy()
    assert ranks[picks].tolist() == [-turn for turn in range(24)]
    others = np.setdiff1d(np.arange(len(x)), picks)
    assert others[np.argsort(-(x @ direction)[others])].tolist() == others[np.argsort(-ranks[others])].tolist()
    assert sorted(ranks) == [-rank for rank in reversed(range(len(x)))]
    named = select(24, changes={**changes, "usefulness": "matching"}, seed=0)
    assert picked(named) == picked(selection)


def test_matching_goes_where_a_target_does(select, store, rows):
    """Of a target's pairs each is left out by itself."""
    selection = select(15, "matching", target=target_rows())
    x = unit(np.subtract(*sketches(store, rows).transpose(1, 0, 2)))
    wanted = unit(np.subtract(*sketches(store, target_rows()).transpose(1, 0, 2)))
    direction = direction_of(wanted, penalty_of(wanted, np.arange(6)))
    picks, _ = greedy_matching(x, direction, 15)
    assert picked(selection) == sorted(picks) != picked(select(15, "matching"))


def test_matching_does_not_depend_on_threads(select):
    one, two = (select(30, "matching", changes={"threads": threads}) for threads in (1, 2))
    assert picked(one) == picked(two)


def test_d_optimal_grows_the_determinant_most(select, store, rows):
    selection = select(30, "d_optimal")
    pairs = sketches(store, rows)
    v = 0.5 * BETA * (pairs[:, 0] - pairs[:, 1])  # the policy is its own reference, so μ = 1/2
    scale = (np.linalg.norm(v, axis=1) ** 2).mean() / 64
    prompts = np.array(selection.pairs["prompt"])
    expected, gains = greedy_design(v, 30, scale, prompts, 100, np.ones(100, dtype=bool))
    assert picked(selection) == sorted(expected)
    np.testing.assert_allclose(selection.pairs["usefulness"].to_numpy()[expected], gains, rtol=1e-4)
    # λ matters: a large one leaves the lengths alone to decide.
    longest = np.argsort(-np.linalg.norm(v, axis=1))[:30]
    assert picked(select(30, "d_optimal", changes={"regularization": 1e6})) == sorted(longest.tolist())


def test_d_optimal_and_fused_margins_read_the_implicit_margins(tmp_path, model, tokenizer, rows):
    """With log π_ref from the data Δ is not zero."""
    generator = np.random.default_rng(0)
    for row in rows:
        row["ref_logps"] = generator.normal(-60, 15, 5).tolist()
    config = dataclasses.replace(CONFIG, ref_model="columns")
    arguments = {"config": config, "store": tmp_path, "processing_class": tokenizer, "progress": False}
    fused = bpo.select(model, rows, budget=15, strategy="fused_margin", **arguments)
    table = fused.pairs.to_pandas()
    ratios = [table[f"logp_{side}"] - table[f"ref_logp_{side}"] for side in ("chosen", "rejected")]
    margins = BETA * (ratios[0] - ratios[1]).to_numpy(dtype=np.float64)
    gaps = table["score_gap"].to_numpy()
    p, q = 1 / (1 + np.exp(-gaps / gaps.std())), 1 / (1 + np.exp(-margins))
    probability = p * q / (p * q + (1 - p) * (1 - q))
    assert picked(fused) == sorted(np.argsort(-probability, kind="stable")[:15].tolist())

    design = bpo.select(model, rows, budget=15, strategy="d_optimal", **arguments)
    pairs = sketches(tmp_path, rows)
    v = (BETA * np.sqrt(q * (1 - q)))[:, None] * (pairs[:, 0] - pairs[:, 1])
    scale = (np.linalg.norm(v, axis=1) ** 2).mean() / 64
    expected, _ = greedy_design(v, 15, scale, table["prompt"].to_numpy(), 100, np.ones(100, dtype=bool))
    assert picked(design) == sorted(expected)


def test_best_worst_takes_one_pair_a_prompt(select, rows):
    selection = select(10, "best_worst")
    assert selection.depth.tolist() == [1] * 10 and selection.dataset["bpo_score_gap"][:] == [4.0] * 10
    few, other = select(4, "best_worst"), select(4, "best_worst", seed=1)
    assert set(picked(few)) < set(picked(selection)) and picked(few) != picked(other)
    with pytest.warns(UserWarning, match="10 pairs are kept of the 40 asked for, because of strategy='best_worst'"):
        assert len(select(40, "best_worst")) == 10


def test_usefulness_is_a_weighted_sum_of_standardised_terms(select):
    weights = {"centrality": 1.0, "informativeness": -0.5, "score_gap": 2.0}
    selection = select(20, changes={"usefulness": weights})
    table = selection.pairs.to_pandas()
    terms = {
        "centrality": table["centrality"],
        "informativeness": np.log(table["informativeness"]),
        "score_gap": table["score_gap"],
    }
    expected = sum(
        weight * (terms[name] - terms[name].mean()) / terms[name].std(ddof=0) for name, weight in weights.items()
    )
    np.testing.assert_allclose(table["usefulness"], expected, atol=1e-4)
    # What each pair has by itself, for the rankings that ask for it.
    both = {"centrality": 1.0, "alignment": 1.0}
    ranked = [select(20, changes={"ranking": "farthest", "usefulness": terms}) for terms in (None, both)]
    assert picked(ranked[0]) == picked(ranked[1]) != picked(select(20, changes={"usefulness": both}))
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in target_rows()]
    with pytest.raises(ValueError, match="strategy='bpo' needs scores, but 6 of 6 pairs have none"):
        select(6, changes={"usefulness": weights}, rows=rows)


@pytest.mark.parametrize("strategy", ["bpo", "uniform"])
def test_min_depth_lets_prompts_go_where_it_is_not_1(select, strategy):
    with pytest.raises(ValueError, match=r"budget=6 is below the 10 prompts: .* or leave SelectConfig.min_depth=None"):
        select(6, strategy, changes={"min_depth": 1})
    assert picked(select(6, strategy)) == picked(select(6, strategy, changes={"min_depth": 0}))
    for budget in (10, 12):
        assert picked(select(budget, strategy)) == picked(select(budget, strategy, changes={"min_depth": 1}))
    if strategy == "bpo":  # uniform depth is uniform anyway
        assert picked(select(12, strategy)) != picked(select(12, strategy, changes={"min_depth": 0}))
    selection = select(6, strategy, changes={"min_depth": 0, "usefulness": {"centrality": 1.0}})
    assert len(selection) == 6 and (selection.depth == 0).any()
    if strategy == "bpo":
        table = selection.pairs.to_pandas()
        # Nothing left out of a cluster is more central than what it keeps.
        for _, members in table.groupby("cluster"):
            kept = members["fate"] == "selected"
            worst = members.loc[kept, "centrality"].min() if kept.any() else np.inf
            assert kept.all() or worst >= members.loc[~kept, "centrality"].max()


def every_other(candidacy):
    chosen = candidacy.eligible & (np.arange(len(candidacy.eligible)) % 2 == 0)
    chosen[np.flatnonzero(chosen)[candidacy.budget :]] = False
    return chosen, candidacy.clusters.informativeness


@pytest.fixture
def register():
    yield bpo.register_strategy
    for name in [name for name in STRATEGIES if name.startswith("mine")]:
        del STRATEGIES[name]


def test_a_strategy_of_ones_own(select, register):
    register("mine", every_other, needs={"gradients"})
    selection = select(7, "mine")
    assert picked(selection) == [0, 2, 4, 6, 8, 10, 12]
    assert selection.pairs["usefulness"].to_pylist() == pytest.approx(selection.pairs["informativeness"].to_pylist())
    with pytest.raises(ValueError, match="needs a model; model is None"):
        select(7, "mine", store=None)
    register("mine", every_other, needs={"clusters"}, keeps_every_prompt=True)
    with pytest.raises(ValueError, match="budget=7 is below the 10 prompts: strategy='mine' keeps"):
        select(7, "mine", changes={"min_depth": 1})


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda c: (c.eligible, c.score_gaps), "chose 100 pairs of a budget of 7"),
        (lambda c: (np.arange(7), c.score_gaps), r"as bool of shape \(100,\), got int64 of shape \(7,\)"),
        (lambda c: (c.eligible & False, np.zeros(3)), r"ranked by in shape \(100,\), got \(3,\)"),
    ],
)
def test_what_a_strategy_returns_is_checked(select, register, choose, message):
    register("mine", choose)
    with pytest.raises(ValueError, match=message):
        select(7, "mine")


def test_errors_name_the_culprit(select, register):
    with pytest.raises(ValueError, match="'bpo' is a strategy of bpo's own"):
        register("bpo", every_other)
    with pytest.raises(ValueError, match="needs has 'logits'; it may have scores, gradients"):
        register("mine", every_other, needs={"logits"})
    with pytest.raises(TypeError, match="choose must be a function"):
        register("mine", "bpo")
    with pytest.raises(ValueError, match="strategy='less' needs a target"):
        select(5, "less")
    with pytest.raises(ValueError, match=r"usefulness has no term 'length'; it has centrality, alignment, inf"):
        SelectConfig(usefulness={"length": 1})
    with pytest.raises(ValueError, match=r"usefulness='matching' is what a pair adds .* ranking='softmax' needs terms"):
        SelectConfig(usefulness="matching", ranking="softmax")
    with pytest.raises(ValueError, match="usefulness must be 'matching', or map terms to weights, got 'margin'"):
        SelectConfig(usefulness="margin")
    with pytest.raises(ValueError, match="usefulness must have finite weights, got nan for 'centrality'"):
        SelectConfig(usefulness={"centrality": float("nan")})
    with pytest.raises(ValueError, match=r"usefulness must be 'matching', or map terms to weights, got \{\}"):
        SelectConfig(usefulness={})
    with pytest.raises(ValueError, match="min_depth must be 0, 1 or None, got 2"):
        SelectConfig(min_depth=2)
