"""Plants faults into a copy of the core, one at a time, and says which of them no test notices.

``python tests/mutants [--only NAME]``. The copy and what is built of it stay in target/mutants, so a fault costs an
incremental build. What must notice it runs on the sound core first. The exit status is 1 if a fault survives.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from planted import ROOT, faults

HOME = ROOT / "target" / "mutants"
TREE = HOME / "tree"
CARGO = HOME / "cargo"
COPIED = ("rust", "tests", "python", "benches", "Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md")
LONGEST = 300  # seconds of a test, which then counts as failed: a fault may well make it wait for ever
ENVIRONMENT = {
    **os.environ,
    "CARGO_TARGET_DIR": str(CARGO),
    # Quick to build, quick enough to run, and without checks that the wheel has not.
    "CARGO_INCREMENTAL": "1",
    "CARGO_PROFILE_DEV_OPT_LEVEL": "1",
    "CARGO_PROFILE_DEV_DEBUG": "0",
    "CARGO_PROFILE_DEV_DEBUG_ASSERTIONS": "false",
    "CARGO_PROFILE_DEV_OVERFLOW_CHECKS": "false",
    "CARGO_TERM_COLOR": "never",
    "OMP_NUM_THREADS": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # which take longer to load than most of these tests
    "PYTHONPATH": os.pathsep.join([str(TREE / "python"), str(TREE / "tests" / "python" / "helpers")]),
    "PYTHONDONTWRITEBYTECODE": "1",
}


def main():
    parser = argparse.ArgumentParser(prog="tests/mutants", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this fault, or those like kmeans-*; repeatable"
    )
    parser.add_argument("--list", action="store_true", help="name the faults, and plant none")
    options = parser.parse_args()
    every = faults()
    chosen = [fault for fault in every if not options.only or any(fnmatch(fault.name, name) for name in options.only)]
    if not chosen:
        parser.error(f"no fault is called {' or '.join(options.only)}: see --list")
    if options.list:
        width = max(len(fault.name) for fault in chosen)
        print(*(f"{fault.name:{width}}  {fault.file}" for fault in chosen), sep="\n")
        return 0
    copy_tree()
    unsound = unsound_tests(chosen)
    results = []
    for number, fault in enumerate(chosen, start=1):
        begin = time.monotonic()
        print(f"{number:3}/{len(chosen)} {fault.name} ...", end=" ", flush=True)
        failing = [unsound[test] for test in tests_of(fault) if test in unsound]
        verdict, by = ("FAILS ANYHOW", failing[0]) if failing else plant(fault)
        results.append((fault, verdict, time.monotonic() - begin, by))
        print(f"{verdict} ({results[-1][2]:.0f} s)", flush=True)
    return report(results)


def copy_tree():
    """Brings the copy up to date, and leaves files that are the same alone: they need no build."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *COPIED]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    wanted = {Path(name) for name in names if name and (ROOT / name).is_file()}
    for path in [path for path in TREE.rglob("*") if path.is_file()]:
        if path.relative_to(TREE) not in wanted and path.suffix != ".so":
            path.unlink()
    for name in wanted:
        source, copy = ROOT / name, TREE / name
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def unsound_tests(chosen):
    """What fails without a fault, or is not there at all, and so tells nothing."""
    unsound = {}
    for kind, tests in sorted({test for fault in chosen for test in tests_of(fault)}):
        begin = time.monotonic()
        print(f"without a fault: {tests} ...", end=" ", flush=True)
        verdict, by = run_tests(kind, tests)
        if verdict != "survived":
            unsound[kind, tests] = by
        print("passes" if verdict == "survived" else f"FAILS: {by}", f"({time.monotonic() - begin:.0f} s)", flush=True)
    return unsound


def tests_of(fault):
    return [(kind, tests) for kind, tests in (("rust", fault.rust), ("python", fault.python)) if tests]


def plant(fault):
    """Builds the core with a fault and runs its tests; returns the verdict, and which test it was."""
    if fault.occurrences() != 1:
        return "STALE", f"`old` occurs {fault.occurrences()} times"
    copy = TREE / "rust" / fault.file
    text = copy.read_text(encoding="utf-8")
    try:
        copy.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        for kind, tests in tests_of(fault):
            verdict, by = run_tests(kind, tests)
            if verdict != "survived":
                return verdict, by
        return "SURVIVED", ""
    finally:
        copy.write_text(text, encoding="utf-8")


def run_tests(kind, tests):
    """Builds what some tests need and runs them: survived, found, or a word in capitals for what must not be."""
    words = shlex.split(tests)
    if kind == "rust":
        target = words[:1] if words[0] == "--lib" else words[:2]
        build = ["cargo", "test", "--quiet", "--no-run", *target]
        run = ["cargo", "test", *target, "--", *words[len(target) :]]
    else:
        build = ["cargo", "build", "--quiet", "--features", "python", "--lib"]
        run = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--noconftest", *words]
    code, output = execute(build, TREE)
    if code:
        return "DID NOT BUILD", (re.findall(r"^error.*", output, re.MULTILINE) or [output[-200:]])[0]
    if kind == "python":
        install_core()
    code, output = execute(run, TREE if kind == "rust" else TREE / "tests" / "python" / "core")
    failed = re.findall(r"^test (\S+) \.\.\. FAILED|^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    nothing = code in (4, 5) if kind == "python" else re.search(r"^test result: ok. 0 passed", output, re.MULTILINE)
    if nothing:
        return "NO SUCH TEST", tests
    if code is None:
        return "found", f"none ended within {LONGEST} s"
    by = next((first or second for first, second in failed), output[-200:])
    return ("found", by.rpartition("/")[2]) if code else ("survived", "")


def install_core():
    """Puts the core that was built beside the package."""
    endings = {"darwin": ("libbpo.dylib", ".abi3.so"), "win32": ("bpo.dll", ".pyd")}
    built, ending = endings.get(sys.platform, ("libbpo.so", ".abi3.so"))
    target = TREE / "python" / "bpo" / f"_core{ending}"
    target.unlink(missing_ok=True)  # not written over: a process may have it mapped
    shutil.copyfile(CARGO / "debug" / built, target)


def execute(command, directory):
    """The exit status, none if it took too long, and all that was printed."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LONGEST if "pytest" in command or "--" in command else None)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, ""
        raise
    return process.returncode, output


def report(results):
    """A table of all, those that need work at its end; the exit status."""
    results.sort(key=lambda result: result[1] != "found")
    width = max(len(fault.name) for fault, *_ in results)
    print()
    for fault, verdict, seconds, by in results:
        print(f"{fault.name:{width}}  {fault.file:24}  {verdict:12}  {seconds:4.0f} s  {by}")
    found = sum(verdict == "found" for _, verdict, *_ in results)
    print(f"\n{found} of {len(results)} faults were found, in {sum(seconds for *_, seconds, _ in results):.0f} s")
    return int(found < len(results))


if __name__ == "__main__":
    sys.exit(main())
