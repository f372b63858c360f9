"""What it costs to read data larger than memory: ``python benches/python/reading.py --rows 100000 1000000``.

Each form is read from a file that is written here, or from a generator, in a process of its own, up to the pairs and up
to a selection by margins. Told are the processor's time; the largest memory of the process, its own, and with pages of
files, which the system takes back when it needs them; what lies on disk; and what a row costs, by the slope between the
two largest numbers of rows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

_WORDS = "of the gradient a pair prompt which model every answer longer nine blue river under stone light if so".split()  # noqa: SIM905


def row(index: int) -> dict:
    """A pair of 38 words for the prompt and 76 for each answer, about 1.1 kB; a third repeat the prompt before."""
    turn = index % 19
    words = _WORDS[turn:] + _WORDS[:turn]
    said = " ".join(words * 4)
    return {
        "prompt": f"{index - index % 3 // 2} {' '.join(words * 2)}?",
        "chosen": f"{index} {said}",
        "rejected": f"no {index} {said}",
        "score_chosen": 2.0 + turn,
        "score_rejected": 1.0,
        "id": index,
    }


def write(path: Path, n_rows: int) -> Path:
    """A file of rows in JSON, one a line, or of Parquet."""
    import pyarrow as pa
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        with path.open("w") as file:
            for index in range(n_rows):
                file.write(json.dumps(row(index)) + "\n")
        return path
    writer = None
    for start in range(0, n_rows, 10_000):
        table = pa.Table.from_pylist([row(index) for index in range(start, min(start + 10_000, n_rows))])
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    return path


class Watch(threading.Thread):
    """The largest memory of this process, of its own and with the pages of files, and of what it has on disk."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.all = self.disk = 0
        self._done = threading.Event()

    def look(self) -> None:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.own = max(self.own, int(lines["RssAnon"].split()[0]) << 10)
        self.all = max(self.all, int(lines["VmHWM"].split()[0]) << 10)
        # Files without a name: open ones, and mapped ones.
        disk = 0
        for each in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                disk += each.stat().st_blocks * 512 if "scratch" in str(each.readlink()) else 0
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "scratch" in line:
                first, last = (int(end, 16) for end in line.split()[0].split("-"))
                disk += last - first
        self.disk = max(self.disk, disk)

    def run(self) -> None:
        while not self._done.wait(0.05):
            self.look()

    def stop(self) -> None:
        self._done.set()
        self.join()
        self.look()


def read(form: str, stage: str, path: str, n_rows: int, found: multiprocessing.SimpleQueue) -> None:
    """One reading, in a process of its own."""
    import datasets
    import pyarrow.parquet  # noqa: F401

    import bpo
    from bpo.data.rows import load_rows
    from bpo.selection import select  # noqa: F401

    data = {
        "jsonl": lambda: path,
        "parquet": lambda: path,
        "generator": lambda: (row(index) for index in range(n_rows)),
        "stream": lambda: datasets.load_dataset("json", data_files=path, split="train", streaming=True),
    }[form]()
    watch = Watch()
    watch.look()
    before = watch.own, watch.all
    watch.start()
    begin, wall = time.process_time(), time.perf_counter()
    if stage == "rows":
        kept = load_rows(data)
    elif stage == "pairs":
        kept = bpo.read_candidates(data)
    else:
        kept = bpo.select(None, data, budget=0.1, strategy="margin", progress=False, evidence=False)
    cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    watch.stop()
    found.put(
        {
            "form": form,
            "stage": stage,
            "rows": n_rows,
            "seconds": cpu,
            "wall": wall,
            "own": watch.own - before[0],
            "all": watch.all - before[1],
            "disk": watch.disk,
        }
    )
    del kept


def main() -> None:
    """Prints a line for each form, stage and number of rows, and what a row costs between the two largest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[30_000, 100_000])
    parser.add_argument("--forms", nargs="+", default=["jsonl", "generator", "parquet"])
    parser.add_argument("--stages", nargs="+", default=["rows", "pairs", "select"])
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=os.environ.get("BPO_CACHE")) as directory:
        for form in options.forms:
            runs: dict[str, list[dict]] = {}
            for n_rows in sorted(options.rows):
                path = Path(directory) / ("rows.parquet" if form == "parquet" else "rows.jsonl")
                if form != "generator":
                    write(path, n_rows)
                for stage in options.stages:
                    found = spawn.SimpleQueue()
                    process = spawn.Process(target=read, args=(form, stage, str(path), n_rows, found))
                    process.start()
                    process.join()
                    if process.exitcode:
                        raise SystemExit(f"{form}, {stage}: the process failed")
                    runs.setdefault(stage, []).append(now := found.get())
                    own, shown, disk = (now[name] / 2**20 for name in ("own", "all", "disk"))
                    print(
                        f"{form:9} {stage:6} {n_rows:>10,} rows {now['seconds']:8.1f} s  {own:8.0f} MiB of its own, "
                        f"{shown:8.0f} with pages of files, {disk:8.0f} on disk",
                        flush=True,
                    )
            for stage, those in runs.items():
                if len(those) > 1:
                    less, more = those[-2:]
                    rows = more["rows"] - less["rows"]
                    print(
                        f"{form:9} {stage:6} a row: {(more['seconds'] - less['seconds']) / rows * 1e6:6.1f} µs, "
                        f"{(more['own'] - less['own']) / rows:6.0f} bytes of its own, "
                        f"{(more['disk'] - less['disk']) / rows:6.0f} on disk; "
                        f"{rows / (more['seconds'] - less['seconds']):,.0f} rows a second",
                        flush=True,
                    )


if __name__ == "__main__":
    sys.exit(main())
