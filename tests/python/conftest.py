"""Fixtures that several rooms use; what makes them is in ``helpers``."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

# Ctrl-C is ignored by what a script starts in its background, and by all that these start in turn.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On models this small more threads cost more than they give, and far more where processes share the tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that tests start find the helpers, too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(Path(__file__).with_name("helpers")), os.environ.get("PYTHONPATH")])
)

import pytest
import torch
from tqdm import tqdm

# Where there is no GPU its kernels are interpreted, which Triton decides when it is imported: by transformers at last.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tiny import build_tokenizer, scored_rows, tiny_llama

# That of tqdm is shared with forked children, and one that is killed while it holds it would stop all others for good.
tqdm.set_lock(threading.RLock())
torch.set_num_threads(1)


def pytest_collection_finish():
    """Has the collections of garbage, one after every training, leave out the modules: millions of objects."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # else libraries take what they find at the end of the program for leaks, and say so


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """A two-layer Llama of 32 dimensions."""
    return tiny_llama(tokenizer)


@pytest.fixture(scope="session")
def model_path(model, tokenizer, tmp_path_factory):
    """The same, saved."""
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def smollm2():
    """The path of the demo's SmolLM2-135M-Instruct."""
    demo = Path(__file__).resolve().parents[2] / "demo"
    sys.path.insert(0, str(demo))
    try:
        import models
    finally:
        sys.path.remove(str(demo))
    return str(models.policy(demo / "output" / "models"))


@pytest.fixture
def rows():
    return scored_rows()


@pytest.fixture
def mount(tmp_path):
    """A function that mounts something, skipping the test where that cannot be done."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a file system of its own needs Linux and root")
    mounts = []

    def mount(*arguments):
        directory = tmp_path / f"mount-{len(mounts)}"
        directory.mkdir()
        done = subprocess.run(["mount", *map(str, arguments), directory], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot be mounted here: {done.stderr.strip()}")
        mounts.append(directory)
        return directory

    yield mount
    for directory in reversed(mounts):
        subprocess.run(["umount", "--lazy", directory], check=False, capture_output=True)
