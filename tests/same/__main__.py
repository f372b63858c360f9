"""Says whether two wheels of bpo behave the same: ``python tests/same BASE.whl OTHER.whl``.

Each wheel is installed into a directory of its own, and a process of its own writes down what it observes of it. Only
public names are used, so the wheels may differ in how they are laid out inside. What the two observed is then compared
file by file. The exit status is 1 if anything differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

TOPICS = ("interface", "reading", "stores", "selections", "answers", "trainings", "comparisons", "commands", "refusals")
# Whatever arithmetic or output depends on beside the wheel.
FIXED = {
    "COLUMNS": "100",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "NO_COLOR": "1",
    "TZ": "UTC",
    "SOURCE_DATE_EPOCH": "0",
}


def main():
    parser = argparse.ArgumentParser(prog="tests/same", description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="*", help="two wheels; with --record, none")
    parser.add_argument("--topic", action="append", choices=TOPICS, help="observe this alone; repeatable")
    parser.add_argument("--keep", type=Path, help="directory, new or empty, that keeps everything observed")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what each of the two processes is told
    options = parser.parse_args()
    topics = options.topic or TOPICS
    if options.record is not None:
        return record(options.record, topics)
    if len(options.wheels) != 2:
        parser.error("name two wheels")
    with tempfile.TemporaryDirectory(prefix="bpo-same-") as scratch:
        return compare_wheels(options.wheels, topics, options.keep or Path(scratch))


def compare_wheels(wheels, topics, directory):
    from differences import compare

    begin = time.monotonic()
    sides = [directory / "first", directory / "second"]
    processes = [start(wheel, topics, side) for wheel, side in zip(wheels, sides, strict=True)]
    failed = False
    for process, wheel, side in zip(processes, wheels, sides, strict=True):
        if process.wait():
            failed = True
            print(f"{wheel}: could not be observed whole\n{(side / 'log.txt').read_text()[-8000:]}", file=sys.stderr)
    different = compare(*(side / "observed" for side in sides))
    print(f"{time.monotonic() - begin:.0f} s")
    return int(bool(failed or different))


def start(wheel, topics, side):
    """Installs a wheel and starts the process that observes it."""
    installed, work = (side / "installed").resolve(), side / "work"
    work.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(pip, check=True)
    home = {"HF_HOME": (side / "home").resolve(), "MPLCONFIGDIR": (side / "home").resolve()}
    environment = {**os.environ, **FIXED, **home, "PYTHONPATH": installed}
    chosen = [argument for topic in topics for argument in ("--topic", topic)]
    with (side / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, Path(__file__).resolve().parent, "--record", (side / "observed").resolve(), *chosen],
            cwd=work,
            env={name: str(value) for name, value in environment.items()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def record(directory, topics):
    """Observes the wheel that is installed in the first place of PYTHONPATH."""
    import bpo

    installed = Path(os.environ["PYTHONPATH"])
    if not Path(bpo.__file__).is_relative_to(installed):
        raise SystemExit(f"{bpo.__file__} is not of the wheel in {installed}")
    import torch

    torch.set_num_threads(1)
    from record import OBSERVATIONS, Record
    from world import World

    world = World()
    for topic in topics:
        import_module(topic)
    unfinished = 0
    # Topics import one another.
    for function in (function for function in OBSERVATIONS if function.__module__ in topics):
        begin = time.monotonic()
        torch.manual_seed(0)
        place = directory / function.__module__ / function.__name__
        found = Record(place, {str(Path.cwd()): "WORK", str(installed): "INSTALLED"})
        unfinished += not found.observe(function, world)
        print(f"{function.__module__}/{function.__name__}: {time.monotonic() - begin:.1f} s", flush=True)
    return int(unfinished > 0)


if __name__ == "__main__":
    sys.exit(main())
