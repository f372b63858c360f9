"""The gradient store: what is written comes back, and what is torn or damaged is noticed."""

import json
import subprocess
import sys
import zlib

import numpy as np
import pytest

from bpo._core import StoreError, StoreReader, StoreWriter

RECORD = np.dtype(
    [
        ("prompt_id", "V16"),
        ("response_id", "V16"),
        ("score", "<f8"),
        ("logp", "<f4"),
        ("ref_logp", "<f4"),
        ("length", "<u4"),
        ("flags", "<u4"),
        ("log_weight", "<f4"),
        ("crc32", "<u4"),
    ]
)
DIM = 6


def batch(n, seed=0):
    generator = np.random.default_rng(seed)
    records = np.frombuffer(generator.bytes(n * RECORD.itemsize), dtype=RECORD).copy()
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
    assert (len(reader), reader.dim, reader.path) == (5, DIM, store)
    assert json.loads(reader.fingerprint_json) == {"model": "tiny", "β": [0.1]}
    rows = np.memmap(reader.rows_path, dtype="<f4", mode="r", shape=(len(reader), DIM))
    records = reader.records().view(RECORD)
    sketches, written = (np.concatenate(parts) for parts in zip(batch(3, 0), batch(2, 1), strict=True))
    np.testing.assert_array_equal(rows, sketches)
    for name in ("prompt_id", "response_id", "length", "flags"):
        np.testing.assert_array_equal(records[name], written[name])
    np.testing.assert_array_equal(records["score"].view(np.uint64), written["score"].view(np.uint64))
    np.testing.assert_array_equal(records["log_weight"].view(np.uint32), written["log_weight"].view(np.uint32))
    for record, row in zip(records, rows, strict=True):
        assert record["crc32"] == zlib.crc32(record.tobytes()[:60] + row.tobytes())
    assert reader.verify().shape == (0,)


@pytest.mark.parametrize(("name", "keep"), [("rows.f32", 4 * DIM * 4 + 3), ("records.bin", 4 * 64 + 63)])
def test_a_torn_tail_is_ignored_then_cut(store, name, keep):
    with (store / name).open("r+b") as file:
        file.truncate(keep)
    assert len(StoreReader(store)) == 4
    assert StoreReader(store).records().shape == (256,)
    with StoreWriter.append_to(store) as writer:
        assert len(writer) == 4
        writer.append(*batch(1, seed=2))
    assert (store / "rows.f32").stat().st_size == 5 * DIM * 4
    assert (store / "records.bin").stat().st_size == 5 * 64
    assert StoreReader(store).verify().shape == (0,)


@pytest.mark.parametrize(("name", "offset"), [("rows.f32", 3 * DIM * 4), ("records.bin", 3 * 64 + 40)])
def test_damage_is_found(store, name, offset):
    with (store / name).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    calls = []
    assert StoreReader(store).verify(lambda done, total: calls.append((done, total))).tolist() == [3]
    assert calls[-1] == (5, 5)


def test_one_writer_at_a_time(store):
    writer = StoreWriter.append_to(store)
    with pytest.raises(StoreError, match="another process is writing to this store"):
        StoreWriter.append_to(store)
    assert len(StoreReader(store)) == 5
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.append(*batch(1))
    StoreWriter.append_to(store).close()


def test_a_dead_writer_leaves_no_lock(store):
    code = f"""
import os
from bpo._core import StoreWriter
writer = StoreWriter.append_to({str(store)!r})
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 9
    StoreWriter.append_to(store).close()


def test_errors_say_what_to_do(store, tmp_path):
    with pytest.raises(StoreError, match="there is a store already"):
        StoreWriter.create(store, DIM, "{}")
    with pytest.raises(FileNotFoundError):
        StoreReader(tmp_path / "nothing")
    with pytest.raises(ValueError, match="`dim` must be in"):
        StoreWriter.create(tmp_path / "new", 0, "{}")
    with pytest.raises(ValueError, match="`fingerprint_json` must be a JSON object"):
        StoreWriter.create(tmp_path / "new", DIM, "[]")
    assert issubclass(StoreError, ValueError)
    sketches, records = batch(2)
    with StoreWriter.append_to(store) as writer:
        with pytest.raises(ValueError, match="`records` must have shape"):
            writer.append(sketches, records[:1])
        with pytest.raises(ValueError, match=rf"`sketches` must have shape \(n, {DIM}\)"):
            writer.append(sketches[:, :2].copy(), records)
        with pytest.raises(TypeError, match="items of 64 bytes"):
            writer.append(sketches, np.zeros(128, dtype=np.uint8))
        assert len(writer) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format version 1, but this release reads version 2"),
        ({"format": "other"}, "this is not a store"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": 2**60}, "dim is 1152921504606846976"),
        ({"dim": -1}, "dim is -1"),
        ({"dtype": "float64"}, "dtype"),
        ({"fingerprint": 3}, "fingerprint is not a JSON object"),
    ],
)
def test_manifest_is_checked(store, change, message):
    manifest = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps(manifest | change))
    for open_ in (StoreReader, StoreWriter.append_to):
        with pytest.raises(StoreError, match=message):
            open_(store)
