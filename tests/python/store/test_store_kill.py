"""Writers that are killed at any moment, by SIGKILL and by loss of power, and go on to the same bytes.

A few times on every run; ``make torture`` sets BPO_TORTURE for hundreds.
"""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import job
from bpo import GradientStore
from disks import image, run
from store_writer import check, contents, write
from tiny import scored_rows

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))
WRITER = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "store_writer.py")]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")


def start(path, total, dtype, pause=0.0):
    process = subprocess.Popen(
        [*WRITER, str(path), str(total), dtype, str(pause)], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "open\n"
    return process


def last_reported(process):
    """The last number of rows that the process said were committed."""
    said = process.stdout.read().split()
    return int(said[-1]) if said else 0


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_killed_writer_loses_nothing_and_ends_with_the_same_bytes(tmp_path, dtype):
    total = 2000
    write(tmp_path / "whole", total, dtype)
    whole = contents(tmp_path / "whole")
    kills = stores = 0
    generator = np.random.default_rng(0)
    while kills < (TORTURE or 8):
        path = tmp_path / f"store-{stores}"
        reported, finished = 0, False
        while not finished:
            process = start(path, total, dtype)
            time.sleep(generator.exponential(0.1))
            process.kill()
            finished = process.wait() == 0
            kills += not finished
            reported = max(reported, last_reported(process))
            assert check(path, total, reported) == total or not finished
        assert contents(path) == whole
        shutil.rmtree(path)
        stores += 1
    print(f"{kills} kills of {stores} stores")


def test_a_creation_that_is_killed_can_be_repeated(tmp_path):
    """The store is there whole or not at all."""
    write(tmp_path / "whole", 3)
    generator = np.random.default_rng(1)
    for attempt in range((TORTURE or 16) // 4):
        path = tmp_path / f"store-{attempt}"
        process = subprocess.Popen([*WRITER, str(path), "3", "float16", "0"], stdout=subprocess.DEVNULL)
        while process.poll() is None and not path.exists():
            time.sleep(0.0005)
        time.sleep(generator.exponential(0.001))
        process.kill()
        process.wait()
        write(path, 3)
        assert contents(path) == contents(tmp_path / "whole")


def extract(path, rows):
    """Extraction of real gradients, with a commit after every batch."""
    import torch

    import bpo
    import bpo.store.writer
    from tiny import build_tokenizer, tiny_llama

    bpo.store.writer._COMMIT_SECONDS = 0
    torch.set_num_threads(1)  # on a busy machine threads that wait for one another take minutes
    tokenizer = build_tokenizer()
    bpo.collect_gradients(
        tiny_llama(tokenizer),
        rows,
        processing_class=tokenizer,
        store=path,
        config=bpo.SelectConfig(sketch_dim=64, tokens_per_batch=40, threads=1),
        progress=False,
    )


def rows_of(path):
    """How many rows of a store that is being written are committed."""
    if not (path / "manifest.json").exists():
        return 0
    store = GradientStore.open(path)
    assert len(store.verify()) == 0
    return len(store)


def test_a_whole_store_that_was_not_closed_is_closed(tmp_path):
    """A writer that is killed after its last commit leaves two counts of rows, of which the next run makes one."""
    rows = scored_rows(4, 3)
    extract(tmp_path / "store", rows)
    closed = contents(tmp_path / "store")
    with (tmp_path / "store" / "records.bin").open("r+b") as file:
        file.seek(40)
        file.write(struct.pack("<QI", 0, zlib.crc32(bytes(8))))
    assert not GradientStore.open(tmp_path / "store").reader.closed
    extract(tmp_path / "store", rows)
    assert contents(tmp_path / "store") == closed


def differences(path, other):
    """What two stores hold otherwise: field → (row, one, other)."""
    one, two = GradientStore.open(path).records, GradientStore.open(other).records
    return {
        name: [
            (row, one[name][row].tolist(), two[name][row].tolist()) for row in range(len(one)) if one[row] != two[row]
        ]
        for name in one.dtype.names
    }


def test_a_killed_extraction_ends_with_the_same_bytes(tmp_path):
    rows = scored_rows(25, 6)
    context = job.context()
    process = context.Process(target=extract, args=(tmp_path / "whole", rows))
    process.start()
    process.join()
    assert process.exitcode == 0
    generator = np.random.default_rng(2)
    kills = stores = 0
    counts = set()
    while kills < (TORTURE // 2 or 4):
        path = tmp_path / f"store-{stores}"
        finished = False
        while not finished:
            # Killed once it came further by a random number of rows, not after a time, which on a busy machine may
            # suffice for none: each run brings some, the last one the rest.
            wanted = rows_of(path) + generator.integers(1, 100)
            process = context.Process(target=extract, args=(path, rows))
            process.start()
            while process.is_alive() and rows_of(path) < wanted:
                process.join(0.05)
            process.kill()
            process.join()
            finished = process.exitcode == 0
            kills += not finished
            counts.add(rows_of(path))
        assert contents(path) == contents(tmp_path / "whole"), differences(path, tmp_path / "whole")
        stores += 1
    print(f"{kills} kills of {stores} extractions, which left {len(counts)} different numbers of rows")


def test_power_is_lost_on_a_real_file_system(tmp_path, mount):
    """The disk as it is at a moment, without what the system still had in memory, is mounted anew, as after a crash."""
    empty, total = image(tmp_path / "disk", 16 << 20, ["mkfs.ext4", "-q"]), 1500
    write(tmp_path / "whole", total, "int8")
    whole = contents(tmp_path / "whole")
    generator = np.random.default_rng(3)
    losses = stores = 0
    while losses < (TORTURE // 4 or 5):
        disk, reported, finished = tmp_path / f"disk-{losses}", 0, False
        shutil.copy(empty, disk)
        while not finished:
            directory = mount("-o", "loop", disk)
            process = start(directory / "store", total, "int8")
            time.sleep(generator.exponential(0.4))
            process.send_signal(signal.SIGSTOP)
            after = tmp_path / f"disk-{losses}-after"
            shutil.copy(disk, after)  # what is on the disk at this moment
            process.kill()
            finished = process.wait() == 0
            reported = max(reported, last_reported(process))
            run("umount", directory)
            if not finished:
                losses += 1
                disk.unlink()
                disk = after
                directory = mount("-o", "loop", disk)
                check(directory / "store", total, reported)
                run("umount", directory)
        directory = mount("-o", "loop", disk)
        assert contents(directory / "store") == whole
        run("umount", directory)
        stores += 1
    print(f"{losses} losses of power of {stores} stores")
