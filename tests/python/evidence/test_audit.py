"""Audits of labels where the truth is known: planted worlds, and what is said where nothing can be told."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

import bpo
from bpo.cli.main import main
from bpo.pairs.left_out import left_out_margins
from bpo.pairs.pair_gradients import PairGradients
from bpo.pairs.wrong_labels import wrong_labels
from tiny import scored_rows

ROWS = scored_rows(24, 4)
CONFIG = {"sketch_dim": 64, "sketch_dtype": "float32"}
DIM, RESPONSES, PROMPTS = 64, 5, 240


class World:
    """Responses of random gradients whose worth is a direction of these and a part that no gradient tells."""

    def __init__(self, seed, *, flipped=0.0, signal=1.0, own=0.3, one_by_one=False, prompts=PROMPTS):
        generator = np.random.default_rng(seed)
        direction = generator.normal(size=DIM)
        self.rows = generator.normal(size=(prompts * RESPONSES, DIM)).astype(np.float32)
        lengths = generator.uniform(0.2, 5, size=(len(self.rows), 1)).astype(np.float32)
        unit = self.rows / np.linalg.norm(self.rows, axis=1, keepdims=True)
        worth = signal * unit @ direction + own * generator.normal(size=len(unit))
        self.rows = unit * lengths
        self.prompts = np.repeat(np.arange(prompts), RESPONSES * (RESPONSES - 1) // 2)
        first, second = np.triu_indices(RESPONSES, 1)
        base = RESPONSES * np.arange(prompts)[:, None]
        left, right = (base + first).ravel(), (base + second).ravel()
        better = worth[left] > worth[right]
        self.flipped = np.zeros(len(left), dtype=bool)
        if one_by_one:
            self.flipped = generator.random(len(left)) < flipped
        elif flipped:
            # As scores do it: whole prompts judged the wrong way round.
            self.flipped = (generator.random(prompts) < flipped)[self.prompts]
        wins = better ^ self.flipped
        self.pairs = np.where(wins[:, None], np.stack([left, right], 1), np.stack([right, left], 1))

    def gradients(self):
        ones = np.ones((len(self.pairs), 2), dtype=np.float32)
        return PairGradients(self.rows, self.pairs, ones)

    def audit(self, wrong_share=None):
        left_out = left_out_margins([self.gradients()], self.prompts)
        return left_out, wrong_labels(left_out, self.prompts, wrong_share)


def auroc(suspicion, wrong):
    ranks = np.argsort(np.argsort(suspicion)) + 1
    n = wrong.sum()
    return (ranks[wrong].sum() - n * (n + 1) / 2) / (n * (~wrong).sum())


def leave_out(world, pair, *, whole_prompt, penalty, worth):
    """The margin of a pair from a ridge regression without its prompt or itself, in the plainest way."""
    unit = world.rows.astype(np.float64) / np.linalg.norm(world.rows, axis=1, keepdims=True)
    x = unit[world.pairs[:, 0]] - unit[world.pairs[:, 1]]
    of_response = np.zeros((len(x), len(unit)))
    of_response[np.arange(len(x)), world.pairs[:, 0]] = of_response[np.arange(len(x)), world.pairs[:, 1]] = 1
    of_response[np.arange(len(x)), world.pairs[:, 1]] = -1
    scale = penalty * (x**2).sum(axis=1).mean()
    own = np.flatnonzero(world.prompts == world.prompts[pair])
    others = np.flatnonzero(world.prompts != world.prompts[pair])
    # Responses of other prompts have no worth of their own, as in the code.
    covariance = x @ x.T / scale
    covariance[np.ix_(own, own)] += worth * of_response[own] @ of_response[own].T
    known = others if whole_prompt else np.setdiff1d(np.arange(len(x)), [pair])
    inner = covariance[np.ix_(known, known)] + np.eye(len(known))
    return covariance[pair, known] @ np.linalg.solve(inner, np.ones(len(known)))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_margins_are_those_of_regressions_that_leave_the_label_out(one_by_one):
    world = World(1, flipped=0.2, one_by_one=one_by_one, prompts=30)
    found = world.audit()[0]
    assert found.one_by_one == one_by_one
    assert (found.worth > 0) == one_by_one
    for pair in (0, 7, 155):
        settings = {"penalty": found.penalty, "worth": found.worth}
        plain = leave_out(world, pair, whole_prompt=not one_by_one, **settings)
        assert found.margins[pair] == pytest.approx(plain, rel=1e-6, abs=1e-9)


def test_a_label_has_no_say_in_its_own_margin(monkeypatch):
    monkeypatch.setattr("bpo.pairs.left_out._PENALTIES", (30.0,))
    monkeypatch.setattr("bpo.pairs.left_out._WORTHS", (0.1,))
    world = World(2, flipped=0.2, one_by_one=True)
    turned = world.pairs.copy()
    turned[5] = turned[5][::-1]
    margins = [
        left_out_margins([world.gradients()._replace(pairs=pairs)], world.prompts).margins
        for pairs in (world.pairs, turned)
    ]
    assert margins[1][5] == pytest.approx(-margins[0][5])


def test_several_stores_tell_more_than_one():
    world = World(3, flipped=0.2)
    generator = np.random.default_rng(0)
    halves = []
    for columns in (slice(0, 32), slice(32, 64)):
        shuffled = generator.permutation(len(world.rows))  # each store has its own order
        rows = np.empty_like(world.rows[:, columns])
        rows[shuffled] = world.rows[:, columns]
        halves.append(PairGradients(rows, shuffled[world.pairs], np.ones((len(world.pairs), 2), dtype=np.float32)))
    one, both = (auroc(-left_out_margins(part, world.prompts).margins, world.flipped) for part in (halves[:1], halves))
    assert both > one + 0.05


@pytest.mark.parametrize(("one_by_one", "share", "least"), [(False, 0.2, 0.85), (True, 0.1, 0.95), (True, 0.35, 0.77)])
def test_planted_wrong_labels_are_found_and_counted(one_by_one, share, least):
    found = []
    for seed in range(3):
        world = World(seed, flipped=share, one_by_one=one_by_one)
        _, labels = world.audit()
        assert labels.tells and labels.p_value < 1e-6
        assert auroc(labels.probability, world.flipped) > least
        assert labels.low <= world.flipped.mean() + 0.02 and labels.high >= world.flipped.mean() - 0.02
        found.append((labels.probability, world.flipped))
    probability, flipped = (np.concatenate(part) for part in zip(*found, strict=True))
    assert probability.mean() == pytest.approx(flipped.mean(), abs=0.06)
    for low in np.arange(0, 1, 0.2):
        there = (probability >= low) & (probability < low + 0.2)
        if there.sum() > 150:
            assert probability[there].mean() == pytest.approx(flipped[there].mean(), abs=0.12)


def test_clean_labels_are_not_suspected():
    world = World(0)
    _, labels = world.audit()
    assert labels.share < 0.06 and (labels.probability > 0.5).mean() < 0.04


def test_a_known_share_is_taken_as_given():
    world = World(4, flipped=0.2)
    _, labels = world.audit(0.2)
    assert [labels.share, labels.low, labels.high] == pytest.approx([0.2] * 3)
    assert labels.probability.mean() == pytest.approx(0.2, abs=0.05)


def test_where_gradients_tell_nothing_every_label_has_the_base_rate():
    told = 0
    for seed in range(20):
        _, labels = World(seed, signal=0.0, own=1.0, prompts=80).audit()
        told += labels.tells
        if not labels.tells:
            assert np.ptp(labels.probability) == 0 and labels.probability[0] == labels.share
    assert told <= 1


def test_circles_tell_how_many_labels_are_wrong_where_gradients_do_not():
    _, labels = World(0, flipped=0.3, signal=0.0, own=1.0, one_by_one=True).audit()
    assert labels.share == pytest.approx(0.3, abs=0.05)


def test_the_order_of_pairs_does_not_matter():
    world = World(5, flipped=0.2, one_by_one=True)
    order = np.random.default_rng(0).permutation(len(world.pairs))
    _, labels = world.audit()
    gradients = world.gradients().take(order)
    left_out = left_out_margins([gradients], world.prompts[order])
    again = wrong_labels(left_out, world.prompts[order])
    np.testing.assert_allclose(again.probability, labels.probability[order], rtol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux does")
def test_an_audit_takes_no_more_memory_than_is_counted():
    """Its matrix has d × d numbers, and so has what finds its eigenvectors."""
    code = """
import numpy as np
from bpo.config import SelectConfig
from bpo.pairs.left_out import left_out_margins
from bpo.pairs.pair_gradients import PairGradients
from bpo.pairs.size import ChoiceSize

def peak():
    return 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

def audited(dim, prompts):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((2 * prompts, dim)).astype(np.float16)
    pairs = np.arange(2 * prompts).reshape(-1, 2)
    open("/proc/self/clear_refs", "w").write("5")
    begin = peak()
    left_out_margins([PairGradients(rows, pairs, np.ones((prompts, 2), np.float32))], np.arange(prompts))
    sizes = [ChoiceSize(len(rows), prompts, dim, SelectConfig(n_clusters=1), audited=it) for it in (False, True)]
    return peak() - begin, sizes[1].needed_bytes - sizes[0].needed_bytes

audited(16, 4)  # whatever is done once
print(*audited(1536, 40), *audited(64, 6000))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wide, counted, many, counted_of_many = map(int, done.stdout.split())
    assert counted / 2 < wide < counted, (wide, counted)
    assert many < counted_of_many + 6000 * 500, (many, counted_of_many)


@pytest.fixture(scope="module")
def store(tmp_path_factory, model, tokenizer):
    path = tmp_path_factory.mktemp("audit") / "store"
    bpo.collect_gradients(model, ROWS, store=path, processing_class=tokenizer, config=CONFIG, progress=False)
    return path


def told_by_gradients(store, reverse=()):
    """Rows whose scores are what their gradients say, along the direction in which these differ most; some reversed."""
    opened = bpo.GradientStore.open(store)
    candidates = bpo.read_candidates(ROWS)
    sketches = opened.sketches(opened.rows_of_responses(candidates.response_ids)[0])
    unit = sketches / np.linalg.norm(sketches, axis=1, keepdims=True)
    worth = unit @ np.linalg.svd(unit - unit.mean(axis=0))[2][0]
    score = dict(zip(candidates.responses, worth.tolist(), strict=True))
    assert len(score) == len(worth)
    return [
        {**row, "scores": [score[text] * (-1 if at in reverse else 1) for text in row["responses"]]}
        for at, row in enumerate(ROWS)
    ]


@pytest.fixture
def audit(store):
    def run(rows=ROWS, **arguments):
        return bpo.audit(store, rows, progress=False, **arguments)

    return run


def test_an_audit_tells_of_pairs_prompts_and_sources(audit, store):
    rows = [{**row, "source": f"judge {at % 2}"} for at, row in enumerate(told_by_gradients(store, reverse=(3, 11)))]
    found = audit(rows, worst=3)
    candidates = bpo.read_candidates(rows)
    assert found.pairs.num_rows == len(candidates.pairs)
    assert found.pairs["row"].to_pylist() == candidates.pair_rows.tolist()
    assert found.pairs["score_gap"].to_pylist() == pytest.approx(candidates.score_gaps.tolist())
    np.testing.assert_allclose(found.pairs["trust"].to_numpy() + found.pairs["wrong"].to_numpy(), 1)
    assert found.prompts["pairs"].to_pylist() == np.bincount(candidates.prompt_of_pair).tolist()
    contradicted = found.pairs["margin"].to_numpy() < 0
    for group in found.groups:
        own = candidates.pair_rows % 2 == int(group["value"][-1])
        assert group["contradicted"] == pytest.approx(contradicted[own].mean())
        assert group["low"] <= group["contradicted"] <= group["high"] and group["pairs"] == own.sum()
    assert [group["value"] for group in found.groups] and len(found.groups) == 2
    assert "judge 1" in found.summary()
    wrong = found.pairs["wrong"].to_numpy()
    assert len(found.worst) == 3 and found.worst[0]["wrong"] == wrong.max() > wrong.min()
    worst = found.worst[0]
    row = rows[worst["row"]]
    assert worst["prompt_text"] == row["prompt"] and {worst["chosen"], worst["rejected"]} <= set(row["responses"])
    assert row["scores"][row["responses"].index(worst["chosen"])] == worst["score_chosen"] > worst["score_rejected"]


def test_an_audit_is_the_same_each_time_and_in_any_order_of_rows(audit):
    found, again, turned = audit(), audit(), audit(ROWS[::-1])
    assert found.pairs.equals(again.pairs)
    last = len(ROWS) - 1

    def by_pair(table, row_of):
        keys = ("row", "chosen", "rejected")
        return {(row_of(r["row"]), r["chosen"], r["rejected"]): r["margin"] for r in table.to_pylist() if keys}

    first, second = by_pair(found.pairs, int), by_pair(turned.pairs, lambda row: last - row)
    assert first.keys() == second.keys()
    assert all(second[key] == pytest.approx(first[key], rel=1e-6, abs=1e-9) for key in first)


def test_a_saved_audit_is_loaded_as_it_was(audit, tmp_path):
    found = audit()
    loaded = bpo.Audit.load(found.save(tmp_path / "audit.json"))
    assert loaded.summary() == found.summary() and loaded.to_dict() == found.to_dict()
    (tmp_path / "other.json").write_text(json.dumps({"pairs": {}}))
    with pytest.raises(ValueError, match=r"other\.json is no saved audit"):
        bpo.Audit.load(tmp_path / "other.json")


def test_trust_of_rows_is_a_column_that_select_takes(audit):
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][a], "rejected": row["responses"][b]}
        for row in ROWS
        for a, b in ((0, 1), (2, 3))
    ]
    found = audit(pairs, wrong_share=0.3)
    column = found.row_trust()
    assert column == pytest.approx(found.pairs["trust"].to_pylist())
    doubtful = np.array([1, 4, 5, 30])
    rows = [{**row, "right": 0.4 if at in doubtful else 0.6} for at, row in enumerate(pairs)]
    with pytest.warns(bpo.InvalidDataWarning, match="more likely wrong than right"):
        selection = bpo.select(None, rows, budget=20, strategy="random", config={"trust": "right"}, progress=False)
    assert not set(selection.pairs["row"].to_pylist()) & set(doubtful.tolist())
    assert selection.config["trust"] == "right"
    assert len(selection.skipped["pair whose label is more likely wrong than right"]) == len(doubtful)


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS[:1], {}, "there are those of 1"),
        (ROWS, {"by": "nobody"}, "by names nobody, but the columns are"),
        (ROWS, {"wrong_share": 0.5}, "wrong_share must be above 0 and below 0.5"),
        (ROWS, {"worst": -1}, "worst must be"),
        ([{**row, "scores": [1.0] * 4} for row in ROWS], {}, "nothing to select"),
    ],
)
def test_bad_input_is_refused_by_name(audit, rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        audit(rows, **arguments)


def test_memory_beyond_a_limit_is_refused(store):
    with pytest.raises(
        ValueError, match=r"max_memory is 1 MiB, and auditing 1\d\d pairs of 96 responses takes 1\d\d MiB"
    ):
        bpo.audit(store, ROWS, config={**CONFIG, "max_memory": "1MiB"}, progress=False)


def test_a_store_of_other_data_is_refused(audit, store):
    with pytest.raises(bpo.StoreMismatchError, match="holds the responses of none"):
        audit([{**row, "prompt": f"other {row['prompt']}"} for row in ROWS])
    with pytest.raises(ValueError, match="several different ones"):
        bpo.audit([store, store], ROWS, progress=False)


def test_the_page_shows_texts_as_text(audit, tmp_path, store, model, tokenizer):
    rows = [{**row, "source": "<script>alert(1)</script>"} for row in ROWS]
    hostile = "<img src=x onerror=alert(2)> \u202e {{ 7 * 7 }}"
    found = dataclasses.replace(audit(rows), skipped={hostile: ["row 1"]})
    for record in found.worst:
        record.update(prompt_text=hostile, chosen=hostile, rejected="</bdi></div><script>alert(3)</script>")
    page = found.report(tmp_path / "audit.html").read_text(encoding="utf-8")
    assert page.count("<script") == 1 and "<img" not in page and "{{ 7 * 7 }}" in page
    assert "&lt;script&gt;alert(1)" in page and "&lt;img src=x" in page and "&lt;/bdi&gt;" in page
    assert page.count("<bdi>") == page.count("</bdi>") > 3 * len(found.worst)
    assert "://" not in page


def test_the_command_prints_a_summary_or_json_and_writes_a_page(store, tmp_path, capsys):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(ROWS))
    arguments = ["audit", str(store), str(data), "--worst", "2"]
    page, saved = tmp_path / "page.html", tmp_path / "audit.json"
    assert main([*arguments, "--output", str(page), "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("label audit of") and str(page) in printed
    assert page.is_file() and bpo.Audit.load(saved).summary() in printed
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["worst"]) == 2 and len(values["pairs"]["wrong"]) == bpo.Audit.load(saved).pairs.num_rows
    assert main(["audit", str(store), str(data), "--wrong-share", "0.7"]) == 1
    assert "wrong_share must be" in capsys.readouterr().err


def test_select_sets_suspects_aside_and_says_so(store, tmp_path):
    rows = told_by_gradients(store, reverse=(3, 11))
    found = bpo.audit(store, rows, progress=False)
    assert found.tells
    suspects = found.pairs.filter(pa.compute.greater(found.pairs["wrong"], 0.5))
    assert set(suspects["prompt"].to_pylist()) & {3, 11}
    every = found.pairs.num_rows - suspects.num_rows
    for strategy, budget in (("best_worst", 15), ("random", every), ("bpo", every), ("matching", every)):
        config = {"trust": "audit", "min_depth": 0}
        with pytest.warns(bpo.InvalidDataWarning, match="more likely wrong than right"):
            selection = bpo.select(
                None, rows, store=store, budget=budget, strategy=strategy, config=config, progress=False
            )
        untrusted = [row["pair"] for row in selection.pairs.to_pylist() if row["fate"] == "untrusted"]
        assert untrusted == suspects["pair"].to_pylist()
        assert selection.fates()["untrusted"] == len(untrusted) > 0
        assert len(selection.skipped["pair whose label is more likely wrong than right"]) == len(untrusted)
        assert f"{len(untrusted)} whose label looks wrong" in selection.summary()
        assert len(selection) == budget and min(selection.dataset["bpo_trust"]) >= 0.5
        selection.save(tmp_path / strategy)
        loaded = bpo.Selection.load(tmp_path / strategy)
        assert loaded.config["trust"] == "audit" and loaded.summary() == selection.summary()


def test_select_says_where_an_audit_cannot_tell(store):
    generator = np.random.default_rng(0)
    rows = [{**row, "scores": generator.permutation(4).astype(float).tolist()} for row in ROWS]
    config = {"trust": "audit", "min_depth": 0}
    selection = bpo.select(None, rows, store=store, budget=10, strategy="random", config=config, progress=False)
    assert any("cannot tell" in reason for reason in selection.noted)
    assert selection.fates()["untrusted"] == 0


def test_an_audit_needs_gradients_and_a_column_must_be_there():
    with pytest.raises(ValueError, match="needs a model; model is None"):
        bpo.select(None, ROWS, budget=10, strategy="best_worst", config={"trust": "audit"}, progress=False)
    with pytest.raises(ValueError, match="needs the columns sure"):
        bpo.select(None, ROWS, budget=10, strategy="random", config={"trust": "sure"}, progress=False)
    with pytest.raises(ValueError, match=r"SelectConfig\.trust must be text or None"):
        bpo.SelectConfig(trust=0.5)
    rows = [{**row, "sure": 2 if at == 4 else 1} for at, row in enumerate(ROWS)]
    with pytest.warns(bpo.InvalidDataWarning, match=r"must be a number from 0 to 1"):
        bpo.select(None, rows, budget=20, strategy="random", config={"trust": "sure", "min_depth": 0}, progress=False)


def test_arms_of_a_preview_with_and_without_trust_choose_otherwise(store):
    rows = told_by_gradients(store, reverse=(3, 11))
    arms = ["random", {"name": "trusting", "strategy": "random", "select": {"trust": "audit"}}]
    found = bpo.preview(store, rows, budget=[20], arms=arms, seeds=3, progress=False)
    assert (found.accuracy[0] != found.accuracy[1]).any()
