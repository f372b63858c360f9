"""What is installed under which name: printed install lines, the other project called bpo, and packages that lack."""

import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import bpo
from bpo.system.optional import DISTRIBUTION, warn_of_namesake

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = Path(bpo.__file__).parent
# "pip install 'NAME[extra]'" as users read it; the names of the demo's and the benchmarks' packages are their own.
PRINTED = re.compile(r"pip install(?: --[\w-]+)* '?([\w{}-]+)(?:\[(\w+)\])?")


def _printed():
    pages = [*ROOT.glob("README.md"), *ROOT.glob("docs/*.md"), *PACKAGE.rglob("*.py")]
    for path in pages:
        for name, extra in PRINTED.findall(path.read_text(encoding="utf-8").replace("{DISTRIBUTION}", DISTRIBUTION)):
            yield path, name, extra


def test_every_printed_install_line_names_this_distribution_and_an_extra_that_it_has():
    found = [item for item in _printed() if item[1] not in ("timm", "balanced_preference_optimization-")]
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nname = "{DISTRIBUTION}"\n' in pyproject
    extras = re.findall(
        r"^(\w+) = \[", pyproject.partition("[project.optional-dependencies]")[2].partition("\n\n")[0], re.M
    )
    assert {(name, extra) for _, name, extra in found if name != DISTRIBUTION or extra not in ["", *extras]} == set()
    assert {extra for _, _, extra in found} == {"", *extras}  # each is told of somewhere


def _other_wheel(directory):
    """A wheel as the index has it under the name bpo: modules in a package without an __init__.py, and a command."""
    path = directory / "bpo-0.4.0-py3-none-any.whl"
    files = {
        "bpo/main.py": "def main():\n    print('optimizes prompts')\n",
        "bpo-0.4.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: bpo\nVersion: 0.4.0\n",
        "bpo-0.4.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "bpo-0.4.0.dist-info/entry_points.txt": "[console_scripts]\nbpo = bpo.main:main\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, "bpo-0.4.0.dist-info/RECORD"])
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in {**files, "bpo-0.4.0.dist-info/RECORD": record}.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A function that runs code where nothing but this package, in a directory of its own, is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, site / "bpo", ignore=shutil.ignore_patterns("__pycache__"))

    def run(code, site=site):
        setup = f"import sys; sys.path.insert(0, {str(site)!r}); "
        return subprocess.run([sys.executable, "-I", "-S", "-c", setup + code], capture_output=True, text=True)

    run.site = site
    return run


def test_without_numpy_or_torch_there_is_a_sentence(bare):
    done = bare("import bpo; print(bpo.__version__)")
    assert (done.stdout.strip(), done.stderr) == (bpo.__version__, "")
    done = bare("import bpo; bpo.SelectConfig")
    said = f"ImportError: bpo.SelectConfig needs numpy, which is not installed: pip install {DISTRIBUTION}"
    assert said in done.stderr.splitlines()
    run = "from bpo.cli.main import main; sys.exit(main(['{}']))"
    for command in ("--help", "show"):
        done = bare(run.format(command))
        assert done.returncode == 1
        assert re.fullmatch(rf"bpo: bpo needs \w+, which is not installed: pip install {DISTRIBUTION}\n", done.stderr)


def test_the_other_project_called_bpo_is_told_of(bare, tmp_path):
    """As pip installs it: its modules come into our package, whose import says so."""
    site = shutil.copytree(bare.site, tmp_path / "site")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_namesake(str(site / "bpo"))
    other = tmp_path / "other"
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", other, _other_wheel(tmp_path)], check=True)
    shutil.copytree(other, site, dirs_exist_ok=True)  # pip's --target would take our package away
    assert (site / "bpo" / "main.py").is_file() and (site / "bpo" / "__init__.py").is_file()
    done = bare("import bpo; print(bpo.SelectConfig.__name__ if False else bpo.__version__)", site=site)
    assert done.stdout.strip() == bpo.__version__
    assert f"was installed over {DISTRIBUTION} (bpo-0.4.0.dist-info in {site})" in done.stderr
    assert f"pip install --force-reinstall --no-deps {DISTRIBUTION}" in done.stderr
    # A package of that name with an __init__.py of its own leaves no import of ours to speak; the command still does.
    (site / "bpo" / "__init__.py").write_text("")
    done = bare("from bpo.cli.main import main; sys.exit(main(['--version']))", site=site)
    assert done.returncode == 1 and done.stderr.startswith("bpo: Another package has replaced bpo/__init__.py in ")
    assert len(done.stderr.splitlines()) == 1


def test_the_installed_command_is_ours_under_both_names():
    points = {point.name: point.value for point in metadata.distribution(DISTRIBUTION).entry_points}
    assert points["bpo"] == points[DISTRIBUTION] == "bpo.cli.main:main"
