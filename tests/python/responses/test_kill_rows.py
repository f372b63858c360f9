"""Sampling and scoring that are killed at any moment and go on to the same bytes.

A few times on every run; ``make torture`` sets BPO_TORTURE for hundreds.
"""

import os
import sys
import time

import numpy as np
import pytest

if sys.platform == "win32":
    pytest.skip("there is no SIGKILL", allow_module_level=True)
import job
from row_writer import run, sample, score

TORTURE = int(os.environ.get("BPO_TORTURE", "0"))


def contents(directory):
    """All files but those that a kill may leave of a replacement, whose names begin with a dot."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if not file.name.startswith(".")}


@pytest.mark.parametrize(("work", "kills_wanted"), [(sample, TORTURE or 4), (score, TORTURE or 8)])
def test_killed_work_goes_on_to_the_same_bytes(tmp_path, work, kills_wanted):
    context = job.context()
    started = context.Event()

    def finishes(directory, seconds=None, most_bytes=None):
        directory.mkdir(exist_ok=True)
        started.clear()
        process = context.Process(target=run, args=(work, directory / "rows.jsonl", started, most_bytes))
        process.start()
        started.wait()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode == 0

    assert finishes(tmp_path / "first")
    began = time.perf_counter()
    assert finishes(tmp_path / "whole")
    seconds = time.perf_counter() - began
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "first") == whole and set(whole) == {"rows.jsonl", "rows.manifest.json"}
    total = len(whole["rows.jsonl"])
    generator = np.random.default_rng(4)
    kills = files = 0
    counts = set()
    while kills < kills_wanted:
        directory, finished = tmp_path / f"run-{files}", False
        while not finished:
            # At a moment, or at a byte: of what is appended, or of the file in the order of the data.
            at_byte = generator.random() < 0.6
            most_bytes = int(generator.uniform(0, 1.1) * total) if at_byte else None
            finished = finishes(directory, None if at_byte else generator.uniform(0, 1.1) * seconds, most_bytes)
            kills += not finished
            path = directory / "rows.jsonl"
            counts.add(path.read_bytes().count(b"\n") if path.exists() else 0)
        assert contents(directory) == whole
        files += 1
    print(f"{kills} kills of {files} files, which left {len(counts)} different numbers of rows")
