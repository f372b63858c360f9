"""What a user of the installed wheel meets first."""

import contextlib
import inspect
import subprocess
import sys
from importlib import metadata, resources

import pytest
from trl import DPOConfig

import bpo
from bpo.choices import SEED
from bpo.cli.main import build_parser
from bpo.system.optional import DISTRIBUTION


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_loads_no_torch():
    heavy = {"torch", "transformers", "trl", "datasets", "pyarrow", "sklearn"}
    assert run(f"import bpo, sys; print({heavy} & set(sys.modules))").strip() == "set()"


def test_every_public_name_is_there():
    for name in bpo.__all__:
        assert getattr(bpo, name) is not None
    assert set(bpo.__all__) == set(dir(bpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bpo.nothing


def test_every_seed_has_the_same_default():
    """That of TRL, in every public function and in every command."""
    found = {"DPOConfig": inspect.signature(DPOConfig).parameters["seed"].default}
    for name in bpo.__all__:
        with contextlib.suppress(TypeError, ValueError):  # texts and exceptions have no signature
            seed = inspect.signature(getattr(bpo, name)).parameters.get("seed")
            if seed is not None and seed.default is not seed.empty:
                found[name] = seed.default
    for words in (["select", "m", "d", "--budget", "1", "--output", "o"], ["sample", "m", "p", "--output", "o"]):
        found[words[0]] = build_parser().parse_args(words).seed
    assert set(found.values()) == {SEED} and {"select", "warm_up", "cluster_pairs", "compress_breadth"} <= set(found), (
        found
    )


def test_wheel_is_abi3_typed_and_of_one_version():
    assert metadata.version(DISTRIBUTION) == bpo.__version__
    files = [str(path) for path in metadata.files(DISTRIBUTION)]
    assert any(name.startswith("bpo/_core.abi3") for name in files) or sys.platform == "win32"
    assert resources.files("bpo").joinpath("py.typed").is_file()
    assert resources.files("bpo").joinpath("_core.pyi").is_file()
