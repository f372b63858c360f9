"""Embeddings of prompts, which of them are kept, and near-duplicates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bpo
from bpo import SelectConfig, compress_breadth, embed_prompts, near_duplicates
from bpo.breadth import compress, duplicates
from tiny import scored_rows

DEMO = Path(__file__).resolve().parents[3] / "demo"


@pytest.fixture(scope="module")
def encoder():
    """The directory of the real all-MiniLM-L6-v2."""
    sys.path.insert(0, str(DEMO))
    try:
        import models
    finally:
        sys.path.remove(str(DEMO))
    return models.embedder()


@pytest.fixture
def bert(tmp_path, tokenizer):
    """A directory with a tiny encoder of random weights, which does not say how it pools."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def describe(directory, pooling, **files):
    """Adds what makes a directory a model of sentence-transformers."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", **files.pop("modules", {})}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 16, **pooling}))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def unit(points):
    points = np.asarray(points, dtype=np.float32)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float64)


def greedy_facility_location(points, n):
    """The plain version: every gain anew at every step."""
    cosines = np.rint(unit(points) @ unit(points).T * 2**26) / 2**26
    np.fill_diagonal(cosines, 1.0)
    covered, chosen = np.full(len(points), -1.0), []
    for _ in range(n):
        gains = np.maximum(cosines - covered[:, None], 0).sum(axis=0)
        gains[chosen] = -1
        chosen.append(int(np.argmax(gains)))
        covered = np.maximum(covered, cosines[chosen[-1]])
    return sorted(chosen)


def greedy_k_center(points, n):
    """The plain version: one prompt at a time."""
    rows = unit(points)
    chosen = [int(np.argmax(rows @ rows.mean(axis=0)))]
    nearest = rows @ rows[chosen[0]]
    while len(chosen) < n:
        nearest[chosen] = np.inf
        chosen.append(int(np.argmin(nearest)))
        nearest = np.maximum(nearest, rows @ rows[chosen[-1]])
    return sorted(chosen)


@pytest.mark.parametrize(("n", "keep", "dim"), [(60, 10, 5), (700, 300, 6), (5, 1, 3), (40, 40, 2)])
def test_greedy_picks_are_those_of_the_plain_versions(n, keep, dim, monkeypatch):
    points = np.random.default_rng(n).normal(size=(n, dim))
    for batch in (1, 7, 512):
        monkeypatch.setattr(compress, "_BATCH", batch)
        found = compress_breadth(points, keep, method="diverse")
        assert np.flatnonzero(found.kept).tolist() == greedy_k_center(points, keep)
    found = compress_breadth(points, keep, method="representative")
    assert np.flatnonzero(found.kept).tolist() == greedy_facility_location(points, keep)
    nearest = (unit(points) @ unit(points)[found.kept].T).max(axis=1)
    np.testing.assert_allclose(found.distances, np.sqrt(np.maximum(2 - 2 * nearest, 0)), atol=1e-3)
    assert found.labels.max() == keep - 1


@pytest.mark.parametrize("method", ["quota", "representative", "diverse"])
def test_every_method_keeps_exactly_as_many_as_asked_for(method, monkeypatch):
    monkeypatch.setattr(compress, "_MOST_AT_ONCE", 64)
    generator = np.random.default_rng(0)
    points = generator.normal(size=(500, 6))
    for rows in (points, np.tile(points[:3], (100, 1)), points[:64]):
        for keep in (1, 2, 5, 63, len(rows) - 1, len(rows)):
            assert compress_breadth(rows, keep, method=method).kept.sum() == min(keep, len(rows))


def test_representatives_cover_best_and_diverse_reach_farthest(monkeypatch):
    """Each method is better than the others at what it is for, also where representatives are found in parts."""
    monkeypatch.setattr(compress, "_MOST_AT_ONCE", 512)
    generator = np.random.default_rng(0)
    points = generator.normal(size=(40, 12))[generator.integers(40, size=2000)] + generator.normal(size=(2000, 12))
    for keep in (300, 700):
        cosines = {}
        for method in ("quota", "representative", "diverse"):
            kept = compress_breadth(points, keep, method=method).kept
            cosines[method] = (unit(points) @ unit(points)[kept].T).max(axis=1)
        assert max(cosines, key=lambda method: cosines[method].mean()) == "representative"
        assert max(cosines, key=lambda method: cosines[method].min()) == "diverse"


def test_parts_lose_little_against_all_at_once(monkeypatch):
    points = np.random.default_rng(0).normal(size=(2000, 8))
    whole = compress_breadth(points, 100, method="representative").kept
    monkeypatch.setattr(compress, "_MOST_AT_ONCE", 256)
    parted = compress_breadth(points, 100, method="representative").kept
    covered = [(unit(points) @ unit(points)[kept].T).max(axis=1).mean() for kept in (whole, parted)]
    assert covered[0] - 0.02 < covered[1] <= covered[0] + 1e-9


def test_results_do_not_depend_on_threads():
    """Of the core, and of the library that NumPy multiplies with, which is only told at the start."""
    code = (
        "import numpy as np, hashlib, sys; from bpo import compress_breadth, near_duplicates;"
        "from bpo.breadth import compress;"
        "compress._MOST_AT_ONCE = 512; points = np.random.default_rng(0).normal(size=(1500, 24));"
        "points[::7] = points[::7].round(1);"
        "points[1::2] = points[::2] + 0.05 * points[1::2];"
        "kept = [compress_breadth(points, 600, method=m, threads=int(sys.argv[1])).kept.tobytes() for m in "
        "('quota', 'representative', 'diverse')]; found = near_duplicates(points);"
        "assert (found.earlier >= 0).sum() > 600;"
        "print(hashlib.sha256(b''.join([*kept, found.earlier.tobytes(), found.similarity.tobytes()])).hexdigest())"
    )
    found = set()
    for threads in ("1", "2"):
        limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), threads)
        command = [sys.executable, "-c", code, threads]
        done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def test_planted_near_duplicates_are_found(monkeypatch):
    monkeypatch.setattr(duplicates, "_TILE", 64)
    generator = np.random.default_rng(0)
    points = generator.normal(size=(300, 32))
    planted = {50: 3, 200: 199, 64: 63, 299: 0}
    for later, earlier in planted.items():
        points[later] = 2.5 * points[earlier] + 0.01 * generator.normal(size=32)
    points[250] = points[200]  # like 199 and the same as 200: named after the more similar one
    found = near_duplicates(points)
    assert {int(row): int(found.earlier[row]) for row in np.flatnonzero(found.earlier >= 0)} == {**planted, 250: 200}
    cosines = np.tril(unit(points) @ unit(points).T, k=-1)
    rows = np.flatnonzero(found.earlier >= 0)
    np.testing.assert_allclose(found.similarity[rows], cosines.max(axis=1)[rows], atol=1e-6)
    assert (near_duplicates(points, 1.0).earlier >= 0).tolist() == [row == 250 for row in range(300)]
    with pytest.raises(ValueError, match="threshold must be above 0"):
        near_duplicates(points, 0.0)


@pytest.mark.parametrize("method", ["quota", "representative", "diverse"])
def test_selection_names_near_duplicates_by_row(method, tmp_path):
    rows = scored_rows(12, 3)
    generator = np.random.default_rng(0)
    embeddings = generator.normal(size=(12, 16))
    embeddings[9] = embeddings[4] * 1.1
    for row, embedding in zip(rows, embeddings, strict=True):
        row["vector"] = embedding.tolist()
    config = SelectConfig(prompt_embeddings="vector", breadth_method=method)
    selection = bpo.select(None, rows, budget=12, breadth=6, strategy="uniform", config=config, progress=False)
    reason = "prompt nearly the same as an earlier one (cosine ≥ 0.95)"
    assert selection.noted == {reason: ["row 9, like row 4: 1.000"]}
    assert f"noted    1 × {reason} (row 9, like row 4: 1.000)" in selection.summary()
    assert "row 9, like row 4" in selection.report(tmp_path / "report.html").read_text()
    kept = np.flatnonzero(selection.depth > 0)
    expected = compress_breadth(embeddings, 6, method=method, seed=selection.seed).kept
    assert kept.tolist() == np.flatnonzero(expected).tolist()
    silent = {**config.to_dict(), "duplicate_threshold": None}
    assert not bpo.select(None, rows, budget=12, breadth=6, strategy="uniform", config=silent, progress=False).noted


def preference_rows():
    """Twelve pairs of four prompts, three rows each, in turn."""
    return [{"prompt": f"p{i % 4}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(12)]


def test_embeddings_are_given_by_row_of_the_data():
    import datasets

    rows = preference_rows()
    rows.insert(2, {"prompt": "unusable", "chosen": None, "rejected": "no"})
    of_prompt = {f"p{i}": vector for i, vector in enumerate([[1, 0], [0.9, 0.5], [0, 1], [-1, -1]])}
    array = np.array([of_prompt.get(row["prompt"], [np.nan, 0]) for row in rows])
    expected = compress_breadth(np.array(list(of_prompt.values())), 2, method="diverse").kept
    with_column = [{**row, "vector": vector.tolist()} for row, vector in zip(rows, array, strict=True)]
    for data, given in (
        (rows, array),
        (rows, array.tolist()),
        (with_column, "vector"),
        (datasets.Dataset.from_list(with_column), "vector"),
    ):
        config = SelectConfig(prompt_embeddings=given, breadth_method="diverse")
        with pytest.warns(bpo.InvalidDataWarning, match="row 2"):
            selection = bpo.select(None, data, budget=4, breadth=2, strategy="random", config=config, progress=False)
        assert sorted(set(selection.dataset["prompt"])) == [f"p{i}" for i in np.flatnonzero(expected)]
    assert SelectConfig(prompt_embeddings=array).to_dict()["prompt_embeddings"] == "<array of 13 × 2>"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.eye(4), "has 4 rows, but the data has 12: give one for each row of the data, in its order, not one for"),
        (np.eye(12), r"Rows 0 and 4 hold the same prompt, but their prompt_embeddings differ \(cosine 0.000\)"),
        (np.eye(12) * 0, "Row 0, prompt_embeddings: the embedding is zero or not finite"),
        ("vectors", r"prompt_embeddings='vectors' is no column of the data, which has \['prompt', 'chosen'"),
        ("mixed", "Row 5, column 'mixed': 3 numbers, but 2 in row 0"),
        ("prompt", "Row 0, column 'prompt': expected a list of numbers, got str"),
        (np.ones(12), r"must be the name of a column or an array of \(rows of the data, features\), got ndarray of"),
        ([[1, 2], [3]], "must be the name of a column or an array"),
    ],
)
def test_embeddings_that_do_not_fit_the_data_are_refused(given, expected, model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)  # before any model runs
    rows = [{**row, "mixed": [1.0] * (3 if i == 5 else 2)} for i, row in enumerate(preference_rows())]
    with pytest.raises(ValueError, match=expected):
        bpo.select(
            model,
            rows,
            budget=2,
            breadth=2,
            processing_class=tokenizer,
            config=SelectConfig(prompt_embeddings=given),
            progress=False,
        )


@pytest.mark.parametrize(
    ("field", "value"),
    [("breadth_method", "best"), ("duplicate_threshold", 1.5), ("embedder", 5), ("duplicate_threshold", "0.9")],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"SelectConfig.{field} must be"):
        SelectConfig(**{field: value})
    with pytest.raises(ValueError, match="give one of the two"):
        SelectConfig(embedder="x", prompt_embeddings=np.eye(2))
    with pytest.raises(ValueError, match="method must be one of"):
        compress_breadth(np.eye(3), 2, method="best")


def test_a_real_encoder_embeds_as_sentence_transformers_does(encoder, monkeypatch):
    """By that package where it is there, and by our own reading of what the model says of itself where it is not."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    prompts = ["How many days has a week?", "What is the number of days in a week?", "Name three kinds of bread. " * 90]
    model = sentence_transformers.SentenceTransformer(str(encoder), device="cpu")
    expected = model.encode(prompts)
    given = embed_prompts(prompts, model, progress=False)
    by_package = embed_prompts([[{"role": "user", "content": prompt}] for prompt in prompts], encoder, progress=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    alone = embed_prompts(prompts, str(encoder), progress=False)
    for found in (given, by_package, alone):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    cosines = alone @ alone.T
    assert cosines[0, 1] > 0.8 > 0.3 > cosines[0, 2]


def test_pooling_is_the_models_own(bert):
    """A model that was trained on the first token is not averaged."""
    pytest.importorskip("sentence_transformers")
    from transformers import AutoModel, AutoTokenizer

    describe(bert, {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    prompts = ["red green blue", "one two", "cat"]
    found = embed_prompts(prompts, bert, progress=False)
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    first = [model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0, 0].detach() for prompt in prompts]
    np.testing.assert_allclose(found, unit(np.stack(first)), atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "files", "said"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {}, "pooling: pooling_mode_cls_token"),
        ({"pooling_mode": "lasttoken"}, {}, "pooling: lasttoken"),
        ({"pooling_mode": ["mean", "max"]}, {}, "pooling: mean and max"),
        ({}, {}, "pooling: not said"),
        ({"pooling_mode": "mean"}, {"modules": {"Dense": "2_Dense"}}, "Transformer → Pooling → Dense"),
        ({"pooling_mode": "mean"}, {"sentence_bert_config": {"do_lower_case": True}}, "does more than"),
        (
            {"pooling_mode": "mean"},
            {"config_sentence_transformers": {"default_prompt_name": "query"}},
            "does more than",
        ),
    ],
)
def test_without_the_package_what_is_no_plain_mean_is_refused(bert, pooling, files, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    describe(bert, pooling, **files)
    with pytest.raises(ValueError, match=rf"{said}.*pip install 'balanced-preference-optimization\[embed\]'"):
        embed_prompts(["red"], bert, progress=False)


def test_without_the_package_a_plain_mean_of_the_right_length_is_taken(bert, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    describe(bert, {"pooling_mode": "mean"}, sentence_bert_config={"max_seq_length": 3})
    long, short = embed_prompts(["red green blue one two three", "red green blue sun moon star"], bert, progress=False)
    np.testing.assert_allclose(long, short, atol=1e-6)


def test_an_encoder_that_does_not_say_how_it_pools_is_averaged_with_a_warning(bert):
    with pytest.warns(UserWarning, match="does not say how its token states become one embedding"):
        assert embed_prompts(["red green", "blue"], bert, progress=False).shape == (2, 16)


def test_the_policy_embeds_prompts_without_their_common_direction(model, tokenizer):
    from bpo.breadth.embed import embed_with_policy

    ids = [tokenizer(row["prompt"])["input_ids"] for row in scored_rows(30, 2)]
    one, two = (
        embed_with_policy(model, ids, tokenizer.pad_token_id, tokens_per_batch=tokens, progress=False)
        for tokens in (1, 512)
    )
    np.testing.assert_allclose(one, two, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    cosines = (one @ one.T)[np.triu_indices(30, k=1)]
    assert abs(np.mean(cosines)) < 0.1
