"""The gradient store: what is written comes back, and what is torn or damaged is noticed."""

import json
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from bpo._core import (
    StoreDamagedError,
    StoreError,
    StoreLockedError,
    StoreReader,
    StoreVersionError,
    StoreWriter,
    repair_store,
)
from bpo.store.gradient_store import RECORD, SET_ASIDE, GradientStore, widened
from store_writer import flip

DIM = 6
HEADER_BYTES = 72
DTYPES = ("float32", "float16", "bfloat16", "int8")


def batch(n, seed=0):
    generator = np.random.default_rng(seed)
    records = np.frombuffer(generator.bytes(n * RECORD.itemsize), dtype=RECORD).copy()
    records["flags"] &= 7
    return generator.standard_normal((n, DIM), dtype=np.float32), records


@pytest.fixture
def store(tmp_path):
    """A store of five rows, closed."""
    path = tmp_path / "store"
    with StoreWriter.create(path, DIM, json.dumps({"model": "tiny", "β": [0.1]})) as writer:
        writer.append(*batch(3, seed=0))
        writer.append(*batch(2, seed=1))
        assert (len(writer), writer.dim, writer.path) == (5, DIM, path)
    return path


def test_round_trip(store):
    reader = StoreReader(store)
    assert (len(reader), reader.dim, reader.dtype, reader.path, reader.tail_bytes) == (5, DIM, "float32", store, 0)
    assert json.loads(reader.fingerprint_json) == {"model": "tiny", "β": [0.1]}
    rows = np.memmap(reader.rows_path, dtype="<f4", mode="r", shape=(len(reader), DIM))
    records = reader.records().view(RECORD)
    sketches, written = (np.concatenate(parts) for parts in zip(batch(3, 0), batch(2, 1), strict=True))
    np.testing.assert_array_equal(rows, sketches)
    for name in ("prompt_id", "response_id", "length", "flags"):
        np.testing.assert_array_equal(records[name], written[name])
    np.testing.assert_array_equal(records["score"].view(np.uint64), written["score"].view(np.uint64))
    np.testing.assert_array_equal(records["log_weight"].view(np.uint32), written["log_weight"].view(np.uint32))
    assert (records["scale"] == 1).all()
    for index, (record, row) in enumerate(zip(records, rows, strict=True)):
        assert record["row_crc32"] == zlib.crc32(row.tobytes())
        assert record["crc32"] == zlib.crc32(record.tobytes()[:68], zlib.crc32(index.to_bytes(8, "little")))
    assert reader.verify().shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    sketches=stn.arrays(
        np.float32,
        st.tuples(st.integers(0, 7), st.integers(1, 9)),
        elements=st.floats(-(2.0**99), 2.0**99, width=32) | st.floats(-10, 10, width=32) | st.just(0),
    ),
    cuts=st.lists(st.integers(0, 7), max_size=3),
)
def test_what_is_written_is_read(tmp_path_factory, dtype, sketches, cuts):
    path = tmp_path_factory.mktemp("property") / "store"
    _, records = batch(len(sketches))
    with StoreWriter.create(path, sketches.shape[1], "{}", dtype=dtype) as writer:
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(sketches)], strict=True):
            writer.append(np.ascontiguousarray(sketches[begin:end]), records[begin:end])
    store = GradientStore.open(path)
    assert (store.dtype, len(store), len(store.verify())) == (dtype, len(sketches), 0)
    for name in ("prompt_id", "response_id", "length", "flags"):
        np.testing.assert_array_equal(store.records[name], records[name])
    largest = np.abs(sketches).max(axis=1, keepdims=True) if len(sketches) else 0
    step = {"float32": 0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 0.5 / 127}[dtype]
    # Relative to the largest number of the row; but for int8 the error is relative to each number, too.
    error = np.abs(store.sketches() - sketches)
    assert (error <= 1.001 * step * largest + 1e-37).all()
    if dtype != "int8":
        assert (error <= 1.001 * step * np.abs(sketches) + largest * 2.0**-38 + 1e-37).all()
    np.testing.assert_array_equal(widened(store.rows) * store.scales[:, None], store.sketches())


def test_rows_count_once_they_are_committed(tmp_path):
    path = tmp_path / "store"
    writer = StoreWriter.create(path, DIM, "{}", dtype="int8")
    writer.append(*batch(3))
    assert (len(writer), writer.committed, len(StoreReader(path))) == (3, 0, 0)
    assert StoreReader(path).tail_bytes == 3 * DIM
    writer.commit()
    assert (writer.committed, len(StoreReader(path))) == (3, 3)
    writer.append(*batch(1))
    writer.close()
    assert len(StoreReader(path)) == 4


def test_a_reader_beside_a_writer_sees_whole_commits_and_never_a_torn_row(tmp_path):
    path = tmp_path / "store"
    code = f"""
import sys
import numpy as np
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from test_core_store import StoreWriter, batch
with StoreWriter.create({str(path)!r}, 6, "{{}}", dtype="float16") as writer:
    print(flush=True)
    for step in range(400):
        writer.append(*batch(1 + step % 7, seed=step))
        writer.commit()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    counts = []
    while process.poll() is None:
        reader = StoreReader(path)
        counts.append(len(reader))
        assert reader.verify().shape == (0,)
        assert len(reader.records()) == counts[-1] * RECORD.itemsize
    assert process.returncode == 0
    assert sorted(counts) == counts and len(set(counts)) > 3
    ends = {0, *np.cumsum([1 + step % 7 for step in range(400)]).tolist()}
    assert set(counts) <= ends


@pytest.mark.parametrize(("name", "keep"), [("rows.f32", 4 * DIM * 4 + 3), ("records.bin", HEADER_BYTES + 4 * 72 + 71)])
def test_a_file_cut_short_is_named_and_the_rest_can_be_used(store, name, keep):
    with (store / name).open("r+b") as file:
        file.truncate(keep)
    for open_ in (StoreReader, StoreWriter.append_to):
        with pytest.raises(StoreDamagedError, match=rf"{name}: it is cut short: {keep} bytes hold 4 rows of 5; `bpo s"):
            open_(store)
    assert len(StoreReader(store, skip_damaged=True)) == 4
    done = repair_store(store)
    assert (done.count, done.lost, done.set_aside.tolist()) == (4, 1, [])
    with StoreWriter.append_to(store) as writer:
        assert len(writer) == 4
        writer.append(*batch(1, seed=2))
    assert (store / "rows.f32").stat().st_size == 5 * DIM * 4
    assert (store / "records.bin").stat().st_size == HEADER_BYTES + 5 * 72
    assert StoreReader(store).verify().shape == (0,)


def test_damage_to_a_row_is_found(store):
    flip(store / "rows.f32", 3 * DIM * 4)
    calls = []
    reader = StoreReader(store)
    assert reader.verify(progress=lambda done, total: calls.append((done, total))).tolist() == [3]
    assert calls[-1] == (5, 5)
    assert reader.verify(np.array([True, True, True, False, True])).tolist() == []
    with pytest.raises(ValueError, match=r"`wanted` must have shape \(5,\)"):
        reader.verify(np.ones(4, dtype=bool))
    target = StoreWriter.create(store.parent / "copy", DIM, "{}")
    with pytest.raises(StoreDamagedError, match=r"rows\.f32: row 3, at byte 72, is not as it was written"):
        target.copy_from(reader, np.ones(5, dtype=bool))


def test_damage_to_a_record_is_named_and_the_rest_can_be_used(store):
    flip(store / "records.bin", HEADER_BYTES + 3 * 72 + 40)
    with pytest.raises(StoreDamagedError, match=r"records\.bin: the record of row 3, at byte 288, is damaged; `bpo s"):
        StoreReader(store)
    reader = StoreReader(store, skip_damaged=True)
    records = reader.records().view(RECORD)
    assert (records["flags"] == SET_ASIDE).tolist() == [False, False, False, True, False]
    assert reader.verify().tolist() == [3]


def test_repair_sets_damaged_rows_aside_and_moves_nothing(store):
    flip(store / "rows.f32", 1 * DIM * 4)
    flip(store / "records.bin", HEADER_BYTES + 3 * 72)
    (store / "manifest.json").unlink()
    with pytest.raises(StoreDamagedError, match=r"manifest\.json: it is missing, but the rows are there"):
        StoreReader(store)
    with pytest.raises(StoreDamagedError, match="it is missing"):
        StoreWriter.create(store, DIM, "{}")
    rows = (store / "rows.f32").read_bytes()
    done = repair_store(store)
    assert (done.mended, done.set_aside.tolist(), done.lost) == (["manifest.json", "records.bin"], [1, 3], 0)
    assert (store / "rows.f32").read_bytes() == rows
    reader = StoreReader(store)
    assert (len(reader), reader.verify().tolist()) == (5, [])
    again = repair_store(store)
    assert (again.mended, again.set_aside.tolist(), again.count) == ([], [], 5)
    copy = StoreWriter.create(store.parent / "copy", DIM, "{}")
    copy.copy_from(reader, np.ones(5, dtype=bool))
    assert copy.committed == 3  # those that are set aside stay behind


def test_rows_are_copied_as_they_are_and_converted_where_dtypes_differ(store, tmp_path):
    reader = StoreReader(store)
    wanted = np.array([True, False, True, True, False])
    for dtype, same in (("float32", True), ("int8", False)):
        with StoreWriter.create(tmp_path / dtype, DIM, "{}", dtype=dtype) as writer:
            writer.copy_from(reader, wanted)
        copy = GradientStore.open(tmp_path / dtype)
        original = GradientStore.open(store).rows[wanted]
        np.testing.assert_allclose(copy.sketches(), original, atol=0 if same else np.abs(original).max() / 200)
        np.testing.assert_array_equal(
            copy.records["response_id"], GradientStore.open(store).records["response_id"][wanted]
        )
    other = StoreWriter.create(tmp_path / "wider", DIM + 1, "{}")
    with pytest.raises(ValueError, match=r"`dim` must be 7 in every store, but is 6"):
        other.copy_from(reader, wanted)


def test_one_writer_at_a_time(store):
    writer = StoreWriter.append_to(store)
    for open_ in (StoreWriter.append_to, repair_store):
        with pytest.raises(StoreLockedError, match="another process is writing to this store"):
            open_(store)
    assert len(StoreReader(store)) == 5
    writer.close()
    writer.close()
    with pytest.raises(StoreError, match="is closed"):
        writer.append(*batch(1))
    StoreWriter.append_to(store).close()


def test_a_dead_writer_leaves_no_lock_and_no_row_that_was_not_committed(store):
    code = f"""
import os, sys
sys.path.insert(0, {str(__file__.rsplit("/", 1)[0])!r})
from test_core_store import StoreWriter, batch
writer = StoreWriter.append_to({str(store)!r})
writer.append(*batch(2))
writer.commit()
writer.append(*batch(2))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 9
    assert StoreReader(store).tail_bytes == 2 * DIM * 4
    with StoreWriter.append_to(store) as writer:
        assert len(writer) == 7
    assert StoreReader(store).tail_bytes == 0


def test_errors_say_what_to_do(store, tmp_path):
    with pytest.raises(StoreError, match="there is a store already"):
        StoreWriter.create(store, DIM, "{}")
    with pytest.raises(FileNotFoundError):
        StoreReader(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        StoreWriter.append_to(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(FileNotFoundError):
        repair_store(tmp_path / "nothing")
    with pytest.raises(ValueError, match="`dim` must be in"):
        StoreWriter.create(tmp_path / "new", 0, "{}")
    with pytest.raises(ValueError, match="`dtype` must be one of float32, float16, bfloat16, int8, but is float64"):
        StoreWriter.create(tmp_path / "new", DIM, "{}", dtype="float64")
    with pytest.raises(ValueError, match="`fingerprint_json` must be a JSON object"):
        StoreWriter.create(tmp_path / "new", DIM, "[]")
    assert issubclass(StoreError, ValueError)
    sketches, records = batch(2)
    with StoreWriter.append_to(store) as writer:
        with pytest.raises(ValueError, match="`records` must have shape"):
            writer.append(sketches, records[:1])
        with pytest.raises(ValueError, match=rf"`sketches` must have shape \(n, {DIM}\)"):
            writer.append(sketches[:, :2].copy(), records)
        with pytest.raises(TypeError, match="items of 72 bytes"):
            writer.append(sketches, np.zeros(144, dtype=np.uint8))
        sketches[1, 2] = np.inf
        with pytest.raises(ValueError, match="`sketches` row 1 holds a NaN or infinite value"):
            writer.append(sketches, records)
        assert len(writer) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, but this release of bpo reads version 3; use the release"),
        ({"format_version": 4}, "format version 4, but this release of bpo reads version 3; update bpo"),
        ({"format": "other"}, "this is not a store"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2**60}, "dim is 1152921504606846976"),
        ({"dim": -1}, "dim is -1"),
        ({"dtype": "float64"}, "dtype"),
        ({"fingerprint": 3}, "fingerprint is not a JSON object"),
    ],
)
def test_the_manifest_is_checked(store, change, message):
    text = json.dumps(json.loads((store / "manifest.json").read_text()) | change)
    (store / "manifest.json").write_text(text)
    with pytest.raises(StoreDamagedError, match=r"manifest\.json: it is not as it was written"):
        StoreReader(store)
    # With a header that says so.
    shutil.copy(store / "manifest.json", store / "manifest.copy.json")
    header = bytearray((store / "records.bin").read_bytes())
    header[16:20] = zlib.crc32(text.encode()).to_bytes(4, "little")
    header[20:24] = zlib.crc32(header[:20]).to_bytes(4, "little")
    (store / "records.bin").write_bytes(header)
    kind = StoreVersionError if "format_version" in change else StoreError
    for open_ in (StoreReader, StoreWriter.append_to, repair_store):
        with pytest.raises(kind, match=message):
            open_(store)


@pytest.mark.parametrize(("at", "value"), [(0, b"c"), (8, b"\2"), (8, b"\4"), (12, b"\x50"), (60, b"\1")])
def test_the_header_is_checked(store, at, value):
    """Name, version and size of a record, and that nothing follows the counts, even if the checksum agrees."""
    header = bytearray((store / "records.bin").read_bytes())
    header[at : at + 1] = value
    header[20:24] = zlib.crc32(header[:20]).to_bytes(4, "little")
    (store / "records.bin").write_bytes(header)
    with pytest.raises(StoreDamagedError, match=r"records\.bin: its header, bytes 0 to 72 of \d+, is damaged"):
        StoreReader(store)
