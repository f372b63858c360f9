"""The GPU, measured: one command that answers in minutes, the most important first.

    python benches/python/gpu.py --output FOLDER                      # under 8 minutes on an H100
    python benches/python/gpu.py --output FOLDER --only right,fast    # some parts of it
    python benches/python/gpu.py --output FOLDER --seconds 240        # all of it in half the time

`right`: whether gradients, sketches and selections from the GPU are those of the CPU and of autograd. `fast`: rates,
shares of the card's own rate, memory, and where time goes, beside the same batches through PEFT, TRL and bergson.
`whole`: the demo's data, selected from and trained on, and a comparison of strategies over as many seeds as fit.

Rows are printed as they come, and FOLDER/gpu.json is written anew after each. A ratio is the median over the rounds,
with the least and the greatest; more is better everywhere: to cost at most 1.05 times as much as a peer is to have a
ratio of rates of at least 1 / 1.05. What is right has a tolerance, and the ratio of that to the error. The measurements
run in a process of their own: one that fails, hangs or takes the driver with it is a row, and the next ones go on.

Where there is no GPU the same code runs at tiny sizes, which shows that it works and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from table import Row, printed

# Seconds of each part; "card" says what the others run on.
LIMITS = {"card": 20, "right": 80, "fast": 220, "whole": 110}
# Beyond its limit, a measurement may take so long to notice.
GRACE = 20
START = 120  # seconds that importing may take
NOTHING = "This machine has no GPU: the same code ran at tiny sizes and measured nothing."
# In front of what the worker reports; libraries print, too.
MARK = "\x1e"
BROKEN = 3  # exit status of a worker whose device no longer answers


# The worker


def work(options: argparse.Namespace) -> int:
    """Runs the measurements from a position on, and reports each row."""
    import logging
    import warnings

    import torch
    import transformers

    from gpu_setting import Card, failed

    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)  # bergson's list of layers
    with contextlib.suppress(ImportError):
        import datasets

        datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # on models so small more threads cost more than they give
    card = Card(options.output)
    deadlines: dict[str, float] = {}
    for position, (part, name, run) in enumerate(measurements(options.only)):
        if position < options.start:
            continue
        left = options.limits[part] - options.spent.get(part, 0)
        card.deadline = deadlines.setdefault(part, time.time() + left)
        report(begin=name, part=part, position=position)
        if card.left <= 0:
            report_row(Row(name, "not run", "", "the time of this part is over"))
            continue
        start = time.time()
        try:
            for row in run(card):
                report_row(row)
            card.free()
            card.now()
        except Exception as error:
            traceback.print_exc(limit=-4)
            report_row(failed(name, error))
        report(seconds=time.time() - start)
        if not answers():
            return BROKEN
    report(done=True)
    return 0


def measurements(parts: list[str]) -> Iterator[tuple[str, str, Any]]:
    """Part, name and function of each measurement, in order."""
    yield "card", "card", describe
    for part in parts:
        module = __import__(f"gpu_{part}")
        for name, run in module.measurements().items():
            yield part, name, run


def describe(card: Any) -> Iterator[Row]:
    """The device, its software, and the rates that it reaches."""
    import importlib.metadata

    import torch

    named = ("bpo", "torch", "triton", "transformers", "peft", "trl", "bergson", "bitsandbytes")
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = [f"{package} {installed.get(package, 'none')}" for package in named]
    device, driver = "no GPU", ""
    if card.there:
        device = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    yield Row("device", device, f"driver {driver}", f"{os.cpu_count()} cores")
    yield Row("versions", ", ".join(versions), "", "")
    rates = (
        f"{card.matmul_rate / 1e12:.4g} TFLOP/s",
        f"{card.copy_rate / 1e9:.4g} GB/s, to the host {card.host_rate / 1e9:.3g} GB/s",
    )
    yield Row("limits", f"{rates[0]} of bfloat16, {card.matmul_size} on each side", "copy", rates[1])


def answers() -> bool:
    """Whether the device still works: after some errors nothing does until the process ends."""
    import torch

    try:
        return not torch.cuda.is_available() or float(torch.ones(1, device="cuda")) == 1.0
    except Exception:
        return False


def report(**told: Any) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(told)}\n")
    sys.stdout.flush()


def report_row(row: Row) -> None:
    report(row=dataclasses.asdict(row))


# The one that waits for it


@dataclasses.dataclass
class Watch:
    """What has been reported so far, on the screen and in a file."""

    options: argparse.Namespace
    rows: list[tuple[str, Row]] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    spent: dict[str, float] = dataclasses.field(default_factory=dict)  # on each part, by workers that have ended
    part: str = "card"
    name: str = "start"
    position: int = 0
    # When the worker at work was started, and when it began the part and the measurement.
    started: float = 0.0
    part_began: float = 0.0
    began: float = 0.0
    done: bool = False

    def start(self, position: int) -> None:
        """Before a worker is started; the time that it takes to import counts for no part."""
        self.position, self.name, self.part, self.started = position, "start", "", time.time()

    def end(self) -> None:
        """After one."""
        if self.name != "start":
            self.spent[self.part] = self.spent.get(self.part, 0.0) + time.time() - self.part_began

    def hear(self, line: str) -> None:
        """Takes a line of the worker."""
        if not line.startswith(MARK):
            if line.strip():
                print(line.rstrip(), file=sys.stderr, flush=True)
            return
        told = json.loads(line[len(MARK) :])
        if "begin" in told:
            self.began = time.time()
            if told["part"] != self.part:
                self.part_began = self.began
                print(f"\n== {told['part']}", flush=True)
            self.part, self.name, self.position = told["part"], told["begin"], told["position"]
        elif "row" in told:
            self.add(Row(**told["row"]))
        elif "done" in told:
            self.done = True
        else:
            self.seconds[f"{self.part}: {self.name}"] = told["seconds"]
            print(f"   ({self.name}: {told['seconds']:.1f} s)", flush=True)

    def add(self, row: Row) -> None:
        """Prints and keeps a row, in place of an earlier one of the same name and peer."""
        print("  ".join(filter(None, row.cells())), flush=True)
        known = [(part, each.name, each.peer) for part, each in self.rows]
        key = self.part, row.name, row.peer
        if key in known:
            self.rows[known.index(key)] = self.part, row
        else:
            self.rows.append((self.part, row))
        self.write()

    def write(self) -> None:
        """Writes everything so far."""
        rows = [{"part": part, **dataclasses.asdict(row), "met": row.met} for part, row in self.rows]
        there = not any(row.name == "device" and row.ours == "no GPU" for _, row in self.rows)
        told = {"measured": there, "limits": self.options.limits, "seconds": self.seconds, "rows": rows}
        path = self.options.output / "gpu.json"
        path.with_suffix(".tmp").write_text(json.dumps(told, indent=1))
        path.with_suffix(".tmp").replace(path)

    @property
    def deadline(self) -> float:
        """When the worker is ended, as of time.time()."""
        if self.name == "start":
            return self.started + START
        over = self.part_began + self.options.limits[self.part] - self.spent.get(self.part, 0.0)
        return max(over, self.began) + GRACE


def watch(options: argparse.Namespace) -> Watch:
    """Runs workers until all measurements have been tried."""
    heard = Watch(options)
    position = 0
    while True:
        heard.start(position)
        status = attempt(heard)
        heard.end()
        if heard.done:
            return heard
        if status != BROKEN:
            reason = "it took too long" if status is None else f"its process ended with {status}"
            heard.add(Row(heard.name, "FAILED", "", reason))
        if heard.name == "start":  # nothing was begun, and nothing will be
            return heard
        position = heard.position + 1


def attempt(heard: Watch) -> int | None:
    """Runs a worker from a measurement on; returns its exit status, None where it had to be ended."""
    command = [sys.executable, "-u", *sys.argv, "--start", str(heard.position), "--spent", json.dumps(heard.spent)]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace")
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=read, args=(worker.stdout, lines), daemon=True).start()
    try:
        while not heard.done:
            try:
                line = lines.get(timeout=max(heard.deadline - time.time(), 0.01))
            except queue.Empty:
                return None
            if line is None:
                return worker.wait()
            heard.hear(line)
        return 0
    finally:
        worker.kill()
        worker.wait()


def read(stream: Any, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def summary(rows: list[tuple[str, Row]]) -> str:
    """A table of what has a ratio or has failed, and of the whole: short enough to be read at the end of a log."""
    told = [row for part, row in rows if row.ratio is not None or row.ours == "FAILED" or part == "whole"]
    return printed([dataclasses.replace(row, ours=row.ours[:40], theirs=row.theirs[:60]) for row in told])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("target/gpu"), metavar="FOLDER", help="for what it leaves")
    parser.add_argument("--only", default="right,fast,whole", metavar="PARTS", help="of right, fast and whole")
    parser.add_argument("--seconds", type=float, help="for all parts together, in place of their own limits")
    parser.add_argument("--start", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--spent", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.only = options.only.split(",")
    parts = [part for part in LIMITS if part != "card"]
    if unknown := sorted(set(options.only).difference(parts)):
        parser.error(f"--only takes any of {', '.join(parts)}, not {', '.join(unknown)}")
    whole = sum(LIMITS[part] for part in options.only)
    options.limits = {
        part: LIMITS[part] if part == "card" or options.seconds is None else LIMITS[part] * options.seconds / whole
        for part in ("card", *options.only)
    }
    options.output.mkdir(parents=True, exist_ok=True)
    if options.start is not None:
        sys.exit(work(options))
    (options.output / "matmul-rate").unlink(missing_ok=True)
    start = time.time()
    heard = watch(options)
    print(f"\n{summary(heard.rows)}\n\n{time.time() - start:.0f} s")
    if any(row.ours == "no GPU" for _, row in heard.rows):
        print(NOTHING)


if __name__ == "__main__":
    main()
