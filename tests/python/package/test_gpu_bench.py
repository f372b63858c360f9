"""The benchmark of the GPU at the tiny sizes that it has without one, and what becomes of what fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHES = Path(__file__).resolve().parents[3] / "benches" / "python"

# Another part, whose measurements do what may happen to one on a GPU.
MEASUREMENTS = """
import os
import time

from table import Row


def good(card):
    yield Row("good", "1", "", "")


def raises(card):
    yield Row("before the error", "1", "", "")
    raise ValueError("planted")


def dies(card):
    os._exit(7)


def hangs(card):
    time.sleep(600)


def late(card):
    yield Row("late", "1", "", "")


def measurements():
    return {"raises": raises, "dies": dies, "good": good, "hangs": hangs, "too late": late}
"""
COMMAND = """
import gpu

gpu.LIMITS["bad"], gpu.GRACE = 10, 1
if __name__ == "__main__":
    gpu.main()
"""


def run(script, output, *arguments, path=()):
    """Runs the benchmark; returns its output and what it wrote."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [*map(str, path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(script), "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((output / "gpu.json").read_text())


def test_everything_runs_without_a_gpu_and_says_that_nothing_was_measured(tmp_path):
    printed, told = run(BENCHES / "gpu.py", tmp_path, "--seconds", "4000")  # nothing here depends on the clock
    assert "measured nothing" in printed.splitlines()[-1]
    assert told["measured"] is False
    rows = told["rows"]
    assert not [row for row in rows if row["ours"] in ("FAILED", "not run")]
    # Right is right at any size; a rate has no goal here.
    right = [row["met"] for row in rows if row["part"] == "right"]
    assert right.count(True) >= 15
    assert False not in right
    assert {row["goal"] for row in rows if row["part"] == "fast"} == {None}
    names = {(row["name"], row["peer"]) for row in rows}
    for name, peer in (
        ("fresh LoRA", "PEFT, a backward a batch"),
        ("fresh LoRA", "TRL's DPO step, reference included"),
        ("fresh LoRA", "PEFT, a backward a response"),
        ("every parameter, factored", "PEFT, a backward a batch"),
        ("trained LoRA", "PEFT, a backward a batch"),
        ("store on disk", "without a store"),
        ("peak memory, fresh LoRA", "TRL's DPO step"),
    ):
        assert (f"tiny for 1B, long: {name}", peer) in names
    assert ("comparison: bpo less random", "") in names
    assert (tmp_path / "profile-1B.txt").stat().st_size > 0


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path):
    (tmp_path / "gpu_bad.py").write_text(MEASUREMENTS)
    (tmp_path / "command.py").write_text(COMMAND)
    _, told = run(tmp_path / "command.py", tmp_path, "--only", "bad", path=[BENCHES])
    rows = {row["name"]: row["ours"] for row in told["rows"] if row["part"] == "bad"}
    assert rows == {
        "before the error": "1",
        "raises": "FAILED",
        "dies": "FAILED",
        "good": "1",
        "hangs": "FAILED",
        "too late": "not run",
    }
