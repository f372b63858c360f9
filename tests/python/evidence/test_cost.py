"""The counts of the model of costs, against what really is held, written and sent."""

import dataclasses
import io

import numpy as np
import pytest

import bpo
from bpo.cli.main import main
from bpo.data.tokens import tokenize_responses
from bpo.evidence.cost import Load, Rates, data_bytes, measured, stages
from bpo.pairs.size import ChoiceSize, matching_steps
from bpo.report.wording import byte_size, duration
from bpo.system.packed import Packed
from bpo.world.telling import Parcel
from tiny import scored_rows

UNIT = Rates(1e-5, 1e-3, 0.0, 1e-11, 1e-10, 1e-5, 1e-9, 1e-9, 10**8)
LOAD = Load(1000, 4000, 6000, 10**6, 3 * 10**6, 10**6, bpo.SelectConfig(n_clusters=10, max_iter=5), budget=1000)


def by_name(load, rates=UNIT, processes=1):
    return {stage.name: stage for stage in stages(load, rates, processes)}


def held(value):
    """Bytes of the arrays that something has, each once; of packed texts, where they are."""
    arrays = {}
    packed = 0
    for each in vars(value).values():
        if isinstance(each, np.ndarray) and each.strides != (0, 0):
            arrays[each.__array_interface__["data"][0]] = each.nbytes
        elif isinstance(each, Packed):
            packed += 16 * len(each)
    return sum(arrays.values()) + packed + 8 * len(getattr(value, "template_kwargs", ()))


def test_what_data_holds_of_numbers_is_what_is_counted(tokenizer):
    """By the slope from a hundred to three hundred prompts, so that neither what is fixed nor texts count."""
    found = []
    for n in (100, 300):
        candidates = bpo.read_candidates(scored_rows(n, 4))
        tokenized, _, _ = tokenize_responses(candidates, tokenizer, None)
        counts = {"prompts": n, "responses": len(candidates.responses), "pairs": len(candidates.pairs)}
        load = dataclasses.replace(LOAD, **counts, tokens=0, text_bytes=0)
        real = held(candidates), held(tokenized) + tokenized.lengths.nbytes
        found.append((real[0] + real[1], data_bytes(load)))
    (few, foretold_few), (many, foretold) = found
    assert abs((foretold - foretold_few) / (many - few) - 1) < 0.1, (many - few, foretold - foretold_few)


def test_the_store_has_the_bytes_that_are_counted(model, tokenizer, tmp_path):
    config = bpo.SelectConfig(sketch_dim=64, sketch_dtype="bfloat16")
    rows = scored_rows(4, 3)
    store = bpo.collect_gradients(
        model, rows, processing_class=tokenizer, store=tmp_path / "store", config=config, progress=False
    )
    load = dataclasses.replace(LOAD, responses=len(store), config=config)
    size = sum(path.stat().st_size for path in (tmp_path / "store").iterdir() if path.suffix != ".json")
    foretold = by_name(load, processes=2)
    assert foretold["extract"].disk_bytes == foretold["extract"].network_bytes == size - 72  # a header
    assert foretold["gather"].network_bytes == 2 * (size - 72)
    assert "gather" not in by_name(load) and all(stage.network_bytes == 0 for stage in stages(load, UNIT))


def test_what_is_sent_of_a_selection_is_what_is_counted(model, tokenizer, tmp_path):
    """A selection goes from the first process to each other as tables of Arrow and a pickle of the rest."""
    rows, store, config = scored_rows(60, 4), tmp_path / "store", {"sketch_dim": 16}
    bpo.collect_gradients(model, rows, processing_class=tokenizer, store=store, config=config, progress=False)
    sizes = []
    for n in (len(rows) // 2, len(rows)):
        selection = bpo.select(None, rows[:n], budget=1.0, store=store, progress=False, evidence=False)
        texts = sum(len(text) for row in rows[:n] for text in (row["prompt"], *row["responses"]))
        n_pairs = selection.pairs.num_rows
        load = dataclasses.replace(
            LOAD,
            prompts=n,
            responses=sum(len(row["responses"]) for row in rows[:n]),
            pairs=n_pairs,
            budget=n_pairs,
            text_bytes=texts,
        )
        sent = io.BytesIO()
        Parcel(selection).write(sent)
        sizes.append((len(sent.getvalue()), by_name(load, processes=2)["tell"].network_bytes))
    (few, foretold_few), (many, foretold) = sizes
    assert 0.8 < (foretold - foretold_few) / (many - few) < 1.6, sizes  # texts are counted with what is around them


def test_seconds_follow_the_formulas():
    one, four = by_name(LOAD), by_name(LOAD, processes=4)
    assert one["read"].seconds == four["read"].seconds == pytest.approx(4000 * 1e-5)
    assert one["extract"].seconds == 4 * four["extract"].seconds == pytest.approx(1000)
    assert one["cluster"].seconds == pytest.approx(6000 * 10 * 1024 * 1e-11 + 5 * 6000 * 1024 * 1e-10)
    told = 3 * (88 * 6000 + 5 * 2 * 8 * 10 * 1025)
    assert four["cluster"].network_bytes == told + 4000 * LOAD.row_bytes
    assert four["cluster"].seconds == pytest.approx(one["cluster"].seconds / 4 + told * 1e-9)
    assert one["score"].seconds == 4 * four["score"].seconds
    assert one["score"].seconds == pytest.approx(3 * 6000 * 1024 * 1e-10)
    assert four["tell"].seconds == pytest.approx(four["tell"].network_bytes / 3 * 2e-9)  # handed on, and written
    with_parts = by_name(LOAD, dataclasses.replace(UNIT, coordinate=1e-9))
    assert with_parts["extract"].seconds == pytest.approx(1000 + 4000 * 10**6 * 1e-9)
    needed = ChoiceSize(4000, 6000, 1024, LOAD.config).needed_bytes
    assert one["cluster"].memory_bytes == 10**8 + data_bytes(LOAD) + needed


def test_settings_that_take_more_have_stages_of_their_own():
    """Audits by the first process, matching by all; the bytes of a step are those that Shares sends."""
    terms = dataclasses.replace(LOAD.config, usefulness={"centrality": 1.0})
    assert not {"audit", "match"} & set(by_name(dataclasses.replace(LOAD, config=terms)))
    assert "match" in by_name(LOAD)  # what is useful by default
    config = dataclasses.replace(terms, trust="audit")
    load = dataclasses.replace(LOAD, config=config, strategy="matching")
    rates = dataclasses.replace(UNIT, audit=(1e-10, 1e-9, 1e-3), regression=1e-8, pick=1e-11)
    one, four = by_name(load, rates), by_name(load, rates, processes=4)
    assert list(one)[1:5] == ["extract", "cluster", "score", "audit"] and list(one)[5] == "match"
    audit = 4000 * 1024**2 * 1e-10 + 1024**3 * 1e-9 + 1000 * 1e-3
    assert one["audit"].seconds == four["audit"].seconds == pytest.approx(audit)
    assert four["audit"].network_bytes == 3 * 9 * 6000
    steps = matching_steps(1000)
    assert 128 < steps < 1000
    read = (16 * 6000 + 6000) * 6000**0.5 * 1024 * 1e-8 + steps * 4000 * 1024 * 1e-11
    assert one["match"].seconds == pytest.approx(read)
    words = 4 * (2 * steps * (8 + 4096) + 1000 * 16)
    assert four["match"].network_bytes == 3 * (words + 1000 * 8 * 1024)
    assert four["match"].seconds == pytest.approx(read / 4 + four["match"].network_bytes / 4 * 1e-9)


def test_this_machine_has_rates(monkeypatch, tmp_path):
    monkeypatch.setenv("BPO_CACHE", str(tmp_path))
    rates = measured(bpo.SelectConfig(sketch_dim=64), token=1.0, memory=5)
    assert rates.token == 1.0 and rates.memory == 5
    assert (
        all(0 < rate < 1e-2 for rate in (rates.response, rates.number, rates.pair, rates.byte)) and rates.product >= 0
    )
    assert 0 < rates.regression < 1e-5 and 0 <= rates.pick < 1e-7
    assert list((tmp_path / "scratch").iterdir()) == []
    assert rates.audit == (0.0, 0.0, 0.0)
    audited = measured(bpo.SelectConfig(sketch_dim=64, trust="audit"), token=1.0, memory=5).audit
    assert 0 <= min(audited) < max(audited) < 1e-3


def test_the_doctor_tells_each_stage(model_path, tmp_path, capsys, monkeypatch):
    import json

    monkeypatch.setenv("BPO_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in scored_rows(6, 3)))
    given = ["doctor", model_path, str(data), "--set", "sketch_dim=64"]
    assert main([*given, "--world-size", "64", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["world_size"] == 64 and [stage["name"] for stage in said["stages"]] == [
        "read", "extract", "gather", "cluster", "score", "match", "choose", "tell", "save",
    ]  # fmt: skip
    assert said["stages"][1]["disk_bytes"] == said["store_bytes"]
    assert said["stages"][1]["seconds"] == pytest.approx(said["seconds"] / 64)
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        bpo.doctor(model_path, str(data), world_size=0)
    told = dataclasses.replace(bpo.doctor(model_path, str(data), config={"sketch_dim": 64}, seconds=0), world_size=2)
    found = stages(LOAD, UNIT, 2)
    lines = str(dataclasses.replace(told, stages=tuple(found))).splitlines()
    for stage in found:
        sizes = map(byte_size, (stage.memory_bytes, stage.disk_bytes, stage.network_bytes))
        told = " ".join([stage.name, stage.by, duration(stage.seconds), *sizes])
        assert told in [" ".join(line.split()) for line in lines]
