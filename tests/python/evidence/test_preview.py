"""The preview against selections and logistic regressions made one by one."""

import json

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import bpo
from bpo.cli.main import main
from bpo.evidence.preview.results import ALL
from bpo.selection.strategies.register import STRATEGIES
from tiny import build_tokenizer, scored_rows

ROWS = scored_rows(24, 4)
CONFIG = {"sketch_dim": 64, "sketch_dtype": "float32"}
ARMS = [
    "bpo",
    "random",
    "margin",
    {"name": "two a prompt", "strategy": "uniform", "select": {"max_depth": 2}},
    {"name": "farthest", "strategy": "bpo", "select": {"ranking": "farthest", "n_clusters": 3}},
    {"name": "design", "strategy": "d_optimal", "breadth": 9},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("preview") / "store"
    bpo.collect_gradients(model, ROWS, store=path, processing_class=tokenizer, config=CONFIG, progress=False)
    return path


@pytest.fixture
def preview(store):
    def run(**arguments):
        given = {"budget": [12, 20], "arms": ARMS, "seeds": 3, "progress": False, **arguments}
        return bpo.preview(store, given.pop("dataset", ROWS), **given)

    return run


def split(seed):
    """Rows to train on, and held out."""
    held = set(np.random.default_rng([seed, 1]).permutation(24)[:6].tolist())
    return ([row for i, row in enumerate(ROWS) if (i in held) == side] for side in (False, True))


class Regression:
    """A logistic regression on the pairs of a selection, by scikit-learn."""

    def __init__(self, store, train, test):
        self.opened, self.train, self.test = bpo.GradientStore.open(store), train, test

    def features(self, rows):
        candidates = bpo.read_candidates(rows)
        h = self.opened.sketches(self.opened.rows_of_responses(candidates.response_ids)[0])[candidates.pairs]
        return h[:, 0] - h[:, 1]

    def __call__(self, selection, normalize=True):
        """Returns which held-out pairs are ranked rightly, and whether their preferred response is longer (1, −1)."""
        candidates = bpo.read_candidates(self.train)
        preferred = [candidates.responses[i] for i in candidates.pairs[:, 0]]
        pairs, chosen = selection.dataset["bpo_pair"][:], selection.dataset["chosen"][:]
        signs = [1 if preferred[pair] == text else -1 for pair, text in zip(pairs, chosen, strict=True)]
        x = self.features(self.train)[pairs] * np.array(signs)[:, None]
        norms = np.linalg.norm(x, axis=1)
        x = x / (norms[:, None] if normalize else norms.mean())
        model = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-8, max_iter=1000)
        model.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)), sample_weight=np.full(2 * len(x), 0.5))
        candidates = bpo.read_candidates(self.test)
        lengths = self.opened.records["length"][self.opened.rows_of_responses(candidates.response_ids)[0]].astype(int)
        return self.features(self.test) @ model.coef_[0] > 0, np.sign(np.diff(-lengths[candidates.pairs], axis=1)[:, 0])


@pytest.mark.parametrize("normalize", [True, False])
def test_accuracies_are_those_of_a_logistic_regression_on_what_select_chooses(preview, store, normalize):
    found = preview(normalize=normalize, regularization=0.5)
    for seed in range(3):
        train, test = split(seed)
        regression = Regression(store, train, test)
        for name, arm in (("bpo", "bpo"), ("margin", "margin"), ("random", "random"), ("farthest", "bpo")):
            config = {"min_depth": 0, **({"ranking": "farthest", "n_clusters": 3} if name == "farthest" else {})}
            for position, budget in enumerate(found.budgets):
                selection = bpo.select(
                    None, train, budget=budget, strategy=arm, store=store, config=config, seed=seed, progress=False
                )
                right, longer = regression(selection, normalize)
                place = found.arms.index(name), position, seed
                assert found.accuracy[place] == pytest.approx(right.mean(), abs=1.5 / len(right))
                if (longer == 1).any() and (longer == -1).any():
                    both = [right[longer == side].mean() for side in (1, -1)]
                    assert found.length_controlled[place] == pytest.approx(np.mean(both), abs=0.1)


def test_length_control_is_that_of_select(preview, store):
    """Of scores that are mostly length, so that pairs turn round."""
    rows = [
        {**row, "scores": [len(text) / 10 + score for text, score in zip(row["responses"], row["scores"], strict=True)]}
        for row in ROWS
    ]
    arms = [
        {"name": f"{strategy} {control}", "strategy": strategy, "select": {"length_control": control}}
        for strategy in ("bpo", "coreset")  # "margin" reads no store, and so counts characters
        for control in ("residual", "balance")
    ]
    found = preview(dataset=rows, arms=arms, regularization=0.5)
    turned = changed = 0
    for seed in range(3):
        train, test = ([rows[ROWS.index(row)] for row in part] for part in split(seed))
        regression = Regression(store, train, test)
        for arm in arms:
            config = {"min_depth": 0, **arm["select"]}
            for position, budget in enumerate(found.budgets):
                selection, plain = (
                    bpo.select(
                        None,
                        train,
                        budget=budget,
                        strategy=arm["strategy"],
                        store=store,
                        config={**config, "length_control": control},
                        seed=seed,
                        progress=False,
                    )
                    for control in (config["length_control"], None)
                )
                right, _ = regression(selection)
                place = found.arms.index(arm["name"]), position, seed
                assert found.accuracy[place] == pytest.approx(right.mean(), abs=1.5 / len(right))
                turned += sum(len(places) for what, places in selection.noted.items() if "turned round" in what)
                changed += set(selection.dataset["bpo_pair"]) != set(plain.dataset["bpo_pair"])
    assert turned and changed >= 20


def test_budgets_depths_and_the_arm_of_all(preview):
    found = preview()
    assert found.arms == ["bpo", "random", "margin", "two a prompt", "farthest", "design", ALL]
    assert found.budgets == [12, 20] and found.accuracy.shape == (7, 2, 3)
    assert found.heldout_share == 0.25 and found.n_pairs == 18 * 6 and found.n_heldout == 6 * 6
    np.testing.assert_array_equal(found.mean_depth[-1], 6)
    assert (found.mean_depth[5, 1] >= 20 / 9).all()
    assert not np.isnan(found.accuracy).any()
    np.testing.assert_array_equal(found.accuracy[-1, 0], found.accuracy[-1, 1])
    again = preview(config={"threads": 1})
    np.testing.assert_array_equal(again.accuracy, found.accuracy)


def test_weights_count_in_the_fit(preview, store):
    """A pair of weight 2 is one that is there twice; one of weight 0 is not there."""
    candidates = bpo.read_candidates(ROWS)
    texts = candidates.responses
    pairs = [
        {"prompt": candidates.prompts[p], "chosen": texts[i], "rejected": texts[j], "weight": 1.0}
        for p, (i, j) in zip(candidates.prompt_of_pair, candidates.pairs, strict=True)
    ]
    train, test = pairs[: 16 * 6], pairs[16 * 6 :]
    plain = preview(dataset=train, heldout=test, arms=["random"], budget=5, seeds=1)
    for index, pair in enumerate(train):
        pair["weight"] = float(index % 3)
    weighted = preview(dataset=train, heldout=test, arms=["random"], budget=5, seeds=1)
    opened = bpo.GradientStore.open(store)
    h = opened.sketches(opened.rows_of_responses(candidates.response_ids)[0])[candidates.pairs]
    z = h[:, 0] - h[:, 1]
    x = z[: 16 * 6] / np.linalg.norm(z[: 16 * 6], axis=1, keepdims=True)
    weights = np.arange(16 * 6) % 3
    model = LogisticRegression(fit_intercept=False, tol=1e-8)
    model.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)), sample_weight=np.tile(weights / 2, 2))
    right = z[16 * 6 :] @ model.coef_[0] > 0
    assert weighted.accuracy[-1, 0, 0] == pytest.approx(right.mean(), abs=1.5 / len(right))
    assert plain.n_pairs == 96 and weighted.n_pairs == 64


def test_an_arm_that_cannot_use_its_budget_is_left_out(preview):
    with pytest.warns(UserWarning, match="The arm 'best_worst' chooses 18 pairs of a budget of 20 and is left out"):
        found = preview(arms=["bpo", "best_worst"])
    assert np.isnan(found.accuracy[1, 1]).all() and not np.isnan(found.accuracy[1, 0]).any()
    assert "random" in found.arms  # the baseline is added
    few, many = found.summary().split("20 pairs")
    assert "left out" not in few and "nan" not in many
    assert "best_worst left out, since it cannot choose so many pairs" in " ".join(many.split())
    with pytest.raises(ValueError, match="'best_worst' cannot be compared at 20 pairs"):
        found.difference("best_worst", 20)
    with pytest.raises(ValueError, match="The preview has no arm 'less'; it has bpo, best_worst, random, all cand"):
        found.difference("less", 12)


def test_heldout_data_of_its_own(preview):
    found = preview(dataset=ROWS[:16], heldout=ROWS[16:], seeds=2)
    assert found.heldout_share is None and found.n_heldout == 8 * 6 and found.n_pairs == 16 * 6


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory, model, tokenizer):
    """A store of all but the last prompt."""
    path = tmp_path_factory.mktemp("preview") / "embeddings"
    config = {**CONFIG, "sketch_dim": 128, "features": "embeddings"}
    bpo.collect_gradients(model, ROWS[:-1], store=path, processing_class=tokenizer, config=config, progress=False)
    return path


def test_an_arm_that_chooses_by_a_store_of_its_own_is_judged_by_that_of_the_preview(preview, store, embeddings):
    arm = {"name": "by embeddings", "strategy": "bpo", "store": embeddings, "select": {"n_clusters": 5}}
    again = {**arm, "name": "same store", "store": store}
    gradients = {"name": "by gradients", "strategy": "bpo", "select": {"n_clusters": 5}}
    with pytest.warns(bpo.InvalidDataWarning, match="pair of a response that the store does not hold"):
        found = preview(arms=["random", arm, again, gradients], seeds=3, config={"sketch_dim": 64})
    assert found.n_pairs == 17 * 6 and found.n_heldout == 6 * 6  # of the 23 prompts that both stores hold
    assert found.settings["arms"]["by embeddings"]["store"] == str(embeddings)
    assert found.settings["arms"]["by embeddings"]["select"]["features"] == "embeddings"
    one, same, other = (found.accuracy[found.arms.index(name)] for name in ("by gradients", "same store", arm["name"]))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()

    # By hand: chosen from the embeddings, fitted and judged with the gradients.
    rows, opened = ROWS[:-1], bpo.GradientStore.open(store)

    def features(rows):
        candidates = bpo.read_candidates(rows)
        h = opened.sketches(opened.rows_of_responses(candidates.response_ids)[0])[candidates.pairs]
        return h[:, 0] - h[:, 1]

    for seed in range(3):
        held = set(np.random.default_rng([seed, 1]).permutation(23)[:6].tolist())
        train, test = ([row for i, row in enumerate(rows) if (i in held) == side] for side in (False, True))
        config = {"min_depth": 0, "n_clusters": 5}
        selection = bpo.select(None, train, budget=20, store=embeddings, config=config, seed=seed, progress=False)
        x = features(train)[selection.dataset["bpo_pair"][:]]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-8, max_iter=1000)
        model.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)), sample_weight=np.full(2 * len(x), 0.5))
        right = features(test) @ model.coef_[0] > 0
        assert other[1, seed] == pytest.approx(right.mean(), abs=1.5 / len(right))


def test_stores_of_arms_that_cannot_be_used(preview, embeddings, tmp_path):
    for given, error, message in (
        ({"store": tmp_path}, FileNotFoundError, "The arm 'bpo': .* holds no gradient store"),
        ({"store": 3}, ValueError, "The arm 'bpo': store must be the directory or address of a gradient store, got 3"),
        (
            {"store": embeddings, "select": {"sketch_dim": 32}},
            bpo.StoreMismatchError,
            "made with sketch_dim=128, and config asks for 32",
        ),
    ):
        with pytest.raises(error, match=message):
            preview(arms=[{"name": "bpo", **given}])


def test_responses_that_begin_at_two_tokens_need_the_tokenizer(model, model_path, tokenizer, tmp_path):
    """The end of a prompt merges with one response, so that the others begin earlier in their pairs with it."""
    responses = ["d green cat", " two", " blue star", " tea milk bread"]
    rows = [{"prompt": f"{row['prompt']} re", "responses": responses, "scores": row["scores"]} for row in ROWS[:8]]
    path, saved = tmp_path / "store", model_path
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"store": path, "config": CONFIG, "progress": False, "budget": 12}
    with pytest.warns(UserWarning, match="are not a prefix of prompt"):
        expected = bpo.select(model, rows, processing_class=tokenizer, **given)
    assert len(bpo.GradientStore.open(path)) == 8 * 7  # three of the four begin at two tokens
    asked = {"budget": 6, "arms": ["bpo", "margin"], "seeds": 2, "progress": False}
    for call in (bpo.audit, lambda *of: bpo.preview(*of, **asked), lambda _, of: bpo.select(None, of, **given)):
        with pytest.raises(ValueError, match=r"holds 24 responses more than once.* Pass the tokenizer"):
            call(path, rows)
    found = bpo.select(None, rows, processing_class=tokenizer, **given)
    assert found.pairs.equals(expected.pairs) and found.dataset[:] == expected.dataset[:]
    assert bpo.audit(path, rows, processing_class=saved, progress=False).pairs.num_rows == 48
    own = bpo.preview(path, rows, processing_class=saved, **asked)
    residual = bpo.preview(path, rows, processing_class=saved, **asked, config={"length_control": "residual"})
    assert np.isfinite(own.accuracy).all() and np.isfinite(residual.accuracy).all()
    command = [str(path), str(tmp_path / "rows.jsonl"), "--processing_class", str(saved), "--quiet"]
    assert main(["preview", *command, "--budget", "6", "--seeds", "1"]) == 0
    assert main(["audit", *command]) == 0
    assert main(["reselect", *command, "--budget", "12", "--output", str(tmp_path / "again")]) == 0
    assert bpo.Selection.load(tmp_path / "again").pairs.equals(expected.pairs)
    other = build_tokenizer()
    other.chat_template = None
    with pytest.raises(bpo.StoreMismatchError, match="made with another tokenizer than processing_class"):
        bpo.preview(path, rows, processing_class=other, **asked)


def test_all_strategies_or_the_reason_why_not(preview, store, tmp_path, capsys):
    every = set(STRATEGIES)
    found = preview(arms="all", seeds=1, budget=12)
    assert set(found.left_out) == {"less", "irm", "lossdiff_irm"} and set(found.arms) == every - set(found.left_out) | {
        ALL
    }
    assert found.left_out["less"] == "a preview has no target"
    assert "strategy='irm' compares the policy with its reference" in found.left_out["irm"]
    assert not np.isnan(found.accuracy).any()
    alone = preview(arms=["easiest", "epig", "two_sigma"], seeds=1, budget=12)
    for name in ("easiest", "epig", "two_sigma"):  # which share with others what they are chosen by
        assert found.accuracy[found.arms.index(name)] == alone.accuracy[alone.arms.index(name)]
    assert "left out\n  less: a preview has no target" in found.summary()
    found.save(tmp_path / "all.json")
    assert bpo.Preview.load(tmp_path / "all.json").left_out == found.left_out

    stated = [
        {"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][i + 1]}
        for row in ROWS
        for i in (0, 2)
    ]
    left_out = preview(arms="all", seeds=1, budget=12, dataset=stated).left_out
    assert left_out["margin"] == left_out["bees"] == "it reads scores, and 48 pairs have none"
    assert {"margin", "two_sigma", "air", "best_worst", "alignment_potential"} < set(left_out) < every
    preview(arms="all", seeds=1, budget=12, config={"length_control": "residual"})

    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["preview", str(store), str(tmp_path / "data.jsonl"), "--budget", "12", "--seeds", "1"]
    assert main([*command, "--all"]) == 0
    assert "irm: strategy='irm' compares the policy with its reference" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--all", "--arm", "bpo"])


def test_table_summary_and_file(preview, tmp_path):
    found = preview(seeds=4)
    rows = found.table()
    assert [row["arm"] for row in rows] == found.arms * 2
    bpo_row = next(row for row in rows if row["arm"] == "bpo")
    assert bpo_row["difference"] == pytest.approx((found.accuracy[0, 0] - found.accuracy[1, 0]).mean())
    assert bpo_row["low"] <= bpo_row["difference"] <= bpo_row["high"]
    assert all((row["p"] is None) == (row["arm"] == "random") for row in rows)
    summary = found.summary()
    assert "12 pairs" in summary and "two a prompt" in summary
    picture = found.figure(tmp_path / "preview.svg").read_text()
    assert "two a prompt" in picture and "20 pairs" in picture
    with pytest.raises(ValueError, match=r"ends in .svg, .png or .pdf"):
        found.figure(tmp_path / "preview.gif")
    found.save(tmp_path / "preview.json")
    loaded = bpo.Preview.load(tmp_path / "preview.json")
    assert loaded.summary() == summary
    (tmp_path / "other.json").write_text('{"arms": []}')
    with pytest.raises(ValueError, match=r"other.json is no saved preview"):
        bpo.Preview.load(tmp_path / "other.json")


def test_the_command(store, embeddings, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = [
        "preview",
        str(store),
        str(tmp_path / "data.jsonl"),
        "--budget",
        "12",
        "--budget",
        "20",
        "--seeds",
        "2",
    ]
    arm = json.dumps({"name": "k=2", "strategy": "bpo", "select": {"n_clusters": 2}})
    assert main([*arguments, "--arm", "margin", "--arm", arm, "--output", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "k=2" in printed and "20 pairs" in printed and (tmp_path / "out.json").is_file()
    arm = json.dumps({"name": "by embeddings", "strategy": "bpo", "store": str(embeddings)})
    assert main([*arguments, "--arm", arm]) == 0
    printed = capsys.readouterr()
    assert "by embeddings" in printed.out and "6 × pair of a response that the store does not hold" in printed.err
    assert main([*arguments, "--arm", "{"]) == 1
    assert "bpo: --arm { is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arms": ["best"]}, "The arm 'best' has strategy 'best'; it must be one of"),
        ({"arms": "bpo"}, "arms must be a list of arms, or 'all' for every strategy, got 'bpo'"),
        ({"arms": ["irm"]}, "strategy='irm' compares the policy with its reference, and here it is its own"),
        ({"arms": "all", "baseline": "irm"}, "The baseline 'irm' cannot be had here: strategy='irm' compares"),
        ({"arms": ["less"]}, "a preview has no target for strategy 'less'"),
        ({"arms": ["bpo", {"name": "bpo"}]}, "Two arms are called 'bpo'"),
        (
            {"arms": [{"name": "bpo", "select": {"trust": "right"}}]},
            "the column of trust is one for all",
        ),
        ({"arms": [{"strategy": "bpo"}]}, "An arm has a name and any of"),
        ({"arms": [{"name": "a", "strategy": "bpo", "breadth": 50}]}, "has breadth=50, and there are 18 prompts"),
        ({"budget": 500}, r"budget=500 is above the 108 candidates of the training prompts \(seed 0\)"),
        ({"budget": 0}, "budget must be whole numbers of at least 1, got 0"),
        ({"budget": [5, 5]}, "several different ones"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"heldout": 1.5}, "heldout must be a share above 0 and below 1"),
        ({"heldout": 0.01}, "24 prompts cannot be split with heldout=0.01"),
        ({"regularization": 0}, "regularization must be above 0"),
        ({"baseline": "none"}, "baseline must be the name of an arm, got 'none'"),
    ],
)
def test_errors_name_the_culprit(preview, arguments, message):
    with pytest.raises(ValueError, match=message):
        preview(**arguments)
