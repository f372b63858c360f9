"""What pages are made of, as a parser sees them, and what their first words claim."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest

import bpo
from bpo.report.charts import histogram, scatter
from bpo.report.terms import characteristic_terms
from bpo.report.verdict import verdict
from pages import Page, check, dots

DEMO = Path(__file__).parents[3] / "demo" / "data"
HOSTILE = (
    "</script></style></bdi></svg><script>document.title='run'</script><img src=x onerror=alert(1)> \u202e{{ 7 * 7 }}"
)


def demo_rows():
    lines = (DEMO / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: json.loads(line)[name] for name in ("prompt", "responses", "scores", "kind")} for line in lines]


def chosen(rows, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"budget": 200, "config": {"min_depth": 0}, **arguments}
        return bpo.select(None, rows, store=DEMO / "gradients", progress=False, **arguments)


@pytest.fixture(scope="module")
def selection():
    return chosen(demo_rows())


def stated(n=6, text="", **columns):
    return [
        {"prompt": f"p{i} {text}", "responses": [f"good {i} {text}", f"bad {i} {text}", "so so"], "scores": [1, 0, 0.4]}
        | {name: values[i % len(values)] for name, values in columns.items()}
        for i in range(n)
    ]


def large(n_prompts, each, n_kept, seed=0):
    """A selection of many pairs, without a model."""
    rng, size = np.random.default_rng(seed), n_prompts * each
    prompt, kept = np.repeat(np.arange(n_prompts), each), np.zeros(size, dtype=bool)
    kept[rng.permutation(size)[:n_kept]] = True
    numbers = {name: rng.gamma(2, 1, size) for name in ("score_gap", "centrality", "informativeness", "usefulness")}
    table = {"pair": np.arange(size), "prompt": prompt, "row": prompt, **numbers}
    table |= {"chosen": np.zeros(size, int), "rejected": np.ones(size, int), "length_effect": numbers["score_gap"] / 9}
    table |= {"cluster": rng.integers(0, 256, size), "length_ratio": rng.lognormal(0, 0.5, size)}
    index = np.flatnonzero(kept)
    words = [f"word{i} " * 9 for i in range(n_prompts)]
    data = {"prompt": [words[p] for p in prompt[index]], "bpo_pair": index, "bpo_prompt": prompt[index]}
    data |= {"chosen": [f"yes {i} " * 30 for i in index], "rejected": [f"no {i} " * 30 for i in index]}
    texts = [{"prompt": p, "text": words[p], "responses": ["a " * 400, "b " * 400]} for p in range(40)]
    return bpo.Selection(
        dataset=datasets.Dataset.from_dict(data),
        pairs=pa.table({**table, "fate": np.where(kept, "selected", "depth")}),
        depth=np.bincount(prompt[index], minlength=n_prompts),
        strategy="bpo",
        budget=n_kept,
        seed=0,
        config={},
        skipped={},
        evidence={"texts": texts},
    )


def test_the_page_of_a_selection_says_how_it_is_and_shows_both_sides(selection, tmp_path):
    page = check(selection.report(tmp_path / "page.html").read_text(encoding="utf-8"))
    titles = [element["text"].strip() for element in page.all("h2")]
    assert titles[0] == "Not to be told from random here"
    wanted = ["How it was made", "The same budget by other means", "Depth", "Clusters of pair gradients", "All pairs"]
    wanted += ["Distributions", "Length", "Where the pairs come from", "Labels that look wrong"]
    wanted += ["Pairs that are nearly the same", "Kept and dropped pairs, to read", "Not usable"]
    assert [title for title in titles if title in wanted] == wanted
    assert len(dots(page)) == 200
    text = page.text
    (worth,) = [arm for arm in selection.evidence["worth"]["arms"] if arm["name"] == "best_worst"]
    assert f"{100 * worth['accuracy']:.1f} %" in text and "not recorded" in text
    # Kept and dropped pairs side by side, with reasons, and the whole texts of both.
    sides = [element["text"] for element in page.all("h4")]
    assert any(re.match(r"Kept: \d", side) for side in sides)
    assert any("since others of its prompt came first" in side for side in sides)
    example = selection.evidence["texts"][0]
    assert any(example["responses"][0] in element["text"] for element in page.all("div"))


def test_a_page_is_the_same_from_a_saved_selection(selection, tmp_path):
    loaded = bpo.Selection.load(selection.save(tmp_path / "saved"))
    assert loaded.evidence == selection.evidence
    pages = [each.report(tmp_path / "page.html").read_bytes() for each in (selection, loaded)]
    assert pages[0] == pages[1]


def test_facts_that_were_recorded_are_told(selection, tmp_path):
    known = {
        "model": "my-model",
        "command": "bpo select a&b",
        "versions": {"torch": "2.9"},
        "created": "2026-11-28T10:00",
    }
    text = dataclasses.replace(selection, provenance=known).report(tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(value in text for value in ("my-model", "bpo select a&amp;b", "2.9", "2026-11-28T10:00"))


def test_no_text_of_the_data_runs(tmp_path):
    rows = stated(text=HOSTILE, source=[HOSTILE, "b"])
    hostile = bpo.select(None, rows, budget=6, strategy="margin", progress=False)
    assert hostile.evidence["sources"][0]["values"][0]["value"] == HOSTILE
    hostile = dataclasses.replace(
        hostile,
        strategy=HOSTILE,
        skipped={HOSTILE: [HOSTILE]},
        noted={HOSTILE: [HOSTILE]},
        config={HOSTILE: HOSTILE},
        provenance=dict.fromkeys(("model", "data", "command"), HOSTILE),
    )
    page = check(hostile.report(tmp_path / "page.html").read_text(encoding="utf-8"))
    # Strategy, facts, settings, reasons, sources, prompts and responses: all of it stands there as text.
    assert page.text.count("&lt;script&gt;document.title=") > 30 and "{{ 7 * 7 }}" in page.text
    assert "<img" not in hostile._repr_html_() and "&lt;img" in hostile._repr_html_()


def test_texts_of_either_direction_are_kept_apart(tmp_path):
    rows = stated(text="שלום")
    page = check(bpo.select(None, rows, budget=6, strategy="margin", progress=False).report(tmp_path / "p").read_text())
    for element in page.elements:
        if element["tag"] in ("div", "bdi", "summary") and "שלום" in element["text"] and element["tag"] == "div":
            inner = element.get("@dir") == "auto" or element.get("@class") != "text"
            assert inner, element
    assert [each for each in page.all("div") if each.get("@class") == "text"]
    assert all(each.get("@dir") == "auto" for each in page.all("div") if each.get("@class") == "text")


def test_100000_pairs_are_one_small_page_with_every_kept_pair(tmp_path):
    path = large(4000, 25, 99_000).report(tmp_path / "page.html")
    assert path.stat().st_size < 2_000_000
    page = check(path.read_text(encoding="utf-8"))
    assert len(dots(page)) == 99_000 and len(page.elements) < 20_000


@pytest.mark.parametrize("n_kept", [1, 39])
def test_dots_are_where_the_pairs_are(n_kept):
    rng = np.random.default_rng(1)
    x, y, kept = rng.random(60), rng.random(60), np.arange(60) < n_kept
    x[0] = np.nan
    drawn = scatter(x, y, kept)
    assert (drawn["kept"], drawn["dropped"], drawn["edge"]) == (n_kept, 60 - n_kept, 1)
    page = Page(f'<path class="dots" d="{drawn["dots"]}"/>')
    low, high = drawn["x"]
    columns = np.rint((np.nan_to_num(x[kept], nan=low) - low) / (high - low) * 988 + 6)
    rows = np.rint((1 - (y[kept] - y[1:].min()) / np.ptp(y[1:])).clip(0, 1) * 428 + 6)
    assert sorted(dots(page)) == sorted(zip(columns, rows, strict=True))
    # Shades count squares, of which there are as many as dropped pairs at most.
    assert 0 < sum(path.count("z") for path in drawn["shades"]) <= 60 - n_kept
    assert scatter(np.full(3, np.nan), y[:3], kept[:3]) is None


def test_bars_of_a_distribution_count_every_pair():
    values = np.concatenate([np.random.default_rng(2).normal(size=500), [1e9, np.nan]])
    drawn = histogram(values, np.arange(502) >= 400)
    assert sum(bar["all_count"] for bar in drawn["bins"]) == 501
    assert sum(bar["kept_count"] for bar in drawn["bins"]) == 101
    assert drawn["bins"][-1]["high"] < 1e9 and drawn["most"] < 1


def test_terms_of_a_cluster_are_those_of_its_prompts(selection):
    texts = {i: f"please {'sort these numbers' if i % 2 else 'name the river'} {i}" for i in range(20)}
    terms = characteristic_terms(texts, {0: range(0, 20, 2), 1: range(1, 20, 2)})
    assert set(terms[0]) == {"name", "the", "river"} and set(terms[1]) == {"sort", "these", "numbers"}
    assert characteristic_terms(texts, {0: range(20), 1: []}) == {0: [], 1: []}


def told(evidence=None, preview=None, strategy="bpo", **given):
    given = {"lengths": None, "clusters": [], "fates": {"selected": 100}, "noted": {}, "provenance": {}, **given}
    return verdict(strategy, 100, evidence or {}, preview=preview, **given)


def worth(low, high, other=0.5):
    own = {
        "name": "bpo",
        "pairs": 75,
        "accuracy": 0.6,
        "difference": (low + high) / 2,
        "low": low,
        "high": high,
        "p": 0.01,
    }
    arms = [
        own,
        {"name": "random", "accuracy": 0.55, "pairs": 75},
        {"name": "best_worst", "accuracy": other, "pairs": 60},
    ]
    return {"worth": {"arms": arms, "prompts": 50, "all_prompts": 400, "splits": 10}}


def test_a_verdict_claims_no_more_than_was_measured():
    assert told(worth(0.01, 0.05)).answer == "Better than random here"
    assert told(worth(-0.05, -0.01)).answer == "Worse than random here"
    unsure = told(worth(-0.01, 0.05, other=0.61))
    assert unsure.answer == "Not to be told from random here" and unsure.level == "open"
    said = " ".join(unsure.because)
    assert "drawn from 400" in said and "not a training" in said and "did no worse" in said
    assert "did no worse" not in " ".join(told(worth(0.01, 0.05)).because)
    assert told().answer == "Whether it is better than random was not measured"
    named = {"data": "a file.jsonl", "data_readable": True}
    kind = {"data": "what a generator gave", "data_readable": False}
    for provenance, shown in ((named, "'a file.jsonl'"), (kind, "DATA"), ({}, "DATA")):
        said = told(provenance=provenance).because
        assert f"bpo preview GRADIENTS {shown} --budget 100 --arm bpo" in " ".join(said)
    assert told(strategy="random").answer == "This is the random choice"
    lost = told({**worth(0.01, 0.05), "agreement": 0.4})
    assert "no direction in common (p = 0.40)" in lost.because[-1]
    assert told({**worth(0.01, 0.05), "agreement": 0.01}).because == told(worth(0.01, 0.05)).because


def test_a_verdict_from_a_preview_takes_all_its_comparisons_into_account():
    def records(p):
        own = {"budget": 90, "arm": "bpo", "accuracy": 0.6, "difference": 0.03, "low": 0.01, "high": 0.05, "p": p}
        none = dict.fromkeys(("difference", "low", "high", "p"))
        return {
            "records": [own, {"budget": 90, "arm": "random", "accuracy": 0.57, **none}],
            "splits": 100,
            "baseline": "random",
        }

    assert told(worth(-0.01, 0.05), records(0.02)).answer == "Better than random here"
    unsure = told(worth(0.01, 0.05), records(0.08))
    assert unsure.answer == "Not to be told from random here" and "p = 0.080" in unsure.because[0]
    assert told(worth(0.01, 0.05), {**records(0.5), "baseline": "margin"}).because[0].startswith("On prompts that")


def test_what_to_look_at_is_what_stands_out():
    lengths = {"kept": {"longer_share": 0.8, "gap": 1.0, "controlled_gap": 0.4}, "all": {"longer_share": 0.5}}
    sources = [{"column": "source", "values": [{"all": 50, "kept": 9}, {"all": 50, "kept": 91}]}]
    evidence = {
        "labels": {"known": 9, "tells": True, "suspects": 3},
        "near": {"threshold": 0.95, "count": 30},
        "sources": sources,
    }
    clusters = [{"kept": 0}, {"kept": 100}]
    look = told(
        evidence, lengths=lengths, clusters=clusters, noted={"odd": (2, [])}, fates={"selected": 100, "unusable": 4}
    )
    assert [place for _, place in look.look] == [
        *("labels", "near", "length", "length", "clusters", "unusable", "sources", "noted")
    ]
    assert "60.0\u00a0% of the mean score gap" in look.look[3][0] and "41.0\u00a0%" in look.look[6][0]
    assert told().look == []


def test_of_labels_without_a_meaning_nothing_is_claimed():
    """Scores that are shuffled within each prompt: no choice can be better than another."""
    rows, rng = demo_rows(), np.random.default_rng(5)
    for row in rows:
        row["scores"] = rng.permutation(row["scores"]).tolist()
    found = chosen(rows).evidence
    own, random, _ = found["worth"]["arms"]
    assert own["low"] < 0 < own["high"] and abs(random["accuracy"] - 0.5) < 0.04
    assert told(found).answer == "Not to be told from random here"
    assert "direction in common" in told(found).because[-1] or found["agreement"] < 0.05


def test_what_is_not_measured_is_said_with_the_reason(tmp_path):
    rows = demo_rows()
    assert "needs no gradients" in chosen(rows, strategy="margin").evidence["worth"]["reason"]
    assert "too few" in chosen(rows[:20], budget=20).evidence["worth"]["reason"]
    plain = chosen(rows, strategy="random", evidence=False)
    assert plain.evidence == {}
    page = check(plain.report(tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "This is the random choice" in page.text and "Not looked at" in page.text


def test_the_same_choice_is_measured_alike():
    first, second = (chosen(demo_rows()[:60], budget=60).evidence for _ in range(2))
    assert first == second and first["worth"]["prompts"] == 60


def test_a_page_with_an_audit_and_a_preview_says_what_they_found(selection, tmp_path):
    rows = demo_rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preview = bpo.preview(DEMO / "gradients", rows, budget=200, arms=["bpo"], seeds=3, progress=False)
        audit = bpo.audit(DEMO / "gradients", rows, progress=False)
    page = check(selection.report(tmp_path / "page.html", preview=preview, audit=audit).read_text(encoding="utf-8"))
    assert "A preview of this strategy at 200 pairs" in page.text and "over 3 splits" in page.text
    kept = set(selection.dataset["bpo_pair"][:])
    wrong = [
        w
        for pair, w in zip(*(audit.pairs[name].to_pylist() for name in ("pair", "wrong")), strict=True)
        if pair in kept
    ]
    assert f"About {sum(wrong):.0f} are expected to be wrong" in page.text
    other = chosen(rows[:50], budget=20)
    with pytest.raises(ValueError, match="of other data"):
        other.report(tmp_path / "other.html", audit=audit)

    # The pages of the two themselves.
    page = check(preview.report(tmp_path / "preview.html").read_text(encoding="utf-8"))
    assert preview._verdict(preview.table()) in page.text and len(page.all("tbody")) == 1
    assert len([row for row in page.all("tr") if "tbody" in row["inside"]]) == 3
    assert repr(preview) == "Preview(3 arms at 200 pairs, 3 seeds, baseline='random')"
    assert preview._repr_html_().count("<tr>") == 4
    page = check(audit.report(tmp_path / "audit.html").read_text(encoding="utf-8"))
    assert f"{audit.suspects} of {audit.pairs.num_rows} pairs" in page.all("h2")[0]["text"]


def test_a_preview_that_says_nothing_has_a_page(tmp_path):
    nothing = np.full((2, 1, 1), np.nan)
    arms = {"arms": [HOSTILE, "random"], "budgets": [5], "baseline": "random", "heldout_share": None}
    numbers = {"accuracy": nothing, "length_controlled": nothing, "mean_depth": nothing}
    preview = bpo.Preview(
        **arms, **numbers, n_pairs=9, n_heldout=3, seconds=1, settings={}, left_out={HOSTILE: HOSTILE}
    )
    page = check(preview.report(tmp_path / "preview.html").read_text(encoding="utf-8"))
    assert (
        "nan" not in page.text.replace("tenant", "") and "too few pairs" in page.text and "With one split" in page.text
    )


def test_figures_are_drawn_of_what_there_is(selection, tmp_path):
    assert selection.figure(tmp_path / "figure.svg").stat().st_size > 5000
    drawn = (tmp_path / "figure.svg").read_text()
    assert all(f">{text}<" in drawn for text in ("pairs kept of a prompt", "centrality", "best_worst"))
    before = (tmp_path / "figure.svg").read_bytes()
    assert selection.figure(tmp_path / "figure.svg").read_bytes() == before
    plain = bpo.select(None, stated(), budget=6, strategy="random", progress=False)
    assert "best_worst" not in plain.figure(tmp_path / "plain.svg").read_text()
    with pytest.raises(ValueError, match=r"ends in \.svg"):
        selection.figure(tmp_path / "figure.bmp")


def test_notebooks_see_few_facts_and_no_markup(selection):
    shown = selection._repr_html_()
    assert "<td>200 kept of 4,438</td>" in shown and Page(shown).errors == [] and len(shown) < 1000
    store = bpo.GradientStore.open(DEMO / "gradients")
    assert "<td>1,463</td>" in store._repr_html_() and Page(store._repr_html_()).errors == []
    assert len(repr(selection)) < 120 and len(repr(store)) < 200
