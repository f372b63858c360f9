"""Where gradients come from is chosen once, and every source that knows a pair measures it alike."""

import numpy as np
import pytest

import bpo
from bpo import SelectConfig, read_candidates
from bpo.policy.reference import Reference
from bpo.selection.request import Request
from bpo.selection.sources import (
    FromCheckpoints,
    FromEarlier,
    FromPolicy,
    StoreAlone,
    Unmeasured,
    source_of,
)
from tiny import stored

SETTINGS = {"sketch_dim": 64, "sketch_dtype": "float32", "n_clusters": 4}


def asked(strategy="bpo", store=None, **settings):
    config = {**SETTINGS, **settings}
    return Request.of(strategy, config, 0, target=None, store=store, progress=False)


@pytest.fixture
def earlier(model, tokenizer, rows):
    config = SelectConfig(**SETTINGS)
    return bpo.select(model, rows, budget=12, breadth=6, processing_class=tokenizer, config=config, progress=False)


def test_the_source_follows_from_what_is_given_and_needed(model, model_path, tokenizer, rows, tmp_path, earlier):
    stored(model, rows, tokenizer, tmp_path / "store")
    reference = Reference.by(model)

    def kind(request, given=model, **more):
        return type(source_of(request, given, tokenizer, **more))

    assert kind(asked("random"), None) is Unmeasured
    assert kind(asked("random", tmp_path / "store")) is Unmeasured  # strategies without gradients leave stores alone
    assert kind(asked()) is FromPolicy
    assert kind(asked(store=tmp_path / "store")) is FromPolicy
    assert kind(asked(store=tmp_path / "store"), None) is StoreAlone
    assert kind(asked(checkpoints={model_path: 1.0})) is FromCheckpoints
    assert kind(asked(), earlier=earlier) is FromEarlier
    assert kind(asked(), earlier=earlier, reference=reference) is FromPolicy
    with pytest.raises(ValueError, match="needs a model; model is None"):
        kind(asked(), None)
    with pytest.raises(ValueError, match="Name an embedder for the prompts"):
        kind(asked("random"), None, breadth=3)


def test_a_policy_its_store_and_an_earlier_selection_measure_alike(model, tokenizer, rows, tmp_path, earlier):
    path = tmp_path / "store"
    stored(model, rows, tokenizer, path)
    of_policy, of_store = (source_of(asked(store=path), given, tokenizer) for given in (model, None))
    parts = [source.find(read_candidates(rows)) for source in (of_policy, of_store)]
    assert parts[0].tokenized is not None and parts[1].stored is not None
    np.testing.assert_array_equal(parts[0].lengths, parts[1].lengths)
    (first,), (second,) = (
        source.read(source.fill([part], False), [part], False)
        for source, part in zip((of_policy, of_store), parts, strict=True)
    )
    for left, right in ((first.gradients[0], second.gradients[0]), (first.differences, second.differences)):
        np.testing.assert_array_equal(left.rows[left.pairs], right.rows[right.pairs])
        np.testing.assert_array_equal(left.coefficients, right.coefficients)
    np.testing.assert_array_equal(first.logps, second.logps)

    # The earlier selection knows log π_ref of the pairs of the prompts that it kept, and of no others.
    kept = np.array(earlier.pairs["fate"]) != "breadth"
    assert 0 < kept.sum() < len(kept)
    part, index = parts[0].keep_pairs(kept)
    source = source_of(asked(), model, tokenizer, earlier=earlier)
    (again,) = source.read(source.fill([part], False), [part], False)
    known = np.stack([earlier.pairs[f"ref_logp_{side}"].to_numpy()[index] for side in ("chosen", "rejected")], axis=1)
    np.testing.assert_array_equal(again.ref_logps, known.astype(np.float32))
    np.testing.assert_allclose(again.margins(SelectConfig()), 0, atol=1e-4)
