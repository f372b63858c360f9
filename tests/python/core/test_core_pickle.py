"""Pickles and copies: what a worker of a loader gets is what it was given, and holds no more than its fields."""

import copy
import io
import json
import multiprocessing
import pickle
import shutil

import numpy as np
import pytest

from bpo import GradientStore, StoreError, _core
from bpo.store.gradient_store import RECORD

ROWS = np.random.default_rng(0).standard_normal((40, 6), dtype=np.float32)
PAIRS = np.array([[0, 1], [2, 3], [4, 5]])
COEFFICIENTS = np.array([[0.5, -0.5]] * 3, dtype=np.float32)

MAKERS = {
    "sparse": lambda _: _core.Sketcher(12, seed=2**64 - 1, nnz=3),
    "normal": lambda _: _core.Sketcher(12, kind="normal"),
    "kmeans": lambda _: _core.kmeans(ROWS, 3, seed=1),
    "scores": lambda _: _core.score_pairs(ROWS, PAIRS, COEFFICIENTS, ROWS[:2], np.zeros(3, dtype=np.int32)),
    "repair": lambda path: _core.repair_store(write(path, 3)),
}


def write(path, count, dim=6):
    with _core.StoreWriter.create(path, dim, json.dumps({})) as writer:
        writer.append(ROWS[:count, :dim], np.zeros(count, dtype=RECORD))
    return path


def fields(value):
    return value.__getnewargs_ex__()[1]


def assert_same(value, other):
    assert type(value) is type(other)
    assert fields(value).keys() == fields(other).keys()
    for name, field in fields(value).items():
        np.testing.assert_array_equal(field, getattr(other, name), strict=isinstance(field, np.ndarray))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_comes_back_is_what_went(make, tmp_path):
    value = make(tmp_path / "store")
    # All that users can read is in the pickle.
    assert set(fields(value)) == {name for name in dir(value) if not (name.startswith("_") or name == "sketch")}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert_same(value, pickle.loads(pickle.dumps(value, protocol)))
    assert_same(value, copy.copy(value))
    deep = copy.deepcopy(value)
    assert_same(value, deep)
    for name, field in fields(value).items():
        assert not (isinstance(field, np.ndarray) and np.shares_memory(field, getattr(deep, name)))


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_pickle_names_nothing_but_its_class_and_arrays(make, tmp_path):
    value = make(tmp_path / "store")
    names = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            names.add((module, name))
            return super().find_class(module, name)

    assert_same(value, Unpickler(io.BytesIO(pickle.dumps(value))).load())
    assert ("bpo._core", type(value).__name__) in names
    arrays = {"_frombuffer", "_reconstruct", "ndarray", "dtype"}
    assert all(module.startswith("numpy") and name in arrays for module, name in names if module != "bpo._core")


def test_a_field_of_another_release_is_refused_by_name():
    result = fields(MAKERS["kmeans"](None))
    with pytest.raises(TypeError, match="radius"):
        _core.KMeansResult(**result, radius=1.0)
    del result["labels"]
    with pytest.raises(TypeError, match="labels"):
        _core.KMeansResult(**result)
    with pytest.raises(TypeError, match="labels"):
        _core.KMeansResult(**result, labels=[0] * 40)


def test_a_spawned_process_computes_the_same():
    sketcher, sketches = _core.Sketcher(8, seed=5, nnz=2), _core.Sketcher(8, seed=5, nnz=2).sketch(ROWS)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(sketcher.sketch, (ROWS,)), sketches)
        assert_same(pool.apply(_core.kmeans, (ROWS, 3)), _core.kmeans(ROWS, 3))


def test_a_reader_opens_its_store_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("store", 3)
    reader = _core.StoreReader("store")
    before, pickled = reader.records(), pickle.dumps(reader)
    with _core.StoreWriter.append_to("store") as writer:
        writer.append(ROWS[:2], np.zeros(2, dtype=RECORD))
    monkeypatch.chdir("/")
    again = pickle.loads(pickled)
    assert (again.path, again.skip_damaged) == (tmp_path / "store", False)
    assert (len(reader), len(again)) == (3, 5)
    np.testing.assert_array_equal(again.records()[: 3 * RECORD.itemsize], before)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


def test_what_a_reader_tolerates_stays(tmp_path):
    path = write(tmp_path / "store", 3)
    records = path / "records.bin"
    content = bytearray(records.read_bytes())
    content[-30] ^= 1
    records.write_bytes(content)
    with pytest.raises(StoreError):
        _core.StoreReader(path)
    reader = _core.StoreReader(path, skip_damaged=True)
    again = copy.copy(reader)
    assert again.skip_damaged
    np.testing.assert_array_equal(again.records(), reader.records())


def test_a_store_crosses_by_its_path(tmp_path):
    path = write(tmp_path / "store", 40)
    store = GradientStore(path)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000  # not the rows
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.rows, ROWS)
    assert isinstance(again.rows, np.memmap)


@pytest.mark.parametrize("pass_on", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_writer_stays_where_it_is(pass_on, tmp_path):
    with _core.StoreWriter.create(tmp_path / "store", 2, "{}") as writer:
        with pytest.raises(TypeError, match=r"StoreWriter of .*store cannot be pickled"):
            pass_on(writer)
        writer.append(np.ones((1, 2), dtype=np.float32), np.zeros(1, dtype=RECORD))
    assert len(_core.StoreReader(tmp_path / "store")) == 1
