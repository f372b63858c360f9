"""A store of known rows, written batch by batch, also by a process of its own, for the kill and fault tests."""

import sys
import time

import numpy as np

from bpo import _core
from bpo.store.gradient_store import RECORD, GradientStore

DIM = 48


def batch(first, end):
    """Sketches and records of some rows, which depend on nothing but their numbers."""
    rows = np.arange(first, end, dtype=np.uint64)[:, None]
    noise = (rows * np.uint64(DIM + 1) + np.arange(DIM, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    sketches = (noise >> np.uint64(40)).astype(np.float32) / 2**24 - 0.5
    records = np.zeros(end - first, dtype=RECORD)
    records["response_id"] = noise[:, :2].copy().view(np.uint8)
    records["score"] = records["logp"] = rows[:, 0]
    return sketches, records


def flip(path, byte, bit=0):
    """Turns one bit of a file."""
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1 << bit]))


def write(path, total, dtype="float16", pause=0.0):
    """Writes a store to its end, going on where it was left; says after each commit how many rows are committed."""
    try:
        writer = _core.StoreWriter.append_to(path)
    except FileNotFoundError:
        writer = _core.StoreWriter.create(path, DIM, '{"rows": "known"}', dtype=dtype)
    print("open", flush=True)
    with writer:
        while (first := len(writer)) < total:
            writer.append(*batch(first, min(total, first + 1 + first % 5)))
            if first % 3 == 0:
                writer.commit()
                print(writer.committed, flush=True)
            time.sleep(pause)


def check(path, total, reported):
    """Checks that a store holds every row that was reported, and no other than was written; returns their number."""
    store = GradientStore.open(path)
    assert reported <= len(store) <= total, (reported, len(store))
    assert len(store.verify()) == 0
    sketches, records = batch(0, len(store))
    tolerance = {"float32": 0, "float16": 2e-4, "bfloat16": 2e-3, "int8": 3e-3}[store.dtype]
    np.testing.assert_allclose(store.sketches(), sketches, atol=tolerance)
    for name in ("response_id", "score", "logp"):
        np.testing.assert_array_equal(store.records[name], records[name])
    return len(store)


def contents(path):
    """The bytes of every file."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
