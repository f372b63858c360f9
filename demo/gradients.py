"""The gradients that ship with the demo: how they were made, and whether they are what they were.

`python demo/gradients.py` makes those of all prompts of data/responses.jsonl anew (about 25 minutes on 2 cores);
`--check` compares what is there with the model, the data and the settings, and computes those of two prompts again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import bpo
from models import policy

HERE = Path(__file__).resolve().parent
STORE = HERE / "data" / "gradients"


def main() -> int:
    """Makes the store, or checks it; returns 1 if it is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compute those of two prompts and compare")
    parser.add_argument("--output", type=Path, default=HERE / "output", help="folder that the model is put into")
    options = parser.parse_args()
    model = str(policy(options.output / "models"))
    if options.check:
        worst = difference(model, rows()[:2])
        print(f"{len(bpo.GradientStore.open(STORE))} gradients; those of two prompts differ by {worst:.1e} at most")
        return int(worst > 0.01)
    with tempfile.TemporaryDirectory() as scratch:
        bpo.collect_gradients(model, rows(), store=Path(scratch) / "store")
        shutil.rmtree(STORE, ignore_errors=True)
        shutil.copytree(Path(scratch) / "store", STORE, ignore=shutil.ignore_patterns("lock"))
    return 0


def rows() -> list[dict[str, Any]]:
    """The scored responses of all prompts."""
    lines = (HERE / "data" / "responses.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: json.loads(line)[name] for name in ("prompt", "responses", "scores")} for line in lines]


def difference(model: str, some: list[dict[str, Any]]) -> float:
    """The largest relative difference between gradients that ship and those that a model gives now.

    Raises:
        ValueError: They are of another model, or of other settings.
    """
    with tempfile.TemporaryDirectory() as scratch:
        now = bpo.collect_gradients(model, some, store=Path(scratch) / "store")
        stored = bpo.GradientStore.open(STORE)
        if {**stored.fingerprint, "bpo": None} != {**now.fingerprint, "bpo": None}:  # any release may have made them
            raise ValueError(f"The gradients in {STORE} are of another model or of other settings: make them anew.")
        place = {bytes(name): row for row, name in enumerate(stored.records["response_id"])}
        found, known = now.sketches(), stored.sketches()[[place[bytes(name)] for name in now.records["response_id"]]]
    return float((np.linalg.norm(found - known, axis=1) / np.linalg.norm(known, axis=1)).max())


if __name__ == "__main__":
    sys.exit(main())
